"""Deterministic mode: gradients as 64-bit fixed-point numbers, whose sums do not depend on their order.

Where autograd would add up floats, every id's contribution is first rounded to a whole number of quanta. Its quantum is the same
for all plans, packings and world sizes, because it follows from the largest contribution to the table and their number in the
whole call: the sum of all of them just fits into 63 bits. What reaches the optimizer is then the same bits everywhere. Statistics
of rows are added up column by column in one fixed tree, over whole rows.

Legend: N contributions, S segments, U distinct rows, W columns of a slab, D of a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from shardembed.comm.comm import Comm
from shardembed.errors import ConfigError
from shardembed.journey.messages import Sender, send_fixed
from shardembed.journey.route import Route, SlabRoute
from shardembed.journey.route.segments import Unique
from shardembed.kernels.gradients import Gradients
from shardembed.kernels.pooling import lengths_of
from shardembed.kernels.reference import frequencies
from shardembed.store.reductions import sum_over_ranks
from shardembed.store.request import Request, SlabRequest
from shardembed.store.slab import Slab
from shardembed.store.slab_spec import SlabSpec
from shardembed.tables.pooling import POOLINGS, Pooling
from shardembed.tables.table_config import Feature, TableConfig

BITS = 62  # of 63 below the sign: the largest contribution is below 2^exponent, not at it


@dataclass(frozen=True)
class Contributions:
    """What one table's ids add to the segments of one slab.

    Attributes:
        table: its number in the collection.
        segments_N: which segment each goes to.
        values_NW: what it adds to that, float64.
    """

    table: int
    segments_N: torch.Tensor
    values_NW: torch.Tensor


def contributions(
    route: Route, specs: Sequence[SlabSpec], grads: Sequence[torch.Tensor], vectors: Sequence[torch.Tensor], reduction_factor: float
) -> list[list[Contributions]]:
    """By slab: what each id, or each bag of a table that travels by bags, adds to its segment.

    Args:
        grads: of each feature's output, `[*shape, D]`. vectors: each slab's answers `[S, W]`, which tell what a maximum was.
        reduction_factor: multiplies every gradient.
    """
    found: list[list[Contributions]] = []
    for slab, spec, vectors_SW in zip(route.slabs, specs, vectors, strict=True):
        columns = {(lane.table, lane.strip): slice(lane.columns.start, lane.columns.stop) for lane in spec.lanes}
        parts: list[Contributions] = []
        for pieces in slab.unique:
            for (feature, strip), segments_N in zip(pieces.how.columns, _by_strip(pieces, route), strict=True):
                table = route.features[feature].table
                grad = _strip(grads[feature], columns[table, strip], reduction_factor)
                parts.append(Contributions(table, *_of_ids(segments_N, feature, route, grad, vectors_SW)))
        if slab.bagged:
            parts += _of_bags(slab, route, columns, grads, reduction_factor)
        found.append([] if spec.policy.frozen else parts)
    return found


def _by_strip(pieces: Unique, route: Route) -> list[torch.Tensor]:
    """The segment of each id, strip by strip, whether bags stand so or sample by sample."""
    how, segments_N = pieces.how, pieces.segments_N
    if POOLINGS[how.pooling].over_ids is None or how.weighted or route.columns is None:
        return list(segments_N.split([route.ids.sizes[feature] for feature in how.features]))
    lengths_B = lengths_of(pieces.starts_B, segments_N.numel())
    strips_N = _strips_of(lengths_B, len(how.columns))
    return [segments_N[strips_N == number] for number in range(len(how.columns))]


def _strips_of(lengths_B: torch.Tensor, strips: int) -> torch.Tensor:
    """The strip of each entry of bags that stand sample by sample, `[N]`."""
    numbers_B = torch.arange(lengths_B.numel(), device=lengths_B.device) % strips
    return torch.repeat_interleave(numbers_B, lengths_B)


def _strip(grad: torch.Tensor, columns: slice, reduction_factor: float) -> torch.Tensor:
    return grad.reshape(-1, grad.shape[-1])[:, columns].to(torch.float64) * reduction_factor


def _of_ids(
    segments_N: torch.Tensor, feature: int, route: Route, grad: torch.Tensor, vectors_SW: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    kind, part = POOLINGS[route.features[feature].pooling], route.ids.parts[feature]
    if kind.over_ids is None:
        return segments_N, grad
    bags_N = torch.repeat_interleave(part.bag_lengths(), output_size=part.ids.numel())
    kept = segments_N >= 0
    segments_N, bags_N = segments_N[kept], bags_N[kept]
    if kind.divisor is not None:
        grad = kind.divided(grad, torch.bincount(bags_N, minlength=grad.shape[0]))
    values_NW = grad[bags_N]
    if not kind.partial_sums:
        values_NW = values_NW * CHOSEN[kind.name](vectors_SW[segments_N], bags_N, grad.shape[0])
    elif part.weights is not None:
        values_NW = values_NW * part.weights.detach()[kept].to(torch.float64).unsqueeze(1)
    return segments_N, values_NW


def _first_maxima(vectors_NW: torch.Tensor, bags_N: torch.Tensor, bags: int) -> torch.Tensor:
    """Whether an id is the first of its bag to hold a column's maximum, as `nn.EmbeddingBag` breaks ties, bool `[N, W]`."""
    count, width = vectors_NW.shape
    where = bags_N.unsqueeze(1).expand(-1, width)
    highest = vectors_NW.new_full((bags, width), -torch.inf).scatter_reduce_(0, where, vectors_NW, "amax")
    number = torch.arange(count, device=bags_N.device).unsqueeze(1)
    candidates = torch.where(vectors_NW == highest[bags_N], number, count)
    first = torch.full((bags, width), count, device=bags_N.device).scatter_reduce_(0, where, candidates, "amin")
    return first[bags_N] == number


