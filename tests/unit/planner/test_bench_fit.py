"""Fitting the planner's model, drawing plans to judge it by, and the page that says how well it does."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks import predict, unseen
from shardembed.planner.calibrate import drawn, fit
from shardembed.planner.cost import estimate
from shardembed.planner.cost_phases import PHASES
from shardembed.planner.topology import Link, Op, Topology
from shardembed.planner.topology_sections import OPTIONAL_OPS, REQUIRED_OPS
from shardembed.tables.placement import Cluster

BLANK = Topology("test", 2, 2, 1 << 30, 0, fit.FREE, fit.FREE, {})
CLUSTER = Cluster(2, 2)


@pytest.fixture(scope="module")
def machine() -> Topology:
    """Some machine."""
    numbers = np.random.default_rng(5)
    ops = {name: Op(*(numbers.random(3) * [1e-5, 1e-8, 1e-10])) for name in (*REQUIRED_OPS, *OPTIONAL_OPS)}
    link = Link(2e9, 1e-4)
    return Topology("test", 2, 2, 1 << 30, 0, link, link, ops)


@pytest.fixture(scope="module")
def known(machine: Topology) -> tuple[list[fit.Array], list[fit.Array]]:
    """Designs of 12 small cases, and what they would take on that machine."""
    cases = drawn.cases(CLUSTER, 12, seed=3, elements=1 << 16)
    designs = [fit.design(case, BLANK) for case in cases]
    return designs, [estimate(case.plan, case.workload, machine).phase_seconds for case in cases]


def test_the_design_is_the_model(known: tuple[list[fit.Array], list[fit.Array]], machine: Topology) -> None:
    def number(unknown: fit.Unknown) -> float:
        if unknown.op == "intra":
            return machine.intra.latency if unknown.field == "latency" else 1.0 / machine.intra.bandwidth
        return getattr(machine.ops[unknown.op], unknown.field)

    values = np.array([number(unknown) for unknown in fit.UNKNOWNS])
    for design, seconds in zip(*known, strict=True):
        assert design.shape == fit.shape(BLANK)
        np.testing.assert_allclose((design @ values).max(1), seconds, rtol=1e-9)


def test_a_fit_finds_speeds_that_say_what_was_measured(known: tuple[list[fit.Array], list[fit.Array]]) -> None:
    designs, seconds = known
    values = fit.fit(designs, seconds)
    assert min(values.values()) >= 0
    numbers = np.array([values.get(unknown, 0.0) for unknown in fit.UNKNOWNS])
    said = np.array([(design @ numbers).max(1).sum() for design in designs])
    np.testing.assert_allclose(said, [phases.sum() for phases in seconds], rtol=0.02)


def test_what_is_known_is_not_sought(known: tuple[list[fit.Array], list[fit.Array]], machine: Topology) -> None:
    designs, seconds = known
    block = fit.Unknown("block", "row")
    values = fit.fit(designs, seconds, {block: machine.ops["block"].row})
    assert values[block] == machine.ops["block"].row
    numbers = np.array([values.get(unknown, 0.0) for unknown in fit.UNKNOWNS])
    said = np.array([(design @ numbers).max(1).sum() for design in designs])
    np.testing.assert_allclose(said, [phases.sum() for phases in seconds], rtol=0.02)


def test_one_disturbed_case_does_not_spoil_the_others(known: tuple[list[fit.Array], list[fit.Array]]) -> None:
    designs, seconds = known
    values = fit.fit(designs, [phases * (5 if number == 4 else 1) for number, phases in enumerate(seconds)])
    numbers = np.array([values.get(unknown, 0.0) for unknown in fit.UNKNOWNS])
    off = [abs((design @ numbers).max(1).sum() / phases.sum() - 1) for design, phases in zip(designs, seconds, strict=True)]
    assert np.median(off) < 0.05


def test_plans_are_drawn_from_every_kind_cut_and_packing() -> None:
    trials = unseen.trials(CLUSTER, 13)
    assert len(trials) == 65
    tables = [table for trial in trials for table in trial.case.plan.tables]
    kinds = Counter(table.kind for table in tables)
    assert set(kinds) == {"table_wise", "row_wise", "row_wise, blocks", "column_wise", "grid", "replicated"}
    assert {table.packing for table in tables} == {"unique", "bag"}
    assert {len(table.layout.strips) for table in tables} >= {1, 2, 4}
    uneven = [
        table for table in tables if table.kind == "row_wise, blocks" and len({len(s.rows) // 2 for s in table.layout.shards}) > 1
    ]
    assert uneven
    again = unseen.trials(CLUSTER, 13)
    assert [trial.case.plan.hash for trial in again] == [trial.case.plan.hash for trial in trials]


def test_the_planner_is_not_told_the_batches_that_are_timed() -> None:
    sequences = next(trial for trial in unseen.trials(CLUSTER, 1) if trial.case.workload.name == "sequences")
    for true, told in zip(sequences.case.workload.tables, sequences.told.tables, strict=True):
        assert told.skew.counts.sum() == 40 * 20 * 200  # type: ignore[union-attr]  # ids of 40 batches of a rank
        assert told.skew is not true.skew


def line(workload: str, predicted: float, median: float) -> predict.Line:
    phases = [median / len(PHASES)] * len(PHASES)
    return predict.Line(workload, "2 row_wise bag", predicted, 0.9 * median, median, 1.1 * median, phases, phases)


def test_the_page_says_how_far_off_predictions_are(tmp_path: Path) -> None:
    lines = [line(name, 0.011 * (i + 1), 0.01 * (i + 1)) for name in unseen.WORKLOADS for i in range(3)]
    found = predict.figures(lines)
    assert found["error"] == pytest.approx(0.1)
    assert found["rank_correlation"] == pytest.approx(1.0)
    assert found["spread"] == pytest.approx(0.1)
    text = predict.page(lines, "the command", "plot.svg", {"measured": "today"})
    assert "15 plans: mean absolute error 10.0%, rank correlation 1.000" in text
    assert "| ranking | 2 row_wise bag | 22.0 | 20.0 | 18.0 to 22.0 |" in text
    predict.plot(lines, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text().startswith("<?xml")
