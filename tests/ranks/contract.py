"""Drop-in modules on ranks against one plain torch module over the batches of all ranks at once.

A `Drawn` says how a module is made, cut and fed. `run` makes `se.Embedding` or `se.EmbeddingBag` of it on a rank; `truth` makes
`nn.Embedding` or `nn.EmbeddingBag` of it in float64, on the global batch: outputs, gradients of per-sample weights, weights and
optimizer state must be the same to 1e-10.

Known fault of torch, up to 2.13 on the CPU (pytorch issue 190063): `nn.EmbeddingBag(scale_grad_by_freq=True)` divides by another
row's frequency. The truth for it is `F.embedding(scale_grad_by_freq=True)`, pooled by hand.

Legend: N rows of the table, D its columns, B bags, n ids.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import shardembed as se
from shardembed.optim import TableOptimizer
from tests.harness import run_ranks
from tests.held import Piece, pieces, whole
from tests.oracle import LEARNERS, Ftrl
from tests.ranks.sharded import close, written

NAME = "table"
TORCH_OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.05),
    "SparseAdam": lambda parameters: torch.optim.SparseAdam(parameters, lr=0.05),
}


@dataclass(frozen=True)
class Given:
    """What one rank calls its module with. ids: of any shape. offsets: as the module takes them. slopes: one an output element."""

    ids: torch.Tensor
    offsets: torch.Tensor | None
    weights: torch.Tensor | None
    slopes: torch.Tensor

    @property
    def arguments(self) -> tuple[torch.Tensor | None, ...]:
        """Weights are a new leaf, so that they get a gradient."""
        if self.offsets is None and self.weights is None:
            return (self.ids,)
        return self.ids, self.offsets, None if self.weights is None else self.weights.clone().requires_grad_()


@dataclass(frozen=True)
class Table:
    """What a module is made of. settings: torch's arguments by name. weighted: it is called with per-sample weights."""

    kind: Literal["Embedding", "EmbeddingBag"]
    rows: int
    columns: int
    settings: dict[str, Any]
    dtype: torch.dtype = torch.float64
    weighted: bool = False


def give(
    numbers: torch.Generator,
    table: Table,
    shape: tuple[int, ...] | None,
    size: int,
    longest: int,
    *,
    skew: float = 3.0,
    padding: float = 0.3,
    dtype: torch.dtype = torch.int64,
) -> Given:
    """Random arguments for a module: ids of this shape; without one, `size` bags of up to `longest` ids. `padding` is the share of
    padding among the ids.
    """

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=numbers, dtype=table.dtype)

    offsets = None
    if shape is None:
        lengths = torch.randint(0, longest + 1, (size,), generator=numbers)
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        shape = (int(offsets[-1]),)
        if table.settings.get("include_last_offset") and size and takes_rest(table):
            offsets[-1] = torch.randint(int(offsets[-2]), int(offsets[-1]) + 1, (), generator=numbers)
        offsets = (offsets if table.settings.get("include_last_offset") else offsets[:-1]).to(dtype)
    ids = (torch.rand(shape, generator=numbers, dtype=torch.float64) ** skew * table.rows).long()
    if "padding_idx" in table.settings:
        ids[torch.rand(shape, generator=numbers) < padding] = table.settings["padding_idx"] % table.rows
    outputs = shape if table.kind == "Embedding" else (size,)
    weights = values(*shape) if table.weighted else None
    return Given(ids.to(dtype), offsets, weights, values(*outputs, table.columns))


def takes_rest(table: Table) -> bool:
    """Where all of torch's kernels give ids behind the last offset to the last bag."""
    return table.settings.get("mode") == "max" or "padding_idx" in table.settings or table.dtype == torch.float64


