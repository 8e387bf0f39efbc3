"""DLRM and DLRM-DCNv2 over sharded tables: from numbers and categories to the log-odds of a click.

    numbers    -> bottom MLP ------\\
                                    interaction -> top MLP -> log-odds
    categories -> a table each ----/

The interaction of DLRM (Naumov et al., "Deep Learning Recommendation Model for Personalization and Recommendation Systems",
2019) is the dot product of every two of these vectors, beside the bottom MLP's. That of DCN v2 (Wang et al., "DCN V2", WWW 2021) is
a cross network over all vectors end to end: x[l+1] = x[0] * (U[l] (V[l] x[l]) + b[l]) + x[l], with V and U of low rank.

Legend: b samples of this rank, B of the global batch, F vectors (the bottom MLP's and one a category), D columns.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

import shardembed as se
from shardembed.embeddings.compared import Vectors
from shardembed.recipes.ctr_config import CtrModelConfig
from shardembed.recipes.data.criteo.encode import ClickBatch
from shardembed.recipes.ids_config import DynamicIdsConfig


def mlp(sizes: tuple[int, ...], last_relu: bool) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[: None if last_relu else -1])


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
        integers: how many numbers a sample has.
        sizes: rows of each table, by category.
        autocast: dtype of the dense part's products; None computes all in float32.
        optimizer, plan, wire_dtype: of the tables, as for `EmbeddingCollection`.
        seed: of the starting weights.
        ids: of tables that take any id, which then have the rows that it says; None: categories are row numbers.
    """

    def __init__(
        self,
        config: CtrModelConfig,
        integers: int,
        sizes: dict[str, int],
        *,
        autocast: torch.dtype | None,
        optimizer: se.optim.TableOptimizer,
        plan: dict[str, se.Placement],
        wire_dtype: torch.dtype | None,
        seed: int,
        ids: DynamicIdsConfig | None = None,
    ) -> None:
        super().__init__()
        dim = config.embedding_dim
        self.vectors: dict[str, Vectors] = {}  # rows go into products with all others, and are not compared
        self.tables = se.EmbeddingCollection(
            table_configs(config, sizes, ids), optimizer=optimizer, plan=plan or "auto", wire_dtype=wire_dtype, seed=seed
        )
        torch.manual_seed(seed)  # the dense part starts alike on every rank
        self.bottom = mlp((integers, *config.bottom, dim), last_relu=True) if integers else None
        vectors = len(sizes) + bool(integers)
        crossed = config.kind == "dcnv2"
        interaction = Cross(vectors, dim, config.cross_layers, config.cross_rank) if crossed else Dots(vectors, dim)
        self.interaction = interaction
        self.top = mlp((interaction.width, *config.top, 1), last_relu=False)
        self._autocast = autocast

    def logits(self, batch: ClickBatch) -> torch.Tensor:
        """Log-odds of this rank's samples, float32 `[b]`. Collective."""
        found = self.tables(batch.ids)
        vectors = [found[name].float() for name in batch.ids]
        with torch.autocast(batch.dense.device.type, self._autocast, enabled=self._autocast is not None):
            if self.bottom is not None:
                vectors.insert(0, self.bottom(batch.dense))
            stacked_bFD = torch.stack([vector.to(vectors[0].dtype) for vector in vectors], dim=1)
            return self.top(self.interaction(stacked_bFD)).squeeze(1).float()

    def forward(self, batch: ClickBatch) -> torch.Tensor:
        """This rank's loss, scaled so that its mean over the ranks is the mean over the global batch. Collective."""
        losses = F.binary_cross_entropy_with_logits(self.logits(batch), batch.labels, reduction="sum")
        return losses / batch.global_size * se.world_size()


def table_configs(config: CtrModelConfig, sizes: dict[str, int], ids: DynamicIdsConfig | None = None) -> list[se.TableConfig]:
    dtype = getattr(torch, config.table_dtype)
    tables = [se.TableConfig(name, rows, config.embedding_dim, pooling=None, dtype=dtype) for name, rows in sizes.items()]
    return tables if ids is None else [ids.made_dynamic(table) for table in tables]
