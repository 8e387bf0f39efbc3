"""Options of many light tables at once: where tables are many, each is cut by columns alone, and tables that differ in nothing but
rows and traffic are counted together, in arrays.

An option in strips that are not cut by rows stands for all its cuts into blocks too (`Option.cuttable`): more blocks ask for as
many ids and rows and for more partial sums, whose expected number is concave in a block's share. Options that another one is no
worse than in every figure are left out at once, as `relax.undominated` does with a floor of 0.

Legend: N tables, L ways to lay them out, P phases.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shardembed.planner.cost_demand import Table
from shardembed.planner.cost_model import CostModel
from shardembed.planner.cuts import Cut, widths_of
from shardembed.planner.problem import Array, Option
from shardembed.planner.relax import fits
from shardembed.planner.traffic import Asked
from shardembed.tables.placement import Packing

Listing = Literal["all", "some", "light"]  # how much is listed of a table


@dataclass(frozen=True, eq=False)
class Way:
    """One way to lay all tables out.

    Attributes:
        cut: as it is.
        pieces: of each width of its strips, how many there are, `[N, P]` seconds and `[N]` bytes of each; none of a copied table.
        common: `[N, P]` seconds on every rank.
        held: `[N]` bytes on every rank.
        charges: that it uses.
        dealt: its rows may be dealt out to any ranks in any shares.
    """

    cut: Cut
    pieces: tuple[tuple[int, Array, Array], ...]
    common: Array
    held: Array
    charges: frozenset[str]
    dealt: bool = False

    def figures(self, ranks: int) -> Array:
        """`[P + 2, N]`, in which less is better: `common`; `mean`, which is `largest` too; `memory`, which is `least` too (see
        `relax.Figures`).
        """
        seconds = sum((count * loads for count, loads, _ in self.pieces), np.zeros_like(self.common)) / ranks
        bytes_ = sum((count * memory for count, _, memory in self.pieces), np.zeros_like(self.held)) / ranks + self.held
        return np.vstack([self.common.sum(1), seconds.T, bytes_])

    def option(self, table: int, parts: int) -> Option:
        """Of one of the tables, which has so many `parts` where it is dealt out."""
        phases = self.common.shape[1]
        lines = [(count, loads[table], memory[table]) for count, loads, memory in self.pieces]
        if len(lines) == 1:  # one line seen many times: wide cuts of many tables would fill memory
            count, line, bytes_ = lines[0]
            loads, memory = np.broadcast_to(line, (count, phases)), np.broadcast_to(bytes_, (count,))
        else:
            loads = np.concatenate([np.zeros((0, phases)), *(np.repeat(line[None], count, 0) for count, line, _ in lines)])
            memory = np.concatenate([np.zeros(0), *(np.full(count, bytes_) for count, _, bytes_ in lines)])
        divisible, cuttable = (parts, False) if self.dealt else (0, bool(lines))
        held = float(self.held[table])
        return Option(
            self.cut, loads, memory, self.common[table], held, divisible=divisible, charges=self.charges, cuttable=cuttable
        )


class Light:
    """Tables that differ in rows and traffic alone: one table of a model, number 0, that gives arrays where others give numbers."""

    def __init__(self, model: CostModel, tables: Sequence[int]) -> None:
        self.one, self.ranks = copy.copy(model), model.ranks
        self.one.tables = (Table.together([model.tables[table] for table in tables]),)
        self.width = self.one.tables[0].width
        traffic = self.one.tables[0].traffic
        self._asked = Asked(*(np.asarray(each) for each in (traffic.ids, traffic.distinct, traffic.touched)))
        self._rows = np.array([model.tables[table].held_rows for table in tables], dtype=np.float64)

    def cut(self, cut: Cut, dealt: bool = False) -> Way:
        """In strips of columns, each whole."""
        widths = widths_of(self.width, cut.strips)
        pieces = []
        for width in dict.fromkeys(widths):
            loads, memory = self.one.parts(0, np.full(len(self._rows), float(width)), self._asked, self._rows, cut.packing)
            pieces.append((widths.count(width), loads, memory))
        common, held = self.one.common(0, widths, 1, cut.packing)
        return Way(cut, tuple(pieces), np.transpose(common), np.asarray(held), self.one.charges_of(0, widths, cut.packing), dealt)

    def whole(self) -> Array:
        """`[N, P]` seconds of all ranks together, if cut in no way, in the packing that has less to send."""
        width = np.full(len(self._rows), float(self.width))
        mixed = len(set(self.one.tables[0].read_by_bag("bag"))) > 1
        packings: tuple[Packing, Packing] = ("unique", "unique" if mixed else "bag")
        one, other = (self.one.parts(0, width, self._asked, self._rows, packing)[0] for packing in packings)
        return np.where((one.sum(1) <= other.sum(1))[:, None], one, other)

    def copied(self) -> Way:
        """On every rank."""
        seconds, held = self.one.copied(0)
        return Way(Cut("replicated"), (), np.transpose(seconds), np.asarray(held), self.one.charges_of(0, [self.width], "copied"))

    def worth_listing(self, ways: Sequence[Way], capacity: float) -> NDArray[np.bool_]:
        """`[N, L]`: ways that fit, without those that another one is no worse than; all of a table of which none fits."""
        rows = np.array([way.figures(self.ranks) for way in ways])
        fitting = fits(rows[:, -1], capacity)
        dropped = np.zeros_like(fitting)
        for place, way in enumerate(ways):
            for other, better in enumerate(ways):
                if other == place or not better.charges <= way.charges:
                    continue
                no_worse = fitting[other] & (rows[other] <= rows[place]).all(0)
                if better.charges == way.charges and other > place:  # of two that are worth the same, the first stays
                    no_worse &= (rows[other] < rows[place]).any(0)
                dropped[place] |= no_worse
        kept = fitting & ~dropped
        return (kept | ~fitting.any(0)).T
