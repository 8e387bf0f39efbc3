"""Whether predicted chances come true: rows in bins by their predictions, over all ranks."""

from __future__ import annotations

import numpy as np
import torch

from shardembed.comm.comm import Comm
from shardembed.recipes.ctr_metrics import probabilities

BINS = 20
STEP, MOST = 1 / 128, 16.0  # of log-odds: predictions that are nearer than that share a bin, and what is beyond is at the end


def calibration_bins(
    logits: np.ndarray, labels: np.ndarray, comm: Comm, device: torch.device, bins: int = BINS
) -> dict[str, list[float] | list[int]] | None:
    """At most `bins` bins with about as many rows each, the lowest predictions first: `predicted`, the mean prediction of each,
    `observed`, its share of clicks, and `rows`. None where there is no row, or a prediction is nan. Collective.

    All ranks count their rows on one fine grid of log-odds, whose steps are put together to bins: the result is that of all rows,
    whatever rank has which, and rows of equal predictions share a bin. So a bin may have more than its part of the rows.

    Args:
        logits: log-odds of this rank's rows, float32 `[n]`; n may differ and be 0.
        labels: 0 or 1 `[n]`.
    """
    lost, places = np.isnan(logits), round(2 * MOST / STEP) + 1
    z = np.where(lost, 0.0, logits.astype(np.float64))
    place = np.rint((np.clip(z, -MOST, MOST) + MOST) / STEP).astype(np.int64)
    predicted = probabilities(z)
    sums = [
        np.bincount(place, weights, places) for weights in (None, labels.astype(np.float64), predicted, lost.astype(np.float64))
    ]
    counted = torch.from_numpy(np.stack([each.astype(np.float64) for each in sums])).to(device)
    rows, clicks, expected, without = comm.all_reduce("count predictions", counted).cpu().numpy()
    total = rows.sum()
    if not total or without.any():
        return None
    # A step of the grid belongs to the bin in which its middle row is.
    owner = np.minimum((np.cumsum(rows) - rows / 2) * bins // total, bins - 1).astype(np.int64)
    found = [np.bincount(owner, each, bins) for each in (rows, clicks, expected)]
    rows, clicks, expected = (each[found[0] > 0] for each in found)
    return {
        "predicted": np.minimum(expected / rows, 1.0).tolist(),
        "observed": (clicks / rows).tolist(),
        "rows": rows.astype(np.int64).tolist(),
    }
