"""The optimizer step that a collection's gradients wait for: how far it has come, and what may follow.

              gradients_arrived           reduced             step_began, taken
        IDLE ---------------> WAITING ------------> REDUCED --------------------> IDLE
                               |   ^ |                 |
                               |   +-+ one more        |
                               |       backward        |
                               +------- dropped -------+------------------------> IDLE

WAITING: gradients lie with their owners. REDUCED: those of copied tables have been brought together, for clipping or for the step;
no backward may follow, since what it brings would be missing in the sum.

Beside the state stands the factor that all of them are to be multiplied with. Scalers and clipping come in any order, before and
after the reduction, and each takes it one further:

        none (stands for 1) -- checked --> 1, or nan where a gradient of any rank is not finite
                            -- scaled ---> what clipping multiplies it with
                            -- in place -> what a GradScaler multiplies it with: `GradientProxy.grad` hands the tensor out

A backward may follow a look that found 1, which is then void. It may not follow an unscaling: what it brings is still scaled.

Nothing here communicates or touches a gradient. Ranks make the same transitions because all that leads to them is collective.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch

from shardembed.errors import MissedStepWarning, StepError


class State(Enum):
    """How far the step has come."""

    IDLE = "nothing waits"
    WAITING = "gradients wait"
    REDUCED = "gradients wait, and those of copies are together"


@dataclass(frozen=True)
class EngineRun:
    """One run of the autograd engine, in which the lookups of a forward come back one by one.

    Attributes:
        number: the engine's own; -1 before the first run.
        tables: those whose gradients have come.
        twice: those of them that came again.
        fresh: only one lookup has come.
    """

    number: int = -1
    tables: frozenset[int] = frozenset()
    twice: frozenset[int] = frozenset()
    fresh: bool = True

    def joined(self, number: int, tables: frozenset[int]) -> EngineRun:
        """This run with one more lookup, or the first lookup of another run."""
        if number != self.number or number < 0:
            return EngineRun(number, tables)
        return EngineRun(number, self.tables | tables, self.tables & tables, fresh=False)


class PendingStep:
    """The step that is to come, and how many have been taken.

    Tables are known by their numbers in the collection.

    Args:
        names: of all tables, for messages.
        stepped: the tables that take the step: those with an optimizer of ours.
        at_once: each backward is a step (update="backward").
        device: of the factor.

    Attributes:
        state: how far it has come.
        factor: what all that waits is to be multiplied with, float64 `[1]`; None for 1.
        unchecked: something may have come since it was last looked at whether all that waits is finite.
        steps: optimizer steps taken with gradients.
        missed: of these, by table, the steps that it was frozen in; tables that missed none are left out.
    """

    def __init__(self, names: Sequence[str], stepped: frozenset[int], at_once: bool, device: torch.device) -> None:
        self._names, self._stepped, self._at_once, self._device = names, stepped, at_once, device
        self.steps = 0
        self.missed: dict[int, int] = {}
        self._micro_batches = 1
        self._run = EngineRun()
        self._forward_came = False  # since the last backward that was counted
        self.dropped()

    def dropped(self) -> None:
        """Nothing waits any more."""
        self.state = State.IDLE
        self.factor: torch.Tensor | None = None
        self.unchecked = True
        self._backwards = 0
        self._frozen_throughout: frozenset[int] | None = None  # by all backwards since the last step; None before the first
        self._forgotten: frozenset[int] = frozenset()  # tables whose gradients were dropped and have not come again

    @property
    def waiting(self) -> bool:
        """Gradients wait; the same on all ranks, since backward is collective."""
        return self.state is not State.IDLE

    def expect(self, micro_batches: int) -> None:
        """So many backward passes are meant to come before a step; one more warns of a forgotten one."""
        self._micro_batches = micro_batches

    # What comes before the step, in the order of a batch.

    def looked_up(self) -> None:
        """A forward has come, so that the next backward is another pass."""
        self._forward_came = True

    def backward_began(self, run: int, tables: frozenset[int]) -> None:
        """Gradients of a lookup of `tables` are on their way.

        Args:
            run: number of the autograd engine's run.

        Raises:
            StepError: what waits is not what they may be added to, or update="backward" has taken this run's step for a table.
        """
        if self.state is State.REDUCED:
            raise StepError("a backward came between clip_grad_norm_ and Optimizer.step(); clip after the last backward of a step")
        if self.factor is not None and bool(self.factor != 1):  # nan too; on a GPU a host sync, after an early look only
            raise StepError(
                "a backward came after the waiting gradients had been unscaled or found not finite; unscale after the last "
                "backward of a step, and call Optimizer.zero_grad() after a step that GradScaler skipped"
            )
        self.factor, self.unchecked = None, True
        self._run = self._run.joined(run, tables)
        if self._run.twice and self._at_once:
            raise StepError(
                f"table {self._names[min(self._run.twice)]!r} was looked up twice in a forward: update='backward' would take "
                "a step for each; use update='step', or one lookup with two features"
            )

    def gradients_arrived(self, frozen: frozenset[int]) -> bool:
        """A backward's gradients lie with their owners. Whether its step is due now.

        Args:
            frozen: tables that do not learn from this backward.
        """
        if self._stepped <= frozen:
            return False
        self._forgotten &= frozen
        self._frozen_throughout = frozen if self._frozen_throughout is None else self._frozen_throughout & frozen
        if self.state is State.IDLE:
            self.state = State.WAITING
        if not self._at_once:
            self._count_pass()
        return self._at_once

    def _count_pass(self) -> None:
        # A module that is called twice in a forward, or below two losses, comes here twice; that is one pass all the same.
        if self._backwards and not self._forward_came:
            return
        self._forward_came = False
        self._backwards += 1
        if self._backwards == self._micro_batches + 1:
            warnings.warn(
                f"table(s) {', '.join(map(repr, self._names))}: gradients of {self._backwards} backward passes "
                f"are waiting for Optimizer.step(), {self._micro_batches} was asked for; pass micro_batches= to se.Optimizer to "
                "accumulate on purpose",
                MissedStepWarning,
                stacklevel=2,
            )

    def forgot(self, tables: frozenset[int]) -> bool:
        """The gradients of these tables are not wanted. Whether nothing else waits, so that all is to be dropped."""
        if not self.waiting:
            return False
        self._forgotten |= tables
        return self._stepped <= self._forgotten

    # What is done to the gradients that wait.

    def reduced(self) -> None:
        """The gradients of copied tables have been brought together."""
        assert self.state is State.WAITING, f"nothing is to be reduced: {self.state.value}"
        self.state = State.REDUCED

    def checked(self, bad: torch.Tensor) -> None:
        """All ranks have looked at what waits. `bad`, `[1]`, is above 0 where some of it is not finite; it need not leave a GPU."""
        assert self.waiting, "there is nothing to look at"
        self.factor = torch.where(bad > 0, torch.nan, self._factor_or_one())
        self.unchecked = False

    def scaled(self, by: torch.Tensor) -> None:
        """What waits is to be multiplied with one number more."""
        assert self.waiting, "there is nothing to scale"
        self.factor = self._factor_or_one() * by

    def made_finite(self) -> None:
        """The gradients hold no inf or nan any more, and the factor is not to bring one back."""
        if self.factor is not None:
            self.factor = torch.nan_to_num(self.factor, nan=0.0, posinf=0.0, neginf=0.0)

    def _factor_or_one(self) -> torch.Tensor:
        """In float64, so that it costs float64 tables no digits."""
        return torch.ones(1, dtype=torch.float64, device=self._device) if self.factor is None else self.factor

    # The step itself.

    def step_began(self) -> float:
        """Count the step, whose number is `steps` from now on. The factor, as a number."""
        assert self.state is State.REDUCED, f"a step comes after the reduction: {self.state.value}"
        # With update="backward", each lookup of a run steps its own tables; together they are one step.
        if self._run.fresh or not self._at_once:
            self.steps += 1
            for table in self._stepped & (self._frozen_throughout or frozenset()):
                self.missed[table] = self.missed.get(table, 0) + 1
        return 1.0 if self.factor is None else float(self.factor)  # host sync on a GPU

    def taken(self) -> None:
        """All rows have been updated."""
        assert self.state is State.REDUCED, f"no step was begun: {self.state.value}"
        self.dropped()

    def steps_of(self, name: str) -> int:
        """The steps that a table was not frozen in."""
        return self.steps - self.missed.get(self._names.index(name), 0)

    def restore(self, taken: Mapping[str, int]) -> None:
        """Count on from what `steps_of` said of some tables; the others have missed none."""
        if taken:
            self.steps = max(taken.values())
            self.missed = {self._names.index(name): self.steps - count for name, count in taken.items() if count < self.steps}
