"""Points of a map in the colours of a column of metadata: a few categories, the others grey, or a scale of numbers.

Categories differ by their marks too, so that the picture prints, and tells them apart with every kind of colour vision.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shardembed.config.shown import beginning, drawable
from shardembed.embeddings.metadata import Metadata

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKS = "os^Dv*Pp"
OTHERS = "#8c8c8c"
LABEL = 24  # characters
SCALE = "cividis"  # as good as the same for all kinds of colour vision, and from dark to light in print
APART = 30.0  # times the smallest number, from which on the largest asks for a scale of powers
TAILS = 1, 99  # percentiles between which the scale goes: what lies beyond has the colour of its end


def draw(
    figure: Figure, axes: Axes, points: torch.Tensor, rings: torch.Tensor, metadata: Metadata, look: Mapping[str, Any]
) -> None:
    """points: float64 `[n, 2]`, of which those in `rings`, bool `[n]`, get a line around them; look: of all others."""
    from shardembed.planner.charts import COLOURS, PALE  # with them the planner's libraries, which no other use of tables needs

    places, ringed = points.numpy(), rings.numpy()
    unknown = np.array([value is None for value in metadata.values])
    gone = _scatter(axes, places[unknown], ringed[unknown], look, color=PALE)
    title = drawable(beginning(metadata.column, LABEL))
    if metadata.numbers:
        _scale(figure, axes, places[~unknown], ringed[~unknown], metadata, look, title)
        return
    from matplotlib.collections import PathCollection

    shown = metadata.frequent
    values = np.array([shown.index(value) if value in shown else -1 for value in metadata.values])
    others = (values == -1) & ~unknown
    kinds = {value for value, other in zip(metadata.values, others, strict=True) if other}
    rest = _scatter(axes, places[others], ringed[others], look, color=OTHERS)
    legend = []
    for number, (name, colour, mark) in enumerate(zip(shown, COLOURS, MARKS, strict=False)):
        mine = values == number
        drawn = _scatter(axes, places[mine], ringed[mine], look, color=colour, marker=mark)
        legend.append((drawn, f"{drawable(beginning(str(name), LABEL))} ({int(mine.sum()):,})"))
    legend += [(rest, f"{len(kinds):,} others ({int(others.sum()):,})")] if rest is not None else []
    legend += [(gone, f"unknown ({int(unknown.sum()):,})")] if gone is not None else []
    how = {"loc": "outside right upper", "frameon": False, "fontsize": 8.5, "alignment": "left"}
    for handle in figure.legend(*zip(*legend, strict=True), title=title, **how).legend_handles:
        if isinstance(handle, PathCollection):  # as large as the others, and without the line of a ring
            handle.set(alpha=1.0, sizes=[26.0], linewidths=[0.0])


def _scale(
    figure: Figure, axes: Axes, places: np.ndarray, rings: np.ndarray, metadata: Metadata, look: Mapping[str, Any], title: str
) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm, Normalize

    values = np.array([value for value in metadata.values if value is not None], np.float64)
    low, high = np.percentile(values, TAILS)
    low, high = (low, high) if high > low else (values.min(), values.max())
    powers = values.min() > 0 and high > APART * low
    norm = (LogNorm if powers else Normalize)(low, high)
    _scatter(axes, places, rings, look, c=values, cmap=SCALE, norm=norm)
    figure.colorbar(ScalarMappable(norm, SCALE), ax=axes, label=title, shrink=0.6, extend="both", pad=0.02)


def _scatter(axes: Axes, places: np.ndarray, rings: np.ndarray, look: Mapping[str, Any], **colour: Any) -> Any:
    if not len(places):
        return None
    edges = {"edgecolors": ["#000000" if ring else "none" for ring in rings], "linewidths": [1.3 * bool(ring) for ring in rings]}
    sizes = np.where(rings, 46.0, look["s"])
    return axes.scatter(*places.T, s=sizes, alpha=look["alpha"], **edges, **colour)
