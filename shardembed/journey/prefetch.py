"""`prefetched(loader, model)`: while a batch is computed, the ids of the next ones are routed and sent.

Stages 1 to 3 of a journey read no rows, so they run beside the main thread: in a thread, with process groups of its own
(`Comm.beside`), and for a GPU on a stream of its own. There the thread routes the ids and tells their counts, which waits for the
GPU and for other ranks, over Gloo; the ids themselves go over NCCL, which wants all calls in the order of the program
(`comm/communicators.py`), so the main thread exchanges them when the batch's turn comes, and waits for nothing.

The loader is read in the main thread, so that what it draws from random generators does not depend on timing. Whatever ranks must
agree on (the number of the call, steps taken, the checksum of earlier calls) is noted there too, when a batch is read. A rank whose
loader ends or fails says so in place of its batch, in the counts message that goes round anyway.

A batch that has been read is also sent, whatever happens to the loop in the meantime: ranks that leave the loop after the same
batch have then made the same calls, and the groups are ready for the next loop.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils import _pytree as pytree

from shardembed.comm.beside import Line
from shardembed.comm.comm import Comm
from shardembed.comm.streams import side_for
from shardembed.config.scalars import integer
from shardembed.errors import ConfigError, EndOfData, LoaderError, UnusedBatchWarning
from shardembed.journey.ahead import Ahead
from shardembed.journey.journey import Journey, Ticket
from shardembed.wire.header import Mode

Arguments = Callable[[Any], tuple[Any, ...]]
PATIENCE = 3  # batches that the model may be called without before that is taken for a mistake


class SentBatches:
    """What has been sent ahead, by the arguments of the call that it is for: the same objects, however they are nested."""

    def __init__(self) -> None:
        self._waiting: list[tuple[list[Any], Any]] = []

    def add(self, arguments: tuple[Any, ...], sent: Any) -> None:
        self._waiting.append((pytree.tree_leaves(arguments), sent))

    def take(self, arguments: tuple[Any, ...], named: dict[str, Any] | None = None) -> Any:
        """What was sent for a call with these arguments, once; None where nothing was."""
        if not self._waiting:
            return None
        leaves = pytree.tree_leaves((arguments, named or {}))
        for number, (others, sent) in enumerate(self._waiting):
            if len(leaves) == len(others) and all(one is other for one, other in zip(leaves, others, strict=True)):
                del self._waiting[number]
                return sent
        return None

    def drop(self, sent: Any) -> bool:
        """Forget it; whether it was still there."""
        before = len(self._waiting)
        self._waiting = [(leaves, other) for leaves, other in self._waiting if other is not sent]
        return len(self._waiting) < before


@dataclass(frozen=True)
class Sent:
    """Ids that were sent ahead.

    Attributes:
        ticket: of the call that they are for.
        value: what the call takes in place of ids.
    """

    ticket: Ticket
    value: Any


class Target:
    """What batches can be sent ahead for: a collection, or all tables of a converted model.

    Attributes:
        journey: of its tables.
        sent_batches: what has been sent for calls to come.
    """

    journey: Journey
    sent_batches: SentBatches

    def send_ahead(self, arguments: tuple[Any, ...], ahead: Ahead) -> Sent:
        """Send the ids of a call with these arguments; maybe in another thread. Collective.

        Raises:
            InputError: on every rank, when the batch of any is malformed.
        """
        raise NotImplementedError  # both do


def prefetched(loader: Iterable[Any], model: nn.Module, depth: int = 1, *, arguments: Arguments | None = None) -> Iterator[Any]:
    """The loader's batches, for as long as every rank has one, each with its ids on their way to the rows' owners: while batch k is
    computed, the ids of the next `depth` batches are read, routed and sent. The numbers are those of the plain loop, to the last
    bit. Collective, as `synced`, which it includes without a call of its own.

    `model` is one of
    - an `EmbeddingCollection`; the loader gives its inputs, and the loop gets what its call takes in their place;
    - a model converted by `se.shard(model, inputs=...)`, or a wrapper such as DistributedDataParallel around it; the loop gets the
      loader's batches, and the model, when it is called with one, finds that its ids have been sent;
    - a model that holds one `EmbeddingCollection`, with `arguments=`; the loop gets the loader's batches likewise.

    Batches may be left out, or be copied before the model is called with them (their ids were sent for nothing then), as long as
    all ranks do the same. Evaluation, `rows`, `topk` and checkpoints may come between batches. Ranks that leave the loop must do so
    after the same batch. `inputs=` is called ahead of the steps in between, and in another thread, so it must not depend on what is
    trained. The loader must give every batch memory of its own.

    Args:
        depth: batches to be ahead; their ids and routes are kept in memory.
        arguments: what the model (or the collection in it) is going to be called with for a batch, as a tuple; by default the
            batch alone.

    Raises:
        ConfigError: at once; it cannot be told what the model's tables are looked up with.
        InputError: on every rank, in place of the first batch that is malformed on any.
        DataError: likewise, on the ranks whose own loader worked; one whose loader failed raises the loader's error.
        DisagreementError: on every rank, when they did not make the same calls.
    """
    batches = integer(depth)
    if batches is None or batches < 1:
        raise ConfigError(f"depth must be a whole number of batches from 1 on, not {depth!r}")
    target = target_of(model, told=arguments is not None)
    tickets = target is model and arguments is None  # the loop gets them, and passes them on
    return _loop(loader, target, batches, arguments or _alone, tickets)


def _alone(batch: Any) -> tuple[Any, ...]:
    return (batch,)


def target_of(model: nn.Module, told: bool) -> Target:
    """What to send batches ahead for.

    Args:
        told: what it is called with has been told.

    Raises:
        ConfigError: there is nothing, too much, or what the model is called with does not say what its tables are.
    """
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values() if isinstance(hook, Target)]
    held = [module for module in model.modules() if isinstance(module, Target)]
    found = list({id(target): target for target in [*hooks, *held]}.values())
    if len(found) == 1:
        if hooks or told or found[0] is model:
            return found[0]
        raise ConfigError(
            "prefetched() knows the model's batches, but not what of them its EmbeddingCollection is called with: pass "
            "arguments=lambda batch: (what the collection is called with,), or the collection itself with a loader of its inputs"
        )
    if found:
        raise ConfigError(
            f"the model makes {len(found)} calls for its tables a step, and prefetched() sends one ahead: put all tables into one "
            "EmbeddingCollection, or convert the model with one se.shard(model, inputs=...)"
        )
    if any(isinstance(getattr(module, "journey", None), Journey) for module in model.modules()):
        raise ConfigError(
            "the model's tables are looked up module by module, and nothing says with what before they are called: convert it with "
            "se.shard(model, inputs=lambda batch: {path: ids, ...}), or hold its tables in an EmbeddingCollection"
        )
    raise ConfigError("the model has no sharded tables: use se.synced(loader), or se.shard(model, inputs=...) it first")


@dataclass
class _Read:
    """What the loader gave.

    Attributes:
        batch: for the loop.
        given: what the model is called with for it.
        problem: why there is no batch.
    """

    batch: Any = None
    given: tuple[Any, ...] = ()
    problem: Exception | None = None


class _Reader:
    """The loader, up to its end or its failure."""

    def __init__(self, loader: Iterable[Any], arguments: Arguments) -> None:
        self._loader, self._arguments, self._batches = loader, arguments, None
        self.trouble: Exception | None = None
        self.ended = False

    def read(self) -> _Read:
        try:
            self._batches = iter(self._loader) if self._batches is None else self._batches
            batch = next(self._batches)
        except StopIteration:
            problem: Exception = EndOfData("no batch is left")
        except Exception as error:  # whatever a user's loader raises: the others must hear of it first
            self.trouble = error
            problem = LoaderError(f"the data loader failed with {type(error).__name__}: {error}. All ranks stop here")
        else:
            try:
                return _Read(batch, self._arguments(batch))
            except Exception as error:
                problem = error
        self.ended = True
        return _Read(problem=problem)


def _loop(loader: Iterable[Any], target: Target, depth: int, arguments: Arguments, tickets: bool) -> Iterator[Any]:
    reader, coming, watch = _Reader(loader, arguments), deque[_Read](), _Watch()
    with target.journey.comm.beside() as comm, closing(Line(side_for(target.journey.device))) as line:
        while True:
            while not reader.ended and len(coming) <= depth:
                coming.append(reader.read())
                _submit(coming[-1], target, line, comm)
            read = coming.popleft()
            with target.journey.stage("wait for ids"):
                outcome = line.take(lambda sent: target.journey.arrive(sent.ticket))
            if outcome.error is not None:
                _stop(reader, read, outcome.error)
                return
            if tickets:
                yield outcome.value.value
                continue
            target.sent_batches.add(read.given, outcome.value.value)
            try:
                yield read.batch
            finally:
                unused = target.sent_batches.drop(outcome.value.value)
            watch.saw(unused)


def _stop(reader: _Reader, read: _Read, error: BaseException) -> None:
    """Raise what ends the loop on this rank; nothing at the end of data."""
    if isinstance(read.problem, LoaderError) and reader.trouble is not None:
        raise reader.trouble
    if not isinstance(error, EndOfData):
        raise error


def _submit(read: _Read, target: Target, line: Line, comm: Comm) -> None:
    ahead = target.journey.ahead(comm)

    def send() -> Any:
        with torch.set_grad_enabled(ahead.call.mode == Mode.TRAINING):  # of the main thread
            if read.problem is None:
                return target.send_ahead(read.given, ahead)
            return target.journey.send(lambda: _refuse(read.problem), (), ahead=ahead)

    line.submit(send, read.given)


def _refuse(problem: Exception | None) -> NoReturn:
    assert problem is not None
    raise problem


class _Watch:
    """Whether the model takes what is sent for it."""

    def __init__(self) -> None:
        self._unused: int | None = 0  # None once it has taken some

    def saw(self, unused: bool) -> None:
        if self._unused is None or not unused:
            self._unused = None
            return
        self._unused += 1
        if self._unused == PATIENCE:
            warnings.warn(
                f"the model was not called with any of the first {PATIENCE} batches of prefetched(), so their ids were sent twice: "
                "call it with the batches as they come, or pass arguments= to say what it is called with",
                UnusedBatchWarning,
                stacklevel=3,
            )
