"""Numbers that users pass, as torch takes them: Python's and NumPy's, and integers in tensors. What is kept of them is Python's, so
that texts and JSON of settings do not depend on where a number came from.
"""

from __future__ import annotations

import numbers
import operator
import re
from typing import Any

import numpy as np
import torch

_DIGITS = re.compile(r"-?[0-9]{1,19}")


def is_bool(value: Any) -> bool:
    """A truth value, of whatever library."""
    return isinstance(value, bool | np.bool_) or (isinstance(value, torch.Tensor) and value.dtype is torch.bool)


def integer(value: Any) -> int | None:
    """`value` as an int; None for what is no whole number: truth values and floats are none."""
    try:
        return None if is_bool(value) else operator.index(value)
    except TypeError:
        return None


def int64_of(word: str) -> int | None:
    """The whole number of 64 bits with a sign that a word is; None where it is none."""
    number = int(word) if _DIGITS.fullmatch(word) else None
    return None if number is None else within(number, -(1 << 63), (1 << 63) - 1)


def real(value: Any) -> int | float | None:
    """`value` as an int or a float; None for what is no number: truth values are none."""
    if is_bool(value):
        return None
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else None


def within(value: Any, low: int, high: int) -> int | None:
    """`value` as an int from `low` up to and with `high`; None for anything else."""
    number = integer(value)
    return number if number is not None and low <= number <= high else None
