"""What every test of weights on ranks relies on: parts that do not make the whole are found out."""

from __future__ import annotations

import pytest
import torch

import shardembed as se
from tests.held import Piece, copied, pieces, whole

LEFT, RIGHT = (slice(0, 3, 1), slice(0, 2)), (slice(0, 3, 1), slice(2, 4))
ODD, EVEN = (slice(1, 3, 2),), (slice(0, 3, 2),)


def piece(where: tuple[slice, ...], values: torch.Tensor, shape: tuple[int, ...] = (3, 4)) -> Piece:
    return Piece("t", shape, where, values)


def test_parts_make_the_whole() -> None:
    table, sums = torch.arange(12.0).view(3, 4), torch.arange(3.0)
    found = whole(
        [
            [piece(LEFT, table[:, :2]), Piece("t.sum", (3,), ODD, sums[1::2]), copied("seen", torch.tensor(7))],
            [piece(RIGHT, table[:, 2:]), Piece("t.sum", (3,), EVEN, sums[::2]), copied("seen", torch.tensor(7))],
            [piece(LEFT, table[:, :2]), piece((slice(3, 3, 1), slice(0, 4)), table[:0])],
        ]
    )
    assert {name: tensor.tolist() for name, tensor in found.items()} == {"t": table.tolist(), "t.sum": [0, 1, 2], "seen": 7}


def test_what_is_missing_or_differs_is_an_error() -> None:
    ones = torch.ones(3, 2)
    nearly = ones.clone()
    nearly[1, 1] += 1e-6
    for runs, error in (
        ([[piece(LEFT, ones)]], "held by nobody"),
        ([[piece(LEFT, ones)], [piece(LEFT, nearly), piece(RIGHT, ones)]], "two holders of one element differ"),
        ([[copied("t", torch.zeros(()))], [copied("t", torch.ones(()))]], "two holders of one element differ"),
        ([[piece(LEFT, ones)], [piece(RIGHT, ones.double())]], "two shapes or dtypes"),
        ([[piece(LEFT, ones)], [piece(RIGHT, ones, (3, 5))]], "two shapes or dtypes"),
    ):
        with pytest.raises(AssertionError, match=f"^t.*{error}"):
            whole(runs)


def test_pieces_are_copies_of_weights_and_state() -> None:
    tables = [se.TableConfig("a", 5, 4), se.TableConfig("b", 3, 2)]
    emb = se.EmbeddingCollection(tables, optimizer={"a": se.optim.RowwiseAdagrad(lr=0.1), "b": se.optim.Adam(lr=0.1)})
    found = pieces(emb)
    assert {one.name: one.shape for one in found} == {
        "a": (5, 4),
        "a.sum": (5,),
        "b": (3, 2),
        "b.exp_avg": (3, 2),
        "b.exp_avg_sq": (3, 2),
    }
    before = {name: tensor.clone() for name, tensor in whole([found]).items()}
    for local in emb.local_shards():
        local.weights.add_(1)
    for name, tensor in whole([found]).items():
        assert torch.equal(tensor, before[name]), name
