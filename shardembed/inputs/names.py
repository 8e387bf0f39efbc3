"""Which text has which id: a folder of Parquet files with the columns `id` (int64), `name` (text) and `check` (int64).

Names are only ever added, as one more file that appears whole or not at all, so many processes may add to one folder at once. A
name may then stand in several files. `check` is XXH64 with another seed: texts that share an id differ in it, so that they are
noticed without all texts in memory.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardembed.config.optional import needed
from shardembed.config.paths import local
from shardembed.errors import DataError
from shardembed.kernels.texts import Texts, xxh64

log = logging.getLogger("shardembed")
CHECK_SEED = 0x636865636B  # of `check`
WAITING = 1 << 16  # names that wait in memory before they become a file
COLUMNS = ["id", "name", "check"]


@dataclass(frozen=True)
class Named:
    """Texts with their ids.

    Attributes:
        texts: n of them.
        ids: int64 `[n]`.
        missing: which of the texts are none, bool `[n]`; None: none.
    """

    texts: Texts
    ids: NDArray[np.int64]
    missing: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Collision:
    """Two texts that share an id, and so a row.

    Attributes:
        id: of both.
        first: the one that the folder names.
        second: the other.
    """

    id: int
    first: str
    second: str


class Names:
    """The names in a folder, which is made when the first are added. Add by `se.hash64(values, names=names)`, or with a folder's
    path in the place of `names`, which reads the folder's ids each time.

        with se.Names("items.names") as names:
            ids = se.hash64(["shoes", "hats"], names=names)
        se.Names("items.names").texts(ids)

    Names wait in memory until there are many; `flush`, or the end of the `with`, writes them.

    Attributes:
        collisions: pairs of texts that share an id, as far as this object has met them; each is also a warning in the log.

    Raises:
        UnsupportedError: pyarrow is not installed. DataError: a file cannot be read or written. ConfigError: the path is one of
            another machine.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        self.folder = local(folder)
        self.collisions: list[Collision] = []
        self._waiting: list[tuple[Any, NDArray[np.int64], NDArray[np.int64]]] = []
        self._met: set[tuple[int, int]] = set()
        read = [[table.column(name).to_numpy() for name in ("id", "check")] for table in _tables(self.folder, ["id", "check"])]
        self._new = _Known(np.empty(0, np.int64), np.empty(0, np.int64))
        self._known = _Known.of(*map(np.concatenate, zip(*read, strict=True))) if read else self._new
        # What two processes have added, of which neither saw the other's.
        for place in np.flatnonzero(self._known.doubled()):
            shared = int(self._known.ids[place])
            texts = sorted(
                {text for table in _tables(self.folder, ["id", "name"], [shared]) for text in table.column("name").to_pylist()}
            )
            if len(texts) > 1:
                self._tell(shared, int(self._known.checks[place]), texts[0], texts[1])
        self._known = self._known.distinct()

    def __enter__(self) -> Names:
        return self

    def __exit__(self, *error: object) -> None:
        self.flush()

    def add(self, named: Named) -> None:
        """Note those that are new, and compare those that are not."""
        places = np.arange(len(named.ids)) if named.missing is None else np.flatnonzero(~named.missing)
        checks = xxh64(named.texts, CHECK_SEED).view(np.int64)
        ids, first, inverse = np.unique(named.ids[places], return_index=True, return_inverse=True)
        first = places[first]
        for place in places[checks[places] != checks[first][inverse]].tolist():
            one = int(first[np.searchsorted(ids, named.ids[place])])
            self._tell(int(named.ids[place]), int(checks[place]), _shown(named.texts[one]), _shown(named.texts[place]))
        new = np.ones(len(ids), np.bool_)
        for known in (self._known, self._new):
            there, same = known.compare(ids, checks[first])
            new &= ~there
            for number in np.flatnonzero(there & ~same):
                shared = int(ids[number])
                self._tell(shared, int(checks[first[number]]), self.texts([shared])[shared], _shown(named.texts[first[number]]))
        if new.any():
            kept = first[new]
            self._waiting.append((_arrow(named.texts, kept), ids[new], checks[kept]))
            self._new = self._new.joined(ids[new], checks[kept])
            if len(self._new.ids) >= WAITING:
                self.flush()

    def flush(self) -> None:
        """Write the names that wait, as one more file."""
        if not self._waiting:
            return
        import pyarrow as pa
        from pyarrow import parquet

        parts = [pa.table([ids, texts, checks], names=COLUMNS) for texts, ids, checks in self._waiting]
        whole = self.folder / f"{uuid.uuid4().hex}.parquet"
        new = whole.with_suffix(".new")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with new.open("xb") as file:
                parquet.write_table(pa.concat_tables(parts), file, compression="zstd")
                file.flush()
                os.fsync(file.fileno())
            new.replace(whole)
        except OSError as error:
            with suppress(OSError):
                new.unlink(missing_ok=True)
            raise DataError(f"{self.folder}: cannot write the names: {error.strerror or error}") from error
        self._waiting = []
        self._known = self._known.joined(self._new.ids, self._new.checks)
        self._new = _Known(np.empty(0, np.int64), np.empty(0, np.int64))

    def texts(self, ids: Iterable[int] | None = None) -> dict[int, str]:
        """The text of each id that has one, of all where `ids` is None. Bytes that are no UTF-8 read as \\\\xff.

        Raises:
            DataError: a file cannot be read.
        """
        wanted = None if ids is None else [int(one) for one in ids]
        found = texts_in(self.folder, wanted)
        chosen = None if wanted is None else set(wanted)
        for texts, some, _ in self._waiting:
            for one, text in zip(some.tolist(), texts.to_pylist(), strict=True):
                if chosen is None or one in chosen:
                    found[one] = min(found.get(one, text), text)
        return found

    def _tell(self, shared: int, check: int, first: str, second: str) -> None:
        if (shared, check) in self._met:
            return
        self._met.add((shared, check))
        self.collisions.append(Collision(shared, first, second))
        log.warning(
            "%s: %r and %r share the id %d, so they share a row; rename one of them, by a prefix say, to part them",
            self.folder,
            first,
            second,
            shared,
        )


