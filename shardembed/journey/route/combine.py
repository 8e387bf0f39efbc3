"""Answers to outputs: segments are pooled, column strips put side by side.

Everything here is differentiable, so its adjoint (one gradient a segment) is autograd's, for every pooling and for per-sample
weights too. All pieces of a slab that pool alike go through one `F.embedding_bag` over the received vectors,
which gives the same bits as `nn.EmbeddingBag` over the table.

Outputs are parts of larger tensors, without a copy, and a user may write into them (`x = emb(ids); x *= 8`) as into torch's own.
Autograd refuses that for views that were cut together or made in a function of ours, so outputs are cut and shaped by torch's
operators that hide what they share. That is sound here, because parts do not overlap, nobody else has the whole, and what a
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
from shardembed.journey.route.segments import Route, SlabRoute, Unique
from shardembed.kernels.grouping import stable_order

Strips = list[list[tuple[int, torch.Tensor]]]  # by feature: strips and their vectors, [bags or ids, W]


def combine(answers: Sequence[torch.Tensor], route: Route) -> list[torch.Tensor]:
    """One output a feature, `[*shape, embedding_dim]`, from the vectors of each slab, `[S, W]`."""
    strips: Strips = [[] for _ in route.features]
    for vectors_SW, slab in zip(answers, route.slabs, strict=True):
        for pieces in slab.unique:
            _pool_ids(vectors_SW, pieces, route, strips)
        if slab.bagged:
            _pool_bags(vectors_SW, slab, route, strips)
    outputs = [found[0][1] if len(found) == 1 else _side_by_side(found) for found in strips]
    for i, part in enumerate(route.ids.parts):
        if len(part.shape) != 1:
            outputs[i] = torch.ops.aten._unsafe_view.default(outputs[i], [*part.shape, outputs[i].shape[1]])
    return outputs


def _pool_ids(vectors_SW: torch.Tensor, pieces: Unique, route: Route, strips: Strips) -> None:
    """Pool pieces that are read by id."""
    ids, segments, pooling, features = route.ids, pieces.segments_N, pieces.how.pooling, pieces.how.features
    if pooling is None:
        pooled, counts = cast(torch.Tensor, _Take.apply(vectors_SW, segments)), [ids.sizes[i] for i in features]
    else:
        starts_B, counts = pieces.starts_B, [ids.bags[i] for i in features]
        weights = (
            [weight for weight in (ids.parts[i].weights for i in features) if weight is not None] if pieces.how.weighted else []
        )
        scale = _cat(weights).to(vectors_SW.dtype) if weights else None
        padding = None
        if pieces.how.padded:  # one more row stands for padding; torch's own path for it gives the same bits as nn.EmbeddingBag
            padding = vectors_SW.shape[0]
            vectors_SW = torch.cat([vectors_SW, vectors_SW.new_zeros(1, vectors_SW.shape[1])])
            segments = torch.where(segments < 0, padding, segments)
        if pooling == "max" or scale is not None or padding is not None:
            options = {"per_sample_weights": scale, "padding_idx": padding}
            pooled = F.embedding_bag(segments, vectors_SW, starts_B, mode=pooling, **options)
        else:
            pooled = cast(torch.Tensor, _Pool.apply(vectors_SW, segments, starts_B, pooling))
    for (feature, strip), vectors in zip(pieces.how.columns, torch.unsafe_split_with_sizes(pooled, counts), strict=True):
        strips[feature].append((strip, vectors))


def _weights(ids: IdBatch, features: Sequence[int]) -> torch.Tensor:
    return _cat([weights for weights in (ids.parts[i].weights for i in features) if weights is not None])


class _Take(torch.autograd.Function):
    """`F.embedding`, with the adjoint of `_Pool`."""

    @staticmethod
    def forward(ctx: Any, vectors_SW: torch.Tensor, segments_N: torch.Tensor) -> torch.Tensor:
        ctx.segments, ctx.count = segments_N, vectors_SW.shape[0]
        return vectors_SW.index_select(0, segments_N)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        order_N, starts_S = _by_segment(ctx.segments, ctx.count)
        return F.embedding_bag(order_N, grads[0].contiguous(), starts_S, mode="sum"), None


class _Pool(torch.autograd.Function):
    """`F.embedding_bag` for plain sums and means, with an adjoint that is a lookup itself: the bags of each segment, summed.
    Torch's own (2.13, on the CPU) takes three times as long.
    """

    @staticmethod
    def forward(ctx: Any, vectors_SW: torch.Tensor, segments_N: torch.Tensor, starts_B: torch.Tensor, mode: str) -> torch.Tensor:
        ctx.segments, ctx.starts, ctx.mode, ctx.count = segments_N, starts_B, mode, vectors_SW.shape[0]
        return F.embedding_bag(segments_N, vectors_SW, starts_B, mode=mode)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_BW,), segments_N = grads, ctx.segments
        lengths_B = _lengths(ctx.starts, segments_N)
        if ctx.mode == "mean":
            grad_BW = grad_BW / lengths_B.clamp(min=1).unsqueeze(1)
        order_N, starts_S = _by_segment(segments_N, ctx.count)
        bags_N = torch.repeat_interleave(lengths_B, output_size=segments_N.numel())[order_N]
        return F.embedding_bag(bags_N, grad_BW.contiguous(), starts_S, mode="sum"), None, None, None


class _SumParts(torch.autograd.Function):
    """Sums of partial sums: as `_Pool`, but each segment belongs to one bag at most, so its gradient is that bag's."""

    @staticmethod
    def forward(ctx: Any, vectors_SW: torch.Tensor, segments_N: torch.Tensor, starts_B: torch.Tensor) -> torch.Tensor:
        ctx.segments, ctx.starts, ctx.count = segments_N, starts_B, vectors_SW.shape[0]
        return F.embedding_bag(segments_N, vectors_SW, starts_B, mode="sum")

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_BW,), segments_N = grads, ctx.segments
        bags_N = torch.repeat_interleave(_lengths(ctx.starts, segments_N), output_size=segments_N.numel())
        if segments_N.numel() == ctx.count:
            bags_S = torch.empty_like(bags_N)
            bags_S[segments_N] = bags_N
            return grad_BW.index_select(0, bags_S), None, None
        grads_SW = grad_BW.new_zeros(ctx.count, grad_BW.shape[1])  # the others are read by id
        return grads_SW.index_copy_(0, segments_N, grad_BW.index_select(0, bags_N)), None, None


