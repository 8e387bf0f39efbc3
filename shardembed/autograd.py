"""Where autograd leaves this rank and comes back: lookups as functions of a graph that has no weights in it.

Both take an anchor, an empty tensor that requires grad so that autograd comes back at all, and what to call on the way there
(`answer`) and back (`learn`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from shardembed.route import Route, combine

Answer = Callable[[], list[torch.Tensor]]


class Vectors(torch.autograd.Function):
    """Steps 4 and 5 forward, 8 and 9 backward: the vectors of each slab, `[S, W]`; `frozen` ones require no grad."""

    @staticmethod
    def forward(
        ctx: Any, anchor: torch.Tensor, answer: Answer, learn: Callable[[Sequence[torch.Tensor]], None], frozen: Sequence[bool]
    ) -> tuple[torch.Tensor, ...]:
        ctx.learn = learn
        answers = tuple(answer())
        ctx.mark_non_differentiable(*(vectors for vectors, still in zip(answers, frozen, strict=True) if still))
        return answers

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, ...]:
        with torch.no_grad():
            ctx.learn(grads)
        return None, None, None, None


class FixedOutputs(torch.autograd.Function):
    """Steps 4 to 6 forward, 7 to 9 backward in deterministic mode: autograd itself must not add up gradients.

    One output a feature, `[*shape, D]`. `learn` gets the vectors of each slab and the gradients of the outputs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        anchor: torch.Tensor,
        route: Route,
        answer: Answer,
        learn: Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], None],
        frozen: Sequence[bool],
        *weights: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        vectors = answer()
        outputs = tuple(combine(vectors, route))
        ctx.route, ctx.learn, ctx.vectors = route, learn, vectors
        ctx.save_for_backward(*weights)  # which notices weights that the user has written into in the meantime
        still = (
            output for output, frozen_table, weight in zip(outputs, frozen, weights, strict=True) if frozen_table and weight is None
        )
        ctx.mark_non_differentiable(*still)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_weights = _weight_gradients(ctx.saved_tensors, ctx.vectors, ctx.route, grads)
        with torch.no_grad():
            ctx.learn(ctx.vectors, grads)
        return None, None, None, None, None, *of_weights


def _weight_gradients(
    weights: Sequence[torch.Tensor | None], vectors: Sequence[torch.Tensor], route: Route, grads: Sequence[torch.Tensor]
) -> list[torch.Tensor | None]:
    """The gradients of per-sample weights: `combine`'s own."""
    wanted = [i for i, weight in enumerate(weights) if weight is not None and weight.requires_grad]
    if not wanted:
        return [None] * len(weights)
    leaves = {i: weights[i].detach().requires_grad_() for i in wanted}  # type: ignore[union-attr]
    parts = tuple(part._replace(weights=leaves.get(i, part.weights)) for i, part in enumerate(route.ids.parts))
    with torch.enable_grad():
        outputs = combine(vectors, replace(route, ids=replace(route.ids, parts=parts)))
        found = torch.autograd.grad([outputs[i] for i in wanted], list(leaves.values()), [grads[i] for i in wanted])
    return [found[wanted.index(i)] if i in leaves else None for i in range(len(weights))]
