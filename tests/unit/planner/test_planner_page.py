"""The planner's page: well-formed, complete, and nothing fetched from anywhere; its pictures; and sweeps over rank counts."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from shardembed.config.console import console_for
from shardembed.errors import ConfigError, PlanError
from shardembed.planner import charts, page, report, sweep, words
from shardembed.planner.result import Planned
from tests.unit.pages import stands_alone
from tests.unit.planner.planned import GIB, made_up


def plan(ranks: int) -> Planned:
    """Faster with more ranks; too few do not fit."""
    if ranks < 8:
        raise PlanError(f"table 'table_5' & its <state> need more than {ranks} ranks have; use 8\nmore about that")
    planned = made_up(ranks, 20)
    factor = 0.4 + 8 / ranks
    estimate = replace(planned.estimate, seconds=planned.estimate.seconds * factor)
    return replace(planned, estimate=estimate, lower_bound_seconds=planned.lower_bound_seconds * factor)


def swept(text: str = "ranks=4..64") -> sweep.Sweep:
    return sweep.Sweep("made-up-model", "made-up", 65536, sweep.run(sweep.parse(text), plan))


@pytest.mark.parametrize("ranks", [1, 2, 200])
def test_a_page_is_well_formed_and_stands_alone(ranks: int) -> None:
    text = page.render(made_up(ranks, 60), swept(), "shardembed plan <file>")
    stands_alone(text)
    assert text.count("<svg") == 3
    assert len(text) < 1 << 20


def test_a_page_has_the_numbers_of_the_plan() -> None:
    planned = made_up(8, 60)
    text = page.render(planned, swept())
    for said in (
        words.duration(planned.estimate.step_seconds),
        words.duration(planned.lower_bound_seconds),
        words.size(float(planned.estimate.memory_bytes.max())),
        words.percent(planned.gap),
        planned.plan.hash,
        "Zipf 1.05",
        "RowwiseAdagrad",
        "nowhere",  # the source of a figure
        "table &#x27;table_5&#x27; &amp; its &lt;state&gt;",
        "Smallest that fits: 8 ranks",
    ):
        assert said in text, f"{said} is not on the page"
    for table in planned.plan.tables:
        assert f"<code>{table.name}</code>" in text
    assert "10 more" in text  # tables that unfold


@pytest.mark.parametrize(("ranks", "suffix"), [(1, ".png"), (33, ".pdf"), (1024, ".svg")])
def test_pictures_are_written_in_every_format(tmp_path: Path, ranks: int, suffix: str) -> None:
    path = tmp_path / f"memory{suffix}"
    charts.save(charts.memory(made_up(ranks, 4)), path)
    assert path.stat().st_size > 1000


def test_the_largest_tables_are_in_the_picture_and_the_others_summed_up() -> None:
    planned = made_up(8, 60)
    held = planned.estimate.table_memory.sum(1)
    text = charts.svg(charts.memory(planned), "x")
    ElementTree.fromstring(text)
    for index in (-held).argsort()[: charts.LARGEST]:
        assert f">{planned.plan.tables[index].name}<" in text
    assert "52 other tables" in text


def test_the_limit_is_a_line_or_said_in_words() -> None:
    assert "above the top of this picture" in charts.svg(charts.memory(made_up(4, 9)), "x")
    near = charts.svg(charts.memory(made_up(4, 9, memory=5 * GIB)), "x")
    assert "limit 1.0 GiB" in near
    assert "above the top" not in near


def test_a_picture_of_a_name_without_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must end in one of \.png"):
        charts.save(charts.scaling(swept()), tmp_path / "sweep.jpeg")
    with pytest.raises(ConfigError, match="cannot write the file"):
        charts.save(charts.scaling(swept()), tmp_path / "absent" / "sweep.png")


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("ranks=8..64", (8, 16, 32, 64)),
        ("ranks=6..48", (6, 8, 16, 32, 48)),
        ("ranks=8..8", (8,)),
        ("ranks=64, 8,24", (8, 24, 64)),
        ("ranks=1..2", (1, 2)),
    ],
)
def test_rank_counts_are_powers_of_two_or_a_list(text: str, counts: tuple[int, ...]) -> None:
    assert sweep.parse(text) == counts


@pytest.mark.parametrize("text", ["8..64", "ranks=8-64", "ranks=", "ranks=64..8", "ranks=0..8", "nodes=1..2", "ranks=1..99999999"])
def test_other_sweeps_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"--sweep {text}")):
        sweep.parse(text)


def test_a_sweep_answers_how_many_ranks() -> None:
    found = sweep.answers(swept("ranks=2..1024"))
    assert found is not None
    assert found.smallest.ranks == found.cheapest.ranks == 8
    assert found.fastest.ranks == 1024
    assert found.enough.step_seconds <= 1.1 * found.fastest.step_seconds
    assert found.enough.ranks < 1024


def test_a_sweep_on_a_terminal_shows_what_does_not_fit_and_why() -> None:
    file = io.StringIO()
    sweep.show(console_for(file), swept("ranks=2..4096"))
    text = file.getvalue()
    assert max(map(len, text.splitlines())) <= report.WIDTH
    assert "…" not in text
    assert "2, 4 ranks: table 'table_5' & its <state> need more than 2 ranks have" in text or "2 ranks: table" in text
    assert "more about that" not in text
    assert "(4 are too few)" in text


def test_a_sweep_on_which_nothing_fits_says_so() -> None:
    nothing = swept("ranks=1,2")
    assert sweep.answers(nothing) is None
    assert "fit on none" in sweep.sentences(nothing)[0]
    found = json.loads(json.dumps(sweep.as_json(nothing)))
    assert found["answers"] == {}
    assert [point["ranks"] for point in found["points"]] == [1, 2]
    ElementTree.fromstring(charts.svg(charts.scaling(nothing), "x"))


def test_a_sweep_for_scripts_has_cost_and_limiting_phase() -> None:
    found = json.loads(json.dumps(sweep.as_json(swept("ranks=8,16"))))
    assert found["answers"] == {"smallest": 8, "fastest": 16, "cheapest": 8}
    first = found["points"][0]
    assert first["phase"] == "route"
    assert first["rank_seconds_per_sample"] == pytest.approx(8 * first["step_seconds"] / 65536)
