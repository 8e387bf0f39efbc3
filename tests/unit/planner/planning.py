"""Random planning problems that are small enough to count every solution, and the count."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
from hypothesis import strategies as st

from shardembed.planner.problem import Array, Choice, Item, Option, Problem, Sharing

UNIT = 12.0  # bytes: a multiple of every `divisible`, so that sums are exact and memory can be met to the last byte
CHARGES = ("first", "second")
ROUNDING = 1e-9  # relative; unequal shares do not take whole bytes


@dataclass(frozen=True)
class Solutions:
    """All solutions of a problem whatever its capacity: seconds `[n]` of a step, bytes `[n]` of the fullest rank."""

    ways: list[list[Choice]]
    steps: Array
    memory: Array

    def choices(self, number: int) -> tuple[Choice, ...]:
        places = np.unravel_index(number, [len(ways) for ways in self.ways])
        return tuple(ways[int(place)] for ways, place in zip(self.ways, places, strict=True))

    def best(self, capacity: float) -> int | None:
        """Number of the fastest that fits."""
        steps = np.where(self.memory <= capacity, self.steps, np.inf)
        return int(steps.argmin()) if np.isfinite(steps.min()) else None


def enumerated(problem: Problem) -> Solutions:
    """Count every combination of every option of every item, wherever its parts may lie."""
    phases, ranks = len(problem.phases), problem.ranks
    ways = [
        [choice for number in range(len(item.options)) for choice in choices_of(problem, item, number)] for item in problem.items
    ]
    base = np.zeros(phases) if problem.base is None else problem.base
    loads, memory = np.zeros((1, phases, ranks)) + base[:, None], np.zeros((1, ranks))
    used = np.zeros((1, len(problem.charges)), dtype=bool)
    for item, choices in zip(problem.items, ways, strict=True):
        added = [_added(problem, item.options[choice.option], choice) for choice in choices]
        loads, memory, used = (
            (before[:, None] + np.array([one[index] for one in added])[None]).reshape(len(before) * len(added), *before.shape[1:])
            for index, before in enumerate((loads, memory, used))
        )
    for index, (name, seconds) in enumerate(problem.charges.items()):
        loads = loads + used[:, index, None, None] * seconds[:, None]
        memory = memory + used[:, index, None] * problem.charge_memory.get(name, 0.0)
    return Solutions(ways, loads.max(2).sum(1), memory.max(1))


def choices_of(problem: Problem, item: Item, number: int) -> list[Choice]:
    """Every place that an option's parts may take."""
    option, everywhere = item.options[number], range(problem.ranks)
    if option.divisible:
        spread = [
            cut for cut in itertools.product(range(option.divisible + 1), repeat=problem.ranks) if sum(cut) == option.divisible
        ]
        kept = [[(rank, share) for rank, share in enumerate(cut) if share] for cut in spread]
        return [Choice(number, *(tuple(column) for column in zip(*cut, strict=True))) for cut in kept]  # type: ignore[arg-type]
    if option.ranks is not None:
        return [Choice(number, option.ranks)]
    size = problem.ranks_per_node if option.node else problem.ranks
    if option.sharing is not None and option.parts > 1:
        cuts = _cuts(1, option.sharing.parts, option.parts)
        return [Choice(number, ranks, cut) for ranks in itertools.permutations(everywhere, option.parts) for cut in [None, *cuts]]
    nodes = [everywhere[first : first + size] for first in range(0, problem.ranks, size)]
    return [Choice(number, ranks) for node in nodes for ranks in itertools.permutations(node, option.parts)]


def _cuts(least: int, whole: int, parts: int) -> list[tuple[int, ...]]:
    """All ways to write `whole` as a sum of `parts` numbers, none below `least`."""
    return [cut for cut in itertools.product(range(least, whole + 1), repeat=parts) if sum(cut) == whole]


def _added(problem: Problem, option: Option, choice: Choice) -> tuple[Array, Array, Array]:
    loads, memory = np.zeros((problem.ranks, len(problem.phases))), np.zeros(problem.ranks)
    used = np.array([name in option.charges for name in problem.charges], dtype=bool)
    if option.sharing is not None and choice.shares is not None:
        shares = np.array(choice.shares) / option.sharing.parts
        loads[list(choice.ranks)], memory[list(choice.ranks)] = option.sharing.loads(shares), option.sharing.memory(shares)
        more = option.sharing.beyond_even(shares, option.parts)
        common, alike = (
            option.common + more * option.sharing.common_answer,
            option.common_memory + more * option.sharing.memory_common,
        )
        return (loads + common).T, memory + alike, used
    for part, rank in enumerate(choice.ranks):
        share = 1.0 if choice.shares is None else choice.shares[part] / option.divisible
        line = 0 if choice.shares is not None else part
        loads[rank] += share * option.loads[line]
        memory[rank] += share * option.memory[line]
    return (loads + option.common).T, memory + option.common_memory, used


