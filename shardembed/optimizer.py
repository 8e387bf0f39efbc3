"""One real torch optimizer for tables and dense parameters, and clipping over both.

Tables have no `.grad`: their gradients wait with the rows' owners. Towards torch they are represented by one parameter a
collection, whose `.grad` is the single number that all its waiting gradients are to be multiplied with: 1 after a backward, nan
when any rank holds a gradient that is not finite. GradScaler's unscaling multiplies that number, its inf check reads it,
`zero_grad` drops what waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn

from shardembed.comm import Comm
from shardembed.errors import ConfigError, NonFiniteGradientError, StepError
from shardembed.exposed import ExposedShard
from shardembed.journey import Journey
from shardembed.optim import TableOptimizer

OnNonFinite = Literal["raise", "skip", "zero"]


def journeys(model: nn.Module) -> list[Journey]:
    """The collections of a model, each once, in the order of its modules."""
    found = {id(journey): journey for module in model.modules() if isinstance(journey := getattr(module, "journey", None), Journey)}
    return list(found.values())


class Waiting(nn.Parameter):
    """Stands for a collection's waiting gradients in a torch optimizer. Reading `.grad` after a backward is collective (one
    scalar).
    """

    journey: Journey

    @staticmethod
    def of(journey: Journey) -> Waiting:
        waiting = torch.Tensor._make_subclass(Waiting, torch.zeros(1, device=journey.device), True)
        waiting.journey = journey
        return waiting

    @property
    def grad(self) -> torch.Tensor | None:
        journey = self.journey
        if not journey.waiting:
            return None
        if journey.factor is None:
            bad = torch.tensor([float(not all(slab.finite() for slab in journey.slabs))], device=journey.device)
            journey.comm.all_reduce("agree that gradients are finite", bad, maximum=True)
            journey.factor = torch.where(bad > 0, torch.nan, torch.ones_like(bad))
        return journey.factor

    @grad.setter
    def grad(self, value: torch.Tensor | None) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        if value is not None:
            raise StepError("the gradients of sharded tables cannot be assigned; they come from backward")
        self.journey.drop()


class Optimizer(torch.optim.Optimizer):
    """Steps the sharded tables of `model` and, when given, a dense torch optimizer.

    Its param groups are the dense optimizer's own and one more for each of the tables' optimizers, with its `lr`: schedulers
    work on it as on any optimizer. `step` applies and then drops the tables' gradients; gradients of several backward passes
    add up exactly until then.

    Args:
        model: the model, or a wrapper such as DistributedDataParallel around it.
        dense: a torch optimizer over the dense parameters; None when there are none, or another optimizer steps them.
        on_nonfinite: what to do when a gradient of any rank, table or dense, is inf or nan: "raise" on all ranks, "skip" the
            step on all, "zero" the elements. None does not look. Costs one small all-reduce a step.
        micro_batches: backward passes a step is meant to take; one more warns of a forgotten step.

    Raises:
        ConfigError: there is nothing to optimize, or a setting is unknown.
    """

    def __init__(
        self,
        model: nn.Module,
        dense: torch.optim.Optimizer | None = None,
        *,
        on_nonfinite: OnNonFinite | None = None,
        micro_batches: int = 1,
    ) -> None:
        if on_nonfinite not in (None, "raise", "skip", "zero"):
            raise ConfigError(f"on_nonfinite must be 'raise', 'skip', 'zero' or None, not {on_nonfinite!r}")
        if micro_batches < 1:
            raise ConfigError(f"micro_batches must be at least 1, not {micro_batches}")
        self.dense, self.journeys, self.on_nonfinite = dense, journeys(model), on_nonfinite
        self.skipped = 0
        if not self.journeys and dense is None:
            raise ConfigError("the model has no sharded tables and no dense optimizer was given: nothing to optimize")
        self._groups = _table_groups(self.journeys)
        super().__init__([*(dense.param_groups if dense else []), *self._groups.values()], {})
        self._built = True
        if dense is not None:
            self.state = dense.state
        for journey in self.journeys:
            journey.micro_batches = micro_batches
            journey.rate = self._rate

    def _rate(self, optimizer: TableOptimizer) -> float:
        return float(self._groups[optimizer]["lr"])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of tables and dense parameters. Collective where a plan or `on_nonfinite` needs it.

        Raises:
            NonFiniteGradientError: on all ranks, with on_nonfinite="raise".
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.on_nonfinite and not self._admit():
            self.skipped += 1
            self.zero_grad()
            return loss
        if self.dense is not None:
            self.dense.step()
        for journey in self.journeys:
            journey.step()
        return loss

    def _admit(self) -> bool:
        """Apply the policy; False when the step is to be skipped. All ranks decide alike."""
        slabs = [slab for journey in self.journeys for slab in journey.slabs]
        grads = [p.grad for group in (self.dense.param_groups if self.dense else []) for p in group["params"] if p.grad is not None]
        bad = torch.tensor(
            [not all(bool(torch.isfinite(grad).all()) for grad in grads), *(not slab.finite() for slab in slabs)],
            dtype=torch.float32,
        )
        for comm in _comms(self.journeys):
            bad = comm.all_reduce("agree that gradients are finite", bad.to(self.journeys[0].device), maximum=True)
        if not bad.any():
            return True
        if self.on_nonfinite == "zero":
            for grad in grads:
                torch.nan_to_num_(grad, nan=0.0, posinf=0.0, neginf=0.0)
            for slab in slabs:
                slab.zero_nonfinite()
            return True
        if self.on_nonfinite == "skip":
            return False
        where = ["the dense parameters"] if bad[0] else []
        tables = [
            j.tables[lane.table].name
            for j in self.journeys
            for slab in j.slabs
            if bad[1 + slabs.index(slab)]
            for lane in slab.spec.lanes
        ]
        raise NonFiniteGradientError(
            f"step {self.journeys[0].steps + 1 if self.journeys else 0}: a gradient of {' and '.join(where + _tables(tables))} "
            "is inf or nan on some rank; lower the learning rate, clip, widen wire_dtype, or pass on_nonfinite='skip'"
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of tables and dense parameters."""
        if self.dense is not None:
            self.dense.zero_grad(set_to_none)
        for journey in self.journeys:
            journey.drop()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Torch calls this while it builds the groups; later additions belong to the dense optimizer."""
        if hasattr(self, "_built"):
            raise ConfigError("add parameter groups to the dense optimizer before se.Optimizer is made")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave: the dense optimizer's state, and every group's settings."""
        groups = state_dict["param_groups"]
        if len(groups) != len(self.param_groups):
            raise ConfigError(f"the state has {len(groups)} param groups, this optimizer {len(self.param_groups)}")
        split = len(groups) - len(self._groups)
        if self.dense is not None:
            self.dense.load_state_dict({"state": state_dict["state"], "param_groups": groups[:split]})
            self.state = self.dense.state
        for group, saved in zip(self._groups.values(), groups[split:], strict=True):
            group.update({key: value for key, value in saved.items() if key not in ("params", "optimizer")})
        self.param_groups = [*(self.dense.param_groups if self.dense else []), *self._groups.values()]


