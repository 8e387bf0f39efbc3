"""What comes of looking ids up, and of a step.

Legend: E entries, P ids that wait for a row, U distinct ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shardembed.kernels.placing import redirect


@dataclass(frozen=True)
class Tally:
    """What steps have made of ids.

    Attributes:
        created: got a row.
        evicted: left for them.
        expired: had died of age, and were found out.
        refused: were admitted, and found no place.
        waiting: were not admitted.
    """

    created: int = 0
    evicted: int = 0
    expired: int = 0
    refused: int = 0
    waiting: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Moved:
    """Where gradients go that wait for ids which had no row.

    Attributes:
        base: the number under which those of the first wait.
        rows_P: the row of each id, -1 where it has got none.
    """

    base: int
    rows_P: torch.Tensor

    def of(self, rows_E: torch.Tensor) -> torch.Tensor:
        """The rows to which these numbers now belong."""
        return redirect(rows_E, self.base, self.rows_P) if self.rows_P.numel() else rows_E


@dataclass(frozen=True)
class Found:
    """What the last lookup found.

    Attributes:
        keys_E: that were looked up.
        rows_E: of each its row; from `first` on those of ids that have none.
        first: row behind all others.
        absent_U: these ids, each once.
    """

    keys_E: torch.Tensor
    rows_E: torch.Tensor
    first: int
    absent_U: torch.Tensor
