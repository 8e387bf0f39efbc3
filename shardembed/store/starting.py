"""The rows that ids of dynamic tables begin with: start(seed, table, id). Any id has one, whether its row is stored or not, and it
depends on nothing else: not on the plan, the ranks, the device, the batch, or on when it is asked for.
"""

from __future__ import annotations

import numpy as np
import torch

from shardembed.errors import ConfigError
from shardembed.kernels.starting import Distribution, draw
from shardembed.tables.initial import table_hash
from shardembed.tables.table_config import Constant, Loaded, Normal, RowFunction, TableConfig, Uniform


def fill_rows(out: torch.Tensor, table: TableConfig, seed: int, ids: torch.Tensor, columns: range) -> None:
    """Write the starting values of `ids` x `columns` of `table` into `out`; those of `padding_idx` are zero.

    Numbers are drawn as float32 and rounded to narrower dtypes. Nothing waits for a device, but that a row function is called with
    ids on the CPU, as for fixed tables, so that all devices get its same numbers.

    Args:
        out: `[n, len(columns)]` of any floating dtype, on any device.
        ids: int64 `[n]`, there; any number is an id.
        columns: of the table, a range without gaps.

    Raises:
        ConfigError: the table's row function gives another shape than `[n, embedding_dim]`.
    """
    start = table.start
    if isinstance(start, Constant):
        out.fill_(start.value)
    elif isinstance(start, Normal | Uniform):
        _draw(out, _distribution(start, table_hash(seed, table.name)), ids, columns)
    else:
        assert not isinstance(start, Loaded), "what is loaded starts as something else"
        _call(out, table, start, ids, columns)
    if table.padding_idx is not None:
        out.masked_fill_((ids == table.padding_idx).unsqueeze(1), 0.0)


def _distribution(start: Normal | Uniform, table: int) -> Distribution:
    """With settings rounded as those of fixed tables are."""
    normal = isinstance(start, Normal)
    scale, offset = (start.std, start.mean) if isinstance(start, Normal) else (start.high - start.low, start.low)
    return Distribution(table, normal, float(np.float32(scale)), float(np.float32(offset)))


def _draw(out: torch.Tensor, numbers: Distribution, ids: torch.Tensor, columns: range) -> None:
    if out.dtype == torch.float32 and out.is_contiguous():
        draw(out, ids, columns.start, numbers)
        return
    beside = torch.empty(out.shape, dtype=torch.float32, device=out.device)
    draw(beside, ids, columns.start, numbers)
    out.copy_(beside)


def _call(out: torch.Tensor, table: TableConfig, start: RowFunction, ids: torch.Tensor, columns: range) -> None:
    if not ids.numel():
        return
    values = start(ids.cpu())
    if values.shape != (ids.numel(), table.embedding_dim):
        raise ConfigError(
            f"table {table.name!r}: init returned shape {tuple(values.shape)} for {ids.numel()} ids; "
            f"it must return [{ids.numel()}, {table.embedding_dim}]"
        )
    out.copy_(values.detach()[:, columns.start : columns.stop])
