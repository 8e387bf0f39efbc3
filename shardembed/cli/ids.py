"""Ids on the command line and in files: `3,17,100-199`, an id a line, or a .npy file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from shardembed.config.scalars import int64_of
from shardembed.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch

_RANGE = re.compile(r"([0-9]{1,18})-([0-9]{1,18})")
MOST = 1 << 28  # ids of one range: 2 GiB


def id_of(text: str) -> int:
    """The id that --id names: a number of 64 bits as it is, else the `se.hash64` of a text, as dynamic tables have it."""
    number = int64_of(text)
    if number is not None:
        return number
    from shardembed.inputs.hash64 import hash64

    return int(hash64([text])[0])


def ids_of(text: str | None, file: Path | None) -> torch.Tensor | None:
    """The ids that --rows or --rows-file name, as int64; None where neither was given."""
    if text is not None and file is not None:
        raise ConfigError("give --rows or --rows-file, not both")
    if text is not None:
        return _of_text(text)
    return _of_file(file) if file is not None else None


def _of_text(text: str) -> torch.Tensor:
    import torch

    parts = []
    for part in text.split(","):
        number = int64_of(part.strip())
        if number is not None:
            parts.append(torch.tensor([number]))
            continue
        match = _RANGE.fullmatch(part.strip())
        if not match:
            raise ConfigError(f"--rows {text}: {part.strip()!r} is neither an id nor a range such as 100-199")
        first, last = int(match[1]), int(match[2])
        if not first <= last < first + MOST:
            raise ConfigError(f"--rows {text}: the range {part.strip()} must go up, over at most {MOST:,} ids")
        parts.append(torch.arange(first, last + 1))
    return torch.cat(parts)


def _of_file(path: Path) -> torch.Tensor:
    import numpy as np
    import torch

    try:
        if path.suffix == ".npy":
            found = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: no more memory than the file has bytes
            if not isinstance(found, np.ndarray):
                raise DataError(f"{path} holds several arrays, and must hold a list of integers")
            if found.ndim != 1 or found.dtype.kind not in "iu":
                raise DataError(f"{path} holds {found.dtype} of shape {found.shape}, and must hold a list of integers")
            return torch.from_numpy(np.array(found, np.int64))
        numbers = []
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                word = line.strip()
                if not word:
                    continue
                found_id = int64_of(word)
                if found_id is None:
                    raise DataError(f"{path}:{number}: {word[:40]!r} is not an id: one whole number of 64 bits a line")
                numbers.append(found_id)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # also UnicodeDecodeError; DataError is told as it is
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} holds no ids: {error}") from error
    return torch.tensor(numbers, dtype=torch.int64)
