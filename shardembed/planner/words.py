"""Numbers and layouts as people read them: one way to say a time, a size, a set of ranks or a cut."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from shardembed.config.shown import ending
from shardembed.tables.plan import TablePlan

NOT_PROVED = "none proved"
_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))
_SIZES = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def duration(seconds: float) -> str:
    """Three significant digits and a unit: `2.91 ms`."""
    if seconds == 0:
        return "0 s"
    unit, name = next(((unit, name) for unit, name in _UNITS if abs(seconds) >= 0.9995 * unit), (1e-9, "ns"))
    value = seconds / unit
    digits = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:,.{digits}f} {name}"


def durations(seconds: Sequence[float]) -> list[str]:
    """Times in the unit of the longest, so that a column compares at a glance, and with digits for the shortest."""
    longest, shortest = (pick((abs(each) for each in seconds if each), default=0.0) for pick in (max, min))
    unit, name = next(((unit, name) for unit, name in _UNITS if longest >= 0.9995 * unit), (1e-9, "ns"))
    digits = next((digits for digits in (0, 1) if shortest / unit >= 10 ** (1.99 - digits)), 2)
    return [f"{each / unit:,.{digits}f} {name}" for each in seconds]


def size(count: float) -> str:
    """Bytes in the unit that suits them: `13.4 GiB`."""
    value, unit = float(count), 0
    while abs(value) >= 999.5 and unit + 1 < len(_SIZES):
        value, unit = value / 1024, unit + 1
    return f"{value:.0f} {_SIZES[unit]}" if unit == 0 or abs(value) >= 99.95 else f"{value:.1f} {_SIZES[unit]}"


def number(value: float) -> str:
    """A count in short: `40 M`, `12.5 k`, `3,170`, `2.5`."""
    for unit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(9999.5, 0.9995 * unit):
            return f"{f'{value / unit:.1f}'.removesuffix('.0')} {suffix}"
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.1f}".removesuffix(".0")


def percent(share: float) -> str:
    """Two significant digits where it is small: `0.34 %`, `12 %`."""
    value = 100 * share
    digits = 0 if abs(value) >= 9.95 else 1 if abs(value) >= 0.995 else 2
    return f"{value:.{digits}f} %"


def bound(seconds: float | None) -> str:
    """A lower bound, where one is proved."""
    return NOT_PROVED if seconds is None else duration(seconds)


def gap(share: float | None) -> str:
    """How far a plan lies above its bound, where one is proved."""
    return NOT_PROVED if share is None else percent(share)


def plural(count: int, name: str) -> str:
    return f"{count:,} {name}{'' if count == 1 else 's'}"


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)


def rank_list(ranks: Iterable[int], most: int = 4) -> str:
    """`0-7`, `3`, `0,2,5`; after `most` runs only how many more: `0,2,4,6 and 28 more`."""
    found = runs(ranks)
    shown = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in found[:most])
    left = sum(last - first + 1 for first, last in found[most:])
    return f"{shown} and {left:,} more" if left else shown


def runs(ranks: Iterable[int]) -> list[tuple[int, int]]:
    """First and last of each run of neighbours."""
    found: list[tuple[int, int]] = []
    for rank in sorted(ranks):
        if found and rank == found[-1][1] + 1:
            found[-1] = found[-1][0], rank
        else:
            found.append((rank, rank))
    return found


def shorten(text: str, width: int) -> str:
    """At most `width` characters, the last ones: names of tables are paths, which differ at their end."""
    return ending(text, width, "~")


def kind_of(table: TablePlan) -> str:
    """Kind and packing, for a column: `row_wise, bag`. How ids travel is said only where any do."""
    return table.kind if table.layout.copied else f"{table.kind}, {table.packing}"


def sentence(table: TablePlan) -> str:
    """The layout of a table in words, and how its ids travel."""
    return f"{place(table)}; {'only ' if table.layout.copied else ''}{travel(table)} travel"


def travel(table: TablePlan) -> str:
    """What is sent for a table, both ways."""
    return "gradients" if table.layout.copied else "distinct rows" if table.packing == "unique" else "sums of bags"


def place(table: TablePlan) -> str:
    """The layout of a table in words: `rows cut over 8 ranks (0-7), in even blocks of 1,250`."""
    layout = table.layout
    if layout.copied:
        return "a copy on every rank"
    strips, ranks = layout.strips, layout.ranks
    where = f"rank {rank_list(ranks)}" if len(ranks) == 1 else f"{len(ranks):,} ranks ({rank_list(ranks)})"
    rows = _rows(table)
    if len(layout.shards) == 1:
        return f"whole on {where}"
    if len(strips) == 1:
        return f"rows cut over {where}, {rows}"
    if len(strips) == len(layout.shards):
        return f"columns cut over {where}, {_widths(table)}"
    return f"{_widths(table)}, each cut by rows, {rows}, on {where}"


def _rows(table: TablePlan) -> str:
    strip = table.layout.strips[0]
    if strip.stride > 1:
        return f"row i in block i % {strip.stride:,}"
    counts = [len(block.rows) for block in strip.blocks]
    if max(counts) - min(counts) <= 1:
        return f"in even blocks of {number(max(counts))}"
    return f"in blocks of {number(min(counts))} to {number(max(counts))}"


def _widths(table: TablePlan) -> str:
    widths = [len(strip.columns) for strip in table.layout.strips]
    each = str(widths[0]) if len(set(widths)) == 1 else f"{min(widths)} to {max(widths)}"
    return f"{len(widths)} strips of {each} columns"
