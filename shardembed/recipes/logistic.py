"""A baseline for clicks: logistic regression on the numbers and on the columns of few values, as whoever sees data first would fit.

It is fitted on a sample of the training rows that follows from the data alone, by Newton's method (iteratively reweighted least
squares), to the end. Each rank has the rows of its share of the parts, and sums go over all of them.

Legend: n rows of this rank, F features: a constant, the numbers, and one for each value of columns of few.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from shardembed.comm.comm import Comm
from shardembed.comm.job import default_device
from shardembed.recipes.data.clicks.encode import Encoder
from shardembed.recipes.data.clicks.rows import Clicks, concatenate
from shardembed.recipes.data.clicks.scan import ClickData
from shardembed.recipes.data.fingerprint import held_to
from shardembed.recipes.data.held import TRAINING
from shardembed.recipes.data.stream import hash_rows
from shardembed.recipes.together import on_all

SAMPLE = 100_000  # rows that it is fitted on, about
READ = 4_000_000  # rows that the sample is taken of, from the beginning of each part; of fewer all
SEED = 0x4C6F67
FEW = 32  # values of a column that get a weight each
ROUNDS, ENOUGH = 30, 1e-8  # of Newton's method, and a step after which there is none
RIDGE = 1.0  # times half the squares of the weights, which are of standardised features: as scikit-learn has it by default


@dataclass(frozen=True)
class Logistic:
    """A fitted model.

    Attributes:
        encoder: of the columns.
        values: of each table with an id a row and few ids, these, ascending.
        mean: of the features, float64 `[F]`.
        deviation: their standard deviations, float64 `[F]`.
        weights: of the standardised features, float64 `[F]`.
        rate: the share of clicks among the rows that it was fitted on.
    """

    encoder: Encoder
    values: dict[str, np.ndarray]
    mean: np.ndarray
    deviation: np.ndarray
    weights: np.ndarray
    rate: float

    def logits(self, clicks: Clicks) -> np.ndarray:
        """Log-odds float32 `[n]`."""
        features = (_features(self.encoder, self.values, clicks) - self.mean) / self.deviation
        return (features @ self.weights).astype(np.float32)


def fit(data: ClickData, encoder: Encoder, comm: Comm) -> Logistic:
    """Collective.

    Raises:
        DataError: on all ranks: the data are not what they were when they were scanned.
    """
    mine = on_all(comm, "sample rows for logistic regression", lambda: _sample(data, comm))
    values = _few(encoder, mine, comm)
    features, labels = _features(encoder, values, mine), mine.labels.astype(np.float64)
    rows, clicks = _summed(comm, np.array([len(mine), labels.sum()]))
    mean = _summed(comm, features.sum(0)) / rows
    deviation = np.sqrt(_summed(comm, ((features - mean) ** 2).sum(0)) / rows)
    mean[0], deviation[0] = 0.0, 1.0
    deviation[deviation < 1e-9] = 1.0
    features = (features - mean) / deviation
    rate = float(np.clip(clicks / rows, 1 / (rows + 2), 1 - 1 / (rows + 2)))
    weights = np.zeros(features.shape[1])
    weights[0] = np.log(rate / (1 - rate))
    penalty = np.full(len(weights), RIDGE)
    penalty[0] = 0.0
    for _ in range(ROUNDS):
        chances = 1 / (1 + np.exp(-np.clip(features @ weights, -30, 30)))
        slope = _summed(comm, features.T @ (labels - chances)) - penalty * weights
        curve = _summed(comm, (features.T * (chances * (1 - chances))) @ features)
        step = np.linalg.solve(curve + np.diag(penalty + 1e-9 * rows), slope)
        weights = weights + step
        if np.abs(step).max() < ENOUGH:
            break
    return Logistic(encoder, values, mean, deviation, weights, rate)


def _sample(data: ClickData, comm: Comm) -> Clicks:
    """This rank's share of the rows; none where it has no part."""
    counted = data.counted
    part_read = min(1.0, READ / counted.total)
    share = min(1.0, SAMPLE / max(1.0, data.training_rows * part_read))
    some = max(range(len(counted.seen)), key=lambda part: counted.seen[part].rows)
    first, found = 0, [next(_all(data, some))[:0]]  # the right columns, though there be no row
    for part, seen in enumerate(counted.seen):
        if part % comm.world_size == comm.rank:
            row, last = first, first + round(part_read * seen.rows)
            for clicks in _all(data, part):
                picked = (hash_rows(SEED, row, len(clicks)) >> np.uint64(11)).astype(np.float64) < share * 2.0**53
                picked &= data.split.of(row, clicks) == TRAINING
                found.append(clicks[np.flatnonzero(picked)])
                row += len(clicks)
                if row >= last:
                    break
        first += seen.rows
    return concatenate(found)


def _all(data: ClickData, part: int) -> Iterator[Clicks]:
    return held_to(data.counted.seen[part], partial(data.source.chunks, part), data.source.parts[part], concatenate)


def _few(encoder: Encoder, mine: Clicks, comm: Comm) -> dict[str, np.ndarray]:
    """The values of each table with an id a row that has few of them in the sample of all ranks. Collective."""
    told: dict[str, list[int] | None] = {}
    for table in encoder.tables:
        if table.feature.kind != "ids":
            distinct = np.unique(table.of(mine))
            told[table.feature.name] = distinct.tolist() if len(distinct) <= FEW else None
    everyone = [json.loads(text) for text in comm.gather_texts("control", "find columns of few values", json.dumps(told))]
    found = {}
    for name in told:
        lists = [one[name] for one in everyone]
        if all(one is not None for one in lists):
            values = np.unique(np.array([value for one in lists for value in one], np.int64))
            if 2 <= len(values) <= FEW:
                found[name] = values
    return found


def _features(encoder: Encoder, values: dict[str, np.ndarray], clicks: Clicks) -> np.ndarray:
    """float64 `[n, F]`. A value that the sample had not has none of the weights of its column."""
    columns = [np.ones((len(clicks), 1)), encoder.numbers(clicks.numbers).astype(np.float64)]
    for table in encoder.tables:
        if table.feature.name in values:
            columns.append((table.of(clicks)[:, None] == values[table.feature.name]).astype(np.float64))
    return np.concatenate(columns, axis=1)


def _summed(comm: Comm, values: np.ndarray) -> np.ndarray:
    """The sum over all ranks, the same on all. Collective."""
    tensor = torch.from_numpy(np.ascontiguousarray(values, np.float64)).to(default_device())
    return comm.all_reduce("sum of a logistic regression", tensor).cpu().numpy()
