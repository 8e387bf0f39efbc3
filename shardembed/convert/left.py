"""Who still refers to what `shard` has replaced: lists of tables, lists of weights for a penalty, optimizers, functions.

What a model's own attributes hold of plain modules becomes the sharded ones. A plain weight has no such twin, so whoever holds one
is named in a warning. Nobody is looked for unless something plain is still alive when all references of ours are gone.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import nn

from shardembed.convert.sites import Site, Table
from shardembed.errors import StaleReferenceWarning

DEPTH = 4  # of lists in lists that are looked into
LONGEST = 100_000  # entries; a longer one is no list of tables
NAMED = 8  # places that the warning lists
CONTAINERS = (dict, list, tuple, set, frozenset, deque)
Named = dict[int, tuple[Any, str]]  # by id(): a plain module or weight, and the table's name


@dataclass(frozen=True)
class Left:
    """What `shard` has replaced, weakly.

    Attributes:
        modules: plain ones, with the path of each.
        weights: plain ones, with the table of each.
    """

    modules: list[tuple[weakref.ref[nn.Module], str]]
    weights: list[tuple[weakref.ref[torch.Tensor], str]]

    @staticmethod
    def of(sites: Sequence[Site], tables: Sequence[Table]) -> Left:
        return Left(
            [(weakref.ref(site.module), site.path) for site in sites],
            [(weakref.ref(table.weight), table.name) for table in tables],
        )

    def settle(self, model: nn.Module, twins: Mapping[str, nn.Module]) -> None:
        """Let the model's attributes refer to the sharded modules, `twins` by path, and warn of other references."""
        alive = {id(module): (module, twins[path]) for ref, path in self.modules if (module := ref()) is not None}
        if alive:
            for holder in list(model.modules()):
                _replace(holder, alive)
        del alive
        if self._left():
            gc.collect()  # what only waits for it refers to nothing
        if found := self._left():
            _warn(list(dict.fromkeys(_places(model, found))))

    def _left(self) -> Named:
        both = [*self.modules, *self.weights]
        return {id(one): (one, name) for ref, name in both if (one := ref()) is not None}


def _replace(holder: nn.Module, alive: Mapping[int, tuple[nn.Module, nn.Module]]) -> None:
    for name, value in list(vars(holder).items()):
        if not name.startswith(("_modules", "_parameters", "_buffers")):
            new = _replaced(value, alive, DEPTH)
            if new is not value:
                object.__setattr__(holder, name, new)  # it was no registered module before


def _replaced(value: Any, alive: Mapping[int, tuple[nn.Module, nn.Module]], depth: int) -> Any:
    """The value with sharded modules for plain ones; the same object where there are none, and lists and dicts in place."""
    if id(value) in alive:
        return alive[id(value)][1]
    if not depth or not isinstance(value, list | dict | tuple) or len(value) > LONGEST:
        return value
    if isinstance(value, tuple):
        items = [_replaced(item, alive, depth - 1) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    for key, item in list(value.items()) if isinstance(value, dict) else list(enumerate(value)):
        new = _replaced(item, alive, depth - 1)
        if new is not item:
            value[key] = new
    return value


def _places(model: nn.Module, left: Named) -> Iterator[str]:
    """Where what is left is referred to, in words."""
    paths = {id(module): path for path, module in model.named_modules()}
    for one in gc.get_objects():
        kind = type(one)
        if kind is FunctionType:
            for variable, cell in zip(one.__code__.co_freevars, one.__closure__ or (), strict=True):
                yield from _within(f"{variable!r} of the function {one.__qualname__}", _content(cell), left)
        elif issubclass(kind, torch.optim.Optimizer):
            held = {name for group in one.__dict__.get("param_groups", ()) for p in group["params"] for name in _named(p, left)}
            if held:
                yield f"the optimizer {kind.__name__} (of {_listed(held)})"
        elif issubclass(kind, nn.Module) and id(one) not in left:
            where = ".".join(filter(None, ["model", paths[id(one)]])) if id(one) in paths else kind.__name__
            for name, value in list(vars(one).items()):
                # Of a module outside of the model, what is registered counts too; within, that is what has been replaced.
                if name not in ("_modules", "_parameters"):
                    yield from _within(f"{where}.{name}", value, left)
                elif id(one) not in paths:
                    for key, item in value.items():
                        yield from _within(f"{where}.{key}", item, left)


def _within(where: str, value: Any, left: Named, depth: int = DEPTH) -> Iterator[str]:
    for name in _named(value, left):
        yield f"{where} (of {name!r})"
    if depth and isinstance(value, CONTAINERS) and len(value) <= LONGEST:
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield from _within(f"{where}[{key!r}]", item, left, depth - 1)


def _named(value: Any, left: Named) -> list[str]:
    return [left[id(value)][1]] if id(value) in left else []


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _listed(names: set[str]) -> str:
    return ", ".join(map(repr, sorted(names)[:NAMED])) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _warn(places: list[str]) -> None:
    if places:
        more = f"; and {len(places) - NAMED} more" if len(places) > NAMED else ""
        warnings.warn(
            f"the tables have been sharded, and their plain weights are still referred to by {'; '.join(places[:NAMED])}{more}. "
            "Nothing trains these any more, and a penalty on them is a constant: make optimizers and lists of Parameters after "
            "shard(), and compute penalties from what the lookups return",
            StaleReferenceWarning,
            stacklevel=4,
        )
