"""Ids that are sent ahead: before the turn of their batch, by a Comm that works beside the main thread's."""

from __future__ import annotations

from dataclasses import dataclass

from shardembed.comm.comm import Comm
from shardembed.errors import ConfigError
from shardembed.inputs.ids import IdBatch
from shardembed.journey.messages import Call


@dataclass(frozen=True)
class Ahead:
    """What a batch that is sent ahead takes along: where the main thread stood when it asked for that (see `prefetch`). Ranks come
    there by the same calls, so all of it is the same on all of them.

    Attributes:
        comm: carries the call beside the main thread, and numbers it by itself.
        call: what it says of itself to the other ranks.
        step: optimizer steps by the main thread's Comm.
        checksum: of the history of the main thread's Comm.
    """

    comm: Comm
    call: Call
    step: int
    checksum: int

    def begin(self) -> tuple[Comm, Call]:
        """The Comm, brought to where the main thread stood, and the call."""
        self.comm.history.sent_ahead(self.step, self.checksum)
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