def _table_groups(found: list[Journey]) -> dict[TableOptimizer, dict[str, Any]]:
    """A param group for each of the tables' optimizers; the first holds what stands for the waiting gradients."""
    groups: dict[TableOptimizer, dict[str, Any]] = {}
    for journey in found:
        for spec in journey.specs:
            groups.setdefault(spec.optimizer, {"params": [], "lr": spec.optimizer.lr, "tables": type(spec.optimizer).__name__})
    if groups:
        next(iter(groups.values()))["params"] = [Waiting.of(journey) for journey in found]
    return groups


def _comms(found: Iterable[Journey]) -> list[Comm]:
    return list({id(journey.comm): journey.comm for journey in found}.values())


def _tables(names: list[str]) -> list[str]:
    return [f"table(s) {sorted(set(names))}"] if names else []


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float, *, error_if_nonfinite: bool = False) -> torch.Tensor:
    """Scale all gradients of `model` so that their common 2-norm is at most `max_norm`: dense parameters and sharded tables.

    As `torch.nn.utils.clip_grad_norm_` over the unsharded model: duplicates of a row are summed first, every row and every
    dense parameter counts once, and all ranks scale by the same number. Call it after the last backward of a step. Collective:
    one scalar all-reduce, plus the one that copied tables make once a step anyway. Dense gradients must be the same on all
    ranks, as DDP leaves them.

    Returns:
        The norm before clipping, a scalar tensor.

    Raises:
        NonFiniteGradientError: on all ranks, with `error_if_nonfinite`, when the norm is inf or nan.
        StepError: tables are updated in the backward already.
    """
    found = journeys(model)
    if any(journey.settings.update == "backward" for journey in found):
        raise StepError("update='backward' has applied the tables' gradients already; clipping needs update='step'")
    parameters = [p for p in model.parameters() if p.grad is not None]
    dense = [p.grad for p in parameters if not isinstance(p, ExposedShard) and p.grad is not None]
    shards = [p for p in parameters if isinstance(p, ExposedShard)]
    device = found[0].device if found else (dense[0].device if dense else torch.device("cpu"))
    square = torch.zeros((), dtype=torch.float64, device=device)
    for comm in _comms(found):
        mine = torch.zeros((), dtype=torch.float64, device=device)
        for journey in (journey for journey in found if journey.comm is comm):
            mine += _square(journey) + _square_exposed(journey, shards)
        square += comm.all_reduce("sum gradient norms", mine)
    for grad in dense:
        square += grad.detach().to(torch.float64).square().sum()
    norm = square.sqrt()
    if error_if_nonfinite and not torch.isfinite(norm):
        raise NonFiniteGradientError(f"the gradient norm is {float(norm)}; it cannot be clipped")
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # 1e-6 as in torch.nn.utils.clip_grad_norm_
    for grad in [*dense, *(p.grad for p in shards if p.grad is not None)]:
        grad.mul_(factor.to(grad.dtype))
    for journey in found:
        if journey.waiting:
            before = torch.ones(1, device=device) if journey.factor is None else journey.factor
            journey.factor = before * factor
    return norm


def _square_exposed(journey: Journey, shards: list[ExposedShard]) -> torch.Tensor:
    """As `_square`, of the gradients that Parameters of this collection (`optimizer=None`) have."""
    own = {id(parameter) for exposed in journey.exposed for parameter in exposed.parameters}
    total = torch.zeros((), dtype=torch.float64, device=journey.device)
    for shard in shards:
        if id(shard) in own and shard.grad is not None and (not shard.copied or journey.comm.rank == 0):
            grad = shard.grad.coalesce().values() if shard.grad.is_sparse else shard.grad
            total += grad.to(torch.float64).square().sum()
    return total


def _square(journey: Journey) -> torch.Tensor:
    """This rank's share of the squared norm of a collection's waiting gradients; copied rows count on rank 0 alone."""
    journey.reduce()
    total = torch.zeros((), dtype=torch.float64, device=journey.device)
    for slab in journey.slabs:
        if not slab.spec.copied or journey.comm.rank == 0:
            total += slab.merged()[1].to(torch.float64).square().sum()
    return total if journey.factor is None else total * journey.factor.to(torch.float64).square().squeeze()
