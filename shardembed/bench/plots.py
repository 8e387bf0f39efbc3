"""The pictures of benchmark pages, as SVG beside the page, the same bytes for the same figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardembed.bench.figures import Spread

COLOURS = ("#1f6f8b", "#d1495b", "#e9a13b", "#6a994e", "#7d5ba6", "#555555")


@dataclass(frozen=True)
class Curve:
    """A line of a plot: y over x, with the quartiles of y."""

    name: str
    x: Sequence[float]
    y: Sequence[Spread]


def bars(path: Path, groups: Mapping[str, Mapping[str, Spread]], axis: str) -> str:
    """Horizontal bars by group and name, with a line at 1; returns the file's name."""
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
                axes.barh(place, value.median, color=colour, label=name, height=0.8)
                axes.plot([value.low, value.high], [place, place], color="black", linewidth=1)
                axes.text(max(value.high, value.median), place, f" {value.median:.2f}", va="center", fontsize=8)
                place += 1
            place += 0.8
        axes.axvline(1.0, color="black", linewidth=1)
        axes.set(yticks=places, yticklabels=labels, xlabel=axis)
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        figure.legend(handles.values(), handles.keys(), fontsize=8, loc="outside upper center", ncols=3, frameon=False)
        return _save(figure, path)


def curves(path: Path, panels: Mapping[str, Sequence[Curve]], axis: str) -> str:
    """A panel for each quantity that grows; returns the file's name."""
    with _figure() as pyplot:
        figure, grid = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.8), squeeze=False)
        names = list(dict.fromkeys(curve.name for panel in panels.values() for curve in panel))
        for axes, (title, panel) in zip(grid[0], panels.items(), strict=True):
            for curve in panel:
                colour = COLOURS[names.index(curve.name) % len(COLOURS)]
                axes.plot(curve.x, [value.median for value in curve.y], marker="o", markersize=4, color=colour, label=curve.name)
                low, high = [value.low for value in curve.y], [value.high for value in curve.y]
                axes.fill_between(curve.x, low, high, color=colour, alpha=0.2, linewidth=0)
            ticks = sorted({x for curve in panel for x in curve.x})
            logarithmic = ticks[-1] > 8
            axes.set(xlabel=title, yscale="log", xscale="log" if logarithmic else "linear")
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        grid[0][0].set_ylabel(axis)
        shown: dict[str, Any] = {}
        for axes in grid[0]:
            shown.update(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        figure.legend(shown.values(), shown.keys(), fontsize=8, loc="outside upper center", ncols=4, frameon=False)
        return _save(figure, path)


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
