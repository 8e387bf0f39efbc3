"""Line charts as SVG for a page, written by hand: at the end of a run nobody waits for a plotting library.

Lines differ by their dashes, not by colour alone, and are named at their right end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from shardembed.planner import words
from shardembed.planner.charts import COLOURS, GREY, INK
from shardembed.planner.html import Markup, filled, text
from shardembed.recipes.series import Point

WIDTH, HEIGHT = 440, 230  # so that letters are still read where a telephone makes it 380 pixels wide
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 16, 40  # margins
NAME = 22  # characters
MARKS = 10  # at most, of which each is a line with words
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
        faint: a thin pale line, behind the others.
    """

    name: str
    points: Sequence[Point]
    band: bool = False
    faint: bool = False


@dataclass(frozen=True)
class Frame:
    """Where steps and values lie in a picture.

    Attributes:
        steps: the first and the last.
        values: the smallest and the largest.
        width: of the picture.
        height: of the picture.
        right: margin.
    """

    steps: tuple[float, float]
    values: tuple[float, float]
    width: int
    height: int
    right: int

    def x(self, step: float) -> float:
        first, last = self.steps
        return LEFT + (step - first) / (last - first) * (self.width - LEFT - self.right)

    def y(self, value: float) -> float:
        low, high = self.values
        return self.height - BOTTOM - (value - low) / (high - low) * (self.height - TOP - BOTTOM)

    def path(self, points: Sequence[Point]) -> str:
        return "L".join(f"{self.x(point.step):.1f} {self.y(point.mean):.1f}" for point in points)


