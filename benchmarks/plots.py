"""The pictures of benchmark pages, as SVG beside the page, the same bytes for the same figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.figures import Spread

COLOURS = ("#1f6f8b", "#d1495b", "#e9a13b", "#6a994e", "#7d5ba6", "#555555")


@dataclass(frozen=True)
class Curve:
    """A line of a plot: y over x, with the quartiles of y. Curves of one colour belong together; some of them are dashed."""

    name: str
    x: Sequence[float]
    y: Sequence[Spread]
    colour: str
    dashed: bool = False


def bars(path: Path, groups: Mapping[str, Mapping[str, Spread]], axis: str) -> str:
    """Horizontal bars by group and name, from 1 on a logarithmic scale; returns the file's name."""
    with _figure() as pyplot:
        rows = [(group, name, value) for group, values in groups.items() for name, value in values.items()]
        names = list(dict.fromkeys(name for _, name, _ in rows))
        figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.26 * (len(rows) + len(groups))))
        place, places, labels = 0.0, [], []
        for group, values in groups.items():
            places.append(place + (len(values) - 1) / 2)
            labels.append(group)
            for name, value in values.items():
                colour = COLOURS[names.index(name) % len(COLOURS)]
                axes.barh(place, value.median - 1.0, left=1.0, color=colour, label=name, height=0.8)
                axes.plot([value.low, value.high], [place, place], color="black", linewidth=1)
                axes.text(max(value.high, 1.0), place, f"  {value.median:.2f}", va="center", fontsize=8)
                place += 1
            place += 0.8
        axes.axvline(1.0, color="black", linewidth=1)
        axes.set(yticks=places, yticklabels=labels, xlabel=axis, xscale="log")
        low, high = axes.get_xlim()
        axes.set_xlim(low / 1.1, high * 1.4)  # room for the figures
        _plain_ticks(axes.xaxis)
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        figure.legend(handles.values(), handles.keys(), fontsize=8, loc="outside upper center", ncols=3, frameon=False)
        return _save(figure, path)


def curves(path: Path, panels: Mapping[str, Sequence[Curve]], axis: str) -> str:
    """A panel for each quantity that grows; returns the file's name."""
    with _figure() as pyplot:
        figure, grid = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.8), squeeze=False)
        colours = list(dict.fromkeys(curve.colour for panel in panels.values() for curve in panel))
        for axes, (title, panel) in zip(grid[0], panels.items(), strict=True):
            _draw(axes, panel, colours)
            ticks = sorted({x for curve in panel for x in curve.x})
            few = ticks[-1] <= 8
            axes.set(xlabel=title, xscale="linear" if few else "log", yscale="linear" if few else "log")
            if few:
                axes.set_ylim(bottom=0.0)
            else:
                _plain_ticks(axes.yaxis)
            _tick_at(axes, ticks)
        grid[0][0].set_ylabel(axis)
        shown: dict[str, Any] = {}
        for axes in grid[0]:
            shown.update(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        figure.legend(shown.values(), shown.keys(), fontsize=8, loc="outside upper center", ncols=4, frameon=False)
        return _save(figure, path)


def with_parts(
    path: Path, lines: Sequence[Curve], title: str, x: Sequence[float], parts: Mapping[str, Sequence[float]], axis: str
) -> str:
    """Lines over numbers of ranks, and beside them the parts of one of them, `title`, on top of each other; returns the file's
    name.
    """
    with _figure() as pyplot:
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.4))
        _draw(left, lines, list(dict.fromkeys(curve.colour for curve in lines)))
        left.set(xlabel="ranks", ylabel=axis, xscale="log", yscale="log")
        _plain_ticks(left.yaxis)
        _tick_at(left, sorted({number for curve in lines for number in curve.x}))
        left.legend(fontsize=7, frameon=False)
        shades = pyplot.get_cmap("viridis")
        layers = right.stackplot(x, *parts.values(), colors=[shades(i / max(1, len(parts) - 1)) for i in range(len(parts))])
        right.set(xlabel=f"ranks ({title})", xscale="log")
        _tick_at(right, x)
        right.margins(x=0)
        # In the order in which they lie on top of each other.
        right.legend(layers[::-1], list(parts)[::-1], fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        return _save(figure, path)


def _draw(axes: Any, lines: Sequence[Curve], colours: Sequence[str]) -> None:
    for curve in lines:
        look: dict[str, Any] = {"color": COLOURS[colours.index(curve.colour) % len(COLOURS)], "marker": "o", "markersize": 4}
        style = "--" if curve.dashed else "-"
        axes.plot(curve.x, [value.median for value in curve.y], linestyle=style, label=curve.name, **look)
        low, high = [value.low for value in curve.y], [value.high for value in curve.y]
        axes.fill_between(curve.x, low, high, color=look["color"], alpha=0.2, linewidth=0)


def _tick_at(axes: Any, ticks: Sequence[float]) -> None:
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
    axes.xaxis.minorticks_off()
    axes.grid(alpha=0.3)


def _plain_ticks(axis: Any) -> None:
    """Plain numbers at 1, 2 and 5 times the powers of ten."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_minor_locator(NullLocator())


@contextmanager
def _figure() -> Iterator[Any]:
    """Matplotlib with the settings that all pictures share."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": "shardembed", "figure.constrained_layout.use": True}):
        yield pyplot


def _save(figure: Any, path: Path) -> str:
    from matplotlib import pyplot

    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path.name
