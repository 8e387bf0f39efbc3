"""Clicks with any columns: what is read of them, how they are split, and what a model takes of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import csv, parquet
from pydantic import ValidationError

from shardembed.comm.comm import Comm
from shardembed.errors import DataError
from shardembed.inputs.hash64 import hash64
from shardembed.inputs.hashing import Hashing
from shardembed.recipes.click_task import CtrTask
from shardembed.recipes.ctr_config import CtrConfig, CtrDataConfig, CtrModelConfig
from shardembed.recipes.data.clicks.encode import Encoder
from shardembed.recipes.data.clicks.moments import Moments
from shardembed.recipes.data.clicks.rows import Clicks, concatenate
from shardembed.recipes.data.clicks.scan import scan
from shardembed.recipes.data.clicks.sources import open_files
from shardembed.recipes.data.fingerprint import Fingerprint
from shardembed.recipes.data.lists import Lists
from shardembed.recipes.data.wanted import MISSING

FEATURES = (
    {"name": "shop", "kind": "id"},
    {"name": "price", "kind": "number", "scale": "log"},
    {"name": "tags", "kind": "ids", "separator": "|", "pooling": "sum"},
    {"name": "age", "kind": "number", "buckets": (0.7, 30.0)},
    {"name": "day", "kind": "time"},
    {"name": "zone", "kind": "id"},
    {"name": "off", "kind": "number", "scale": "raw"},
)
TABLE = {
    "label": [1, 0, 1, 0],
    "shop": ["a", "b", None, "a"],
    "price": [1.0, -3.0, None, 0.0],
    "tags": ["x|y", "", "y", "z|x|x"],
    "age": [0.7, 29.5, None, 30.0],
    "day": [4, 1, 2, 4],
    "zone": [7, -1, 7, None],
    "off": [0.5, 1.5, None, -2.5],
}


def config(path: Path, **values: Any) -> CtrDataConfig:
    return CtrDataConfig.model_validate({"path": (str(path),), "features": FEATURES, **values})


@pytest.fixture(params=["clicks.csv", "clicks.parquet"])
def file(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    table, path = pa.table(TABLE), tmp_path / request.param
    (parquet.write_table if path.suffix == ".parquet" else csv.write_csv)(table, path)
    return path


def rows_of(settings: CtrDataConfig) -> Clicks:
    assert settings.path is not None
    return concatenate([*open_files(settings, settings.path).chunks(0)])


def test_columns_are_read_by_their_names(file: Path) -> None:
    found = rows_of(config(file))
    assert found.labels.tolist() == TABLE["label"]
    np.testing.assert_array_equal(found.numbers[:, 0], np.array([1, -3, np.nan, 0], np.float32))
    assert found.ids[:, 0].tolist() == hash64(TABLE["shop"], null=MISSING).tolist()
    assert found.ids[:, 1].tolist() == [7, -1, 7, MISSING]
    assert found.lists[0].lengths.tolist() == [2, 0, 1, 3]
    assert found.lists[0].values.tolist() == hash64(["x", "y", "y", "z", "x", "x"]).tolist()
    assert found.times is not None
    assert found.times.tolist() == TABLE["day"]


def test_rows_without_a_label_can_be_read_for_scoring(file: Path) -> None:
    settings = config(file)
    assert settings.path is not None
    whole, found = rows_of(settings), concatenate([*open_files(settings, settings.path, labelled=False).chunks(0)])
    assert found.times is None
    assert found.labels.tolist() == [0] * 4
    np.testing.assert_array_equal(found.ids, whole.ids)


def test_dynamic_tables_get_ids_as_they_are_and_numbers_their_scale(file: Path) -> None:
    settings = config(file)
    encoder = Encoder.of(settings)
    batch = encoder.part(rows_of(settings), 1, 2)
    assert (len(batch), batch.first, batch.global_size) == (2, 2, 4)
    assert encoder.sizes == {"shop": 1, "tags": 1, "age": 3, "zone": 1}
    expected = [[0, 0], [0, -2.5]]  # of price and off, where missing ones count as 0
    torch.testing.assert_close(batch.dense, torch.tensor(expected))
    torch.testing.assert_close(encoder(rows_of(settings), 4).dense[1], torch.tensor([-np.log(4), 1.5], dtype=torch.float32))
    assert batch.ids["shop"].tolist() == [MISSING, *hash64(["a"]).tolist()]
    assert batch.ids["age"].tolist() == [0, 2]
    assert encoder(rows_of(settings), 4).ids["age"].tolist() == [1, 1, 0, 2]  # 0.7 is not above an edge of 0.7
    values, offsets = batch.ids["tags"]
    assert (values.tolist(), offsets.tolist()) == (hash64(["y", "z", "x", "x"]).tolist(), [0, 1, 4])


def test_ids_may_be_hashed_or_have_a_vocabulary_that_a_folder_brings_back(file: Path, tmp_path: Path) -> None:
    hashed = config(file, ids={"kind": "hash", "num_embeddings": 50, "tables": {"tags": 60}})
    encoder = Encoder.of(hashed)
    assert encoder.sizes == {"shop": 50, "tags": 60, "age": 3, "zone": 50}
    batch = encoder(rows_of(hashed), 4)
    assert batch.ids["shop"].tolist()[2] == 0
    assert batch.ids["tags"][0].tolist() == Hashing(60, reserved=1)(hash64(["x", "y", "y", "z", "x", "x"])).tolist()

    known = config(file, ids={"kind": "vocabulary"}, split={"fraction": 0.0})
    data = scan(known, Comm.of())
    encoder = Encoder.of(known, data.vocabularies)
    assert encoder.sizes == {"shop": 3, "tags": 4, "age": 3, "zone": 3}
    CtrTask(CtrConfig(data=known), data).save_vocabularies(tmp_path / "kept")
    again = Encoder.stored(known, tmp_path / "kept")
    for name, ids in encoder(rows_of(known), 4).ids.items():
        other = again(rows_of(known), 4).ids[name]
        assert (ids[0] if name == "tags" else ids).tolist() == (other[0] if name == "tags" else other).tolist()
    counts = dict(zip(encoder.sizes, encoder.counts(data.training()), strict=True))
    assert (counts["tags"].sum(), counts["shop"].tolist(), counts["age"].tolist()) == (6, [1, 2, 1], [1, 2, 1])


class Days:
    """A source of rows with a time each, in two parts."""

    name, parts = "days", ("a", "b")

    def __init__(self, times: tuple[list[int], list[int]]) -> None:
        self._times = times

    def chunks(self, part: int) -> Iterator[Clicks]:
        times = np.array(self._times[part])
        for row in range(0, len(times), 2):
            some = times[row : row + 2]
            lists = (Lists(np.repeat(some, 2), np.full(len(some), 2)),)
            yield Clicks((some % 2).astype(np.int8), np.zeros((len(some), 0), np.float32), some[:, None], lists, some)


OF_DAYS = ({"name": "shop", "kind": "id"}, {"name": "tags", "kind": "ids"}, {"name": "day", "kind": "time"})


@pytest.mark.parametrize(
    ("fraction", "held"), [(0.0, []), (0.2, [9, 9, 9]), (0.5, [7, 9, 9, 9]), (0.6, [5, 5, 7, 9, 9, 9]), (0.85, None)]
)
def test_the_latest_are_held_out(monkeypatch: pytest.MonkeyPatch, fraction: float, held: list[int] | None) -> None:
    source = Days(([9, 3, 9, 2**60, -(2**62)], [5, 9, 7, 3, 5]))
    expected = [3, 3, 5, 5, 7, 9, 9, 9] if held is None else held
    monkeypatch.setattr("shardembed.recipes.data.clicks.scan.open_sources", lambda config: (source, None))
    split = {"kind": "time", "fraction": fraction}
    data = scan(config(Path("none.parquet"), split=split, features=OF_DAYS), Comm.of())
    found = [time for clicks in data.held_out() for time in clicks.ids[:, 0].tolist()]
    rest = [time for clicks in data.training() for time in clicks.ids[:, 0].tolist()]
    assert sorted(found) == expected + [2**60] * bool(expected)
    assert (len(found), len(rest)) == (data.test_rows, data.training_rows)
    assert len(found) + len(rest) == 10
    numbers = [number for some in data.held_numbers(2) for number in some.tolist()]
    every = [9, 3, 9, 2**60, -(2**62), 5, 9, 7, 3, 5]
    assert [every[number] for number in numbers] == found
    batches = list(data.batches(4, 3, 0, 0))
    assert all((batch.lists[0].values.reshape(-1, 2) == batch.ids).all() for batch in batches)  # lists stay with their rows


def test_rows_of_one_moment_leave_none_to_train_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardembed.recipes.data.clicks.scan.open_sources", lambda config: (Days(([4, 4], [4])), None))
    with pytest.raises(DataError, match="days: rows of one moment stay together; all rows are held out"):
        scan(config(Path("none.parquet"), split={"kind": "time", "fraction": 0.5}, features=OF_DAYS), Comm.of())


def test_a_fingerprint_sees_lists_and_times() -> None:
    def of(values: list[int], lengths: list[int], times: list[int]) -> Fingerprint:
        lists = (Lists(np.array(values), np.array(lengths)),)
        return Fingerprint.of(
            Clicks(np.zeros(2, np.int8), np.zeros((2, 0), np.float32), np.zeros((2, 0), np.int64), lists, np.array(times))
        )

    base, moved = of([1, 2], [1, 1], [0, 0]), of([1, 2], [2, 0], [0, 0])
    assert len({base, moved, of([2, 1], [1, 1], [0, 0]), of([1, 2], [1, 1], [0, 1])}) == 4


def test_moments_of_parts_are_those_of_all() -> None:
    values = np.random.default_rng(0).normal(1e6, [3, 7], (50, 2)).astype(np.float32)
    values[:, 1] = 5
    found = Moments.none(2) + Moments.of(values[:10]) + Moments.of(values[10:10]) + Moments.of(values[10:])
    np.testing.assert_allclose(found.mean, values.mean(0, dtype=np.float64))
    np.testing.assert_allclose(found.deviation, [values[:, 0].std(dtype=np.float64), 1.0])
    again = Moments.from_json(found.to_json())
    assert again.deviation.tolist() == found.deviation.tolist()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"features": ({"name": "a", "kind": "number"},)}, "none of them is an id"),
        ({"features": FEATURES, "categories": ("C1",)}, "they take the place of data.categories"),
        ({"features": FEATURES, "path": None}, "which data.path names"),
        ({"features": (), "time": "day"}, "time: goes with data.features"),
        ({"features": FEATURES, "texts": ("price",)}, "texts: 'price' is no column of ids; those are shop, tags, zone"),
        (
            {
                "features": (*FEATURES, {"name": "u", "kind": "user"}),
            },
            "a column of kind 'user' is of no use",
        ),
        ({"features": ({"name": "a", "kind": "id"},), "split": {"kind": "time"}}, "set data.time too"),
        ({"features": ({"name": "a", "kind": "id", "of": "user"},)}, "'of' is for data of users and items"),
        ({"features": FEATURES, "ids": {"num_embeddings": 5}}, "dynamic takes no 'num_embeddings'"),
        ({"features": FEATURES, "ids": {"tables": {"shops": 5}}}, "there is no table 'shops'; did you mean 'shop'"),
    ],
)
def test_features_that_do_not_fit_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        CtrDataConfig.model_validate({"path": ("a.csv",), **values})


def test_a_wide_model_takes_no_sizes() -> None:
    with pytest.raises(ValidationError, match="wide takes no 'embedding_dim'"):
        CtrModelConfig.model_validate({"kind": "wide", "embedding_dim": 4})
    assert CtrModelConfig(kind="wide").width == 1
