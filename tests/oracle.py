"""The truth that sharded tables are held against: whole tables, one process, plain torch, the batch of all ranks at once.

Nothing of shardembed computes here; only its frozen settings are read. Every optimizer is its named counterpart:
`torch.optim.SGD`, `torch.optim.Adagrad`, `torch.optim.SparseAdam` (for AdamW after a decay of the touched rows), and for rowwise
Adagrad and Adam, FTRL and Lion the published formulas, written here once more in numpy.

Legend: N rows of a table, D its columns, B bags, n ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from shardembed import optim
from shardembed.tables.placement import Placement
from shardembed.tables.plan import Plan
from shardembed.tables.table_config import Feature, TableConfig, features_of


@dataclass(frozen=True)
class Bags:
    """One feature's ids on one rank, and what its outputs are multiplied with in the loss.

    ids: `[n]`. offsets: `[B + 1]`. weights: `[n]` or None. slopes: `[B, D]`, or `[n, D]` where nothing is pooled.
    """

    ids: torch.Tensor
    offsets: torch.Tensor
    weights: torch.Tensor | None
    slopes: torch.Tensor

    @property
    def given(self) -> tuple[torch.Tensor, ...]:
        """As a collection takes it."""
        return (self.ids, self.offsets) if self.weights is None else (self.ids, self.offsets, self.weights)

    def __reduce__(self) -> Any:
        # A case has thousands of small tensors, which pickle ten times as fast as arrays.
        parts = (self.ids, self.offsets, self.weights, self.slopes)
        return _bags, tuple(None if part is None else part.numpy() for part in parts)


def _bags(*parts: Any) -> Bags:
    return Bags(*(None if part is None else torch.from_numpy(part) for part in parts))


Batch = dict[str, Bags]  # by feature


@dataclass(frozen=True)
class Case:
    """A training run, given the same to the ranks and to the oracle.

    batches: `[step][micro-batch][rank]`. curved: the loss of a rank is the sum of slopes * output, plus output^2 / 4 when curved
        (then gradients depend on the weights). ranks_per_node: what the ranks believe of their machines.
    """

    tables: tuple[TableConfig, ...]
    optimizers: dict[str, optim.TableOptimizer]
    plan: dict[str, Placement] | Plan
    batches: list[list[list[Batch]]]
    curved: bool = True
    wire_dtype: torch.dtype | None = None
    reduction: Literal["mean", "sum"] = "mean"
    update: Literal["step", "backward"] = "step"
    kernel: Literal["auto", "reference", "numba", "triton", "fbgemm"] = "auto"
    ranks_per_node: int = 2
    seed: int = 0

    @property
    def features(self) -> tuple[Feature, ...]:
        return features_of(self.tables)

    @property
    def world_size(self) -> int:
        return len(self.batches[0][0])

    def of_rank(self, rank: int) -> Case:
        """The case with one rank's batches only."""
        return replace(self, batches=[[[ranks[rank]] for ranks in step] for step in self.batches])


def loss_of(outputs: dict[str, torch.Tensor], batch: Batch, curved: bool) -> torch.Tensor:
    """The loss of one rank; written once, since it is not what is tested."""
    parts = []
    for name, output in outputs.items():
        slopes = batch[name].slopes.to(output.dtype)
        parts.append((slopes * output).sum() + (output.square().sum() / 4 if curved else 0.0))
    return torch.stack([part.to(torch.float64) for part in parts]).sum()


