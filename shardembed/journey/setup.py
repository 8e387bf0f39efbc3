"""What a journey is made of: worked out once, when a collection is built, alike on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shardembed.comm.comm import Comm
from shardembed.journey.messages import Sender
from shardembed.journey.route import RoutingTable
from shardembed.optim import TableOptimizer
from shardembed.store.slab import Slab
from shardembed.store.slab_spec import build_slabs
from shardembed.store.twins import Stretch, stretches_of
from shardembed.tables.placement import Packing
from shardembed.tables.plan import Plan, TablePlan
from shardembed.tables.settings import AGREED, Settings, agreed_lines, names_of
from shardembed.tables.table_config import TableConfig


@dataclass(frozen=True)
class Setup:
    """The tables of one collection as they lie on this rank, and how ids find them.

    Attributes:
        tables: of the collection; everybody else knows them by their number here.
        plan: how they are cut.
        settings: how they travel and learn.
        comm: the ranks that share them.
        device: of this rank's rows.
        slabs: this rank's rows and optimizer state.
        routing: which rank and which key an id has.
        sender: the collection in messages.
        twins: which ranks hold parts of the same rows.
        reduction_factor: what gradients, summed over the ranks, are multiplied with: 1 / ranks for a mean.
    """

    tables: tuple[TableConfig, ...]
    plan: Plan
    settings: Settings
    comm: Comm
    device: torch.device
    slabs: list[Slab]
    routing: RoutingTable
    sender: Sender
    twins: Sequence[Stretch]
    reduction_factor: float

    @staticmethod
    def of(
        tables: tuple[TableConfig, ...],
        plan: Plan,
        optimizers: Sequence[TableOptimizer],
        settings: Settings,
        comm: Comm,
        device: torch.device,
    ) -> Setup:
        """Make the slabs of this rank. Collective: ranks check that they were given the same.

        Raises:
            ConfigError, PlanError: the tables do not fit together.
            DisagreementError: on all ranks, when they were given different things.
        """
        with comm.preparing(AGREED):
            specs = build_slabs(tables, plan, optimizers)
        comm.agree(AGREED, agreed_lines(tables, plan, optimizers, settings, device))
        comm.carry(device)
        number = comm.history.register(names_of([table.name for table in tables]), len(specs))
        pairs = zip(tables, plan.tables, strict=True)
        packings = tuple(_packing(table, planned, settings, comm.world_size) for table, planned in pairs)
        wire = tuple(settings.wire_dtype or spec.dtype for spec in specs)
        # Compiled updates sum up a row in another order for another width.
        kernel = "reference" if settings.deterministic and settings.kernel == "auto" else settings.kernel
        factor = 1.0 / comm.world_size if settings.reduction == "mean" else 1.0
        # In deterministic mode contributions have it before they are rounded (see `deterministic`).
        of_slabs = 1.0 if settings.deterministic else factor
        with comm.patiently("build: draw tables"):  # of which ranks may have very different shares
            slabs = [Slab(spec, tables, comm.rank, settings.seed, device, kernel, of_slabs) for spec in specs]
        return Setup(
            tables,
            plan,
            settings,
            comm,
            device,
            slabs=slabs,
            routing=RoutingTable.of(tables, packings, specs, comm.rank, comm.world_size, device),
            sender=Sender(number, specs, wire, all(spec.copied for spec in specs)),
            twins=stretches_of(specs),
            reduction_factor=factor,
        )

    @property
    def stepped_slabs(self) -> list[Slab]:
        """Those whose tables have an optimizer of ours."""
        return [slab for slab in self.slabs if slab.spec.optimizer.stepped]

    @property
    def stepped_tables(self) -> frozenset[int]:
        """The tables that have an optimizer of ours, made frozen or not."""
        return frozenset(table for slab in self.stepped_slabs for table in slab.tables)


def _packing(table: TableConfig, planned: TablePlan, settings: Settings, world_size: int) -> Packing:
    """As planned; but where nothing travels, nothing has to be deduplicated for it, unless the wire would round sums."""
    stays = world_size == 1 or planned.layout.copied
    exact = settings.wire_dtype in (None, table.dtype) and table.dtype in (torch.float32, torch.float64)
    return "bag" if stays and exact else planned.packing
