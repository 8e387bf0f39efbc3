"""A map of a table: rows as points on its first two principal components, some of them with their names.

In shades of grey with black names, so that it prints; the rows that were asked for are rings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from shardembed.config.optional import needed
from shardembed.config.paths import local
from shardembed.config.shown import beginning, drawable
from shardembed.embeddings import coloured
from shardembed.embeddings.compared import Which
from shardembed.embeddings.components import Flat, flatten
from shardembed.embeddings.metadata import Metadata, metadata_of
from shardembed.embeddings.names import names_of
from shardembed.embeddings.publish import new_file
from shardembed.embeddings.stored import BLOCK_BYTES, StoredTables
from shardembed.errors import ConfigError, ExportError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
INK, POINT = "#000000", "#5f5f5f"
NAME = 28  # characters
DOT, RING = 3.0, 6.0  # half of what they take of the picture, in its pixels
LOOK: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "shardembed",
    "text.usetex": False,  # TeX would run what stands in a name
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True)
class Map:
    """What `table_map` drew.

    Attributes:
        file: the picture.
        table: which table it shows.
        step: of the checkpoint.
        rows: how many the table has.
        drawn: how many of them are points.
        named: those that have a name in the picture.
        shares: of the variance, along each of the two components.
        left_out: rows with inf or nan.
        told: in words what the rows are.
        coloured: how many points have a colour that says something: of categories those that are among the most frequent.
        legend: the categories that have a colour.
    """

    file: Path
    table: str
    step: int
    rows: int
    drawn: int
    named: tuple[int, ...]
    shares: tuple[float, float]
    left_out: int
    told: str
    coloured: int = 0
    legend: tuple[str, ...] = ()


def table_map(
    folder: str | Path,
    table: str,
    out: str | Path,
    *,
    sample: int = 5000,
    ids: Sequence[int] = (),
    names: str | Path | None = None,
    labels: int = 30,
    seed: int = 0,
    step: int | None = None,
    vectors: Which | None = None,
    metadata: str | Path | None = None,
    colour: str | None = None,
    key: str | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> Map:
    """Draw a table as a map: its rows on the first two principal components of all rows, as a picture (.png, .svg or .pdf).

    Needs matplotlib, and no process group. A block of the table is in memory at a time.

    Args:
        folder: of checkpoints (the newest counts), of one checkpoint, or of a run (its best weights count).
        sample: how many rows are drawn, chosen at random by `seed`.
        ids: rows that are drawn whatever the sample, as rings, and named first.
        names: a file with a name a line, the first of id 0, or a folder of `se.Names`; ids without it.
        labels: how many points get names at most: some far apart, as far as names do not overlap.
        vectors: what is drawn: "rows" as they lie in the table, or what the "model" makes of them; None takes the latter where
            the checkpoint says what that is.
        metadata: a .csv, .tsv or .parquet file with a line a row, whose column `colour` gives points their colours: the eight most
            frequent categories each have one, the others are grey; numbers of which there are more are a scale.
        colour: the column.
        key: the column of the file that says which row a line is of, by default the first: by its name where there are `names`,
            else by its id, an integer or a text of which it is the `se.hash64`.

    Raises:
        ConfigError, IdRangeError, DataError: the table, an id, a name or a column does not exist, or metadata are of other rows.
        CheckpointError: the checkpoint is missing or damaged.
        ExportError: the picture cannot be written. UnsupportedError: matplotlib is not there.
    """
    out = local(out, ExportError)
    if out.suffix not in FORMATS:
        raise ConfigError(f"{out}: a picture's name must end in one of {', '.join(FORMATS)}")
    if sample < 1 or labels < 0:
        raise ConfigError(f"sample={sample}, labels={labels}: at least one row is drawn, and no less than none are named")
    if (metadata is None) != (colour is None) or (key is not None and metadata is None):
        raise ConfigError("a map is coloured by a column of a file: give both metadata, the file, and colour, the column")
    with needed("matplotlib", "train", "drawing a map"):
        import matplotlib as mpl

    with StoredTables(folder, step, vectors) as stored:
        found = stored.find(table)
        asked = found.chosen(list(ids))
        flat = flatten(found, sample, asked, seed, block_bytes)
        rings = torch.isin(flat.ids, asked)
        order = _order(flat.points, rings, 4 * labels)
        needed_names = flat.ids if metadata is not None else flat.ids[order]
        named = names_of(Path(names), needed_names.tolist()) if names is not None else {}
        told_of = None
        if metadata is not None and colour is not None:
            told_of = metadata_of(local(metadata), colour, flat.ids, named if names is not None else None, key)
        with mpl.rc_context(LOOK):
            figure, axes = _figure(flat, wide=told_of is not None)
            told = f"{len(flat.ids):,} of its {found.rows:,} rows" if len(flat.ids) < found.rows else f"all {found.rows:,} rows"
            axes.set_title(f"{drawable(beginning(found.name, 50))}, step {stored.manifest.step}: {told}", loc="left", fontsize=11)
            _points(figure, axes, flat.points, rings, told_of)
            put = _names(figure, axes, flat, rings, order, named, labels)
            x, y = flat.points[torch.isin(flat.ids, torch.tensor(put, dtype=torch.int64)) & ~rings].T.numpy()
            inside: dict[str, Any] = (
                {"color": INK, "linewidths": 0} if told_of is None else {"facecolors": "none", "edgecolors": INK}
            )
            axes.scatter(x, y, s=9 if told_of is None else 20, zorder=5, **inside)  # which point a name is of
            new_file(out, lambda path: figure.savefig(path, dpi=150, metadata={"Date": None} if out.suffix == ".svg" else None))
        shown = () if told_of is None or told_of.numbers else tuple(told_of.frequent)
        counted = 0 if told_of is None else sum(value is not None and (not shown or value in shown) for value in told_of.values)
        drawn = len(flat.ids)
        return Map(
            out,
            found.name,
            stored.manifest.step,
            found.rows,
            drawn,
            tuple(put),
            flat.shares,
            flat.left_out,
            found.told,
            counted,
            shown,
        )


def _figure(flat: Flat, wide: bool) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4 if wide else 8.4, 6.8), layout="constrained")
    axes = figure.subplots()
    for name, share, label in (("first", flat.shares[0], axes.set_xlabel), ("second", flat.shares[1], axes.set_ylabel)):
        label(f"{name} principal component ({100 * share:.0f} % of the variance)")
    axes.margins(0.08)
    axes.set_aspect("equal", adjustable="datalim")  # a distance is a distance in either direction
    return figure, axes


def _points(figure: Figure, axes: Axes, points: torch.Tensor, rings: torch.Tensor, metadata: Metadata | None) -> None:
    size = 5.0 if len(points) > 1000 else 14.0
    opacity = max(0.25, min(0.8, 600 / max(1, len(points))))
    if metadata is not None:  # colours must be seen through each other less
        coloured.draw(figure, axes, points, rings, metadata, {"s": 2 * size, "alpha": max(0.6, opacity)})
        return
    x, y = points[~rings].T.numpy()
    axes.scatter(x, y, s=size, color=POINT, alpha=opacity, linewidths=0)
    x, y = points[rings].T.numpy()
    axes.scatter(x, y, s=46, facecolors="white", edgecolors=INK, linewidths=1.3, zorder=3)


def _order(points: torch.Tensor, rings: torch.Tensor, most: int) -> list[int]:
    """Which points to name, the most wanted first: rings, then always the one farthest from all before it."""
    order = rings.nonzero().squeeze(1).tolist()
    if len(points) == len(order):
        return order
    middle = points.mean(0, keepdim=True)
    gaps = (points - middle).square().sum(1) if not order else torch.full((len(points),), torch.inf, dtype=points.dtype)
    for place in order:
        gaps = torch.minimum(gaps, (points - points[place]).square().sum(1))
    gaps[rings] = -1
    for _ in range(min(most, len(points) - len(order))):
        place = int(gaps.argmax())
        order.append(place)
        gaps = torch.minimum(gaps, (points - points[place]).square().sum(1))
        gaps[order] = -1
    return order


def _names(
    figure: Figure, axes: Axes, flat: Flat, rings: torch.Tensor, order: Sequence[int], names: Mapping[int, str], most: int
) -> list[int]:
    """Write names beside their points where they overlap no other name, its point, or a ring; returns the ids that have one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # places are known from here on
    figure.set_layout_engine("none")
    renderer, inside = canvas.get_renderer(), axes.get_window_extent()
    taken: list[Any] = [_around(axes, point, RING) for point in flat.points[rings]]
    put: list[int] = []
    for place in order:
        if len(put) == most:
            break
        row = int(flat.ids[place])
        for shift, side in ((6, "left"), (-6, "right")):
            text = axes.annotate(
                drawable(beginning(names.get(row, str(row)), NAME)),
                tuple(flat.points[place].tolist()),
                (shift, 0),
                textcoords="offset points",
                ha=side,
                va="center",
                color=INK,
                fontsize=8.5,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6},
                zorder=4,
            )
            box = text.get_window_extent(renderer).padded(2)
            if not bool(rings[place]):
                box = Bbox.union([box, _around(axes, flat.points[place], DOT)])
            if inside.x0 <= box.x0 and box.x1 <= inside.x1 and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                put.append(row)
                break
            text.remove()
    return put


def _around(axes: Axes, point: torch.Tensor, pixels: float) -> Any:
    from matplotlib.transforms import Bbox

    x, y = axes.transData.transform(tuple(point.tolist()))
    return Bbox.from_extents(x - pixels, y - pixels, x + pixels, y + pixels)
