"""Steps 3, 5 and 8 of the journey: what travels, packed for all slabs together.

Whatever travels on the group "forward" opens with the counts message (`wire.header`): which call this is, the bytes of error text
that follow, then, a slab: segments, keys. It is all that ranks need to know of each other; a row is as long as the largest
collection on the group needs, so that ranks which make different calls notice instead of tripping over each other's sizes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from shardembed.comm.comm import Comm
from shardembed.errors import precedence, rebuild, travels
from shardembed.journey.route import Route
from shardembed.store.request import Request, SlabRequest
from shardembed.store.slab_spec import SlabSpec
from shardembed.wire import narrow
from shardembed.wire.header import COUNTS_OF_SLAB, Header, Mode, compare, counts_of, numbers, refused
from shardembed.wire.layout import Part, message_bytes, pack, unpack


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


def send_ids(route: Route, problem: Exception | None, call: Call, sender: Sender, comm: Comm, device: torch.device) -> Request:
    """All-to-all of counts and flags, then all-to-all of keys.

    Raises:
        InputError: on every rank, when any rank found its batch at fault.
        DisagreementError: on every rank, when they are not making the same call.
    """
    mine = [[slab.segments, slab.keys] for slab in route.slabs]
    rows = [[counts[rank] for slab in mine for counts in slab] for rank in range(comm.world_size)]
    table = open_call(call, rows, problem, sender, comm, device)
    theirs = [
        ([row[i] for row in table], [row[i + 1] for row in table])
        for i in range(0, COUNTS_OF_SLAB * len(sender.slabs), COUNTS_OF_SLAB)
    ]
    sent, received = _key_parts([(slab.segments, slab.keys) for slab in route.slabs], theirs, sender)
    tensors: list[torch.Tensor] = []
    for slab, spec in zip(route.slabs, sender.slabs, strict=True):
        tensors += [slab.keys_E, _lengths_to_send(slab.lengths_S, slab.segments, slab.keys)]
        if spec.policy.scale_grad_by_freq:
            tensors.append(slab.keys_E[:0] if slab.multiplicities_E is None else slab.multiplicities_E)
    arrived = iter(_exchange("forward: send ids", tensors, sent, received, sender, comm))
    slabs = tuple(
        SlabRequest(
            next(arrived),
            _offsets(next(arrived), segments, keys),
            next(arrived) if spec.policy.scale_grad_by_freq else None,
            segments,
            slab.segments,
        )
        for slab, spec, (segments, keys) in zip(route.slabs, sender.slabs, theirs, strict=True)
    )
    return Request(slabs, comm.forwards)


def send_back(answers: Sequence[torch.Tensor], request: Request, sender: Sender, comm: Comm) -> list[torch.Tensor]:
    """All-to-all of vectors, `[S, W]` a slab, in the wire dtype; they arrive in the compute dtype."""
    sent = _vector_parts([slab.asked for slab in request], sender)
    received = _vector_parts([slab.sent for slab in request], sender)
    # Nothing on the group "forward" said that these vectors come: they go where sizes follow from the forward call.
    lane = request.call if request.ahead else None
    arrived = _exchange("forward: send back", _narrow(answers, sender), sent, received, sender, comm, lane)
    return _widened(arrived, sender)


def send_grads(grads: Sequence[torch.Tensor], request: Request, sender: Sender, comm: Comm) -> list[torch.Tensor]:
    """All-to-all of gradients, `[S, W]` a slab: `send_back` with sizes mirrored. Frozen slabs get none."""
    return _widened(_send_mirrored(_narrow(grads, sender), request, sender, comm), sender)


def send_fixed(quanta: Sequence[torch.Tensor], request: Request, sender: Sender, comm: Comm) -> list[torch.Tensor]:
    """As `send_grads`, for gradients as int64 `[S, W]`."""
    whole = replace(sender, wire_dtypes=(torch.int64,) * len(sender.slabs))
    return _send_mirrored(quanta, request, whole, comm)


def _send_mirrored(grads: Sequence[torch.Tensor], request: Request, sender: Sender, comm: Comm) -> list[torch.Tensor]:
    nothing = [0] * comm.world_size
    frozen = [spec.policy.frozen for spec in sender.slabs]
    sent = _vector_parts([nothing if still else slab.sent for slab, still in zip(request, frozen, strict=True)], sender)
    received = _vector_parts([nothing if still else slab.asked for slab, still in zip(request, frozen, strict=True)], sender)
    grads = [part[:0] if still else part for part, still in zip(grads, frozen, strict=True)]
    return _exchange("backward: send gradients", grads, sent, received, sender, comm, request.call)


def _exchange(
    stage: str,
    tensors: Sequence[torch.Tensor],
    sent: list[Part],
    received: list[Part],
    sender: Sender,
    comm: Comm,
    lane_of: int | None = None,
) -> list[torch.Tensor]:
    if sender.local or comm.world_size == 1:  # the same tensors come back, as the wire would have rounded them
        return [tensor.to(part.dtype) for tensor, part in zip(tensors, sent, strict=True)]
    buffer = pack(tensors, sent, comm.world_size)
    sizes = message_bytes(sent, comm.world_size), message_bytes(received, comm.world_size)
    if lane_of is None:
        buffer = comm.all_to_all("forward", stage, buffer, *sizes)
    else:
        buffer = comm.all_to_all("backward", stage, buffer, *sizes, number=lane_of)
    return unpack(buffer, received, comm.world_size)


def open_call(
    call: Call, counts: list[list[int]], problem: Exception | None, sender: Sender, comm: Comm, device: torch.device
) -> list[list[int]]:
    """Begin a conversation on the group "forward": tell each rank its row of counts, and get one from each.

    Raises:
        ShardEmbedError: on every rank, when any has a `problem`; what is no error of ours is raised as it is where it arose.
        DisagreementError: on every rank, when they are not making the same call.
    """
    comm.forwards += 1
    if comm.world_size == 1:
        if problem:
            raise problem
        return counts
    text = json.dumps(travels(problem)) if problem else ""
    width = numbers(comm.slots)
    header = header_of(call, sender.number, comm, len(text))
    mine = [[*header, *row, *[0] * (width - len(header) - len(row))] for row in counts]
    equal = [width] * comm.world_size
    sent = torch.tensor(mine, dtype=torch.int64, device=device).view(-1)
    rows = comm.all_to_all("forward", "forward: counts", sent, equal, equal).view(comm.world_size, width).tolist()
    compare(rows, comm.collections)
    if refused(rows):
        _raise_together(comm.gather_texts("forward", "forward: error texts", text, device), problem)
    return [counts_of(row) for row in rows]


def header_of(call: Call, collection: int, comm: Comm, error_bytes: int) -> Header:
    """What this rank puts at the head of its rows: here each field gets its value."""
    return Header(
        collection=collection,
        mode=int(call.mode),
        number=comm.forwards,
        frozen=call.frozen,
        steps=call.steps,
        waiting=int(call.waiting),
        table=call.table,
        k=call.k,
        history=comm.history,
        error_bytes=error_bytes,
    )


def _raise_together(texts: list[str], problem: Exception | None) -> None:
    told = {rank: json.loads(text) for rank, text in enumerate(texts) if text}
    least = min(precedence(name) for name, _ in told.values())
    first, *others = [rank for rank, (name, _) in told.items() if precedence(name) == least]
    also = f" (rank(s) {others} also refused their batch)" if others else ""
    if problem is not None:
        name, text = travels(problem)
        if precedence(name) == least and rebuild(name, text).__class__ is not problem.__class__:
            raise problem
    name, text = told[first]
    raise rebuild(name, f"rank {first}: {text}{also}") from problem


def _key_parts(
    mine: Sequence[tuple[list[int], list[int]]], theirs: Sequence[tuple[list[int], list[int]]], sender: Sender
) -> tuple[list[Part], list[Part]]:
    def parts(counts: Sequence[tuple[list[int], list[int]]]) -> list[Part]:
        found: list[Part] = []
        for (segments, keys), spec in zip(counts, sender.slabs, strict=True):
            found += [Part(keys, spec.key_dtype), Part(_lengths_counts(segments, keys), torch.int32)]
            if spec.policy.scale_grad_by_freq:
                found.append(Part(keys, torch.int32))
        return found

    return parts(mine), parts(theirs)


def _lengths_counts(segments: list[int], keys: list[int]) -> list[int]:
    """Lengths travel only to ranks that get a segment of several keys; no segment is empty, so the counts tell."""
    return [s if s != k else 0 for s, k in zip(segments, keys, strict=True)]


def _lengths_to_send(lengths_S: torch.Tensor | None, segments: list[int], keys: list[int]) -> torch.Tensor:
    if lengths_S is None:
        return torch.empty(0, dtype=torch.int32)
    counts = _lengths_counts(segments, keys)
    if counts == segments:
        return lengths_S
    return torch.cat([part for part, count in zip(lengths_S.split(segments), counts, strict=True) if count] or [lengths_S[:0]])


def _offsets(lengths: torch.Tensor, segments: list[int], keys: list[int]) -> torch.Tensor | None:
    counts = _lengths_counts(segments, keys)
    if not any(counts):
        return None
    if counts != segments:
        told = iter(lengths.split([count for count in counts if count]))
        ones = (lengths.new_ones(size) if not count else next(told) for size, count in zip(segments, counts, strict=True))
        lengths = torch.cat(list(ones))
    offsets = torch.zeros(lengths.numel() + 1, dtype=torch.int64, device=lengths.device)
    torch.cumsum(lengths, 0, out=offsets[1:])
    return offsets


def _vector_parts(counts: Sequence[list[int]], sender: Sender) -> list[Part]:
    return [
        _vector_part(count, dtype, spec.width) for count, dtype, spec in zip(counts, sender.wire_dtypes, sender.slabs, strict=True)
    ]


def _vector_part(count: list[int], dtype: torch.dtype, width: int) -> Part:
    return Part(count, torch.uint8, (narrow.row_bytes(width, dtype),)) if dtype == torch.int8 else Part(count, dtype, (width,))


def _narrow(vectors: Sequence[torch.Tensor], sender: Sender) -> list[torch.Tensor]:
    """Encoded, where the wire has 8 bits; messages cast to other dtypes themselves."""
    pairs = zip(vectors, sender.wire_dtypes, strict=True)
    return [narrow.encode(part) if dtype == torch.int8 else part for part, dtype in pairs]


def _widened(arrived: Sequence[torch.Tensor], sender: Sender) -> list[torch.Tensor]:
    """What came, in the compute dtype."""
    return [
        narrow.decode(part, spec.compute_dtype) if dtype == torch.int8 else part.to(spec.compute_dtype)
        for part, dtype, spec in zip(arrived, sender.wire_dtypes, sender.slabs, strict=True)
    ]
