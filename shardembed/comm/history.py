"""What has been done on a Comm so far. It is the same on all ranks, or they have gone different ways."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from shardembed.comm.channels import Group


class History:
    """Counts and a checksum of what happened, each changed by the method that says what did.

    Args:
        label: what sets the calls apart from those of another Comm over the same ranks, for messages.
    """

    def __init__(self, label: str = "") -> None:
        self._label = label
        self._about = ""
        self._step = 0
        self._forwards = 0
        self._checksum = 0
        self._collections: list[str] = []
        self._slots = 0

    @property
    def about(self) -> str:
        """What the latest collective is about, for messages."""
        return self._about

    @property
    def step(self) -> int:
        """Optimizer steps so far: of several collections the most."""
        return self._step

    @property
    def forwards(self) -> int:
        """Forward calls so far, and others that begin with a counts message. The latest has this number."""
        return self._forwards

    @property
    def checksum(self) -> int:
        """Of all collectives so far, below 2^32."""
        return self._checksum

    @property
    def collections(self) -> Sequence[str]:
        """Names of the collections that were made, in the order of their numbers; the first has number 1."""
        return self._collections

    @property
    def slots(self) -> int:
        """Slabs of the largest collection, for which a counts message has room."""
        return self._slots

    def register(self, name: str, slabs: int) -> int:
        """A collection has been made; returns its number."""
        self._collections.append(name)
        self._slots = max(self._slots, slabs)
        return len(self._collections)

    def open_call(self) -> int:
        """A forward call begins; returns its number."""
        self._forwards += 1
        return self._forwards

    def stepped(self, steps: int) -> None:
        """A collection has taken so many optimizer steps in all."""
        self._step = max(self._step, steps)

    def stand_at(self, step: int) -> None:
        """What follows belongs to this optimizer step, which may lie before the last one. For Comms beside the main thread's, which
        hear of no step.
        """
        self._step = step

    def note(self, group: Group, stage: str, number: int) -> None:
        """A collective is about to run. number: of the forward call or the collection that it belongs to, 0 for none."""
        self._about = self._whose(group, number)
        self._mix(f"{stage} {self._about} {self._step}")

    def lent(self, lender: History) -> None:
        """The Comm is lent to a loop. It knows the lender's collections as they are now: what the main thread makes in the meantime
        is not known on all ranks at the same time.
        """
        self._collections, self._slots = list(lender._collections), lender._slots
        self._mix("lent")  # ranks that left an earlier loop after different batches notice

    def sent_ahead(self, step: int, checksum: int) -> None:
        """A call is to be made that the main thread asked for when its history had this step and this checksum."""
        self._step = step
        self._mix(f"beside the loop {checksum}")

    def _whose(self, group: Group, number: int) -> str:
        if not number:
            return self._label
        return f"of forward call {number}" if group == "backward" else f"of collection {number}: {self._collections[number - 1]}"

    def _mix(self, text: str) -> None:
        self._checksum = zlib.crc32(text.encode(), self._checksum)
