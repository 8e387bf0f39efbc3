"""Ids that would be hard for a hash table, each kind for another reason."""

from __future__ import annotations

import numpy as np
import torch

from shardembed.kernels.mixing import MIX_1, MIX_2, Secret

MASK = 2**64 - 1
LEAST, MOST = -(2**63), 2**63 - 1


def unshifted(numbers: np.ndarray, bits: int) -> np.ndarray:
    """What became these when it was combined with itself, shifted to the right by so many bits; uint64."""
    found = numbers.copy()
    for _ in range(64 // bits):
        found = numbers ^ (found >> np.uint64(bits))
    return found


def inverse(factor: int) -> np.uint64:
    return np.uint64(pow(factor & MASK, -1, 2**64))


def unmixed(numbers: np.ndarray) -> np.ndarray:
    """The ids that splitmix64's finalizer makes these of, which anyone can compute."""
    numbers = unshifted(numbers, 31) * inverse(MIX_2)
    numbers = unshifted(numbers, 27) * inverse(MIX_1)
    return unshifted(numbers, 30)


def untagged(numbers: np.ndarray, secret: Secret) -> np.ndarray:
    """The ids whose hash these are, which only he can compute who knows the secret."""
    numbers = unshifted(numbers * inverse(MIX_2), 32) * inverse(secret.factor_2)
    numbers = unshifted(numbers, 32) * inverse(secret.factor_1)
    return numbers ^ np.uint64(secret.flip & MASK)


def tensor_of(numbers: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(numbers.view(np.int64))


def hard_ids(count: int) -> dict[str, torch.Tensor]:
    """So many distinct ids of each kind, for who does not know the secret."""
    low = np.arange(count, dtype=np.uint64)
    numbers = torch.arange(count)
    return {
        "ascending": numbers,
        "descending to the least": LEAST + numbers.flip(0),
        "ascending to the most": MOST - numbers,
        "multiples of 64 ranks": numbers * 64,
        "multiples of 1,000 ranks": numbers * 1000 - 7,
        "in the high bits": numbers << (63 - count.bit_length()),
        "in bits 40 and up": numbers << 40,
        "in both halves": (numbers << 32) | numbers,
        "squares": numbers**2,
        "one bucket of the table": tensor_of(unmixed((np.uint64(5) << np.uint64(32)) | low)),
        "one low half when mixed": tensor_of(unmixed((low << np.uint64(32)) | np.uint64(5))),
        "ascending when mixed": tensor_of(unmixed(low)),
        "without splitmix64's first product": tensor_of(unshifted(low << np.uint64(40), 30)),
        "without its second product": tensor_of(unshifted(unshifted(low << np.uint64(40), 27) * inverse(MIX_1), 30)),
    }
