"""A SASRec-style model over one sharded table: from the items a user took to the item that comes next.

    item table -> + position -> (causal self-attention -> feed-forward) x layers -> norm \\
                                                                                          dot product -> sampled softmax
    item table ---------------------------------------------------------------------------/

The table is tied: its rows are what goes in, and what the output is compared with (Kang and McAuley, "Self-attentive sequential
recommendation", ICDM 2018). Positions are counted from the end of a sequence. Layers are normalised before they are computed,
and trained with shared negatives and a softmax over them rather than with one negative a position.

Sequences stand at the beginning of their padded rows, so that what is behind them is never attended to: padding needs no mask.

Legend: b sequences of this rank, n items of all of them, L positions, D columns, K negatives, T targets (all but each first item).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

import shardembed as se
from shardembed.embeddings.compared import Vectors
from shardembed.recipes.ids_config import DynamicIdsConfig
from shardembed.recipes.models.any_ids import AnyIds, ids_of
from shardembed.recipes.models.masks import Drop, Dropout, keep_all
from shardembed.recipes.models.sampling import sampled_softmax
from shardembed.recipes.models.shared import share_of, shared
from shardembed.recipes.sequence_config import SequenceModelConfig

POSITION_STD = 0.02


@dataclass(frozen=True)
class SequenceBatch:
    """This rank's part of a global batch.

    Attributes:
        items: int64 `[n]`, sequence after sequence; numbers from 0, as all here, which `AnyIds` says the ids of.
        lengths: of the sequences, int64 `[b]`, on the CPU; each at least 2.
        negatives: of the step, `[K]`, the same on every rank.
        global_targets: how many the whole batch has.
        drop: what drops elements.
    """

    items: torch.Tensor
    lengths: torch.Tensor
    negatives: torch.Tensor
    global_targets: int
    drop: Drop = keep_all


class Block(nn.Module):
    """Causal self-attention, then an MLP at each position; both add to what comes in."""

    def __init__(self, embedding_dim: int, heads: int, feedforward: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(embedding_dim)
        self.project = nn.Linear(embedding_dim, 3 * embedding_dim)
        self.out = nn.Linear(embedding_dim, embedding_dim)
        self.mlp = nn.Sequential(
            nn.LayerNorm(embedding_dim),
            nn.Linear(embedding_dim, feedforward),
            nn.GELU(),
            nn.Linear(feedforward, embedding_dim),
        )

    def forward(self, x_bLD: torch.Tensor, drop: Drop, layer: int) -> torch.Tensor:
        x_bLD = x_bLD + drop(2 * layer + 1, self.attend(self.norm(x_bLD)))
        return x_bLD + drop(2 * layer + 2, self.mlp(x_bLD))

    def attend(self, x_bLD: torch.Tensor) -> torch.Tensor:
        """`[b, L, D]` -> `[b, L, D]`, each position of those up to it."""
        b, length, dim = x_bLD.shape
        parts = self.project(x_bLD).view(b, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        return self.out(found.transpose(1, 2).reshape(b, length, dim))


class Sasrec(nn.Module):
    """The model; calling it gives this rank's loss. `vectors` says how its table is compared, by its name in a checkpoint.

    Args:
        config: sizes, dropout, dtype of the table.
        items: rows of the table.
        log_expected: of the sampler that draws the negatives, float32 `[items]`.
        autocast: dtype of the layers' products; None computes all in float32.
        optimizer, plan, wire_dtype: of the table, as for `EmbeddingCollection`.
        seed: of the starting weights.
        any_ids: of a table that takes any id; None: items are row numbers.
    """

    log_expected: torch.Tensor
    item_ids: torch.Tensor | None

    def __init__(
        self,
        config: SequenceModelConfig,
        items: int,
        log_expected: torch.Tensor,
        *,
        autocast: torch.dtype | None = None,
        optimizer: se.optim.TableOptimizer,
        plan: dict[str, se.Placement],
        wire_dtype: torch.dtype | None,
        seed: int,
        any_ids: AnyIds | None = None,
    ) -> None:
        super().__init__()
        dim = config.embedding_dim
        tables = table_configs(config, items, any_ids and any_ids.settings)
        self.tables = se.EmbeddingCollection(tables, optimizer=optimizer, plan=plan or "auto", wire_dtype=wire_dtype, seed=seed)
        torch.manual_seed(seed)  # the layers start alike on every rank
        self.positions = nn.Parameter(torch.randn(config.max_length, dim) * POSITION_STD)
        self.blocks = nn.ModuleList(Block(dim, config.heads, config.feedforward) for _ in range(config.layers))
        self.norm = nn.LayerNorm(dim)
        self.vectors = {"tables.item": Vectors(metric="dot")}
        self._scale = dim**0.5
        self._autocast = autocast
        # Known from the data, so not saved with the model.
        self.register_buffer("log_expected", log_expected, persistent=False)
        self.register_buffer("item_ids", any_ids and any_ids.of("item"), persistent=False)

    def forward(self, batch: SequenceBatch) -> torch.Tensor:
        """This rank's loss, scaled so that its mean over the ranks is the mean over all targets of the global batch. Collective."""
        asked = ids_of(self.item_ids, batch.negatives)
        share = slice(0, len(asked)) if self.item_ids is None else share_of(asked)
        vectors = self.tables({"sequence": ids_of(self.item_ids, batch.items), "negatives": asked[share]})
        items_nD, negatives_KD = vectors["sequence"].float(), vectors["negatives"].float()
        if self.item_ids is not None:
            negatives_KD = shared(negatives_KD, share, len(asked))
        rows, columns = places(batch.lengths)
        inputs = (columns < batch.lengths[rows] - 1).nonzero().squeeze(1).to(items_nD.device)
        targets = columns.nonzero().squeeze(1).to(items_nD.device)
        queries_TD = self.queries(items_nD[inputs], batch.lengths - 1, batch.drop)
        losses_T = sampled_softmax(
            queries_TD, items_nD[targets], batch.items[targets], negatives_KD, batch.negatives, self.log_expected
        )
        return losses_T.sum() / batch.global_targets * se.world_size()

    def rows_of_items(self, items: torch.Tensor) -> torch.Tensor:
        """As they are now, float32 `[n, D]`; what has none among those that come and go is counted as unknown. Collective."""
        if self.item_ids is None:
            return self.tables.rows("item", items).float()
        return self.tables({"sequence": self.item_ids[items], "negatives": items[:0]})["sequence"].float()

    @torch.no_grad()
    def query_vectors_of(self, items: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """What the score of users is made of, float32 `[b, D]`: of the end of each one's sequence. A score is its dot product with
        an item's vector. Collective; b may differ and be 0.

        Args:
            items: numbers, sequence after sequence, int64 `[n]`, of each at most `max_length`. lengths: int64 `[b]`, on the CPU.
        """
        queries_nD = self.queries(self.rows_of_items(items.to(self.log_expected.device)), lengths)
        return queries_nD[(lengths.cumsum(0) - 1).to(queries_nD.device)]

    @torch.no_grad()
    def item_vectors_of(self, items: torch.Tensor) -> torch.Tensor:
        """The vectors of items, by their numbers int64 `[n]`: float32 `[n, D]`. Collective; n may differ and be 0."""
        return self.tables.rows("item", ids_of(self.item_ids, items.to(self.log_expected.device))).float()

    def queries(self, items_nD: torch.Tensor, lengths: torch.Tensor, drop: Drop = keep_all) -> torch.Tensor:
        """What is multiplied with the item that comes after each of `items_nD`, float32 `[n, D]`.

        Args:
            items_nD: rows of the table, sequence after sequence. lengths: of the sequences, int64 `[b]`, on the CPU.
        """
        device = items_nD.device
        rows, columns = (places_n.to(device) for places_n in places(lengths))
        longest = int(lengths.max()) if len(lengths) else 1
        padded_bLD = items_nD.new_zeros(len(lengths), longest, items_nD.shape[1]).index_put((rows, columns), items_nD * self._scale)
        from_end = len(self.positions) - lengths[:, None] + torch.arange(longest)
        x_bLD = padded_bLD + self.positions[from_end.clamp(max=len(self.positions) - 1).to(device)]
        x_bLD = drop(0, x_bLD)
        with torch.autocast(device.type, self._autocast, enabled=self._autocast is not None):
            for layer, block in enumerate(self.blocks):
                x_bLD = block(x_bLD, drop, layer)
            return self.norm(x_bLD)[rows, columns].float()


def places(lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of every item, of sequences that stand one after the other: int64 `[n]` both."""
    rows = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return rows, torch.arange(len(rows)) - (lengths.cumsum(0) - lengths)[rows]


def table_configs(config: SequenceModelConfig, items: int, ids: DynamicIdsConfig | None = None) -> list[se.TableConfig]:
    """The one of items; ids: how it takes any id, None where ids are row numbers."""
    dtype, init = getattr(torch, config.table_dtype), se.Normal(0.0, config.init_std)
    features = ["sequence", "negatives"]
    table = se.TableConfig("item", items, config.embedding_dim, features, pooling=None, dtype=dtype, init=init)
    return [table if ids is None else ids.made_dynamic(table)]


def dropout_of(config: SequenceModelConfig, seed: int, step: int, first: int) -> Drop:
    """The dropout of a step for the sequences of a global batch from number `first` on."""
    return Dropout(config.dropout, seed, step, first, config.max_length, config.embedding_dim)
