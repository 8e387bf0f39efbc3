"""The planner's pictures, as matplotlib figures that `svg` turns into a piece of a page and `save` into a file.

A picture of a thousand ranks has as many columns as one of a hundred: neighbours share a column, which shows the worst of them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shardembed.config.optional import needed
from shardembed.config.shown import drawable
from shardembed.errors import ConfigError
from shardembed.planner import report, words
from shardembed.planner.html import Markup
from shardembed.planner.result import Array, Planned
from shardembed.planner.sweep import Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS, FEWEST = 128, 8
LARGEST = 8  # tables with a colour of their own
# Paul Tol's "muted" scheme: told apart with every kind of colour vision.
COLOURS = ("#332288", "#88ccee", "#44aa99", "#117733", "#999933", "#ddcc77", "#cc6677", "#882255", "#aa4499")
GREY, PALE, INK = "#8c8c8c", "#d0d0d0", "#222222"
FORMATS = (".png", ".svg", ".pdf")
SETTINGS: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "svg.fonttype": "none",  # text stays text: it can be searched, and the page's font is used
    "svg.hashsalt": "shardembed",  # the same picture, the same file
}


def memory(planned: Planned) -> Figure:
    """Memory of each rank, stacked by table, below the line of what tables may fill."""
    estimate, most = planned.estimate, report.limit(planned)
    unit, name = _unit(max(float(estimate.memory_bytes.max()), 1.0))
    shown, label = _columns(estimate.memory_bytes)
    held = estimate.table_memory[:, shown] / unit
    order = np.argsort(-estimate.table_memory.sum(1), kind="stable")
    parts = [(drawable(words.shorten(planned.plan.tables[index].name, 24)), held[index]) for index in order[:LARGEST]]
    if len(order) > LARGEST:
        parts.append((f"{len(order) - LARGEST:,} other tables", held[order[LARGEST:]].sum(0)))
    rest = np.maximum(0.0, estimate.memory_bytes[shown] / unit - held.sum(0))
    figure, axes = _figure(3.4)
    colours = [*COLOURS[: min(LARGEST, len(order))], *([GREY] if len(order) > LARGEST else []), PALE]
    _stack(axes, [*parts, ("buffers and waiting gradients", rest)], colours)
    _limit(axes, most / unit, float(estimate.memory_bytes.max()) / unit, f"limit {words.size(most)}")
    axes.set_ylabel(name)
    _ticks(axes, planned.plan.world_size)
    axes.set_xlabel(label.format("fullest"))
    _legend(axes)
    return figure


def time(planned: Planned) -> Figure:
    """Seconds of each rank, stacked by phase, and the step: the sum of each phase's slowest rank."""
    estimate = planned.estimate
    unit, name = _seconds(estimate.step_seconds)
    shown, label = _columns(estimate.seconds.sum(0))
    figure, axes = _figure(3.4)
    parts = [(drawable(phase), estimate.seconds[index, shown] / unit) for index, phase in enumerate(estimate.phases)]
    _stack(axes, parts, COLOURS)
    _limit(axes, estimate.step_seconds / unit, estimate.step_seconds / unit, f"step {words.duration(estimate.step_seconds)}")
    axes.set_ylabel(name)
    _ticks(axes, planned.plan.world_size)
    axes.set_xlabel(label.format("slowest"))
    _legend(axes)
    return figure


def scaling(sweep: Sweep, here: int | None = None) -> Figure:
    """Step time and its bound, memory of the fullest rank, and rank-seconds, over the number of ranks; `here` marks one."""
    figure, (left, middle, right) = _figure(3.0, 3)
    points = sweep.fitting
    ranks = [point.ranks for point in points]
    unit, name = _seconds(max((point.step_seconds for point in points), default=1.0))
    left.plot(ranks, [point.step_seconds / unit for point in points], "o-", color=COLOURS[0], label="plan", markersize=4)
    proved = [np.nan if point.lower_bound_seconds is None else point.lower_bound_seconds / unit for point in points]
    left.plot(ranks, proved, "--", color=COLOURS[6], label="lower bound")
    left.set_title(f"step time ({name})", loc="left", fontsize=10)
    left.legend(frameon=False, fontsize=8.5)
    size, title = _unit(max((point.memory for point in points), default=1.0))
    middle.plot(ranks, [point.memory / size for point in points], "o-", color=COLOURS[3], markersize=4)
    if points and points[0].limit < 2.5 * max(point.memory for point in points):
        middle.plot(ranks, [point.limit / size for point in points], ":", color=COLOURS[6], label="limit")
        middle.legend(frameon=False, fontsize=8.5)
    middle.set_title(f"fullest rank ({title})", loc="left", fontsize=10)
    right.plot(ranks, [1e9 * sweep.cost(point) for point in points], "o-", color=COLOURS[7], markersize=4)
    right.set_title("rank-seconds / G samples", loc="left", fontsize=10)
    tried = [point.ranks for point in sweep.points]
    for axes in (left, middle, right):
        _rank_axis(axes, tried)
        _height(axes)
        for point in sweep.points:
            if not point.fits:
                where = {"transform": axes.get_xaxis_transform(), "rotation": 90, "ha": "center"}
                axes.text(point.ranks, 0.02, "no plan", fontsize=8, color=GREY, **where)
        if here is not None:
            axes.axvline(here, color=PALE, linewidth=5, zorder=0)
    return figure


