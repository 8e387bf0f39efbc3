"""Gradients on their way into a table: what a backward brings to the owner of rows, and what a step finds.

Legend: E entries (row, segment), S segments, W width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Gradients:
    """Gradients that wait at the owner: every row of segment s gets `grads_SW[s]`.

    Attributes:
        rows_E: slab rows, int64.
        offsets: where each segment's rows begin, `[S + 1]`, or None when every segment is a single row.
        grads_SW: one gradient a segment.
    """

    rows_E: torch.Tensor
    offsets: torch.Tensor | None
    grads_SW: torch.Tensor

    @staticmethod
    def join(parts: list[Gradients]) -> Gradients:
        """All parts as one; what accumulates over micro-batches is exact, since nothing is summed before the merge."""
        if len(parts) == 1:
            return parts[0]
        rows = torch.cat([part.rows_E for part in parts])
        grads = torch.cat([part.grads_SW for part in parts])
        if all(part.offsets is None for part in parts):
            return Gradients(rows, None, grads)
        starts, before = [rows.new_zeros(1)], 0
        for part in parts:
            offsets = part.offsets if part.offsets is not None else torch.arange(part.rows_E.numel() + 1, device=rows.device)
            starts.append(offsets[1:] + before)
            before += part.rows_E.numel()
        return Gradients(rows, torch.cat(starts), grads)

    def without(self, rows: torch.Tensor) -> Gradients:
        """The same without the few `rows`; a segment may become empty."""
        return self.only(~torch.isin(self.rows_E, rows))

    def only(self, kept_E: torch.Tensor) -> Gradients:
        """Those entries alone that are to be kept; a segment may become empty."""
        if self.offsets is None:
            return Gradients(self.rows_E[kept_E], None, self.grads_SW[kept_E])
        before = torch.cat([kept_E.new_zeros(1, dtype=torch.int64), kept_E.cumsum(0)])
        return Gradients(self.rows_E[kept_E], before[self.offsets], self.grads_SW)
