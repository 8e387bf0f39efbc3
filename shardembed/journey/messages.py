"""Stages 3, 5 and 8 of the journey: what travels, packed for all slabs together.

Whatever travels on the group "forward" opens with the counts message (`wire.header`): which call this is, the bytes of error text
that follow, then, a slab: segments, keys. It is all that ranks need to know of each other; a row is as long as the largest
collection on the group needs, so that ranks which make different calls notice instead of tripping over each other's sizes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar, cast

import numpy as np
import torch

from shardembed.comm.comm import Comm
from shardembed.errors import precedence, rebuild, travels
from shardembed.journey.route import Route
from shardembed.kernels.host import to_device
from shardembed.kernels.kernel import Source, gathered
from shardembed.kernels.packing import pack, unpack
from shardembed.store.request import Request, SlabRequest
from shardembed.store.slab_spec import SlabSpec
from shardembed.wire import narrow
from shardembed.wire.header import Header, Mode, compare, counts_of, fill, refused
from shardembed.wire.message import MessageLayout, Numbers, Part, Schema


@dataclass(frozen=True)
class Call:
    """What a collection says of a call to the other ranks; all of it goes into the header of the counts message.

    Attributes:
        mode: what the call is about.
        steps: optimizer steps of the collection.
        waiting: whether gradients wait for the next step.
        table: number of the table, of topk.
        k: rows wanted, of topk.
        frozen: which tables are frozen (`Frozen.fingerprint`).
    """

    mode: Mode
    steps: int
    waiting: bool
    table: int = 0
    k: int = 0
    frozen: int = 0


@dataclass(frozen=True)
class Sender:
    """Who makes a call.

    Attributes:
        number: the collection's number on its process group.
        slabs: of the collection.
        wire_dtypes: of the vectors, a slab each.
        local: nothing is cut, so only the counts message has to travel.
    """

    number: int
    slabs: tuple[SlabSpec, ...]
    wire_dtypes: tuple[torch.dtype, ...]
    local: bool
    _asking: dict[tuple[int, ...], Schema] = field(default_factory=dict, compare=False, repr=False)

    def ids(self, told: tuple[int, ...]) -> Schema:
        """What asks: of all slabs the keys, of those `told` the keys of each segment, and of the `counted` how often each key's id
        occurs.
        """
        if told not in self._asking:
            keys = [Part(spec.key_dtype) for spec in self.slabs]
            lengths = [Part(torch.int32, implied=1) for _ in told]
            self._asking[told] = Schema((*keys, *lengths, *(Part(torch.int32) for _ in self.counted)))
        return self._asking[told]

    @cached_property
    def counted(self) -> list[int]:
        """The slabs whose owners want to know how often ids occur."""
        return [spec.index for spec in self.slabs if spec.counts_ids]

    @cached_property
    def vectors(self) -> Schema:
        """One vector a segment, a slab each, as answer or as gradient."""
        return Schema(tuple(map(_vector, self.slabs, self.wire_dtypes)))

    @cached_property
    def quanta(self) -> Schema:
        """Gradients as whole numbers."""
        return Schema(tuple(Part(torch.int64, (spec.width,)) for spec in self.slabs))

    @cached_property
    def learns(self) -> Numbers | None:
        """1 for slabs that get gradients and 0 for frozen ones, `[slabs, 1]`; None where all get them."""
        frozen = [spec.policy.frozen for spec in self.slabs]
        return 1 - np.array(frozen, dtype=np.int64)[:, None] if any(frozen) else None


def _vector(spec: SlabSpec, dtype: torch.dtype) -> Part:
    if dtype == torch.int8:
        return Part(torch.uint8, (narrow.row_bytes(spec.width, dtype),))
    return Part(dtype, (spec.width,))


@dataclass(frozen=True)
class Announced:
    """Ids whose counts all ranks have been told, and which are yet to be exchanged.

    Attributes:
        tensors: the ids and what belongs to them, as they travel.
        sent: how.
        mine: segments and keys that this rank asks of each, int64 `[slabs, 2, R]`.
        theirs: the same that each asks of this rank.
        call: the number of the forward call.
    """

    tensors: Sequence[torch.Tensor]
    sent: MessageLayout
    mine: Numbers
    theirs: Numbers
    call: int


def send_ids(route: Route, problem: Exception | None, call: Call, sender: Sender, comm: Comm) -> Request:
    """All-to-all of counts and flags, then all-to-all of keys.

    Raises:
        InputError: on every rank, when any rank found its batch at fault.
        DisagreementError: on every rank, when they are not making the same call.
    """
    return exchange_ids(announce_ids(route, problem, call, sender, comm), sender, comm)


def announce_ids(route: Route, problem: Exception | None, call: Call, sender: Sender, comm: Comm) -> Announced:
    """The first half of `send_ids`, which speaks of the host only, and raises what that does."""
    mine = route.counts()
    theirs = open_call(call, mine, problem, sender, comm)
    told, sent = _layout_of_ids(mine, sender)
    tensors = [slab.keys_E for slab in route.slabs]
    tensors += [cast(torch.Tensor, route.slabs[number].lengths_S) for number in told]
    for number in sender.counted:
        slab = route.slabs[number]
        tensors.append(slab.keys_E[:0] if slab.multiplicities_E is None else slab.multiplicities_E)
    return Announced(tensors, sent, mine, theirs, comm.history.forwards)


def exchange_ids(announced: Announced, sender: Sender, comm: Comm) -> Request:
    """The second half: keys arrive."""
    mine, theirs, count = announced.mine, announced.theirs, len(sender.slabs)
    told, received = _layout_of_ids(theirs, sender)
    arrived = _exchange("forward: send ids", announced.tensors, announced.sent, received, sender, comm)
    behind = count + len(told)
    lengths = dict(zip(told, arrived[count:behind], strict=True))
    rows, offsets = _widened_keys(arrived[:count]), _offsets(lengths, theirs[:, 1].sum(1))
    occur = dict(zip(sender.counted, arrived[behind:], strict=True))
    slabs = tuple(SlabRequest(rows[i], offsets.get(i), occur.get(i)) for i in range(count))
    answers, vectors = MessageLayout.of(sender.vectors, theirs[:, 0]), MessageLayout.of(sender.vectors, mine[:, 0])
    return Request(slabs, answers, vectors, announced.call)


def _layout_of_ids(counts: Numbers, sender: Sender) -> tuple[tuple[int, ...], MessageLayout]:
    """Of counts `[slabs, 2, R]`: the slabs of which lengths travel, and where all lies. Lengths travel only to ranks that get a
    segment of several keys. The counts tell which: no segment is empty.
    """
    segments, keys = counts[:, 0], counts[:, 1]
    several = segments != keys
    told = tuple(several.any(1).nonzero()[0].tolist())
    of_told, occur = list(told), keys[sender.counted]
    lengths = segments[of_told]
    items = np.concatenate([keys, lengths, occur])
    travel = np.concatenate([keys, lengths * several[of_told], occur]) if told else None
    return told, MessageLayout.of(sender.ids(told), items, travel)


def _widened_keys(keys: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """As int64, those of all slabs by one operator."""
    sizes = [part.numel() for part in keys]
    if all(part.dtype == torch.int64 for part in keys):
        return keys
    wide = torch.empty(sum(sizes), dtype=torch.int64, device=keys[0].device).split(sizes)
    torch._foreach_copy_(wide, list(keys))
    return wide


def _offsets(lengths: Mapping[int, torch.Tensor], keys: Numbers) -> dict[int, torch.Tensor]:
    """Where each segment's keys begin, int64 `[S + 1]` by slab; not of those of which each has one.

    Args:
        lengths: `[S]` by slab, of those of which they travel. keys: of each slab, `[slabs]`.
    """
    if not lengths:
        return {}
    # All slabs in one running sum: in front of each stands what takes it back to 0.
    back = to_device(-np.array([0, *keys[list(lengths)[:-1]]], dtype=np.int64), next(iter(lengths.values())).device)
    parts = [part for zero, lengths_S in zip(back.split(1), lengths.values(), strict=True) for part in (zero, lengths_S)]
    sums = torch.cat(parts).cumsum(0).split([part.numel() + 1 for part in lengths.values()])
    return dict(zip(lengths, sums, strict=True))


# Bytes that go to all ranks; where nothing leaves this one, the tensors that would have been packed.
Message = torch.Tensor | list[torch.Tensor]
Vectors = TypeVar("Vectors", bound=Source)


def pack_answers(vectors: Sequence[Source], request: Request, sender: Sender, comm: Comm) -> Message:
    """What is sent back, `[S, W]` a slab: in the wire dtype, and with rows gathered."""
    return _packed(_narrow(vectors, sender), request.answers, sender, comm)


def send_back(answers: Message, request: Request, sender: Sender, comm: Comm) -> list[torch.Tensor]:
    """All-to-all of vectors, by `pack_answers`; they arrive in the compute dtype, `[S, W]` a slab."""
    # Of ids that were sent ahead, nothing on the group "forward" said that these vectors come now: they go where sizes follow from
    # the forward call.
    of_call = request.call if request.ahead else None
    return _widened(_sent("forward: send back", answers, request.answers, request.vectors, comm, of_call), sender)


def send_grads(grads: Sequence[torch.Tensor], request: Request, sender: Sender, comm: Comm) -> list[torch.Tensor]:
    """All-to-all of gradients, `[S, W]` a slab: `send_back` with sizes mirrored. Frozen slabs get none."""
    arrived = _send_mirrored(_narrow(grads, sender), request.vectors, request.answers, request, sender, comm)
    return _widened(arrived, sender)


def send_fixed(quanta: Sequence[torch.Tensor], request: Request, sender: Sender, comm: Comm) -> list[torch.Tensor]:
    """As `send_grads`, for gradients as int64 `[S, W]`."""
    sent, received = (MessageLayout.of(sender.quanta, layout.items) for layout in (request.vectors, request.answers))
    return _send_mirrored(quanta, sent, received, request, sender, comm)


def _send_mirrored(
    grads: Sequence[torch.Tensor], sent: MessageLayout, received: MessageLayout, request: Request, sender: Sender, comm: Comm
) -> list[torch.Tensor]:
    if sender.learns is not None:  # what was made frozen is agreed on when the collection is built
        sent, received = (MessageLayout.of(layout.schema, layout.items * sender.learns) for layout in (sent, received))
        grads = [part[:0] if spec.policy.frozen else part for part, spec in zip(grads, sender.slabs, strict=True)]
    return _exchange("backward: send gradients", grads, sent, received, sender, comm, request.call)


def _exchange(
    stage: str,
    tensors: Sequence[torch.Tensor],
    sent: MessageLayout,
    received: MessageLayout,
    sender: Sender,
    comm: Comm,
    of_call: int | None = None,
) -> list[torch.Tensor]:
    """All-to-all of one message: `_packed` and `_sent`."""
    return _sent(stage, _packed(tensors, sent, sender, comm), sent, received, comm, of_call)


def _packed(sources: Sequence[Source], layout: MessageLayout, sender: Sender, comm: Comm) -> Message:
    # What overflows a float16 or bfloat16 wire becomes inf here.
    leaving = [source.to(part.dtype) for source, part in zip(sources, layout.schema.parts, strict=True)]
    if sender.local or comm.world_size == 1:  # the same tensors come back, as the wire would have rounded them
        return list(map(gathered, leaving))
    return pack(leaving, layout)


def _sent(
    stage: str, message: Message, sent: MessageLayout, received: MessageLayout, comm: Comm, of_call: int | None
) -> list[torch.Tensor]:
    """What the others sent. of_call: the forward call that its sizes follow from, where no counts message announces it."""
    if isinstance(message, list):
        return message
    sizes = sent.rank_sizes, received.rank_sizes
    if of_call is None:
        buffer = comm.all_to_all("forward", stage, message, *sizes)
    else:
        buffer = comm.all_to_all("backward", stage, message, *sizes, number=of_call)
    return unpack(buffer, received)


def open_call(call: Call, counts: Numbers, problem: Exception | None, sender: Sender, comm: Comm) -> Numbers:
    """Begin a call on the group "forward": tell each rank its counts, and get its from each.

    Args:
        counts: of each rank, two a slab at most, int64 `[slabs, 2, R]`.

    Returns:
        The same of what the ranks told this one.

    Raises:
        ShardEmbedError: on every rank, when any has a `problem`; what is no error of ours is raised as it is where it arose.
        DisagreementError: on every rank, when they are not making the same call.
    """
    number = comm.history.open_call()  # first of all: a call that ends in an error counts, on all ranks
    if comm.world_size == 1:
        if problem:
            raise problem
        return counts
    text = json.dumps(travels(problem)) if problem else ""
    header = header_of(call, sender.number, number, comm.history.checksum, len(text))
    # On the host, for a GPU too: nobody can receive keys before he knows how many, and so no device is waited for a second time.
    rows = comm.tell("forward", "forward: counts", fill(header, counts, comm.history.slots))
    compare(rows, comm.history.collections)
    # Only ranks that make the same call go on to this exchange, and then all of them do.
    if refused(rows):
        _raise_together(comm.gather_texts("forward", "forward: error texts", text), problem)
    return counts_of(rows, len(counts))


def header_of(call: Call, collection: int, number: int, history: int, error_bytes: int) -> Header:
    """What this rank puts at the head of its rows: here each field gets its value."""
    return Header(
        collection=collection,
        mode=int(call.mode),
        number=number,
        frozen=call.frozen,
        steps=call.steps,
        waiting=int(call.waiting),
        table=call.table,
        k=call.k,
        history=history,
        error_bytes=error_bytes,
    )


def _raise_together(texts: list[str], problem: Exception | None) -> None:
    told = {rank: json.loads(text) for rank, text in enumerate(texts) if text}
    least = min(precedence(name) for name, _ in told.values())
    first, *others = [rank for rank, (name, _) in told.items() if precedence(name) == least]
    also = f" (rank(s) {others} also refused their batch)" if others else ""
    # Here it may be an error of the user's own class, which cannot travel.
    if problem is not None:
        name, text = travels(problem)
        if precedence(name) == least and rebuild(name, text).__class__ is not problem.__class__:
            raise problem
    name, text = told[first]
    raise rebuild(name, f"rank {first}: {text}{also}") from problem


def _narrow(vectors: Sequence[Vectors], sender: Sender) -> list[Vectors | torch.Tensor]:
    """Encoded, where the wire has 8 bits; to other dtypes vectors are cast as they leave."""
    pairs = zip(vectors, sender.wire_dtypes, strict=True)
    return [narrow.encode(gathered(part)) if dtype == torch.int8 else part for part, dtype in pairs]


def _widened(arrived: Sequence[torch.Tensor], sender: Sender) -> list[torch.Tensor]:
    """What came, in the compute dtype."""
    return [
        narrow.decode(part, spec.compute_dtype) if dtype == torch.int8 else part.to(spec.compute_dtype)
        for part, dtype, spec in zip(arrived, sender.wire_dtypes, sender.slabs, strict=True)
    ]