def lookup(
    weight_ND: torch.Tensor, pooling: str | None, ids: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    """What `nn.Embedding` or `nn.EmbeddingBag` answers, or the published formula where torch has no such pooling."""
    scale = None if weights is None else weights.to(weight_ND.dtype)
    return POOLED[pooling](ids, weight_ND, offsets, per_sample_weights=scale)


def _sqrtn(ids: torch.Tensor, weight_ND: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """TensorFlow's "sqrtn": the sum of a bag's vectors over the root of their number."""
    rows = F.embedding(ids, weight_ND)
    bags = torch.repeat_interleave(offsets.diff())
    sums = rows.new_zeros(len(offsets) - 1, rows.shape[1]).index_add(0, bags, rows)  # in order, as torch's bags are
    return sums / torch.tensor([max(n, 1) ** 0.5 for n in offsets.diff().tolist()], dtype=rows.dtype).unsqueeze(1)


POOLED: dict[str | None, Callable[..., torch.Tensor]] = {
    "sum": partial(F.embedding_bag, mode="sum", include_last_offset=True),
    "mean": partial(F.embedding_bag, mode="mean", include_last_offset=True),
    "sqrtn": lambda ids, weight_ND, offsets, per_sample_weights: _sqrtn(ids, weight_ND, offsets),
    "max": partial(F.embedding_bag, mode="max", include_last_offset=True),
    None: lambda ids, weight_ND, offsets, per_sample_weights: F.embedding(ids, weight_ND),
}


@dataclass
class StepTruth:
    """One optimizer step: outputs by micro-batch, rank and feature; gradients, their magnitudes and touched rows by table.

    Magnitudes are sums of absolute values: those of an output's summands, and those of what adds up to a gradient; left out where
    every number is a float64 and no bound is needed. `contributions` is how many there are at most for one row.
    """

    outputs: list[list[dict[str, torch.Tensor]]] = field(default_factory=list)
    output_magnitudes: list[list[dict[str, torch.Tensor]]] = field(default_factory=list)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    magnitudes: dict[str, torch.Tensor] = field(default_factory=dict)
    touched: dict[str, torch.Tensor] = field(default_factory=dict)
    contributions: dict[str, int] = field(default_factory=dict)


@dataclass
class Truth:
    """A whole run. path: how far each weight went, |start| + the sum of |changes|. All in float64."""

    steps: list[StepTruth]
    weights: dict[str, torch.Tensor]
    state: dict[str, dict[str, torch.Tensor]]
    path: dict[str, torch.Tensor]
    state_path: dict[str, dict[str, torch.Tensor]]
    ever_touched: dict[str, torch.Tensor]


def truth(case: Case, start: dict[str, torch.Tensor]) -> Truth:
    """Run `case` on whole tables in float64, from the weights `start`."""
    weights = {name: torch.nn.Parameter(tensor.to(torch.float64, copy=True)) for name, tensor in start.items()}
    learners = {t.name: LEARNERS[type(case.optimizers[t.name])](weights[t.name], case.optimizers[t.name]) for t in case.tables}
    path = {name: weight.detach().abs() for name, weight in weights.items()}
    state_path = {name: {key: s.abs() for key, s in learner.state().items()} for name, learner in learners.items()}
    ever = {name: torch.zeros(len(weight), dtype=torch.bool) for name, weight in weights.items()}
    steps = []
    # With update="backward" every micro-batch is a step of its own.
    batches = case.batches if case.update == "step" else [[micro] for step in case.batches for micro in step]
    for micro_batches in batches:
        step = gradients(case, weights, micro_batches)
        steps.append(step)
        for name, learner in learners.items():
            before, state_before = weights[name].detach().clone(), learner.state()
            learner.step(step.gradients[name], step.touched[name])
            path[name] += (weights[name].detach() - before).abs()
            for key, now in learner.state().items():
                state_path[name][key] += (now - state_before[key]).abs()
            ever[name] |= step.touched[name]
    final = {name: weight.detach() for name, weight in weights.items()}
    return Truth(steps, final, {name: learner.state() for name, learner in learners.items()}, path, state_path, ever)


def gradients(case: Case, weights: dict[str, torch.nn.Parameter], micro_batches: list[list[Batch]]) -> StepTruth:
    """Outputs and gradients of one step at the present weights."""
    step = StepTruth()
    tables = {feature.name: case.tables[feature.table].name for feature in case.features}
    counts = {name: torch.zeros(len(weight), dtype=torch.int64) for name, weight in weights.items()}
    share = 1.0 / case.world_size if case.reduction == "mean" else 1.0
    narrow = case.wire_dtype is not None or any(table.dtype != torch.float64 for table in case.tables)
    total = torch.zeros((), dtype=torch.float64)
    bound = torch.zeros((), dtype=torch.float64)
    for ranks in micro_batches:
        outputs: list[dict[str, torch.Tensor]] = [{} for _ in ranks]
        sizes: list[dict[str, torch.Tensor]] = [{} for _ in ranks]
        for feature in case.features:
            weight = weights[tables[feature.name]]
            ids, offsets, scale, parts = together([batch[feature.name] for batch in ranks], feature.pooling)
            counts[tables[feature.name]] += torch.bincount(ids, minlength=len(weight))
            found = lookup(weight, feature.pooling, ids, offsets, scale)
            for rank, output in enumerate(found.split(parts)):
                outputs[rank][feature.name] = output
            if not narrow:
                continue
            # Pooling is linear, and once the scale is not negative its coefficients are not: |slopes| in, magnitudes out.
            scale = None if scale is None else scale.abs()
            slopes = torch.cat([batch[feature.name].slopes for batch in ranks]).to(torch.float64)
            bound = bound + (slopes.abs() * lookup(weight, feature.pooling, ids, offsets, scale)).sum() * share
            size = lookup(weight.detach().abs(), feature.pooling, ids, offsets, scale)
            for rank, magnitude in enumerate(size.split(parts)):
                sizes[rank][feature.name] = magnitude
        for output, batch in zip(outputs, ranks, strict=True):
            total = total + share * loss_of(output, batch, case.curved)
        step.outputs.append([{name: output.detach() for name, output in rank.items()} for rank in outputs])
        step.output_magnitudes.append(sizes)
    names = list(weights)
    leaves = [weights[name] for name in names]
    for kept, objective in ((step.gradients, total), (step.magnitudes, bound)) if narrow else ((step.gradients, total),):
        found = torch.autograd.grad(objective, leaves, allow_unused=True)
        kept.update({n: torch.zeros_like(w) if g is None else g for n, w, g in zip(names, leaves, found, strict=True)})
    step.touched = {name: count > 0 for name, count in counts.items()}
    step.contributions = {name: int(count.max()) for name, count in counts.items()}
    return step


def together(bags: list[Bags], pooling: str | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, list[int]]:
    """All ranks' bags as one batch: ids, offsets, weights, and how many outputs each rank has."""
    lengths = torch.cat([part.offsets.diff() for part in bags])
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    scales = [part.weights for part in bags if part.weights is not None]
    parts = [len(part.ids) if pooling is None else len(part.offsets) - 1 for part in bags]
    return torch.cat([part.ids for part in bags]), offsets, torch.cat(scales) if scales else None, parts


class _Torch:
    """A counterpart from torch.optim over one whole table."""

    def __init__(self, weight: torch.nn.Parameter, optimizer: torch.optim.Optimizer, keys: tuple[str, ...]) -> None:
        self.weight, self.optimizer, self.keys = weight, optimizer, keys

    def step(self, grad_ND: torch.Tensor, touched_N: torch.Tensor) -> None:
        self.weight.grad = grad_ND
        self.optimizer.step()
        self.weight.grad = None

    def state(self) -> dict[str, torch.Tensor]:
        held = self.optimizer.state[self.weight]
        return {key: held[key].clone() if key in held else torch.zeros_like(self.weight.detach()) for key in self.keys}


class _Sgd(_Torch):
    def __init__(self, weight: torch.nn.Parameter, settings: Any) -> None:
        super().__init__(weight, torch.optim.SGD([weight], lr=settings.lr), ())


class _Adagrad(_Torch):
    def __init__(self, weight: torch.nn.Parameter, settings: Any) -> None:
        super().__init__(weight, torch.optim.Adagrad([weight], lr=settings.lr, eps=settings.eps), ("sum",))


class _SparseAdam(_Torch):
    decay = 0.0

    def __init__(self, weight: torch.nn.Parameter, settings: Any) -> None:
        counterpart = torch.optim.SparseAdam([weight], lr=settings.lr, betas=settings.betas, eps=settings.eps)
        super().__init__(weight, counterpart, ("exp_avg", "exp_avg_sq"))

    def step(self, grad_ND: torch.Tensor, touched_N: torch.Tensor) -> None:
        # A row of the batch is in the sparse gradient even where its gradient is zero, as with F.embedding(sparse=True).
        rows = touched_N.nonzero().squeeze(1)
        with torch.no_grad():
            self.weight[rows] *= 1 - self.decay
        super().step(torch.sparse_coo_tensor(rows.unsqueeze(0), grad_ND[rows], grad_ND.shape, check_invariants=True), touched_N)


class _SparseAdamW(_SparseAdam):
    def __init__(self, weight: torch.nn.Parameter, settings: Any) -> None:
        super().__init__(weight, settings)
        self.decay = settings.lr * settings.weight_decay


class _RowwiseAdagrad:
    """A row's learning rate is divided by the root of its summed mean squares."""

    def __init__(self, weight: torch.nn.Parameter, settings: Any) -> None:
        self.weight, self.settings = weight.detach().numpy(), settings  # shares memory with the Parameter
        self.sums = np.zeros(len(weight))

    def step(self, grad_ND: torch.Tensor, touched_N: torch.Tensor) -> None:
        for row in np.flatnonzero(touched_N.numpy()):
            g = grad_ND[row].numpy()
            self.sums[row] += float(g @ g) / len(g)
            self.weight[row] -= self.settings.lr / (np.sqrt(self.sums[row]) + self.settings.eps) * g

    def state(self) -> dict[str, torch.Tensor]:
        return {"sum": torch.tensor(self.sums)}


class Ftrl:
    """Algorithm 1 of McMahan et al. 2013, per coordinate: weights are computed from z and n whenever they are needed.

    The paper starts from z = 0, so w = 0. Here z starts where the algorithm's own closed form answers the given weights.
    """

    def __init__(self, weight: torch.nn.Parameter, settings: Any) -> None:
        self.weight, self.alpha, self.beta = weight.detach().numpy(), settings.lr, settings.beta
        self.l1, self.l2 = settings.l1, settings.l2
        self.n = np.zeros_like(self.weight)
        self.z = -(self.weight * (self.beta / self.alpha + self.l2) + np.sign(self.weight) * self.l1)

    def predict(self, z: np.ndarray, n: np.ndarray) -> np.ndarray:
        """The weights that z and n stand for."""
        rate = 1.0 / ((self.beta + np.sqrt(n)) / self.alpha + self.l2)
        return np.where(np.abs(z) <= self.l1, 0.0, -rate * (z - np.sign(z) * self.l1))

    def step(self, grad_ND: torch.Tensor, touched_N: torch.Tensor) -> None:
        rows = np.flatnonzero(touched_N.numpy())
        g, z, n = grad_ND.numpy()[rows], self.z[rows], self.n[rows]
        w = self.predict(z, n)
        sigma = (np.sqrt(n + g**2) - np.sqrt(n)) / self.alpha
        self.z[rows] = z + g - sigma * w
        self.n[rows] = n + g**2
        self.weight[rows] = self.predict(self.z[rows], self.n[rows])

    def state(self) -> dict[str, torch.Tensor]:
        return {"z": torch.tensor(self.z), "n": torch.tensor(self.n)}


class _RowwiseAdam:
    """FBGEMM's PARTIAL_ROWWISE_ADAM, a row at a time."""

    def __init__(self, weight: torch.nn.Parameter, settings: Any) -> None:
        self.weight, self.settings = weight.detach().numpy(), settings  # shares memory with the Parameter
        self.m, self.v, self.steps = np.zeros_like(self.weight), np.zeros(len(weight)), 0

    def step(self, grad_ND: torch.Tensor, touched_N: torch.Tensor) -> None:
        self.steps += 1
        (beta1, beta2), settings = self.settings.betas, self.settings
        for row in np.flatnonzero(touched_N.numpy()):
            g = grad_ND[row].numpy()
            self.m[row] = beta1 * self.m[row] + (1 - beta1) * g
            self.v[row] = beta2 * self.v[row] + (1 - beta2) * float(g @ g) / len(g)
            m_hat, v_hat = self.m[row] / (1 - beta1**self.steps), self.v[row] / (1 - beta2**self.steps)
            self.weight[row] -= settings.lr * (m_hat / (np.sqrt(v_hat) + settings.eps) + settings.weight_decay * self.weight[row])

    def state(self) -> dict[str, torch.Tensor]:
        return {"exp_avg": torch.tensor(self.m), "exp_avg_sq": torch.tensor(self.v)}


class _Lion:
    """Program 1 of Chen et al. 2023, on the rows of the batch."""

    def __init__(self, weight: torch.nn.Parameter, settings: Any) -> None:
        self.weight, self.settings = weight.detach().numpy(), settings  # shares memory with the Parameter
        self.momentum = np.zeros_like(self.weight)

    def step(self, grad_ND: torch.Tensor, touched_N: torch.Tensor) -> None:
        (beta1, beta2), lr, decay = self.settings.betas, self.settings.lr, self.settings.weight_decay
        for row in np.flatnonzero(touched_N.numpy()):
            g, w, momentum = grad_ND[row].numpy(), self.weight[row], self.momentum[row]
            update = np.sign(beta1 * momentum + (1 - beta1) * g)
            self.weight[row] = w - lr * (update + decay * w)
            self.momentum[row] = beta2 * momentum + (1 - beta2) * g

    def state(self) -> dict[str, torch.Tensor]:
        return {"exp_avg": torch.tensor(self.momentum)}


LEARNERS: dict[type[optim.TableOptimizer], Callable[[torch.nn.Parameter, Any], Any]] = {
    optim.SGD: _Sgd,
    optim.Adagrad: _Adagrad,
    optim.RowwiseAdagrad: _RowwiseAdagrad,
    optim.Adam: _SparseAdam,
    optim.AdamW: _SparseAdamW,
    optim.RowwiseAdam: _RowwiseAdam,
    optim.FTRL: Ftrl,
    optim.Lion: _Lion,
}

# Settings that show every term of a formula; others have what is their own by default.
_SETTINGS: dict[type[optim.TableOptimizer], dict[str, Any]] = {
    optim.Adam: {"lr": 0.05, "betas": (0.8, 0.95)},
    optim.AdamW: {"lr": 0.05, "betas": (0.8, 0.95), "weight_decay": 0.1},
    optim.RowwiseAdam: {"lr": 0.05, "betas": (0.8, 0.95), "weight_decay": 0.1},
    optim.FTRL: {"lr": 0.2, "beta": 0.5, "l1": 0.05, "l2": 0.01},
    optim.Lion: {"lr": 0.05, "betas": (0.8, 0.9), "weight_decay": 0.1},
}
# One of each kind, by name: whoever trains with all optimizers walks these.
EXAMPLES: dict[str, optim.TableOptimizer] = {name: kind(**_SETTINGS.get(kind, {"lr": 0.1})) for name, kind in optim.NAMES.items()}


def make_bags(
    seed: torch.Generator,
    rows: int,
    columns: int,
    pooling: str | None,
    bags: int,
    longest: int,
    *,
    weighted: bool = False,
    positive: bool = False,
    skew: float = 3.0,
) -> Bags:
    """Random bags, some empty, whose ids prefer small numbers, so that many repeat.

    positive: slopes and weights above zero in eighths, which every dtype here holds exactly; else normally distributed, so that
        no gradients cancel to the rounding error that an adaptive optimizer would blow up.
    """
    lengths = torch.randint(0, longest + 1, (bags,), generator=seed)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    count = int(offsets[-1])
    ids = (torch.rand(count, generator=seed, dtype=torch.float64) ** skew * rows).long().clamp(max=rows - 1)

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        if positive:
            return torch.randint(1, 9, shape, generator=seed).to(torch.float64) / 8
        return torch.randn(shape, generator=seed, dtype=torch.float64)

    return Bags(ids, offsets, draw((count,)) if weighted else None, draw((count if pooling is None else bags, columns)))
