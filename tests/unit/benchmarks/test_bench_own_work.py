"""A rank's own work: the ranks that are not there ask what this one asks, and nothing of a step is left out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.own_work import LEAST, PARTS, Case, Rank, measure
from shardembed.inputs.ids import IdBatch
from shardembed.tables.placement import Packing

SMALL = Case(tables=3, slabs=2, rows=40, samples=5, ids=2, packing="unique")


@pytest.mark.parametrize("packing", ["unique", "bag"])
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


def test_the_parts_of_a_step_are_all_of_it() -> None:
    rank = Rank(SMALL, ranks=3)
    found = rank.step(0)
    assert set(found) == set(PARTS)
    assert found["step"] == pytest.approx(sum(found[part] for part in PARTS if part != "step"))
    assert set(measure(SMALL, 3, rounds=1)) == {*PARTS, LEAST}
