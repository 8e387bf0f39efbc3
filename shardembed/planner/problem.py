"""What the optimiser sees of a planning problem: numbers only, no table and no cluster.

Every item (a table) takes one of its options. An option puts parts on ranks; each part adds seconds to every phase of its rank and
bytes to its memory. Phases are separated by collectives, so a step takes the sum over phases of the slowest rank's seconds.

    step = base + charges used + sum of common + sum over phases p of max over ranks r of load[p, r]

Legend: P phases, n parts of an option, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Numbers = NDArray[np.intp]  # of ranks, options, items


@dataclass(frozen=True, eq=False)
class Sharing:
    """How an option's parts depend on their shares p of the item, where these may be unequal: seconds and bytes are p * linear +
    g(p) * answer, with g(p) = sum over features of min(bags (1 - (1 - p)^length), bags * length * p), the expected bags with an id
    in the part (see `cost_demand`). g is concave, and 0 at 0.

    Attributes:
        linear: `[P]` seconds on the part's rank, for the whole item.
        answer: `[P]` seconds on the part's rank, for each expected bag.
        common_answer: `[P]` seconds on every rank, for each expected bag.
        memory_linear: bytes on the part's rank, for the whole item.
        memory_answer: bytes on the part's rank, for each expected bag.
        memory_common: bytes on every rank, for each expected bag.
        bags: of a rank, `[features]`.
        lengths: mean ids of a bag, `[features]`.
        parts: shares are whole numbers of 1 / parts.
    """

    linear: Array
    answer: Array
    common_answer: Array
    memory_linear: float
    memory_answer: float
    memory_common: float
    bags: Array
    lengths: Array
    parts: int

    def answers(self, shares: Array) -> Array:
        """g, of shares `[n]`."""
        some = self.bags * (1.0 - np.maximum(1.0 - shares[:, None], 0.0) ** self.lengths)
        return np.minimum(some, self.bags * self.lengths * shares[:, None]).sum(1)

    def slopes(self, shares: Array) -> Array:
        """g'(p), of shares `[n]` above 0."""
        steep = self.bags * self.lengths * np.maximum(1.0 - shares[:, None], 1e-12) ** np.maximum(self.lengths - 1.0, 0.0)
        return steep.sum(1)

    def loads(self, shares: Array) -> Array:
        """`[n, P]`."""
        return shares[:, None] * self.linear + self.answers(shares)[:, None] * self.answer

    def memory(self, shares: Array) -> Array:
        """`[n]`."""
        return shares * self.memory_linear + self.answers(shares) * self.memory_answer

    def beyond_even(self, shares: Array, count: int) -> float:
        """Answers of these shares more than those of `count` equal ones; mostly below 0."""
        return float(self.answers(shares).sum() - count * self.answers(np.array([1.0 / count]))[0])


@dataclass(frozen=True, eq=False)
class Option:
    """One way to lay out an item.

    Attributes:
        key: what the caller needs to build the layout; the optimiser does not look at it.
        loads: `[n, P]` seconds that each part adds to the phases of its rank.
        memory: `[n]` bytes that each part adds to its rank.
        common: `[P]` seconds on every rank, wherever the parts lie (the requesters' work).
        common_memory: bytes on every rank.
        divisible: 0 where the parts go to n different ranks. k > 0 where `loads` is one line, the whole item, which may be cut into
            k equal parts that are dealt out to ranks at will, several to one rank if need be.
        sharing: how the parts change where they are given unequal shares; None where they cannot be. The item's options of one
            number of strips share one.
        charges: names of the problem's fixed charges that this option uses.
        ranks: where the parts must lie, in their order; None: the optimiser chooses.
        node: all parts must lie on ranks of one node.
        cuttable: the bound is to hold for cuts into more parts too, which have no lower total; they are not listed.
    """

    key: object
    loads: Array
    memory: Array
    common: Array
    common_memory: float = 0.0
    divisible: int = 0
    sharing: Sharing | None = None
    charges: frozenset[str] = frozenset()
    ranks: tuple[int, ...] | None = None
    node: bool = False
    cuttable: bool = False

    @property
    def parts(self) -> int:
        return self.loads.shape[0]

    @cached_property
    def total(self) -> Array:
        """`[P]` seconds, all ranks together, without `common`."""
        return self.loads[0] * self.parts if self.alike else self.loads.sum(0)

    @cached_property
    def largest(self) -> Array:
        """`[P]` seconds of the largest part."""
        return self.loads[0] if self.alike else self.loads.max(0, initial=0.0)

    @cached_property
    def bytes(self) -> float:
        """All ranks together, without `common_memory`."""
        return float(self.memory.sum())

    @cached_property
    def most(self) -> float:
        """Bytes of the largest part."""
        return float(self.memory.max(initial=0.0))

    @cached_property
    def alike(self) -> bool:
        """All parts are one line, seen many times."""
        return self.parts > 0 and (self.parts == 1 or self.loads.strides[0] == 0)


