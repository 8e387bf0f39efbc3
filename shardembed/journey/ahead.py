"""What a call takes along that runs beside the main thread."""

from __future__ import annotations

from dataclasses import dataclass

from shardembed.comm.comm import Comm
from shardembed.errors import ConfigError
from shardembed.inputs.ids import IdBatch
from shardembed.journey.messages import Call


@dataclass(frozen=True)
class Ahead:
    """Where the main thread stood when it asked for the call (see `prefetch`). Ranks come to it by the same calls, so all of it is
    the same on all of them.

    comm: carries the call, and numbers it by itself. step, history: of the main thread's Comm.
    """

    comm: Comm
    call: Call
    step: int
    history: int

    def begin(self) -> tuple[Comm, Call]:
        """The Comm, brought to where the main thread stood, and the call."""
        self.comm.step = self.step
        self.comm.mix(f"beside the loop {self.history}")
        return self.comm, self.call

    def check(self, ids: IdBatch) -> None:
        """Refuse weights that follow from parameters: they would be those of an earlier step.

        Raises:
            ConfigError: there are some.
        """
        if any(part.weights is not None and part.weights.grad_fn is not None for part in ids.parts):
            raise ConfigError(
                "per-sample weights that are computed from parameters cannot be sent ahead, since a step comes in between; train "
                "this model with se.synced(loader) instead of se.prefetched"
            )
