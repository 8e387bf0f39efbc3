"""Every row of clicks is for training, for validation or for the test, and for one of them alone, however it is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from shardembed.comm.comm import Comm
from shardembed.errors import DataError
from shardembed.recipes import logistic
from shardembed.recipes.click_task import CtrTask
from shardembed.recipes.ctr_config import CtrConfig, CtrDataConfig
from shardembed.recipes.data.clicks.rows import Clicks, concatenate
from shardembed.recipes.data.clicks.scan import ClickData, scan
from shardembed.recipes.data.stream import rank_slice

ROWS, FRACTION = 400, 0.2
TIMES = np.random.default_rng(3).integers(40, size=ROWS)
FEATURES = ({"name": "number", "kind": "id"}, {"name": "day", "kind": "time"})
KINDS = ("hash", "last", "time")


class Source:
    """Rows that carry their number and a time, in two parts."""

    name, parts = "made up", ("a", "b")

    def __init__(self, chunk: int, first: int = 0) -> None:
        self._chunk, self._first = chunk, first

    def chunks(self, part: int) -> Iterator[Clicks]:
        numbers = np.arange(ROWS)[part * 150 : (ROWS, 150)[part == 0]]
        for start in range(0, len(numbers), self._chunk):
            rows = numbers[start : start + self._chunk]
            labels, none = (rows % 2).astype(np.int8), np.zeros((len(rows), 0), np.float32)
            yield Clicks(labels, none, self._first + rows[:, None], (), TIMES[rows])


def scanned(
    patch: pytest.MonkeyPatch, kind: str, validation: bool, files: bool = False, chunk: int = 17, **split: Any
) -> ClickData:
    sources = Source(chunk), Source(chunk, first=1000) if files else None
    patch.setattr("shardembed.recipes.data.clicks.scan.open_sources", lambda config: sources)
    asked = {"kind": kind, "fraction": FRACTION, "seed": 3, "validation": validation, **split}
    paths = {"path": ("a.csv",), **({"validation_path": ("b.csv",)} if files else {})}
    return scan(CtrDataConfig.model_validate({**paths, "features": FEATURES, "split": asked}), Comm.of())


def numbers_of(batches: list[Clicks]) -> list[int]:
    return [number for batch in batches for number in batch.ids[:, 0].tolist()]


def parts_of(data: ClickData, size: int = 32) -> tuple[list[int], list[int], list[int]]:
    """Row numbers of training, validation and test."""
    validation = numbers_of(list(data.held_batches(size, validation=True))) if data.validates else []
    return numbers_of(list(data.batches(size, 64, 0, 0))), validation, numbers_of(list(data.held_batches(size)))


def latest(fraction: float, rows: list[int]) -> list[int]:
    """That share of all rows, of `rows` the latest, and those of the moment at which these begin."""
    times = np.sort(TIMES[rows])[::-1]
    return [row for row in rows if TIMES[row] >= times[round(fraction * ROWS) - 1]]


def without(rows: list[int]) -> list[int]:
    return sorted(set(range(ROWS)) - set(rows))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_before_the_test_or_others_of_the_hash_are_for_validation(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = scanned(monkeypatch, kind, validation=True)
    training, validation, test = parts_of(data)
    assert sorted([*training, *validation, *test]) == list(range(ROWS)), "each row once"
    assert (len(training), len(validation), len(test)) == (data.training_rows, data.validation_rows, data.test_rows)
    if kind == "last":
        assert (validation, test) == (list(range(240, 320)), list(range(320, 400)))
    elif kind == "time":
        assert test == latest(FRACTION, list(range(ROWS)))
        assert validation == latest(FRACTION, without(test))
        assert max(TIMES[training]) < min(TIMES[validation]) <= max(TIMES[validation]) < min(TIMES[test])
    else:
        assert all(55 < len(part) < 105 for part in (validation, test))
        assert all(min(part) < 40 and max(part) > 360 for part in (validation, test)), "from everywhere"
    alone = scanned(monkeypatch, kind, validation=False)
    kept, none, same = parts_of(alone)
    assert (same, none) == (test, []), "the result is of the same rows without"
    assert sorted(kept) == sorted([*training, *validation])
    assert (alone.validates, alone.validation_rows) == (False, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("validation", [False, True])
def test_files_of_their_own_are_the_test_and_validation_is_of_the_rows_trained_on(
    kind: str, validation: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, held, test = parts_of(scanned(monkeypatch, kind, validation, files=True))
    assert test == [1000 + row for row in range(ROWS)]
    assert sorted([*training, *held]) == list(range(ROWS))
    assert held == (parts_of(scanned(monkeypatch, kind, validation=False))[2] if validation else []), "where the test would be"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("files", [False, True])
def test_parts_do_not_depend_on_how_rows_are_read(kind: str, files: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = parts_of(scanned(monkeypatch, kind, True, files))
    for chunk, size in ((5, 1), (400, 300)):
        data = scanned(monkeypatch, kind, True, files, chunk)
        others = parts_of(data, size)
        assert [sorted(part) for part in others] == [sorted(part) for part in found]
        for validation, held in ((True, others[1]), (False, others[2])):
            batches = list(data.held_batches(size, validation))
            numbers = [some.tolist() for some in data.held_numbers(size, validation)]
            assert numbers == [[row % 1000 for row in numbers_of([one])] for one in batches]
            for ranks in (2, 3):
                assert numbers_of([rank_slice(one, rank, ranks) for one in batches for rank in range(ranks)]) == held


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("files", [False, True])
def test_logistic_regression_is_fitted_on_rows_to_train_on_alone(kind: str, files: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    data = scanned(monkeypatch, kind, True, files)
    sample = logistic._sample(data, Comm.of())
    assert sorted(numbers_of([sample])) == sorted(numbers_of([concatenate(list(data.training()))]))


@pytest.mark.parametrize(
    ("split", "said"),
    [
        ({"kind": "last", "fraction": 0.001}, "of 400 rows none is for validation; make data.split.fraction larger"),
        ({"kind": "time", "fraction": 0.49, "moment": 7}, "all rows are held out, none is left to train on"),
    ],
)
def test_an_empty_part_is_refused(split: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "moment" in split:
        monkeypatch.setattr("tests.unit.recipes.test_click_split.TIMES", np.full(ROWS, split.pop("moment")))
    with pytest.raises(DataError, match=said):
        scanned(monkeypatch, validation=True, **split)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"split": {"fraction": 0.5, "validation": True}}, "fraction 0.5, as the test and for validation, leaves .*below 0.5"),
        ({"split": {"fraction": 1.0}}, "fraction 1 leaves nothing to train on; use one below 1"),
        (
            {"path": ("a",), "validation_path": ("b",), "split": {"fraction": 1.0, "validation": True}},
            "fraction 1 leaves nothing to train on; use one below 1",
        ),
        ({"split": {"fraction": 0.0, "validation": True}}, "with fraction 0 there are no rows for it"),
        ({"split": {"kind": "time", "validation": True}}, "set data.time too"),
    ],
)
def test_settings_that_leave_a_part_empty_are_refused(data: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        CtrDataConfig.model_validate(data)


def test_as_files_alone_are_the_test_the_share_may_be_all_or_nothing() -> None:
    for fraction in (0.0, 1.0):
        CtrDataConfig.model_validate({"path": ("a",), "validation_path": ("b",), "split": {"fraction": fraction}})
    CtrDataConfig.model_validate({"path": ("a",), "validation_path": ("b",), "split": {"fraction": 0.6, "validation": True}})


def test_what_the_data_are_said_to_be_names_all_parts(monkeypatch: pytest.MonkeyPatch) -> None:

    told = {}
    for validation in (False, True):
        data = scanned(monkeypatch, "last", validation)
        task = CtrTask(CtrConfig.model_validate({"data": {"path": ("a.csv",), "features": FEATURES}}), data)
        told[validation] = task.described()[1], task.evaluates(), task.validates
    assert told[False] == ("320 rows to train on, 80 for validation; 50.00% are clicks", "80 rows", False)
    assert told[True] == ("240 rows to train on, 80 for validation, 80 for the test; 50.00% are clicks", "80 rows", True)
