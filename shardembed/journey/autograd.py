"""Where autograd leaves this rank and comes back: lookups as functions of a graph that has no weights in it.

Both take an anchor, an empty tensor that requires grad so that autograd comes back for tables with an optimizer of ours, and what
to call on the way there (`answer`) and back (`learn`). Shards without one (`optimizer=None`) are inputs, so that hooks,
`backward(inputs=...)` and `torch.autograd.grad` work on them as on any Parameter. `learn` gives their gradients, and is told
whether the backward is `whole`, so that the others are wanted too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch

from shardembed.errors import UnsupportedError
from shardembed.journey.route import Route, combine
from shardembed.journey.route.columns import Columns
from shardembed.journey.route.side_by_side import Guard

Answer = Callable[[], list[torch.Tensor]]
Gradient = torch.Tensor | None


class _Once(torch.autograd.Function):
    """Gradients that a backward with create_graph=True gave: as they are, and no derivative of them is to be had."""

    @staticmethod
    def forward(ctx: Any, *grads: Gradient) -> tuple[Gradient, ...]:
        return tuple(None if grad is None else grad.clone() for grad in grads)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> NoReturn:
        raise UnsupportedError(
            "second derivatives: the gradient of a sharded table was differentiated again (create_graph=True), and it has crossed "
            "the ranks outside of autograd. Differentiate with respect to the vectors that the lookup returned instead"
        )


def _is_whole(ctx: Any) -> bool:
    """Whether this backward is for all that requires grad, and not for chosen inputs alone. `needs_input_grad` does not know."""
    return ctx.needs_input_grad[0] and torch._C._will_engine_execute_node(ctx.next_functions[0][0])


def _once(grads: Sequence[Gradient]) -> tuple[Gradient, ...]:
    if not torch.is_grad_enabled() or all(grad is None for grad in grads):  # without create_graph there is nothing to guard
        return tuple(grads)
    return _Once.apply(*(None if grad is None else grad.detach().requires_grad_() for grad in grads))


class Vectors(torch.autograd.Function):
    """Stages 4 and 5 forward, 8 and 9 backward: the vectors of each slab, `[S, W]`; `frozen` ones require no grad."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: torch.Tensor,
        answer: Answer,
        learn: Callable[[Sequence[torch.Tensor], bool], Sequence[Gradient]],
        frozen: Sequence[bool],
        *shards: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.learn = learn
        answers = tuple(answer())
        ctx.mark_non_differentiable(*(vectors for vectors, is_frozen in zip(answers, frozen, strict=True) if is_frozen))
        return answers

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Gradient, ...]:
        with torch.no_grad():
            of_shards = ctx.learn(grads, _is_whole(ctx))
        return None, None, None, None, *_once(of_shards)


class FixedOutputs(torch.autograd.Function):
    """Stages 4 to 6 forward, 7 to 9 backward in deterministic mode: autograd itself must not add up gradients.

    One output a feature, `[*shape, D]`, and before them the whole of those that lie side by side, if they do. `learn` gets the
    vectors of each slab and the gradients of the outputs. `frozen` has a flag a feature. Behind the per-sample weights of each
    feature come the shards.
    """

    @staticmethod
    def forward(
        ctx: Any,
        anchor: torch.Tensor,
        route: Route,
        answer: Answer,
        learn: Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor], bool], Sequence[Gradient]],
        frozen: Sequence[bool],
        *per_sample_weights_and_shards: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        vectors, per_sample_weights = answer(), per_sample_weights_and_shards[: len(frozen)]
        found = combine(vectors, route)
        ctx.route, ctx.learn, ctx.vectors = route, learn, vectors
        ctx.set_materialize_grads(False)  # who uses the whole, and who its parts, is of interest
        ctx.like = [output.new_zeros(1).expand(output.shape) for output in found.each]
        ctx.guard = None
        if found.whole is not None and route.columns is not None:
            ctx.guard = Guard.of(found.whole, [found.each[i] for i in route.columns.features])
        ctx.save_for_backward(*per_sample_weights)  # which notices weights that the user has written into in the meantime
        of_features = zip(found.each, frozen, per_sample_weights, strict=True)
        ctx.mark_non_differentiable(*(output for output, is_frozen, weights in of_features if is_frozen and weights is None))
        return (*found.each,) if found.whole is None else (found.whole, *found.each)

    @staticmethod
    def backward(ctx: Any, *arrived: Gradient) -> tuple[Gradient, ...]:
        grads = _of_outputs(arrived, ctx.like, ctx.route.columns, ctx.guard)
        of_weights = _per_sample_gradients(ctx.saved_tensors, ctx.vectors, ctx.route, grads)
        of_shards: Sequence[Gradient] = [None] * (len(ctx.needs_input_grad) - 5 - len(grads))
        # Else nothing learns, and a rank without weights that do has no backward to meet the others in.
        if ctx.needs_input_grad[0] or any(ctx.needs_input_grad[5 + len(grads) :]):
            with torch.no_grad():
                of_shards = ctx.learn(ctx.vectors, grads, _is_whole(ctx))
        return None, None, None, None, None, *_once([*of_weights, *of_shards])


def _of_outputs(
    arrived: Sequence[Gradient], like: Sequence[torch.Tensor], columns: Columns | None, guard: Guard | None
) -> list[torch.Tensor]:
    """The gradient of each output, with what came for it through the whole. like: zeros of their shapes."""
    whole, grads = (arrived[0], list(arrived[1:])) if guard is not None else (None, list(arrived))
    if guard is not None and columns is not None:
        guard.check(whole, [grads[i] for i in columns.features])
        if whole is not None:
            for i, part in zip(columns.features, whole.split(columns.widths, 1), strict=True):
                grad = grads[i]
                grads[i] = part if grad is None else grad + part
    return [zeros if grad is None else grad for grad, zeros in zip(grads, like, strict=True)]


def _per_sample_gradients(
    weights: Sequence[torch.Tensor | None], vectors: Sequence[torch.Tensor], route: Route, grads: Sequence[torch.Tensor]
) -> list[torch.Tensor | None]:
    """The gradients of per-sample weights: `combine`'s own."""
    wanted = [i for i, weight in enumerate(weights) if weight is not None and weight.requires_grad]
    if not wanted:
        return [None] * len(weights)
    leaves = {i: weights[i].detach().requires_grad_() for i in wanted}  # type: ignore[union-attr]
    parts = tuple(part._replace(weights=leaves.get(i, part.weights)) for i, part in enumerate(route.ids.parts))
    with torch.enable_grad():
        outputs = combine(vectors, replace(route, ids=replace(route.ids, parts=parts))).each
        found = torch.autograd.grad([outputs[i] for i in wanted], list(leaves.values()), [grads[i] for i in wanted])
    return [found[wanted.index(i)] if i in leaves else None for i in range(len(weights))]
