"""Training without loading torch's compiler.

torch's optimizers import `torch._dynamo` when they are built, stepped and zeroed, to mark places that a compiled function is to
leave alone. The import takes as long as that of torch itself. As long as nobody else has imported it nothing is compiled, and then
the marks mean nothing: so they are left out. From the moment that it is imported, torch makes them as ever.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import FunctionType, ModuleType
from typing import Any

import torch

COMPILER = "torch._dynamo"
MARKED = "__dynamo_disable"  # on a function: what torch made of it (torch/_compile.py)


class _Absent(ModuleType):
    """Stands for the compiler during a step. Whoever asks for more than the mark gets the compiler itself."""

    @staticmethod
    def graph_break(msg: str = "") -> None:
        """What the compiler has in this place does nothing either, but where a function is compiled."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # by which submodules are found
            raise AttributeError(name)
        if sys.modules.get(COMPILER) is self:
            del sys.modules[COMPILER]
        return getattr(importlib.import_module(COMPILER), name)


def loaded() -> bool:
    """Somebody has imported the compiler."""
    return COMPILER in sys.modules and not isinstance(sys.modules[COMPILER], _Absent)


@contextmanager
def unmarked() -> Iterator[None]:
    """Steps of torch's optimizers inside do not load the compiler."""
    if COMPILER in sys.modules or not _possible():
        yield
        return
    absent = sys.modules[COMPILER] = _Absent(COMPILER)
    try:
        yield
    finally:
        if sys.modules.get(COMPILER) is absent:
            del sys.modules[COMPILER]


@cache
def _possible() -> bool:
    """This torch looks the compiler up among the loaded modules, and not in a place of its own."""
    absent = sys.modules[COMPILER] = _Absent(COMPILER)
    try:
        return getattr(torch, "_dynamo", None) is absent
    finally:
        if sys.modules.get(COMPILER) is absent:
            del sys.modules[COMPILER]


@cache
def watch() -> None:
    """From now on, in this process, building and zeroing torch's optimizers does not load the compiler."""
    if loaded():
        return
    for method in vars(torch.optim.Optimizer).values():
        # What else wraps methods, in this torch or another, is left alone.
        if isinstance(method, FunctionType) and method.__globals__.get("__name__") == "torch._compile":
            inner = getattr(method, "__wrapped__", None)
            if isinstance(inner, FunctionType) and MARKED not in vars(inner):
                setattr(inner, MARKED, _until_loaded(method, inner))


def _until_loaded(method: Callable[..., Any], inner: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if not loaded():
            return inner(*args, **kwargs)
        if getattr(inner, MARKED, None) is call:
            delattr(inner, MARKED)  # so that torch makes its own
        return method(*args, **kwargs)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]  # the compiler leaves it alone, as it does torch's
    return call
