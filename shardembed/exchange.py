"""Steps 3, 5 and 8 of the journey: what travels, packed for all slabs together.

The counts message is one row of int64 to each rank: | forward call | mode | collection | backwards | bytes of error text |
then, a slab: segments, keys |. It is all that ranks need to know of each other; a row is as long as the largest collection on
the group needs, so that ranks which call different collections notice instead of tripping over each other's sizes. "Backwards"
is a digest of the backwards since the forward before: ranks whose losses use different lookups run different ones, and take each
other's gradients for their own where the sizes happen to agree.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shardembed.comm import Comm
from shardembed.errors import DisagreementError, InputError, rebuild
from shardembed.route import Route
from shardembed.slabs import SlabSpec
from shardembed.wire import Part, message_bytes, pack, unpack

HEADER = 5
MODES = ("evaluation (no_grad)", "training")


@dataclass(frozen=True)
class SlabRequest:
    """What a rank is asked of one slab by all ranks, in rank order.

    keys_E: rows asked for. offsets: where each segment's keys begin, `[S + 1]`, or None when each has one key.
    multiplicities_E: how often each key's id occurs in the asking rank's batch; None where the slab does not scale by frequency.
    asked: segments by the rank that asks. sent: segments that this rank asked of each rank. call: number of the forward call.
    """

    keys_E: torch.Tensor
    offsets: torch.Tensor | None
    multiplicities_E: torch.Tensor | None
    asked: list[int]
    sent: list[int]
    call: int


Request = tuple[SlabRequest, ...]


@dataclass(frozen=True)
class Caller:
    """Who makes a call: the collection's number on its group, and its slabs."""

    number: int
    slabs: tuple[SlabSpec, ...]
    wire_dtypes: tuple[torch.dtype, ...]
    local: bool  # nothing is cut: only the flags have to travel


def send_ids(route: Route, problem: InputError | None, caller: Caller, comm: Comm, device: torch.device) -> Request:
    """All-to-all of counts and flags, then all-to-all of keys.

    Raises:
        InputError: on every rank, when any rank found its batch at fault.
        DisagreementError: on every rank, when they are not making the same call.
    """
    theirs = _exchange_counts(route, problem, caller, comm, device)
    sent, received = _key_parts([(slab.segments, slab.keys) for slab in route.slabs], theirs, caller)
    tensors: list[torch.Tensor] = []
    for slab, spec in zip(route.slabs, caller.slabs, strict=True):
        tensors += [slab.keys_E, _lengths_to_send(slab.lengths_S, slab.segments, slab.keys)]
        if spec.policy.scale_grad_by_freq:
            tensors.append(slab.keys_E[:0] if slab.multiplicities_E is None else slab.multiplicities_E)
    arrived = iter(_exchange("send ids", tensors, sent, received, caller, comm))
    return tuple(
        SlabRequest(
            next(arrived),
            _offsets(next(arrived), segments, keys),
            next(arrived) if spec.policy.scale_grad_by_freq else None,
            segments,
            slab.segments,
            comm.forwards,
        )
        for slab, spec, (segments, keys) in zip(route.slabs, caller.slabs, theirs, strict=True)
    )


def send_back(answers: Sequence[torch.Tensor], request: Request, caller: Caller, comm: Comm) -> list[torch.Tensor]:
    """All-to-all of vectors, `[S, W]` a slab, in the wire dtype; they arrive in the compute dtype."""
    sent = _vector_parts([slab.asked for slab in request], caller)
    received = _vector_parts([slab.sent for slab in request], caller)
    arrived = _exchange("send back", answers, sent, received, caller, comm)
    return [vectors.to(spec.compute_dtype) for vectors, spec in zip(arrived, caller.slabs, strict=True)]


def send_grads(grads: Sequence[torch.Tensor], request: Request, caller: Caller, comm: Comm) -> list[torch.Tensor]:
    """All-to-all of gradients, `[S, W]` a slab: `send_back` with sizes mirrored. Frozen slabs get none."""
    if not caller.local:
        comm.backwards = (comm.backwards * 1_000_003 + request[0].call) % 2**61
    nothing = [0] * comm.world_size
    frozen = [spec.policy.frozen for spec in caller.slabs]
    sent = _vector_parts([nothing if still else slab.sent for slab, still in zip(request, frozen, strict=True)], caller)
    received = _vector_parts([nothing if still else slab.asked for slab, still in zip(request, frozen, strict=True)], caller)
    grads = [part[:0] if still else part for part, still in zip(grads, frozen, strict=True)]
    arrived = _exchange("send gradients", grads, sent, received, caller, comm)
    return [vectors.to(spec.compute_dtype) for vectors, spec in zip(arrived, caller.slabs, strict=True)]


