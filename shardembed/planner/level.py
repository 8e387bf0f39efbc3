"""Deals out what has no fixed place so that ranks come level: a linear program over the amounts of each item on each rank.

Two kinds of items take part. Divisible ones may lie anywhere: items that share their options are dealt out as one lump and cut at
the ranks' borders afterwards, so that most of them stay whole. Items with `sharing` stay on the ranks they have and change their
shares; what is not linear in these is taken by its tangent, which lies above it, and the program is solved anew around its answer.
Ranks that carry the same are one class; where there are too many of these for a program, ranks that carry nearly the same are, and
what a class gets is dealt out among its ranks so that they end level (`classes.within`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sparse
from numpy.typing import NDArray
from scipy.optimize import linprog

from shardembed.planner.classes import classes_of, means, within
from shardembed.planner.highs import Effort
from shardembed.planner.problem import Array, Choice, Option, Sharing
from shardembed.planner.state import State

VARIABLES = 8000  # of the program
FEW_VARIABLES = 1500  # with which it takes no time
CLASSES = 128  # of ranks, where there are more than twice as many
LEAST = 1e-6  # share; a part with less is dropped
TANGENTS = 3
# Shares of what rounding to whole parts could add to a rank at worst, that are kept free: roundings mostly cancel out.
SPARES = (0.2, 1.0, 0.0)
NOTHING = 2e-3  # ranks' worth of seconds
APART = 16  # lumps, the heaviest, that are told apart where only the step is asked for
PROGRAM, VARIABLE = 2e4, 150.0  # looks at a rank (`state.Spent`), that a program and each of its variables are taken for
Lump = tuple[Option, int, float]  # how many items with this option, and bytes that rounding to parts may add to a rank
COARSE = 5e-4  # of a rank's seconds in a phase, or of its memory


@dataclass(frozen=True)
class _Levelled:
    """What the program says.

    Attributes:
        value: seconds of a step.
        amounts: items' worth of each lump on each rank, `[R]`.
        shares: of each sharing item, `[n]`.
    """

    value: float
    amounts: list[Array]
    shares: list[Array]


def level(state: State, effort: Effort, variables: int = VARIABLES) -> State | None:
    """The state with everything settled; None where memory or work does not allow it. All else stays as it is.

    Args:
        variables: of the program, at most; what is left over is dealt out beforehand, smallest items first.
    """
    state = state.copy()
    mixed = _settle_surplus(state, variables)
    lumps, sharing = [lump for lump in _lumps(state) if lump[0] not in mixed], state.unsettled
    if not lumps and not mixed and not sharing:
        return state
    lumped = [_lumped(state, lump) for lump in lumps]
    if mixed:
        lumped.append(_mixed(state, mixed))
    for spare in SPARES:
        found = _solve(state, lumped, sharing, effort, TANGENTS, spare)
        settled = None if found is None else _dealt(state, [*lumps, mixed] if mixed else lumps, sharing, found)
        if settled is not None and (settled.fits or spare == SPARES[-1]):  # then whoever asked counts again
            return settled
    return None


def _dealt(state: State, lumps: list[list[int]], sharing: list[int], found: _Levelled) -> State:
    """The state with all that the program knows settled as it says."""
    state = state.copy()
    for lump, amount_R in zip(lumps, found.amounts, strict=True):
        options = [state.option(item) for item in lump]
        cut = _cut(amount_R, [float(option.memory[0]) for option in options], [_fine_enough(option, state) for option in options])
        for item, option, (ranks, parts, shares) in zip(lump, options, cut, strict=True):
            _settle(state, item, ranks, tuple(share * (option.divisible // parts) for share in shares))
    for item, share_n in zip(sharing, found.shares, strict=True):
        _settle(state, item, *_whole_parts(state, item, share_n))
    return state


def reopened(state: State) -> State:
    """A settled state with as many of its divisible items, the heaviest, in the pool again as one program deals out."""
    state = state.copy()
    divided = [item for item, choice in enumerate(state.choices) if choice is not None and state.option(item).divisible]
    most = max(1, VARIABLES // len(classes_of(state, [], _most(state))[0]))
    for lump in _by_option(state, divided)[:most]:
        for item in lump:
            _settle(state, item, (), None)
    return state


def value(state: State, effort: Effort) -> float:
    """Seconds of a step once all is settled, save for rounding and what weighs next to nothing; inf where that cannot be."""
    lumps, sharing = [lump for lump in _lumps(state) if _weight(state, lump) > NOTHING], state.unsettled
    if not lumps and not sharing:
        return state.value
    few, many = [_lumped(state, lump) for lump in lumps[:APART]], [item for lump in lumps[APART:] for item in lump]
    if many:  # dealt out in one proportion: nearly as even, and a far smaller program
        few.append(_mixed(state, many))
    variables = state.problem.ranks * len(few) + sum(state.option(item).parts for item in sharing)
    state.spent.looks += PROGRAM + VARIABLE * variables
    found = _solve(state, few, sharing, effort, 1)
    return np.inf if found is None else found.value


def _lumped(state: State, lump: list[int]) -> Lump:
    option = state.option(lump[0])
    return option, len(lump), float(option.memory[0]) / _fine_enough(option, state)


def _mixed(state: State, items: list[int]) -> Lump:
    """Divisible items as one, laid end to end."""
    options = [state.option(item) for item in items]
    loads, memory = sum(option.loads for option in options), sum(option.memory for option in options)
    spare = max(float(option.memory[0]) / _fine_enough(option, state) for option in options)
    return Option(None, np.asarray(loads), np.asarray(memory), np.zeros_like(options[0].common), divisible=1), 1, spare


def _lumps(state: State) -> list[list[int]]:
    """Pooled items by option, those with most to deal out first."""
    return _by_option(state, state.pooled)


def _by_option(state: State, items: list[int]) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    for item in items:
        found.setdefault(id(state.option(item)), []).append(item)
    return sorted(found.values(), key=lambda lump: (-_weight(state, lump), lump[0]))


def _weight(state: State, lump: list[int]) -> float:
    """Ranks' worth of seconds and of memory."""
    option = state.option(lump[0])
    return len(lump) * (float((option.total / state.scale).sum()) + float(option.memory[0]) / state.problem.capacity)


