"""Line charts as SVG for a page, written by hand: at the end of a run nobody waits for a plotting library.

Lines differ by their dashes, not by colour alone, and are named at their right end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shardembed.planner import words
from shardembed.planner.charts import COLOURS, GREY, INK
from shardembed.planner.html import Markup, filled, text
from shardembed.recipes.series import Point

WIDTH, HEIGHT = 520, 240
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 14, 40  # margins
TEXT = 13
DASHES = ("", "7 4", "2 3", "9 3 2 3", "12 4", "1 5")
INKS = (COLOURS[0], COLOURS[6], COLOURS[3], COLOURS[7], COLOURS[1], COLOURS[4])


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        name: in the legend.
        points: of steps and values.
        band: with a band from the smallest to the largest value of each point.
    """

    name: str
    points: Sequence[Point]
    band: bool = False


def chart(lines: Sequence[Line], label: str, width: int = WIDTH, height: int = HEIGHT) -> Markup:
    """An `<svg>` element; label: what it shows, for those who do not see it. Lines must have a point each."""
    first, last = _spread([point.step for line in lines for point in line.points])
    low, high = _spread([value for line in lines for point in line.points for value in _values(line, point)])
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    names = [line.name for line in lines if line.name] if len(lines) > 1 else []
    right = RIGHT + (int(0.58 * TEXT * max(map(len, names))) + 8 if names else 0)

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (width - LEFT - right)

    def y(value: float) -> float:
        return height - BOTTOM - (value - low) / (high - low) * (height - TOP - BOTTOM)

    parts = []
    for tick in ticks:
        parts.append(f'<path d="M{LEFT} {y(tick):.1f}H{width - right}" stroke="#e4e4e4"/>')
        parts.append(_text(LEFT - 8, y(tick) + 4, _number(tick, ticks[1] - ticks[0]), "end"))
    for tick in (each for each in _ticks(first, last, 4) if first <= each <= last and each == int(each)):
        parts.append(f'<path d="M{x(tick):.1f} {height - BOTTOM}v5" stroke="{GREY}"/>')
        parts.append(_text(x(tick), height - BOTTOM + 18, words.number(tick), "middle"))
    parts.append(f'<path d="M{LEFT} {height - BOTTOM}H{width - right}" stroke="{GREY}"/>')
    parts.append(_text((LEFT + width - right) / 2, height - 4, "step", "middle"))
    for line, dash, ink in zip(lines, DASHES, INKS, strict=False):
        if line.band:
            edge = [f"{x(p.step):.1f} {y(p.high):.1f}" for p in line.points]
            edge += [f"{x(p.step):.1f} {y(p.low):.1f}" for p in reversed(line.points)]
            parts.append(f'<path d="M{"L".join(edge)}Z" fill="{ink}" fill-opacity=".18"/>')
        path = "L".join(f"{x(p.step):.1f} {y(p.mean):.1f}" for p in line.points)
        drawn = f'fill="none" stroke="{ink}" stroke-width="1.8" stroke-linejoin="round"'
        parts.append(f'<path d="M{path}" {drawn}{f" stroke-dasharray={chr(34)}{dash}{chr(34)}" if dash else ""}/>')
        if len(line.points) <= 40:
            parts += [f'<circle cx="{x(p.step):.1f}" cy="{y(p.mean):.1f}" r="2.4" fill="{ink}"/>' for p in line.points]
    if names:
        heights = _apart([y(line.points[-1].mean) for line in lines], TOP, height - BOTTOM)
        parts += [_text(width - right + 6, place + 4, line.name, "start", INK) for line, place in zip(lines, heights, strict=True)]
    return Markup(f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{text(label)}">{"".join(parts)}</svg>')


def figure(name: str, lines: Sequence[Line]) -> Markup:
    """A chart below its name."""
    return filled("<figure><figcaption>{}</figcaption>{}</figure>", name, chart(lines, name))


def bars(heights: Sequence[float], places: int, title: str, width: int = 130, height: int = 26) -> Markup:
    """A small histogram for a cell of a table, with room for as many `places`; a pointer that rests on it shows `title`."""
    most, each = max([*heights, 1e-300]), width / max(12, places)
    drawn = "".join(
        f'<rect x="{number * each:.1f}" y="{height - 1 - value / most * (height - 2):.1f}" width="{each - 2:.1f}" '
        f'height="{value / most * (height - 2) + 1:.1f}"/>'
        for number, value in enumerate(heights)
    )
    shown = f'width="{width}" height="{height}" style="width:{width}px;height:{height}px"'
    named = f"<title>{text(title)}</title>"
    return Markup(f'<svg viewBox="0 0 {width} {height}" {shown} role="img" fill="{COLOURS[0]}">{named}{drawn}</svg>')


def _values(line: Line, point: Point) -> tuple[float, ...]:
    return (point.low, point.high) if line.band else (point.mean,)


def _spread(values: Sequence[float]) -> tuple[float, float]:
    """The smallest and the largest, never alike."""
    low, high = min(values), max(values)
    if high - low <= max(1e-12 * max(abs(low), abs(high)), 1e-300):  # also what differs by rounding: no ticks lie between
        pad = abs(low) * 0.05 if abs(low) > 1e-290 else 0.5
        return low - pad, high + pad
    return low, high


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that span from `low` to `high`, at least two."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    return [step * number for number in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _number(value: float, step: float) -> str:
    """With as many digits as the step between ticks needs."""
    if abs(value) >= 1e5 or (value and step < 1e-5):
        return f"{value:.3g}"
    return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9) + (0 if _is_round(step) else 1))}f}"


def _is_round(step: float) -> bool:
    """One digit suffices, as for 0.2; not for 0.25."""
    return abs(step / 10 ** math.floor(math.log10(step) + 1e-9) - 2.5) > 1e-6


def _apart(places: Sequence[float], least: float, most: float) -> list[float]:
    """The same places, moved so that lines of text there do not lie on each other."""
    found = dict.fromkeys(range(len(places)), 0.0)
    before = least - TEXT
    for number in sorted(found, key=lambda each: places[each]):
        found[number] = before = max(places[number], before + TEXT + 1)
    below = max(0.0, before - most)
    return [max(least, found[number] - below) for number in range(len(places))]


def _text(x: float, y: float, said: str, anchor: str, ink: str = "#555") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{TEXT}" text-anchor="{anchor}" fill="{ink}">{text(said)}</text>'
