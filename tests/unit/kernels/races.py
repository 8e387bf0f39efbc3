"""What threads of a program can do in the wrong order: memory that one has loaded late and another has stored into by then.

Triton hands out the elements of a tensor to the threads of a program, and a layout says which thread has which. Where it has an
element in several threads, each of them loads it, and one stores it; and a load may be made twice, for two layouts. Nothing but a
barrier keeps the one that stores from being ahead of those that load. This reads a compiled kernel (TTGIR, in which layouts and
barriers are written down) and tells each pair of a load and a store of the same memory that nothing keeps in order.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod

SAME_POINTER = re.compile(r"(%\S+) = (?:tt\.(?:splat|addptr|broadcast|expand_dims|reshape|bitcast)|ttg\.convert_layout) (%\w+)")
OF_NUMBERS = re.compile(r"(%\S+) = tt\.int_to_ptr ")
ACCESS = re.compile(r"tt\.(load|store) (%\w+).* : (?:tensor<([\dx]+)x!tt\.ptr<\w+>, (.+?)>|!tt\.ptr<\w+>) loc\(")
ATOMIC = re.compile(r"tt\.(atomic_rmw) max, \w+, \w+, (%\w+), .* : \(tensor<([\dx]+)x!tt\.ptr<\w+>, (.+?)>,")
LAYOUT = re.compile(r"(#\w+) = (#ttg\.\w+<.*>)$")
ARGUMENT = re.compile(r"(%\w+): !tt\.ptr")
BARRIER = re.compile(r"\b(?:ttg|gpu)\.barrier\b")
SLICE = re.compile(r"#ttg\.slice<\{dim = (\d+), parent = (.*)\}>$")
ADDRESSES = "addresses"  # memory that a kernel knows by numbers


@dataclass(frozen=True)
class Access:
    """A load, a store, or an atomic maximum, which counts as a store.

    Attributes:
        line: of the code.
        depth: how deep it is in loops and branches.
        memory: the argument that it goes into.
        pointer: the value.
        layout: of the pointers, with aliases written out; empty where there is one pointer for all.
        alone: no element is in two threads.
    """

    line: int
    depth: int
    memory: str
    pointer: str
    layout: str
    alone: bool


def races(code: str) -> list[str]:
    """Pairs of a load and a store that nothing keeps in order, in words; none where all is well.

    The same thread does both where both go by one pointer in one layout that has each element once. A store at the end of a loop's
    body and a load in the next round are not looked at: every kernel goes on to other rows.
    """
    loads, stores, barriers = _read(code)
    found = []
    for store in stores:
        for load in loads:
            if load.memory != store.memory or (load.pointer == store.pointer and load.alone and store.alone):
                continue
            first, second = sorted((load, store), key=lambda access: access.line)
            depth = min(first.depth, second.depth)
            if not any(first.line < line < second.line and deep <= depth for line, deep in barriers):
                found.append(f"{store.memory}: loaded in line {load.line} ({load.layout}), stored in {store.line} ({store.layout})")
    return found


def _read(code: str) -> tuple[list[Access], list[Access], list[tuple[int, int]]]:
    memory: dict[str, str] = {}
    layouts: dict[str, str] = {}
    loads: list[Access] = []
    stores: list[Access] = []
    barriers: list[tuple[int, int]] = []
    for line, text in enumerate(code.splitlines(), 1):
        depth = len(text) - len(text.lstrip())
        if match := LAYOUT.match(text):
            layouts[match[1]] = match[2]
        elif "tt.func" in text:
            memory |= {name: name for name in ARGUMENT.findall(text)}
        elif match := OF_NUMBERS.search(text):
            memory[match[1]] = ADDRESSES
        elif (match := SAME_POINTER.search(text)) and match[2] in memory:
            memory[match[1]] = memory[match[2]]
        elif match := ACCESS.search(text) or ATOMIC.search(text):
            kind, pointer, shape, named = match.groups()
            layout = _written_out(named, layouts) if named else ""
            sizes = [int(size) for size in shape.split("x")] if shape else []
            access = Access(line, depth, memory[pointer], pointer, layout, bool(layout) and alone(layout, sizes))
            assert access.alone or kind != "atomic_rmw", f"line {line}: several threads make one change: {text}"
            (loads if kind == "load" else stores).append(access)
        elif BARRIER.search(text):
            barriers.append((line, depth))
        elif "= tt.load" in text or "tt.store " in text or "!tt.ptr" in text.partition("iter_args")[2] or "tt.atomic" in text:
            raise ValueError(f"line {line} is not understood: {text}")
    assert loads, "a kernel that reads nothing"
    assert stores, "a kernel that does nothing"
    return loads, stores, barriers


def _written_out(named: str, layouts: dict[str, str]) -> str:
    return re.sub(r"#(?!ttg\b)\w+", lambda match: layouts[match[0]], named)


def alone(layout: str, sizes: list[int]) -> bool:
    """Whether a layout has each element of a tensor of these sizes in one thread."""
    if match := SLICE.match(layout):  # what the other threads along this dimension have is the same
        dim, parent = int(match[1]), match[2]
        return _threads(parent, dim) == 1 and alone(parent, [*sizes[:dim], 1, *sizes[dim:]])
    if layout.startswith("#ttg.blocked"):
        per_thread = _numbers(layout, "sizePerThread")
        threads = [_threads(layout, dim) for dim in range(len(sizes))]
        return all(one == 1 or one * each <= size for one, each, size in zip(threads, per_thread, sizes, strict=True))
    if layout.startswith("#ttg.linear"):
        bases = [basis for name in ("lane", "warp") for basis in _bases(layout, name)]
        return all(any(basis) for basis in bases)
    return False


def _threads(layout: str, dim: int) -> int:
    if not layout.startswith("#ttg.blocked"):
        return 0  # not known, and no product with it is 1
    return prod(_numbers(layout, name)[dim] for name in ("threadsPerWarp", "warpsPerCTA"))


def _numbers(layout: str, name: str) -> list[int]:
    match = re.search(rf"{name} = \[([\d, ]+)\]", layout)
    assert match, f"{layout} does not say {name}"
    return [int(number) for number in match[1].split(",")]


def _bases(layout: str, name: str) -> list[list[int]]:
    match = re.search(rf"{name} = \[((?:\[[\d, ]+\](?:, )?)*)\]", layout)
    assert match, f"{layout} does not say {name}"
    return [[int(number) for number in basis.split(",")] for basis in re.findall(r"\[([\d, ]+)\]", match[1])]
