"""Vectors in 8 bits on the wire: each row as whole numbers from -127 to 127, and behind them what they are multiplied with.

The row's largest magnitude becomes 127, so an element is off by at most 1/254 of it. A row with an element that is not finite
arrives as nan, for GradScaler and `on_nonfinite` to see.

Legend: S segments, W columns.
"""

from __future__ import annotations

import torch

LARGEST = 127.0
SCALE_BYTES = 4  # a float32, behind the row


def encode(vectors_SW: torch.Tensor) -> torch.Tensor:
    """uint8 `[S, W + 4]`."""
    if not len(vectors_SW):
        return torch.empty(0, vectors_SW.shape[1] + SCALE_BYTES, dtype=torch.uint8, device=vectors_SW.device)
    vectors_SW = vectors_SW.to(torch.float32)
    largest_S = vectors_SW.abs().amax(1, keepdim=True)
    scale_S = largest_S / LARGEST
    # A row of zeros, or of numbers so small that their scale is 0, stays zero.
    whole_SW = torch.nan_to_num(vectors_SW / scale_S, nan=0.0, posinf=0.0, neginf=0.0).round_().clamp_(-LARGEST, LARGEST)
    scale_S = torch.where(torch.isfinite(largest_S), scale_S, torch.nan)
    return torch.cat([whole_SW.to(torch.int8).view(torch.uint8), scale_S.view(torch.uint8)], dim=1)


def decode(bytes_SW: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`[S, W]` in `dtype` again."""
    width = bytes_SW.shape[1] - SCALE_BYTES
    # Cloned, since a lone row's bytes count as contiguous where they stand, at any address.
    scale_S = bytes_SW[:, width:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    return bytes_SW[:, :width].contiguous().view(torch.int8).to(dtype) * scale_S.to(dtype)


def row_bytes(width: int, dtype: torch.dtype) -> int:
    """Bytes of a vector on the wire."""
    return width + SCALE_BYTES if dtype == torch.int8 else width * dtype.itemsize
