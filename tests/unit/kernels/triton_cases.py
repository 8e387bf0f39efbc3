"""What the tests of the Triton kernels share: where they run, gradients, and a reference with roots to the last bit.

The kernels run on a GPU where there is one, else in Triton's interpreter; the reference always runs on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch

from shardembed.kernels import grouping, reference
from shardembed.kernels.formulas import Step
from shardembed.kernels.gradients import Gradients
from shardembed.kernels.kernel import SlabData
from shardembed.kernels.rounding import Blocks
from shardembed.kernels.triton.formulas import FORMULAS
from shardembed.kernels.triton.order import DIRECT, Order, order
from shardembed.kernels.triton.update import update
from shardembed.optim import TableOptimizer
from tests.oracle import EXAMPLES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
WIDTHS = [1, 3, 7, 16, 33, 64, 100, 128, 1000, 1024]
OPTIMIZERS: list[TableOptimizer] = [one for one in EXAMPLES.values() if type(one) in FORMULAS]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def data_of(optimizer: TableOptimizer, weights: torch.Tensor, blocks: Blocks | None = None) -> SlabData:
    """A slab that has not learned yet, with these weights."""
    shapes, dtype = {"row": weights.shape[:1], "element": weights.shape}, compute_dtype(weights.dtype)
    state = {name: torch.zeros(shapes[shape], dtype=dtype, device=weights.device) for name, shape in optimizer.state.items()}
    return SlabData(weights, state, optimizer, dtype, blocks)


def gradients(rows: int, lengths: Sequence[int] | None, segments: int, width: int, dtype: torch.dtype, whole: bool) -> Gradients:
    """Of segments of these lengths, or of single rows; whole numbers, so that sums are exact in any order, where asked for."""
    offsets = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
    entries = segments if offsets is None else int(offsets[-1])
    grads = torch.randint(-9, 10, (segments, width)).to(dtype) if whole else torch.randn(segments, width, dtype=dtype)
    return Gradients(torch.randint(0, rows, (entries,)), offsets, grads)


def there(waiting: Gradients) -> Gradients:
    """On the device of the kernels."""
    offsets = None if waiting.offsets is None else waiting.offsets.to(DEVICE)
    return Gradients(waiting.rows_E.to(DEVICE), offsets, waiting.grads_SW.to(DEVICE))


def order_of(waiting: Gradients, rows: int, direct: int = DIRECT) -> Order:
    return order(waiting.rows_E, waiting.offsets, rows, direct)


class Pair:
    """The same table twice: updated by the reference (`plain`) and by the kernels (`fused`)."""

    def __init__(self, optimizer: TableOptimizer, weights: torch.Tensor) -> None:
        self.optimizer = optimizer
        self.plain = data_of(optimizer, weights.clone())
        self.fused = data_of(optimizer, weights.to(DEVICE, copy=True))

    def step(
        self, waiting: Gradients, number: int, lr: float = 0.1, factor: float = 1.0, square_U: torch.Tensor | None = None
    ) -> None:
        rows_U, grads_UW = grouping.merge(waiting, len(self.plain.weights))
        reference.update(self.plain, rows_U, grads_UW * factor, Step(lr, number, square_U))
        made, found = there(waiting), None if square_U is None else square_U.to(DEVICE)
        update(self.fused, made, order_of(made, len(self.plain.weights)), lr, number, factor, found)

    def compared(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """(name, fused, plain) of weights and state."""
        yield "weights", self.fused.weights.cpu(), self.plain.weights
        for name, tensor in self.plain.state.items():
            yield name, self.fused.state[name].cpu(), tensor

    def check_bits(self) -> None:
        for name, fused, plain in self.compared():
            assert torch.equal(fused, plain), f"{name}: {(fused != plain).sum()} of {plain.numel()} differ"


@pytest.fixture
def exact_roots(monkeypatch: pytest.MonkeyPatch) -> None:
    """The nearest to each square root. Torch's on the CPU are off by a bit now and then, the kernels' are not."""
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda tensor: torch.from_numpy(np.sqrt(tensor.numpy())))
