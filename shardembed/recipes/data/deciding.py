"""What the columns hold that are wanted of files, where the files have to say it: texts or whole numbers, dates or numbers.

Parquet files say it by their types, and text files by a sample: the first MiB of each of the first SAMPLED of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa

from shardembed.errors import DataError
from shardembed.recipes.data import any_ids
from shardembed.recipes.data.any_ids import are_texts
from shardembed.recipes.data.as_is import AS_IS
from shardembed.recipes.data.feature_kinds import HEXADECIMAL, LABELLED, NUMBERS, lists, split
from shardembed.recipes.data.kinds import ROW, USER, WHOLE_TIME, Kind, times_like
from shardembed.recipes.data.parquet_file import ParquetFile
from shardembed.recipes.data.text import TextFile
from shardembed.recipes.data.wanted import ANY_IDS, Wanted

SAMPLED = 16
FIXED = {"row": ROW, "user": USER, "hex": HEXADECIMAL, "number": NUMBERS, "label": LABELLED, "as_is": AS_IS}
Opened = Sequence["ParquetFile | TextFile"]
Samples = dict[str, dict[str, pa.Array]]  # of a file's path, the first texts of columns


def kinds_of(wanted: Sequence[Wanted], files: Opened) -> tuple[Kind, ...]:
    """
    Raises:
        DataError: files say different things of a column, or cannot be read.
    """
    samples: Samples = {}
    for file in [one for one in files if isinstance(one, TextFile)][:SAMPLED]:
        names = [one.name for one in wanted if one.name in file.header and _asks(one, file)]
        samples[str(file.place)] = file.sample(names) if names else {}
    return tuple(FIXED.get(one.kind) or _decided(one, files, samples) for one in wanted)


def _asks(wanted: Wanted, file: TextFile) -> bool:
    """It takes a sample of the file to know what the column holds."""
    return wanted.kind == "time" or (wanted.kind in ANY_IDS and not wanted.text and not file.layout.texts)


def _decided(wanted: Wanted, files: Opened, samples: Samples) -> Kind:
    if wanted.kind == "time":
        return _times(wanted, files, samples)
    return kind_of_ids(wanted, wanted.text or _texts(wanted, files, samples))


def kind_of_ids(wanted: Wanted, texts: bool) -> Kind:
    """That of a column of ids, or of lists of them, where it is known whether these are texts."""
    optional = wanted.kind != "key"
    element = any_ids.texts(wanted.names, optional) if texts else any_ids.integers(wanted.name, optional)
    return lists(element, wanted.separator) if wanted.kind == "ids" else element


def _times(wanted: Wanted, files: Opened, samples: Samples) -> Kind:
    found = [(file, kind) for file, kind in _times_of(wanted, files, samples) if kind is not None]
    dates, numbers = (next((file for file, kind in found if kind.clock is clock), None) for clock in (True, False))
    if dates is not None and numbers is not None:
        raise DataError(
            f"{wanted.setting}: {dates} has dates, but {numbers} has whole numbers, which have no order among each other; "
            "write both alike"
        )
    return found[0][1] if found else WHOLE_TIME


def _times_of(wanted: Wanted, files: Opened, samples: Samples) -> Iterator[tuple[str, Kind | None]]:
    for number, file in enumerate(files):
        if isinstance(file, ParquetFile) and wanted.name in file.header:
            if number < SAMPLED or not file.are_texts(wanted.name):
                yield str(file.place), file.times(wanted.name)
        else:
            texts = _texts_of(wanted, file, samples)
            first = next(filter(None, texts.view(pa.binary()).to_pylist()), None) if texts is not None else None
            yield str(file.place), times_like(first.decode("utf-8", "replace")) if first else None


def _texts(wanted: Wanted, files: Opened, samples: Samples) -> bool:
    """Whether the ids of a column are texts."""
    sure: dict[bool, str] = {}  # texts or not -> a file that says so
    sampled: dict[bool, str] = {}
    for file in files:
        if isinstance(file, ParquetFile) and wanted.name in file.header:
            found = file.are_texts(wanted.name)
            if found is not None:
                sure.setdefault(found, str(file.place))
        elif isinstance(file, TextFile) and file.layout.texts:
            sampled.setdefault(True, str(file.place))
        elif (texts := _texts_of(wanted, file, samples)) is not None:
            found = are_texts(_elements(texts, wanted))
            if found is not None:
                sampled.setdefault(found, str(file.place))
    text, number = sure.get(True) or (sampled.get(True) if False in sure else None), sure.get(False)
    if text is not None and number is not None:
        raise DataError(
            f"{wanted.setting}: {text} has texts, but {number} has whole numbers, and the text 42 is another id than the number "
            f"42; write both alike, or say data.texts: [{wanted.name}]"
        )
    return True in sure or True in sampled


def _texts_of(wanted: Wanted, file: ParquetFile | TextFile, samples: Samples) -> pa.Array | None:
    """The first texts of a column of a text file, or of a file's folder; None where nobody looked."""
    if wanted.name not in file.header:
        return pa.array([file.place.partitions.get(wanted.name) or ""])
    return samples.get(str(file.place), {}).get(wanted.name)


def _elements(texts: pa.Array, wanted: Wanted) -> pa.Array:
    if wanted.kind != "ids":
        return texts
    try:
        return split(texts, wanted.separator)[0]
    except pa.ArrowInvalid:  # no UTF-8, which shows again
        return texts
