"""Whether predicted chances are true ones, as a picture: of rows with about the same prediction, what share was clicks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardembed.planner.charts import COLOURS, GREY
from shardembed.planner.html import Markup, text
from shardembed.recipes.curves import HEIGHT, TEXT, WIDTH, number, ticks_of, written

LEFT, RIGHT, TOP, BOTTOM = 56, 14, 14, 44
WIDE = 20  # times the smallest, from which on the largest prediction asks for a scale of powers
SURE = 1.96  # standard deviations, of a share that is sampled: 95 %
NAME = "calibration: predictions and clicks"


@dataclass(frozen=True)
class Bin:
    """Rows whose predictions are near each other.

    Attributes:
        predicted: the mean.
        observed: the share of clicks.
        rows: how many there are.
    """

    predicted: float
    observed: float
    rows: int

    @property
    def ends(self) -> tuple[float, float]:
        """Between which the share of clicks would lie, in 95 of 100 such bins (Wilson, "Probable inference", JASA 22, 1927)."""
        share, weight = self.observed, SURE**2 / self.rows
        middle = (share + weight / 2) / (1 + weight)
        half = SURE / (1 + weight) * math.sqrt(share * (1 - share) / self.rows + weight / (4 * self.rows))
        return max(0.0, middle - half), min(1.0, middle + half)


def bins_of(summary: Mapping[str, Any]) -> list[Bin]:
    """Those of a summary that have rows; none where it tells of none."""
    told = summary.get("calibration_bins") or {"predicted": [], "observed": [], "rows": []}
    found = zip(told["predicted"], told["observed"], told["rows"], strict=True)
    return [Bin(predicted, observed, rows) for predicted, observed, rows in found if rows]


def off(bins: Sequence[Bin]) -> int:
    """In how many bins the mean prediction lies outside of where the share of clicks would be."""
    return sum(not each.ends[0] <= each.predicted <= each.ends[1] for each in bins)


def chart(bins: Sequence[Bin], label: str, width: int = WIDTH, height: int = HEIGHT + 60) -> Markup:
    """An `<svg>` element; there must be a bin. Where predictions go over more than `WIDE` to 1 both axes are logarithmic."""
    values = [value for each in bins for value in (each.predicted, each.observed, *each.ends)]
    least = min((value for value in (each.predicted for each in bins) if value > 0), default=0.0)
    powers = least > 0 and max(values) > WIDE * least
    low, high = (least / 2, min(1.0, 1.2 * max(values))) if powers else (0.0, max(max(values) * 1.02, 1e-6))
    low, high = (low, high) if high > low else (0.0, 1.0)

    def share(value: float) -> float:
        if powers:
            return (math.log(max(value, low)) - math.log(low)) / (math.log(high) - math.log(low))
        return (min(max(value, low), high) - low) / (high - low)

    def x(value: float) -> float:
        return LEFT + share(value) * (width - LEFT - RIGHT)

    def y(value: float) -> float:
        return height - BOTTOM - share(value) * (height - TOP - BOTTOM)

    parts = []
    ticks = _powers(low, high) if powers else [(each, number(each, 0.1)) for each in ticks_of(low, high) if low <= each <= high]
    for tick, said in ticks:
        parts.append(f'<path d="M{LEFT} {y(tick):.1f}H{width - RIGHT}" stroke="#e4e4e4"/>')
        parts.append(f'<path d="M{x(tick):.1f} {height - BOTTOM}v5" stroke="{GREY}"/>')
        parts.append(written(LEFT - 8, y(tick) + 4, said, "end"))
        parts.append(written(x(tick), height - BOTTOM + 18, said, "middle"))
    parts.append(f'<path d="M{LEFT} {height - BOTTOM}H{width - RIGHT}" stroke="{GREY}"/>')
    parts.append(f'<path d="M{x(low):.1f} {y(low):.1f}L{x(high):.1f} {y(high):.1f}" stroke="{GREY}" stroke-dasharray="7 4"/>')
    for each in bins:
        place, (lower, upper) = x(each.predicted), each.ends
        parts.append(f'<path d="M{place:.1f} {y(lower):.1f}V{y(upper):.1f}" stroke="{COLOURS[0]}" stroke-opacity=".5"/>')
        parts.append(f'<circle cx="{place:.1f}" cy="{y(each.observed):.1f}" r="3" fill="{COLOURS[0]}"/>')
    parts.append(written((LEFT + width - RIGHT) / 2, height - 6, "mean prediction", "middle"))
    turned = f'<text transform="translate({TEXT} {(height - BOTTOM + TOP) / 2:.0f}) rotate(-90)" font-size="{TEXT}"'
    parts.append(f'{turned} text-anchor="middle" fill="#555">share of clicks</text>')
    return Markup(f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{text(label)}">{"".join(parts)}</svg>')


def _powers(low: float, high: float) -> list[tuple[float, str]]:
    """Of ten, and where there are few of them their doubles and fives too."""
    tens = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(tens) <= 4 else (1,)
    found = [factor * 10.0**ten for ten in tens for factor in factors]
    return [(each, f"{each:.3g}") for each in found if low <= each <= high * 1.0001]
