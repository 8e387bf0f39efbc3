"""Checkpoints that somebody forged with care: hashes are right, and what is said would cost memory, time, or reach outside."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import shardembed as se
from shardembed.checkpoint import chance
from shardembed.checkpoint.codec import MAX_ALIKE, decode, encode
from shardembed.checkpoint.matching import fits
from shardembed.config import plain_json
from shardembed.config.hints import nearest
from shardembed.embeddings.stored import ROW_BYTES, StoredTables
from shardembed.errors import CheckpointError, ConfigError
from tests.unit.checkpoint.altered import FULL, limits, signed_again
from tests.unit.checkpoint.saved import Writer, small_checkpoint

BIT_GENERATORS = (np.random.MT19937, np.random.PCG64, np.random.PCG64DXSM, np.random.Philox, np.random.SFC64)
State = dict[str, Any]

# Random states


def torch_state(offset: int, value: int, size: int = 4) -> Callable[[State], object]:
    def forge(states: State) -> None:
        raw = bytearray(states["torch"].numpy().tobytes())
        raw[offset : offset + size] = value.to_bytes(size, "little", signed=True)
        states["torch"] = torch.frombuffer(raw, dtype=torch.uint8)

    return forge


def numpy_state(place: int, value: Any) -> Callable[[State], object]:
    def forge(states: State) -> None:
        found = list(np.random.get_state(legacy=True))  # as checkpoints had it before
        found[place] = value
        states["numpy"] = tuple(found)

    return forge


def python_state(place: int, value: Any) -> Callable[[State], object]:
    def forge(states: State) -> None:
        version, words, kept = states["python"]
        changed = list(words)
        changed[place] = value
        states["python"] = (version, tuple(changed), kept)

    return forge


LEFT, SEEDED, NEXT, KEPT = 8, 12, 16, 5052  # bytes of torch's state
FORGED: dict[str, Callable[[State], object]] = {
    "numpy far": numpy_state(2, 2**30),
    "numpy negative": numpy_state(2, -5),
    "numpy one past": numpy_state(2, 625),
    "numpy true": numpy_state(2, True),
    "numpy words": numpy_state(1, np.zeros(10, np.uint32)),
    "numpy dtype": numpy_state(1, np.zeros(624, np.int64)),
    "numpy kind": numpy_state(0, "MT19936"),
    "numpy no kind": numpy_state(0, ["MT19937"]),
    "numpy gauss": numpy_state(4, "x"),
    "numpy short": lambda states: states.update(numpy=("MT19937", np.zeros(624, np.uint32))),
    "numpy missing": lambda states: states.pop("numpy"),
    "torch left of all from the end": torch_state(NEXT, 624, 8),
    "torch next far": torch_state(NEXT, 2**40, 8),
    "torch next negative": torch_state(NEXT, -1, 8),
    "torch left": torch_state(LEFT, 625),
    "torch not seeded": torch_state(SEEDED, 0),
    "torch truth": torch_state(KEPT, 7, 1),
    "torch short": lambda states: states.update(torch=states["torch"][:-1]),
    "torch dtype": lambda states: states.update(torch=states["torch"].float()),
    "torch text": lambda states: states.update(torch="x"),
    "python position": python_state(-1, 625),
    "python word": python_state(3, 2**32),
    "python kept": lambda states: states.update(python=(*states["python"][:2], "x")),
    "python version": lambda states: states.update(python=(2, *states["python"][1:])),
    "cuda short": lambda states: states.update(cuda=torch.zeros(8, dtype=torch.uint8)),
    "cuda offset": lambda states: states.update(cuda=torch.tensor([0] * 8 + [3] + [0] * 7, dtype=torch.uint8)),
    "more": lambda states: states.update(jax=1),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_random_states_reach_no_generator(name: str) -> None:
    torch.manual_seed(3)
    torch.rand(5)  # so that words are left
    saved = chance.capture()
    states = decode(saved, "state")
    FORGED[name](states)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = chance.capture()
    with pytest.raises(CheckpointError, match="the random state"):
        chance.restore(encode(states, "state"))
    assert chance.capture() == before, "a generator was set"


def test_what_is_checked_of_torch_is_what_torch_keeps() -> None:
    """A torch that lays its state out anew needs new checks."""
    torch.manual_seed(5)
    for _ in range(700):
        state = torch.get_rng_state()
        _, left, seeded, following, *_ = chance._TORCH.unpack(state.numpy().tobytes())
        assert (seeded, left + following) in ((1, 625), (1, 1))
        chance._check_torch(state)
        torch.randn(1)


@pytest.mark.parametrize("kind", BIT_GENERATORS)
def test_every_bit_generator_of_numpy_comes_back_and_is_checked(kind: Any) -> None:
    own = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(kind(7))
        np.random.random(3)
        np.random.standard_normal()
        saved = json.loads(json.dumps(chance.capture()))
        expected = np.random.random(5).tolist()
        np.random.random(2)
        chance.restore(saved)
        assert np.random.random(5).tolist() == expected
        found = decode(saved, "state")
        for forged in forged_fields(found["numpy"]):
            with pytest.raises(CheckpointError, match="the random state of numpy"):
                chance.restore(encode({**found, "numpy": forged}, "state"))
    finally:
        np.random.set_bit_generator(own)


def forged_fields(state: Any) -> Iterator[Any]:
    """The state with each number of it, and each array, replaced by what is out of range."""
    if isinstance(state, dict):
        for name, value in state.items():
            yield from ({**state, name: forged} for forged in forged_fields(value))
            yield {key: one for key, one in state.items() if key != name} if name not in ("gauss", "has_gauss") else {}
    elif isinstance(state, np.ndarray):
        yield from (state[:-1], state.astype(np.float32), state.tolist())
    elif type(state) is int:
        yield from (-1, 2**128, 0.5, None)


def test_the_tuple_of_a_mersenne_twister_is_loaded_as_before() -> None:
    np.random.seed(4)
    np.random.random(3)
    states = decode(chance.capture(), "state")
    states["numpy"] = np.random.get_state(legacy=True)
    expected = np.random.random(5).tolist()
    chance.restore(encode(states, "state"))
    assert np.random.random(5).tolist() == expected


def test_a_bit_generator_that_cannot_be_checked_is_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np.random, "get_state", lambda legacy: {"bit_generator": "Mine", "state": {"pos": 9}})
    with pytest.raises(CheckpointError, match="bit generator 'Mine' is none of MT19937, PCG64"):
        chance.capture()


# Time


class Counted(str):
    """A name that counts how often one is compared with another."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return str.__eq__(self, other)


