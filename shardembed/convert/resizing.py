"""`resize_token_embeddings` of transformers, which knows torch's own tables only: it says what to do while they are sharded."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from shardembed.errors import UnsupportedError
from shardembed.modules.base import ShardedModule

NAME = "resize_token_embeddings"


class _Resizing:
    """The model's own method, which does nothing where the size stays, and raises a TypeError about classes where it does not."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)  # which holds this

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        model = self._model()
        assert model is not None, "whoever calls this has the model"
        try:
            return getattr(type(model), NAME)(model, *arguments, **named)
        except TypeError as error:
            names = [table.name for one in model.modules() if isinstance(one, ShardedModule) for table in one.tables]
            raise UnsupportedError(
                f"{type(model).__name__}.resize_token_embeddings: a sharded table keeps its size; the tables are {names}. "
                "Resize the model before se.shard(), or take it back with se.unshard(model), resize it, and shard it again"
            ) from error


def explain_resizing(model: nn.Module) -> None:
    """Have every model in `model` that can resize its tables say what to do in place of that."""
    for module in model.modules():
        if hasattr(type(module), NAME) and any(isinstance(one, ShardedModule) for one in module.modules()):
            module.__dict__[NAME] = _Resizing(module)


def forget_resizing(model: nn.Module) -> None:
    """Let the models' own methods be called again."""
    for module in model.modules():
        if isinstance(module.__dict__.get(NAME), _Resizing):
            del module.__dict__[NAME]
