"""A run as one HTML page that stands alone, made of the files in its folder, whether it is finished or not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from shardembed.planner import html, words
from shardembed.recipes import id_sections, run_sections, since_section
from shardembed.recipes.curves import Line, figure
from shardembed.recipes.recorded import Recorded
from shardembed.recipes.run_folder import PAGE, publish
from shardembed.recipes.series import Point

BASELINES = ("popularity_", "generator_")  # a metric of that name is drawn beside the one without
LOSS_STEPS = 20  # at the end, of which the mean is shown
NO_LOOK = html.Markup(
    '<p class="dim">Not recorded: the run has neither come to a checkpoint nor to its end, or <code>log.page</code> is false.</p>'
)


def write(run: Recorded) -> Path:
    """Make the page of a run, in place of the one that its folder has.

    Raises:
        OSError: it cannot be written.
    """
    path = run.path / PAGE
    publish(path, render(run), f"{os.getpid()}.new")  # an inspection and the run may write at once
    return path


def render(run: Recorded) -> str:
    start, look = run.start, run.look
    ranks = f" on {words.plural(start['ranks'], 'rank')}" if start else ""
    about = f"{start['model']}{ranks}; {run.state}" if start else run.state
    parts = [html.filled("<h1>{}</h1>", run.name), html.filled('<p class="dim">{}</p>', about)]
    if run.unread:
        parts.append(html.section("Not read", *run.unread))
    parts += [_cards(run), _curves(run), _results(run), id_sections.dynamic(run)]
    parts += [since_section.since(run)]
    parts += [run_sections.plan(run)] if run.plan is not None else []
    if look is not None:
        parts += [run_sections.stages(look["profile"], look["step"])]
    parts += [run_sections.ranks(run)]
    if look is not None:
        parts += [run_sections.memory(look["memory"]), run_sections.ids(run)]
    else:
        parts += [html.section("Time, memory and ids", NO_LOOK)]
    return html.document(run.name, [*parts, run_sections.environment(run)])


def _cards(run: Recorded) -> html.Markup:
    shown = []
    best = next(iter(run.results.items()), None)
    if best is not None:
        shown.append((best[0], f"{best[1]:.4f}", "at the end" if run.summary else "at the last evaluation"))
    if run.curves.loss.lost:
        shown.append(("training loss", "inf or nan", f"at the last step, {run.curves.steps:,}"))
    elif run.curves.loss.points:
        last = run.curves.loss.tail(LOSS_STEPS)
        shown.append(("training loss", f"{last.mean:.4f}", f"mean of {words.plural(last.count, 'step')} up to {last.step:,}"))
    if run.summary is not None and "samples_per_second" in run.summary:
        rate = run.summary["samples_per_second"]
        shown.append(("samples a second", words.number(rate), "in training, restarts included"))
    if run.look is not None:
        profile = run.look["profile"]
        sent = [rank["bytes"] for rank in profile["ranks"]]
        steps = f"mean of {words.plural(profile['steps'], 'step')} up to {run.look['step']:,}"
        shown.append(("a step", words.duration(profile["seconds"]), steps))
        if len(sent) > 1:
            shown.append(
                ("sent a step", words.size(sum(sent)), f"by all ranks for the tables; most by one {words.size(max(sent))}")
            )
    held = [one["weights"] + one["state"] for one in run.start.get("held", ())]
    if held:
        shown.append(("tables of the fullest rank", words.size(max(held)), "weights and optimizer state"))
    return html.cards(shown)


def _curves(run: Recorded) -> html.Markup:
    loss = run.curves.loss
    if not loss.points:
        return html.section("Curves", html.Markup('<p class="dim">No step has been logged yet.</p>'))
    each = max(point.count for point in loss.points)
    about = "The loss is that of the global batch, the mean over all ranks."
    if each > 1:
        about += f" A point is the mean of {each} steps; the band goes from the smallest loss to the largest."
    if loss.strange:
        about += f" {loss.strange:,} {'losses that were' if loss.strange > 1 else 'loss that was'} not finite: left out."
    if run.curves.skipped:
        about += f" {words.plural(run.curves.skipped, 'step')} were skipped, because their loss or a gradient was inf or nan."
    drawn = [figure("training loss", [Line("", loss.points, band=each > 1)])]
    drawn += [figure(name, lines) for name, lines in _metrics(run).items()]
    if len(drawn) > 1:
        about += " Metrics are of the evaluations during training and at the end."
    return html.section("Curves", about, html.filled('<div class="charts">{}</div>', html.joined(drawn)))


def _metrics(run: Recorded) -> dict[str, list[Line]]:
    """The lines of each metric that changes, its baseline's beside it."""
    points = {name: list(found.points) for name, found in run.curves.metrics.items() if found.points}
    for name, found in points.items():
        if run.summary is not None and name in run.results and found[-1].step < run.summary["steps"]:
            value = run.results[name]
            found.append(Point(run.summary["steps"], 1, value, value, value))
    drawn = {}
    for name, found in points.items():
        if name.startswith(BASELINES) or (len(found) > 1 and len({point.mean for point in found}) == 1):
            continue  # a baseline, or what describes the data
        beside = [other for other in points if _prefix(other) + name == other != name]
        lines = [Line(_prefix(other).rstrip("_"), points[other]) for other in beside]
        drawn[name] = [Line(name if beside else "", found), *lines]
    return drawn


def _prefix(name: str) -> str:
    return next((prefix for prefix in BASELINES if name.startswith(prefix)), "")


def _results(run: Recorded) -> html.Markup:
    if not run.results:
        return html.NOTHING
    rows = [[html.code(name), f"{value:.4f}"] for name, value in run.results.items()]
    counts = {name: value for name, value in (run.summary or {}).items() if name.startswith("evaluated_")}
    rows += [[name.replace("_", " "), _count(value)] for name, value in counts.items()]
    title = "Result" if run.summary is not None else "Result so far"
    return html.section(title, html.table(["metric", ""], rows, "ln"))


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value!s:.80}"
