"""Ids of 64 bits for raw values, for tables that take any id (`TableConfig(dynamic=...)`): no vocabulary, and no two of a billion
values that share a row but by a chance of 3 in 100.

    texts       XXH64, seed 0, of their UTF-8, as a signed integer; bytes are hashed as they are. So a text, its bytes, an entry of
                a category and any layout of Arrow's agree, and so do databases (`xxHash64` of ClickHouse, `xxhash64` of Trino)
    integers    stay what they are: two never share an id, reports show the number that users know, and nothing has to be kept to
                read it back. Tables spread ids over ranks by a hash of their own, so 1, 2, 3 are no worse than noise. Those from
                2^63 to 2^64 - 1 become the same 64 bits with a sign, so that 2^64 - 1 is -1
    beyond      64 bits: the hash of their decimal text

So the integer 42 has the id 42, and the text "42" another. Nothing depends on process, machine or version. Arrow's columns (and
those of pandas and polars, which lend theirs) are hashed where they lie, by one compiled loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shardembed.config.scalars import within
from shardembed.errors import ConfigError, DtypeError, InputError
from shardembed.inputs.hashing import as_array
from shardembed.inputs.names import Named, Names
from shardembed.kernels.texts import Texts, xxh64

LEAST, MOST = -(1 << 63), (1 << 63) - 1
WHO = "hash64"
GONE = ("NAType", "NaTType")  # of pandas, which is not imported here


def hash64(values: Any, *, null: int | None = None, names: Names | str | PathLike[str] | None = None) -> Any:
    """The ids of `values`, int64 in their shape: a torch tensor (on its device) for a torch tensor, else a numpy array.

    Args:
        values: texts, bytes or integers: a list, a NumPy array, a Series, Index or Categorical of pandas, a Series of polars, an
            array of Arrow (also chunked, dictionary, view, binary), or a torch tensor of integers.
        null: the id of missing values (None, NaN, nulls), such as the table's `padding_idx`.
        names: keeps which text has which id, for reports: a `Names`, or the folder of one. Integers of 64 bits need none.

    Raises:
        DtypeError: what is neither integers nor texts, or both. InputError: a value is missing and `null` is not given.
        ConfigError: `null` is no int64.
    """
    if null is not None and (null := within(null, LEAST, MOST)) is None:
        raise ConfigError(f"{WHO}: null must be an integer of 64 bits")
    if isinstance(values, torch.Tensor):
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise DtypeError(f"{WHO}: values must be integers or texts, not {values.dtype}")
        return values.to(torch.int64)
    if isinstance(values, str | bytes):
        raise DtypeError(f"{WHO}: a single {type(values).__name__}; pass a list or an array of values")
    column = _read(values)
    if column.missing is not None and column.missing.any():
        if null is None:
            raise InputError(
                f"{WHO}: value {int(column.missing.argmax())} is missing; give `null=`, an id for missing values, or fill them in"
            )
        column.ids[column.missing] = null
    if names is not None:
        _note(names, column)
    return column.ids.reshape(column.shape)


@dataclass(frozen=True)
class Column:
    """Values that have been read.

    Attributes:
        ids: int64 `[n]`, of no meaning where the value is missing.
        missing: bool `[n]`; None: no value is.
        named: all texts that occur with their ids, and maybe some that do not.
        shape: of the answer.
    """

    ids: NDArray[np.int64]
    missing: NDArray[np.bool_] | None
    named: list[Named]
    shape: tuple[int, ...]


def _read(values: Any) -> Column:
    pandas = type(values).__module__.partition(".")[0] == "pandas"
    objects = pandas and isinstance(values.dtype, np.dtype) and values.dtype.kind == "O" if hasattr(values, "dtype") else False
    if not objects and (pandas or hasattr(values, "__arrow_c_array__") or hasattr(values, "__arrow_c_stream__")):
        if (column := _borrowed(values)) is not None:
            return column
        objects = True  # without pyarrow, what pandas has is Python's
    array = np.asarray(values, object) if objects else as_array(values, WHO)
    if array.dtype.kind in "iu":
        return Column(array.reshape(-1).astype(np.int64), None, [], array.shape)
    if array.dtype.kind in "OUST" or not array.size:
        return _of_objects(array.reshape(-1).tolist(), array.shape)
    raise DtypeError(f"{WHO}: values must be integers or texts, not {array.dtype}")


def _borrowed(values: Any) -> Column | None:
    """What Arrow has, or whoever lends to it; None without pyarrow."""
    try:
        from shardembed.inputs.arrow_ids import read_column
    except ImportError:
        return None
    ids, missing, named = read_column(values, WHO)
    return Column(ids, missing, named, ids.shape)


def _of_objects(flat: list[Any], shape: tuple[int, ...]) -> Column:
    kinds, missing = set(map(type, flat)), None
    if any(kind is type(None) or issubclass(kind, float) or kind.__name__ in GONE for kind in kinds):
        missing = np.fromiter(map(_is_missing, flat), np.bool_, len(flat))
        kinds = {type(flat[i]) for i in np.flatnonzero(~missing)}
    ids = np.zeros(len(flat), np.int64)
    there = slice(None) if missing is None else ~missing
    present = flat if missing is None else [flat[i] for i in np.flatnonzero(~missing)]
    if all(issubclass(kind, str | bytes) for kind in kinds):
        texts = _texts(present, kinds)
        ids[there] = found = xxh64(texts).view(np.int64)
        return Column(ids, missing, [Named(texts, found)], shape)
    if all(issubclass(kind, int | np.integer) and kind is not bool for kind in kinds):
        found, named = _of_integers([int(value) for value in present])
        ids[there] = found
        return Column(ids, missing, named, shape)
    told = ", ".join(sorted(kind.__name__ for kind in kinds))
    raise DtypeError(f"{WHO}: values must be all integers or all texts; these are {told}")


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value) or type(value).__name__ in GONE


def _texts(present: list[Any], kinds: set[type]) -> Texts:
    if kinds == {str} and (joined := "".join(present)).isascii():
        return Texts.joined(joined.encode(), np.fromiter(map(len, present), np.int64, len(present)))
    return Texts.of([value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass") for value in present])


def _of_integers(present: list[int]) -> tuple[NDArray[np.int64], list[Named]]:
    """Their ids, and the texts of those beyond 64 bits with theirs."""
    try:
        return np.array(present, np.int64), []
    except OverflowError:
        beyond = [place for place, value in enumerate(present) if not LEAST <= value < 1 << 64]
    ids = np.array([value % (1 << 64) for value in present], np.uint64).view(np.int64)
    texts = Texts.of([str(present[place]).encode() for place in beyond])
    ids[beyond] = hashes = xxh64(texts).view(np.int64)
    return ids, [Named(texts, hashes)]


def _note(names: Names | str | PathLike[str], column: Column) -> None:
    book = names if isinstance(names, Names) else Names(names)
    for named in column.named:
        book.add(named)
    if book is not names:
        book.flush()
