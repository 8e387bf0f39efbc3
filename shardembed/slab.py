"""One slab on one rank: rows and optimizer state of one width, and the gradients that wait for the step.

Legend: E entries, S segments, U distinct rows, W width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from shardembed import initial
from shardembed.kernels import fbgemm, reference
from shardembed.kernels.choose import choose
from shardembed.kernels.reference import Gradients
from shardembed.layout import Shard
from shardembed.slabs import SlabSpec
from shardembed.tables import TableConfig


@dataclass(frozen=True)
class LocalShard:
    """A shard this rank holds: views of its weights `[rows, columns]` and of its optimizer state, by name."""

    table: str
    shard: Shard
    weights: torch.Tensor
    state: dict[str, torch.Tensor]


class Slab:
    """All shards of one kind that this rank holds.

    Attributes:
        weights: `[rows, W]`. state: optimizer state by name, `[rows, W]` or `[rows]`, in the compute dtype.
        kernel: what updates it, "reference" or "fbgemm".
    """

    def __init__(
        self, spec: SlabSpec, tables: Sequence[TableConfig], rank: int, seed: int, device: torch.device, kernel: str
    ) -> None:
        self.spec = spec
        self._tables = tables
        self.rank = rank
        rows = spec.rows[rank]
        # Chosen by the fullest rank, so that all ranks of a slab compute alike.
        self.kernel = choose(kernel, spec.optimizer, spec.dtype, spec.width, max(spec.rows), device, spec.split_rows)
        self.weights = torch.empty(rows, spec.width, dtype=spec.dtype, device=device)
        shapes = {"row": (rows,), "element": (rows, spec.width)}
        self.state = {
            name: torch.zeros(shapes[shape], dtype=spec.compute_dtype, device=device)
            for name, shape in spec.optimizer.state.items()
        }
        self._waiting: list[Gradients] = []
        self._merged = False
        for lane_table, local in self._local():
            initial.fill(local.weights, lane_table, seed, local.shard.rows, local.shard.columns)
        self._fused = fbgemm.Table(self.weights, self.state, spec.optimizer) if self.kernel == "fbgemm" else None

    def shards(self) -> Iterator[LocalShard]:
        """The shards this rank holds, in lane order."""
        for _, local in self._local():
            yield local

    def _local(self) -> Iterator[tuple[TableConfig, LocalShard]]:
        for lane in self.spec.lanes:
            table = self._tables[lane.table]
            for block in lane.blocks:
                if self.rank in block.shard.ranks:
                    keys = slice(block.first_key, block.first_key + len(block.shard.rows))
                    state = {name: tensor[keys] for name, tensor in self.state.items()}
                    yield table, LocalShard(table.name, block.shard, self.weights[keys], state)

    def locate(self, keys_E: torch.Tensor) -> torch.Tensor:
        """The slab row of each key, int64. Plain tables: the key itself."""
        return keys_E.to(torch.int64)

    def lookup(self, rows_E: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
        """One vector a segment, `[S, W]`: the row itself, or the sum of the segment's rows (in the compute dtype)."""
        return reference.lookup(self.weights, rows_E, offsets, self.spec.compute_dtype)

    def accumulate(self, gradients: Gradients) -> None:
        """Keep the gradients of one backward until the step. They must be in the compute dtype."""
        if self._merged:
            self._merged = False
        self._waiting.append(gradients)

    def waiting(self) -> Gradients | None:
        """All gradients that wait, as one."""
        if len(self._waiting) > 1:
            self._waiting = [Gradients.join(self._waiting)]
        return self._waiting[0] if self._waiting else None

    def merged(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Distinct rows `[U]`, ascending, and their summed gradients `[U, W]`; kept, so that a second call is free."""
        waiting = self.waiting()
        if waiting is None:
            return self.weights.new_empty(0, dtype=torch.int64), self.weights.new_empty(
                0, self.spec.width, dtype=self.spec.compute_dtype
            )
        if not self._merged:
            self.replace(*reference.merge(waiting))
        kept = self._waiting[0]
        return kept.rows_E, kept.grads_SW

    def replace(self, rows_U: torch.Tensor, grads_UW: torch.Tensor) -> None:
        """Let these merged gradients wait instead of what did."""
        self._waiting = [Gradients(rows_U, None, grads_UW)]
        self._merged = True

    def finite(self) -> bool:
        """No waiting gradient holds inf or nan."""
        return all(bool(torch.isfinite(part.grads_SW).all()) for part in self._waiting)  # host sync on a GPU

    def zero_nonfinite(self) -> None:
        """Replace every inf and nan among the waiting gradients by zero."""
        for part in self._waiting:
            torch.nan_to_num_(part.grads_SW, nan=0.0, posinf=0.0, neginf=0.0)

    def drop(self) -> None:
        """Forget the waiting gradients."""
        self._waiting = []
        self._merged = False

    def step(self, lr: float, number: int, factor: float = 1.0, mean_square_U: torch.Tensor | None = None) -> None:
        """Apply the waiting gradients, times `factor`, to the rows they touch; then forget them.

        Args:
            number: steps taken, this one included.
            mean_square_U: mean of g^2 (without `factor`) over whole rows, for slabs that hold rows split over ranks.
        """
        waiting = self.waiting()
        if waiting is not None:
            if factor != 1.0:
                waiting.grads_SW.mul_(factor)
            if self._fused is not None:
                self._fused.update(waiting, lr)
            else:
                rows_U, grads_UW = self.merged()
                square = None if mean_square_U is None else mean_square_U * factor**2
                reference.update(self.weights, self.state, self.spec.optimizer, lr, number, rows_U, grads_UW, square)
        self.drop()
