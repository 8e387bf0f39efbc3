"""Bytes of a text file cut between its lines, of which each of the three kinds of ends may be there: LF, CR LF, CR."""

from __future__ import annotations

import io
import re
from itertools import islice

import numpy as np

CUTS_TRIED = 64
LINE_END = re.compile(rb"\r\n|\r|\n")


def lines_of(data: bytes) -> list[str]:
    """With their ends; what is no UTF-8 is replaced."""
    return list(io.StringIO(data.decode("utf-8", "replace"), newline=""))


def cut(rest: bytes, read: bytes) -> tuple[bytes, bytes]:
    """What has not been given out and what comes next, as whole lines and what is left; at the end of a file all are whole."""
    if not read:
        return rest, b""
    if b'"' not in read and b'"' not in rest:  # with one copy of them instead of two
        whole = whole_lines(read)
        return (b"".join((rest, memoryview(read)[:whole])), read[whole:]) if whole else (b"", rest + read)
    both = rest + read
    whole = whole_lines(both)
    return both[:whole], both[whole:]


def whole_lines(data: bytes) -> int:
    """How many bytes of `data` are whole lines, 0 if there is none. The lines of a quoted value stay together if possible."""
    end = len(data)
    last = 0
    quoted = b'"' in data
    for _ in range(CUTS_TRIED):
        end = data.rfind(b"\n", 0, end) + 1 or data.rfind(b"\r", 0, min(end, len(data) - 1)) + 1
        last = last or end
        if not end or not quoted or data.count(b'"', 0, end) % 2 == 0:
            return end or last
        end -= 1
    return last


def after_lines(data: bytes, count: int) -> bytes:
    """What comes after the first `count` lines."""
    ends = islice(LINE_END.finditer(data), count - 1, count)
    return data[next((found.end() for found in ends), len(data)) :]


def line_count(data: bytes) -> int:
    """Ends of lines, of each of the three kinds, and a last line without one."""
    ends = int(np.count_nonzero(np.frombuffer(data, np.uint8) == ord("\n")))  # a sixth of the time of bytes.count
    if b"\r" in data:
        ends += data.count(b"\r") - data.count(b"\r\n")
    return ends + (bool(data) and not data.endswith((b"\n", b"\r")))