def _lengths(starts_B: torch.Tensor, segments_N: torch.Tensor) -> torch.Tensor:
    return torch.cat([starts_B, starts_B.new_tensor([segments_N.numel()])]).diff()


def _by_segment(segments_N: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The order that puts the entries of each segment together, `[N]`, and where each segment's begin, `[S]`."""
    counts_S = torch.bincount(segments_N, minlength=count)
    return stable_order(segments_N, count), counts_S.cumsum(0) - counts_S


def _pool_bags(vectors_SW: torch.Tensor, slab: SlabRoute, route: Route, strips: Strips) -> None:
    """Sum the owners' partial sums of each bag; a mean divides by the bag's own length."""
    sizes = [route.ids.bags[feature] for feature, _ in slab.bagged]
    sums = vectors_SW if sum(sizes) else vectors_SW[:0]
    if slab.bag_segments is not None and slab.bag_starts is not None:
        sums = cast(torch.Tensor, _SumParts.apply(vectors_SW, slab.bag_segments, slab.bag_starts))
    for (feature, number), strip in zip(slab.bagged, torch.unsafe_split_with_sizes(sums, sizes), strict=True):
        if route.features[feature].pooling == "mean":
            lengths = route.ids.parts[feature].bag_lengths().clamp(min=1)
            strip = strip / lengths.unsqueeze(1).to(strip.dtype)
        strips[feature].append((number, strip))


def _side_by_side(strips: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
    return torch.cat([vectors for _, vectors in sorted(strips, key=itemgetter(0))], dim=1)


def _cat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
