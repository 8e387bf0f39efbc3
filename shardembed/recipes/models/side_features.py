"""The vectors that features of a user or of an item add to the row of its id.

    row of the id + sum of the vectors of its features + linear map of its numbers -> what goes into the tower

An id has the row of its value in a table named after the feature, ids have their rows pooled, and numbers that have no buckets go
through one linear map together (Kula, "Metadata embeddings for user and item cold-start recommendations", 2015, in which a user
or an item is the sum of the vectors of what is known of it).

Legend: n users or items of a call, N of all, D columns, M numbers.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

import shardembed as se
from shardembed.errors import DataError
from shardembed.recipes.data.feature_values import bucket_of, edges_of, signed_log
from shardembed.recipes.data.lists import Lists
from shardembed.recipes.data.sides import Side
from shardembed.recipes.data.wanted import MISSING
from shardembed.recipes.features_config import FeatureConfig
from shardembed.recipes.ids_config import DynamicIdsConfig

Lookup = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
MOST_ROWS = 1 << 31  # of a table whose ids are said to be row numbers


class SideFeatures(nn.Module):
    """Adds what features say. Values lie on the device of the model, by number, and are not saved with it.

    Attributes:
        there: there are any.

    Args:
        side: the features, with the values of all N.
        embedding_dim: D.
        tables: among them those of the features that have one, as `feature_tables` makes them.
    """

    numbers: torch.Tensor | None

    def __init__(self, side: Side, embedding_dim: int, tables: list[se.TableConfig]) -> None:
        super().__init__()
        self.there = bool(side.features)
        self._named: dict[str, str] = {}  # feature -> its buffer
        by_name = {table.name: table for table in tables}
        numbers = []
        for place, (feature, values) in enumerate(zip(side.features, side.values, strict=True)):
            if not feature.has_table:
                numbers.append(scaled(feature, np.asarray(values)))
                continue
            self._named[feature.name] = f"ids_{place}"
            ids = table_ids(feature, values, by_name[feature.name])
            flat = ids.values if isinstance(ids, Lists) else ids
            self.register_buffer(f"ids_{place}", torch.from_numpy(flat), persistent=False)
            ends = torch.from_numpy(np.append(0, np.cumsum(ids.lengths))) if isinstance(ids, Lists) else None
            self.register_buffer(f"ids_{place}_offsets", ends, persistent=False)
        stacked = torch.from_numpy(np.stack(numbers, 1)) if numbers else None
        self.register_buffer("numbers", stacked, persistent=False)
        # From zero on, so that a model with numbers begins as one without.
        self.linear = nn.Linear(len(numbers), embedding_dim, bias=False) if numbers else None
        if self.linear is not None:
            nn.init.zeros_(self.linear.weight)

    def lookups(self, wanted: torch.Tensor) -> dict[str, Lookup]:
        """What the tables of the features are asked for: of users or items `wanted`, int64 `[n]`."""
        found: dict[str, Lookup] = {}
        lists: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        for name, buffer in self._named.items():
            flat, offsets = getattr(self, buffer), getattr(self, f"{buffer}_offsets")
            if offsets is None:
                found[name] = flat[wanted]
            else:
                starts, ends = offsets[wanted], (offsets[wanted + 1] - offsets[wanted]).cumsum(0)
                lists[name] = flat, starts, torch.cat([ends.new_zeros(1), ends])
        if lists:
            # Hazard: on a device this waits for it, once for all lists.
            sizes = torch.stack([ends[-1] for _, _, ends in lists.values()]).tolist()
            for (name, (flat, starts, ends)), size in zip(lists.items(), sizes, strict=True):
                moved = torch.repeat_interleave(starts - ends[:-1], ends.diff(), output_size=size)
                found[name] = flat[torch.arange(size, device=flat.device) + moved], ends
        return found

    def added(self, rows_nD: torch.Tensor, vectors: dict[str, torch.Tensor], wanted: torch.Tensor) -> torch.Tensor:
        """Rows of ids `[n, D]` with what features say, float32 if there are any; vectors: what `lookups` found, each `[n, D]`."""
        total = rows_nD
        for name in self._named:
            total = total + vectors[name].float()
        if self.linear is not None:
            assert self.numbers is not None
            total = total + self.linear(self.numbers[wanted])
        return total


def feature_tables(
    side: Side, embedding_dim: int, dtype: torch.dtype, init: se.Normal, ids: DynamicIdsConfig | None
) -> list[se.TableConfig]:
    """A table for each feature whose values are ids; ids: how tables take any id, None where ids are row numbers.

    Raises:
        DataError: ids that are said to be row numbers are none.
    """
    made = []
    for feature, values in zip(side.features, side.values, strict=True):
        if not feature.has_table:
            continue
        pooling = feature.pooling if feature.kind == "ids" else None
        rows = _rows(feature, values) if ids is None or feature.buckets else 1
        table = se.TableConfig(feature.name, rows, embedding_dim, pooling=pooling, dtype=dtype, init=init)
        made.append(table if ids is None or feature.buckets else ids.made_dynamic(table))
    return made


def table_ids(feature: FeatureConfig, values: np.ndarray | Lists, table: se.TableConfig) -> np.ndarray | Lists:
    """What a table is asked for of the values of its feature: the same where these are ids, of a number its bucket, int64 `[N]`; of
    a missing id the last row where ids are row numbers.
    """
    if isinstance(values, Lists):
        return values
    if feature.buckets:
        return bucket_of(values, edges_of(feature.buckets))
    if table.dynamic is not None:
        return values
    assert table.num_embeddings is not None
    return np.where(values == MISSING, table.num_embeddings - 1, values)


def scaled(feature: FeatureConfig, values: np.ndarray) -> np.ndarray:
    """A number as a model takes it, float32 `[N]`; a missing one is 0."""
    return signed_log(values) if feature.scale == "log" else np.nan_to_num(values)


def _rows(feature: FeatureConfig, values: np.ndarray | Lists) -> int:
    """As many as its largest id needs, and one for a missing one; as many as there are buckets."""
    if feature.buckets:
        return len(feature.buckets) + 1
    ids = values.values if isinstance(values, Lists) else values[values != MISSING]
    low, high = (int(ids.min()), int(ids.max())) if len(ids) else (0, 0)
    if low < 0 or high >= MOST_ROWS:
        raise DataError(
            f"data.features: {feature.name!r} has the id {low if low < 0 else high}, which is no row number from 0 on; "
            "data.ids: dynamic takes any integer or text"
        )
    return high + 2
