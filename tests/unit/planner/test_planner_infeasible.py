"""Why nothing fits, as a new user would meet it: the proof names what binds, and what is said to make room does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest

import shardembed as se
from shardembed import planner
from shardembed.errors import PlanError
from shardembed.planner import Constraints, Topology, Workload, topology
from shardembed.planner.cost_model import CostModel
from shardembed.planner.highs import BRIEF, TRIAL
from shardembed.planner.needs import needed, whole
from shardembed.planner.remedies import gib, rounded_up
from shardembed.planner.space import Space
from shardembed.planner.topology import GIB
from shardembed.planner.workload import workload_of
from shardembed.tables.placement import Cluster
from shardembed.tables.plan import TablePlan

FOUR = topology.load("cpu", ranks=4)  # 8 GiB each, and 2 more in reserve


def tables(*millions: float, optimizer: se.optim.TableOptimizer | None = None) -> Workload:
    """Rows of 64 float32: 0.238 GiB of weights a million."""
    configs = [se.TableConfig(f"t{number}", int(rows * 1e6), 64) for number, rows in enumerate(millions)]
    return workload_of(configs, 5.0, 512, optimizer=optimizer or se.optim.RowwiseAdagrad())


def refused(workload: Workload, here: Topology, constraints: Constraints | None = None) -> str:
    with pytest.raises(PlanError) as caught:
        planner.plan(workload, here, constraints, effort=BRIEF)
    message = str(caught.value)
    assert len(message.splitlines()) <= 13
    return message


def changes(message: str) -> Iterator[str]:
    return (line.removeprefix("  - ") for line in message.splitlines() if line.startswith("  - "))


def test_too_little_memory_is_shown_by_the_sum_of_all_tables() -> None:
    workload = tables(20, 50, 3, 0.1, optimizer=se.optim.Adagrad())
    message = refused(workload, FOUR)
    assert "no plan fits into memory: 4 rank(s) with 8.00 GiB each (10.00 GiB less 2.00 GiB in reserve)." in message
    assert "All tables together need 34.86 GiB" in message
    assert "the ranks have 32.00 GiB together" in message
    assert "17.43 GiB of weights, 17.43 GiB of optimizer state" in message
    assert "'t1' 23.84 GiB, 't0' 9.54 GiB, 't2' 1.43 GiB and 1 more" in message
    found = list(changes(message))
    assert found[0] == "5 ranks instead of 4"
    assert found[1].startswith("10.72 GiB of memory a rank instead of 10.00 GiB")
    assert found[2:4] == ["optimizer rowwise_adagrad instead of adagrad", "dtype bfloat16 instead of float32"]
    assert re.fullmatch(r"4\d,\d{3},000 rows of table 't1' instead of 50,000,000", found[4])
    assert re.fullmatch(r"9\d\.\d% of every table's rows", found[5])


def test_what_is_said_to_make_room_does_and_a_little_less_does_not() -> None:
    workload = tables(20, 50, 3, 0.1, optimizer=se.optim.Adagrad())
    message = refused(workload, FOUR)
    ranks, memory = int(number_in(r"(\d+) ranks instead", message)), float(number_in(r"([\d.]+) GiB of memory a rank", message))
    rows, share = int(number_in(r"([\d,]+) rows of", message).replace(",", "")), float(number_in(r"([\d.]+)% of every", message))
    planner.plan(workload, FOUR.scaled(ranks), effort=TRIAL)
    planner.plan(workload, replace(FOUR, memory=int(memory * GIB)), effort=TRIAL)
    planner.plan(tables(20, rows / 1e6, 3, 0.1, optimizer=se.optim.Adagrad()), FOUR, effort=TRIAL)
    scale = share / 100
    planner.plan(tables(20 * scale, 50 * scale, 3 * scale, 0.1 * scale, optimizer=se.optim.Adagrad()), FOUR, effort=TRIAL)
    planner.plan(tables(20, 50, 3, 0.1), FOUR, effort=TRIAL)
    assert "All tables together" in refused(workload, replace(FOUR, memory=int((memory - 0.02) * GIB)))


def number_in(pattern: str, message: str) -> str:
    match = re.search(pattern, message)
    assert match is not None, message
    return match[1]


def test_one_table_larger_than_the_cluster_is_named() -> None:
    message = refused(tables(2000, 1), FOUR)
    assert "Table 't0' alone does not: 2,000,000,000 x 64, 476.84 GiB of weights and 7.45 GiB of state." in message
    assert re.search(
        r"row_wise (in 4 part\(s\), packing bag|over all ranks) needs the least, and that is 121\.\d\d GiB on some rank\.", message
    )
    assert re.search(r"6\d ranks instead of 4", message)


def test_pins_that_do_not_fit_are_shown_rank_by_rank() -> None:
    pins = Constraints.parse(["t0=table_wise:1", "t1=row_wise@1,2", "t2=table_wise:1"])
    message = refused(tables(20, 20, 10, 1), FOUR, pins)
    assert re.search(
        r"Rank 1 needs 9\.\d\d GiB at least, for what is pinned there: 't0' 4\.84 GiB, 't2' 2\.42 GiB, 't1' 2\.42 GiB\.", message
    )
    assert "without the pin of any one of 't0' (table_wise@1), 't1' (row_wise@1,2), 't2' (table_wise@1)" in message
    assert "ranks instead" not in message  # more of them do not help


def test_a_table_pinned_where_it_has_no_room_is_named_with_its_pin() -> None:
    message = refused(tables(40, 1), FOUR, Constraints({"t0": "table_wise"}))
    assert re.search(
        r"table_wise in 1 part\(s\), packing (unique|bag) needs the least, and that is 9\.69 GiB on some rank \(it is pinned",
        message,
    )
    assert "  - without the pin of table 't0' (table_wise)" in message
    layout = se.table_wise(2).layout(40_000_000, 64, Cluster(4, 4))
    message = refused(tables(40, 1), FOUR, Constraints({"t0": TablePlan("t0", layout)}))
    assert "the table_wise layout that is given needs the least, and that is 9.69 GiB" in message


def test_tables_that_must_stay_whole_are_counted() -> None:
    forbid = Constraints(forbid=["row_wise", "column_wise", "grid", "table_row_wise"])
    message = refused(tables(*[18.0] * 5), FOUR, forbid)
    assert "5 tables have a part of more than 1/2 of a rank in every layout they may have" in message
    assert "so that each of 4 rank(s) holds 1 of them at most" in message
    assert "  - without forbidding row_wise or column_wise" in message
    assert "  - 5 ranks instead of 4" in message


def test_constraints_that_only_together_leave_no_room_go_together() -> None:
    pins = Constraints({f"t{number}": "table_wise:0" for number in range(4)})
    message = refused(tables(*[18.0] * 4), FOUR, pins)
    assert "without pins and forbidden kinds at all (none of them alone is to blame)" in message


def test_what_no_layout_of_the_space_keeps_to_is_refused_before_any_search() -> None:
    two = FOUR.scaled(2)
    with pytest.raises(PlanError, match=r"table 't0': no layout in the planner's space on 2 rank\(s\)"):
        planner.plan(tables(1), two, Constraints({"t0": "grid"}))
    with pytest.raises(PlanError, match="table 't0' is pinned to rank 3, but there are 2 ranks"):
        planner.plan(tables(1), two, Constraints({"t0": "table_wise:3"}))
    with pytest.raises(PlanError, match="table 't9' is constrained, but not there"):
        planner.plan(tables(1), two, Constraints({"t9": "row_wise"}))


@pytest.mark.parametrize("wish", ["row_wise@0,1,2", "cuts:3", "column_wise:3", "row_wise@3,0"])
def test_any_number_of_parts_that_a_user_pins_is_in_the_space(wish: str) -> None:
    found = planner.plan(tables(1), FOUR, Constraints({"t0": wish}), effort=TRIAL)
    shards = found.plan.tables[0].layout.shards
    assert len(shards) == (2 if wish == "row_wise@3,0" else 3)
    if "@" in wish:
        assert [shard.ranks[0] for shard in shards] == [int(rank) for rank in wish.partition("@")[2].split(",")]


def test_where_parts_are_too_large_to_be_level_more_memory_is_named_that_will_do() -> None:
    workload = tables(*[18.0] * 5)
    forbid = Constraints(forbid=["row_wise", "grid", "table_row_wise", "replicated"])  # strips of whole columns are left
    space = Space(CostModel(workload, FOUR), forbid)
    least = needed(whole(space, space.problem()))
    message = refused(workload, replace(FOUR, memory=int(1.0001 * least) + FOUR.reserve), forbid)
    assert "Every table fits by itself, and all together need" in message
    memory = float(number_in(r"([\d.]+) GiB of memory a rank", message))
    planner.plan(workload, replace(FOUR, memory=int(memory * GIB)), forbid, effort=TRIAL)


def test_memory_is_shown_with_digits_enough_and_rounded_up() -> None:
    for size in (1.0, 12345.6, 0.02 * GIB, 5.001 * GIB, 1234.5678 * GIB):
        shown, unit = gib(rounded_up(size)).replace(",", "").split()
        assert size <= float(shown) * {"GiB": GIB, "MiB": 2**20}[unit] <= size * 1.01 + 110


def test_what_communicators_take_is_said() -> None:
    message = refused(tables(*[30.0] * 5), replace(FOUR, device="cuda"))
    assert "(10.00 GiB less 2.00 GiB in reserve and 1.75 GiB of communicators)" in message
