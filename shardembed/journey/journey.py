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

A segment is a list of ids of one table that live on one owner, answered by one vector (see `journey.route.segments`). One rank
runs the same code: its route leads to itself and `Comm` hands back what it was given.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from weakref import WeakMethod

import numpy as np
import torch

from shardembed.comm.comm import Comm
from shardembed.comm.stages import Stage, unwatched
from shardembed.errors import MissedStepWarning, StepError
from shardembed.inputs.ids import IdBatch
from shardembed.journey import deterministic, tracing
from shardembed.journey.ahead import Ahead
from shardembed.journey.autograd import FixedOutputs, Vectors
from shardembed.journey.freezing import Beside, Frozen, without_grad
from shardembed.journey.messages import Call, Sender, open_call, send_back, send_grads, send_ids
from shardembed.journey.route import RoutingTable, combine, empty_route, make_route
from shardembed.journey.ticket import Pass, Ticket
from shardembed.kernels.reference import Gradients, frequencies
from shardembed.optim import NoOptimizer, TableOptimizer
from shardembed.store.own_parameters import deliver, expose
from shardembed.store.reductions import mean_squares, reduce_copies
from shardembed.store.renorm import renormalise
from shardembed.store.request import Request
from shardembed.store.slab import Slab
from shardembed.store.slab_spec import SlabSpec, build_slabs
from shardembed.store.twins import stretches_of
from shardembed.store.wrappers import watch
from shardembed.tables.placement import Packing
from shardembed.tables.plan import Plan, TablePlan
from shardembed.tables.settings import AGREED, Settings, agreed_lines, names_of
from shardembed.tables.table_config import Feature, TableConfig
from shardembed.wire.header import Mode


def _mode() -> Mode:
    return Mode.TRAINING if torch.is_grad_enabled() else Mode.EVALUATION