def _settle(state: State, item: int, ranks: tuple[int, ...], shares: tuple[int, ...] | None) -> None:
    before = state.choices[item]
    assert before is not None
    state.remove(item)
    state.restore(item, Choice(before.option, ranks, shares))


def _settle_surplus(state: State, variables: int) -> list[int]:
    """Deal out what would make the program too large, the smallest items first; those for which there is no room that way stay."""
    sharing = sorted(
        state.unsettled,
        key=lambda item: (-float((_sharing(state.option(item)).linear / state.scale).sum()), item),
    )
    ranks = state.problem.ranks
    # Shares of many items tell all ranks apart, and then a program over many lumps is large.
    room = variables // 2 if _most(state) == ranks or len(_lumps(state)) * ranks <= variables else 0
    for item in sharing:
        room -= state.option(item).parts
        if room < 0:
            even = np.full(state.option(item).parts, 1.0 / state.option(item).parts)
            _settle(state, item, *_whole_parts(state, item, even))
    lumps = _lumps(state)
    most = max(1, variables // len(classes_of(state, [], _most(state))[0]))
    return [item for lump in lumps[most:][::-1] for item in lump if not _whole_or_even(state, item)]


def _most(state: State) -> int:
    ranks = state.problem.ranks
    return ranks if ranks <= 2 * CLASSES else CLASSES


def _sharing(option: Option) -> Sharing:
    assert option.sharing is not None
    return option.sharing


def _whole_parts(state: State, item: int, share_n: Array) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ranks of an item with sharing that keep a part, and how many small parts each has."""
    choice = state.choices[item]
    assert choice is not None
    parts = _sharing(state.option(item)).parts
    wanted = np.where(share_n < LEAST, 0.0, share_n)
    wanted = wanted / wanted.sum() * parts
    counts = np.floor(wanted + 1e-9).astype(np.int64)
    missing = parts - int(counts.sum())
    counts[np.argsort(counts - wanted, kind="stable")[:missing]] += 1
    kept = np.flatnonzero(counts)
    return tuple(choice.ranks[part] for part in kept), tuple(counts[kept].tolist())


def _whole_or_even(state: State, item: int) -> bool:
    """Put a divisible item on as few ranks as do not raise the state's value, or on those that raise it least; False where it fits
    nowhere.
    """
    option, before, ranks = state.option(item), state.value, state.problem.ranks
    most, spread = min(ranks, option.divisible), 1
    found: list[tuple[float, tuple[int, ...], tuple[int, ...]]] = []
    while spread <= most:
        parts = tuple(option.divisible // spread + (part < option.divisible % spread) for part in range(spread))
        peak = np.maximum(state.loads.max(0), state.mean)
        cost = state.cost(option.total / spread, float(option.memory[0]) * parts[0] / option.divisible, peak)
        best = np.argsort(cost, kind="stable")[:spread]
        if np.isfinite(cost[best[-1]]):
            _settle(state, item, tuple(best.tolist()), parts)
            if state.value <= before * (1 + 1e-7):
                return True
            found.append((state.value, tuple(best.tolist()), parts))
            _settle(state, item, (), None)
        spread = min(4 * spread, most) if spread < most else most + 1
    if found:
        _settle(state, item, *min(found)[1:])
    return bool(found)


def _solve(
    state: State, lumps: list[Lump], sharing: list[int], effort: Effort, tangents: int, spare: float = 1.0
) -> _Levelled | None:
    shares = [np.full(state.option(item).parts, 1.0 / state.option(item).parts) for item in sharing]
    found: _Levelled | None = None
    for _ in range(tangents if sharing else 1):
        better = _program(state, lumps, sharing, shares, effort, spare)
        if better is None or (found is not None and better.value > found.value * (1 - 1e-6)):
            return found
        found, shares = better, [np.maximum(share, LEAST) for share in better.shares]
    return found


def _program(
    state: State, lumps: list[Lump], sharing: list[int], around: list[Array], effort: Effort, room: float
) -> _Levelled | None:
    """Minimise the sum over phases of the slowest rank, around given shares.

    Variables: amounts, lump by lump and class by class; shares, item by item and part by part; Z. Rows: a class and phase.
    """
    _, class_of = classes_of(state, sharing, _most(state) if lumps else state.problem.ranks)
    sizes, classes = np.bincount(class_of).astype(np.float64), int(class_of.max()) + 1
    busy = np.flatnonzero(state.mean > 0)
    unit, capacity = max(float(state.mean.sum()), 1e-30), state.problem.capacity
    options = [option for option, *_ in lumps]
    bare = state.copy()
    for item in sharing:
        bare.remove(item)
    base, alike = np.column_stack([bare.loads, bare.memory]), state.alike
    loads, memory = np.split(means(base, class_of), [-1], axis=1)
    memory = memory[:, 0]
    free = 1.0 - (means(state.memory[:, None], class_of)[:, 0] + state.alike_memory) / capacity
    entries = _Entries(classes)
    costs: list[Array] = []
    spare, shared_spare = 0.0, 1e-9
    for option, _, rounding in lumps:
        entries.add(np.append(option.total[busy] / unit, option.memory[0] / capacity)[:, None] / sizes, np.arange(classes))
        costs.append(np.zeros(classes))
        spare += rounding / capacity
    for item, share_n in zip(sharing, around, strict=True):
        choice, how = state.choices[item], _sharing(state.option(item))
        assert choice is not None
        where = class_of[list(choice.ranks)]
        even, slopes = how.answers(np.full(len(share_n), 1.0 / len(share_n))), how.slopes(share_n)  # `common` is that of even ones
        # The tangent at the shares so far: a constant, which goes to what ranks carry, and a slope, which is the variable's.
        bases = how.answers(share_n) - slopes * share_n
        np.add.at(loads, where, bases[:, None] * how.answer / sizes[where][:, None])
        np.add.at(memory, where, bases * how.memory_answer / sizes[where])
        alike += float(how.common_answer.sum()) * float((bases - even).sum())
        figures = np.append(how.linear[busy] / unit, how.memory_linear / capacity)[:, None]
        figures = figures + np.append(how.answer[busy] / unit, how.memory_answer / capacity)[:, None] * slopes
        entries.add(figures / sizes[where], where)
        costs.append(float(how.common_answer.sum()) / unit * slopes)
        shared_spare += how.memory_linear / how.parts / capacity
    for index in range(len(busy)):
        column = np.zeros((len(busy) + 1, 1))
        column[index] = -1.0
        entries.add(np.repeat(column, classes, 1), np.arange(classes), one=True)
    limits = [-loads[:, phase] / unit for phase in busy]
    # A rank that is full may stay so: what it gets of lumps is little, or nothing.
    kept_free = np.minimum(room * spare, free.clip(0.0) if room < 1.0 else np.inf) + room * shared_spare
    limits.append(np.maximum(1.0 - kept_free - (memory + state.alike_memory) / capacity, 0.0))
    counts = np.array([*(float(count) for _, count, _ in lumps), *(1.0 for _ in sharing)])
    lengths = [classes] * len(lumps) + [len(share) for share in around]
    sums = sparse.csr_array(
        (np.ones(sum(lengths)), (np.repeat(np.arange(len(lengths)), lengths), np.arange(sum(lengths)))),
        shape=(len(lengths), sum(lengths) + len(busy)),
    )
    answer = linprog(
        np.concatenate([*costs, np.ones(len(busy))]),
        entries.matrix(len(busy) + 1),
        np.concatenate(limits),
        sums,
        counts,
        [*[(0.0, None)] * sum(lengths), *((least, None) for least in bare.loads[:, busy].max(0) / unit)],
        method="highs",
        options={"maxiter": effort.iterations},
    )
    if answer.x is None:
        return None
    pieces = np.split(np.clip(answer.x[: sum(lengths)], 0.0, None), np.cumsum(lengths)[:-1])
    amounts = [(piece / sizes)[class_of] for piece in pieces[: len(lumps)]]
    shares = [_even_in_class(state, item, piece, class_of) for item, piece in zip(sharing, pieces[len(lumps) :], strict=True)]
    if lumps and classes < state.problem.ranks:
        for item, share_n in zip(sharing, shares, strict=True):
            choice, how = state.choices[item], _sharing(state.option(item))
            assert choice is not None
            base[list(choice.ranks)] += np.column_stack([how.loads(share_n), how.memory(share_n)])
        figures = np.array([np.append(option.total[busy] / unit, option.memory[0] / capacity) for option in options])
        mixture = np.array([piece / sizes for piece in pieces[: len(lumps)]]).T @ figures
        carried = np.column_stack([base[:, busy] / unit, base[:, -1] / capacity])
        room_left = 1.0 - room * (spare + shared_spare) - state.alike_memory / capacity
        part_R = within(carried, mixture, np.append(answer.x[sum(lengths) :], room_left), class_of)
        amounts = [amount_R * part_R for amount_R in amounts]
    return _Levelled(float(answer.fun) * unit + alike, amounts, shares)


class _Entries:
    """The program's matrix, a block of columns at a time. Rows: figure by figure, class by class."""

    def __init__(self, classes: int) -> None:
        self._classes = classes
        self._columns = 0
        self._found: list[tuple[Array, NDArray[np.intp], NDArray[np.intp]]] = []

    def add(self, figures: Array, where: NDArray[np.intp], one: bool = False) -> None:
        """Columns with `figures` `[figures, n]` in the rows of the classes `where` `[n]`; all in one column where so told."""
        rows = np.arange(len(figures))[:, None] * self._classes + where
        columns = np.broadcast_to(self._columns + (0 if one else np.arange(figures.shape[1])), figures.shape)
        kept = figures.ravel() != 0
        self._found.append((figures.ravel()[kept], rows.ravel()[kept], columns.ravel()[kept]))
        self._columns += 1 if one else figures.shape[1]

    def matrix(self, figures: int) -> sparse.csr_array:
        values, rows, columns = (np.concatenate(part) for part in zip(*self._found, strict=True))
        return sparse.csr_array((values, (rows, columns)), shape=(figures * self._classes, self._columns))


def _even_in_class(state: State, item: int, share_n: Array, class_of: NDArray[np.intp]) -> Array:
    """The same share on all ranks of a class: the program knows only their sum."""
    choice = state.choices[item]
    assert choice is not None
    where = class_of[list(choice.ranks)]
    sums, counts = np.bincount(where, share_n), np.bincount(where)
    return (sums / np.maximum(counts, 1))[where]


def _fine_enough(option: Option, state: State) -> int:
    """Into how many equal parts an item is cut, at least: so many that one of them weighs next to nothing, and no more, since
    every part may end as a shard.
    """
    weight = max(float((option.total / state.scale).max()), float(option.memory[0]) / state.problem.capacity)
    wanted, parts = weight / COARSE, option.divisible
    # Halves only, so that coarse parts are whole numbers of fine ones.
    while parts % 2 == 0 and parts / 2 >= wanted:
        parts //= 2
    return parts


def _cut(amount_R: Array, sizes: list[float], parts: list[int]) -> list[tuple[tuple[int, ...], int, tuple[int, ...]]]:
    """Lay items end to end by their sizes and cut them at the ranks' borders: (ranks, parts, parts on each) of every item."""
    lengths = np.maximum(sizes, 1e-30)
    starts = np.cumsum(lengths) - lengths
    ends = np.cumsum(amount_R) * (lengths.sum() / amount_R.sum())
    cut = []
    for start, length, whole in zip(starts, lengths, parts, strict=True):
        borders = np.rint(np.clip((ends - start) / length, 0.0, 1.0) * whole).astype(np.int64)
        borders[-1] = whole
        shares = np.diff(borders, prepend=0)
        kept = np.flatnonzero(shares)
        cut.append((tuple(kept.tolist()), whole, tuple(shares[kept].tolist())))
    return cut
