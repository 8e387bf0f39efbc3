"""Numbers on their way out: as they are stored, as another floating-point dtype, or as int8 with a scale a row.

int8: `scale = max(|row|) / 127` in float32, `q = round(row / scale)` in -127 to 127 (half to even), and `q * scale` is the row
again, each element within half a scale. A row of zeros has scale 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from shardembed.embeddings.stored import Block
from shardembed.errors import ExportError

As = Literal["stored", "float32", "float16", "int8"]
CHOICES: tuple[As, ...] = get_args(As)
LEVELS = 127


@dataclass(frozen=True)
class Narrowed:
    """Values to write.

    Attributes:
        values: `[rows, columns]` in the dtype that is written.
        scale: float32 `[rows]` where values are int8, else None.
    """

    values: torch.Tensor
    scale: torch.Tensor | None = None


def written_dtype(stored: torch.dtype, chosen: As) -> torch.dtype:
    return stored if chosen == "stored" else getattr(torch, chosen)


def narrowed(name: str, block: Block, dtype: torch.dtype) -> Narrowed:
    """The rows of a block in `dtype`.

    Raises:
        ExportError: a number does not fit; the message names table, row and number.
    """
    if dtype == torch.int8:
        return _int8(name, block)
    values = block.values.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(block.values.dtype).max:
        _refuse(name, block, values.isinf() & block.values.isfinite(), f"is beyond what {_short(dtype)} can hold")
    return Narrowed(values)


def _int8(name: str, block: Block) -> Narrowed:
    wide = block.values.to(torch.promote_types(block.values.dtype, torch.float32))
    _refuse(name, block, ~wide.isfinite(), "has no int8: export as stored to keep it")
    scale = (wide.abs().amax(1) / LEVELS).to(torch.float32)
    _refuse(name, block, scale.isinf().unsqueeze(1).expand_as(wide), "is beyond what a float32 scale can hold")
    divisor = torch.where(scale > 0, scale, 1.0).to(wide.dtype)
    values = (wide / divisor.unsqueeze(1)).round_().clamp_(-LEVELS, LEVELS)
    return Narrowed(values.to(torch.int8), scale)


def _refuse(name: str, block: Block, wrong: torch.Tensor, why: str) -> None:
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        value = float(block.values[row, column])
        raise ExportError(f"table {name!r}: {value:g} in row {int(block.ids[row])}, column {column} {why}; choose another dtype")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