@dataclass(frozen=True, eq=False)
class Item:
    """A table and its options. Items that share one `options` tuple are interchangeable.

    Attributes:
        name: of the table.
        options: the ways to lay it out.
    """

    name: str
    options: tuple[Option, ...]


@dataclass(frozen=True, eq=False)
class Problem:
    """Items to place on equal ranks.

    Attributes:
        phases: their names, P of them.
        ranks: how many there are.
        capacity: bytes of each rank.
        items: what is to be placed.
        charges: fixed costs by name: `[P]` seconds on every rank, once if any chosen option uses it.
        charge_memory: likewise bytes.
        base: `[P]` seconds that no choice changes; None: none.
        ranks_per_node: for options that must stay inside a node.
        finer: cuts of an item's `cuttable` option into so many blocks that are not listed: (item, option, blocks) -> options.
    """

    phases: tuple[str, ...]
    ranks: int
    capacity: float
    items: tuple[Item, ...]
    charges: dict[str, Array] = field(default_factory=dict)
    charge_memory: dict[str, float] = field(default_factory=dict)
    base: Array | None = None
    ranks_per_node: int = 0
    finer: Callable[[int, int, int], tuple[Option, ...]] | None = None


@dataclass(frozen=True)
class Choice:
    """How an item is laid out, and where.

    Attributes:
        option: its number among the item's.
        ranks: the rank of each part.
        shares: of a divisible option, how many of its `divisible` parts each of `ranks` holds; of one with `sharing`, likewise of
            `sharing.parts`, or None for equal shares.
    """

    option: int
    ranks: tuple[int, ...]
    shares: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Score:
    """What a solution comes to.

    Attributes:
        step: seconds.
        loads: `[P, R]` seconds, with everything.
        memory: `[R]` bytes.
    """

    step: float
    loads: Array
    memory: Array


def score(problem: Problem, choices: tuple[Choice, ...]) -> Score:
    """Count a solution from its parts: the definition that search and bound are held to."""
    phases, ranks = len(problem.phases), problem.ranks
    loads, memory = np.zeros((phases, ranks)), np.zeros(ranks)
    used: set[str] = set()
    for item, choice in zip(problem.items, choices, strict=True):
        option = item.options[choice.option]
        held = np.asarray(choice.ranks, dtype=np.intp)
        if option.sharing is not None and choice.shares is not None:
            sharing, weights = option.sharing, np.asarray(choice.shares, dtype=np.float64) / option.sharing.parts
            parts, bytes_ = sharing.loads(weights), sharing.memory(weights)
            more = sharing.beyond_even(weights, option.parts)
            loads += (sharing.common_answer * more)[:, None]
            memory += sharing.memory_common * more
        elif option.divisible:
            weights = np.asarray(choice.shares, dtype=np.float64) / option.divisible
            parts, bytes_ = weights[:, None] * option.loads, weights * option.memory[0]
        else:
            parts, bytes_ = option.loads, option.memory
        np.add.at(loads.T, held, parts)
        np.add.at(memory, held, bytes_)
        loads += option.common[:, None]
        memory += option.common_memory
        used |= option.charges
    for name in sorted(used):
        loads += problem.charges[name][:, None]
        memory += problem.charge_memory.get(name, 0.0)
    if problem.base is not None:
        loads += problem.base[:, None]
    return Score(float(loads.max(1).sum()), loads, memory)
