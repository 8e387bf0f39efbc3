"""The journey of a batch, from ids to vectors, back to gradients, and to the updated rows.

    forward   1  ids      = IdBatch.of(input)              any accepted input as flat ids
              2  route    = make_route(ids, plan)          who owns what; pure, no communication
              3  request  = send_ids(route)                all-to-all: counts and flags; all-to-all: keys
              4  answers  = slab.lookup(request)           owner: keys -> rows (locate), one vector a segment
              5  vectors  = send_back(answers)             all-to-all: vectors in the wire dtype
              6  output   = combine(vectors, route)        requester: segments pool, column strips concatenate
    backward  7  grads    = (adjoint of combine)           autograd: one gradient a segment
              8  grads    = send_grads(grads)              all-to-all: sizes mirrored
              9  slab.accumulate(request, grads)           owner keeps them until the step
    step     10  slab.step()                               merge duplicate rows, fused update in place

A segment is a list of ids of one table that live on one owner, answered by one vector (see `route.segments`). One rank runs the
same code: its route leads to itself and `Comm` hands back what it was given.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shardembed.comm import Comm
from shardembed.errors import ConfigError, InputError, MissedStepWarning, StepError
from shardembed.exchange import Caller, Request, send_back, send_grads, send_ids
from shardembed.exposed import deliver, expose
from shardembed.ids import IdBatch
from shardembed.kernels.reference import Gradients, frequencies
from shardembed.optim import External, TableOptimizer
from shardembed.plan import Plan
from shardembed.renorm import renormalise
from shardembed.route import Atlas, Route, combine, empty_route, make_route
from shardembed.slab import Slab
from shardembed.slabs import SlabSpec, build_slabs
from shardembed.step import mean_squares, reduce_copies
from shardembed.tables import Feature, TableConfig

WIRE_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Settings:
    """How a collection travels and learns.

    wire_dtype: of vectors and gradients between ranks; None sends each table in its own dtype. A value beyond the range of the
        wire dtype arrives as inf, as in `Tensor.to`; for gradients, `on_nonfinite` and GradScaler then see it.
    update: "step" keeps gradients until `Optimizer.step`; "backward" applies them at once and keeps nothing.
    reduction: "mean" divides gradients by the number of ranks, as DDP does; "sum" does not.
    kernel: "auto", or "reference" / "fbgemm" to pin what updates the tables.
    """

    wire_dtype: torch.dtype | None = None
    update: str = "step"
    reduction: str = "mean"
    seed: int = 0
    kernel: str = "auto"

    def __post_init__(self) -> None:
        if self.update not in ("step", "backward"):
            raise ConfigError(f"update must be 'step' or 'backward', not {self.update!r}")
        if self.reduction not in ("mean", "sum"):
            raise ConfigError(f"gradient_reduction must be 'mean' or 'sum', not {self.reduction!r}")
        if self.wire_dtype not in WIRE_DTYPES:
            raise ConfigError(f"wire_dtype must be a floating-point dtype or None, not {self.wire_dtype!r}")


@dataclass(frozen=True)
class Ticket:
    """A batch whose ids have been sent: what steps 4 to 6 need."""

    route: Route
    request: Request


class Journey:
    """The sharded tables of one collection, and the way of its batches.

    Attributes:
        plan, comm, slabs, settings: what it is made of. exposed: the Parameters of tables without an optimizer of ours.
        rate: gives the current learning rate of an optimizer's tables; `se.Optimizer` puts its param groups behind it.
        steps: optimizer steps taken with gradients. micro_batches: backward passes a step is meant to take.
        factor: what all waiting gradients are to be multiplied with (unscaling, clipping), `[1]`, or None for 1.
    """

    def __init__(
        self,
        tables: tuple[TableConfig, ...],
        plan: Plan,
        optimizers: Sequence[TableOptimizer],
        settings: Settings,
        comm: Comm,
        device: torch.device,
    ) -> None:
        specs = build_slabs(tables, plan, optimizers)
        self.tables, self.plan, self.settings, self.comm, self.device = tables, plan, settings, comm, device
        comm.agree("tables, plan, optimizers and settings", _agreed_lines(tables, plan, optimizers, settings, device), device)
        comm.slots = max(comm.slots, len(specs))
        comm.collections += 1
        packings = tuple(table.packing for table in plan.tables)
        self.atlas = Atlas.of(tables, packings, specs, comm.rank, comm.world_size, device)
        wire = tuple(settings.wire_dtype or spec.dtype for spec in specs)
        self._caller = Caller(comm.collections, specs, wire, all(spec.copied for spec in specs))
        self.slabs = [Slab(spec, tables, comm.rank, settings.seed, device, settings.kernel) for spec in specs]
        self.exposed = expose(self.slabs)
        self._updates = any(not (isinstance(spec.optimizer, External) or spec.policy.frozen) for spec in specs)
        self.rate: Callable[[TableOptimizer], float] = lambda optimizer: optimizer.lr
        self.steps = 0
        self.micro_batches = 1
        self.factor: torch.Tensor | None = None
        self._backwards = 0
        self._looked_up = False
        self._reduced = False
        # Outputs must require grad for autograd to come back here, though no weight is a leaf of its graph.
        learns = not all(spec.policy.frozen for spec in specs)
        self._anchor = torch.empty(0, device=device, requires_grad=learns)

    @property
    def specs(self) -> tuple[SlabSpec, ...]:
        return self._caller.slabs

    def forward(self, read: Callable[[], IdBatch], features: Sequence[Feature], as_they_are: bool = False) -> list[torch.Tensor]:
        """Steps 1 to 6: one output a feature, `[*shape, embedding_dim]`. Collective.

        Args:
            read: gives the batch (`IdBatch.of`); called in here, so that its errors reach all ranks.
            as_they_are: leave rows longer than max_norm alone.

        Raises:
            InputError: on every rank, when the batch of any is malformed.
        """
        ticket = self.send(read, features)
        if torch._C._current_graph_task_id() < 0:  # not a checkpoint that runs again in the backward
            self._looked_up = True
        if not as_they_are:
            with torch.no_grad():
                renormalise(self.slabs, ticket.request, self.comm)
        vectors = _Vectors.apply(self._anchor, self, ticket.request)
        outputs = combine(vectors, ticket.route)
        return [output.to(self.tables[feature.table].dtype) for output, feature in zip(outputs, features, strict=True)]

    def send(self, read: Callable[[], IdBatch], features: Sequence[Feature]) -> Ticket:
        """Steps 1 to 3. No weight is read, so they may run ahead of the compute. Collective."""
        try:
            ids, problem = read(), None
            route = make_route(ids, features, self.atlas)
        except InputError as error:  # the other ranks are waiting for the counts: tell them there
            route, problem = empty_route(features, self.atlas), error
        return Ticket(route, send_ids(route, problem, self._caller, self.comm, self.device))

    def answer(self, request: Request) -> list[torch.Tensor]:
        """Steps 4 and 5, on detached weights: the vectors this rank asked for, `[S, W]` a slab."""
        answers = [slab.lookup(slab.locate(part.keys_E), part.offsets) for slab, part in zip(self.slabs, request, strict=True)]
        return send_back(answers, request, self._caller, self.comm)

    def learn(self, request: Request, grads: Sequence[torch.Tensor]) -> None:
        """Steps 8 and 9: gradients go to the rows' owners and wait there. Collective."""
        if self._reduced:
            raise StepError("a backward came between clip_grad_norm_ and Optimizer.step(); clip after the last backward of a step")
        arrived = send_grads(grads, request, self._caller, self.comm)
        share = 1.0 / self.comm.world_size if self.settings.reduction == "mean" else 1.0
        for slab, part, grads_SW in zip(self.slabs, request, arrived, strict=True):
            rows_E = slab.locate(part.keys_E)
            if share != 1.0:
                grads_SW.mul_(share)
            if part.multiplicities_E is not None:  # then every segment is a single row
                grads_SW.div_(frequencies(rows_E, part.multiplicities_E).unsqueeze(1))
            slab.accumulate(Gradients(rows_E, part.offsets, grads_SW))
        if self.exposed:
            deliver(self.exposed, self.comm)
        if self._updates:
            self._count_backward()

    def _count_backward(self) -> None:
        if self.settings.update == "backward":
            self._backwards = 1
            self.step()
            return
        # A module that is called twice in a forward, or below two losses, comes here twice; that is one pass all the same.
        if not self._looked_up:
            return
        self._looked_up = False
        self._backwards += 1
        if self._backwards == self.micro_batches + 1:
            warnings.warn(
                f"table(s) {', '.join(repr(table.name) for table in self.tables)}: gradients of {self._backwards} backward passes "
                f"are waiting for Optimizer.step(), {self.micro_batches} was asked for; pass micro_batches= to se.Optimizer to "
                "accumulate on purpose",
                MissedStepWarning,
                stacklevel=2,
            )

    @property
    def waiting(self) -> bool:
        """Gradients wait for a step; the same on all ranks, since backward is collective."""
        return self._backwards > 0

    def reduce(self) -> None:
        """Bring the waiting gradients of copied tables together, once a step. Collective where there are any."""
        if not self._reduced and self.waiting:
            reduce_copies([slab for slab in self.slabs if not isinstance(slab.spec.optimizer, External)], self.comm)
            self._reduced = True

    def step(self) -> None:
        """Step 10: update every touched row. Collective where the plan needs an exchange."""
        if not self.waiting:
            return
        self.reduce()
        squares = mean_squares(self.slabs, self.comm)
        self.steps += 1
        self.comm.step = max(self.comm.step, self.steps)
        factor = 1.0 if self.factor is None else float(self.factor)  # host sync on a GPU
        for slab in self.slabs:
            slab.step(self.rate(slab.spec.optimizer), self.steps, factor, squares.get(slab.spec.index))
        self.drop()

    def drop(self) -> None:
        """Forget the waiting gradients."""
        for slab in self.slabs:
            slab.drop()
        self.factor = None
        self._backwards = 0
        self._reduced = False


class _Vectors(torch.autograd.Function):
    """Steps 4 and 5 forward, 8 and 9 backward: where autograd leaves this rank and comes back."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, journey: Journey, request: Request) -> tuple[torch.Tensor, ...]:
        ctx.journey, ctx.request = journey, request
        answers = tuple(journey.answer(request))
        still = [vectors for vectors, spec in zip(answers, journey.specs, strict=True) if spec.policy.frozen]
        ctx.mark_non_differentiable(*still)
        return answers

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, None, None]:
        with torch.no_grad():
            ctx.journey.learn(ctx.request, grads)
        return None, None, None


def _agreed_lines(
    tables: Sequence[TableConfig], plan: Plan, optimizers: Sequence[TableOptimizer], settings: Settings, device: torch.device
) -> list[str]:
    """What must be the same on all ranks, a line a table."""
    planned = plan.to_json()["tables"]
    lines = [
        f"table {table.name!r}: {table.num_embeddings} x {table.embedding_dim} {table.dtype}, features {table.feature_names}, "
        f"{optimizer.describe()}, plan {planned[table.name]}"
        for table, optimizer in zip(tables, optimizers, strict=True)
    ]
    return [*lines, f"{settings} on {device.type}"]
