"""Dropout that does not depend on how a global batch is dealt to ranks.

Whether an element is dropped follows from (seed, step, layer, sequence, position, column) alone: a counter-based generator is
set to the place in its stream where the rank's part of the batch begins. So no state is saved, and a resumed run drops the same.

Legend: b sequences (or samples) of this rank, L positions, D columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

Drop = Callable[[int, torch.Tensor], torch.Tensor]  # of a layer's number and what it gives: the same, with some elements dropped
STREAM = 0x44726F70  # keeps these draws apart from others with the same seed
LEVELS = 1 << 16  # an element is kept or dropped by 16 random bits
A_BLOCK = 16  # elements of one count of the generator


@dataclass(frozen=True)
class Dropout:
    """Of one step.

    Attributes:
        probability: that an element is dropped.
        seed: of the job.
        step: which one.
        first: the number in the global batch of this rank's first sequence.
        length: L of the longest sequence there may be.
        width: D.
    """

    probability: float
    seed: int
    step: int
    first: int
    length: int
    width: int

    def __call__(self, layer: int, x_bLD: torch.Tensor) -> torch.Tensor:
        """What is kept of `[b, L, D]`, scaled up, in its dtype; drawn on the CPU and copied to its device."""
        dropped = min(round(self.probability * LEVELS), LEVELS - 1)
        if not dropped:
            return x_bLD
        sequences, length, _ = x_bLD.shape
        elements = self.length * self.width
        blocks = -(-elements // A_BLOCK)
        key = np.array([self.seed, STREAM], dtype=np.uint64)
        stream = np.random.Philox(key=key, counter=[self.first * blocks, 0, layer, self.step])
        bits = stream.random_raw(sequences * blocks * A_BLOCK // 4).view(np.uint16).reshape(sequences, blocks * A_BLOCK)
        kept = (bits[:, :elements] >= dropped).reshape(sequences, self.length, self.width)[:, :length]
        mask = torch.from_numpy(np.ascontiguousarray(kept)).to(x_bLD.device)
        return x_bLD * mask * (LEVELS / (LEVELS - dropped))


def dropout_of_vectors(probability: float, seed: int, step: int, first: int) -> Drop:
    """Of samples with one vector a layer, `[b, D]`, whose D may differ from layer to layer; arguments as of `Dropout`."""

    def drop(layer: int, x_bD: torch.Tensor) -> torch.Tensor:
        return Dropout(probability, seed, step, first, 1, x_bD.shape[1])(layer, x_bD[:, None]).squeeze(1)

    return drop


def keep_all(layer: int, x_bLD: torch.Tensor) -> torch.Tensor:
    """What evaluation does in place of dropout."""
    return x_bLD
