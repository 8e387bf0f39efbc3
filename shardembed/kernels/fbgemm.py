"""FBGEMM's fused CPU updates (https://github.com/pytorch/FBGEMM), called on their operators directly.

One call merges duplicate rows and applies the optimizer, exact against float64 up to rounding. Hazards, each avoided in
`cannot`: there is no bfloat16 and no Adam on the CPU; a row that begins beyond 2^31 elements is not updated, silently (seen with
34 million rows of 64); a row out of range in the backward crashes the process.
"""

from __future__ import annotations

import importlib.util

import torch

from shardembed.kernels.reference import Gradients
from shardembed.optim import SGD, Adagrad, RowwiseAdagrad, TableOptimizer

ELEMENTS_LIMIT = 2**31 - 1
SUM_POOLING = 0


def cannot(optimizer: TableOptimizer, dtype: torch.dtype, width: int, rows: int, device: torch.device) -> str | None:
    """Why FBGEMM is not used for such a slab, or None when it is."""
    if device.type != "cpu":
        return f"its fused updates are called on the CPU only, not on {device.type}"
    if type(optimizer) not in (SGD, Adagrad, RowwiseAdagrad):
        return f"it has no fused {type(optimizer).__name__} on the CPU"
    if dtype != torch.float32:
        return f"its CPU update is used for float32, not {dtype}"
    if rows * width > ELEMENTS_LIMIT:
        return f"it addresses elements in 32 bits, the slab has {rows:,} x {width} = {rows * width:,}"
    return _missing()


def _missing() -> str | None:
    if importlib.util.find_spec("fbgemm_gpu") is None:
        return "fbgemm-gpu-cpu is not installed"
    try:
        import fbgemm_gpu  # noqa: F401  (registers the operators)

        torch.ops.fbgemm.split_embedding_backward_codegen_rowwise_adagrad_cpu  # noqa: B018
    except (ImportError, OSError, AttributeError) as error:
        return f"fbgemm_gpu does not load here: {error}"
    return None


class Table:
    """The constant arguments of FBGEMM's operators for a slab seen as one table of `rows` x `width`."""

    def __init__(self, weights: torch.Tensor, state: dict[str, torch.Tensor], optimizer: TableOptimizer) -> None:
        rows, width = weights.shape
        self._optimizer = optimizer
        self._weights = weights.view(-1)
        self._momentum = state["sum"].view(-1) if "sum" in state else None
        self._placement = torch.zeros(1, dtype=torch.int32)
        self._offset = torch.zeros(1, dtype=torch.int64)
        self._columns = torch.tensor([0, width], dtype=torch.int32)
        self._width = width
        self._rows = torch.tensor([0, rows], dtype=torch.int64)
        self._row_bits = max(1, rows.bit_length())
        self._no_rows = rows == 0

    def update(self, waiting: Gradients, lr: float) -> None:
        """Merge duplicate rows and apply one optimizer step, in place."""
        if self._no_rows or not waiting.rows_E.numel():
            return
        offsets = waiting.offsets
        if offsets is None:
            offsets = torch.arange(waiting.rows_E.numel() + 1)
        where = (self._weights, self._placement, self._offset, self._columns, self._width, self._rows, self._row_bits)
        # Weights of one, since the operators read them whenever the tensor is there at all.
        what = (waiting.rows_E, offsets, SUM_POOLING, torch.ones(waiting.rows_E.numel()), False)
        rate = torch.tensor(lr, dtype=torch.float32)
        grads = waiting.grads_SW.contiguous()
        operators = torch.ops.fbgemm
        if isinstance(self._optimizer, SGD):
            operators.split_embedding_backward_codegen_sgd_cpu(grads, *where, *what, rate)
            return
        settings = self._optimizer
        assert isinstance(settings, Adagrad | RowwiseAdagrad)
        call = operators.split_embedding_backward_codegen_adagrad_cpu
        if isinstance(settings, RowwiseAdagrad):
            call = operators.split_embedding_backward_codegen_rowwise_adagrad_cpu
        call(grads, *where, *what, self._momentum, self._placement, self._offset, rate, settings.eps)
