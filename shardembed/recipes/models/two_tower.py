"""Two towers over sharded tables: a user vector and an item vector whose dot product says how well they fit.

    user table + its features -> (dropout) -> (residual MLP) -> length 1 -> / temperature  \\
                                                                                             dot product -> sampled softmax
    item table + its features -> (dropout) -> (residual MLP)                               /

Only the user side is brought to length 1: the length of an item's vector is then free to carry its popularity, and without an MLP
and without features the rows of the item table are themselves what retrieval searches.

Legend: b samples of this rank, B of the global batch, K negatives, D columns, n users or items of a call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

import shardembed as se
from shardembed.embeddings.compared import Tower, Vectors
from shardembed.recipes.config import ModelConfig
from shardembed.recipes.data.sides import NOTHING_KNOWN, Known
from shardembed.recipes.ids_config import DynamicIdsConfig
from shardembed.recipes.models.any_ids import AnyIds, ids_of
from shardembed.recipes.models.masks import dropout_of_vectors
from shardembed.recipes.models.sampling import sampled_softmax
from shardembed.recipes.models.shared import share_of, shared
from shardembed.recipes.models.side_features import SideFeatures, feature_tables

USERS, ITEMS, NEGATIVES = range(3)  # what is dropped, each by draws of its own


@dataclass(frozen=True)
class Batch:
    """This rank's part of a global batch.

    Attributes:
        users: int64 `[b]`, numbers from 0, as all here; `AnyIds` says which ids they stand for.
        items: int64 `[b]`.
        negatives: of the step, `[K]`, the same on every rank.
        global_size: samples of the whole batch.
        first: the number in it of this rank's first sample.
        step: which one it is of training: dropout follows from it.
    """

    users: torch.Tensor
    items: torch.Tensor
    negatives: torch.Tensor
    global_size: int
    first: int = 0
    step: int = 0


class TwoTower(nn.Module):
    """The model; calling it gives this rank's loss. `vectors` says how its tables are compared, by their names in a checkpoint.

    Args:
        config: sizes, temperature, dropout, dtype of the tables.
        users, items: how many there are, which are rows of the two tables.
        log_expected: of the sampler that draws the negatives, float32 `[items]`.
        autocast: dtype of the towers' products; None computes all in float32.
        optimizer, plan, wire_dtype: of the tables, as for `EmbeddingCollection`.
        seed: of the starting weights.
        any_ids: of tables that take any id; None: users and items are row numbers.
        known: the features of users and of items.
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
        known: Known = NOTHING_KNOWN,
    ) -> None:
        super().__init__()
        dim = config.embedding_dim
        tables = table_configs(config, users, items, any_ids and any_ids.settings, known)
        self.tables = se.EmbeddingCollection(
            tables,
            optimizer=optimizer,
            plan=plan,
            wire_dtype=wire_dtype,
            seed=seed,
        )
        torch.manual_seed(seed)  # the MLPs start alike on every rank
        self.user_tower = Tower(dim, config.towers)
        self.item_tower = Tower(dim, config.towers)
        self.user_features = SideFeatures(known.users, dim, tables)
        self.item_features = SideFeatures(known.items, dim, tables)
        self.vectors = {
            "tables.user": Vectors(
                metric="dot",
                tower="user_tower",
                hidden=config.towers,
                temperature=config.temperature,
                features=tuple(one.name for one in known.users.features),
            ),
            "tables.item": Vectors(
                metric="dot", tower="item_tower", hidden=config.towers, features=tuple(one.name for one in known.items.features)
            ),
        }
        self._autocast, self._dropout, self._seed = autocast, config.dropout, seed
        # Known from the data, so not saved with the model.
        self.register_buffer("log_expected", log_expected, persistent=False)
        self.register_buffer("user_ids", any_ids and any_ids.of("user"), persistent=False)
        self.register_buffer("item_ids", any_ids and any_ids.of("item"), persistent=False)

    def forward(self, batch: Batch) -> torch.Tensor:
        """This rank's loss, scaled so that its mean over the ranks is the mean over the global batch. Collective.

        Gradients are averaged over the ranks, as DistributedDataParallel does, hence the factor: sum of the own samples' losses
        / B * ranks. A rank without samples gets 0 and still takes part in every collective.
        """
        drawn = batch.negatives
        share = slice(0, len(drawn)) if self.item_ids is None else share_of(drawn)
        taken = torch.cat([batch.items, drawn[share]])
        vectors = self._looked_up(batch.users, taken, len(batch.items))
        users_bD = self.user_features.added(vectors["user"], vectors, batch.users)
        items_bD, negatives_KD = vectors["item"], vectors["negatives"]
        if self.item_features.there:
            rows_nD = self.item_features.added(torch.cat([items_bD, negatives_KD]), vectors, taken)
            items_bD, negatives_KD = rows_nD.split([len(items_bD), len(negatives_KD)])
        if self.item_ids is not None:
            negatives_KD = shared(negatives_KD, share, len(drawn))
        drop = dropout_of_vectors(self._dropout, self._seed, batch.step, batch.first)
        drop_alike = dropout_of_vectors(self._dropout, self._seed, batch.step, 0)  # all ranks have the same negatives
        queries_bD = self.queries(drop(USERS, users_bD))
        items_bD = self.item_vectors(drop(ITEMS, items_bD))
        negatives_KD = self.item_vectors(drop_alike(NEGATIVES, negatives_KD))
        losses_b = sampled_softmax(queries_bD, items_bD, batch.items, negatives_KD, drawn, self.log_expected)
        return losses_b.sum() / batch.global_size * se.world_size()

    @torch.no_grad()
    def query_vectors_of(self, users: torch.Tensor) -> torch.Tensor:
        """What the score of users is made of, by their numbers int64 `[n]`: float32 `[n, D]`. A score is its dot product with an
        item's. Who has no row among those that come and go is counted as unknown. Collective; n may differ and be 0.
        """
        users = users.to(self.log_expected.device)
        if self.user_ids is None and not self.user_features.there:
            return self.queries(self.tables.rows("user", users))
        vectors = self._looked_up(users, users[:0], 0)
        return self.queries(self.user_features.added(vectors["user"], vectors, users))

    @torch.no_grad()
    def item_vectors_of(self, items: torch.Tensor) -> torch.Tensor:
        """As `query_vectors_of`, of items, of which those without a row are not counted unless items have features."""
        items = items.to(self.log_expected.device)
        if not self.item_features.there:
            return self.item_vectors(self.tables.rows("item", ids_of(self.item_ids, items)))
        vectors = self._looked_up(items[:0], items, len(items))
        return self.item_vectors(self.item_features.added(vectors["item"], vectors, items))

    def _looked_up(self, users: torch.Tensor, items: torch.Tensor, positives: int) -> dict[str, torch.Tensor]:
        """What all tables have of these numbers; items behind the first `positives` are looked up as negatives."""
        first, rest = items[:positives], items[positives:]
        return self.tables(
            {
                "user": ids_of(self.user_ids, users),
                "item": ids_of(self.item_ids, first),
                "negatives": ids_of(self.item_ids, rest),
                **self.user_features.lookups(users),
                **self.item_features.lookups(items),
            }
        )

    def queries(self, user_rows: torch.Tensor) -> torch.Tensor:
        """Rows of users with what features add `[b, D]` -> what is multiplied with item vectors `[b, D]`."""
        with self._casting(user_rows):
            return self.vectors["tables.user"].of(user_rows, self.user_tower)

    def item_vectors(self, item_rows: torch.Tensor) -> torch.Tensor:
        """Rows of items with what features add `[n, D]` -> what queries are multiplied with, float32 `[n, D]`."""
        with self._casting(item_rows):
            return self.vectors["tables.item"].of(item_rows, self.item_tower)

    def _casting(self, rows: torch.Tensor) -> torch.autocast:
        return torch.autocast(rows.device.type, self._autocast, enabled=self._autocast is not None)


def table_configs(
    config: ModelConfig, users: int, items: int, ids: DynamicIdsConfig | None = None, known: Known = NOTHING_KNOWN
) -> list[se.TableConfig]:
    """Those of users, of items, and of the features that have one. Raises DataError as `feature_tables`."""
    dim, dtype, init = config.embedding_dim, getattr(torch, config.table_dtype), se.Normal(0.0, config.init_std)
    tables = [
        se.TableConfig("user", users, dim, pooling=None, dtype=dtype, init=init),
        se.TableConfig("item", items, dim, ["item", "negatives"], pooling=None, dtype=dtype, init=init),
    ]
    described = [table for side in (known.users, known.items) for table in feature_tables(side, dim, dtype, init, ids)]
    return [*(tables if ids is None else [ids.made_dynamic(table) for table in tables]), *described]