class Journey:
    """The sharded tables of one collection, and the way of its batches.

    Attributes:
        plan, comm, slabs, settings: what it is made of. exposed: the Parameters of tables without an optimizer of ours.
        stage: what surrounds each step; see `stages`.
        rate: gives the current learning rate of an optimizer's tables; `se.Optimizer` puts its param groups behind it.
        frozen: which tables do not learn. beside: what may tell that more were to be frozen. missed: by table, the steps that it
            was frozen in. steps: optimizer steps taken with gradients. micro_batches: backward passes a step is meant to take.
        factor: what all waiting gradients are to be multiplied with (unscaling, clipping), `[1]`, or None for 1.
        checked: all that waits has been looked at; factor is nan if any of it is not finite.
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
        with comm.preparing(AGREED, device):
            specs = build_slabs(tables, plan, optimizers)
        self.tables, self.plan, self.settings, self.comm, self.device = tables, plan, settings, comm, device
        comm.agree(AGREED, agreed_lines(tables, plan, optimizers, settings, device), device)
        number = comm.history.register(names_of([table.name for table in tables]), len(specs))
        pairs = zip(tables, plan.tables, strict=True)
        packings = tuple(self._packing(table, planned) for table, planned in pairs)
        self.routing = RoutingTable.of(tables, packings, specs, comm.rank, comm.world_size, device)
        wire = tuple(settings.wire_dtype or spec.dtype for spec in specs)
        self._sender = Sender(number, specs, wire, all(spec.copied for spec in specs))
        # Compiled updates sum up a row in another order for another width.
        kernel = "reference" if settings.deterministic and settings.kernel == "auto" else settings.kernel
        # In deterministic mode `deterministic` has it in its contributions.
        share = 1.0 if settings.deterministic else self._share
        self.slabs = [Slab(spec, tables, comm.rank, settings.seed, device, kernel, share) for spec in specs]
        self._stepped = [slab for slab in self.slabs if not isinstance(slab.spec.optimizer, NoOptimizer)]
        self.twins = stretches_of(specs)
        self.frozen, self.beside = Frozen.of(tables, specs), Beside()
        self.own_parameters = expose(self.slabs, WeakMethod(self.freeze), comm)
        if self.own_parameters:
            watch()
        self.stage: Stage = unwatched
        self.rate: Callable[[TableOptimizer], float] = lambda optimizer: optimizer.lr
        self._narrow = any(spec.compute_dtype != spec.dtype for spec in specs)
        self.steps = 0
        self.missed: dict[int, int] = {}
        self.micro_batches = 1
        self.factor: torch.Tensor | None = None
        self.checked = False
        self._backwards = 0
        self._pass = Pass()
        self._looked_up = False
        self._reduced = False
        # Outputs must require grad for autograd to come back here, though no weight of ours is a leaf of its graph.
        self._own = frozenset(lane.table for spec in self.own_specs for lane in spec.lanes)
        self._anchor = torch.empty(0, device=device, requires_grad=not self._own <= self.frozen.tables)
        self._forgotten: frozenset[int] = frozenset()
        self._stopped: frozenset[int] | None = None  # tables that were frozen in all backwards since the last step

    def _packing(self, table: TableConfig, planned: TablePlan) -> Packing:
        """As planned; but where nothing travels, nothing has to be deduplicated for it, unless the wire would round sums."""
        stays = self.comm.world_size == 1 or planned.layout.copied
        exact = self.settings.wire_dtype in (None, table.dtype) and table.dtype in (torch.float32, torch.float64)
        return "bag" if stays and exact else planned.packing

    @property
    def specs(self) -> tuple[SlabSpec, ...]:
        return self._sender.slabs

    @property
    def own_specs(self) -> list[SlabSpec]:
        """The slabs whose tables have an optimizer of ours."""
        return [spec for spec in self.specs if not isinstance(spec.optimizer, NoOptimizer)]

    def freeze(self, numbers: frozenset[int], still: bool) -> None:
        """Freeze tables, or let them learn again, from the next lookup or backward on. Not collective, but for all ranks to do.

        Raises:
            UnsupportedError: one of them was made frozen.
        """
        self.frozen, self.beside = self.frozen.changed(self.tables, numbers, still, self.specs), Beside()
        self._anchor.requires_grad_(not self._own <= self.frozen.tables)
        for exposed in self.own_parameters:
            exposed.freeze(numbers, still)

    def forward(self, read: Callable[[], IdBatch], features: Sequence[Feature], as_they_are: bool = False) -> list[torch.Tensor]:
        """Steps 1 to 6: one output a feature, `[*shape, embedding_dim]`. Collective.

        Args:
            read: gives the batch (`IdBatch.of`); called in here, so that its errors reach all ranks.
            as_they_are: leave rows longer than max_norm alone.

        Raises:
            InputError: on every rank, when the batch of any is malformed.
        """
        return self.outputs(self.send(read, features, as_they_are))

    def outputs(self, ticket: Ticket) -> list[torch.Tensor]:
        """Steps 4 to 6. Collective.

        Raises:
            StepError: the ticket has been used.
        """
        ticket.use()
        if torch._C._current_graph_task_id() < 0:  # not a checkpoint that runs again in the backward
            self._looked_up = True
        if not ticket.as_they_are:
            with torch.no_grad(), self.stage("max_norm"):
                renormalise(self.slabs, self.twins, ticket.request, self.comm, self.settings.deterministic)
        with self.stage("combine"):  # and in it those of `answer`
            outputs = self._combined(ticket)
        if not self._narrow:
            return list(outputs)
        pairs = zip(outputs, ticket.route.features, strict=True)
        return [output.to(self.tables[feature.table].dtype) for output, feature in pairs]

    def _combined(self, ticket: Ticket) -> Sequence[torch.Tensor]:
        answer, frozen = partial(self.answer, ticket.request), self.frozen
        ticket.still = frozen.tables
        if self.own_parameters:
            looked_up = {feature.table for feature in ticket.route.features}
            ticket.shards = [shard for exposed in self.own_parameters for shard in exposed.of_tables(looked_up)]
        if not self.settings.deterministic:
            vectors = Vectors.apply(self._anchor, answer, partial(self.learn, ticket), frozen.slabs, *ticket.shards)
            if torch.is_grad_enabled():
                asked = zip(self.slabs, ticket.request, strict=True)
                ticket.orders = [slab.order(slab.locate(part.keys_E), part.offsets) for slab, part in asked]
            outputs = combine(vectors, ticket.route)
            return without_grad(outputs, vectors, ticket.route, frozen.tables) if frozen.mixed else outputs
        weights = [part.weights for part in ticket.route.ids.parts]
        still = [feature.table in frozen.tables for feature in ticket.route.features]
        learn = partial(self.learn_fixed, ticket)
        return FixedOutputs.apply(self._anchor, ticket.route, answer, learn, still, *weights, *ticket.shards)

    def send(
        self, read: Callable[[], IdBatch], features: Sequence[Feature], as_they_are: bool = False, ahead: Ahead | None = None
    ) -> Ticket:
        """Steps 1 to 3. No weight is read, so they may run ahead of the compute. Collective.

        Args:
            ahead: runs beside the main thread, in one of its own.

        Raises:
            UnsupportedError: torch.jit.trace is at work; the other ranks, which may not trace, raise it too.
        """
        if torch.jit.is_tracing():
            with tracing.paused():
                return self.send(tracing.refuse, features, as_they_are)
        try:
            with self.stage("read"):
                ids, problem = read(), None
                if ahead is not None:
                    ahead.check(ids)
            with self.stage("make route"):
                route = make_route(ids, features, self.routing)
        except Exception as error:  # whatever it is: the other ranks are waiting for the counts, so tell them there
            route, problem = empty_route(features, self.routing), error
        comm, call = ahead.begin() if ahead else (self.comm, self._call(Mode.ROWS if as_they_are else _mode()))
        with self.stage("send ids"):
            request = send_ids(route, problem, call, self._sender, comm, self.device)
        return Ticket(route, replace(request, ahead=ahead is not None), as_they_are)

    def ahead(self, comm: Comm) -> Ahead:
        """For a call of `send` that `comm` is to carry beside the main thread, whose calls stand here."""
        return Ahead(comm, self._call(_mode()), self.comm.history.step, self.comm.history.checksum)

    def arrive(self, ticket: Ticket) -> None:
        """Number a ticket that was made beside the main thread among the calls of that: all ranks get as many."""
        ticket.request = replace(ticket.request, call=self.comm.history.open_call())

    def _call(self, mode: Mode, table: int = 0, k: int = 0) -> Call:
        return Call(mode, self.steps, self.waiting, table, k, self.frozen.fingerprint)

    def open_topk(self, table: int, k: int, queries: int, problem: Exception | None) -> list[int]:
        """Begin a retrieval: how many queries each rank has. Collective."""
        counts = np.array([queries, 0], dtype=np.int64)[None, :, None].repeat(self.comm.world_size, 2)
        told = open_call(self._call(Mode.TOPK, table, k), counts, problem, self._sender, self.comm, self.device)
        return told[0, 0].tolist()

    def answer(self, request: Request) -> list[torch.Tensor]:
        """Steps 4 and 5, on detached weights: the vectors this rank asked for, `[S, W]` a slab."""
        with self.stage("lookup"):
            answers = [slab.lookup(slab.locate(part.keys_E), part.offsets) for slab, part in zip(self.slabs, request, strict=True)]
        with self.stage("send back"):
            return send_back(answers, request, self._sender, self.comm)

    def learn(self, ticket: Ticket, grads: Sequence[torch.Tensor], own: bool) -> list[torch.Tensor | None]:
        """Steps 8 and 9: gradients go to the rows' owners and wait there; those of the ticket's shards are returned. Collective.

        Args:
            own: tables with an optimizer of ours learn too; else autograd was asked for the shards alone.
        """
        still = self._begin_backward(ticket, own)
        with self.stage("send grads"):
            arrived = send_grads(grads, ticket.request, self._sender, self.comm)
        with self.stage("accumulate"):
            self._accumulate(ticket, arrived, still)
        return self._end_backward(ticket, still)

    def _accumulate(self, ticket: Ticket, arrived: Sequence[torch.Tensor], still: frozenset[int]) -> None:
        for slab, part, grads_SW, order in zip(self.slabs, ticket.request, arrived, ticket.orders, strict=True):
            rows_E = slab.locate(part.keys_E)
            if part.multiplicities_E is not None:  # then every segment is a single row
                grads_SW = grads_SW / frequencies(rows_E, part.multiplicities_E).unsqueeze(1)  # they may be the user's own
            slab.accumulate(Gradients(rows_E, part.offsets, grads_SW), order, still)

    def learn_fixed(
        self, ticket: Ticket, vectors: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], own: bool
    ) -> list[torch.Tensor | None]:
        """Steps 7 to 9 in deterministic mode, from the gradients of the outputs; else as `learn`."""
        still = self._begin_backward(ticket, own)
        with self.stage("send grads"):
            found = deterministic.contributions(ticket.route, self.specs, grads, vectors, self._share)
            scales = deterministic.exponents(found, ticket.route, self.tables, self.comm, self.device, ticket.request.call)
            sums = deterministic.quanta(found, scales, vectors)
            deterministic.gather(sums, ticket.request, self.slabs, scales, self._sender, self.comm, still)
        return self._end_backward(ticket, still)

    @property
    def _share(self) -> float:
        return 1.0 / self.comm.world_size if self.settings.reduction == "mean" else 1.0

    def _begin_backward(self, ticket: Ticket, own: bool) -> frozenset[int]:
        """The tables that do not learn from this backward: frozen in the lookup or since, or not asked for."""
        still = ticket.still | self.frozen.tables
        if not own:
            return still | self._own
        if self._reduced:
            raise StepError("a backward came between clip_grad_norm_ and Optimizer.step(); clip after the last backward of a step")
        if self.factor is not None and bool(self.factor != 1):  # nan too; on a GPU a host sync, after an early look only
            raise StepError(
                "a backward came after the waiting gradients had been unscaled or found not finite; unscale after the last "
                "backward of a step, and call Optimizer.zero_grad() after a step that GradScaler skipped"
            )
        self.factor, self.checked = None, False
        tables = {feature.table for feature in ticket.route.features}
        # Modules that are called one by one come here one by one in the same pass of the autograd engine.
        self._pass = self._pass.joined(torch._C._current_graph_task_id(), tables)
        if self._pass.twice and self.settings.update == "backward":
            raise StepError(
                f"table {self.tables[min(self._pass.twice)].name!r} was looked up twice in a forward: update='backward' would take "
                "a step for each; use update='step', or one lookup with two features"
            )
        return still

    def _end_backward(self, ticket: Ticket, still: frozenset[int]) -> list[torch.Tensor | None]:
        grads: list[torch.Tensor | None] = []
        if self.own_parameters:
            grads = deliver(self.own_parameters, ticket.shards, self.comm, self._sender.number, reduced=self.settings.deterministic)
        if not self._own <= still:
            self._forgotten &= still
            self._stopped = still if self._stopped is None else self._stopped & still
            self._count()
        return grads

    def _count(self) -> None:
        """Note that a backward's gradients wait for a step, or take it."""
        if self.settings.update == "backward":
            self._backwards = 1
            self.step()
            return
        # A module that is called twice in a forward, or below two losses, comes here twice; that is one pass all the same.
        if self._backwards and not self._looked_up:
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
            if not self.settings.deterministic:  # else done in the backward, in whole numbers
                with self.stage("reduce copies"):
                    reduce_copies(self._stepped, self.comm, self._sender.number)
            self._reduced = True

    def step(self) -> None:
        """Step 10: update every touched row. Collective where the plan needs an exchange."""
        if not self.waiting:
            return
        self.reduce()
        with self.stage("share row squares"):
            squares = mean_squares(self.slabs, self.twins, self.comm, self.settings.deterministic, self._sender.number)
        # In update="backward", each lookup of a pass steps its own tables; together they are one step.
        if self._pass.fresh or self.settings.update == "step":
            self.steps += 1
            for number in self._own & (self._stopped or frozenset()):
                self.missed[number] = self.missed.get(number, 0) + 1
        self.comm.history.stepped(self.steps)
        factor = 1.0 if self.factor is None else float(self.factor)  # host sync on a GPU
        with self.stage("step"):
            for slab in self._stepped:
                slab.step(self.rate(slab.spec.optimizer), self.steps, factor, squares.get(slab.spec.index), self.missed)
        self.drop()

    def steps_of(self, table: str) -> int:
        """The steps that a table was not frozen in."""
        number = [config.name for config in self.tables].index(table)
        return self.steps - self.missed.get(number, 0)

    def restore_steps(self, taken: Mapping[str, int]) -> None:
        """Count on from what `steps_of` said of some tables; the others have missed none."""
        if taken:
            self.steps = max(taken.values())
            missed = {number: self.steps - taken.get(table.name, self.steps) for number, table in enumerate(self.tables)}
            self.missed = {number: count for number, count in missed.items() if count}
            self.comm.history.stepped(self.steps)

    def forget(self, numbers: frozenset[int]) -> None:
        """Forget the waiting gradients of these tables."""
        if not self.waiting:
            return
        self._forgotten |= numbers
        if self._own <= self._forgotten:
            self.drop()
            return
        for slab in self.slabs:
            slab.forget(numbers)

    def drop(self) -> None:
        """Forget the waiting gradients."""
        for slab in self.slabs:
            slab.drop()
        self.factor, self.checked = None, False
        self._backwards = 0
        self._stopped, self._forgotten = None, frozenset()
        self._reduced = False
