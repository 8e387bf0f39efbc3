"""How ids become rows, of which a job and the run that it begins from must say the same; and what of a checkpoint goes where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import shardembed as se
from shardembed.checkpoint.format.blocks import Entry
from shardembed.checkpoint.inventory import Item
from shardembed.errors import ConfigError
from shardembed.recipes import config
from shardembed.recipes.carrying import Carried, carried
from shardembed.recipes.former import Former, check_rows, row_rules

TAGS = {"name": "ids", "kind": "ids", "of": "item"}
PRICE = {"name": "price", "kind": "number", "of": "item", "buckets": [1.0, 2.5]}


@pytest.mark.parametrize(
    ("values", "rules"),
    [
        ({"data": {}}, {"user": "numbers of rows", "item": "numbers of rows"}),
        ({"data": {"path": "a.csv", "ids": "numbered"}}, {"user": "numbers of rows", "item": "numbers of rows"}),
        (
            {"data": {"path": "a.csv", "user": "who", "texts": ["who"], "features": [TAGS, PRICE]}},
            {"user": "any ids, read as texts", "item": "any ids", "ids": "any ids", "price": "numbers between the edges 1.0, 2.5"},
        ),
        ({"model": {"kind": "sasrec"}, "data": {"path": "a.csv", "texts": ["user_id"]}}, {"item": "any ids"}),
        (
            {
                "model": {"kind": "dlrm"},
                "data": {"categories": ["C1", "C2"], "ids": {"kind": "hash", "tables": {"C2": 7}, "seed": 3}},
            },
            {"C1": "hashed into 10,000 rows with seed 3", "C2": "hashed into 7 rows with seed 3"},
        ),
        (
            {"model": {"kind": "dlrm"}, "data": {"categories": ["C1"], "ids": {"kind": "vocabulary"}}},
            {"C1": "those of a vocabulary"},
        ),
    ],
)
def test_how_ids_become_rows(values: dict[str, Any], rules: dict[str, str]) -> None:
    assert row_rules(config.given(values)) == rules


def test_a_numbered_feature_cannot_grow() -> None:
    """Its last row is that of missing ids."""
    values = {"data": {"path": "a.csv", "ids": "numbered", "features": [{"name": "shop", "kind": "id", "of": "user"}]}}
    job = config.given(values)
    former = Former(Path("runs/one"), Path("runs/one/checkpoints/step-1"), 1, "abc", job, {"user": 5, "item": 5, "shop": 4})
    check_rows(former, job, [se.TableConfig("user", 9, 2), se.TableConfig("shop", 4, 2), se.TableConfig("new", 3, 2)])
    with pytest.raises(ConfigError, match="the feature 'shop' had 4 rows in runs/one and has 5 here"):
        check_rows(former, job, [se.TableConfig("shop", 5, 2)])


def entry(key: str, kind: str, shape: tuple[int, ...], of: str = "") -> Entry:
    return Entry(key, kind, of or key, shape, torch.float32, ())  # type: ignore[arg-type]


def item(key: str, kind: str, shape: tuple[int, ...], of: str = "") -> Item:
    return Item(key, kind, of or key, shape, torch.float32, ())  # type: ignore[arg-type]


def test_what_goes_where() -> None:
    there = [
        entry("tables.a.weight", "table", (5, 2)),
        entry("tables.a.weight.sum", "table_state", (5,), "tables.a.weight"),
        entry("tables.gone.weight", "table", (5, 2)),
        entry("top.weight", "dense", (3, 4)),
        entry("top.bias", "dense", (3,)),
        entry("old.bias", "dense", (3,)),
        entry("tables.d.weight", "table", (9, 2)),
        entry("tables.d.weight.ids.count", "table_ids", (9,), "tables.d.weight"),
    ]
    here = [
        item("tables.a.weight", "table", (8, 2)),
        item("tables.a.weight.sum", "table_state", (8,), "tables.a.weight"),
        item("tables.b.weight", "table", (4, 2)),
        item("top.weight", "dense", (3, 6)),
        item("top.bias", "dense", (3,)),
        item("tables.d.weight", "table", (9, 2)),
        item("tables.d.weight.ids.last", "table_ids", (9,), "tables.d.weight"),
    ]
    found = carried({one.key: one for one in there}, {one.key: one for one in here})
    assert found == Carried(
        grown=("tables.a.weight",),
        fresh=("tables.b.weight",),
        reshaped=("top.weight",),
        left_out=("tables.gone.weight", "old.bias"),
        lists=(("tables.d.weight.ids.last",), ("tables.d.weight.ids.count",)),
    )
    assert not found.whole
    assert carried({one.key: one for one in there[:2]}, {one.key: one for one in here[:2]}).whole
    options = found.as_options()
    assert options["rename"] == {"top.weight": "(gone).top.weight"}
    assert "(gone).top.weight" in options["dropped"]
    assert "top.weight" in options["new"]