@dataclass(frozen=True)
class Drawn:
    """A module, its cut and its batches, `[step][micro-batch][rank]`.

    start: given rows, or None for the module's own. optimizer: ours, or a name in `TORCH_OPTIMIZERS` for a torch optimizer over
    the exposed shards.
    """

    table: Table
    freeze: bool
    start: torch.Tensor | None
    optimizer: TableOptimizer | str
    layout: se.TablePlan
    batches: list[list[list[Given]]]
    reduction: Literal["mean", "sum"] = "mean"

    @property
    def world_size(self) -> int:
        return len(self.batches[0][0])

    @property
    def plan(self) -> se.Plan:
        return se.Plan((self.layout,), self.world_size)


@dataclass
class Seen:
    """What came of a training run: by call, the outputs and gradients of weights; weights and state before and after."""

    before: list[Piece]
    outputs: list[torch.Tensor] = field(default_factory=list)
    weight_grads: list[torch.Tensor | None] = field(default_factory=list)
    looks: list[torch.Tensor] = field(default_factory=list)
    after: list[Piece] = field(default_factory=list)


def build(drawn: Drawn) -> se.Embedding | se.EmbeddingBag:
    optimizer = None if isinstance(drawn.optimizer, str) else drawn.optimizer
    ours: dict[str, Any] = {
        "optimizer": optimizer,
        "plan": drawn.plan,
        "feature": NAME,
        "gradient_reduction": drawn.reduction,
    }
    make = getattr(se, drawn.table.kind)
    if drawn.start is not None:
        return make.from_pretrained(drawn.start, freeze=drawn.freeze, **drawn.table.settings, **ours)
    return make(
        drawn.table.rows, drawn.table.columns, **drawn.table.settings, _freeze=drawn.freeze, dtype=drawn.table.dtype, **ours
    )


def run(rank: int, world_size: int, several: list[Drawn]) -> list[Seen]:
    """Train every module on this rank's batches."""
    return [_run(rank, drawn) for drawn in several]


def _run(rank: int, drawn: Drawn) -> Seen:
    module = build(drawn)
    seen = Seen(pieces(module))
    optimizer: torch.optim.Optimizer | None = None
    if isinstance(drawn.optimizer, str):
        optimizer = TORCH_OPTIMIZERS[drawn.optimizer](module.parameters())
    elif not drawn.freeze:  # which leaves se.Optimizer nothing to do
        optimizer = se.Optimizer(module, micro_batches=len(drawn.batches[0]))
    for micro_batches in drawn.batches:
        for ranks in micro_batches:
            given = ranks[rank]
            arguments = given.arguments
            output = module(*arguments)
            assert output.dtype == drawn.table.dtype, f"dtype {output.dtype}"
            seen.outputs.append(output.detach().clone())
            if output.requires_grad:
                loss_of(written({NAME: output}, len(seen.outputs))[NAME], given).backward()
            weights = arguments[2] if len(arguments) == 3 else None
            seen.weight_grads.append(None if weights is None else weights.grad)
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        seen.looks.append(look(module, micro_batches[0][rank]))
    seen.after = pieces(module)
    return seen


def look(module: nn.Module, given: Given) -> torch.Tensor:
    """A lookup between steps, in evaluation; max_norm acts here too."""
    module.eval()
    with torch.no_grad():
        output = module(*given.arguments)
    module.train()
    return output


def loss_of(output: torch.Tensor, given: Given) -> torch.Tensor:
    """The loss of one rank; curved, so that gradients depend on the weights."""
    return (given.slopes.to(output.dtype) * output).sum() + output.square().sum() / 4


class RenormedFtrl(Ftrl):
    """Reads the weights as they are: max_norm changes them between steps. Before its first step, an element's z is what gives
    back its present weight.
    """

    def step(self, grad_ND: torch.Tensor, touched_N: torch.Tensor) -> None:
        rows = np.flatnonzero(touched_N.numpy())
        g, w, n = grad_ND.numpy()[rows], self.weight[rows].copy(), self.n[rows]
        start = -(w * (self.beta / self.alpha + self.l2) + np.sign(w) * self.l1)
        sigma = (np.sqrt(n + g**2) - np.sqrt(n)) / self.alpha
        self.z[rows] = np.where(n == 0, start, self.z[rows]) + g - sigma * w
        self.n[rows] = n + g**2
        self.weight[rows] = self.predict(self.z[rows], self.n[rows])


