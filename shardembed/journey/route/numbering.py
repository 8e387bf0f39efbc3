"""Ids of dynamic tables as small numbers, batch by batch, so that they are routed as the rows of any table.

Within a batch the distinct ids of such a table are numbered from 0 on. Routing works on these numbers; what travels as a key is the
id itself, and its owner is that of its bucket.

Legend: N ids, U distinct ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shardembed.errors import InputError
from shardembed.inputs.ids import IdBatch
from shardembed.kernels.interning import intern
from shardembed.tables.table_config import Feature, TableConfig
from shardembed.wire.message import Numbers

NUMBERS = 1 << 28  # set aside for the distinct ids that a batch may have of a table: their bits go into words that are sorted
PADDING = 0  # the number of a padding id


@dataclass(frozen=True)
class Originals:
    """The ids that numbers stand for.

    Attributes:
        ids_U: of all dynamic tables, one after the other, int64.
        starts: where those of each table begin, int64 `[tables]`; -1 for tables whose ids are their rows.
    """

    ids_U: torch.Tensor
    starts: Numbers


def number_ids(
    ids: IdBatch, features: Sequence[Feature], tables: Sequence[TableConfig], dynamic: Sequence[int]
) -> tuple[IdBatch, Originals]:
    """The batch with the ids of the tables `dynamic` numbered, a padding id first, and what the numbers stand for.

    Raises:
        InputError: a batch has more distinct ids of a table than there are numbers.
    """
    starts = np.full(len(tables), -1, dtype=np.int64)
    pieces = list(ids.ids.split(ids.sizes))
    found: list[torch.Tensor] = []
    before = 0
    for table in dynamic:
        asking = [i for i, feature in enumerate(features) if feature.table == table]
        if not asking:
            continue
        interned = intern(_cat([pieces[i] for i in asking]), tables[table].padding_idx)
        count = interned.ids_U.numel()
        if count > NUMBERS:
            raise InputError(
                f"table {tables[table].name!r}: a batch of {count:,} distinct ids; a rank can ask for {NUMBERS:,} of a dynamic "
                "table at once, so use smaller batches"
            )
        for i, numbers in zip(asking, interned.numbers_N.split([ids.sizes[i] for i in asking]), strict=True):
            pieces[i] = numbers
        starts[table], before = before, before + count
        found.append(interned.ids_U)
    return ids.numbered(_cat(pieces)), Originals(_cat(found) if found else ids.ids[:0], starts)


def _cat(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
