"""What a rank takes of a global batch: made on the CPU in any process, perhaps pinned, then moved to where the model is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import torch
from typing_extensions import Self


@dataclass(frozen=True)
class Part:
    """A rank's part of a global batch. Its tensors are pinned and moved together; what shall stay on the CPU is a numpy array.

    Attributes:
        global_size: samples of the whole batch.
    """

    global_size: int = field(kw_only=True)

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, torch.Tensor))

    def pin_memory(self) -> Self:
        """The same part in pinned host memory; a DataLoader with `pin_memory=True` asks for it."""
        return self._each(torch.Tensor.pin_memory)

    def share_memory(self) -> Self:
        """The same part in shared memory, through which another process gets it.

        Raises:
            RuntimeError: there is no room for it.
        """
        return self._each(torch.Tensor.share_memory_)

    def to(self, device: torch.device) -> Self:
        """The same part on a device. Copies from pinned memory do not wait."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        held = {one.name: getattr(self, one.name) for one in fields(self)}
        return replace(self, **{name: change(value) for name, value in held.items() if isinstance(value, torch.Tensor)})
