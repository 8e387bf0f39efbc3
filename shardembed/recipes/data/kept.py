"""A source that is read once and then kept in memory, where it is small: counting, numbering and every epoch go over it again, and
parsing text takes longer than all of these.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from shardembed.recipes.data.plausible import free_memory
from shardembed.recipes.data.source import Chunk, Source

KEPT_BYTES = 1 << 30  # by all ranks of a machine together
SHARE = 1 / 8  # of the memory that is free


class Kept:
    """The interactions of a source. What is kept is what the first pass over a part gave; a file that changes later is not looked
    at. A copy that goes to another process keeps nothing and reads for itself.

    Attributes:
        source: what is kept.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self._room = min(KEPT_BYTES, SHARE * free_memory()) / here
        self._parts: dict[int, list[Chunk]] = {}

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def parts(self) -> Sequence[str]:
        return self.source.parts

    def chunks(self, part: int) -> Iterator[Chunk]:
        if part in self._parts:
            yield from self._parts[part]
            return
        kept: list[Chunk] | None = []
        room = self._room
        for chunk in self.source.chunks(part):
            room -= chunk.nbytes
            if room < 0:
                kept = None
            elif kept is not None:
                kept.append(chunk)
            yield chunk
        if kept is not None:
            self._parts[part], self._room = kept, room

    def place(self, column: int, value: int) -> str:
        return self.source.place(column, value)

    def __getstate__(self) -> dict[str, object]:
        return {"source": self.source, "_room": 0, "_parts": {}}
