"""The section of a run's page on dynamic tables: which ids have rows, and what becomes of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shardembed.planner import html
from shardembed.recipes.curves import Line, figure
from shardembed.recipes.recorded import Recorded
from shardembed.recipes.run_sections import folded
from shardembed.recipes.series import COUNTED, THERE, Point, Series

DRAWN = 4  # tables with figures of their own; of more, they are added up
HAPPENED = tuple(name for name in COUNTED if name not in THERE)
ABOUT = html.Markup(
    "<p>Of tables whose ids come and go, all ranks together. <em>Live</em>: have a row. <em>Candidates</em>: are counted until "
    "they are admitted. <em>Created</em>: got a row in a step. <em>Evicted</em>: lost it to others. <em>Expired</em>: lost it with "
    "age. <em>Refused</em>: found no room. <em>Waiting</em>: came and were not admitted yet. <em>Unknown</em>: were read by "
    "evaluations and had no row. Refused and waiting ids count once for each step. The figures show means over the steps between "
    "two looks; what never happened is left out.</p>"
)


def dynamic(run: Recorded) -> html.Markup:
    """Nothing where no table is one."""
    tables = {name: lines for name, lines in run.curves.ids.items() if any(one.points for one in lines.values())}
    if not tables:
        return html.NOTHING
    drawn = tables if len(tables) <= DRAWN else {"all tables": _added(list(tables.values()))}
    figures = [part for name, lines in drawn.items() for part in _figures(name, lines)]
    rows = [[html.code(name), *(f"{run.curves.totals[name].get(each, 0):,}" for each in COUNTED)] for name in tables]
    table = folded(["table", *COUNTED], rows, "l" + "n" * len(COUNTED))
    return html.section("Ids that come and go", ABOUT, html.filled('<div class="charts">{}</div>', html.joined(figures)), table)


def _figures(name: str, lines: Mapping[str, Series]) -> list[html.Markup]:
    there = [Line(each, lines[each].points) for each in THERE if _shows(lines, each)]
    happened = [Line(each, lines[each].points) for each in HAPPENED if _shows(lines, each)]
    said = ((f"{name}: ids that are there", there), (f"{name}: ids a step", happened))
    return [figure(text, shown) for text, shown in said if shown]


def _shows(lines: Mapping[str, Series], name: str) -> bool:
    return name in lines and any(point.high for point in lines[name].points)


def _added(tables: Sequence[Mapping[str, Series]]) -> dict[str, Series]:
    """Of all tables together, which have lines at the same steps."""
    added = {}
    for name in COUNTED:
        sums: dict[int, float] = {}
        for lines in tables:
            for point in lines[name].points if name in lines else ():
                sums[point.step] = sums.get(point.step, 0.0) + point.mean
        added[name] = Series([Point(step, 1, value, value, value) for step, value in sorted(sums.items())])
    return added
