"""What torch does to a whole model without a word to its modules: for sharded tables it has to be said.

`requires_grad_`, `zero_grad` and `.to()` with its kin go through Parameters, or change one module after the other; `AveragedModel`
pairs Parameters by their place. Torch has no hooks for these. So three methods of `nn.Module` and one of `AveragedModel` are
wrapped, once, when the first sharded module is made. On models without one they do what they did.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.optim.swa_utils import AveragedModel

from shardembed.errors import UnsupportedError
from shardembed.modules.handle import TableHandle
from shardembed.store import compiler
from shardembed.store.own_parameters import ShardParameter


class TableModule(nn.Module):
    """What the wrapped methods ask of a sharded module."""

    def check_change(self, fn: Callable[[Any], Any]) -> None:
        """Refuse what `.to()` and its kin are about to do, where the tables would have to follow."""

    def check_thaw(self) -> None:
        """Refuse to let tables learn that cannot."""

    def freeze_tables(self, frozen: bool) -> None:
        """Freeze all tables, or let them learn."""

    def forget_gradients(self) -> None:
        """Drop the tables' waiting gradients."""


def watch() -> None:
    """Wrap the methods; once is enough."""
    if _state.watching:
        return
    _state.watching = True
    compiler.watch()
    for name, wrapper in {"requires_grad_": _requires_grad, "zero_grad": _zero_grad, "_apply": _apply}.items():
        setattr(nn.Module, name, wrapper(getattr(nn.Module, name)))
    AveragedModel.update_parameters = _update_parameters(AveragedModel.update_parameters)
    register_module_parameter_registration_hook(_check_registration)


class _State:
    watching = False
    inside = threading.local()  # a conversion: what it holds has been looked at


_state = _State()


def _below(model: nn.Module) -> Iterator[TableModule]:
    return (module for module in model.modules() if isinstance(module, TableModule))


def _requires_grad(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def requires_grad_(self: nn.Module, requires_grad: bool = True) -> nn.Module:
        found = list(_below(self))
        for module in found if requires_grad else ():
            module.check_thaw()  # before anything has changed
        for module in found:
            module.freeze_tables(not requires_grad)
        return original(self, requires_grad)

    return requires_grad_


def _zero_grad(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def zero_grad(self: nn.Module, set_to_none: bool = True) -> None:
        original(self, set_to_none)
        for module in _below(self):
            module.forget_gradients()

    return zero_grad


def _apply(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def apply(self: nn.Module, fn: Callable[[Any], Any], recurse: bool = True) -> nn.Module:
        if not recurse or getattr(_state.inside, "yes", False):
            return original(self, fn, recurse)
        for module in _below(self):
            module.check_change(fn)  # a refusal must leave nothing half converted
        _state.inside.yes = True
        try:
            return original(self, fn, recurse)
        finally:
            _state.inside.yes = False

    return apply


def _update_parameters(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def update_parameters(self: AveragedModel, model: nn.Module) -> None:
        for module in _below(model):
            if not module._parameters or not all(isinstance(p, ShardParameter) and p.whole for p in module._parameters.values()):
                raise UnsupportedError(
                    f"AveragedModel pairs Parameters by their place, and the weights of {module} are not among them, or in part "
                    "only, so it would average others. Average the dense part alone: AveragedModel(a module without tables)"
                )
        original(self, model)

    return update_parameters


# torch.compile holds what it has met, the parameters of an optimizer that steps too, in modules of its own.
COMPILERS = ("torch._dynamo.", "torch.fx.")


def _check_registration(module: nn.Module, name: str, parameter: Any) -> None:
    """A table's weight as another module's too: an output layer that is tied to it, say."""
    if isinstance(module, TableModule | nn.ParameterList | nn.ParameterDict):
        return
    if type(module).__module__.startswith(COMPILERS):
        return
    if isinstance(parameter, TableHandle):
        table = parameter.table.name
    elif isinstance(parameter, ShardParameter) and not parameter.whole:
        table = parameter.shard.table
    else:
        return
    raise UnsupportedError(
        f"the weight of table {table!r} was to become {name!r} of a {type(module).__name__}, which needs all of it on every rank, "
        f"and it lies cut over them; tie the two before shard(), and keep the table as it is with skip=[{table!r}]"
    )
