"""JSON that anybody may have written: plans, manifests, the files of a run's folder. One reader, with one rule.

A text can hold a key twice, a number of a million digits, lists in lists until the stack ends, or eight million empty ones; a file
in a folder that came from elsewhere can be a link out of it, a pipe that never answers, or far too large.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

VALUES = 8 << 20  # of one text: an empty list is two bytes there and 56 in memory
DIGITS = 19  # of 2^63 - 1
FILE_BYTES = 64 << 20


def loads(data: bytes | str, floats: bool = True, values: int = VALUES) -> Any:
    """The value of a JSON text of at most so many `values`, with every key once; whole numbers only, unless `floats` are welcome.

    Raises:
        ValueError: it is anything else; the message says what, and can stand after "not valid JSON: ".
    """
    parts = (b",", b"[", b"{") if isinstance(data, bytes) else (",", "[", "{")
    if sum(data.count(part) for part in parts) > values:  # pyright: ignore[reportArgumentType] -- parts are of data's own kind
        raise ValueError(f"it has more than {values:,} values")
    try:
        return json.loads(
            data.decode("utf-8") if isinstance(data, bytes) else data,
            object_pairs_hook=_object,
            parse_int=_whole,
            parse_float=float if floats else _no_float,
            parse_constant=float if floats else _no_float,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:  # also JSONDecodeError and UnicodeDecodeError
        raise ValueError(str(error)[:200]) from error


def read(path: str | Path, named: bool = False, most: int = FILE_BYTES, values: int = VALUES) -> Any:
    """The JSON of a file of at most so many bytes. `named`: by the user, who may mean a pipe, or a link. A file that was found in a
    folder must be a regular one there: what a link shows could be the reader's own secrets.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too large, or not such JSON.
    """
    return loads(read_bytes(path, named, most), values=values)


def opened(path: str | Path, named: bool = False) -> BinaryIO:
    """The file to read, as `read` would."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (0 if named else os.O_NOFOLLOW | os.O_NONBLOCK))
    if not named and not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("it is not a regular file")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: str | Path, named: bool = False, most: int = FILE_BYTES) -> bytes:
    """As `read`, without a look at what is in the file."""
    with opened(path, named) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    return data


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"key {name!r:.80} occurs twice in one object")
        found[name] = value
    return found


def _whole(text: str) -> int:
    if len(text) > DIGITS + 1:  # and a sign
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _no_float(text: str) -> NoReturn:
    raise ValueError(f"{text[:30]} is not a whole number")
