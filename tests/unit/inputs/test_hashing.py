"""Hashing of raw values: what its page says is computed, the same everywhere, spread evenly, and wrong values are named."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shardembed as se
from shardembed.errors import ConfigError, DtypeError, InputError

MASK = (1 << 64) - 1
INTEGERS = st.integers(-(1 << 63), (1 << 63) - 1)


def mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def slow(value: int | str, num_embeddings: int, seed: int, reserved: int) -> int:
    """One value at a time, from the description."""
    if isinstance(value, int):
        found = mix(mix(seed) ^ value & MASK)
    else:
        data = value.encode("utf-8", "surrogatepass")
        found = mix(mix(seed) ^ 0x74786574 ^ len(data))
        for start in range(0, len(data), 8):
            found = mix(found ^ int.from_bytes(data[start : start + 8], "little"))
    return reserved + found % (num_embeddings - reserved)


@given(st.lists(INTEGERS) | st.lists(st.text()), st.integers(2, 1 << 62), st.integers(0, MASK), st.sampled_from([0, 1]))
def test_rows_are_what_the_description_says(values: list[int] | list[str], size: int, seed: int, reserved: int) -> None:
    rows = se.Hashing(size, seed, reserved)(values)
    assert rows.dtype == np.int64
    assert rows.tolist() == [slow(value, size, seed, reserved) for value in values]


def test_rows_are_the_same_for_ever() -> None:
    hashing = se.Hashing(1_000_000, seed=7)
    assert hashing([0, 1, -1, 1 << 40]).tolist() == [697221, 648415, 534112, 77675]
    assert hashing(["", "a", "68fd1e64", "längere Texte"]).tolist() == [803626, 972735, 374191, 644727]


@pytest.mark.parametrize("kind", ["integers", "texts"])
def test_values_spread_evenly_and_seeds_differ(kind: str) -> None:
    values = np.arange(100_000) * 8 if kind == "integers" else [f"item-{number}" for number in range(100_000)]
    first, second = se.Hashing(100, 0)(values), se.Hashing(100, 1)(values)
    for rows in (first, second):
        counts = np.bincount(rows, minlength=100)
        assert len(counts) == 100
        assert ((counts - 1000) ** 2 / 1000).sum() < 180  # chi squared of 99 degrees, far beyond what chance gives
    assert abs((first == second).mean() - 0.01) < 0.005


def test_shapes_and_kinds_of_values() -> None:
    hashing = se.Hashing(1000)
    expected = hashing([1, 2, 3, 4])
    for integers in (np.array([1, 2, 3, 4], np.uint8), pa.array([1, 2, 3, 4]), pa.chunked_array([[1, 2], [3, 4]])):
        np.testing.assert_array_equal(hashing(integers), expected)
    np.testing.assert_array_equal(hashing([[1, 2], [3, 4]]), expected.reshape(2, 2))
    found = hashing(torch.tensor([[1, 2], [3, 4]], dtype=torch.int32))
    assert isinstance(found, torch.Tensor)
    assert found.tolist() == expected.reshape(2, 2).tolist()
    texts = hashing(["a", "b"])
    for same in (np.array(["a", "b"]), np.array(["a", "b"], object), [b"a", b"b"], pa.array(["a", "b"])):
        np.testing.assert_array_equal(hashing(same), texts)
    assert hashing([]).shape == (0,)
    assert not np.array_equal(hashing([1]), hashing(["1"]))


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([1, "a"], DtypeError, "all integers or all texts; these are int, str"),
        (["a", None], InputError, r"value 1 is missing \(None\)"),
        (pa.array([1, None]), InputError, "value 1 is missing"),
        (["a", float("nan")], InputError, "value 1 is missing"),
        ([1.5], DtypeError, "these are float"),
        ([True], DtypeError, "these are bool"),
        (np.array([1.0]), DtypeError, "not float64"),
        (torch.tensor([1.0]), DtypeError, r"not torch.float32"),
        ("abc", DtypeError, "a single str; pass a list"),
        (5, DtypeError, "not int"),
        ([1 << 70], InputError, "value 0, 1180591620717411303424, does not fit into 64 bits"),
        ([[1], [2, 3]], DtypeError, "these are list"),
    ],
)
def test_wrong_values_are_named(values: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        se.Hashing(10)(values)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_embeddings": 0}, "leaves no row"),
        ({"num_embeddings": 1, "reserved": 1}, "leaves no row"),
        ({"num_embeddings": 5, "reserved": -1}, "leaves no row"),
        ({"num_embeddings": 5, "seed": -1}, "seed -1 must be from 0"),
        ({"num_embeddings": 5.0}, "num_embeddings must be an integer"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        se.Hashing(**settings)
