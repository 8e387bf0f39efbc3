"""A rank's own work: the ranks that are not there ask what this one asks, and nothing of a step is left out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.own_work import PARTS, Case, Rank
from shardembed.inputs.ids import IdBatch
from shardembed.tables.placement import Packing
from tests.amount import exhaustive

SMALL = Case(tables=3, slabs=2, rows=10, samples=5, ids=2, packing="unique")


@pytest.mark.parametrize("packing", [exhaustive("unique"), "bag"])
def test_every_rank_asks_what_this_one_asks(packing: Packing) -> None:
    rank = Rank(replace(SMALL, packing=packing), ranks=4)
    journey, batch = rank.journey, rank.batches[0]
    ticket = journey.send(lambda: IdBatch.of(batch, rank.features), rank.features)
    assert len(journey.slabs) == 2
    for asked, sent in zip(ticket.request, ticket.route.slabs, strict=True):
        assert torch.equal(asked.keys_E, sent.keys_E)
    before = [slab.weights.clone() for slab in journey.slabs]
    rank.step(0)
    assert not any(torch.equal(slab.weights, old) for slab, old in zip(journey.slabs, before, strict=True))


def test_a_rank_holds_the_same_of_each_table_however_many_there_are() -> None:
    held = [[len(slab.weights) for slab in Rank(SMALL, ranks).journey.slabs] for ranks in (2, 5)]
    assert held == [[20, 10], [20, 10]]


def test_a_step_has_all_parts() -> None:
    found = Rank(SMALL, ranks=3).step(0)
    assert list(found) == list(PARTS)
    assert min(found.values()) > 0
