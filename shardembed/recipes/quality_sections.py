"""The first section of a run's page: how good the model is, beside what costs nothing, and whether to believe it."""

from __future__ import annotations

from collections.abc import Mapping

from shardembed.planner import html, words
from shardembed.recipes import reliability, standing, verdict
from shardembed.recipes.curves import Line, drawn, figure
from shardembed.recipes.recorded import Recorded
from shardembed.recipes.run_sections import folded
from shardembed.recipes.series import Point
from shardembed.recipes.standing import Beside

LOSS_STEPS = 20  # at the end, of which the mean is shown
TIMES = ("recall@", "ndcg@", "hit", "precision@", "mrr")  # metrics of which a multiple says something
COUNTS = ("evaluated_", "_left_out")  # how names of counts begin, or end
ONLY_LAST = "It was evaluated once, at the end. With eval.every_steps this page shows how it came to that."


def quality(run: Recorded) -> html.Markup:
    """Cards, what they mean, and the curves that tell it: of the headline metric, of predictions, and of the loss."""
    name, history = standing.headline(run.results), run.history
    parts = [html.cards(_cards(run, name))]
    parts += [html.note(one.kind, one.title, one.said) for one in verdict.judged(run)]
    if name is not None and len(history.get(name, ())) == 1 and run.summary is not None:
        parts.append(html.filled('<p class="dim">{}</p>', ONLY_LAST))
    figures = [_metric(run, name)] if name is not None and len(history.get(name, ())) > 1 else []
    bins = reliability.bins_of(run.summary or {})
    figures += [drawn(reliability.NAME, reliability.chart(bins, reliability.NAME))] if bins else []
    figures += _loss(run)
    parts.append(html.filled('<div class="charts">{}</div>', html.joined(figures)))
    said = [*_about(run), *([_calibrated(bins)] if bins else [])]
    return html.section("How good the model is", *parts, *said)


def _cards(run: Recorded, name: str | None) -> list[tuple[str, str, str]]:
    shown = []
    if name is not None:
        value = run.results[name]
        at = "at the end" if run.summary is not None else "at the last evaluation"
        at = at if run.kept is None else f"the weights of step {run.kept:,}"
        shown.append((name, f"{value:.4f}", f"{at}; {_direction(name)}"))
        shown += [(one.who, f"{one.value:.4f}", _against(name, value, one)) for one in standing.beside(run.results)[name][:4]]
    loss = run.curves.loss
    if loss.lost:
        shown.append(("training loss", "inf or nan", f"at the last step, {run.curves.steps:,}"))
    elif loss.points:
        last = loss.tail(LOSS_STEPS)
        shown.append(("training loss", f"{last.mean:.4f}", f"mean of {words.plural(last.count, 'step')} up to {last.step:,}"))
    return shown


def _direction(name: str) -> str:
    return "1 is right" if name in standing.AIMS else "lower is better" if name in standing.LOWER else "higher is better"


def _against(name: str, value: float, one: Beside) -> str:
    kind = "baseline" if one.baseline else "the most to expect"
    if name.startswith(TIMES) and one.value > 0:
        return f"{kind}; the model has {_short(value / one.value)} times as much"
    return f"{kind}; the model has {value - one.value:+.4f}"


def _short(ratio: float) -> str:
    return f"{ratio:,.2f}" if ratio < 1.995 else f"{ratio:,.1f}" if ratio < 99.95 else f"{ratio:,.0f}"


def _metric(run: Recorded, name: str) -> html.Markup:
    return figure(f"{name} in validation, {_direction(name)}", lines_of(run, name), epochs(run))


def epochs(run: Recorded) -> dict[int, int]:
    """Which epoch begins after which step."""
    first = run.curves.epoch - len(run.curves.begun) + 1
    return {step - 1: epoch for epoch, step in enumerate(run.curves.begun, first)}


def lines_of(run: Recorded, name: str) -> list[Line]:
    """The evaluations of a metric, and what stands beside it, over the same steps."""
    points = run.history[name]
    lines = []
    # What follows from the metric is far away, and would flatten the curve.
    for one in (each for each in standing.beside(run.results).get(name, ()) if each.key):
        own = run.history.get(one.key, [])
        flat, value = len({point.mean for point in own}) < 2, own[0].mean if own else one.value  # which may be of other rows
        ends = [Point(step, 1, value, value, value) for step in dict.fromkeys((points[0].step, points[-1].step))]
        lines.append(Line(one.key.removesuffix(f"_{name}"), ends if flat else own))
    return [Line(name if lines else "", points), *lines]


def _loss(run: Recorded) -> list[html.Markup]:
    points = run.curves.loss.points
    if not points:
        return []
    each = max(point.count for point in points)
    lines = [Line("", points, band=each > 1, faint=True), Line("", standing.smoothed(points))]
    return [figure("training loss", lines, epochs(run))]


def _about(run: Recorded) -> list[str]:
    curves, points = run.curves, run.curves.loss.points
    if not points:
        return ["No step has been logged yet."]
    each, reach = max(point.count for point in points), len(points) // standing.SMOOTH
    about = "The loss is that of the global batch, the mean over all ranks: pale of every step"
    about += f" (mean, smallest and largest of {each} steps each)" if each > 1 else ""
    about += f", dark the mean of the {words.plural((2 * reach + 1) * each, 'step')} around it."
    about += " Dotted lines are where an epoch begins." if curves.begun else ""
    if curves.loss.strange:
        strange = curves.loss.strange
        about += f" {strange:,} {'losses that were' if strange > 1 else 'loss that was'} not finite: left out."
    if curves.skipped:
        about += f" {words.plural(curves.skipped, 'step')} were skipped, because their loss or a gradient was inf or nan."
    return [about]


def _calibrated(bins: list[reliability.Bin]) -> str:
    wrong, rows = reliability.off(bins), sum(each.rows for each in bins)
    return (
        f"Calibration: {rows:,} rows in {words.plural(len(bins), 'bin')}, by what was predicted of them. A point on the line: as "
        f"many clicks as predicted; below it fewer. A bar is where 95 of 100 such shares would lie; in {wrong:,} of {len(bins):,} "
        "bins the line is outside of it."
    )


def results(run: Recorded) -> html.Markup:
    """All numbers, what stands beside each, and the curves of those that are not the headline."""
    if not run.results:
        return html.NOTHING
    here = standing.beside(run.results)
    who = list(dict.fromkeys(one.who for found in here.values() for one in found))[:6]
    rows = [[html.code(name), f"{run.results[name]:.4f}", *_row(found, who)] for name, found in here.items()]
    given = [name for name in run.results if name in standing.GIVEN]
    rows += [[html.code(name), f"{run.results[name]:.4f}", *["-" for _ in who]] for name in given]
    counts = {name: value for name, value in (run.summary or {}).items() if name.startswith(COUNTS[0]) or name.endswith(COUNTS[1])}
    rows += [[name.replace("_", " "), _count(value), *["-" for _ in who]] for name, value in counts.items()]
    title = "Result" if run.summary is not None else "Result so far"
    table = folded(["metric", "model", *who], rows, "ln" + "n" * len(who))
    headline = standing.headline(run.results)
    others = [_metric(run, name) for name in here if name != headline and len(run.history.get(name, ())) > 1]
    charts = html.filled('<div class="charts">{}</div>', html.joined(others)) if others else html.NOTHING
    return html.section(title, table, charts)


def _row(found: list[Beside], who: list[str]) -> list[str]:
    values: Mapping[str, float] = {one.who: one.value for one in found}
    return [f"{values[each]:.4f}" if each in values else "-" for each in who]


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value!s:.80}"
