"""Compiles the kernels whose code depends on a table's width, as far as layouts go (TTGIR), and prints what `races` finds.

`python compile_races.py sample`, without TRITON_INTERPRET, or another name of `KINDS`; a JSON line a kernel, and `toy` at the end.

A kernel's code depends on the width by the tile (columns, rows and warps) and by what divides it, which decides how many elements
are loaded at a time. So `classes` takes each of these with each formula; `widths` takes each width from 1 to 1,024 once. Options
take turns.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from itertools import count, product
from typing import Any

import triton
import triton.language as tl
from triton.compiler.compiler import ir, make_backend

from shardembed.kernels.triton import lookup, merge, sums, update
from shardembed.kernels.triton.formulas import FORMULAS
from shardembed.kernels.triton.tiles import Tile
from shardembed.optim import RowwiseAdagrad, TableOptimizer
from tests.unit.kernels.compile_triton import TARGET, constants, of_kind, source_of
from tests.unit.kernels.races import races

MOST = 1024
Case = tuple[Any, dict[str, str], dict[str, Any]]
# Of the table, and of what is computed with; whether it is rounded at random.
DTYPES = (
    ("fp32", "fp32", 0),
    ("bf16", "fp32", 0),
    ("bf16", "fp32", 3),
    ("fp64", "fp64", 0),
    ("fp16", "fp32", 3),
    ("fp16", "fp32", 0),
)
SAMPLE = (1, 7, 16, 64, 100, 256, 1000, 1024)


def class_of(width: int) -> tuple[Tile, int, bool]:
    tile = Tile.of(width)
    return tile, min(16, width & -width), width == tile.columns


def classes() -> list[int]:
    """A width of each."""
    return list({class_of(width): width for width in range(MOST, 0, -1)}.values())


def formulas() -> list[tuple[type[TableOptimizer], bool]]:
    """One optimizer a formula, and whether the mean square is given."""
    kinds = {formula.function: kind for kind, formula in FORMULAS.items()}.values()
    return [(kind, given) for kind in kinds for given in ((False, True) if kind.rowwise else (False,))]


def of_update(width: int, kind: type[TableOptimizer], given: bool, turn: int) -> Case:
    table, compute, rounded = DTYPES[turn % len(DTYPES)]
    types = dict.fromkeys(("grads", "partials", "first_state", "second_state", "mean_squares"), f"*{compute}")
    chosen = {"GIVEN": given, "PIECES": turn % 2 == 1, "HALVINGS": rounded}
    return update._update, types | {"weights": f"*{table}"}, constants(width, **of_kind(kind), **chosen)


def of_others(width: int, turn: int) -> Iterator[Case]:
    table, compute, _ = DTYPES[turn % len(DTYPES)]
    sum_types: dict[str, str] = dict.fromkeys(("grads", "partials", "out"), f"*{compute}")
    yield merge._merge, sum_types, constants(width, PIECES=turn % 2 == 0)
    yield sums._sum_pieces, sum_types | {"begins": "*i64", "ends": "*i64"}, constants(width)
    entries = {"rows_E": "*i64", "offsets": "*i64", "scales_E": f"*{compute}", "segments": "i32", "weights": f"*{table}"}
    segments, scaled = turn % 3 > 0, turn % 3 > 1
    out = f"*{compute if segments or scaled else table}"
    yield lookup._lookup, entries | {"out": out}, constants(width, SEGMENTS=segments, SCALED=scaled)


def each_class() -> Iterator[Case]:
    turns = count()
    for width, (kind, given) in product(classes(), formulas()):
        yield of_update(width, kind, given, next(turns))
        yield of_update(width, kind, given, next(turns) + 3)
    for turn, width in enumerate(classes()):
        yield from of_others(width, turn)


def each_width() -> Iterator[Case]:
    for width in range(1, MOST + 1):
        kind, given = formulas()[width % len(formulas())]
        yield of_update(width, kind, given, width // len(formulas()))


def a_sample() -> Iterator[Case]:
    for turn, width in enumerate(SAMPLE):
        kind, given = formulas()[turn % len(formulas())]
        yield of_update(width, kind, given, turn)
        yield of_update(width, RowwiseAdagrad, turn % 2 == 0, turn + 1)
    yield from of_others(64, 2)


KINDS: dict[str, Callable[[], Iterator[Case]]] = {"sample": a_sample, "classes": each_class, "widths": each_width}


@triton.jit
def toy(state, out, grads, WIDTH: tl.constexpr, MANY: tl.constexpr, BARRIER: tl.constexpr):
    """What the update does to one number a row."""
    rows, columns = tl.arange(0, MANY), tl.arange(0, WIDTH)
    total = tl.load(state + rows) + 1.0
    at = rows[:, None] * WIDTH + columns[None, :]
    new = tl.load(grads + at) * total[:, None]
    if BARRIER:
        tl.debug_barrier()
    tl.store(state + rows, total)
    tl.store(out + at, new)


def layouts_of(case: Case) -> str:
    """The compiled kernel, before it becomes machine code."""
    kernel, types, chosen = case
    source: Any = source_of(kernel, types, chosen)
    backend: Any = make_backend(TARGET)
    options = backend.parse_options({"num_warps": chosen["num_warps"], "enable_fp_fusion": False})
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    module = source.make_ir(TARGET, options, functions, modules, context)
    for stage in ("ttir", "ttgir"):
        module = stages[stage](module, {})
    return str(module)


def main() -> None:
    for case in KINDS[sys.argv[1]]():
        kernel, types, chosen = case
        told = {name: getattr(value, "__name__", value) for name, value in chosen.items()}
        said = {"kernel": kernel.__name__, "chosen": told, "weights": types.get("weights"), "races": races(layouts_of(case))}
        print(json.dumps(said), flush=True)
    for barrier in (False, True):
        case = toy, {"state": "*fp32"}, {"WIDTH": 64, "MANY": 8, "BARRIER": barrier, "num_warps": 2}
        print(json.dumps({"kernel": "toy", "barrier": barrier, "races": races(layouts_of(case))}), flush=True)


if __name__ == "__main__":
    main()
