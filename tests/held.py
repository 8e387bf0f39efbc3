"""What ranks hold of tensors, and the whole tensors out of it: every element is held, and copies are the same bits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

import shardembed as se
from shardembed.modules.base import ShardedModule


@dataclass(frozen=True)
class Piece:
    """A copy of what a rank holds of one tensor.

    Attributes:
        name: of the tensor: the table's name, for its optimizer state with the state's name behind it ("user.exp_avg").
        shape: of the whole tensor.
        where: the rows, and the columns if there are some, that lie here; `()` is all there is.
        values: those.
    """

    name: str
    shape: tuple[int, ...]
    where: tuple[slice, ...]
    values: torch.Tensor


def pieces(tables: se.EmbeddingCollection | ShardedModule) -> list[Piece]:
    """Weights and optimizer state of the shards that lie on this rank."""
    sizes = {table.name: (table.num_embeddings, table.embedding_dim) for table in tables.tables}
    found = []
    for local in tables.local_shards():
        rows, columns = local.shard.rows, local.shard.columns
        where = (slice(rows.start, rows.stop, rows.step), slice(columns.start, columns.stop))
        for name, tensor in {"": local.weights, **local.state}.items():
            full = f"{local.table}.{name}" if name else local.table
            found.append(Piece(full, sizes[local.table][: tensor.dim()], where[: tensor.dim()], tensor.clone()))
    return found


def copied(name: str, tensor: torch.Tensor) -> Piece:
    """A tensor that every rank has whole."""
    return Piece(name, tuple(tensor.shape), (), tensor.detach().clone())


def whole(runs: Iterable[list[Piece]]) -> dict[str, torch.Tensor]:
    """Whole tensors by name, out of what every rank holds."""
    found: dict[str, torch.Tensor] = {}
    known: dict[str, torch.Tensor] = {}
    for piece in (piece for run in runs for piece in run):
        values = found.setdefault(piece.name, piece.values.new_zeros(piece.shape))
        seen = known.setdefault(piece.name, torch.zeros(piece.shape, dtype=torch.bool))
        assert (values.shape, values.dtype) == (piece.shape, piece.values.dtype), f"{piece.name} has two shapes or dtypes"
        again = seen[piece.where]
        assert torch.equal(values[piece.where][again], piece.values[again]), f"{piece.name}: two holders of one element differ"
        values[piece.where], seen[piece.where] = piece.values, True
    for name, seen in known.items():
        assert seen.all(), f"{name}: some elements are held by nobody"
    return found