def chart(
    lines: Sequence[Line], label: str, epochs: Mapping[int, int] = MappingProxyType({}), width: int = WIDTH, height: int = HEIGHT
) -> Markup:
    """An `<svg>` element; label: what it shows, for those who do not see it. Lines must have a point each; epochs: which begins
    after which step, of which some are left out where they are many.
    """
    steps = _spread([point.step for line in lines for point in line.points])
    values = [value for line in lines for point in line.points for value in _values(line, point)]
    low, high = _spread(values)
    ticks = ticks_of(low, high)
    if all(float(value).is_integer() for value in values) and ticks[1] - ticks[0] != int(ticks[1] - ticks[0]):
        ticks = _multiples(low, high, math.ceil(ticks[1] - ticks[0]))  # counts have no fractions
    names = [words.shorten(line.name, NAME) for line in lines] if len(lines) > 1 and any(line.name for line in lines) else []
    right = RIGHT + (int(0.58 * TEXT * max(map(len, names))) + 8 if names else 0)
    frame = Frame(steps, (min(low, ticks[0]), max(high, ticks[-1])), width, height, right)
    parts = [*_axes(frame, ticks), *_marks(frame, epochs)]
    inks = iter(zip(DASHES, INKS, strict=True))
    for line in sorted(lines, key=lambda each: not each.faint):
        dash, ink = ("", INKS[0]) if line.faint else next(inks, (DASHES[-1], INKS[-1]))
        parts += _line(frame, line, dash, ink)
    if names:
        heights = _apart([frame.y(line.points[-1].mean) for line in lines], TOP, height - BOTTOM)
        parts += [written(width - right + 6, place + 4, name, "start", INK) for name, place in zip(names, heights, strict=True)]
    return Markup(f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{text(label)}">{"".join(parts)}</svg>')


def _axes(frame: Frame, ticks: Sequence[float]) -> list[str]:
    bottom, end = frame.height - BOTTOM, frame.width - frame.right
    parts = []
    for tick in ticks:
        parts.append(f'<path d="M{LEFT} {frame.y(tick):.1f}H{end}" stroke="#e4e4e4"/>')
        parts.append(written(LEFT - 8, frame.y(tick) + 4, number(tick, ticks[1] - ticks[0]), "end"))
    first, last = frame.steps
    for tick in (each for each in ticks_of(first, last, 4) if first <= each <= last and each == int(each)):
        parts.append(f'<path d="M{frame.x(tick):.1f} {bottom}v5" stroke="{GREY}"/>')
        parts.append(written(frame.x(tick), bottom + 18, words.number(tick), "middle"))
    parts.append(f'<path d="M{LEFT} {bottom}H{end}" stroke="{GREY}"/>')
    return [*parts, written((LEFT + end) / 2, frame.height - 4, "step", "middle")]


def _marks(frame: Frame, epochs: Mapping[int, int]) -> list[str]:
    inside = [step for step in epochs if frame.steps[0] < step < frame.steps[1]]
    parts = []
    for step in inside[:: -(-len(inside) // MARKS) or 1]:
        said = f"{'epoch ' if step == inside[0] else ''}{epochs[step]:,}"
        parts.append(f'<path d="M{frame.x(step):.1f} {TOP}V{frame.height - BOTTOM}" stroke="{GREY}" stroke-dasharray="1 3"/>')
        parts.append(written(frame.x(step), TOP - 5, said, "middle"))
    return parts


def _line(frame: Frame, line: Line, dash: str, ink: str) -> list[str]:
    parts = []
    if line.band:
        edge = [f"{frame.x(p.step):.1f} {frame.y(p.high):.1f}" for p in line.points]
        edge += [f"{frame.x(p.step):.1f} {frame.y(p.low):.1f}" for p in reversed(line.points)]
        parts.append(f'<path d="M{"L".join(edge)}Z" fill="{ink}" fill-opacity=".18"/>')
    look = 'stroke-width="1" stroke-opacity=".35"' if line.faint else 'stroke-width="1.8" stroke-linejoin="round"'
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    parts.append(f'<path d="M{frame.path(line.points)}" fill="none" stroke="{ink}" {look}{dashed}/>')
    if len(line.points) <= 40 and not line.faint:
        parts += [f'<circle cx="{frame.x(p.step):.1f}" cy="{frame.y(p.mean):.1f}" r="2.4" fill="{ink}"/>' for p in line.points]
    return parts


def figure(name: str, lines: Sequence[Line], epochs: Mapping[int, int] = MappingProxyType({})) -> Markup:
    """A chart below its name."""
    return drawn(name, chart(lines, name, epochs))


def drawn(name: str, picture: Markup) -> Markup:
    """A picture below its name."""
    return filled("<figure><figcaption>{}</figcaption>{}</figure>", name, picture)


def bars(heights: Sequence[float], places: int, title: str, width: int = 130, height: int = 26) -> Markup:
    """A small histogram for a cell of a table, with room for as many `places`; a pointer that rests on it shows `title`."""
    most, each = max([*heights, 1e-300]), width / max(12, places)
    rects = "".join(
        f'<rect x="{number * each:.1f}" y="{height - 1 - value / most * (height - 2):.1f}" width="{each - 2:.1f}" '
        f'height="{value / most * (height - 2) + 1:.1f}"/>'
        for number, value in enumerate(heights)
    )
    shown = f'width="{width}" height="{height}" style="width:{width}px;height:{height}px"'
    named = f"<title>{text(title)}</title>"
    return Markup(f'<svg viewBox="0 0 {width} {height}" {shown} role="img" fill="{COLOURS[0]}">{named}{rects}</svg>')


def _values(line: Line, point: Point) -> tuple[float, ...]:
    return (point.low, point.high) if line.band else (point.mean,)


def _spread(values: Sequence[float]) -> tuple[float, float]:
    """The smallest and the largest, never alike."""
    low, high = min(values), max(values)
    if high - low <= max(1e-12 * max(abs(low), abs(high)), 1e-300):  # also what differs by rounding: no ticks lie between
        pad = abs(low) * 0.05 if abs(low) > 1e-290 else 0.5
        return low - pad, high + pad
    return low, high


def ticks_of(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that span from `low` to `high`, at least two."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    return _multiples(low, high, step)


def _multiples(low: float, high: float, step: float) -> list[float]:
    return [step * number for number in range(math.floor(low / step), math.ceil(high / step) + 1)]


def number(value: float, step: float) -> str:
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


def written(x: float, y: float, said: str, anchor: str, ink: str = "#555") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{TEXT}" text-anchor="{anchor}" fill="{ink}">{text(said)}</text>'
