"""What parts of an option cost: how unequal ones depend on their shares, and many equal ones as one line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from shardembed.planner.cost_model import CostModel
from shardembed.planner.cuts import ordered
from shardembed.planner.problem import Array, Sharing
from shardembed.planner.traffic import Asked


def sharing_of(model: CostModel, number: int, parts: int) -> Sharing | None:
    """How unequal blocks of a table that is packed as bags depend on their shares, where they are all alike but for that.

    Args:
        parts: shares are whole numbers of 1 / parts.

    Found from the cost of two shares, and dropped should a third not agree.
    """
    table = model.tables[number]
    bags = table.read_by_bag("bag")
    if not all(bags) or ordered(table.load) or table.cut_rows < model.ranks or model.ranks == 1:
        return None
    nothing = np.zeros(len(model.phases))
    empty = Sharing(nothing, nothing, nothing, 0, 0, 0, np.array(table.traffic.bags), np.array(table.traffic.lengths), parts)
    shares = np.array([1.0, 0.5, 0.125])
    answers = empty.answers(shares)
    if answers[1] <= 0.5 * answers[0] * (1 + 1e-9):
        return None  # an id a bag: shares change nothing
    asked = Asked(*(shares * whole for whole in (table.traffic.ids, table.traffic.distinct, table.traffic.touched)))
    width = float(table.width)
    loads, memory = model.parts(number, np.full(3, width), asked, shares * table.held_rows, "bag")
    numbers = np.column_stack([loads, memory])
    answer = (numbers[1] - 0.5 * numbers[0]) / (answers[1] - 0.5 * answers[0])
    linear = numbers[0] - answer * answers[0]
    if not np.allclose(numbers[2], 0.125 * linear + answers[2] * answer, rtol=1e-6, atol=1e-15):
        return None
    even, halves = (model.common(number, [width], blocks, "bag") for blocks in (1, 2))
    each = 2 * answers[1] - answers[0]
    return replace(
        empty,
        linear=linear[:-1],
        answer=answer[:-1],
        common_answer=(halves[0] - even[0]) / each,
        memory_linear=float(linear[-1]),
        memory_answer=float(answer[-1]),
        memory_common=(halves[1] - even[1]) / each,
    )


def stacked(pieces: Sequence[Array], times: int) -> Array:
    """Strip after strip, each line `times` times. Where all are equal they are one line seen many times, since wide cuts of many
    tables would fill memory.
    """
    first = pieces[0][:1]
    if all((piece == first).all() for piece in {id(piece): piece for piece in pieces}.values()):
        return np.broadcast_to(first, (times * sum(len(piece) for piece in pieces), *first.shape[1:]))
    return np.concatenate([np.repeat(piece, times, 0) for piece in pieces])
