"""One real torch optimizer for tables and dense parameters.

Tables have no `.grad`: their gradients wait with the rows' owners. Towards torch they are represented by one parameter a
collection, whose `.grad` is the single number that all its waiting gradients are to be multiplied with: 1 after a backward, nan
when any rank holds a gradient that is not finite. GradScaler's unscaling multiplies that number, its inf check reads it,
`zero_grad` drops what waits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NoReturn

import torch
from torch import nn

from shardembed.comm.comm import Comm
from shardembed.config.scalars import integer
from shardembed.errors import ConfigError, NonFiniteGradientError, PickleError, StepError
from shardembed.journey.journey import Journey
from shardembed.journey.waiting import check, comms_of, finite_factors, finite_here, journeys, lost_tables, zero_nonfinite
from shardembed.kernels.reference import is_finite
from shardembed.optim import TableOptimizer
from shardembed.store.compiler import unmarked
from shardembed.store.guarded import Factor
from shardembed.store.wrappers import refuse_torch_checkpoint

OnNonFinite = Literal["raise", "skip", "zero"]


class GradientProxy(nn.Parameter):
    """Stands for a collection's waiting gradients in a torch optimizer. Reading `.grad` after a backward is collective (one
    scalar).
    """

    journey: Journey

    @staticmethod
    def of(journey: Journey) -> GradientProxy:
        waiting = torch.Tensor._make_subclass(GradientProxy, torch.zeros(1, device=journey.device), True)
        waiting.journey = journey
        return waiting

    @property
    def grad(self) -> torch.Tensor | None:
        journey = self.journey
        if journey.settings.update == "backward":
            raise StepError(
                "tables with update='backward' have no gradient left to read: a GradScaler's scaled gradients have been applied "
                "as they came; use update='step' with a GradScaler"
            )
        if not journey.pending.waiting:
            return None
        check(journey)
        factor = journey.pending.factor  # itself, not a copy: a GradScaler unscales it in place
        return None if factor is None else factor.as_subclass(Factor)

    @grad.setter
    def grad(self, value: torch.Tensor | None) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        if value is not None:
            raise StepError("the gradients of sharded tables cannot be assigned; they come from backward")
        self.journey.drop()


class Optimizer(torch.optim.Optimizer):
    """Steps the sharded tables of `model` and, when given, a dense torch optimizer.

    Its param groups are the dense optimizer's own and one more for each of the tables' optimizers, whose `lr` counts from then
    on: schedulers work on it as on any optimizer. (Those that also cycle momentum refuse it: tables have none to cycle; pass
    `cycle_momentum=False`.) `step` applies and then drops the tables' gradients; gradients of several backward passes add up
    exactly until then. `zero_grad` drops what waits, and that of a module what waits for its tables. Of several made over the same
    tables, the last one steps them, and the others refuse to.

    Args:
        model: the model, or a wrapper such as DistributedDataParallel around it.
        dense: a torch optimizer over the dense parameters; None when there are none, or another optimizer steps them.
        on_nonfinite: what to do when a gradient of any rank, table or dense, is inf or nan: "raise" on all ranks, "skip" the
            step on all, "zero" the elements of the summed gradients. None does not look. Costs one small all-reduce a step.
            `skipped` counts the steps that were, and `skipped_for` says for what the last one was.
        micro_batches: backward passes a step is meant to take; one more warns of a forgotten step.

    Raises:
        ConfigError: there is nothing to optimize, a setting is unknown or does not fit, or the dense optimizer holds parameters
            that are not the model's.
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
        passes = integer(micro_batches)
        if passes is None or passes < 1:
            raise ConfigError(f"micro_batches must be at least 1, not {micro_batches!r}")
        # Tables without an optimizer of ours are Parameters, which the dense one may hold.
        self.dense, self.journeys = dense, [journey for journey in journeys(model) if journey.stepped]
        self.on_nonfinite = on_nonfinite
        self.skipped = 0
        self.skipped_for: tuple[str, ...] = ()
        if not self.journeys and dense is None:
            raise ConfigError("the model has no sharded tables and no dense optimizer was given: nothing to optimize")
        if on_nonfinite and any(journey.settings.update == "backward" for journey in self.journeys):
            raise ConfigError("on_nonfinite comes too late for update='backward', which applies gradients as they come")
        if dense is not None:
            _check_dense(dense, model)
        self._dense_groups = len(dense.param_groups) if dense else 0
        self._groups = _table_groups(self.journeys)
        super().__init__(self.param_groups, {})
        self._built = True
        for journey in self.journeys:
            journey.stepped_by(self._rate, passes)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The dense optimizer's groups as they are now, then the tables'."""
        return [*(self.dense.param_groups if self.dense else []), *self._groups.values()]

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        if hasattr(self, "_built"):
            raise ConfigError("param_groups cannot be replaced; change the groups' settings in place")

    @property
    def state(self) -> Any:
        """The dense optimizer's; the tables' lies with their rows."""
        if self.journeys:
            refuse_torch_checkpoint("se.Optimizer")
        return self.dense.state if self.dense else {}

    @state.setter
    def state(self, value: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        if hasattr(self, "_built"):
            raise ConfigError("the state cannot be replaced; use load_state_dict")

    def _rate(self, optimizer: TableOptimizer) -> float:
        return float(self._groups[optimizer]["lr"])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of tables and dense parameters. Collective where a plan or `on_nonfinite` needs it.

        Raises:
            NonFiniteGradientError: on all ranks, with on_nonfinite="raise"; nothing has changed, and the gradients still wait.
            StepError: a later se.Optimizer steps these tables, or the dense optimizer was given more groups.
        """
        self._check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.on_nonfinite and not self._admit():
            self.skipped += 1
            self.zero_grad()
            return loss
        if self.dense is not None:
            with unmarked():
                self.dense.step()
        for journey in self.journeys:
            journey.step()
        return loss

    def _check(self) -> None:
        if any(journey.rate != self._rate for journey in self.journeys):
            raise StepError("another se.Optimizer has been made over these tables since; step that one")
        if self.dense is not None and len(self.dense.param_groups) != self._dense_groups:
            # A scheduler knows groups by their number, and the tables' follow the dense ones.
            raise StepError(
                f"the dense optimizer has {len(self.dense.param_groups)} param groups, {self._dense_groups} when se.Optimizer was "
                "made; add groups first, then make se.Optimizer and its scheduler"
            )

    def _admit(self) -> bool:
        """Apply the policy; False when the step is to be skipped. All ranks decide alike."""
        grads = [p.grad for group in (self.dense.param_groups if self.dense else []) for p in group["params"] if p.grad is not None]
        bad = {
            "the dense parameters": not all(map(is_finite, grads)),
            "tables": not finite_here(self.journeys),
            "the factor they were clipped by": not finite_factors(self.journeys),
        }
        flags = torch.tensor(list(bad.values()), dtype=torch.float32)  # known on the host, so told there
        for comm in comms_of(self.journeys) or [Comm.of()]:
            comm.all_reduce("step: agree that gradients are finite", flags, maximum=True)
        if not flags.any():
            return True
        if self.on_nonfinite == "zero":
            for grad in grads:
                torch.nan_to_num_(grad, nan=0.0, posinf=0.0, neginf=0.0)
            for journey in self.journeys:
                zero_nonfinite(journey)
            return True
        found = {place: bool(flag) for place, flag in zip(bad, flags.tolist(), strict=True)}
        tables = lost_tables(self.journeys) if found.pop("tables") else ()
        where = (*tables, *(place for place, flag in found.items() if flag))
        if self.on_nonfinite == "skip":
            self.skipped_for = where
            return False
        error = NonFiniteGradientError(
            f"step {max((journey.steps for journey in self.journeys), default=0) + 1}: a gradient is inf or nan on some rank: "
            f"{'; '.join(where)}. Nothing was changed; lower the learning rate, clip, widen wire_dtype, or pass on_nonfinite='skip'"
        )
        error.places = where
        raise error

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of tables and dense parameters."""
        if self.dense is not None:
            self.dense.zero_grad(set_to_none)
        for journey in self.journeys:
            journey.drop()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the groups are the dense optimizer's and the tables'. (Torch calls this while it is built; nothing to do.)"""
        if hasattr(self, "_built"):
            raise ConfigError("add parameter groups to the dense optimizer before se.Optimizer is made")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave: the dense optimizer's state, and every group's settings.

        Raises:
            ConfigError: the groups are not those of this optimizer; nothing has been loaded.
        """
        groups = state_dict["param_groups"]
        saved, here = [_kind(group) for group in groups], [_kind(group) for group in self.param_groups]
        if saved != here:
            raise ConfigError(f"the state has param groups of {saved}, this optimizer of {here}")
        split = len(groups) - len(self._groups)
        if self.dense is not None:
            self.dense.load_state_dict({"state": state_dict["state"], "param_groups": groups[:split]})
        for group, loaded in zip(self._groups.values(), groups[split:], strict=True):
            group.update({key: value for key, value in loaded.items() if key not in ("params", "optimizer", "tables")})

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise PickleError(
            "se.Optimizer cannot be copied or pickled, since it holds tables that lie cut over the ranks; save its state_dict()"
        )


def _check_dense(dense: torch.optim.Optimizer, model: nn.Module) -> None:
    if not isinstance(dense, torch.optim.Optimizer):
        raise ConfigError(f"dense must be a torch optimizer over the dense parameters, not {type(dense).__name__}")
    known = {id(parameter) for parameter in model.parameters()}
    strange = [p for group in dense.param_groups for p in group["params"] if id(p) not in known]
    if strange:
        raise ConfigError(
            f"the dense optimizer holds {len(strange)} parameter(s) that are not the model's, the first of shape "
            f"{tuple(strange[0].shape)}. shard() takes tables out of model.parameters(): build the dense optimizer after it. Where "
            "parameters of another module are meant, pass one module that has both"
        )


def _kind(group: dict[str, Any]) -> str:
    """What a param group is of, as it must be again where its settings are loaded."""
    return f"{group['optimizer']} over {group['tables']}" if "tables" in group else "dense parameters"


def _table_groups(found: list[Journey]) -> dict[TableOptimizer, dict[str, Any]]:
    """A param group for each of the tables' optimizers; the first holds what stands for the waiting gradients."""
    groups: dict[TableOptimizer, dict[str, Any]] = {}
    for journey in found:
        for slab in journey.stepped:
            optimizer = slab.spec.optimizer
            start = {"params": [], "lr": optimizer.lr, "optimizer": type(optimizer).__name__, "tables": []}
            names = groups.setdefault(optimizer, start)["tables"]
            names += sorted({journey.tables[table].name for table in slab.tables} - set(names))
    for group in groups.values():
        group["tables"].sort()  # slabs, and so their order, depend on the plan
    if groups:
        next(iter(groups.values()))["params"] = [GradientProxy.of(journey) for journey in found]
    return groups
