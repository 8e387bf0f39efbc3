"""Compiles the Triton kernels for a GPU that need not be there, and prints what their machine code does, a JSON line a kernel.

A process of its own, since Triton either interprets or compiles: `python compile_triton.py`, without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from shardembed.kernels.triton import idmap, locate, lookup, order, packing, routing, starting, update
from shardembed.kernels.triton.formulas import FORMULAS, STATES
from shardembed.kernels.triton.tiles import Tile
from shardembed.optim import SGD, TableOptimizer
from tests.unit.kernels.races import races

TARGET = GPUTarget("cuda", 90, 32)
RUNS = {"rows_E": "*i32", "segments_E": "*i32", "starts": "*i32", "piece_starts": "*i64", "count": "*i64"}
FLOATS = ("grads", "partials", "first_state", "second_state", "mean_squares", "out", "weights")
INTEGERS = {"blocks": "*i64", "blocks_count": "i32", "stepped": "i64", "factor": "i64"} | dict.fromkeys(
    [*"abcdefh", "flip", "factor_1", "factor_2"], "i64"
)

BLOCKS = {"BLOCK": 1024, "num_warps": 4}
ARRAYS = (
    "numbers facts sorted_E order_E runs_E counts of_slot ends begins until firsts totals ones lengths sent ids ways blocks rows "
    "order sums there keys_64 places segment_E segments chunks order_S "
    "words others slots_E slots_U keys_E ids_S"
)
NARROW_ARRAYS = "sort_keys bag_E keys_32 sorted_bags bag_S"
SIZES = (
    "slabs total items slots pieces streams runs entries blocks_count ranks kept keys count bags units size halvings "
    "segment_halvings entry_halvings slot_halvings block_halvings bag_halvings"
)
OF_ROUTES = {"rows": "*i64", "starts": "*i64", "segments": "i32", "count": "i32"}


def source_of(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> ASTSource:
    """The kernel with arguments of these types; what they are elsewhere is known here."""
    tile = {name: value for name, value in constants.items() if name != "num_warps"}
    of_arrays = dict.fromkeys(ARRAYS.split(), "*i64") | dict.fromkeys(NARROW_ARRAYS.split(), "*i32")
    types = dict.fromkeys(FLOATS, "*fp32") | of_arrays | dict.fromkeys(SIZES.split(), "i32") | RUNS | INTEGERS | types
    signature = {name: "constexpr" if name in tile else types[name] for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if signature[name].startswith("*")}
    return ASTSource(kernel, signature, constexprs=tile, attrs=aligned)


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], **options: Any) -> None:
    source = source_of(kernel, types, constants)
    found = triton.compile(source, target=TARGET, options={"num_warps": constants["num_warps"], **options})
    code = found.asm["ptx"]
    said = {
        "kernel": f"{kernel.__name__} {getattr(constants.get('FORMULA'), '__name__', '')} {constants.get('WIDTH', '')}",
        "machine_code": len(found.asm["cubin"]) > 0,
        "wide_loads": code.count("ld.global.v4.b32"),
        "wide_stores": code.count("st.global.v4.b32"),
        "atomics": code.count("atom.") + code.count("red.global"),
        "approximate": code.count("div.full") + code.count("sqrt.approx"),
        "fused": code.count("fma."),
        "races": races(str(found.asm["ttgir"])),
    }
    print(json.dumps(said), flush=True)


def constants(width: int, **more: Any) -> dict[str, Any]:
    return Tile.of(width).constants | {"WIDTH": width} | more


def of_kind(kind: type[TableOptimizer]) -> dict[str, Any]:
    first, second = (*kind.state.values(), *[""] * (STATES - len(kind.state)))
    return {"FORMULA": FORMULAS[kind].function, "FIRST": first, "SECOND": second, "ROWWISE": kind.rowwise}


def main() -> None:
    entries = {"rows_E": "*i64", "offsets": "*i64", "scales_E": "*fp32", "segments": "i32"}
    compiled(lookup._lookup, entries, constants(100, SEGMENTS=True, SCALED=True))
    for kernel in (order._number, order._cut_pieces, locate._measure):
        compiled(kernel, {}, BLOCKS)
    for pieces in (False, True):
        compiled(order._cut, {}, BLOCKS | {"PIECES": pieces})
    for kernel in (locate._locate, routing._mark, routing._bound):
        compiled(kernel, OF_ROUTES, BLOCKS)
    compiled(routing._list_bags, OF_ROUTES | {"segments": "*i64"}, BLOCKS)
    compiled(routing._cut, OF_ROUTES, BLOCKS | {"NARROW": True, "WIDE": True})
    compiled(packing._move, {"message": "*i64", "count": "i32"}, BLOCKS | {"UNIT": 8, "PACK": True})
    compiled(packing._move, {"message": "*u8", "count": "i32"}, BLOCKS | {"UNIT": 1, "PACK": False})
    for kernel in (idmap._find_slots, idmap._insert_slots, idmap._erase_slots, idmap._rebuild):
        compiled(kernel, {"count": "i32"}, {"BLOCK": idmap.BLOCK, "num_warps": idmap.WARPS})
    exact = {"enable_fp_fusion": False}
    drawn = {"ids": "*i64", "quantiles": "*fp64", "elements": "i64", "base": "i64", "first_column": "i32", "scale": "i64"}
    for normal in (False, True):
        compiled(starting._draw, drawn | {"offset": "i64"}, BLOCKS | {"WIDTH": 33, "NORMAL": normal}, **exact)
    plain: dict[str, Any] = {"GIVEN": False, "PIECES": True, "HALVINGS": 0}
    for kind in {formula.function: kind for kind, formula in FORMULAS.items()}.values():  # some share one
        compiled(update._update, {}, constants(64, **of_kind(kind), **plain), **exact)
    for dtype in ("*bf16", "*fp16"):
        compiled(update._update, {"weights": dtype}, constants(64, **of_kind(SGD), **(plain | {"HALVINGS": 3})), **exact)


if __name__ == "__main__":
    main()
