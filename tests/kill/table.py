"""The table that the kill matrix prints when it is done."""

from __future__ import annotations

from dataclasses import dataclass

from tests.kill.points import Case


@dataclass(frozen=True)
class Row:
    """A point that was tried, and passed."""

    case: Case
    resumed: int

    def cells(self) -> list[str]:
        case = self.case
        point = str(case.point) + (f", then {case.then}" if case.then else "")
        ranks = str(case.ranks) if case.ranks == case.ends_on else f"{case.ranks}, then {case.ends_on}"
        return [case.name, point, ranks, case.victims, str(self.resumed), "yes"]


HEAD = ["case", "killed at", "ranks", "killed", "resumed from step", "equal"]
_rows: list[Row] = []


def add_row(case: Case, resumed: int) -> None:
    _rows.append(Row(case, resumed))


def lines() -> list[str]:
    """The table, of those points that were tried and passed."""
    cells = [HEAD, *(row.cells() for row in _rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(HEAD))]
    return (
        ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells] if _rows else []
    )