def test_a_key_twice_is_found_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counted, "compared", 0)
    names = [Counted(number) for number in range(5000)]
    with pytest.raises(ValueError, match="key '4999' occurs twice"):
        plain_json._object([(name, 0) for name in [*names, Counted(4999)]])
    assert Counted.compared < 10 * len(names)


@pytest.mark.parametrize("kind", ["dict", "set"])
def test_keys_that_share_a_hash_are_refused(kind: str) -> None:
    """Python hashes an int modulo 2^61 - 1: a set of a million of these is never done."""
    keys = [{"!": ["int", hex(number * (2**61 - 1) << 3)]} for number in range(1, 50_000)]
    with limits(), pytest.raises(CheckpointError, match="share a hash"):
        decode({"!": [kind, keys if kind == "set" else [[key, 0] for key in keys]]}, "here")
    few = {number * (2**61 - 1) for number in range(MAX_ALIKE)}
    assert decode(encode(few, "here"), "here") == few


def test_hints_and_patterns_take_no_time_over_a_strangers_names() -> None:
    names = [f"{'ab' * 250}{number}" for number in range(50_000)]
    dotted = [f"{'.' * 1000}{number}" for number in range(50_000)]
    with limits():
        assert nearest("ba" * 250, names) is not None
        assert not any(fits((), name) for name in dotted)
        assert not any(fits(["a.b"], name) for name in dotted)
    assert nearest("usr", [*names[:10], "user"]) == "; did you mean 'user'?"


@pytest.mark.parametrize(
    ("names", "key", "expected"),
    [
        (["a"], "a.b.c", True),
        (["a.b"], "a.b.c", True),
        (["a.b.c"], "a.b.c", True),
        (["b"], "a.b", False),
        (["a.b"], "a.bc", False),
        (["a*"], "abc.d", True),
        (["*.b"], "x.y.b.c", True),
        (["?"], "a.b", True),
        (["[ab].c"], "b.c", True),
        ([], "a", False),
    ],
)
def test_names_and_patterns_fit_parts_of_a_key(names: list[str], key: str, expected: bool) -> None:
    assert fits(names, key) is expected


# Memory


@contextmanager
def told(folder: Path) -> Iterator[dict[str, Any]]:
    """The manifest, to be changed; it is signed again."""
    path = folder / "manifest.json"
    data = json.loads(path.read_bytes())
    yield data
    path.write_bytes(signed_again(data))


def huge(folder: Path, key: str, rows: int, columns: int) -> None:
    """Say that an entry has this shape, in a file that is not there."""
    with told(folder) as data:
        entry = data["entries"][key]
        (chunk,) = entry["chunks"]
        size = rows * columns * 4
        a_piece = max(1, (8 << 20) // (4 * columns))
        pieces = -(-rows // a_piece)
        entry["shape"] = [rows, columns]
        chunk.update(rows=[0, rows, 1], columns=[0, columns], bytes=size, rows_a_piece=a_piece, offset=64)
        chunk.update(hashes=["0" * 32] * pieces, file="rank-00007.safetensors")
        data["files"]["rank-00007.safetensors"] = {"bytes": 64 + size}


def test_no_memory_is_taken_for_a_file_that_is_not_there(tmp_path: Path) -> None:
    writer = Writer(tmp_path / FULL)
    writer.add("user.weight", torch.zeros(2, 4))
    writer.write()
    huge(tmp_path / FULL, "user.weight", 250_000_000, 4)
    with torch.device("meta"):
        model = nn.ModuleDict({"user": nn.Embedding(250_000_000, 4)})
    with limits():
        with pytest.raises(CheckpointError, match=r"rank-00007\.safetensors is missing"):
            se.load_plain(tmp_path, model)
        with StoredTables(tmp_path) as stored, pytest.raises(CheckpointError, match=r"rank-00007\.safetensors is missing"):
            stored.find("user")
    assert model["user"].weight.is_meta
    huge(tmp_path / FULL, "user.weight", 1, ROW_BYTES)
    with StoredTables(tmp_path) as stored, pytest.raises(ConfigError, match="are no embeddings"):
        stored.find("user")


def test_bytes_that_are_no_truth_value_become_one(tmp_path: Path) -> None:
    found = decode({"!": ["tensor", ["bool", [3], "AAf/"]]}, "here")  # 0, 7 and 255
    assert found.view(torch.uint8).tolist() == [0, 1, 1]


def test_many_keys_that_a_model_lacks_are_counted(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / FULL)
    model = nn.ModuleDict({f"m{number}": nn.Linear(1, 1, bias=False) for number in range(30)})
    with pytest.raises(CheckpointError, match=r"'m9\.weight' is in the model only[^\n]*\n  and 20 more$"):
        se.load_plain(tmp_path, model)
