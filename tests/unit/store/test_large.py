"""Tables of more than 2^31 rows, and shards of more than 2^31 elements: owners and keys against Python's integers.

Nothing is allocated: routes need no weights.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch

from shardembed.inputs.ids import IdBatch
from shardembed.journey.route import RoutingTable, make_route
from shardembed.optim import SGD
from shardembed.store.slab_spec import SlabSpec, build_slabs
from shardembed.tables.placement import Cluster, Placement, column_wise, grid, row_wise, table_row_wise, table_wise
from shardembed.tables.plan import resolve
from shardembed.tables.table_config import TableConfig, features_of
from tests.amount import sampled

CPU = torch.device("cpu")
ROWS = 2**33 + 7
WORLD = 3
CUTS: dict[str, Placement] = {
    "blocks": row_wise(strided=False),
    "row_wise": row_wise(),
    "bounds": row_wise(bounds=[2**31 + 1, 2**32 + 5]),
    "grid of blocks": grid(2, [0, 1, 2, 0], strided=False),
    "grid": grid(3, [0, 1, 2]),
    "column_wise": column_wise(),
    "table_wise": table_wise(2),
    "table_row_wise": table_row_wise(0),
}
IDS = sorted(
    {
        0,
        1,
        2,
        3,
        2**31 - 1,
        2**31,
        2**31 + 1,
        2**32 - 1,
        2**32,
        2**32 + 5,
        ROWS // 3,
        ROWS // 3 + 1,
        ROWS // 2,
        2**33,
        ROWS - 2,
        ROWS - 1,
    }
)


def expected(spec: SlabSpec, table: int, row: int) -> list[tuple[int, int]]:
    """(owner, key) of a row in each of the slab's lanes of a table, with `range` and nothing else."""
    found = []
    for lane in spec.lanes:
        if lane.table == table:
            (block,) = [block for block in lane.blocks if row in block.shard.rows]
            found.append((block.shard.ranks[0], block.first_key + block.shard.rows.index(row)))
    return found


@pytest.mark.parametrize(("cut", "packing"), sampled(product(CUTS, ["unique", "bag"])))
def test_owners_and_keys_of_very_many_rows(cut: str, packing: str) -> None:
    # Three tables in one slab, so that keys and positions begin far out.
    tables = tuple(TableConfig(name, ROWS + number, 6) for number, name in enumerate("abc"))
    placement = CUTS[cut]
    plan = resolve(tables, Placement(**{**vars(placement), "packing": packing}), Cluster(WORLD, WORLD))
    specs = build_slabs(tables, plan, [SGD()] * 3)
    routing = RoutingTable.of(tables, (packing,) * 3, specs, 1, WORLD, CPU)
    features = features_of(tables)
    ids = torch.tensor(IDS)
    route = make_route(IdBatch.of({f.name: ids for f in features}, features, CPU), features, routing)
    for spec, slab in zip(specs, route.slabs, strict=True):
        assert slab.keys_E.dtype == torch.int64
        wanted = sorted(place for table in range(3) for row in IDS for place in expected(spec, table, row))
        asked = [(owner, int(key)) for owner, keys in enumerate(slab.keys_E.split(slab.counts[1].tolist())) for key in keys]
        assert sorted(asked) == wanted
        assert max(spec.rows) > 2**31
        assert spec.key_dtype == torch.int64
        assert all(0 <= key < spec.rows[owner] for owner, key in asked)


def test_keys_travel_in_32_bits_for_as_long_as_they_fit() -> None:
    most = 2**31 - 1  # rows; the largest key is one less
    for rows, dtype in [(most, torch.int32), (most + 1, torch.int64)]:
        table = TableConfig("a", rows, 1)
        (spec,) = build_slabs([table], resolve([table], table_wise(0), Cluster(1, 1)), [SGD()])
        assert spec.key_dtype == dtype
    # More than 2^31 elements are not more than 2^31 rows.
    wide = TableConfig("a", 2**26, 64)
    (spec,) = build_slabs([wide], resolve([wide], table_wise(0), Cluster(1, 1)), [SGD()])
    assert (spec.rows, spec.key_dtype) == ((2**26,), torch.int32)


def test_an_id_past_32_bits_is_checked_as_it_is() -> None:
    table = TableConfig("a", ROWS, 1)
    specs = build_slabs([table], resolve([table], row_wise(), Cluster(WORLD, WORLD)), [SGD()])
    routing = RoutingTable.of((table,), ("unique",), specs, 0, WORLD, CPU)
    with pytest.raises(IndexError, match=f"id {ROWS} at position 0 .* 0 to {ROWS - 1}"):
        make_route(IdBatch.of({"a": torch.tensor([ROWS])}, features_of((table,)), CPU), features_of((table,)), routing)
