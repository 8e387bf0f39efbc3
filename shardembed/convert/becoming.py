"""Tables of a plain model that become dynamic: which, of how much room, and whether their rows become ids.

Row i of a plain table becomes id i with its weights, but for that of padding_idx, which reads zeros. A bucket has room for so many
ids and no more, and row numbers fall into buckets by chance; so a table needs about half as many places again as it has rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch

from shardembed.convert.sites import Table
from shardembed.errors import ConfigError
from shardembed.kernels.mixing import buckets_of
from shardembed.tables.dynamic import BUCKET_ROWS, Dynamic, buckets_of_table
from shardembed.tables.table_config import TableConfig

GROWTH = 1.02  # of the number of buckets, while the least is looked for that has room for all


@dataclass(frozen=True)
class Becoming:
    """What a user of `shard` says of it, each by name or pattern of tables.

    Attributes:
        dynamic: how ids come and go.
        capacity: in place of num_embeddings of the module; None: the table grows.
        fresh: tables whose rows are let go, so that every id begins at its start.
    """

    dynamic: Mapping[str, Dynamic]
    capacity: Mapping[str, int | None]
    fresh: Sequence[str]

    def check(self, names: Sequence[str]) -> None:
        """
        Raises:
            ConfigError: a pattern matches no table, or none that becomes dynamic.
        """
        _check("dynamic=", self.dynamic, names, "table")
        becoming = [name for name in names if _said(name, self.dynamic) is not None]
        _check("capacity=", self.capacity, becoming, "table that becomes dynamic")
        _check("fresh=", self.fresh, becoming, "table that becomes dynamic")

    def config(self, table: Table, exists: bool) -> TableConfig:
        """The table for a collection. exists: rank 0 has its rows.

        Raises:
            ConfigError: its rows are to become ids, and some would find no place.
        """
        name = table.name
        pattern = _said(name, self.dynamic)
        if pattern is None:
            return table.config(exists)
        config = table.config(exists=False)  # no matrix is loaded
        room = _said(name, self.capacity)
        rows = config.num_embeddings
        made = replace(config, num_embeddings=rows if room is None else self.capacity[room], dynamic=self.dynamic[pattern])
        if exists and self.keeps(name):
            _check_room(made, rows)
        return made

    def keeps(self, name: str) -> bool:
        """Whether rows of this table that exist become ids."""
        return not any(fnmatchcase(name, pattern) for pattern in self.fresh)


def row_ids(config: TableConfig, first: int, last: int, device: torch.device) -> torch.Tensor:
    """The ids that these rows become, int64."""
    ids = torch.arange(first, last, device=device)
    return ids if config.padding_idx is None else ids[ids != config.padding_idx]


def _said(name: str, patterns: Mapping[str, Any]) -> str | None:
    """The key that speaks of a table: its own name before patterns, and those in their order."""
    return next((key for key in [name, *patterns] if key in patterns and (key == name or fnmatchcase(name, key))), None)


def _check(argument: str, patterns: Mapping[str, Any] | Sequence[str], names: Sequence[str], what: str) -> None:
    if isinstance(patterns, str) or (argument != "fresh=" and not isinstance(patterns, Mapping)):
        example = f"{argument}['*']" if argument == "fresh=" else f"{argument}{{'*': ...}} say"
        raise ConfigError(f"{argument} must be given by name or pattern of tables, {example}, not {patterns!r}")
    for pattern in patterns:
        if not any(name == pattern or fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"{argument} names {pattern!r}, which matches no {what}; they are {list(names)}")


def _check_room(config: TableConfig, rows: int) -> None:
    """Whether all these rows find a place as ids."""
    if config.grows:
        return
    ids = row_ids(config, 0, rows, torch.device("cpu"))
    missing = _without(ids, config.cut_rows, config.bucket_rows)
    if missing:
        name = config.name
        raise ConfigError(
            f"{name}: {missing:,} of its {rows:,} rows find no place as ids of a dynamic table for {config.num_embeddings:,}, "
            f"since ids fall into buckets of {config.bucket_rows} by a mix of their bits. Give it room for all with "
            f"capacity={{{name!r}: {_enough(ids, config.cut_rows)}}}, let it grow with capacity={{{name!r}: None}}, or, where its "
            f"rows are not worth keeping, have every id begin anew with fresh=[{name!r}]"
        )


def _without(ids: torch.Tensor, buckets: int, room: int) -> int:
    """How many of these ids find no place."""
    return int((torch.bincount(buckets_of(ids, buckets), minlength=buckets) - room).clamp(min=0).sum())


def _enough(ids: torch.Tensor, buckets: int) -> int:
    """A capacity that has room for all of these ids."""
    while _without(ids, buckets, BUCKET_ROWS):
        buckets = max(buckets + 1, int(buckets * GROWTH))
    capacity = buckets * BUCKET_ROWS
    assert buckets_of_table(capacity) == buckets, "buckets of a table are full ones"
    return capacity
