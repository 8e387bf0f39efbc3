"""AUC and normalised entropy of predictions that are spread over the ranks; both exact, whatever the number of ranks.

AUC is the share of (click, no click) pairs in which the click has the higher score, ties counting half. torchmetrics brings every
score to every rank for it; here scores are dealt out by size, so that each rank sorts a stretch of them. The normalised entropy is
the log loss, divided by that of a model that always predicts the share of clicks (He et al., "Practical lessons from predicting
clicks on ads at Facebook", ADKDD 2014).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
import torch

from shardembed.comm.comm import Comm

BUCKETS = 1 << 16  # of scores, by the upper half of their bits


@dataclass(frozen=True)
class ClickMetrics:
    """Of all ranks' rows. What is not defined is nan.

    Attributes:
        rows: how many there are.
        auc: the area under the ROC curve.
        normalized_entropy: the log loss, divided by that of the share of clicks.
        log_loss: mean, in nats.
        click_rate: the share of clicks.
        calibration: the mean prediction, divided by the share of clicks.
    """

    rows: int
    auc: float
    normalized_entropy: float
    log_loss: float
    click_rate: float
    calibration: float

    def to_json(self) -> dict[str, float | int | None]:
        """Numbers that are not defined, as those of rows without a click, are None."""
        return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in asdict(self).items()}


def probabilities(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-z)) of log-odds `[n]`, float64, without an overflow on the way."""
    return np.exp(-np.logaddexp(0, -logits.astype(np.float64)))


def measure(logits: np.ndarray, labels: np.ndarray, comm: Comm, device: torch.device) -> ClickMetrics:
    """The metrics of log-odds, float32 `[n]`, and labels, 0 or 1 `[n]`, of this rank's rows. Collective; n may differ and be 0."""
    z, y = logits.astype(np.float64), labels.astype(np.float64)
    losses = np.maximum(z, 0) - z * y + np.log1p(np.exp(-np.abs(z)))
    predicted = probabilities(z)
    parts = torch.tensor([len(z), losses.sum(), y.sum(), predicted.sum()], dtype=torch.float64, device=device)
    rows, loss, clicks, expected = comm.all_reduce("sum losses", parts).tolist()
    area = auc(logits, labels, comm, device)
    rate = clicks / rows if rows else math.nan
    entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate)) if 0 < rate < 1 else math.nan
    mean = loss / rows if rows else math.nan
    return ClickMetrics(int(rows), area, mean / entropy, mean, rate, expected / clicks if clicks else math.nan)


def auc(scores: np.ndarray, labels: np.ndarray, comm: Comm, device: torch.device) -> float:
    """The area under the ROC curve of all ranks' scores, float32 `[n]`; NaN where there are no pairs, or a NaN
    among the scores. Collective.
    """
    keys = _keys(scores)
    buckets = (keys >> 16) + BUCKETS // 2
    counts = torch.from_numpy(np.append(np.bincount(buckets, minlength=BUCKETS), np.isnan(scores).sum()).astype(np.float64))
    counts = comm.all_reduce("count scores", counts.to(device)).cpu().numpy()
    if counts[-1]:
        return math.nan
    below = np.cumsum(counts[:-1]) - counts[:-1]
    owners = np.minimum(below * comm.world_size // max(1.0, counts.sum()), comm.world_size - 1).astype(np.int64)
    mine = _exchanged(keys * 2 + labels.astype(np.int64), owners[buckets], comm, device)
    values, places = np.unique(mine >> 1, return_inverse=True)
    positive = np.bincount(places.reshape(-1), weights=mine & 1, minlength=len(values))
    negative = np.bincount(places.reshape(-1), minlength=len(values)) - positive
    # All scores of lower ranks are lower.
    told = torch.zeros(comm.world_size, 2, dtype=torch.float64, device=device)
    told[comm.rank] = torch.tensor([positive.sum(), negative.sum()])
    told = comm.all_reduce("count clicks", told).cpu().numpy()
    lower = told[: comm.rank, 1].sum()
    won = float((positive * (np.cumsum(negative) - negative / 2 + lower)).sum())
    won = float(comm.all_reduce("sum pairs", torch.tensor([won], dtype=torch.float64, device=device)))
    pairs = float(told[:, 0].sum() * told[:, 1].sum())
    return won / pairs if pairs else math.nan


def _keys(scores: np.ndarray) -> np.ndarray:
    """int64 `[n]` of 32 bits, in the order of the scores; 0.0 and -0.0 are one."""
    bits = (scores.astype(np.float32) + np.float32(0)).view(np.int32)
    return (bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))).astype(np.int64)


def _exchanged(values: np.ndarray, owners: np.ndarray, comm: Comm, device: torch.device) -> np.ndarray:
    """What the ranks hold of this rank's values, each with its owner. Collective."""
    if comm.world_size == 1:
        return values
    ones = [1] * comm.world_size
    sizes = torch.from_numpy(np.bincount(owners, minlength=comm.world_size)).to(device)
    received = comm.all_to_all("control", "deal out scores: sizes", sizes, ones, ones).tolist()
    send = torch.from_numpy(values[np.argsort(owners, kind="stable")]).to(device)
    return comm.all_to_all("control", "deal out scores", send, sizes.tolist(), received).cpu().numpy()