@st.composite
def problems(draw: st.DrawFn, items: int = 3) -> tuple[Problem, Solutions]:
    """Problems of up to `items` items, with a capacity that few solutions, many, all or none keep; and all their solutions."""
    draws = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ranks, phases = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    charges, node = draw(st.integers(0, len(CHARGES))), draw(st.integers(1, ranks))
    found: list[Item] = []
    for number in range(draw(st.integers(1, items))):
        if found and draw(st.integers(0, 3)) == 0:
            options = found[-1].options
        else:
            options = tuple(_option(draw, draws, (ranks, node), phases, charges) for _ in range(draw(st.integers(1, 3))))
            options += _shared(draws, ranks, phases) if draw(st.integers(0, 3)) == 0 else ()
        found.append(Item(f"item {number}", options))
    problem = Problem(
        tuple(f"phase {phase}" for phase in range(phases)),
        ranks,
        np.inf,
        tuple(found),
        {name: _seconds(draws, phases) for name in CHARGES[:charges]},
        {name: UNIT * draws.integers(0, 3) for name in CHARGES[: draw(st.integers(0, charges))]},
        draw(st.sampled_from([None, _seconds(draws, phases)])),
        node,
    )
    every = enumerated(problem)
    held = np.unique(every.memory)
    # From a byte less than any solution needs to as much as any takes.
    tight = draw(st.integers(-1, len(held) - 1))
    capacity = float(held[tight]) * (1 + ROUNDING * has_shares(problem)) if tight >= 0 else float(held[0]) - 1.0
    return replace(problem, capacity=max(capacity, 1.0)), every


def has_shares(problem: Problem) -> bool:
    """Whether some parts may have unequal shares."""
    return any(option.sharing is not None for item in problem.items for option in item.options)


def _seconds(draws: np.random.Generator, *shape: int) -> Array:
    """Few different numbers, some nothing, so that options tie."""
    return np.where(draws.random(shape) < 0.3, 0.0, draws.integers(1, 6, shape) * 10.0 ** -draws.integers(3, 6))


def _shared(draws: np.random.Generator, ranks: int, phases: int) -> tuple[Option, ...]:
    """An item's options with unequal shares, one for each number of parts, as a table packed as bags has them."""
    bags, lengths = draws.integers(1, 50, 2).astype(float), draws.integers(2, 9, 2).astype(float)
    seconds = _seconds(draws, 4, phases)
    sharing = Sharing(
        seconds[0],
        seconds[1] / bags.sum(),
        seconds[2] / bags.sum(),
        UNIT * draws.integers(0, 9),
        UNIT * draws.integers(0, 3) / bags.sum(),
        UNIT * draws.integers(0, 3) / bags.sum(),
        bags,
        lengths,
        int(draws.integers(4, 7)),
    )
    whole = float(sharing.answers(np.ones(1))[0])
    found = []
    for parts in range(1, ranks + 1):
        even = np.full(parts, 1.0 / parts)
        more = float(sharing.answers(even).sum()) - whole
        common, alike = seconds[3] + more * sharing.common_answer, UNIT + more * sharing.memory_common
        found.append(Option("shared", sharing.loads(even), sharing.memory(even), common, alike, sharing=sharing))
    return tuple(found)


def _option(draw: st.DrawFn, draws: np.random.Generator, sizes: tuple[int, int], phases: int, charges: int) -> Option:
    ranks, node = sizes
    kind = draw(st.sampled_from(["parts", "alike", "divisible", "pinned", "node", "copied"]))
    parts = {"divisible": 1, "copied": 0}.get(kind, int(draws.integers(1, (node if kind == "node" else ranks) + 1)))
    loads, memory = _seconds(draws, parts, phases), UNIT * draws.integers(0, 9, parts).astype(np.float64)
    if kind == "alike":
        loads, memory = np.broadcast_to(loads[:1], loads.shape), np.broadcast_to(memory[:1], memory.shape)
    return Option(
        kind,
        loads,
        memory,
        _seconds(draws, phases),
        float(UNIT * draws.integers(0, 4)),
        int(draws.integers(1, 5)) if kind == "divisible" else 0,
        charges=frozenset(name for name in CHARGES[:charges] if draws.random() < 0.5),
        ranks=tuple(draws.integers(0, ranks, parts).tolist()) if kind == "pinned" else None,
        node=kind == "node",
    )