# Of poolings that are no sums: which id of its bag an output came from, which then has all of its gradient.
CHOSEN: Mapping[Pooling, Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]] = {"max": _first_maxima}


def check_poolings(features: Sequence[Feature]) -> None:
    """Refuse a pooling that this mode has no adjoint for.

    Raises:
        ConfigError: names feature and pooling.
    """
    for feature in features:
        kind = POOLINGS[feature.pooling]
        if kind.over_ids is not None and not kind.partial_sums and kind.name not in CHOSEN:
            raise ConfigError(f"feature {feature.name!r}: deterministic=True cannot be combined with pooling {kind.name!r}")


def _of_bags(
    slab: SlabRoute, route: Route, columns: dict[tuple[int, int], slice], grads: Sequence[torch.Tensor], reduction_factor: float
) -> list[Contributions]:
    if slab.bag_segments is None or slab.bag_starts is None:
        bags = sum(route.ids.parts[feature].bags for feature, _ in slab.bagged)
        bag_segments = torch.arange(bags, device=slab.keys_E.device)
        answers = torch.ones_like(bag_segments)
    else:
        bag_segments = slab.bag_segments
        answers = lengths_of(slab.bag_starts, bag_segments.numel())  # of each bag, by owner
    if route.columns is None:
        sizes = [route.ids.bags[feature] for feature, _ in slab.bagged]
        each = answers.split(sizes)
        segments = bag_segments.split([int(part.sum()) for part in each])
    else:
        each = answers.view(-1, len(slab.bagged)).unbind(1)
        strips_S = _strips_of(answers, len(slab.bagged))
        segments = [bag_segments[strips_S == number] for number in range(len(slab.bagged))]
    found: list[Contributions] = []
    for (number, strip), answers_B, segments_S in zip(slab.bagged, each, segments, strict=True):
        feature, part = route.features[number], route.ids.parts[number]
        grad = _strip(grads[number], columns[feature.table, strip], reduction_factor)
        values_SW = POOLINGS[feature.pooling].divided(grad, part.bag_lengths())[torch.repeat_interleave(answers_B)]
        found.append(Contributions(feature.table, segments_S, values_SW))
    return found


