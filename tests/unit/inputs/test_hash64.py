"""Ids of 64 bits: the same whatever kind of column a value comes in, and wrong values are named."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shardembed as se
from shardembed.errors import ConfigError, DtypeError, InputError
from tests.unit.kernels.test_texts import slow

TEXTS = ["shoes", "", "a", "Größe 42", "日本語のとても長い文字列、三十二バイトより長い", "42", "shoes"]


def id_of(text: str | bytes) -> int:
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    found = slow(data, 0)
    return found - (1 << 64) if found >> 63 else found


IDS = [id_of(text) for text in TEXTS]


@given(st.lists(st.text() | st.binary()))
def test_texts_have_the_published_hash_of_their_bytes(texts: list[str | bytes]) -> None:
    ids = se.hash64(texts)
    assert ids.dtype == np.int64
    assert ids.tolist() == [id_of(text) for text in texts]


@given(st.lists(st.integers(-(1 << 80), 1 << 80) | st.integers(-(1 << 64), 1 << 65)))
def test_integers_stay_and_those_beyond_are_hashed_as_texts(values: list[int]) -> None:
    expected = [one if -(1 << 63) <= one < 1 << 63 else one - (1 << 64) if 0 < one < 1 << 64 else id_of(str(one)) for one in values]
    assert se.hash64(values).tolist() == expected
    assert [se.hash64([one]).tolist() for one in values] == [[one] for one in expected]


def test_ids_are_the_same_for_ever() -> None:
    assert se.hash64(["", "a", "68fd1e64", "längere Texte als zweiunddreißig Bytes"]).tolist() == [
        -1205034819632174695,
        -3292477735350538661,
        6718470718629228516,
        -6980703042187462982,
    ]


def test_another_process_gives_the_same() -> None:
    script = f"import shardembed as se; print(se.hash64({TEXTS!r}).tolist())"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == str(IDS)


def arrow_columns() -> dict[str, Any]:
    plain = pa.array(TEXTS)
    return {
        "string": plain,
        "large": plain.cast(pa.large_string()),
        "view": plain.cast(pa.string_view()),
        "binary": plain.cast(pa.binary()),
        "large binary": plain.cast(pa.large_binary()),
        "binary view": plain.cast(pa.binary()).cast(pa.binary_view()),
        "dictionary": plain.dictionary_encode(),
        "runs": pa.RunEndEncodedArray.from_arrays(pa.array(range(1, len(TEXTS) + 1), pa.int32()), plain),
        "chunked": pa.chunked_array([TEXTS[:2], [], TEXTS[2:]]),
        "chunked dictionary": pa.chunked_array([pa.array(TEXTS[:3]).dictionary_encode(), pa.array(TEXTS[3:]).dictionary_encode()]),
        "slice": pa.array(["before", *TEXTS, "behind"]).slice(1, len(TEXTS)),
        "view slice": pa.array(["before", *TEXTS, "behind"]).cast(pa.string_view()).slice(1, len(TEXTS)),
        "dictionary slice": pa.array(["before", *TEXTS, "behind"]).dictionary_encode().slice(1, len(TEXTS)),
    }


@pytest.mark.parametrize("kind", arrow_columns())
def test_arrow_columns_agree(kind: str) -> None:
    assert se.hash64(arrow_columns()[kind]).tolist() == IDS


def test_python_and_numpy_agree() -> None:
    data = [text.encode() for text in TEXTS]
    for values in (TEXTS, tuple(TEXTS), np.array(TEXTS), np.array(TEXTS, object), np.array(data), data, iter(TEXTS)):
        assert se.hash64(values).tolist() == IDS
    assert se.hash64(pa.array([b"abcd", b"efgh"], pa.binary(4)).slice(1)).tolist() == [id_of("efgh")]
    assert se.hash64([["a", "b"], ["c", "d"]]).tolist() == [[id_of("a"), id_of("b")], [id_of("c"), id_of("d")]]
    for nothing in ([], np.empty((0, 3)), pa.array([], pa.string()), pa.array([]), pa.chunked_array([], pa.string())):
        assert se.hash64(nothing).dtype == np.int64
        assert se.hash64(nothing).size == 0


def test_pandas_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    pd = pytest.importorskip("pandas")
    columns = [
        pd.Series(TEXTS),
        pd.Series(TEXTS, dtype=object),
        pd.Series(TEXTS, dtype="category"),
        pd.Series(TEXTS, dtype=pd.ArrowDtype(pa.large_string())),
        pd.Series(TEXTS, dtype=pd.StringDtype("python")),
        pd.Index(TEXTS),
        pd.Categorical(TEXTS),
        pd.array(TEXTS),
        pd.Series(["before", *TEXTS])[1:],
    ]
    integers = [pd.Series([5, -6]), pd.Series([5, -6], dtype="Int64"), pd.Index([5, -6]), pd.Categorical([5, -6])]
    missing = [pd.Series(["a", None]), pd.Series(["a", None], dtype="category"), pd.Series(["a", pd.NA], dtype=object)]
    for _ in range(2):
        assert [se.hash64(column).tolist() for column in columns] == [IDS] * len(columns)
        assert [se.hash64(column).tolist() for column in integers] == [[5, -6]] * len(integers)
        assert [se.hash64(column, null=-3).tolist() for column in missing] == [[id_of("a"), -3]] * len(missing)
        assert se.hash64(pd.Series([1 << 70, 3], dtype=object)).tolist() == [id_of(str(1 << 70)), 3]
        assert se.hash64(pd.Series([7, None], dtype="Int64"), null=0).tolist() == [7, 0]
        monkeypatch.setitem(sys.modules, "shardembed.inputs.arrow_ids", None)  # as if pyarrow could not be imported


def test_a_series_of_polars_agrees() -> None:
    pl = pytest.importorskip("polars")
    assert se.hash64(pl.Series(TEXTS)).tolist() == IDS


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_integers_of_any_width(dtype: str) -> None:
    info = np.iinfo(dtype)
    array = np.array([0, 1, 42, info.min, info.max], dtype)
    expected = array.astype(np.int64).tolist()
    assert expected[2] == 42
    tensor = torch.from_numpy(array)
    for values in (array, array.tolist(), pa.array(array), pa.chunked_array([array]), pa.array(array).dictionary_encode()):
        assert se.hash64(values).tolist() == expected
    found = se.hash64(tensor.view(1, 5))
    assert isinstance(found, torch.Tensor)
    assert found.dtype == torch.int64
    assert found.tolist() == [expected]


def test_what_is_missing_is_named_or_has_the_id_that_was_given() -> None:
    columns = [
        ["a", None, "b"],
        ["a", float("nan"), "b"],
        np.array(["a", None, "b"], object),
        pa.array(["a", None, "b"]),
        pa.array(["a", None, "b"]).cast(pa.string_view()),
        pa.array(["a", None, "b"]).dictionary_encode(),
        pa.DictionaryArray.from_arrays([0, 1, 2], pa.array(["a", None, "b"])),
        pa.DictionaryArray.from_arrays(pa.array([1, 0, None]), pa.array([None, "a"])).take(pa.array([0, 1, 2])),
        pa.chunked_array([["a"], [None, "b"]]),
        np.ma.array(["a", "x", "b"], mask=[False, True, False]),
    ]
    for number, column in enumerate(columns):
        with pytest.raises(InputError, match="hash64: value 1 is missing; give `null=`"):
            se.hash64(column)
        last = -7 if number == 7 else id_of("b")
        assert se.hash64(column, null=-7).tolist() == [id_of("a"), -7, last]
    for gone in ([None, None], pa.nulls(2), pa.nulls(2, pa.int64()), pa.nulls(2, pa.string()), pa.nulls(2).dictionary_encode()):
        assert se.hash64(gone, null=5).tolist() == [5, 5]
    assert se.hash64([1, None, 1 << 64], null=5).tolist() == [1, 5, id_of(str(1 << 64))]
    assert se.hash64(pa.array([1, None]), null=5).tolist() == [1, 5]
    masked = np.ma.array([1, 2, 1 << 63], mask=[False, True, False], dtype=np.uint64)
    assert se.hash64(masked, null=5).tolist() == [1, 5, -(1 << 63)]
    assert type(se.hash64(np.ma.array([1, 2]))) is np.ndarray


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([1, "a"], DtypeError, "all integers or all texts; these are int, str"),
        ([1.5], DtypeError, "these are float"),
        ([True], DtypeError, "these are bool"),
        (np.array([1.0]), DtypeError, "not float64"),
        (np.array([True]), DtypeError, "not bool"),
        (pa.array([1.0]), DtypeError, "not double; read integers with gaps as Int64"),
        (pa.array([True]), DtypeError, "not bool"),
        (pa.array([["a"]]), DtypeError, "not list"),
        (pa.table({"a": ["x"]}), DtypeError, "not struct<a: string>"),
        (torch.tensor([1.0]), DtypeError, r"not torch.float32"),
        ("abc", DtypeError, "a single str; pass a list"),
        (pa.scalar("a"), DtypeError, "not StringScalar"),
        (5, DtypeError, "not int"),
        ([["a"], ["b", "c"]], DtypeError, "these are list"),
    ],
)
def test_wrong_values_are_named(values: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        se.hash64(values)


@pytest.mark.parametrize("null", [1 << 63, "0", 1.5])
def test_an_id_for_missing_values_that_is_none_is_refused(null: Any) -> None:
    with pytest.raises(ConfigError, match="null must be an integer of 64 bits"):
        se.hash64(["a"], null=null)
