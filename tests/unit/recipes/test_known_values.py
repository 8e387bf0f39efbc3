"""Which rows say what is known of users and items: none that could tell what is asked."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from shardembed.recipes.config import Config, DataConfig
from shardembed.recipes.tasks import _scanned


def config(path: Path) -> DataConfig:
    features = ({"name": "hint", "kind": "number", "of": "user"}, {"name": "price", "kind": "number", "of": "item"})
    data = {
        "path": str(path),
        "user": "user",
        "item": "item",
        "time": "at",
        "split": "last",
        "ids": "numbered",
        "features": features,
    }
    return Config.model_validate({"data": data}).data


def test_a_value_that_only_held_out_rows_have_is_not_known(tmp_path: Path) -> None:
    path = tmp_path / "views.csv"
    lines = [
        "user,item,at,hint,price",
        "0,0,1,,",
        "0,1,2,5,7",  # held out: user 0 has no hint in training, and item 1 a price
        "1,1,1,3,4",
        "1,0,2,9,8",  # held out: the hint of user 1 stays 3, and item 0 has no price
        "2,2,1,,",
        "2,3,2,6,2",  # held out, and the only row of item 3
    ]
    path.write_text("\n".join(lines) + "\n")
    known = _scanned(config(path)).known
    np.testing.assert_array_equal(known.users.values[0], [np.nan, 3, np.nan])
    np.testing.assert_array_equal(known.items.values[0], [np.nan, 4, np.nan, 2])
