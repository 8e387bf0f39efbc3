"""Names of rows from a text file: line i (from 0) is the name of row i. Or from a file of `se.Vocabulary`: what has row i. Or from
a folder of `se.Names`: what has id i.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from shardembed.errors import DataError
from shardembed.inputs.names import texts_in
from shardembed.inputs.vocab import OTHER_LINE, unescaped


def names_of(path: Path, ids: Iterable[int]) -> dict[int, str]:
    """The names of `ids`, without reading the file into memory. An id that a folder of `se.Names` has no text of is an integer as
    users pass it, and is its own name.

    Raises:
        DataError: the file cannot be read, is not UTF-8, or has no line for one of the ids.
    """
    wanted = sorted(set(ids))
    if path.is_dir():
        texts = texts_in(path, wanted)
        return {row: texts.get(row, str(row)) for row in wanted}
    found: dict[int, str] = {}
    done = 0  # lines that have been read
    row = 0
    try:
        with path.open("rb") as lines:
            for row in wanted:
                line = next(islice(lines, row - done, None), None)
                if line is None:
                    break
                done = row + 1
                found[row] = line.rstrip(b"\r\n").decode("utf-8")
        is_vocabulary = _is_vocabulary(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{row + 1}: this line is not UTF-8: {error.reason}") from error
    if len(found) < len(wanted):
        row = wanted[len(found)]
        raise DataError(f"{path} has no line {row + 1}, which would name id {row}: line 1 names id 0, and so on, one name a line")
    if is_vocabulary:
        return {row: _value(line) if row else "(other values)" for row, line in found.items()}
    return found


def _is_vocabulary(path: Path) -> bool:
    with path.open("rb") as lines:
        return lines.readline(1 << 10).startswith(f"{OTHER_LINE}\t".encode())


def _value(line: str) -> str:
    text = line.partition("\t")[0]
    value = unescaped(text)
    return text if value is None else value
