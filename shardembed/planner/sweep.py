"""The same model on more and more ranks: what a step takes, what limits it, and how many ranks are enough.

The global batch stays what it is, so that all points do the same work and their steps compare.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from shardembed.config.shown import one_line
from shardembed.errors import ConfigError, PlanError
from shardembed.planner import report, whole, words
from shardembed.planner.result import INTERRUPTED, Planned
from shardembed.tables.layout import MAX_RANKS

NEAR = 0.1
WRITE = "write ranks=8..4096 (powers of two between) or ranks=8,24,64"


@dataclass(frozen=True)
class Point:
    """A rank count and what its plan came to.

    Attributes:
        ranks: how many.
        step_seconds: of the plan.
        lower_bound_seconds: None where nothing is proved.
        gap: of the step beyond that, relative; None where nothing is proved.
        memory: bytes of the fullest rank.
        limit: bytes that it may take.
        phase: the one that takes most of the step.
        phase_share: of the step, that this one takes.
        plan_seconds: that planning took.
        stopped: why planning ended early, if it did.
        reason: why there is no plan; then all else is empty.
        dense_seconds: of a step, for the dense part and the sum of its gradients; 0 where nobody said what it is.
        epoch_hours: predicted; None where nobody said how many samples it has.
        epoch_cost: predicted; None where nobody said what an hour costs.
    """

    ranks: int
    step_seconds: float = 0.0
    lower_bound_seconds: float | None = None
    gap: float | None = None
    memory: float = 0.0
    limit: int = 0
    phase: str = ""
    phase_share: float = 0.0
    plan_seconds: float = 0.0
    stopped: str = ""
    reason: str = ""
    dense_seconds: float = 0.0
    epoch_hours: float | None = None
    epoch_cost: float | None = None

    @property
    def whole_seconds(self) -> float:
        """Of a step, with all that is known of it."""
        return self.step_seconds + self.dense_seconds

    @property
    def fits(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class Sweep:
    """The same model on more and more ranks.

    Attributes:
        workload: its name.
        topology: its name.
        batch: samples a step, the same at all points.
        points: in ascending order of ranks.
    """

    workload: str
    topology: str
    batch: int
    points: tuple[Point, ...]

    @property
    def stopped(self) -> str:
        """Why rank counts are left out, if some are."""
        return self.points[-1].stopped if self.points[-1].stopped == INTERRUPTED else ""

    @property
    def fitting(self) -> tuple[Point, ...]:
        return tuple(point for point in self.points if point.fits)

    def cost(self, point: Point) -> float:
        """Seconds of one rank that a sample takes: what it costs where ranks are paid by the hour."""
        return point.ranks * point.whole_seconds / self.batch


def parse(text: str) -> tuple[int, ...]:
    """The rank counts of `ranks=8..4096` or `ranks=8,24,64`, ascending.

    Raises:
        ConfigError: it is neither.
    """
    match = re.fullmatch(r"ranks=(?:(\d{1,9})\.\.(\d{1,9})|(\d{1,9}(?:,\d{1,9})*))", text.replace(" ", ""))
    if match is None:
        raise ConfigError(f"--sweep {text}: {WRITE}")
    first, last, listed = match.groups()
    if listed is not None:
        counts = sorted({int(count) for count in listed.split(",")})
    else:
        start, stop = int(first), int(last)
        if stop < start:
            raise ConfigError(f"--sweep {text}: {stop} ranks are fewer than {start}; {WRITE}")
        powers = itertools.takewhile(lambda count: count < stop, (1 << exponent for exponent in itertools.count()))
        counts = sorted({start, *(count for count in powers if count > start), stop})
    if counts[0] < 1 or counts[-1] > MAX_RANKS:
        raise ConfigError(f"--sweep {text}: rank counts must lie between 1 and {MAX_RANKS:,}")
    return tuple(counts)


def run(counts: Sequence[int], plan: Callable[[int], Planned], price: float | None = None) -> tuple[Point, ...]:
    """Plan for each of `counts`; where that is impossible the point says why. Ctrl-C leaves out what is still to come.
    price: of an hour of one rank.
    """
    points = []
    for ranks in counts:
        try:
            planned = plan(ranks)
            points.append(point_of(planned, price))
            if planned.stopped == INTERRUPTED:
                break
        except PlanError as error:
            points.append(Point(ranks, reason=str(error)))
    return tuple(points)


def point_of(planned: Planned, price: float | None = None) -> Point:
    estimate, known = planned.estimate, whole.of(planned, price)
    slowest = estimate.phase_seconds
    most = int(slowest.argmax())
    return Point(
        planned.plan.world_size,
        estimate.step_seconds,
        planned.lower_bound_seconds,
        planned.gap,
        float(estimate.memory_bytes.max()),
        report.limit(planned),
        estimate.phases[most],
        float(slowest[most]) / estimate.step_seconds,
        planned.plan_seconds,
        planned.stopped,
        dense_seconds=known.dense + known.reduced,
        epoch_hours=known.hours,
        epoch_cost=known.cost,
    )


@dataclass(frozen=True)
class Answers:
    """How many ranks to take.

    Attributes:
        smallest: the fewest that the tables fit on.
        fastest: the fastest step.
        cheapest: the fewest rank-seconds a sample.
        enough: the fewest ranks whose step is within `NEAR` of the fastest.
    """

    smallest: Point
    fastest: Point
    cheapest: Point
    enough: Point


def answers(sweep: Sweep) -> Answers | None:
    """None where the tables fit on none of the counts."""
    fitting = sweep.fitting
    if not fitting:
        return None
    fastest = min(fitting, key=lambda point: (point.whole_seconds, point.ranks))
    cheapest = min(fitting, key=lambda point: (sweep.cost(point), point.ranks))
    enough = next(point for point in fitting if point.whole_seconds <= (1 + NEAR) * fastest.whole_seconds)
    return Answers(fitting[0], fastest, cheapest, enough)


def sentences(sweep: Sweep) -> list[str]:
    """The answers, one line each."""
    found = answers(sweep)
    if found is None:
        return [f"The tables fit on none of these rank counts. {_first_line(sweep.points[-1].reason)}"]

    def step(point: Point) -> str:
        hours = "" if point.epoch_hours is None else f", {whole.duration(point.epoch_hours)} an epoch"
        cost = "" if point.epoch_cost is None else f" for {whole.money(point.epoch_cost)}"
        return f"{words.plural(point.ranks, 'rank')}, {words.duration(point.whole_seconds)} a step{hours}{cost}"

    smaller = [point.ranks for point in sweep.points if not point.fits and point.ranks < found.smallest.ranks]
    but = f"{max(smaller):,} are too few" if smaller else "the fewest tried"
    said = [
        f"Smallest that fits: {step(found.smallest)} ({but}).",
        f"Fastest: {step(found.fastest)}.",
        f"Cheapest: {step(found.cheapest)}, {1e9 * sweep.cost(found.cheapest):,.0f} rank-seconds a billion samples.",
    ]
    if found.enough != found.fastest:
        said.append(f"Within {words.percent(NEAR)} of the fastest: {step(found.enough)}.")
    return said


def show(console: Console, sweep: Sweep) -> None:
    """A line a rank count, then the answers."""
    batch = f"batch {sweep.batch:,} over all ranks"
    console.print(one_line(f"{sweep.workload} on {sweep.topology}, {batch}"), style="bold")
    console.print(_table(console, sweep))
    console.print(f"cost: rank-seconds a billion samples{_with_dense(sweep)}", style="dim")
    for line in epoch_lines(sweep):
        console.print(line)
    if sweep.stopped:
        console.print(f"{sweep.stopped}: larger rank counts are left out", style="dim")
    reasons: dict[str, list[int]] = {}
    for point in sweep.points:
        if not point.fits:
            reasons.setdefault(_first_line(point.reason), []).append(point.ranks)
    if reasons:
        console.print("\nwhy there is no plan", style="bold")
    for reason, ranks in reasons.items():
        console.print(f"{', '.join(f'{count:,}' for count in ranks)} ranks: {reason}")
    console.print("\nhow many ranks", style="bold")
    for sentence in sentences(sweep):
        console.print(sentence)


def _with_dense(sweep: Sweep) -> str:
    return ", the dense part included" if any(point.dense_seconds for point in sweep.fitting) else ""


def epoch_lines(sweep: Sweep) -> list[str]:
    """What an epoch takes on each rank count, where that is known; as predicted."""
    found = []
    for point in sweep.fitting:
        if point.epoch_hours is not None:
            step = f"{words.duration(point.whole_seconds)} a step" + (" with its dense part" if point.dense_seconds else "")
            cost = "" if point.epoch_cost is None else f", {whole.money(point.epoch_cost)} in all"
            found.append(f"{words.plural(point.ranks, 'rank')}: {step}, {whole.duration(point.epoch_hours)} an epoch{cost}")
    return ["", "an epoch, predicted", *found] if found else []


def _table(console: Console, sweep: Sweep) -> Table:
    table = report.grid("ranks", "step", "lower bound", "gap", "fullest rank", "cost", "<limiting phase", "<step time")
    slowest = max((point.step_seconds for point in sweep.fitting), default=1.0)
    steps = words.durations([point.step_seconds for point in sweep.points])
    bounds = words.durations([slowest, *(point.lower_bound_seconds or 0.0 for point in sweep.points)])[1:]
    for point, step, proved in zip(sweep.points, steps, bounds, strict=True):
        bound = words.NOT_PROVED if point.lower_bound_seconds is None else proved
        if not point.fits:
            table.add_row(f"{point.ranks:,}", "-", "", "", "", "", "no plan: see below", "")
            continue
        phase = f"{point.phase}, {words.percent(point.phase_share)}"
        cost = words.number(1e9 * sweep.cost(point))
        drawn = report.bar(console, point.step_seconds / slowest, 12)
        table.add_row(f"{point.ranks:,}", step, bound, words.gap(point.gap), words.size(point.memory), cost, phase, drawn)
    return table


def as_json(sweep: Sweep) -> dict[str, Any]:
    """What a script would read."""
    found = answers(sweep)
    chosen = {} if found is None else {"smallest": found.smallest, "fastest": found.fastest, "cheapest": found.cheapest}
    points = [
        {**asdict(point), "rank_seconds_per_sample": sweep.cost(point)}
        if point.fits
        else {"ranks": point.ranks, "reason": point.reason}
        for point in sweep.points
    ]
    return {
        "workload": sweep.workload,
        "topology": sweep.topology,
        "global_batch_size": sweep.batch,
        "points": points,
        "stopped": sweep.stopped,
        "answers": {name: point.ranks for name, point in chosen.items()},
    }


def _first_line(text: str) -> str:
    return text.splitlines()[0] if text else ""
