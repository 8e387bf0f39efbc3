"""DLRM, DLRM-DCNv2 and a linear model over sharded tables: from numbers and ids to the log-odds of a click.

    numbers    -> bottom MLP ------\\
                                    interaction -> top MLP -> log-odds
    ids        -> a table each ----/

The interaction of DLRM (Naumov et al., "Deep Learning Recommendation Model for Personalization and Recommendation Systems",
2019) is the dot product of every two of these vectors, beside the bottom MLP's. That of DCN v2 (Wang et al., "DCN V2", WWW 2021) is
a cross network over all vectors end to end: x[l+1] = x[0] * (U[l] (V[l] x[l]) + b[l]) + x[l], with V and U of low rank. The wide
model is the linear part of Cheng et al., "Wide & Deep Learning for Recommender Systems" (DLRS 2016): a weight for every id, which
is a row of one column, and for every number; log-odds are their sum.

Legend: b samples of this rank, B of the global batch, I numbers, F vectors (the bottom MLP's and one a table), D columns.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

import shardembed as se
from shardembed.embeddings.compared import Vectors
from shardembed.recipes.ctr_config import CtrModelConfig
from shardembed.recipes.data.clicks.encode import ClickBatch
from shardembed.recipes.data.clicks.moments import Moments
from shardembed.recipes.features_config import Features
from shardembed.recipes.ids_config import DynamicIdsConfig
from shardembed.recipes.models.masks import Drop, dropout_of_vectors
from shardembed.tables.table_config import Uniform

WIDE_START = 0.01
TOP = 1 << 10  # added to the numbers of the top MLP's layers, for the masks


class Mlp(nn.Sequential):
    """Linear layers with ReLU between them; dropout is behind every hidden one."""

    def __init__(self, sizes: tuple[int, ...], last_relu: bool) -> None:
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.ReLU()]
        super().__init__(*layers[: None if last_relu else -1])
        self._hidden = 2 * (len(sizes) - 2)  # modules

    def forward(self, input: torch.Tensor, drop: Drop | None = None, first: int = 0) -> torch.Tensor:
        """`[b, first of sizes]` -> `[b, last of sizes]`; first: the number of the first layer, for `drop`."""
        x_bD = input
        for place, layer in enumerate(self):
            x_bD = layer(x_bD)
            if drop is not None and place % 2 and place < self._hidden:
                x_bD = drop(first + place // 2, x_bD)
        return x_bD


class Dots(nn.Module):
    """`[b, F, D]` -> `[b, D + F (F - 1) / 2]`: the first vector, and the dot products of every two."""

    def __init__(self, vectors: int, embedding_dim: int) -> None:
        super().__init__()
        self.width = embedding_dim + vectors * (vectors - 1) // 2
        self.register_buffer("pairs", torch.tril_indices(vectors, vectors, -1), persistent=False)

    def forward(self, vectors_bFD: torch.Tensor) -> torch.Tensor:
        products = vectors_bFD @ vectors_bFD.transpose(1, 2)
        pairs = self.get_buffer("pairs")
        return torch.cat([vectors_bFD[:, 0], products[:, pairs[0], pairs[1]]], dim=1)


class Cross(nn.Module):
    """`[b, F, D]` -> `[b, F D]`: the low-rank cross network."""

    def __init__(self, vectors: int, embedding_dim: int, layers: int, rank: int) -> None:
        super().__init__()
        self.width = vectors * embedding_dim
        self.down = nn.ModuleList(nn.Linear(self.width, rank, bias=False) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(rank, self.width) for _ in range(layers))

    def forward(self, vectors_bFD: torch.Tensor) -> torch.Tensor:
        first = crossed = vectors_bFD.flatten(1)
        for down, up in zip(self.down, self.up, strict=True):
            crossed = first * up(down(crossed)) + crossed
        return crossed


class ClickModel(nn.Module):
    """The model; calling it gives this rank's loss, `logits` the log-odds.

    Args:
        numbers: how many numbers a sample has.
        columns: what the tables are looked up for.
        sizes: rows of each table, by name.
        moments: of the numbers, which are then brought to mean 0 and deviation 1; they are part of the model and its checkpoints.
        autocast: dtype of the dense part's products; None computes all in float32.
        optimizer, plan, wire_dtype: of the tables, as for `EmbeddingCollection`.
        seed: of the starting weights.
        ids: of tables that take any id, which then have the rows that it says; None: ids are row numbers.
    """

    def __init__(
        self,
        config: CtrModelConfig,
        numbers: int,
        columns: Features,
        sizes: dict[str, int],
        *,
        moments: Moments | None = None,
        autocast: torch.dtype | None,
        optimizer: se.optim.TableOptimizer,
        plan: dict[str, se.Placement],
        wire_dtype: torch.dtype | None,
        seed: int,
        ids: DynamicIdsConfig | None = None,
    ) -> None:
        super().__init__()
        self.vectors: dict[str, Vectors] = {}  # rows go into products with all others, and are not compared
        self.tables = se.EmbeddingCollection(
            table_configs(config, columns, sizes, ids), optimizer=optimizer, plan=plan or "auto", wire_dtype=wire_dtype, seed=seed
        )
        torch.manual_seed(seed)  # the dense part starts alike on every rank
        self.linear = self.bottom = self.interaction = self.top = None
        if config.kind == "wide":
            self.linear = nn.Linear(numbers, 1)
            nn.init.zeros_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)
        else:
            dim, vectors = config.embedding_dim, len(sizes) + bool(numbers)
            crossed = config.kind == "dcnv2"
            interaction = Cross(vectors, dim, config.cross_layers, config.cross_rank) if crossed else Dots(vectors, dim)
            self.bottom = Mlp((numbers, *config.bottom, dim), last_relu=True) if numbers else None
            self.interaction = interaction
            self.top = Mlp((interaction.width, *config.top, 1), last_relu=False)
        self._names = list(sizes)
        self._autocast = autocast
        self.standardize = moments is not None
        if moments is not None:
            self.register_buffer("mean", torch.from_numpy(moments.mean).float())
            self.register_buffer("deviation", torch.from_numpy(moments.deviation).float())

    def logits(self, batch: ClickBatch) -> torch.Tensor:
        """Log-odds of this rank's samples, float32 `[b]`. Collective."""
        found = self.tables(batch.ids)
        vectors = [found[name].float() for name in self._names]
        numbers_bI = batch.dense
        if self.standardize:
            numbers_bI = (numbers_bI - self.get_buffer("mean")) / self.get_buffer("deviation")
        with torch.autocast(batch.dense.device.type, self._autocast, enabled=self._autocast is not None):
            if self.linear is not None:
                return (self.linear(numbers_bI) + torch.cat(vectors, dim=1).sum(1, keepdim=True)).squeeze(1).float()
            assert self.interaction is not None
            assert self.top is not None
            if self.bottom is not None:
                vectors.insert(0, self.bottom(numbers_bI, batch.drop))
            stacked_bFD = torch.stack([vector.to(vectors[0].dtype) for vector in vectors], dim=1)
            return self.top(self.interaction(stacked_bFD), batch.drop, TOP).squeeze(1).float()

    def forward(self, batch: ClickBatch) -> torch.Tensor:
        """This rank's loss, scaled so that its mean over the ranks is the mean over the global batch. Collective."""
        losses = F.binary_cross_entropy_with_logits(self.logits(batch), batch.labels, reduction="sum")
        return losses / batch.global_size * se.world_size()


def table_configs(
    config: CtrModelConfig, columns: Features, sizes: dict[str, int], ids: DynamicIdsConfig | None = None
) -> list[se.TableConfig]:
    """Those of a model, in the order of the columns; a table has the name of its column."""
    dtype, tables = getattr(torch, config.table_dtype), []
    # A linear model needs no noise to begin with. But from zeros the gradients of a row would cancel to the last bit, and Adagrad
    # makes a whole step of what the order of a sum leaves of that.
    start = Uniform(-WIDE_START, WIDE_START) if config.kind == "wide" else None
    for one in columns:
        if one.has_table:
            pooling = one.pooling if one.kind == "ids" else None
            table = se.TableConfig(one.name, sizes[one.name], config.width, pooling=pooling, dtype=dtype, init=start)
            tables.append(table if ids is None or one.kind == "number" else ids.made_dynamic(table))
    return tables


def dropout_of(config: CtrModelConfig, seed: int, step: int, first: int) -> Drop | None:
    """What drops elements of the hidden layers in a step; first: the number in the global batch of the first sample."""
    return dropout_of_vectors(config.dropout, seed, step, first) if config.dropout else None
