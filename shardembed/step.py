"""Step 10's two exchanges, each made only where a plan needs it: copies share gradients, cut rows share their statistic.

Legend: U distinct rows, W width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from shardembed.comm import Comm
from shardembed.slab import Slab
from shardembed.slabs import Block, SlabSpec


def reduce_copies(slabs: Sequence[Slab], comm: Comm) -> None:
    """Give every copy the gradients of all ranks: one all-reduce of sums and touch counts, for all copied slabs together.

    All ranks get the same bits and then make the same update, so copies stay bit-identical.
    """
    copied = [slab for slab in slabs if slab.spec.copied]
    if not copied:
        return
    dtype = torch.float64 if any(slab.spec.compute_dtype == torch.float64 for slab in copied) else torch.float32
    sizes = [slab.weights.shape[0] * (slab.spec.width + 1) for slab in copied]
    buffer = torch.zeros(sum(sizes), dtype=dtype, device=copied[0].weights.device)
    dense = [part.view(-1, slab.spec.width + 1) for slab, part in zip(copied, buffer.split(sizes), strict=True)]
    for slab, sums in zip(copied, dense, strict=True):
        rows_U, grads_UW = slab.merged()
        sums[rows_U, :-1] = grads_UW.to(dtype)
        sums[rows_U, -1] = 1
    comm.all_reduce("reduce copies", buffer)
    for slab, sums in zip(copied, dense, strict=True):
        touched_U = sums[:, -1].nonzero().squeeze(1)  # host sync on a GPU
        slab.replace(touched_U, sums[touched_U, :-1].to(slab.spec.compute_dtype))


def mean_squares(slabs: Sequence[Slab], comm: Comm) -> dict[int, torch.Tensor]:
    """The mean of g^2 over whole rows, `[U]` by slab index, for slabs that hold rows whose columns lie on several ranks.

    All strips of such a table are cut alike and get the same ids, so the shards of a row block ("twins") have merged the same
    rows in the same order: they swap one partial sum a row, and nobody has to say how many. One all-to-all for all tables.
    Every twin adds the partial sums in strip order, so that they all get the same bits.
    """
    split = {slab.spec.index: slab for slab in slabs if slab.spec.split_rows}
    if not split:
        return {}
    twins = _twins([slab.spec for slab in split.values()])
    partial = {index: slab.merged()[1].square().sum(1, dtype=torch.float64) for index, slab in split.items()}
    spans = {key: [_span(split[index], block) for index, block in members] for key, members in twins.items()}
    arrived = _swap(twins, partial, spans, comm, next(iter(split.values())).weights.device)
    result = {index: torch.empty_like(sums) for index, sums in partial.items()}
    for key, members in twins.items():
        if not any(_owner(block) == comm.rank for _, block in members):
            continue
        total = torch.stack([arrived[key, number] for number in range(len(members))]).sum(0)
        columns = sum(len(block.shard.columns) for _, block in members)
        for (index, block), span in zip(members, spans[key], strict=True):
            if _owner(block) == comm.rank:
                result[index][span] = total / columns
    return {index: square.to(split[index].spec.compute_dtype) for index, square in result.items()}


Member = tuple[int, Block]  # slab index, block
Twins = dict[tuple[int, int], list[Member]]  # by table and row block: its blocks in strip order


def _twins(specs: Sequence[SlabSpec]) -> Twins:
    found: dict[tuple[int, int], dict[int, Member]] = defaultdict(dict)
    for spec in specs:
        for lane in spec.lanes:
            for number, block in enumerate(lane.blocks):
                found[lane.table, number][lane.strip] = (spec.index, block)
    return {key: [members[strip] for strip in sorted(members)] for key, members in sorted(found.items())}


def _owner(block: Block) -> int:
    return block.shard.ranks[0]


def _span(slab: Slab, block: Block) -> slice:
    """Which of the slab's merged rows lie in `block`; nothing where this rank does not hold it."""
    if _owner(block) != slab.rank:
        return slice(0, 0)
    edges = torch.tensor([block.first_key, block.first_key + len(block.shard.rows)], device=slab.weights.device)
    first, last = torch.searchsorted(slab.merged()[0], edges).tolist()
    return slice(first, last)


def _swap(
    twins: Twins, partial: dict[int, torch.Tensor], spans: dict[tuple[int, int], list[slice]], comm: Comm, device: torch.device
) -> dict[tuple[tuple[int, int], int], torch.Tensor]:
    """The partial sums of every twin of a block this rank holds, by (table and block, strip)."""
    here = comm.rank
    known: dict[tuple[tuple[int, int], int], torch.Tensor] = {}
    outgoing: list[list[torch.Tensor]] = [[] for _ in range(comm.world_size)]
    expected: list[list[tuple[tuple[int, int], int, int]]] = [[] for _ in range(comm.world_size)]
    for key, members in twins.items():
        owners = [_owner(block) for _, block in members]
        if here not in owners:
            continue
        rows = max(span.stop - span.start for span in spans[key])
        for number, ((index, _), owner, span) in enumerate(zip(members, owners, spans[key], strict=True)):
            if owner != here:
                expected[owner].append((key, number, rows))
                continue
            known[key, number] = partial[index][span]
            for other in set(owners) - {here}:
                outgoing[other].append(known[key, number])
    flat = [sums for to_rank in outgoing for sums in to_rank]
    send = torch.cat(flat) if flat else torch.empty(0, dtype=torch.float64, device=device)
    send_sizes = [sum(sums.numel() for sums in to_rank) for to_rank in outgoing]
    receive_sizes = [sum(rows for *_, rows in from_rank) for from_rank in expected]
    received = comm.all_to_all("step", "share row squares", send, send_sizes, receive_sizes)
    if comm.world_size > 1:
        in_order = [entry for from_rank in expected for entry in from_rank]
        for (key, number, _), sums in zip(in_order, received.split([rows for *_, rows in in_order]), strict=True):
            known[key, number] = sums
    return known