def exponents(
    found: list[list[Contributions]], route: Route, tables: Sequence[TableConfig], comm: Comm, device: torch.device, call: int
) -> list[float]:
    """By table: a contribution times 2^exponent is its number of quanta; nan where a gradient is not finite. Collective.

    Args:
        call: the number of the forward call.
    """
    largest = [0.0] * len(tables)
    for part in (part for slab in found for part in slab):
        if part.values_NW.numel():
            size = float(part.values_NW.abs().max())
            largest[part.table] = size if math.isnan(size) else max(largest[part.table], size)
    counts = [0] * len(tables)
    for i, feature in enumerate(route.features[: len(route.ids.parts)]):
        padding, ids = tables[feature.table].padding_idx, route.ids.parts[i].ids
        counts[feature.table] += ids.numel() if padding is None else int((ids != padding).sum())
    mine = torch.tensor([largest, counts], dtype=torch.float64, device=device).view(-1)
    sizes = [mine.numel()] * comm.world_size
    said = comm.all_to_all("backward", "backward: agree on quanta", mine.repeat(comm.world_size), sizes, sizes, call)
    all_largest, all_counts = said.view(-1, 2, len(tables)).unbind(1)
    return [_exponent(float(all_largest[:, i].max()), int(all_counts[:, i].sum())) for i in range(len(tables))]


def _exponent(largest: float, count: int) -> float:
    if not math.isfinite(largest):
        return math.nan
    return float(BITS - math.frexp(largest)[1] - max(count, 1).bit_length())


def quanta(found: list[list[Contributions]], scales: Sequence[float], vectors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Each segment's sum in quanta, int64 `[S, W]` a slab: exact, whatever the order."""
    sums = [torch.zeros(part.shape, dtype=torch.int64, device=part.device) for part in vectors]
    for total_SW, parts in zip(sums, found, strict=True):
        for part in parts:
            exponent = scales[part.table]
            if not math.isnan(exponent):
                values_NW = torch.ldexp(part.values_NW, part.values_NW.new_tensor(exponent))
                total_SW.index_add_(0, part.segments_N, values_NW.round().to(torch.int64))
    return sums


def gather(
    sums: list[torch.Tensor],
    request: Request,
    slabs: Sequence[Slab],
    scales: Sequence[float],
    sender: Sender,
    comm: Comm,
    frozen: frozenset[int],
) -> None:
    """Bring the quanta to the owners, and let those of tables that are not `frozen` wait there as gradients. Collective."""
    arrived = send_fixed(sums, request, sender, comm)
    merged = [_merge(slab, part, sums_SW, frozen) for slab, part, sums_SW in zip(slabs, request, arrived, strict=True)]
    copied = [i for i, slab in enumerate(slabs) if slab.spec.copied and not slab.spec.policy.frozen]
    mine, found = [slabs[i] for i in copied], [merged[i] for i in copied]
    summed = sum_over_ranks(mine, found, torch.int64, "backward: reduce copies", comm, sender.number)
    for i, rows in zip(copied, summed, strict=True):
        merged[i] = rows
    for slab, part, (rows_U, sums_UW) in zip(slabs, request, merged, strict=True):
        if not slab.learns(frozen):
            continue
        exponent_U = slab.of_table(rows_U, scales)
        grads_UW = torch.ldexp(sums_UW.to(torch.float64), -exponent_U.unsqueeze(1))
        rows_E = slab.bring(part.keys_E)
        if slab.spec.policy.scale_grad_by_freq and part.multiplicities_E is not None:
            count_U = torch.empty_like(rows_U)
            count_U[torch.searchsorted(rows_U, rows_E)] = frequencies(rows_E, part.multiplicities_E)
            grads_UW = grads_UW / count_U.unsqueeze(1)
        seen = rows_E, part.multiplicities_E
        slab.accumulate(Gradients(rows_U, None, grads_UW.to(slab.spec.compute_dtype)), frozen=frozen, seen=seen)


def _merge(slab: Slab, part: SlabRequest, sums_SW: torch.Tensor, frozen: frozenset[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct rows `[U]`, ascending, and their quanta `[U, W]`; nothing of a dynamic table that does not learn."""
    if slab.dynamic is not None and not slab.learns(frozen):
        return part.keys_E[:0], sums_SW[:0]
    rows_U, inverse = torch.unique(slab.bring(part.keys_E), return_inverse=True)
    sums_UW = torch.zeros(rows_U.numel(), slab.spec.width, dtype=torch.int64, device=rows_U.device)
    if slab.spec.policy.frozen:
        return rows_U, sums_UW
    if part.offsets is not None:
        sums_SW = sums_SW[torch.repeat_interleave(part.offsets.diff(), output_size=inverse.numel())]
    return rows_U, sums_UW.index_add_(0, inverse, sums_SW)
