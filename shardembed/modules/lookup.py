"""What modules share that look up some features of a journey: each can make its own call, or be handed what one call for all
brought.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch

from shardembed.errors import StepError, StillLearningWarning
from shardembed.inputs.features import FeatureIds
from shardembed.inputs.ids import IdBatch
from shardembed.inputs.jagged import is_keyed_jagged
from shardembed.journey.journey import Journey
from shardembed.journey.route.side_by_side import Outputs
from shardembed.modules.base import ShardedModule
from shardembed.tables.table_config import Feature


@dataclass(frozen=True)
class Ready:
    """Outputs that wait for the call they were made for.

    Attributes:
        arguments: of that call.
        outputs: one a feature.
        versions: how often each output had been written into when it was made.
    """

    arguments: tuple[Any, ...]
    outputs: list[torch.Tensor]
    versions: list[int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "versions", self._versions())

    def _versions(self) -> list[int]:
        # Tensors of inference_mode count nothing, and no checkpoint meets them.
        return [0 if output.is_inference() else output._version for output in self.outputs]

    @property
    def changed(self) -> bool:
        """The outputs have been written into since."""
        return self._versions() != self.versions

    def is_for(self, arguments: tuple[Any, ...]) -> bool:
        """The call's arguments are the announced ones; the same objects, or equal ones (a host sync on a GPU)."""
        pairs = zip_longest(self.arguments, arguments)
        return all(ours is theirs or _equal(ours, theirs) for ours, theirs in pairs)


def _equal(ours: Any, theirs: Any) -> bool:
    if is_keyed_jagged(ours) and is_keyed_jagged(theirs):
        return ours.keys() == theirs.keys() and all(
            one is other or _equal(one, other)
            for one, other in (
                (ours.values(), theirs.values()),
                (ours.lengths(), theirs.lengths()),
                (ours.weights_or_none(), theirs.weights_or_none()),
            )
        )
    both = isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor) and not ours.is_nested and not theirs.is_nested
    return both and ours.device == theirs.device and torch.equal(ours, theirs)


class Lookup(ShardedModule):
    """A module that looks up `features` of a journey. `name` is what errors call it.

    Its weights have the state dict keys of `keys`, below its own prefix, with the table of each.
    """

    def __init__(self, journey: Journey, name: str, features: Sequence[Feature], keys: Mapping[str, str]) -> None:
        tables = [journey.tables[index] for index in dict.fromkeys(feature.table for feature in features)]
        super().__init__(journey, tables, keys)
        self.name, self.features = name, tuple(features)
        self._ready: list[Ready] = []
        self._taken: list[Ready] = []

    def read(self, *arguments: Any) -> tuple[FeatureIds, ...]:
        """This module's own arguments as ids of its features.

        Raises:
            InputError: they are malformed.
        """
        raise NotImplementedError  # each module does

    def look_up(self, *arguments: Any) -> Outputs:
        """One output a feature, from what was handed out for this call, or from a call of its own."""
        ready = self._handed_out(arguments)
        # Nobody has looked up for all modules together, so this one makes a call of its own: a journey a module.
        if ready is None:
            return self.journey.forward(lambda: IdBatch.join(self.checked(*arguments)), self.features)
        self.check_shards()
        return Outputs(ready.outputs)

    def checked(self, *arguments: Any) -> tuple[FeatureIds, ...]:
        """As `read`, for a call in which the weights are looked up: its errors reach all ranks."""
        self.check_shards()
        if torch.is_grad_enabled() and self.journey.freezing.overlooked():
            self._warn_of_learning()
        return self.read(*arguments)

    def _warn_of_learning(self) -> None:
        names = self.journey.freezing.frozen.learning
        warnings.warn(
            f"all Parameters of the model have been frozen since shard(), and table(s) {names} learn on: with an optimizer of ours "
            "they are not among model.parameters(). If they are to be frozen too, call model.requires_grad_(False), or "
            "requires_grad_(False) of their modules",
            StillLearningWarning,
            stacklevel=2,
        )

    def _handed_out(self, arguments: tuple[Any, ...]) -> Ready | None:
        if torch._C._current_graph_task_id() >= 0:
            # A checkpoint runs its part of the forward again in the backward, and must meet the same tensors.
            return self._again(arguments)
        if not self._ready:
            return None
        ready = self._ready.pop(0)
        if torch.is_grad_enabled():  # else a reentrant checkpoint, which wants a graph of its own the second time
            self._taken.append(ready)
        if not ready.is_for(arguments):
            raise StepError(
                f"{self.name} was called with other ids than inputs= announced to shard() for it; let inputs= return, for "
                "each module, exactly what it is called with (a list where it is called several times, in that order)"
            )
        return ready

    def _again(self, arguments: tuple[Any, ...]) -> Ready | None:
        ready = next((ready for ready in self._taken if ready.is_for(arguments)), None)
        if ready is not None and ready.changed:
            raise StepError(
                f"what {self.name} answered was written into in place (x *= ..., say) before a checkpoint ran this part of the "
                "forward again: with inputs= both get the same tensor. Write x = x * ... there, or shard() without inputs="
            )
        return ready

    def hand_out(self, arguments: tuple[Any, ...], outputs: list[torch.Tensor]) -> None:
        """Let the next call, which must come with these `arguments`, return what a shared journey has looked up already."""
        self._ready.append(Ready(arguments, outputs))

    def forget(self) -> None:
        """Drop what was handed out."""
        self._ready.clear()
        self._taken.clear()
