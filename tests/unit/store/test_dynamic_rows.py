"""A slab of a dynamic table, step by step, beside the oracle: what is read, who lives, what is remembered and learnt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shardembed as se
from shardembed.kernels import grouping
from shardembed.kernels.gradients import Gradients
from shardembed.kernels.rounding import chance
from shardembed.store.dynamic.census import Census
from shardembed.store.slab import Slab
from shardembed.store.slab_spec import build_slabs
from shardembed.store.starting import fill_rows
from shardembed.tables.initial import table_hash
from shardembed.tables.placement import Cluster
from shardembed.tables.plan import resolve
from tests.amount import examples
from tests.dynamic_cases import FEW, Learned, dynamic_configs, steps_of_ids
from tests.dynamic_oracle import OracleTable
from tests.oracle import EXAMPLES

COLUMNS, SEED = 2, 3
ALL = torch.tensor(FEW)
CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}


def both(config: se.TableConfig, optimizer: se.optim.TableOptimizer, kernel: str = "auto") -> tuple[Slab, OracleTable]:
    (spec,) = build_slabs([config], resolve([config], se.table_wise(0), Cluster(1, 1)), [optimizer])
    hashed = table_hash(SEED, config.name)

    def start(ids: torch.Tensor) -> torch.Tensor:
        rows = torch.empty(len(ids), COLUMNS, dtype=torch.float64)
        fill_rows(rows, config, SEED, ids, range(COLUMNS))
        return rows

    def draw(id_: int, now: int) -> float:
        return float(chance(hashed, torch.tensor([id_]), now))

    slab = Slab(spec, [config], 0, SEED, torch.device("cpu"), kernel)
    return slab, OracleTable(config, optimizer, start, draw)


def learn(slab: Slab, oracle: OracleTable, batch: Learned) -> None:
    if batch.ids:
        ids, grads_nD = torch.tensor(batch.ids), batch.grads_nD(COLUMNS)
        slab.accumulate(Gradients(slab.bring(ids), None, grads_nD))
        oracle.learn(ids, grads_nD)


def remembered(census: Census, now: int) -> dict[int, tuple[int, int]]:
    """Of each living id its count and its last step."""
    slots = census.living(now)
    counts = census.counts_S[slots] if census.counts_S.numel() else torch.zeros_like(slots)
    return {
        id_: (count, last)
        for id_, count, last in zip(census.ids_S[slots].tolist(), counts.tolist(), census.lasts_S[slots].tolist(), strict=True)
    }


def assert_read(slab: Slab, oracle: OracleTable) -> None:
    for learning in (True, False):
        slots = slab.locate(ALL, learning)  # which may take more memory, and is to be read before the next call
        torch.testing.assert_close(slab.weights[slots], oracle.read(ALL, learning), **CLOSE)


@examples(100)
@given(dynamic_configs(COLUMNS), st.sampled_from(sorted(EXAMPLES)), steps_of_ids(), st.data())
def test_a_slab_does_what_the_rules_say(config: se.TableConfig, name: str, steps: list[list[Learned]], data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        compiled = data.draw(st.booleans(), label="with Numba")
        if not compiled:
            patch.setattr(grouping, "missing", lambda: "numba is not installed")
        run(*both(config, EXAMPLES[name], "auto" if compiled else "reference"), steps, data)


def run(slab: Slab, oracle: OracleTable, steps: list[list[Learned]], data: st.DataObject) -> None:
    assert slab.dynamic is not None
    now = 0
    for batches in steps:
        assert_read(slab, oracle)
        for batch in batches:
            learn(slab, oracle, batch)
        if data.draw(st.integers(0, 5)) == 0:  # a step that is skipped
            slab.drop()
            oracle.drop()
            continue
        now += 1
        slab.commit(now)
        slab.step(oracle.optimizer.lr, now)
        counts, last = oracle.step(), slab.dynamic.last
        found = last.created, last.evicted, last.refused, last.waiting
        assert found == (counts.created, counts.evicted, counts.refused, counts.waiting)
        counted = slab.dynamic.census.policy.counts
        rows = {id_: (row.count if counted else 0, row.last) for id_, row in oracle.rows.items()}
        assert remembered(slab.dynamic.census, now) == rows
        waiting = {id_: (seen.count, seen.last) for id_, seen in oracle.candidates.items()}
        assert ({} if slab.dynamic.candidates is None else remembered(slab.dynamic.candidates, now)) == waiting
    assert_read(slab, oracle)
    slots = slab.locate(torch.tensor(oracle.live, dtype=torch.int64), learning=False)
    for key, tensor in slab.state.items():
        for slot, id_ in zip(slots.tolist(), oracle.live, strict=True):
            torch.testing.assert_close(tensor[slot], oracle.rows[id_].state[key], **CLOSE)


@pytest.mark.parametrize("admission", [None, se.MinCount(3)])
def test_places_of_the_dead_are_taken_without_a_limit_too(admission: Any) -> None:
    """Memory is that of the living, whatever the number of ids that have ever come; candidates are counted so, too."""
    config = se.TableConfig("item", None, COLUMNS, dtype=torch.float64, dynamic=se.Dynamic(se.TTL(2), admission))
    slab, oracle = both(config, se.optim.Adagrad(lr=0.1))
    assert slab.dynamic is not None
    for now in range(1, 31):
        batch = Learned((tuple(range(now * 100, now * 100 + 100)), (-1, -1, -1)), now)  # of which one stays
        learn(slab, oracle, batch)
        slab.commit(now)
        slab.step(0.1, now)
        oracle.step()
    for census, kept in ((slab.dynamic.census, oracle.rows), (slab.dynamic.candidates, oracle.candidates)):
        if census is not None:
            assert census.places == 1024  # 3,001 ids have come, of which some 200 live
            assert set(census.ids_S[census.living(30)].tolist()) == set(kept)
    assert slab.dynamic.tally.expired > 2000 or admission is not None  # all but those that nobody has looked for yet
    assert_read(slab, oracle)
    slots = slab.locate(torch.tensor(oracle.live), learning=False)
    torch.testing.assert_close(slab.weights[slots], oracle.read(oracle.live, False), **CLOSE)
