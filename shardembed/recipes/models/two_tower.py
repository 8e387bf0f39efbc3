"""Two towers over sharded tables: a user vector and an item vector whose dot product says how well they fit.

    user table -> (residual MLP) -> length 1 -> / temperature  \\
                                                                 dot product -> sampled softmax
    item table -> (residual MLP)                               /

Only the user side is brought to length 1: the length of an item's vector is then free to carry its popularity, and without an MLP
the rows of the item table are themselves what retrieval searches.

Legend: b samples of this rank, B of the global batch, K negatives, D columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

import shardembed as se
from shardembed.embeddings.compared import Tower, Vectors
from shardembed.recipes.config import ModelConfig
from shardembed.recipes.ids_config import DynamicIdsConfig
from shardembed.recipes.models.any_ids import AnyIds, ids_of
from shardembed.recipes.models.sampling import sampled_softmax
from shardembed.recipes.models.shared import share_of, shared


@dataclass(frozen=True)
class Batch:
    """This rank's part of a global batch.

    Attributes:
        users: int64 `[b]`, numbers from 0, as all here; `AnyIds` says which ids they stand for.
        items: int64 `[b]`.
        negatives: of the step, `[K]`, the same on every rank.
        global_size: samples of the whole batch.
    """

    users: torch.Tensor
    items: torch.Tensor
    negatives: torch.Tensor
    global_size: int


class TwoTower(nn.Module):
    """The model; calling it gives this rank's loss. `vectors` says how its tables are compared, by their names in a checkpoint.

    Args:
        config: sizes, temperature, dtype of the tables.
        users, items: rows of the two tables.
        log_expected: of the sampler that draws the negatives, float32 `[items]`.
        autocast: dtype of the towers' products; None computes all in float32.
        optimizer, plan, wire_dtype: of the tables, as for `EmbeddingCollection`.
        seed: of the starting weights.
        any_ids: of tables that take any id; None: users and items are row numbers.
    """

    log_expected: torch.Tensor
    user_ids: torch.Tensor | None
    item_ids: torch.Tensor | None

    def __init__(
        self,
        config: ModelConfig,
        users: int,
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
        self.tables = se.EmbeddingCollection(
            table_configs(config, users, items, any_ids and any_ids.settings),
            optimizer=optimizer,
            plan=plan,
            wire_dtype=wire_dtype,
            seed=seed,
        )
        torch.manual_seed(seed)  # the MLPs start alike on every rank
        self.user_tower = Tower(dim, config.towers)
        self.item_tower = Tower(dim, config.towers)
        self.vectors = {
            "tables.user": Vectors(metric="dot", tower="user_tower", hidden=config.towers, temperature=config.temperature),
            "tables.item": Vectors(metric="dot", tower="item_tower", hidden=config.towers),
        }
        self._autocast = autocast
        # Known from the data, so not saved with the model.
        self.register_buffer("log_expected", log_expected, persistent=False)
        self.register_buffer("user_ids", any_ids and any_ids.of("user"), persistent=False)
        self.register_buffer("item_ids", any_ids and any_ids.of("item"), persistent=False)

    def forward(self, batch: Batch) -> torch.Tensor:
        """This rank's loss, scaled so that its mean over the ranks is the mean over the global batch. Collective.

        Gradients are averaged over the ranks, as DistributedDataParallel does, hence the factor: sum of the own samples' losses
        / B * ranks. A rank without samples gets 0 and still takes part in every collective.
        """
        asked = ids_of(self.item_ids, batch.negatives)
        share = slice(0, len(asked)) if self.item_ids is None else share_of(asked)
        vectors = self.tables(
            {"user": ids_of(self.user_ids, batch.users), "item": ids_of(self.item_ids, batch.items), "negatives": asked[share]}
        )
        negatives = vectors["negatives"] if self.item_ids is None else shared(vectors["negatives"], share, len(asked))
        queries_bD = self.queries(vectors["user"])
        items_bD, negatives_KD = self.item_vectors(vectors["item"]), self.item_vectors(negatives)
        losses_b = sampled_softmax(queries_bD, items_bD, batch.items, negatives_KD, batch.negatives, self.log_expected)
        return losses_b.sum() / batch.global_size * se.world_size()

    def rows_of_users(self, users: torch.Tensor) -> torch.Tensor:
        """As they are now, `[b, D]`; who has none among those that come and go is counted as unknown. Collective."""
        if self.user_ids is None:
            return self.tables.rows("user", users)
        nobody = users[:0]
        return self.tables({"user": self.user_ids[users], "item": nobody, "negatives": nobody})["user"]

    def queries(self, user_rows: torch.Tensor) -> torch.Tensor:
        """Rows of the user table `[b, D]` -> what is multiplied with item vectors `[b, D]`."""
        with self._casting(user_rows):
            return self.vectors["tables.user"].of(user_rows, self.user_tower)

    def item_vectors(self, item_rows: torch.Tensor) -> torch.Tensor:
        """Rows of the item table `[n, D]` -> what queries are multiplied with, float32 `[n, D]`."""
        with self._casting(item_rows):
            return self.vectors["tables.item"].of(item_rows, self.item_tower)

    def _casting(self, rows: torch.Tensor) -> torch.autocast:
        return torch.autocast(rows.device.type, self._autocast, enabled=self._autocast is not None)


def table_configs(config: ModelConfig, users: int, items: int, ids: DynamicIdsConfig | None = None) -> list[se.TableConfig]:
    dim, dtype, init = config.embedding_dim, getattr(torch, config.table_dtype), se.Normal(0.0, config.init_std)
    tables = [
        se.TableConfig("user", users, dim, pooling=None, dtype=dtype, init=init),
        se.TableConfig("item", items, dim, ["item", "negatives"], pooling=None, dtype=dtype, init=init),
    ]
    return tables if ids is None else [ids.made_dynamic(table) for table in tables]
