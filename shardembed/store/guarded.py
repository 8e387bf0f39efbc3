"""Gradients that torch's own tools would take for more than they are.

The gradient of a shard is that of this rank's rows alone. What works element by element (optimizers, clipping by value) does the
same to it as to a part of the whole table's; what asks for one number of all (a norm, whether anything is inf) or mixes ranks
(all_reduce) does not. A subclass of Tensor sees such calls whoever makes them, torch's own functions and wrappers included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn
from typing_extensions import Self

from shardembed.comm.comm import Comm
from shardembed.errors import ShardEmbedError, StepError, UnsupportedError

NORMS = (
    *(torch.linalg.vector_norm, torch._foreach_norm),  # what `torch.nn.utils.clip_grad_norm_` and `get_total_norm` call
    *(torch.norm, torch.Tensor.norm, torch.linalg.norm, torch.linalg.matrix_norm),  # what clips by hand, and LARS and LAMB
)
_DATA: Any = torch.Tensor.data  # a C descriptor, which type checkers take for a plain attribute
ALIASES = (_DATA.__get__, torch.Tensor.detach, torch.detach)  # the same tensor by another name
CLAMPS = (
    *(torch.Tensor.clamp_, torch._foreach_clamp_min_, torch._foreach_clamp_max_),  # `torch.nn.utils.clip_grad_value_`
    *(torch.clamp_, torch.Tensor.clip_, torch.clip_),
)
DRAWS = ("normal_", "uniform_", "log_normal_", "exponential_", "cauchy_", "geometric_", "bernoulli_", "random_")
PART = (
    "drawing numbers would fill this rank's part alone, and copies differently. Fill the model before shard(), call "
    "reset_parameters(), or write all rows with load_rows(table, source)"
)
NORM = (
    "the norm was asked of what is cut over the ranks, and every rank would get that of its own part. Optimizers that scale by it "
    "need the table copied to every rank, with replicated(); a sum of squares, and its gradient, can be had part by part"
)
MIXES = (dist.all_reduce, dist.all_reduce_coalesced, dist.reduce, dist.broadcast)
UNSCALE = torch._amp_foreach_non_finite_check_and_unscale_


class Guarded(torch.Tensor):
    """A tensor that knows what not to be used for. What is made from it is an ordinary one."""

    refused: ClassVar[dict[Callable[..., Any], str]] = {}
    error: ClassVar[type[ShardEmbedError]] = StepError
    whose: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is UNSCALE:
            return _unscale(*args)
        if func in cls.refused and not (func in NORMS and _by_dimension(args, kwargs or {})):
            found = next(guarded_in([args, list((kwargs or {}).values())]))
            raise cls.error(cls.refused[func].format(whose=found.whose))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __reduce_ex__(self, protocol: object) -> Any:
        return self._plain().__reduce_ex__(protocol)  # pyright: ignore[reportArgumentType]

    def __deepcopy__(self, memo: object) -> torch.Tensor:
        return self._plain().clone()

    def _plain(self) -> torch.Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return self.detach()


class ShardGradient(Guarded):
    """The gradient of a shard, of whose table other ranks have other parts; dense, or sparse COO."""

    comm: Comm
    refused: ClassVar[dict[Callable[..., Any], str]] = {
        **dict.fromkeys(
            NORMS,
            "the norm was asked of a gradient that is cut over the ranks, of table {whose!r}: every rank would get the norm of its "
            "own rows, and scale by another number. Use se.clip_grad_norm_(model, max_norm), which takes norm_type= too; with "
            "max_norm=float('inf') it only measures",
        ),
        **dict.fromkeys(
            MIXES,
            "a collective was called with a gradient that is cut over the ranks, of table {whose!r}: every rank has that of other "
            "rows, merged over all ranks already. Leave the parameters in se.ignored(model) out",
        ),
    }

    @staticmethod
    def of(gradient: torch.Tensor, table: str, comm: Comm) -> ShardGradient:
        """`gradient` as what it is, in the same memory."""
        if gradient.requires_grad:  # keep its graph
            guarded = gradient.as_subclass(ShardGradient)
        else:  # sparse tensors too, of which as_subclass knows nothing
            guarded = torch.Tensor._make_subclass(ShardGradient, gradient)
        guarded.whose, guarded.comm = table, comm
        return guarded

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        if func is torch.Tensor._values or func in ALIASES:  # the former is what GradScaler looks at
            return ShardGradient.of(result, args[0].whose, args[0].comm)
        return result


class CopiedData(Guarded):
    """What `.data` gives of a shard that is not all of its table: what draws numbers is refused."""

    error = UnsupportedError
    refused: ClassVar[dict[Callable[..., Any], str]] = dict.fromkeys(
        (*(getattr(torch.Tensor, name) for name in DRAWS), nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_),
        "the weight of table {whose!r}: " + PART,
    )

    @classmethod
    def of(cls, data: torch.Tensor, table: str) -> Self:
        lent = torch.Tensor._make_subclass(cls, data)
        lent.whose = table
        return lent


class CutData(CopiedData):
    """The same where other ranks have more of it: norms too."""

    refused: ClassVar[dict[Callable[..., Any], str]] = {
        **CopiedData.refused,
        **dict.fromkeys(NORMS, "the weight of table {whose!r}: " + NORM),
    }


class Factor(Guarded):
    """What a whole collection's waiting gradients are to be multiplied with."""

    whose = "sharded tables"
    refused: ClassVar[dict[Callable[..., Any], str]] = {
        **dict.fromkeys(
            NORMS,
            "the norm was asked of what stands in se.Optimizer for the gradients of {whose}: they are not in it. Use "
            "se.clip_grad_norm_(model, max_norm), which counts the tables with all else",
        ),
        **dict.fromkeys(
            CLAMPS,
            "clipping by value met what stands in se.Optimizer for the gradients of {whose}: they are not in it. Give it "
            "model.parameters(), for the dense part alone, or clip all by norm with se.clip_grad_norm_(model, max_norm)",
        ),
    }


def _by_dimension(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Norms of rows, say, as Adafactor takes them of whole tables: more than one number."""
    return (args[2] if len(args) > 2 else kwargs.get("dim")) is not None


def guarded_in(arguments: object) -> Iterator[Guarded]:
    """The guarded tensors among arguments and in lists of them."""
    if isinstance(arguments, Guarded):
        yield arguments
    elif isinstance(arguments, list | tuple):
        for one in arguments:
            yield from guarded_in(one)


def _unscale(grads: Sequence[torch.Tensor], found_inf: torch.Tensor, inverse_scale: torch.Tensor) -> None:
    """GradScaler's look at gradients: it finds on every rank what it finds on any. Collective."""
    with torch._C.DisableTorchFunctionSubclass():
        kinds: dict[type, list[torch.Tensor]] = {}
        for grad in grads:  # DTensors go with their like only
            kinds.setdefault(torch.Tensor if isinstance(grad, Guarded) else type(grad), []).append(grad)
        for alike in kinds.values():
            UNSCALE(alike, found_inf, inverse_scale)
        for comm in {id(grad.comm): grad.comm for grad in grads if isinstance(grad, ShardGradient)}.values():
            comm.all_reduce("step: agree that gradients are finite", found_inf, maximum=True)
