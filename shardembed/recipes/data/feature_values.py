"""What a model takes of a number: itself, its logarithm, or its bucket, in clicks, in towers and in folders that serve alike.

Numbers are float32, as files are read. Edges of buckets are made as narrow before they are compared: 0.7 of a file, which is
0.69999999 as float32, is not below an edge of 0.7.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def signed_log(numbers: np.ndarray) -> np.ndarray:
    """sign(x) log(1 + |x|), of any shape and in the same dtype; a missing number (NaN) counts as 0."""
    known = np.nan_to_num(numbers)
    return np.sign(known) * np.log1p(np.abs(known))


def edges_of(buckets: Sequence[float]) -> np.ndarray:
    """Edges to compare numbers with, float32 `[edges]`."""
    return np.asarray(buckets, np.float32)


def bucket_of(numbers: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """How many edges are not above each number, int64 `[n]`; a missing number (NaN) counts as 0."""
    return np.searchsorted(edges, np.nan_to_num(numbers), side="right").astype(np.int64, copy=False)
