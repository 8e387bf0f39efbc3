"""A dynamic table as a plain module: its ids and their rows in one process, as `unshard` leaves it, for serving and analysis."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from shardembed.errors import ConfigError, DtypeError
from shardembed.modules.answers import nested_like
from shardembed.store.starting import fill_rows
from shardembed.tables.table_config import TableConfig

MODES = ("sum", "mean", "max")


class IdEmbedding(nn.Module):
    """`nn.Embedding` or `nn.EmbeddingBag` over all int64 ids, of which those in `ids` have a row in `weight`.

    It needs no process group, pickles as any module does, and what it answers is what evaluation answers with the sharded table:
    ids without a row read what `Dynamic.unknown` says, the start that the table would give them or zeros. In training its rows
    learn, and nobody comes or leaves. `state_dict` has `ids` and `weight`, and loads into a module of any number of ids.

    Args:
        table: a dynamic one; its pooling is None (one vector an id), "sum", "mean" or "max".
        seed: of the starts.
        include_last_offset: as in `nn.EmbeddingBag`.

    Attributes:
        ids: int64 `[n]`, ascending; none to begin with.
        weight: their rows, `[n, embedding_dim]`.

    Raises:
        ConfigError: the table is not dynamic, or pools otherwise.
    """

    ids: torch.Tensor

    def __init__(self, table: TableConfig, seed: int = 0, include_last_offset: bool = False) -> None:
        super().__init__()
        poolings = set(table.poolings)
        if table.dynamic is None or len(poolings) > 1 or not poolings <= {None, *MODES}:
            raise ConfigError(
                f"table {table.name!r}: an IdEmbedding is made of a dynamic table with one pooling, None or one of {MODES}; it has "
                f"dynamic={table.dynamic} and {sorted(map(str, poolings))}"
            )
        self.table, self.seed, self.include_last_offset = table, seed, include_last_offset
        self.mode = table.poolings[0]
        self.embedding_dim, self.padding_idx = table.embedding_dim, table.padding_idx
        self.weight = nn.Parameter(torch.empty(0, table.embedding_dim, dtype=table.dtype), requires_grad=not table.frozen)
        self.register_buffer("ids", torch.empty(0, dtype=torch.int64))

    @property
    def num_embeddings(self) -> int:
        """How many ids have a row."""
        return self.ids.numel()

    def fill(self, ids: torch.Tensor, weight: torch.Tensor) -> None:
        """Have these ids and rows, and no others. They are kept where they are, not copied; a Parameter stays the same one.

        Args:
            ids: int64 `[n]`, ascending, each once. weight: `[n, embedding_dim]`.

        Raises:
            ConfigError: they are not.
        """
        if ids.dtype != torch.int64 or ids.dim() != 1 or weight.shape != (ids.numel(), self.embedding_dim):
            raise ConfigError(
                f"table {self.table.name!r}: ids must be int64 [n] and weight [n, {self.embedding_dim}], not {ids.dtype} "
                f"{list(ids.shape)} and {list(weight.shape)}"
            )
        if not ascends(ids):
            raise ConfigError(f"table {self.table.name!r}: ids must ascend, each once")
        learns = self.weight.requires_grad
        self.ids = ids
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=learns)

    def forward(
        self, input: torch.Tensor, offsets: torch.Tensor | None = None, per_sample_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`[*input.shape, embedding_dim]` where nothing is pooled, else `[B, embedding_dim]`, as `nn.EmbeddingBag` answers.

        Raises:
            DtypeError: input is neither int32 nor int64.
        """
        if input.dtype not in (torch.int32, torch.int64):
            raise DtypeError(f"table {self.table.name!r}: ids must be int32 or int64, not {input.dtype}; use ids.long()")
        if self.mode is not None:
            return self._pooled(input, offsets, per_sample_weights)
        if input.is_nested:
            return nested_like(input, self.rows(input.values()))
        return self.rows(input)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows of these ids, of any shape: `[*ids.shape, embedding_dim]`."""
        flat = ids.reshape(-1).to(torch.int64)
        places = torch.searchsorted(self.ids, flat)
        known = places < self.num_embeddings
        known[known.clone()] = self.ids[places[known]] == flat[known]
        vectors = self._strangers(flat[~known])
        if self.num_embeddings:
            there = places[known]
            if self.table.max_norm is not None and there.numel():
                with torch.no_grad():
                    torch.embedding_renorm_(self.weight, there, self.table.max_norm, self.table.norm_type)
            found = F.embedding(there, self.weight)
            order = torch.cat([known.nonzero(), (~known).nonzero()]).squeeze(1)
            vectors = torch.cat([found, vectors])[torch.empty_like(order).scatter_(0, order, torch.arange(len(order)).to(order))]
        return vectors.view(*ids.shape, self.embedding_dim)

    def _strangers(self, ids: torch.Tensor) -> torch.Tensor:
        """What ids without a row read."""
        table = self.table
        assert table.dynamic is not None
        vectors = torch.zeros(ids.numel(), self.embedding_dim, dtype=self.weight.dtype, device=self.weight.device)
        if table.dynamic.unknown == "start" and ids.numel():
            fill_rows(vectors, table, self.seed, ids, range(self.embedding_dim))
            if table.max_norm is not None:
                torch.embedding_renorm_(vectors, torch.arange(len(ids), device=ids.device), table.max_norm, table.norm_type)
        return vectors

    def _pooled(self, input: torch.Tensor, offsets: torch.Tensor | None, per_sample_weights: torch.Tensor | None) -> torch.Tensor:
        """torch's own pooling, over the rows of the distinct ids."""
        distinct, numbers = input.to(torch.int64).unique(return_inverse=True)
        padding = None
        if self.padding_idx is not None and bool((at := distinct == self.padding_idx).any()):
            padding = int(at.nonzero())
        given: dict[str, Any] = {} if input.dim() == 2 else {"include_last_offset": self.include_last_offset}
        return F.embedding_bag(
            numbers,
            self.rows(distinct),
            offsets,
            mode=str(self.mode),
            per_sample_weights=per_sample_weights,
            padding_idx=padding,
            **given,
        )

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take as many ids as the state dict has."""
        ids, weight = state_dict.get(prefix + "ids"), state_dict.get(prefix + "weight")
        if isinstance(ids, torch.Tensor) and not ascends(ids):
            error_msgs.append(f"{prefix}ids: ids of table {self.table.name!r} must ascend, each once; nothing of it was loaded")
            return
        if isinstance(ids, torch.Tensor) and isinstance(weight, torch.Tensor) and ids.shape[:1] != self.ids.shape:
            empty = torch.empty(len(ids), self.embedding_dim, dtype=self.weight.dtype, device=self.weight.device)
            self.ids = torch.empty(len(ids), dtype=torch.int64, device=self.ids.device)
            self.weight = nn.Parameter(empty, requires_grad=self.weight.requires_grad)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def extra_repr(self) -> str:
        assert self.table.dynamic is not None
        pooled = f", mode={self.mode!r}" if self.mode else ""
        return f"{self.num_embeddings} ids, {self.embedding_dim}{pooled}, unknown={self.table.dynamic.unknown!r}"


def ascends(ids: torch.Tensor) -> bool:
    """Whether each id is there once, in order; of ids without values it is taken for granted."""
    return ids.is_meta or bool((ids[1:] > ids[:-1]).all())