class Plain:
    """The plain module in float64, and the optimizer over its weight."""

    def __init__(self, drawn: Drawn, start: torch.Tensor) -> None:
        self.drawn = drawn
        settings = {name: value for name, value in drawn.table.settings.items() if name not in ("sparse", "include_last_offset")}
        rows = start.to(torch.float64, copy=True)
        if drawn.table.kind == "Embedding":
            self.module: nn.Module = nn.Embedding.from_pretrained(rows, freeze=False, **settings)
        else:
            self.module = nn.EmbeddingBag.from_pretrained(rows, freeze=False, include_last_offset=True, **settings)
        self.weight: nn.Parameter = self.module.weight  # type: ignore[assignment]
        self.optimizer = TORCH_OPTIMIZERS[drawn.optimizer]([self.weight]) if isinstance(drawn.optimizer, str) else None
        kind = type(drawn.optimizer)
        if not isinstance(drawn.optimizer, str):
            self.learner = (RenormedFtrl if kind is se.optim.FTRL else LEARNERS[kind])(self.weight, drawn.optimizer)

    def forward(self, ranks: list[Given]) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        """Outputs by rank from one call on the global batch, and the leaves that the weights are."""
        leaves = [None if given.weights is None else given.weights.to(torch.float64).requires_grad_() for given in ranks]
        if self.drawn.table.kind == "Embedding":
            flat = self.module(torch.cat([given.ids.reshape(-1).long() for given in ranks]))
            parts = flat.split([given.ids.numel() for given in ranks])
            return [part.view(*given.ids.shape, self.drawn.table.columns) for part, given in zip(parts, ranks, strict=True)], leaves
        ids = torch.cat([bag_ids(given) for given in ranks])
        lengths = [bag_lengths(self.drawn, given) for given in ranks]
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat(lengths).cumsum(0)])
        given_leaves = [leaf.reshape(-1) for leaf in leaves if leaf is not None]
        weights = torch.cat(given_leaves) if given_leaves else None
        pool = self._by_hand if self.drawn.table.settings.get("scale_grad_by_freq") else self.module
        return list(pool(ids, offsets, weights).split([part.numel() for part in lengths])), leaves

    def _by_hand(self, ids: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        module = self.module
        assert isinstance(module, nn.EmbeddingBag)
        found = F.embedding(ids, self.weight, module.padding_idx, module.max_norm, module.norm_type, scale_grad_by_freq=True)
        counted = torch.ones(len(ids), dtype=torch.float64)
        if module.padding_idx is not None:
            counted[ids == module.padding_idx] = 0
        scale = counted if weights is None else counted * weights
        bags = torch.repeat_interleave(offsets.diff())
        sums = torch.zeros(len(offsets) - 1, self.drawn.table.columns, dtype=torch.float64)
        sums = sums.index_add(0, bags, found * scale.unsqueeze(1))
        if module.mode == "mean":
            sums = sums / torch.zeros(len(sums), dtype=torch.float64).index_add(0, bags, counted).clamp(min=1).unsqueeze(1)
        return sums

    def step(self, micro_batches: list[list[Given]]) -> list[tuple[list[torch.Tensor], list[torch.Tensor | None]]]:
        """One optimizer step: by micro-batch, the outputs of all ranks and the gradients of their weights."""
        share = 1.0 / self.drawn.world_size if self.drawn.reduction == "mean" else 1.0
        total, touched, found = torch.zeros_like(self.weight), torch.zeros(self.drawn.table.rows, dtype=torch.bool), []
        for ranks in micro_batches:
            outputs, leaves = self.forward(ranks)
            losses = [loss_of(output, given) for output, given in zip(outputs, ranks, strict=True)]
            wanted = [self.weight, *(leaf for leaf in leaves if leaf is not None)]
            grad, *rest = torch.autograd.grad(torch.stack(losses).sum(), wanted)
            told = iter(rest)
            total += grad * share
            for given in ranks:
                touched[bag_ids(given)] = True
            found.append(([output.detach() for output in outputs], [None if leaf is None else next(told) for leaf in leaves]))
        if self.drawn.table.settings.get("padding_idx") is not None:
            touched[self.drawn.table.settings["padding_idx"]] = False
        if not self.drawn.freeze:
            self._learn(total, touched)
        return found

    def _learn(self, grad_ND: torch.Tensor, touched_N: torch.Tensor) -> None:
        if self.optimizer is None:
            self.learner.step(grad_ND, touched_N)
            return
        self.weight.grad = grad_ND
        if self.drawn.table.settings.get("sparse"):
            rows = touched_N.nonzero().squeeze(1)
            self.weight.grad = torch.sparse_coo_tensor(rows.unsqueeze(0), grad_ND[rows], grad_ND.shape, check_invariants=True)
        self.optimizer.step()
        self.weight.grad = None


def bag_ids(given: Given) -> torch.Tensor:
    """All ids, flat: those behind an early last offset stand in the last bag."""
    return given.ids.reshape(-1).long()


def bag_lengths(drawn: Drawn, given: Given) -> torch.Tensor:
    if given.offsets is None:
        return torch.full((given.ids.shape[0],), given.ids.shape[1])
    offsets = given.offsets.long()
    starts = offsets[:-1] if drawn.table.settings.get("include_last_offset") else offsets
    return torch.cat([starts, torch.tensor([given.ids.numel()])]).diff()


def compare(several: list[Drawn]) -> None:
    """Run modules on their ranks, and hold them against plain ones."""
    check(several, run_ranks(several[0].world_size, run, several))


def check(several: list[Drawn], runs: list[list[Seen]]) -> None:
    """`runs`: by rank, what came of each module."""
    for number, drawn in enumerate(several):
        seen = [mine[number] for mine in runs]
        start = whole(one.before for one in seen)[NAME]
        if drawn.start is not None:
            assert torch.equal(start, drawn.start), "given rows are the first rows"
        if drawn.table.dtype == torch.float64:
            _check_numbers(drawn, start, seen)
        else:
            _check_bits(drawn, start, seen)


def _check_numbers(drawn: Drawn, start: torch.Tensor, seen: list[Seen]) -> None:
    plain = Plain(drawn, start)
    call = 0
    for number, micro_batches in enumerate(drawn.batches):
        for outputs, grads in plain.step(micro_batches):
            for rank, one in enumerate(seen):
                close(one.outputs[call], outputs[rank], None, f"output of rank {rank}, call {call}")
                mine, theirs = one.weight_grads[call], grads[rank]
                assert (mine is None) == (theirs is None), f"gradient of weights of rank {rank}, call {call}"
                if mine is not None and theirs is not None:
                    close(mine, theirs, None, f"gradient of weights of rank {rank}, call {call}")
            call += 1
        looks, _ = plain.forward(micro_batches[0])
        for rank, one in enumerate(seen):
            close(one.looks[number], looks[rank].detach(), None, f"evaluation of rank {rank} after step {number}")
    held = whole(one.after for one in seen)
    close(held[NAME], plain.weight.detach(), None, "weights")
    if plain.optimizer is None and not drawn.freeze:
        for key, values in plain.learner.state().items():
            found = held[f"{NAME}.{key}"]
            if key == "z":  # where nothing was learned, ours has not been set yet
                values = torch.where(plain.learner.state()["n"] == 0, found, values)
            close(found, values, None, f"state {key!r}")


def _check_bits(drawn: Drawn, start: torch.Tensor, seen: list[Seen]) -> None:
    """The first forward has the very bits of torch."""
    settings = {name: value for name, value in drawn.table.settings.items() if name != "sparse"}
    plain = getattr(nn, drawn.table.kind).from_pretrained(start, **settings)
    for rank, (given, one) in enumerate(zip(drawn.batches[0][0], seen, strict=True)):
        expected = plain(*(argument.detach() if argument is not None else None for argument in given.arguments))
        assert torch.equal(one.outputs[0], expected), f"bits of the output of rank {rank}"
