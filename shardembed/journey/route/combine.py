"""Answers to outputs: segments are pooled, column strips put side by side.

Everything here is differentiable, so its adjoint (one gradient a segment) is autograd's, for every pooling and for per-sample
weights too. All pieces of a slab that pool alike go through one `F.embedding_bag` over the received vectors,
which gives the same bits as `nn.EmbeddingBag` over the table. Outputs of features that pool lie in one tensor (`columns.Columns`),
if they have as many rows; of others each feature has its own.

A user may write into outputs (`x = emb(ids); x *= 8`) as into torch's own, though they share memory. Autograd refuses that for
views that were cut together or made in a function of ours, so outputs are cut and shaped by torch's operators that hide what they
share. That is sound here, because parts do not overlap, `side_by_side.Guard` watches who uses the whole as well, and what a
backward saves of the vectors is never a part that goes out: bags read from partial sums, which may go out as they came, have
other segments than what is read by id.

Legend: S segments, W columns of the slab, B bags.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any, cast

import torch
import torch.nn.functional as F

from shardembed.inputs.ids import IdBatch
from shardembed.journey.route.columns import Strip
from shardembed.journey.route.distinct import cat
from shardembed.journey.route.ownership import IdGroup
from shardembed.journey.route.segments import Route, SlabRoute, Unique
from shardembed.journey.route.side_by_side import Outputs, side_by_side
from shardembed.kernels.pooling import BagsOf, lengths_of, spread
from shardembed.tables.pooling import POOLINGS, PoolingKind

Strips = list[list[tuple[int, torch.Tensor]]]  # by feature: strips and their vectors, [bags or ids, W]


def combine(answers: Sequence[torch.Tensor], route: Route) -> Outputs:
    """The outputs, from the vectors of each slab, `[S, W]`."""
    columns, strips = route.columns, [[] for _ in route.features]
    pieces: list[torch.Tensor] = []
    for vectors_SW, slab in zip(answers, route.slabs, strict=True):
        for part in slab.unique:
            pooled = _pool_ids(vectors_SW, part, route.ids)
            if columns is not None and part.how.pooling is not None:
                pieces.append(_by_sample(pooled, part.how, route.samples).to(columns.dtype))
            else:
                counts = route.ids.sizes if part.how.pooling is None else route.ids.bags
                _split(pooled, part.how.columns, counts, strips)
        if slab.bagged:
            pooled = _pool_bags(vectors_SW, slab, route)
            if columns is not None:
                pieces.append(pooled.to(columns.dtype))
            else:
                _split(pooled, slab.bagged, route.ids.bags, strips)
    whole = None
    if columns is not None:
        whole, *parts = side_by_side(pieces, columns, route.samples)
        for feature, part in zip(columns.features, parts, strict=True):
            strips[feature].append((0, part))
    outputs = [found[0][1] if len(found) == 1 else _joined(found) for found in strips]
    for i, shape in enumerate(route.ids.shapes):
        if len(shape) != 1:
            outputs[i] = torch.ops.aten._unsafe_view.default(outputs[i], [*shape, outputs[i].shape[1]])
    return Outputs(outputs, whole)


def _split(pooled: torch.Tensor, columns: Sequence[Strip], counts: Sequence[int], strips: Strips) -> None:
    """What lies feature by feature, so many rows each."""
    parts = torch.unsafe_split_with_sizes(pooled, [counts[feature] for feature, _ in columns])
    for (feature, strip), vectors in zip(columns, parts, strict=True):
        strips[feature].append((strip, vectors))


def _pool_ids(vectors_SW: torch.Tensor, pieces: Unique, ids: IdBatch) -> torch.Tensor:
    """Pool pieces that are read by id: a row an id where they are not pooled, else a row a bag."""
    segments, kind = pieces.segments_N, POOLINGS[pieces.how.pooling]
    if kind.over_ids is None:
        return cast(torch.Tensor, _Take.apply(vectors_SW, segments, pieces.bags_of))
    starts_B = pieces.starts_B
    scale = _weights(ids, pieces.how.features).to(vectors_SW.dtype) if pieces.how.weighted else None
    padding = None
    if pieces.how.padded:  # one more row stands for padding; torch's own path for it gives the same bits as nn.EmbeddingBag
        padding = vectors_SW.shape[0]
        vectors_SW = torch.cat([vectors_SW, vectors_SW.new_zeros(1, vectors_SW.shape[1])])
        segments = torch.where(segments < 0, padding, segments)
    if kind.partial_sums and scale is None and padding is None:
        return cast(torch.Tensor, _Pool.apply(vectors_SW, segments, starts_B, kind, False, pieces.bags_of))
    options = {"per_sample_weights": scale, "padding_idx": padding}
    pooled = F.embedding_bag(segments, vectors_SW, starts_B, mode=kind.over_ids, **options)
    if not kind.divides_ids:
        return pooled
    lengths_B = lengths_of(starts_B, segments.numel())
    return kind.divided(pooled, lengths_B if padding is None else _without(segments, padding, lengths_B))


def _weights(ids: IdBatch, features: Sequence[int]) -> torch.Tensor:
    return cat([weights for weights in (ids.parts[i].weights for i in features) if weights is not None], ids.ids)


class _Take(torch.autograd.Function):
    """`F.embedding`, with the adjoint of `_Pool`."""

    @staticmethod
    def forward(ctx: Any, vectors_SW: torch.Tensor, segments_N: torch.Tensor, bags_of: BagsOf | None) -> torch.Tensor:
        ctx.segments, ctx.count, ctx.bags_of = segments_N, vectors_SW.shape[0], bags_of
        return vectors_SW.index_select(0, segments_N)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        each_N = ctx.segments if ctx.bags_of else torch.arange(ctx.segments.numel(), device=ctx.segments.device)
        return spread(ctx.segments, each_N, grads[0], ctx.count, bags_of=ctx.bags_of), None, None


class _Pool(torch.autograd.Function):
    """`F.embedding_bag` for plain sums over a divisor, with a faster adjoint (`kernels.pooling`). once: no segment is in two
    bags.
    """

    @staticmethod
    def forward(
        ctx: Any,
        vectors_SW: torch.Tensor,
        segments_N: torch.Tensor,
        starts_B: torch.Tensor,
        kind: PoolingKind,
        once: bool,
        bags_of: BagsOf | None,
    ) -> torch.Tensor:
        ctx.bags_of = bags_of
        ctx.segments, ctx.starts, ctx.kind, ctx.once, ctx.count = segments_N, starts_B, kind, once, vectors_SW.shape[0]
        pooled_BW = F.embedding_bag(segments_N, vectors_SW, starts_B, mode=cast(str, kind.over_ids))
        return kind.divided(pooled_BW, lengths_of(starts_B, segments_N.numel())) if kind.divides_ids else pooled_BW

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_BW = grads[0]
        if ctx.kind.divisor is not None:
            grad_BW = ctx.kind.divided(grad_BW, lengths_of(ctx.starts, ctx.segments.numel()))
        return spread(ctx.segments, ctx.starts, grad_BW, ctx.count, ctx.once, ctx.bags_of), None, None, None, None, None


def _without(segments_N: torch.Tensor, padding: int, lengths_B: torch.Tensor) -> torch.Tensor:
    """The lengths of the bags if what reads answer `padding` were left out, int64 `[B]`."""
    bags_N = torch.repeat_interleave(lengths_B, output_size=segments_N.numel())
    return torch.zeros_like(lengths_B).index_add_(0, bags_N, (segments_N != padding).to(lengths_B.dtype))


def _pool_bags(vectors_SW: torch.Tensor, slab: SlabRoute, route: Route) -> torch.Tensor:
    """Sum the owners' partial sums of each bag, and divide by what follows from its length."""
    sums = vectors_SW if sum(route.ids.bags[feature] for feature, _ in slab.bagged) else vectors_SW[:0]
    if slab.bag_segments is not None and slab.bag_starts is not None:
        sums = cast(torch.Tensor, _Pool.apply(vectors_SW, slab.bag_segments, slab.bag_starts, POOLINGS["sum"], True, slab.bags_of))
    kinds = [(POOLINGS[route.features[feature].pooling], route.ids.parts[feature]) for feature, _ in slab.bagged]
    if all(kind.divisor is None for kind, _ in kinds):
        return sums
    divisors = [
        torch.ones(part.bags, dtype=sums.dtype, device=sums.device)  # which changes no bit
        if kind.divisor is None
        else kind.divisor(part.bag_lengths()).to(sums.dtype)
        for kind, part in kinds
    ]
    divisor_B = torch.cat(divisors) if route.columns is None else torch.stack(divisors, 1).view(-1)
    return sums / divisor_B.unsqueeze(1)


def _by_sample(pooled: torch.Tensor, how: IdGroup, samples: int) -> torch.Tensor:
    """The rows sample by sample, as those without weights come from the start."""
    if not how.weighted:
        return pooled
    return pooled.view(len(how.columns), samples, pooled.shape[1]).transpose(0, 1).reshape(pooled.shape)


def _joined(strips: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
    return torch.cat([vectors for _, vectors in sorted(strips, key=itemgetter(0))], dim=1)
