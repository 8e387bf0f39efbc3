"""The outputs of features that pool, as parts of one tensor: what is pooled goes in, the whole and its parts come out, and their
gradients go back whole.

Legend: B samples, W columns of a slab.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from shardembed.errors import StepError
from shardembed.journey.route.columns import Columns

Gradient = torch.Tensor | None


class Outputs(NamedTuple):
    """What a call answers.

    Attributes:
        each: of each feature, `[*shape, embedding_dim]`.
        whole: those of features that pool side by side, `[B, sum of embedding_dim]`, in memory that each of them is a part of; None
            where they do not lie so.
    """

    each: list[torch.Tensor]
    whole: torch.Tensor | None = None


@dataclass(frozen=True)
class Guard:
    """Tells a backward that the whole was written into where its parts were used, or the other way round. Autograd cannot know:
    it has not been told that they share memory.

    Attributes:
        whole: an alias that counts the same writes.
        parts: likewise.
    """

    whole: torch.Tensor
    parts: tuple[torch.Tensor, ...]

    @staticmethod
    def of(whole: torch.Tensor, parts: Sequence[torch.Tensor]) -> Guard:
        return Guard(whole.detach(), tuple(part.detach() for part in parts))

    def check(self, whole: Gradient, parts: Sequence[Gradient]) -> None:
        """Given the gradients that came.

        Raises:
            StepError: they are of values that are not there any more.
        """
        if whole is not None and any(part._version for part in self.parts):
            raise StepError(
                "an answer was written into in place (x *= ..., say) and the concatenation of all answers, which shares its "
                "memory, was used as well: write x = x * ..., or concatenate after writing"
            )
        if self.whole._version and any(part is not None for part in parts):
            raise StepError(
                "the concatenation of all answers was written into in place (x *= ..., say) and single answers, which share its "
                "memory, were used as well: write x = x * ..."
            )


def side_by_side(pieces: Sequence[torch.Tensor], columns: Columns, samples: int) -> tuple[torch.Tensor, ...]:
    """The whole, `[B, sum of embedding_dim]`, and its part for each feature of `columns`.

    Args:
        pieces: `[B * strips, W]` each, sample by sample.
    """
    if torch.is_grad_enabled():
        return SideBySide.apply(columns, samples, *pieces)  # type: ignore[return-value]
    return _laid_out(pieces, columns, samples)


def _laid_out(pieces: Sequence[torch.Tensor], columns: Columns, samples: int) -> tuple[torch.Tensor, ...]:
    if columns.one_piece:
        whole = torch.ops.aten._unsafe_view.default(pieces[0], [samples, sum(columns.widths)])
    else:
        wide = [piece.view(samples, widths) for piece, widths in zip(pieces, columns.piece_widths, strict=True)]
        whole = torch.cat([wide[piece][:, start:stop] for piece, start, stop in columns.runs], 1)
    return whole, *torch.unsafe_split_with_sizes(whole, columns.widths, 1)


class SideBySide(torch.autograd.Function):
    """`_laid_out`, with gradients that go back without a copy where they come as parts of one tensor."""

    @staticmethod
    def forward(ctx: Any, columns: Columns, samples: int, *pieces: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        whole, *parts = _laid_out(pieces, columns, samples)
        needed = ctx.needs_input_grad[2:]
        ctx.columns, ctx.shapes = columns, [piece.shape for piece in pieces]
        ctx.guard = Guard.of(whole, parts) if any(needed) else None
        of_parts = zip(parts, columns.sources, strict=True)
        ctx.mark_non_differentiable(*(part for part, source in of_parts if not any(needed[piece] for piece in source)))
        return whole, *parts

    @staticmethod
    def backward(ctx: Any, *grads: Gradient) -> tuple[Gradient, ...]:
        whole, *parts = grads
        ctx.guard.check(whole, parts)
        grad = gathered(whole, parts, ctx.columns.widths, ctx.guard.whole)
        if grad is None:
            return None, None, *([None] * len(ctx.shapes))
        found: list[Gradient] = []
        for number, (shape, needed) in enumerate(zip(ctx.shapes, ctx.needs_input_grad[2:], strict=True)):
            runs = [grad[:, start:stop] for start, stop in ctx.columns.of_pieces[number]] if needed else []
            found.append((torch.cat(runs, 1) if len(runs) > 1 else runs[0]).reshape(shape) if runs else None)
        return None, None, *found


def gathered(whole: Gradient, parts: Sequence[Gradient], widths: Sequence[int], like: torch.Tensor) -> Gradient:
    """The gradient of the whole, from its own and those of its parts; None where none came. like: the whole."""
    if all(part is None for part in parts):
        return whole
    there = [part for part in parts if part is not None]
    found = _one_tensor(there) if len(there) == len(parts) else None
    if found is None:
        nothing = like.new_zeros(1, 1)
        filled = zip(parts, widths, strict=True)
        found = torch.cat([nothing.expand(like.shape[0], width) if part is None else part for part, width in filled], 1)
    return found if whole is None else found + whole


def _one_tensor(parts: Sequence[torch.Tensor]) -> Gradient:
    """The tensor whose columns these are side by side, as the adjoint of a concatenation gives them; None where they are not."""
    first = parts[0]
    if torch.is_grad_enabled():  # a view of what they share would not be known to autograd
        return None
    step, size, memory = first.stride(0), first.element_size(), first.untyped_storage().data_ptr()
    begins = at = first.data_ptr()
    for part in parts:
        if part.data_ptr() != at or part.stride() != (step, 1) or part.untyped_storage().data_ptr() != memory:
            return None
        at += part.shape[1] * size
    width = (at - begins) // size
    return first.as_strided((first.shape[0], width), (step, 1)) if step >= width and first.numel() else None
