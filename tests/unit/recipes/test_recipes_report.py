"""What a training job shows on a terminal: 80 columns are enough, whatever tables are called, and a bar is not all there is."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from shardembed.recipes import report
from shardembed.recipes.metrics import Score
from shardembed.tables.placement import Cluster, column_wise, row_wise
from shardembed.tables.plan import resolve
from shardembed.tables.table_config import TableConfig


def console(**environ: str) -> Console:
    return Console(file=io.StringIO(), width=80, force_terminal=True, _environ=environ)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_plans_of_long_names_and_many_ranks_keep_to_eighty_columns() -> None:
    names = ["features.categorical.user_history_last_ninety_days", "features.categorical.user_history_last_seven_days"]
    tables = tuple(TableConfig(name, 2_000_000_000, 128) for name in names)
    scattered = [7 * number for number in range(18)]
    plan = resolve(tables, {names[0]: row_wise(strided=True), names[1]: column_wise(ranks=scattered)}, Cluster(128, 8))
    shown = Console(file=io.StringIO(), width=80)
    held = [report.Holding(dict.fromkeys(names, 15_625_000), 16 << 30, 8 << 30)] * 128
    shown.print(report.plan_table(plan), report.holdings_table(plan, held))
    lines = printed(shown).splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)
    assert sum("2,000,000,000 x 128" in line for line in lines) == 2
    assert any("last_ninety_days"[3:] in line and "0-127" in line for line in lines)
    assert any("0,7 +16" in line for line in lines)


def test_users_that_were_not_asked_are_counted_and_metrics_of_nobody_say_so() -> None:
    shown = console(TERM="dumb")
    report.show_retrieval(shown, 5, report.LeftOut(1), Score(4, 2, 1.0), Score(4, 1, 0.5))
    some = printed(shown)
    assert "left out: 1 held-out item that the user had met before (eval.repeats: true asks for them" in some
    assert "warning" not in some
    report.show_retrieval(shown, 5, report.LeftOut(1_234, 1), Score(), Score())
    nobody = printed(shown).removeprefix(some)
    assert "left out: 1,234 held-out items" in nobody
    assert "left out: 1 user with nothing in training" in nobody
    assert "warning: no user was left to ask, so the metrics say nothing" in nobody


@pytest.mark.parametrize(
    ("environ", "bar"), [({"TERM": "xterm"}, True), ({"TERM": "xterm", "NO_COLOR": "1"}, True), ({"TERM": "dumb"}, False)]
)
def test_progress_is_a_bar_or_lines_and_never_nothing(environ: dict[str, str], bar: bool) -> None:
    shown = console(**environ)
    with report.ProgressReport(shown, 4) as progress:
        progress.update(2, 0.5, 1000.0)
        progress.note("step 2: auc 0.7")
        progress.update(4, 0.25, 1000.0)
    text = printed(shown)
    assert "4/4  loss 0.250  1,000 samples/s" in text
    assert "step 2: auc 0.7" in text
    assert ("━" in text) is bar
    assert ("\x1b[3" in text) is (bar and "NO_COLOR" not in environ)


def test_of_hundreds_of_tables_the_first_are_listed() -> None:
    plan = resolve(tuple(TableConfig(f"t{number}", 10 + number, 4) for number in range(700)), "auto", Cluster(1, 1))
    shown = Console(file=io.StringIO(), width=80)
    shown.print(report.plan_table(plan))
    lines = printed(shown).splitlines()
    assert len(lines) == 2 + report.MAX_PLAN + 1
    assert lines[-1].rstrip() == "and 660 more"


def test_tables_beside_each_other_that_are_alike_have_one_line() -> None:
    rows = [10, 10, 10, 20, 10, 30, 30]
    tables = tuple(TableConfig(f"a_table_{number}", count, 4) for number, count in enumerate(rows))
    shown = Console(file=io.StringIO(), width=80)
    shown.print(report.plan_table(resolve(tables, "auto", Cluster(1, 1))))
    lines = [line.split("  ")[0] for line in printed(shown).splitlines()[2:]]
    assert lines == ["...ble_0 to ...ble_2 (3)", "a_table_3", "a_table_4", "...ble_5, ...ble_6"]