def texts_in(folder: Path, ids: Iterable[int] | None = None) -> dict[int, str]:
    """As `Names.texts`, of what is in a folder, without reading all its ids first."""
    found: dict[int, str] = {}
    for table in _tables(folder, ["id", "name"], None if ids is None else list(ids)):
        for one, text in zip(table.column("id").to_pylist(), table.column("name").to_pylist(), strict=True):
            # Of two texts the same whichever file is read first.
            found[one] = min(found.get(one, text), text)
    return found


def columns_in(folder: Path) -> tuple[NDArray[np.int64], Any]:
    """Of all that is in a folder: the ids int64 `[n]`, ascending, each once, and beside them the texts as an Arrow array of
    large_string. Of two texts of an id the lesser, as in `texts_in`.

    Raises:
        DataError: a file cannot be read.
    """
    import pyarrow as pa

    tables = [
        table.select(["id", "name"]).cast(pa.schema([("id", pa.int64()), ("name", pa.large_string())]))
        for table in _tables(folder, ["id", "name"])
    ]
    if not tables:
        return np.empty(0, np.int64), pa.array([], pa.large_string())
    whole = pa.concat_tables(tables).sort_by([("id", "ascending"), ("name", "ascending")])
    ids = whole.column("id").to_numpy()
    first = np.flatnonzero(np.append(True, ids[1:] != ids[:-1]))
    return ids[first], whole.column("name").combine_chunks().take(pa.array(first))


def _tables(folder: Path, columns: list[str], ids: list[int] | None = None) -> Iterator[Any]:
    with needed("pyarrow", "train", "a file of names"):
        import pyarrow as pa
        from pyarrow import parquet
    for path in sorted(folder.glob("*.parquet")):
        try:
            with parquet.ParquetFile(path) as file:
                table = file.read(columns)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: cannot read the names: {getattr(error, 'strerror', None) or error}") from error
        if set(table.column_names) != set(columns):
            raise DataError(f"{path}: not a file of names: it lacks one of the columns {', '.join(columns)}")
        yield table if ids is None else table.filter(pa.array(np.isin(table.column("id").to_numpy(), ids)))


@dataclass(frozen=True)
class _Known:
    """Ids, ascending, and their checks."""

    ids: NDArray[np.int64]
    checks: NDArray[np.int64]

    @staticmethod
    def of(ids: NDArray[np.int64], checks: NDArray[np.int64]) -> _Known:
        order = np.lexsort((checks, ids))
        return _Known(ids[order], checks[order])

    def joined(self, ids: NDArray[np.int64], checks: NDArray[np.int64]) -> _Known:
        """With others, ascending too."""
        places = np.searchsorted(self.ids, ids)
        return _Known(np.insert(self.ids, places, ids), np.insert(self.checks, places, checks))

    def doubled(self) -> NDArray[np.bool_]:
        """Where the next one has the same id and another check."""
        return np.append((np.diff(self.ids) == 0) & (np.diff(self.checks) != 0), np.zeros(min(1, len(self.ids)), np.bool_))

    def distinct(self) -> _Known:
        first = np.append(np.ones(min(1, len(self.ids)), np.bool_), np.diff(self.ids) != 0)
        return _Known(self.ids[first], self.checks[first])

    def compare(self, ids: NDArray[np.int64], checks: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which of these are there, and which of them with the same check."""
        if not len(self.ids):
            return np.zeros(len(ids), np.bool_), np.zeros(len(ids), np.bool_)
        places = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        there = self.ids[places] == ids
        return there, there & (self.checks[places] == checks)


def _arrow(texts: Texts, places: NDArray[np.int64]) -> Any:
    """These texts as a column, in one go where all are UTF-8."""
    import pyarrow as pa

    buffers = [None, pa.py_buffer(np.ascontiguousarray(texts.offsets)), pa.py_buffer(np.ascontiguousarray(texts.data))]
    chosen = pa.Array.from_buffers(pa.large_binary(), len(texts), buffers).take(pa.array(places))
    try:
        return chosen.cast(pa.large_string())
    except pa.ArrowInvalid:
        return pa.array([_shown(texts[place]) for place in places], pa.large_string())


def _shown(text: bytes) -> str:
    return text.decode("utf-8", "backslashreplace")