def _height(axes: Axes) -> None:
    """From zero where that shows everything; in powers where the largest would flatten the others."""
    values = [float(value) for line in axes.lines for value in np.asarray(line.get_ydata(), np.float64)]
    if values and min(values) > 0 and max(values) > 8 * min(values):
        axes.set_yscale("log", base=2 if max(values) < 100 * min(values) else 10)
        axes.set_ylim(min(values) / 1.3, max(values) * 1.3)
        axes.set_title(f"{axes.get_title('left')}, log scale", loc="left", fontsize=10)
    else:
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    axes.yaxis.set_major_formatter(lambda value, _: words.number(value) if value >= 100 else f"{value:g}")


def _rank_axis(axes: Axes, tried: Sequence[int]) -> None:
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    axes.set_xlim(tried[0] / 1.25, tried[-1] * 1.25)
    step = -(-len(tried) // 6)
    axes.set_xticks(tried[::step], [f"{count:,}" for count in tried[::step]])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("ranks")
    axes.grid(axis="y", color="#eeeeee")
    axes.set_axisbelow(True)


def _figure(height: float, columns: int = 1) -> tuple[Figure, Any]:
    with needed("matplotlib", "train", "drawing plots"):
        import matplotlib as mpl
        from matplotlib.figure import Figure
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(9.6, height), layout="constrained")
        axes = figure.subplots(1, columns)
    return figure, axes


def _columns(worth: Array) -> tuple[list[int], str]:
    """Ranks to show, and the label of their axis with a place for what makes a rank the worst of its column."""
    ranks = len(worth)
    if ranks <= COLUMNS:
        return list(range(ranks)), "rank"
    size = _neighbours(ranks)
    shown = [first + int(worth[first : first + size].argmax()) for first in range(0, ranks, size)]
    return shown, f"rank (a column is the {{}} of {size} neighbours)"


def _stack(axes: Axes, parts: Sequence[tuple[str, Array]], colours: Sequence[str]) -> None:
    bottom = np.zeros(len(parts[0][1]))
    places = np.arange(len(bottom))
    for (label, heights), colour in zip(parts, colours, strict=False):
        if len(bottom) > 32:  # one shape instead of a rectangle a rank
            edges = np.append(places, len(bottom))
            upper, lower = (np.append(line, line[-1]) for line in (bottom + heights, bottom))
            axes.fill_between(edges, lower, upper, step="post", color=colour, label=label, linewidth=0)
        else:
            axes.bar(places + 0.5, heights, bottom=bottom, width=0.8, color=colour, label=label)
        bottom = bottom + heights
    spare = max(0, FEWEST - len(bottom)) / 2  # two ranks are two columns, not two walls
    axes.set_xlim(-spare, len(bottom) + spare)
    axes.grid(axis="y", color="#eeeeee")
    axes.set_axisbelow(True)


def _ticks(axes: Axes, ranks: int) -> None:
    """Number columns by the first rank that they stand for."""
    size = _neighbours(ranks)
    columns = -(-ranks // size)
    step = max(1, -(-columns // 16))
    axes.set_xticks(np.arange(0, columns, step) + 0.5, [f"{place * size:,}" for place in range(0, columns, step)])


def _neighbours(ranks: int) -> int:
    """How many share a column."""
    return -(-ranks // COLUMNS)


def _limit(axes: Axes, limit: float, highest: float, text: str) -> None:
    """A line at `limit`; in words only, where it would squash everything else."""
    if highest < 0.15 * limit:
        axes.set_ylim(0, 1.18 * highest)
        said = f"{text}, above the top of this picture"
        axes.text(0.995, 0.97, said, transform=axes.transAxes, ha="right", va="top", color=INK)
        return
    axes.axhline(limit, color=INK, linestyle="--", linewidth=1.2)
    axes.set_ylim(0, 1.15 * max(limit, highest))
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.85}
    place = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
    axes.annotate(text, (0.995, limit), (0, 5), ha="right", color=INK, bbox=box, **place)


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    # The order of the stack, from its top down.
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.005, 0.5), frameon=False, fontsize=8.5)


def _unit(highest: float) -> tuple[float, str]:
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if highest >= unit:
            return float(unit), name
    return 1.0, "bytes"


def _seconds(highest: float) -> tuple[float, str]:
    for unit, name in ((1.0, "seconds"), (1e-3, "milliseconds")):
        if highest >= unit:
            return unit, name
    return 1e-6, "microseconds"


def svg(figure: Figure, name: str) -> Markup:
    """The figure as an `<svg>` element for a page. `name` keeps its ids apart from those of other figures there."""
    import matplotlib as mpl

    _without_tex(figure)
    buffer = io.StringIO()
    with mpl.rc_context(SETTINGS):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', text, count=1)
    return Markup(text.replace("xlink:href", "href"))


def _without_tex(figure: Figure) -> None:
    """Whatever the reader's own settings of matplotlib are: TeX would run what stands in a name."""
    from matplotlib.text import Text

    for each in figure.findobj(Text):
        if isinstance(each, Text):
            each.set_usetex(False)


def save(figure: Figure, path: Path) -> None:
    """Write the figure as PNG, SVG or PDF, told by the suffix.

    Raises:
        ConfigError: another suffix, or the file cannot be written.
    """
    import matplotlib as mpl

    if path.suffix not in FORMATS:
        raise ConfigError(f"{path}: a picture's name must end in one of {', '.join(FORMATS)}")
    _without_tex(figure)
    try:
        with mpl.rc_context(SETTINGS):
            figure.savefig(path, dpi=150)
    except OSError as error:
        raise ConfigError(f"{path}: cannot write the file: {error.strerror or error}") from error
