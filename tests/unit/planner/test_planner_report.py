"""What the planner says on a terminal and to scripts: the numbers of the plan, within 100 columns, for 2 ranks and for 1,024."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from shardembed.config.console import console_for
from shardembed.errors import ConfigError
from shardembed.planner import report, why, words
from shardembed.planner.result import Estimate, Planned
from shardembed.tables.plan import Plan, TablePlan
from shardembed.tables.table_config import TableConfig
from tests.unit.planner.planned import GIB, made_up


def printed(planned: Planned) -> str:
    file = io.StringIO()
    report.show(console_for(file), planned)
    return file.getvalue()


@pytest.mark.parametrize("ranks", [1, 2, 8, 1024])
def test_a_report_fits_a_hundred_columns_and_two_screens(ranks: int) -> None:
    lines = printed(made_up(ranks, 40)).splitlines()
    assert max(map(len, lines)) <= report.WIDTH
    assert len(lines) < 70
    assert not any("…" in line for line in lines), "a column was cut off"


def test_a_report_has_the_numbers_of_the_plan() -> None:
    planned = made_up(8)
    text = printed(planned)
    for number in (
        words.duration(planned.estimate.step_seconds),
        words.duration(planned.lower_bound_seconds),
        words.size(float(planned.estimate.memory_bytes.max())),
        words.size(76 * GIB),
        "0.34 %",
        "65,536",
    ):
        assert number in text, f"{number} is not in\n{text}"
    assert "\x1b[" not in text, "colours went where there is no terminal"
    for phase in planned.estimate.phases:
        assert any(line.startswith(phase) for line in text.splitlines())


def test_few_ranks_have_a_line_each_and_many_are_stood_for_by_the_ends() -> None:
    assert list(report.chosen_ranks(made_up(16))) == list(range(16))
    planned = made_up(1024)
    chosen = report.chosen_ranks(planned)
    assert len(chosen) <= 10
    memory, busy = planned.estimate.memory_bytes, planned.estimate.seconds.sum(0)
    said = {label: rank for rank, labels in chosen.items() for label in labels.split(", ")}
    assert memory[said["fullest"]] == memory.max()
    assert memory[said["emptiest"]] == memory.min()
    assert busy[said["slowest"]] == busy.max()
    assert busy[said["fastest"]] == busy.min()


def test_a_rank_over_its_limit_is_named_as_such() -> None:
    assert "over the limit" in printed(made_up(2, 60, memory=5 * GIB))
    assert "over the limit" not in printed(made_up(2, 60))


def test_the_dearest_tables_come_first() -> None:
    planned = made_up(4, 12)
    order = report.dearest(planned)
    work = planned.estimate.table_seconds.sum(1)[order]
    assert list(work) == sorted(work, reverse=True)
    text = printed(planned)
    places = [text.index(planned.plan.tables[index].name) for index in order[:3]]
    assert places == sorted(places)


def test_json_has_what_a_script_needs() -> None:
    planned = made_up(8)
    found = json.loads(json.dumps(report.as_json(planned)))
    assert found["step_seconds"] == planned.estimate.step_seconds
    assert found["lower_bound_seconds"] == planned.lower_bound_seconds
    assert found["gap"] == pytest.approx(0.0034)
    assert found["plan_seconds"] == planned.plan_seconds
    assert found["memory_bytes"] == [round(each) for each in planned.estimate.memory_bytes]
    assert list(found["tables"]) == [table.name for table in planned.plan.tables]
    assert found["tables"]["table_1"]["kind"] == "table_wise"
    assert found["tables"]["table_1"]["ranks"] == [[1, 1]]
    assert found["tables"]["table_2"]["ranks"] == [[0, 7]]
    assert sum(found["phase_seconds"].values()) == pytest.approx(found["step_seconds"])
    assert found["plan_hash"] == planned.plan.hash
    assert found["world_size"] == len(found["rank_seconds"]) == 8


def test_bars_need_no_blocks() -> None:
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert report.bar(console, 0.5, 20) == "#" * 10
    unicode = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert report.bar(unicode, 1.0, 20) == "█" * 20
    assert report.bar(unicode, 0.0, 20) == ""


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (words.duration(0.00291), "2.91 ms"),
        (words.duration(0.0009999), "1.00 ms"),
        (words.duration(1.5e-8), "15.0 ns"),
        (words.duration(75.2), "75.2 s"),
        (words.size(1023), "1.0 KiB"),
        (words.size(13.4 * GIB), "13.4 GiB"),
        (words.number(40_000_000), "40 M"),
        (words.number(999_950), "1 M"),
        (words.number(9_999), "9,999"),
        (words.number(10_000), "10 k"),
        (words.number(2.5), "2.5"),
        (words.percent(0.0034), "0.34 %"),
        (words.rank_list([0, 1, 2, 5]), "0-2,5"),
        (words.rank_list(range(0, 64, 2)), "0,2,4,6 and 28 more"),
        (words.shorten("sparse.arch.table", 9), "~ch.table"),
    ],
)
def test_numbers_are_short_and_round_at_their_ends(said: str, expected: str) -> None:
    assert said == expected


def test_a_column_of_times_has_one_unit() -> None:
    assert words.durations([0.0123, 0.0004]) == ["12.30 ms", "0.40 ms"]
    assert words.durations([0.818, 0.0912, 0.0]) == ["818.0 ms", "91.2 ms", "0.0 ms"]


def counted(planned: Planned) -> why.Count:
    """A made-up cost: the more ranks a table lies on, the longer the step."""

    def count(plan: Plan) -> Estimate:
        spread = sum(len(table.layout.ranks) for table in plan.tables)
        return replace(planned.estimate, seconds=planned.estimate.seconds * (1 + 0.01 * spread))

    return count


def test_explaining_a_table_shows_its_other_layouts_the_fastest_first() -> None:
    planned = made_up(8)
    index = why.number_of(planned.workload, "table_2")
    found = why.alternatives(planned, index, counted(planned))
    assert [one.table for one in found if one.chosen] == [planned.plan.tables[index]]
    times = [one.step_seconds for one in found]
    assert times == sorted(times)
    kinds = {(one.table.kind, one.table.packing) for one in found}
    assert {("table_wise", "unique"), ("table_wise", "bag"), ("row_wise", "bag"), ("replicated", "unique")} <= kinds
    others = [(one.table.kind, one.table.packing) for one in found if not one.chosen]
    assert len(set(others)) == len(others), "a kind is shown twice"


def test_explaining_says_what_a_table_is_asked_for() -> None:
    file = io.StringIO()
    planned = made_up(8)
    others = why.alternatives(planned, 2, counted(planned))
    found = why.explain(console_for(file), planned, "table_2", others, pinned=True)
    text = file.getvalue()
    assert max(map(len, text.splitlines())) <= report.WIDTH
    assert "--pin" in text
    assert "8,192 samples ask for 41 k ids (2 features, 5 a sample)" in " ".join(text.split())
    assert any(line.startswith("*") and "row_wise, blocks, unique" in line for line in text.splitlines())
    assert "…" not in text
    assert json.loads(json.dumps(found))["layouts"][0]["phase_seconds"].keys() == set(planned.estimate.phases)


def test_explaining_a_table_that_is_not_there_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no such table; did you mean 'table_\d'\?"):
        why.number_of(made_up(2).workload, "tabel_4")


def test_only_one_packing_is_weighed_where_rows_are_read_by_id() -> None:
    assert why.packings(TableConfig("t", 10, 4, pooling=None)) == ("unique",)
    assert why.packings(TableConfig("t", 10, 4, max_norm=1.0)) == ("unique",)
    assert why.packings(TableConfig("t", 10, 4)) == ("unique", "bag")


def test_a_layout_has_a_sentence() -> None:
    tables: dict[str, TablePlan] = {table.kind: table for table in made_up(8).plan.tables}
    assert words.sentence(tables["table_wise"]) == "whole on rank 7; sums of bags travel"
    assert (
        words.sentence(tables["row_wise, blocks"]) == "rows cut over 8 ranks (0-7), in even blocks of 1,250; distinct rows travel"
    )
    assert words.sentence(tables["column_wise"]).startswith("columns cut over 4 ranks (0-3), 4 strips of 32 columns")
    assert words.sentence(tables["grid"]).startswith("2 strips of 16 columns, each cut by rows, in even blocks of 2.5 M, on")
    assert words.sentence(tables["replicated"]).startswith("a copy on every rank")
    assert "row i in block i % 8" in words.sentence(tables["row_wise"])


def test_made_up_plans_hang_together() -> None:
    planned = made_up(8)
    estimate = planned.estimate
    np.testing.assert_allclose(estimate.table_seconds.sum(0), estimate.seconds.sum(1))
    np.testing.assert_allclose(estimate.memory[0], estimate.table_memory.sum(0))
