"""Small state as JSON, names of checkpoints, who saves what, and which entry goes where."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler as schedules

from shardembed.checkpoint import chance, folders, small
from shardembed.checkpoint.codec import decode, encode
from shardembed.checkpoint.format.blocks import Entry
from shardembed.checkpoint.format.strict import loads
from shardembed.checkpoint.inventory import Item, Region
from shardembed.checkpoint.matching import Wishes, match
from shardembed.checkpoint.sharing import parts_of
from shardembed.errors import CheckpointError

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
keys = st.text() | st.integers() | st.booleans() | st.tuples(st.integers(), st.text())
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(keys, inner) | st.sets(st.integers()),
    max_leaves=12,
)


@given(values)
def test_plain_values_come_back_as_they_were(value: Any) -> None:
    text = json.dumps(encode(value, "here"))
    back = decode(loads(text.encode(), "here", floats=True), "here")
    assert back == value
    assert _kinds(back) == _kinds(value)


def _kinds(value: Any) -> Any:
    if isinstance(value, dict):
        return [(_kinds(key), _kinds(one)) for key, one in value.items()]
    return [type(value), *map(_kinds, value)] if isinstance(value, list | tuple) else type(value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_tensors_and_arrays_come_back_to_the_last_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.rand(shape) * 3).to(dtype)
    back = decode(json.loads(json.dumps(encode(tensor, "here"))), "here")
    assert back.dtype == dtype
    assert torch.equal(back, tensor)
    array = decode(encode(np.arange(3, dtype=np.float32), "here"), "here")
    assert array.dtype == np.float32
    assert array.tolist() == [0, 1, 2]


class Colour(IntEnum):
    RED = 3


def test_what_is_almost_plain_becomes_plain() -> None:
    assert encode(Colour.RED, "here") == 3
    assert encode(np.float64(0.5), "here") == 0.5
    assert decode(encode(OrderedDict(a=1), "here"), "here") == {"a": 1}


class Stranger:
    """What no JSON can stand for."""


@pytest.mark.parametrize("value", [Stranger(), print, torch.ones(2).to_sparse(), np.array(["a", None], dtype=object)])
def test_what_would_need_a_pickle_is_refused_with_its_place(value: object) -> None:
    with pytest.raises(CheckpointError, match=r"^state\.inner\[1\]"):
        encode({"inner": [0, value]}, "state")


def test_state_that_is_too_large_or_too_deep_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no small state"):
        encode(torch.empty(20 << 20), "here")
    deep: list[Any] = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(CheckpointError, match="nested"):
        encode(deep, "here")


@pytest.mark.parametrize(
    "value",
    [
        {"!": ["tensor", ["float32", [2], "AAAA"]]},
        {"!": ["tensor", ["float32", [-1], "AAAAAAAA"]]},
        {"!": ["tensor", ["object", [0], ""]]},
        {"!": ["pickle", "gASVAAAA"]},
        {"!": ["bytes", "not base 64!"]},
        {"!": ["dict", [[[1], 2]]]},
        {"!": ["int", "0x" + "f" * 100_000]},
        {"!": 3},
        {"!": ["tensor", ["float32", [1 << 62, 1 << 62], ""]]},
    ],
)
def test_malformed_values_are_refused(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"^here"):
        decode(value, "here")


def test_random_states_are_checked() -> None:
    state = chance.capture()
    chance.restore(json.loads(json.dumps(state)))
    for damaged in ({**state, "torch": state["python"]}, {"torch": state["torch"]}, 3):
        with pytest.raises(CheckpointError, match="random state"):
            chance.restore(damaged)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: schedules.LambdaLR(o, lambda epoch: 1 / (epoch + 1)),
    "MultiStepLR": lambda o: schedules.MultiStepLR(o, [2, 3]),
    "LinearLR": schedules.LinearLR,
    "ExponentialLR": lambda o: schedules.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: schedules.CyclicLR(o, 0.1, 0.2),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, 0.2, total_steps=10),
    "SequentialLR": lambda o: schedules.SequentialLR(o, [schedules.ConstantLR(o), schedules.ExponentialLR(o, 0.9)], [2]),
    "ChainedScheduler": lambda o: schedules.ChainedScheduler([schedules.ConstantLR(o), schedules.ExponentialLR(o, 0.9)]),
    "ReduceLROnPlateau": schedules.ReduceLROnPlateau,
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_schedule_of_torch_goes_on_where_it_was(name: str) -> None:
    def step() -> None:
        first.step()
        schedule.step(*([1.0] if name == "ReduceLROnPlateau" else []))

    first = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1, momentum=0.9)
    schedule = SCHEDULERS[name](first)
    for _ in range(4):
        step()
    saved = json.dumps([encode(schedule.state_dict(), name), encode(first.state_dict(), "optimizer")])
    rates = []
    for _ in range(5):
        step()
        rates.append(first.param_groups[0]["lr"])
    first = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1, momentum=0.9)
    schedule = SCHEDULERS[name](first)
    state, optimizer = decode(json.loads(saved), name)
    first.load_state_dict(optimizer)
    schedule.load_state_dict(state)
    for rate in rates:
        step()
        assert first.param_groups[0]["lr"] == rate


def _small() -> dict[str, Any]:
    optimizer = {"class": None, "groups": [], "tables": {"t": {"optimizer": "SGD", "settings": {"lr": 0.1}}}, "skipped": 0}
    given: dict[str, Any] = {"progress": None, "optimizer": optimizer, "has_optimizer": True, "steps": {"t": 3}, "random": [{}]}
    return {**given, "stateful": {}, "model": {}, "scalars": {}}


def test_small_state_is_checked_as_a_whole() -> None:
    assert small.checked(_small(), "state.json") == _small()
    for change in ({"steps": {"t": -1}}, {"steps": {"t": "3"}}, {"random": []}, {"more": 1}, {"optimizer": None}):
        with pytest.raises(CheckpointError, match=rf"^state\.json: {next(iter(change))}"):
            small.checked({**_small(), **change}, "state.json")
    with pytest.raises(CheckpointError, match=r"^state\.json: the top level"):
        small.checked([], "state.json")


# Names


def test_the_newest_is_the_one_of_the_highest_step_and_generation(tmp_path: Path) -> None:
    names = ["step-0000000002", "step-0000000010", "step-0000000010.2", "step-0000000010.10"]
    for name in [*names, "step-10", ".saving-0000000011-aa", ".removed-step-0000000012-aa", "step-0000000013x"]:
        (tmp_path / name).mkdir()
    (tmp_path / "step-0000000099").write_text("no folder")
    (tmp_path / "step-0000000098").symlink_to(tmp_path / names[0])
    assert [path.name for _, path in folders.checkpoints(tmp_path)] == names
    assert folders.newest_checkpoint(tmp_path) == tmp_path / names[-1]
    assert folders.newest(tmp_path, 2) == tmp_path / names[0]
    assert str(folders.free_name(tmp_path, 10)) == "step-0000000010.11"
    assert str(folders.free_name(tmp_path, 11)) == "step-0000000011"
    assert folders.newest_checkpoint(tmp_path / "nowhere") is None
    assert str(folders.free_name(tmp_path / "nowhere", 0)) == "step-0000000000"


def test_what_is_saved_after_going_back_is_newer_than_what_was_saved_beyond(tmp_path: Path) -> None:
    given = {(10, "step-0000000010"), (20, "step-0000000020"), (5, "step-0000000005-r1"), (20, "step-0000000020-r1")}
    saved = []
    for step in (10, 20, 5, 20, 20, 30, 19, 31):
        name = str(folders.free_name(tmp_path, step))
        (tmp_path / name).mkdir()
        saved.append((step, tmp_path / name))
        assert folders.newest_checkpoint(tmp_path) == tmp_path / name
        assert folders.checkpoints(tmp_path) == saved
    assert {(step, path.name) for step, path in saved[:4]} == given
    assert [path.name for _, path in saved[4:]] == [
        "step-0000000020-r1.1",
        "step-0000000030-r1",
        "step-0000000019-r2",
        "step-0000000031-r2",
    ]
    assert folders.newest(tmp_path, 20) == tmp_path / "step-0000000020-r1.1"


def test_removing_follows_no_links(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("mine")
    root = tmp_path / "root"
    (root / "step-0000000001").mkdir(parents=True)
    os.symlink(tmp_path / "outside", root / "step-0000000001" / "inner")
    os.symlink(tmp_path / "outside", root / ".saving-0000000001-aa")
    for path in (root / "step-0000000001", root / ".saving-0000000001-aa"):
        folders.remove(path)
    assert not os.listdir(root)
    assert (tmp_path / "outside" / "file").read_text() == "mine"


def test_a_folder_of_pickles_is_told_apart_from_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        folders.chosen(tmp_path, None)
    (tmp_path / "model.pt").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"model\.pt, which torch would unpickle; shardembed reads no pickles"):
        folders.chosen(tmp_path, None)


# Who saves what


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 3), st.randoms(use_true_random=False))
def test_what_several_ranks_have_is_saved_once(ranks: int, rows: int, extra: int, chooser: Any) -> None:
    data = torch.arange(rows * 2).view(rows, 2)
    holders = tuple(sorted(chooser.sample(range(ranks + extra), ranks)))
    item = Item(f"key{chooser.random()}", "dense", "key", (rows, 2), torch.int64, (Region(range(rows), range(2), data, holders),))
    whole = torch.full((rows, 2), -1)
    for rank in range(ranks + extra):
        for part in parts_of([item], rank, incremental=False):
            assert rank in holders
            assert (whole[part.rows.start : part.rows.stop] == -1).all()
            whole[part.rows.start : part.rows.stop] = part.data
    assert torch.equal(whole, data)


def test_a_large_copy_is_spread_over_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardembed.checkpoint.sharing.PIECE_BYTES", 64)
    data = torch.zeros(100, 2)
    item = Item("key", "table", "key", (100, 2), torch.float32, (Region(range(0, 200, 2), range(2), data, (0, 1, 2)),))
    parts = [parts_of([item], rank, incremental=False) for rank in range(3)]
    assert sorted(sum(len(part.rows) for part in found) for found in parts) == [33, 33, 34]
    assert sorted(part.rows[0] for found in parts for part in found) == [0, 66, 132]
    assert all(part.rows.step == 2 for found in parts for part in found)


# Which entry goes where


def _entry(key: str, rows: int = 4, dtype: torch.dtype = torch.float32) -> Entry:
    return Entry(key, "table", key, (rows, 2), dtype)


def _item(key: str, rows: int = 4) -> Item:
    return Item(key, "table", key, (rows, 2), torch.float32, ())


def _match(saved: list[Entry], own: list[Item], **wishes: Any) -> tuple[dict[str, str], list[str]]:
    asked = Wishes(**{"rename": {}, "grown": (), "new": (), "dropped": (), **wishes})
    asked.check([entry.key for entry in saved], [item.key for item in own])
    return match({entry.key: entry for entry in saved}, {item.key: item for item in own}, asked)


def test_names_stand_for_keys_and_for_what_is_below_them() -> None:
    saved = [_entry("a.user.weight"), _entry("a.user.weight.sum"), _entry("a.users.weight")]
    own = [_item("b.user.weight"), _item("b.user.weight.sum"), _item("a.users.weight")]
    found, lines = _match(saved, own, rename={"a.user": "b.user"})
    assert found == {"b.user.weight": "a.user.weight", "b.user.weight.sum": "a.user.weight.sum", "a.users.weight": "a.users.weight"}
    assert not lines


def test_the_longest_name_decides() -> None:
    saved = [_entry("a.x"), _entry("a.y")]
    found, lines = _match(saved, [_item("b.x"), _item("c")], rename={"a": "b", "a.y": "c"})
    assert found == {"b.x": "a.x", "c": "a.y"}
    assert not lines


def test_patterns_allow_and_names_that_mean_nothing_are_refused() -> None:
    saved, own = [_entry("old.weight"), _entry("kept", rows=2)], [_item("kept"), _item("new1"), _item("new2")]
    found, lines = _match(saved, own, new=["new?"], dropped=["old"], grown=["k*"])
    assert found == {"kept": "kept"}
    assert not lines
    for option in ("new", "dropped", "grown"):
        with pytest.raises(CheckpointError, match=f"{option}: 'kep' names nothing in the .*; did you mean 'kept'"):
            _match(saved, own, **{option: ["kep"]})


def test_fewer_rows_are_never_loaded() -> None:
    _, lines = _match([_entry("a", rows=5)], [_item("a")], grown=["a"])
    assert lines == ["'a' is [4, 2] in the model and [5, 2] in the checkpoint"]
