"""The journey of a batch, from ids to vectors, back to gradients, and to the updated rows.

    forward   1  ids      = IdBatch.of(input)              any accepted input as flat ids
              2  route    = make_route(ids, plan)          who owns what; pure, no communication
              3  request  = send_ids(route)                all-to-all: counts and flags; all-to-all: keys
              4  answers  = slab.lookup(request)           owner: keys -> rows (locate), one vector a segment, in a message
              5  vectors  = send_back(answers)             all-to-all: vectors in the wire dtype
              6  outputs  = combine(vectors, route)        requester: segments pool, into one tensor side by side
    backward  7  grads    = (adjoint of combine)           autograd: one gradient a segment
              8  grads    = send_grads(grads)              all-to-all: sizes mirrored
              9  slab.accumulate(request, grads)           owner keeps them until the step
    step     10  slab.step()                               merge duplicate rows, fused update in place

A segment is a list of ids of one table that live on one owner, answered by one vector (see `journey.route.segments`). Five of the
stages pass over all that a batch has: route (2), lookup (4), pool (6), spread of gradients (7) and update (10), for which a GPU
orders the rows as soon as they are known. One rank runs the same code: its route leads to itself and `Comm` hands back what it was
given.

The methods of `Journey` stand in this order, and docstrings name the stages by these numbers. What has to be in place first is
made in `setup`, which gradients wait for a step is told by `pending`, and which tables learn by `freezing`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from weakref import WeakMethod

import numpy as np
import torch

from shardembed.comm.comm import Comm
from shardembed.comm.stages import Stage, unwatched
from shardembed.inputs.ids import IdBatch
from shardembed.journey import deterministic, tracing
from shardembed.journey.ahead import Ahead
from shardembed.journey.autograd import FixedOutputs, Vectors
from shardembed.journey.freezing import Freezing, Frozen, without_grad
from shardembed.journey.messages import (
    Announced,
    Call,
    announce_ids,
    exchange_ids,
    open_call,
    pack_answers,
    send_back,
    send_grads,
    send_ids,
)
from shardembed.journey.pending import PendingStep, State
from shardembed.journey.route import combine, empty_route, make_route
from shardembed.journey.route.side_by_side import Outputs
from shardembed.journey.setup import Setup
from shardembed.journey.ticket import Ticket
from shardembed.kernels.gradients import Gradients
from shardembed.kernels.reference import frequencies
from shardembed.optim import TableOptimizer
from shardembed.store import wrappers
from shardembed.store.orders import orders
from shardembed.store.own_parameters import deliver, expose
from shardembed.store.reductions import mean_squares, reduce_copies
from shardembed.store.renorm import renormalise, renormalise_alone
from shardembed.store.request import Request
from shardembed.store.slab_spec import SlabSpec
from shardembed.tables.table_config import Feature
from shardembed.wire.header import Mode


class Journey:
    """The sharded tables of one collection, and the way of its batches.

    Attributes:
        tables, plan, settings, comm, device, slabs: as in `Setup`.
        stepped: the slabs whose tables have an optimizer of ours.
        own_parameters: of the tables that have none, as Parameters for the user's own.
        freezing: which tables learn.
        pending: the step that gradients wait for, and how many have been taken.
        rate: gives the current learning rate of a table optimizer.
        stage: what surrounds each stage of the journey; see `comm.stages`.
    """

    def __init__(self, setup: Setup) -> None:
        self.tables, self.plan, self.settings = setup.tables, setup.plan, setup.settings
        self.comm, self.device, self.slabs, self.stepped = setup.comm, setup.device, setup.slabs, setup.stepped_slabs
        self._routing, self._sender, self._twins = setup.routing, setup.sender, setup.twins
        self._stepped_tables, self._reduction_factor = setup.stepped_tables, setup.reduction_factor
        self._dynamic = [slab for slab in self.slabs if slab.dynamic is not None]
        self._narrow = any(spec.compute_dtype != spec.dtype for spec in self.specs)
        self.freezing = Freezing(Frozen.of(self.tables, self.specs), self._stepped_tables, self.device)
        self.own_parameters = expose(self.slabs, WeakMethod(self.freezing.change), self.comm)
        self.freezing.tell(self.own_parameters)
        if self.own_parameters:
            wrappers.watch()
        names, at_once = [table.name for table in self.tables], self.settings.update == "backward"
        self.pending = PendingStep(names, self._stepped_tables, at_once, self.device)
        self.rate: Callable[[TableOptimizer], float] = lambda optimizer: optimizer.lr
        self.stage: Stage = unwatched

    @property
    def specs(self) -> tuple[SlabSpec, ...]:
        """What all ranks know of the slabs."""
        return self._sender.slabs

    @property
    def steps(self) -> int:
        """Optimizer steps taken with gradients."""
        return self.pending.steps

    # Forward: stages 1 to 6.

    def forward(self, read: Callable[[], IdBatch], features: Sequence[Feature], as_they_are: bool = False) -> Outputs:
        """Stages 1 to 6: one output a feature, `[*shape, embedding_dim]`. Collective.

        Args:
            read: gives the batch (`IdBatch.of`); called in here, so that its errors reach all ranks.
            as_they_are: leave rows longer than max_norm alone.

        Raises:
            InputError: on every rank, when the batch of any is malformed.
        """
        return self.outputs(self.send(read, features, as_they_are))

    def send(
        self, read: Callable[[], IdBatch], features: Sequence[Feature], as_they_are: bool = False, ahead: Ahead | None = None
    ) -> Ticket:
        """Stages 1 to 3. No weight is read, so they may run before the batch's turn. Collective.

        Args:
            ahead: they do, beside the main thread.

        Raises:
            UnsupportedError: a CUDA graph is captured. Or torch.jit.trace is at work; the other ranks, which may not trace, raise
                it too.
        """
        tracing.refuse_capture(self.device)
        if torch.jit.is_tracing():
            with tracing.paused():
                return self.send(tracing.refuse, features, as_they_are)
        try:
            with self.stage("read"):
                ids, problem = read(), None
                if ahead is not None:
                    ahead.check(ids)
            with self.stage("make route"):
                route = make_route(ids, features, self._routing)
        except Exception as error:  # whatever it is: the other ranks are waiting for the counts, so tell them there
            route, problem = empty_route(features, self._routing), error
        comm, call = ahead.begin() if ahead else (self.comm, self._call(Mode.ROWS if as_they_are else None))
        with self.stage("send ids"):
            later = ahead is not None and self.comm.in_turn(self.device)  # in `arrive`
            asked = (announce_ids if later else send_ids)(route, problem, call, self._sender, comm)
        return Ticket(route, asked, as_they_are)

    def _call(self, mode: Mode | None = None, table: int = 0, k: int = 0) -> Call:
        """What the other ranks must be doing too: a plain forward, where nothing else is said."""
        if mode is None:
            mode = Mode.TRAINING if torch.is_grad_enabled() else Mode.EVALUATION
        return Call(mode, self.steps, self.pending.waiting, table, k, self.freezing.frozen.fingerprint)

    def outputs(self, ticket: Ticket) -> Outputs:
        """Stages 4 to 6. Collective.

        Raises:
            StepError: the ticket has been used.
        """
        ticket.use()
        if torch._C._current_graph_task_id() < 0:  # not a checkpoint that runs again in the backward
            self.pending.looked_up()
        rows = self._rows(ticket)
        if not ticket.as_they_are:
            with torch.no_grad(), self.stage("max_norm"):
                renormalise(self.slabs, self._twins, rows, ticket.request, self.comm, self.settings.deterministic)
        with self.stage("combine"):  # and in it those of `answer`
            outputs = self._combined(ticket, rows)
        if self._narrow:
            dtypes = (self.tables[feature.table].dtype for feature in ticket.route.features)
            return outputs._replace(each=[output.to(dtype) for output, dtype in zip(outputs.each, dtypes, strict=True)])
        return outputs

    def _rows(self, ticket: Ticket) -> list[torch.Tensor]:
        """Of each slab, the rows of the keys that are asked for, `[E]`."""
        learning, pairs = torch.is_grad_enabled(), zip(self.slabs, ticket.request, strict=True)
        if not self._dynamic:
            return [slab.locate(part.keys_E, learning) for slab, part in pairs]
        with torch.no_grad(), self.stage("find ids"):
            return [slab.locate(part.keys_E, learning, counted=not ticket.as_they_are) for slab, part in pairs]

    def _combined(self, ticket: Ticket, rows: Sequence[torch.Tensor]) -> Outputs:
        """The outputs, with a way back for autograd: `answer` here, `learn` when their gradients come."""
        answer, frozen, anchor = partial(self.answer, ticket.request, rows), self.freezing.frozen, self.freezing.anchor
        ticket.frozen = frozen.tables
        if self.own_parameters:
            looked_up = {feature.table for feature in ticket.route.features}
            ticket.shards = [shard for own in self.own_parameters for shard in own.of_tables(looked_up)]
        if self.settings.deterministic:
            per_sample_weights = [part.weights for part in ticket.route.ids.parts]
            of_features = [feature.table in frozen.tables for feature in ticket.route.features]
            learn = partial(self.learn_fixed, ticket)
            found = FixedOutputs.apply(anchor, ticket.route, answer, learn, of_features, *per_sample_weights, *ticket.shards)
            return Outputs(list(found)) if ticket.route.columns is None else Outputs(list(found[1:]), found[0])
        vectors = Vectors.apply(anchor, answer, partial(self.learn, ticket), frozen.slabs, *ticket.shards)
        if torch.is_grad_enabled():  # sorted here, where the rows are known and the gradients are not
            asked = [(rows_E, part.offsets) for rows_E, part in zip(rows, ticket.request, strict=True)]
            ticket.orders = orders(self.slabs, asked)
        outputs = combine(vectors, ticket.route)
        return without_grad(outputs, vectors, ticket.route, frozen.tables) if frozen.mixed else outputs

    def answer(self, request: Request, rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Stages 4 and 5, on detached weights: the vectors this rank asked for, `[S, W]` a slab. rows: of each slab's keys."""
        with self.stage("lookup"):
            found = [slab.lookup(rows_E, part.offsets) for slab, rows_E, part in zip(self.slabs, rows, request, strict=True)]
            answers = pack_answers(found, request, self._sender, self.comm)  # rows are read now, straight into the message
        with self.stage("send back"):
            return send_back(answers, request, self._sender, self.comm)

    # Backward: stages 7 to 9, called by autograd.

    def learn(self, ticket: Ticket, grads: Sequence[torch.Tensor], whole: bool) -> list[torch.Tensor | None]:
        """Stages 8 and 9: gradients go to the rows' owners and wait there; those of the ticket's shards are returned. Collective.

        Args:
            grads: of the vectors, `[S, W]` a slab.
            whole: the backward is for all that learns; else autograd was asked for the shards alone.
        """
        frozen = self._begin_backward(ticket, whole)
        with self.stage("send grads"):
            arrived = send_grads(grads, ticket.request, self._sender, self.comm)
        # Where nothing travels, gradients of bags that go out as they were answered are memory of others, who may write into it.
        of_slabs = zip(arrived, grads, ticket.route.slabs, strict=True)
        arrived = [part.clone() if part is sent and slab.passes_on else part for part, sent, slab in of_slabs]
        with self.stage("accumulate"):
            for slab, part, grads_SW, order in zip(self.slabs, ticket.request, arrived, ticket.orders, strict=True):
                if not slab.learns(frozen):
                    continue
                rows_E = slab.bring(part.keys_E)
                if slab.spec.policy.scale_grad_by_freq and part.multiplicities_E is not None:  # then every segment is a single row
                    grads_SW = grads_SW / frequencies(rows_E, part.multiplicities_E).unsqueeze(1)  # they may be the user's own
                seen = rows_E, part.multiplicities_E
                slab.accumulate(Gradients(rows_E, part.offsets, grads_SW), order, frozen, seen)
        return self._end_backward(ticket, frozen)

    def learn_fixed(
        self, ticket: Ticket, vectors: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], whole: bool
    ) -> list[torch.Tensor | None]:
        """Stages 7 to 9 in deterministic mode, from the gradients of the outputs; else as `learn`."""
        frozen = self._begin_backward(ticket, whole)
        with self.stage("send grads"):
            found = deterministic.contributions(ticket.route, self.specs, grads, vectors, self._reduction_factor)
            scales = deterministic.exponents(found, ticket.route, self.tables, self.comm, self.device, ticket.request.call)
            sums = deterministic.quanta(found, scales, vectors)
            deterministic.gather(sums, ticket.request, self.slabs, scales, self._sender, self.comm, frozen)
        return self._end_backward(ticket, frozen)

    def _begin_backward(self, ticket: Ticket, whole: bool) -> frozenset[int]:
        """The tables that do not learn from this backward: frozen in the lookup or since, or not asked for."""
        frozen = ticket.frozen | self.freezing.frozen.tables
        if not whole:
            return frozen | self._stepped_tables
        # Modules that are called one by one come here one by one in the same run of the autograd engine.
        tables = frozenset(feature.table for feature in ticket.route.features)
        self.pending.backward_began(torch._C._current_graph_task_id(), tables)
        return frozen

    def _end_backward(self, ticket: Ticket, frozen: frozenset[int]) -> list[torch.Tensor | None]:
        grads = deliver(self.own_parameters, ticket.shards, self.comm, self._sender.number, reduced=self.settings.deterministic)
        if self.pending.gradients_arrived(frozen):
            self.step()
        return grads

    # The step: stage 10, and what else becomes of waiting gradients.

    def reduce(self) -> None:
        """Bring the waiting gradients of copied tables together, once a step. Collective where there are any."""
        if self.pending.state is State.WAITING:
            if not self.settings.deterministic:  # else done in the backward, in whole numbers
                with self.stage("reduce copies"):
                    reduce_copies(self.stepped, self.comm, self._sender.number)
            self.pending.reduced()

    def step(self) -> None:
        """Stage 10: update every touched row. Collective where the plan needs an exchange."""
        tracing.refuse_capture(self.device)
        if not self.pending.waiting:
            return
        self.reduce()
        factor = self.pending.step_began()
        self.comm.history.stepped(self.steps)
        if self._dynamic:
            with self.stage("commit ids"):
                self._commit()
        with self.stage("share row squares"):
            squares = mean_squares(self.slabs, self._twins, self.comm, self.settings.deterministic, self._sender.number)
        with self.stage("step"):
            for slab in self.stepped:
                slab.step(self.rate(slab.spec.optimizer), self.steps, factor, squares.get(slab.spec.index), self.pending.missed)
        self.pending.taken()

    def _commit(self) -> None:
        """Ids of dynamic tables that the step creates get their rows, which are then as a lookup of them would have left them."""
        for slab in self._dynamic:
            created = slab.commit(self.steps)
            if created is not None and slab.spec.policy.max_norm is not None:
                renormalise_alone(slab, created, self.settings.deterministic)

    def forget(self, numbers: frozenset[int]) -> None:
        """Forget the waiting gradients of these tables."""
        if self.pending.forgot(numbers):
            self.drop()
        for slab in self.slabs:
            slab.forget(numbers)

    def drop(self) -> None:
        """Forget the waiting gradients."""
        for slab in self.slabs:
            slab.drop()
        self.pending.dropped()

    # Who else has to do with it: optimizers, checkpoints, freezing, `prefetch`, `profile`, retrieval.

    def stepped_by(self, rate: Callable[[TableOptimizer], float], micro_batches: int) -> None:
        """From now on steps take their learning rates from `rate`, after so many backward passes each."""
        self.rate = rate
        self.pending.expect(micro_batches)

    def restore_steps(self, taken: Mapping[str, int]) -> None:
        """Count on from what `PendingStep.steps_of` said of some tables; the others have missed none."""
        self.pending.restore(taken)
        self.comm.history.stepped(self.steps)
        for slab in self._dynamic:
            assert slab.dynamic is not None
            slab.dynamic.steps = self.steps

    def ahead(self, comm: Comm) -> Ahead:
        """For a call of `send` that `comm` is to carry beside the main thread, whose calls stand here."""
        return Ahead(comm, self._call(), self.comm.history.step, self.comm.history.checksum)

    def arrive(self, ticket: Ticket) -> None:
        """Take over a ticket that was made beside the main thread: ids that have only been announced are exchanged now, and it gets
        its number among the calls of the main thread. All ranks get as many. Collective.
        """
        asked = ticket.asked
        request = exchange_ids(asked, self._sender, self.comm) if isinstance(asked, Announced) else asked
        ticket.asked = replace(request, call=self.comm.history.open_call(), ahead=True)

    def watch(self, stage: Stage) -> None:
        """Put this around each stage from now on."""
        self.stage = stage

    def open_table_call(
        self, mode: Mode, table: int, problem: Exception | None, told: tuple[int, int] = (0, 0), k: int = 0
    ) -> list[list[int]]:
        """Begin a call about one table, of which all ranks give the same `mode`, `table` and `k`: what each rank has `told`, two
        lists of a number a rank. Collective.
        """
        counts = np.array(told, dtype=np.int64)[None, :, None].repeat(self.comm.world_size, 2)
        return open_call(self._call(mode, table, k), counts, problem, self._sender, self.comm)[0].tolist()
