"""Where autograd leaves this rank and comes back: the journey's calls as functions of a graph that has no weights in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from shardembed.route import Route, combine

if TYPE_CHECKING:
    from shardembed.journey import Journey, Ticket


class Vectors(torch.autograd.Function):
    """Steps 4 and 5 forward, 8 and 9 backward: where autograd leaves this rank and comes back."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, journey: Journey, ticket: Ticket) -> tuple[torch.Tensor, ...]:
        ctx.journey, ctx.ticket = journey, ticket
        answers = tuple(journey.answer(ticket.request))
        still = [vectors for vectors, spec in zip(answers, journey.specs, strict=True) if spec.policy.frozen]
        ctx.mark_non_differentiable(*still)
        return answers

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, None, None]:
        with torch.no_grad():
            ctx.journey.learn(ctx.ticket, grads)
        return None, None, None


class FixedOutputs(torch.autograd.Function):
    """Steps 4 to 6 forward, 7 to 9 backward in deterministic mode: autograd itself must not add up gradients."""

    @staticmethod
    def forward(
        ctx: Any, anchor: torch.Tensor, journey: Journey, ticket: Ticket, *weights: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        vectors = journey.answer(ticket.request)
        outputs = tuple(combine(vectors, ticket.route))
        ctx.journey, ctx.ticket, ctx.vectors, ctx.weights = journey, ticket, vectors, weights
        still = (
            output
            for output, feature, weight in zip(outputs, ticket.route.features, weights, strict=True)
            if journey.tables[feature.table].frozen and weight is None
        )
        ctx.mark_non_differentiable(*still)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_weights = _weight_gradients(ctx.weights, ctx.vectors, ctx.ticket.route, grads)
        with torch.no_grad():
            ctx.journey.learn_fixed(ctx.ticket, ctx.vectors, grads)
        return None, None, None, *of_weights


def _weight_gradients(
    weights: Sequence[torch.Tensor | None], vectors: Sequence[torch.Tensor], route: Route, grads: Sequence[torch.Tensor]
) -> list[torch.Tensor | None]:
    """The gradients of per-sample weights: `combine`'s own."""
    wanted = [i for i, weight in enumerate(weights) if weight is not None and weight.requires_grad]
    if not wanted:
        return [None] * len(weights)
    leaves = {i: weights[i].detach().requires_grad_() for i in wanted}  # type: ignore[union-attr]
    parts = tuple(replace(part, weights=leaves.get(i, part.weights)) for i, part in enumerate(route.ids.parts))
    with torch.enable_grad():
        outputs = combine(vectors, replace(route, ids=replace(route.ids, parts=parts)))
        found = torch.autograd.grad([outputs[i] for i in wanted], list(leaves.values()), [grads[i] for i in wanted])
    return [found[wanted.index(i)] if i in leaves else None for i in range(len(weights))]
