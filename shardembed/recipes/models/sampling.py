"""Sampled softmax, and the negatives for it: drawn by smoothed popularity and the same on every rank."""

from __future__ import annotations

import math

import numpy as np
import torch

POWER = 0.75  # flattens popularity, as word2vec does (Mikolov et al., NIPS 2013)
SMOOTHING = 1.0  # interactions added to every item, so that items never seen in training are pushed down too
STREAM = 0x4E656773  # keeps these draws apart from others with the same seed


class NegativeSampler:
    """Draws `count` items a step, with replacement, from q(i) ~ (interactions of i + 1)^0.75.

    The draw depends on (seed, step) alone: a counter-based generator needs no state to agree on between ranks, and none to save.

    Attributes:
        log_expected: log(count * q), float32 `[items]`: the logQ correction, which makes the sampled softmax an estimate of the
            softmax over all items (Bengio and Senecal, 2008; Yi et al., RecSys 2019).
    """

    def __init__(self, item_counts: np.ndarray, count: int, seed: int) -> None:
        weights = (item_counts + SMOOTHING) ** POWER
        self._cumulated = np.cumsum(weights)
        self._count = count
        self._key = np.array([seed, STREAM], dtype=np.uint64)
        log_expected = np.log(weights) - math.log(self._cumulated[-1]) + math.log(count)
        self.log_expected = torch.from_numpy(log_expected.astype(np.float32))

    def draw(self, step: int) -> torch.Tensor:
        """The negatives of a step: item ids, int64 `[count]`."""
        stream = np.random.Generator(np.random.Philox(key=self._key, counter=[0, 0, 0, step]))
        points = stream.random(self._count) * self._cumulated[-1]
        ids = np.searchsorted(self._cumulated, points, side="right")
        return torch.from_numpy(np.minimum(ids, len(self._cumulated) - 1))


def sampled_softmax(
    queries_nD: torch.Tensor,
    positives_nD: torch.Tensor,
    items: torch.Tensor,
    negatives_KD: torch.Tensor,
    negatives: torch.Tensor,
    log_expected: torch.Tensor,
) -> torch.Tensor:
    """The loss of each query, float32 `[n]`, for which `items` `[n]` are right and `negatives` `[K]` are wrong.

    Args:
        positives_nD, negatives_KD: vectors of `items` and `negatives`.
        log_expected: of the sampler that drew the negatives.
    """
    positive_n = (queries_nD * positives_nD).sum(1)
    negative_nK = queries_nD @ negatives_KD.t() - log_expected[negatives]
    # A negative that is the sample's own item by chance would punish the right answer.
    negative_nK = negative_nK.masked_fill(items[:, None] == negatives, -torch.inf)
    return torch.logaddexp(positive_n, negative_nK.logsumexp(1)) - positive_n
