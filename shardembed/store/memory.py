"""The memory of one slab on one rank, and the kernel that works on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from shardembed.kernels.kernel import Kernel, SlabData
from shardembed.kernels.memory import on_huge_pages
from shardembed.kernels.rounding import Blocks, Named
from shardembed.store.slab_spec import SlabSpec

GROWTH = 1.5


@dataclass
class Memory:
    """Rows and optimizer state. Those of dense tables stay where they are for good; those of dynamic ones move when they grow.

    Attributes:
        data: the tensors, as kernels take them.
        make: a kernel for such memory.
        kernel: the one that works on it now.
    """

    data: SlabData
    make: Callable[[SlabData], Kernel]
    kernel: Kernel = field(init=False)

    def __post_init__(self) -> None:
        self.kernel = self.make(self.data)

    def ensure(self, rows: int, learning: int) -> None:
        """See that there are so many rows, and state for the first `learning` of them."""
        data = self.data
        held = next(iter(data.state.values())).shape[0] if data.state else learning
        if rows <= data.weights.shape[0] and learning <= held:
            return
        state = {name: grown(tensor, learning, zeros=True) for name, tensor in data.state.items()}
        moved = SlabData(grown(data.weights, rows), state, data.optimizer, data.compute_dtype, data.blocks)
        self.kernel, self.data = self.make(moved), moved


def empty_data(spec: SlabSpec, rows: int, device: torch.device, blocks: Blocks | Named | None) -> SlabData:
    """Rows that are not set, and optimizer state of zeros, of which a frozen slab has none."""
    weights = on_huge_pages(torch.empty(rows, spec.width, dtype=spec.dtype, device=device))
    shapes = {"row": (rows,), "element": (rows, spec.width)}
    state = {
        name: on_huge_pages(torch.zeros(shapes[shape], dtype=spec.compute_dtype, device=device))
        for name, shape in spec.optimizer.state.items()
        if not spec.policy.frozen
    }
    return SlabData(weights, state, spec.optimizer, spec.compute_dtype, blocks)


def grown(tensor: torch.Tensor, rows: int, zeros: bool = False) -> torch.Tensor:
    """The tensor with at least so many rows, and some to spare where it has to move; what is new is not set, or `zeros`."""
    held = tensor.shape[0]
    if rows <= held:
        return tensor
    with torch.inference_mode(False):  # what an evaluation makes larger is learned from later, in place
        larger = on_huge_pages(tensor.new_empty(max(rows, int(held * GROWTH)), *tensor.shape[1:]))
        larger[:held] = tensor
        if zeros:
            larger[held:] = 0
    return larger
