"""Many tables, one journey."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from shardembed.inputs.ids import IdBatch
from shardembed.inputs.jagged import is_keyed_jagged, split_keyed_jagged
from shardembed.journey.ahead import Ahead
from shardembed.journey.journey import Ticket
from shardembed.journey.prefetch import Sent, SentBatches, Target
from shardembed.journey.route.side_by_side import Outputs
from shardembed.modules.answers import Vectors, check_bags, jagged_tensor, keyed_tensor, nested_like
from shardembed.modules.base import ShardedModule, eager
from shardembed.modules.build import TableOptimizers, build_journey
from shardembed.tables.plan import PlanLike
from shardembed.tables.settings import Settings
from shardembed.tables.table_config import TableConfig, features_of


@dataclass(frozen=True)
class Prefetched:
    """A batch whose ids are with the rows' owners.

    Attributes:
        batch: as it was given to `prefetch`.
        ticket: of the call that goes on from there.
    """

    batch: Any
    ticket: Ticket


class EmbeddingCollection(ShardedModule, Target):
    """Embedding tables, cut over the ranks of a job, that are looked up together.

    A call makes three all-to-alls forward and one backward, whatever the number of tables and how they are cut.

    Args:
        tables: `TableConfig`s, or TorchRec's `EmbeddingBagConfig`s and `EmbeddingConfig`s.
        optimizer: settings from `se.optim` for all tables, or a dict by table name or pattern ("item*"). None: this rank's shards
            are Parameters with gradients, for a torch optimizer of your own (see `se.ignored`).
        plan: "auto", a `Plan`, one placement for all tables, or a dict by table name (the others get the default).
        wire_dtype: dtype of vectors and gradients between ranks; None sends each table in its own. What a narrower dtype cannot
            hold arrives as inf. torch.int8 sends each row as whole numbers from -127 to 127 and a scale.
        update: "step" keeps gradients until `se.Optimizer.step`. "backward" updates the rows in the backward and keeps nothing:
            least memory, but no clipping, no GradScaler and no accumulation.
        gradient_reduction: "mean" divides gradients by the number of ranks, as DistributedDataParallel does; "sum" does not.
        device: where the shards lie; default this rank's GPU, else the CPU.
        process_group: default the job's.
        seed: of the starting weights, which do not depend on the plan or the number of ranks.
        kernel: "auto", or "reference" / "numba" / "triton" / "fbgemm" to pin what updates the tables.
        deterministic: the tables are the same bits for every plan, packing and number of ranks (a power of two, with "mean"),
            given the same gradients of the outputs. Costs 8 bytes an element on the way back, one small exchange a backward,
            another for rowwise statistics of cut columns, memory for one float64 vector an id, and the compiled updates.

    Raises:
        ConfigError, PlanError: settings that do not fit. DisagreementError: on all ranks, when they differ between ranks.
    """

    def __init__(
        self,
        tables: Sequence[TableConfig | Any],
        *,
        optimizer: TableOptimizers | None = None,
        plan: PlanLike = "auto",
        wire_dtype: torch.dtype | None = None,
        update: Literal["step", "backward"] = "step",
        gradient_reduction: Literal["mean", "sum"] = "mean",
        device: torch.device | str | None = None,
        process_group: dist.ProcessGroup | None = None,
        seed: int = 0,
        kernel: Literal["auto", "reference", "numba", "triton", "fbgemm"] = "auto",
        deterministic: bool = False,
    ) -> None:
        settings = Settings(wire_dtype, update, gradient_reduction, seed, kernel, deterministic)
        journey = build_journey(tables, optimizer, plan, device, process_group, settings)
        super().__init__(journey, journey.tables, {f"{table.name}.weight": table.name for table in journey.tables})
        self.features = features_of(self.tables)
        self._names = [feature.name for feature in self.features]
        self._unpooled = [feature for feature in self.features if feature.pooling is None]
        self.sent_batches = SentBatches()

    @eager
    def forward(self, batch: Mapping[str, Any] | IdBatch | Any) -> Any:
        """Look up every feature. Collective: each rank passes its own batch, which may be empty.

        Args:
            batch: a dict with, for each feature, int32 or int64 ids as a tensor (`[B]` or `[B, ids a bag]` when pooled, any
                shape otherwise), `(ids [n], offsets [B + 1])`, `(ids, offsets, weights [n])` for weighted sums, or a nested
                jagged tensor. Or a TorchRec `KeyedJaggedTensor`. Or an `IdBatch` that was made of either for these features. Or
                what `prefetch` or `se.prefetched` gave for a batch.

        Returns:
            A dict by feature ("feature@table" for one that several tables look up): `[B, embedding_dim]` when pooled,
            `[*ids.shape, embedding_dim]` otherwise (nested for a nested tensor). Pooled vectors are parts of one tensor, which
            `concatenated()` of the dict gives without a copy. For a KeyedJaggedTensor: a
            `KeyedTensor` when all features are pooled, a dict of `JaggedTensor` when none is, else a dict of both kinds of values.

        Raises:
            InputError: on every rank, when the batch of any is malformed or an id is out of range. The tables are unchanged.
            StepError: a prefetched batch comes again.
        """
        ahead = batch if isinstance(batch, Prefetched) else self.sent_batches.take((batch,)) or self.prefetch(batch)
        given, outputs = ahead.batch, self.journey.outputs(ahead.ticket)
        if is_keyed_jagged(given):
            return self._keyed(outputs, given)
        named = Vectors(zip(self._names, outputs.each, strict=True), None if self._unpooled else outputs.whole)
        if isinstance(given, IdBatch):
            return named
        for feature in self._unpooled:
            ids = given[feature.key]
            if isinstance(ids, torch.Tensor) and ids.is_nested:
                named[feature.name] = nested_like(ids, named[feature.name])
        return named

    @eager
    def prefetch(self, batch: Mapping[str, Any] | Any) -> Prefetched:
        """Send the ids of a batch ahead, and return what stands for the batch in the call to come. Collective, all or nothing: what
        one rank prefetches, all do, in the same order.

        No weight is read before the call, so tables may be trained in between. What is returned is good for one call, and may be
        dropped.

        Raises:
            InputError: on every rank, when the batch of any is malformed.
        """
        return Prefetched(batch, self.journey.send(lambda: self._read(batch), self.features))

    def send_ahead(self, arguments: tuple[Any, ...], ahead: Ahead) -> Sent:
        """As `prefetch`, beside the main thread."""
        (batch,) = arguments
        ticket = self.journey.send(lambda: self._read(batch), self.features, ahead=ahead)
        return Sent(ticket, Prefetched(batch, ticket))

    @property
    def _all_pooled(self) -> bool:
        return not self._unpooled

    def _read(self, batch: Any) -> IdBatch:
        self.check_shards()
        given = split_keyed_jagged(batch) if is_keyed_jagged(batch) else batch
        if given is not batch and self._all_pooled:
            check_bags("the collection", batch, [feature.key for feature in self.features], given)
        return IdBatch.of(given, self.features, self.journey.device)

    def _keyed(self, outputs: Outputs, batch: Any) -> Any:
        """TorchRec's output types for TorchRec's input type."""
        if self._all_pooled:
            return keyed_tensor(self._names, self.features, outputs, batch)
        parts = split_keyed_jagged(batch)
        return {
            feature.name: output if feature.pooling is not None else jagged_tensor(output, parts[feature.key])
            for feature, output in zip(self.features, outputs.each, strict=True)
        }