def _exchange(
    stage: str, tensors: Sequence[torch.Tensor], sent: list[Part], received: list[Part], caller: Caller, comm: Comm
) -> list[torch.Tensor]:
    buffer = pack(tensors, sent, comm.world_size)
    if not caller.local:
        sizes = message_bytes(sent, comm.world_size), message_bytes(received, comm.world_size)
        group = "backward" if stage == "send gradients" else "forward"
        buffer = comm.all_to_all(group, stage, buffer, *sizes)
    return unpack(buffer, received, comm.world_size)


def _exchange_counts(
    route: Route, problem: InputError | None, caller: Caller, comm: Comm, device: torch.device
) -> list[tuple[list[int], list[int]]]:
    """Swap counts with all ranks: for each slab, (segments, keys) that each rank asks of this one."""
    text = json.dumps([type(problem).__name__, str(problem)]) if problem else ""
    comm.forwards += 1
    if comm.world_size == 1:
        if problem:
            raise problem
        return [(slab.segments, slab.keys) for slab in route.slabs]
    width = HEADER + 2 * comm.slots
    mine = [comm.forwards, int(torch.is_grad_enabled()), caller.number, comm.backwards, len(text)]
    comm.backwards = 0
    rows = [
        (mine + [slab_counts for slab in route.slabs for slab_counts in (slab.segments[rank], slab.keys[rank])])
        for rank in range(comm.world_size)
    ]
    padded = [row + [0] * (width - len(row)) for row in rows]
    equal = [width] * comm.world_size
    sent = torch.tensor(padded, dtype=torch.int64, device=device).view(-1)
    table = comm.all_to_all("forward", "counts", sent, equal, equal).view(comm.world_size, width).tolist()
    _check_headers(table)
    if any(row[4] for row in table):
        _raise_together(comm.gather_texts("forward", "error texts", text, device))
    first = range(HEADER, HEADER + 2 * len(caller.slabs), 2)
    return [([row[i] for row in table], [row[i + 1] for row in table]) for i in first]


def _check_headers(table: list[list[int]]) -> None:
    calls = [tuple(row[:3]) for row in table]
    if len(set(calls)) == 1:
        if len({row[3] for row in table}) > 1:
            raise DisagreementError(
                "ranks have run the backwards of different lookups since the forward call before this one: their losses do not use "
                "the same outputs, so gradients may have gone to the wrong rows. Let every loss use all of them (add "
                "0 * output.sum() where one does not matter), or look them up together (a collection, or shard(..., inputs=...))"
            )
        return
    said = [
        f"rank {rank} makes forward call {call} of collection {collection} in {MODES[mode]} mode"
        for rank, (call, mode, collection) in enumerate(calls)
    ]
    raise DisagreementError(
        f"ranks are not making the same call: {'; '.join(said)}. A forward is collective: every rank must make it, in the "
        "same mode and order (rank 0 cannot evaluate alone)"
    )


def _raise_together(texts: list[str]) -> None:
    troubled = [rank for rank, text in enumerate(texts) if text]
    name, text = json.loads(texts[troubled[0]])
    also = f" (rank(s) {troubled[1:]} also refused their batch)" if troubled[1:] else ""
    raise rebuild(name, f"rank {troubled[0]}: {text}{also}")


def _key_parts(
    mine: Sequence[tuple[list[int], list[int]]], theirs: Sequence[tuple[list[int], list[int]]], caller: Caller
) -> tuple[list[Part], list[Part]]:
    def parts(counts: Sequence[tuple[list[int], list[int]]]) -> list[Part]:
        found: list[Part] = []
        for (segments, keys), spec in zip(counts, caller.slabs, strict=True):
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


def _vector_parts(counts: Sequence[list[int]], caller: Caller) -> list[Part]:
    return [Part(count, dtype, (spec.width,)) for count, dtype, spec in zip(counts, caller.wire_dtypes, caller.slabs, strict=True)]
