"""What splits hold out, and which values of features count, against what their words say."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from shardembed.errors import DataError
from shardembed.inputs.hash64 import hash64
from shardembed.recipes.config import DataConfig
from shardembed.recipes.data.choose import open_numbered
from shardembed.recipes.data.describe import with_features
from shardembed.recipes.data.held import TEST, TRAINING, VALIDATION, how_many, labels
from shardembed.recipes.data.interactions import Interactions, scan
from shardembed.recipes.data.lists import Lists
from shardembed.recipes.data.sides import Gathering
from shardembed.recipes.data.wanted import MISSING
from shardembed.recipes.features_config import FeatureConfig
from shardembed.recipes.split_config import RankingSplitConfig

ROWS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), min_size=1, max_size=60)  # users and times
SHARES = st.sampled_from([0.1, 0.25, 1 / 3, 0.45])


def split_of(**settings: Any) -> RankingSplitConfig:
    return RankingSplitConfig(**settings)


@given(ROWS, SHARES, st.booleans())
def test_fractions_of_a_user_are_those_of_recbole(rows: list[tuple[int, int]], share: float, validates: bool) -> None:
    counts = np.bincount([user for user, _ in rows])
    test, validation = how_many(counts, split_of(kind="ratio", share=share, validation=validates))
    parts = [share] * (1 + validates)
    for count, found in zip(counts.tolist(), zip(test.tolist(), validation.tolist(), strict=True), strict=True):
        sizes = [0, *(int(part * count) for part in parts)]  # as RecBole 1.2.1 counts them, in other words
        sizes[0] = count - sum(sizes)
        for place in range(len(parts), 0, -1):
            if sizes[0] > 1 and 0 < share * count < 1:
                sizes[place] += 1
                sizes[0] -= 1
        assert found == (sizes[-1], sizes[1] if validates else 0)
        assert sizes[0] > 0 or not count


@given(ROWS, st.sampled_from(["leave_one_out", "last"]), st.booleans())
def test_one_of_each_user_is_held_out_and_before_it_one_more(rows: list[tuple[int, int]], kind: str, validates: bool) -> None:
    users, keys = (np.array(column) for column in zip(*rows, strict=True))
    found = labels(users, [keys], split_of(kind=kind, validation=validates), "rows")
    for user, count in Counter(users.tolist()).items():
        mine = sorted(np.flatnonzero(users == user), key=lambda row: (keys[row], row))
        expected = [TRAINING] * count
        if count > 1:
            expected[-1] = TEST
        if count > 2 and validates:
            expected[-2] = VALIDATION
        assert found[mine].tolist() == expected


@given(ROWS, SHARES, st.booleans())
def test_moments_part_the_parts_and_none_is_cut(rows: list[tuple[int, int]], share: float, validates: bool) -> None:
    users, times = (np.array(column) for column in zip(*rows, strict=True))
    split = split_of(kind="time", share=share, validation=validates)
    if (times == times.max()).sum() > int(share * len(rows)):
        with pytest.raises(DataError, match=r"all of one moment|none to train on"):
            labels(users, [times], split, "rows")
        return
    found = labels(users, [times], split, "rows")
    moments = [set(times[found == label].tolist()) for label in (TRAINING, VALIDATION, TEST)]
    present = [each for each in moments if each]
    assert all(max(before) < min(after) for before, after in pairwise(present))
    assert all((found == label).sum() <= int(share * len(rows)) for label in (VALIDATION, TEST))
    assert moments[0]
    assert moments[2]
    assert validates or not moments[1]


def test_two_shares_that_are_more_than_all_leave_none_to_train_on() -> None:
    users, times = np.zeros(10, np.int64), np.arange(10)
    for kind in ("time", "ratio"):
        with pytest.raises(DataError, match="holds all interactions out, and leaves none to train on"):
            labels(users, [times], split_of(kind=kind, share=0.6, validation=True), "x")


def test_a_moment_may_be_given_as_a_number_or_a_date() -> None:
    users, times = np.zeros(6, np.int64), np.arange(6) * 86_400_000_000  # days since 1970
    assert labels(users, [times], split_of(kind="time", start="1970-01-05"), "x").tolist() == [TRAINING] * 4 + [TEST] * 2
    assert labels(users, [times // 86_400_000_000], split_of(kind="time", start=3), "x").tolist() == [TRAINING] * 3 + [TEST] * 3
    with pytest.raises(DataError, match="no interaction is at 1971-01-01 or later; is the unit of time the same"):
        labels(users, [times], split_of(kind="time", start="1971-01-01"), "x")
    with pytest.raises(DataError, match="holds all interactions out, and leaves none to train on"):
        labels(users, [times], split_of(kind="time", start=-1), "x")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "ratio"}, "ratio needs 'share'"),
        ({"kind": "time"}, "time needs one of 'share' and 'start'"),
        ({"kind": "time", "share": 0.1, "start": 5}, "time needs one of 'share' and 'start'"),
        ({"kind": "time", "start": "noon"}, "'noon' is no ISO 8601 date"),
        ({"kind": "time", "start": 5, "validation": True}, "give 'share' rather than 'start'"),
        ({"kind": "last", "share": 0.1}, "share"),
    ],
)
def test_splits_that_say_too_much_or_too_little_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        split_of(**settings)


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(-1, 3), st.lists(st.integers(0, 9), max_size=3)), max_size=40),
    st.integers(1, 9),
)
def test_the_last_value_that_is_there_counts(rows: list[tuple[int, int, list[int]]], size: int) -> None:
    features = [FeatureConfig(name=name, kind=kind, of="item") for name, kind in (("a", "id"), ("b", "ids"), ("c", "number"))]  # type: ignore[arg-type]
    gathering = Gathering(features, 5)
    expected: list[list[Any]] = [[MISSING, [], np.nan] for _ in range(5)]
    for first in range(0, len(rows), size):
        part = rows[first : first + size]
        flat = np.array([one for _, _, each in part for one in each], np.int64)
        lists = Lists(flat, np.array([len(each) for *_, each in part], np.int64))
        ids = np.array([MISSING if value < 0 else value for _, value, _ in part], np.int64)
        numbers = np.array([np.nan if value < 0 else value / 2 for _, value, _ in part], np.float32)
        gathering.see(np.array([number for number, *_ in part], np.int64), [ids, lists, numbers])
    for number, value, each in rows:
        if value >= 0:
            expected[number][0], expected[number][2] = value, value / 2
        if each:
            expected[number][1] = each
    side = gathering.side()
    a, b, c = side.values
    assert isinstance(b, Lists)
    starts = np.cumsum(b.lengths) - b.lengths
    found = [b.values[start : start + length].tolist() for start, length in zip(starts, b.lengths, strict=True)]
    assert (a.tolist(), found) == ([each[0] for each in expected], [each[1] for each in expected])  # type: ignore[union-attr]
    np.testing.assert_array_equal(c, [each[2] for each in expected])


def described(path: Path, **settings: Any) -> Interactions:
    config = DataConfig.model_validate({"path": str(path), **settings})
    source, ids = open_numbered(config)
    return with_features(scan(source, config.holdout_seed, ids, config.split), config)


def test_held_out_rows_tell_only_what_no_other_tells(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    rows = {
        "user_id": ["a", "a", "b", "b", "c"],
        "item_id": ["x", "y", "x", "z", "x"],
        "mood": ["sad", "glad", "mad", "wild", None],
    }
    parquet.write_table(pa.table(rows), path)
    data = described(path, split={"kind": "last"}, features=({"name": "mood", "kind": "id", "of": "item"},))
    assert data.held_rows.tolist() == [1, 3]
    assert data.ids is not None
    moods = dict(zip(data.ids.items.tolist(), data.known.items.values[0].tolist(), strict=True))  # type: ignore[union-attr]
    x, y, z = hash64(["x", "y", "z"]).tolist()
    sad, glad, mad, wild = hash64(["sad", "glad", "mad", "wild"]).tolist()
    assert moods == {x: mad, y: glad, z: wild}, "of y and z only held-out rows say anything"
    sides = described(path, split={"kind": "last"}, features=({"name": "mood", "kind": "id", "of": "user"},))
    assert set(sides.known.users.values[0].tolist()) == {sad, mad, MISSING}, "of a and b training says something"  # type: ignore[union-attr]


def test_a_file_of_items_that_changes_meanwhile_is_told(tmp_path: Path) -> None:
    path, items = tmp_path / "rows.csv", tmp_path / "items.csv"
    path.write_text("user_id,item_id\n0,1\n0,2\n1,1\n1,3\n")
    items.write_text("item_id,price\n1,2.5\n")
    features = ({"name": "price", "kind": "number", "of": "item"},)
    config = DataConfig.model_validate({"path": str(path), "items": str(items), "features": features})
    source, ids = open_numbered(config)
    items.write_text("item_id,price\n1,2.5\n9,99\n")
    with pytest.raises(DataError, match=r"items\.csv: there are other ids in it than when it was first read"):
        with_features(scan(source, 0, ids), config)


@pytest.mark.parametrize("ids", ["numbered", "dynamic"])
def test_items_that_only_their_file_has_are_there_too(tmp_path: Path, ids: str) -> None:
    path, items = tmp_path / "rows.csv", tmp_path / "items.csv"
    path.write_text("user_id,item_id\n0,1\n0,2\n1,1\n1,3\n")
    items.write_text("item_id,genre,price\n1,7,2.5\n5,8,\n3,,4\n5,9,1\n")
    features = ({"name": "genre", "kind": "id", "of": "item"}, {"name": "price", "kind": "number", "of": "item"})
    data = described(path, ids=ids, items=str(items), features=features)
    known = list(range(6)) if ids == "numbered" else [1, 2, 3, 5]
    assert (data.users, data.items, len(data.item_counts)) == (2, len(known), len(known))
    assert ids == "numbered" or data.ids.items.tolist() == known  # type: ignore[union-attr]
    genres = {1: 7, 5: 9}
    assert data.known.items.values[0].tolist() == [genres.get(item, MISSING) for item in known]  # type: ignore[union-attr]
    prices = {1: 2.5, 3: 4.0, 5: 1.0}
    np.testing.assert_array_equal(data.known.items.values[1], np.array([prices.get(item, np.nan) for item in known], np.float32))
