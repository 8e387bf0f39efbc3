"""FBGEMM's kernels as a choice, `kernel="fbgemm"`: sums of bags and fused updates of the optimizers that it has, on CPUs and GPUs.

A slab is one table of FBGEMM's table-batched module, which is given the slab's own memory. The module updates its tables in the
backward of a lookup, so a step looks up what it is about to update once more, for nothing. On a GPU it takes as much memory
again as the slab while it is made: its tables, which ours then replace.

FBGEMM is imported when a slab asks for it, and not before. Its formulas: `fbgemm_gpu/codegen/genscript/optimizers.py` there.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch

from shardembed.kernels.formulas import Step
from shardembed.kernels.gradients import Gradients
from shardembed.kernels.kernel import SlabData, SlabFacts, Source, lacks
from shardembed.kernels.reference import ReferenceKernel
from shardembed.optim import SGD, Adagrad, Adam, AdamW, RowwiseAdagrad, RowwiseAdam, TableOptimizer

DTYPES = {torch.float32: "FP32", torch.float16: "FP16"}  # and their names there
COLUMNS = 4  # widths are multiples of it
MAX_WIDTH = 2048  # on a GPU
MODULE = "fbgemm_gpu.split_table_batched_embeddings_ops_training"
Numbers = dict[str, float]


@dataclass(frozen=True)
class Fused:
    """An update that FBGEMM has.

    Attributes:
        name: of its kind there.
        on_cpu: it serves CPUs too.
        momenta: our state, in the order of its.
        numbers: what its formula reads of the settings in a step with this number; the learning rate is told apart.
    """

    name: str
    on_cpu: bool
    momenta: tuple[str, ...]
    numbers: Callable[[Any, int], Numbers]


def _adam(settings: Adam, number: int) -> Numbers:
    # Theirs corrects the bias of v before its root and adds eps behind; ours adds eps to the root of v itself, as SparseAdam does.
    eps = settings.eps / (1 - settings.betas[1] ** number) ** 0.5
    return {"eps": eps, **_moments(settings), "weight_decay": settings.weight_decay if isinstance(settings, AdamW) else 0.0}


def _rowwise_adam(settings: RowwiseAdam, number: int) -> Numbers:
    return {"eps": settings.eps, **_moments(settings), "weight_decay": settings.weight_decay}


def _moments(settings: Adam | RowwiseAdam) -> Numbers:
    return {"beta1": settings.betas[0], "beta2": settings.betas[1]}


FORMULAS: dict[type[TableOptimizer], Fused] = {
    SGD: Fused("EXACT_SGD", True, (), lambda settings, number: {}),
    Adagrad: Fused("EXACT_ADAGRAD", True, ("sum",), lambda settings, number: {"eps": settings.eps}),
    RowwiseAdagrad: Fused("EXACT_ROWWISE_ADAGRAD", True, ("sum",), lambda settings, number: {"eps": settings.eps}),
    Adam: Fused("ADAM", False, ("exp_avg", "exp_avg_sq"), _adam),
    AdamW: Fused("ADAM", False, ("exp_avg", "exp_avg_sq"), _adam),
    RowwiseAdam: Fused("PARTIAL_ROWWISE_ADAM", False, ("exp_avg", "exp_avg_sq"), _rowwise_adam),
}


def cannot(facts: SlabFacts) -> str | None:
    """Why FBGEMM does not serve such a slab, or None when it does."""
    if (why := lacks(FORMULAS, facts.optimizer)) is not None:
        return why
    if facts.dynamic:
        return "its tables stay where they are, and a dynamic one moves when it grows"
    on_cpu = facts.device.type == "cpu"
    if on_cpu and not FORMULAS[type(facts.optimizer)].on_cpu:
        return f"it has no update for {type(facts.optimizer).__name__} on CPUs"
    if facts.dtype not in DTYPES:
        return f"its tables are in float32 or float16 here, not in {facts.dtype}"
    if facts.width % COLUMNS:
        return f"its rows have a multiple of {COLUMNS} columns"
    if facts.device.type not in ("cpu", "cuda"):
        return f"its kernels are for CPUs and CUDA devices, not for {facts.device.type}"
    if not on_cpu and facts.width > MAX_WIDTH:
        return f"on a GPU its rows have {MAX_WIDTH:,} columns at most"
    if facts.shares_squares:
        return "it takes the mean of g^2 of the columns that lie here, and this plan cuts the rows of the table into strips"
    if facts.rounds_at_random:
        return "it rounds at random by numbers of its own, so that tables would depend on the plan; rounding='nearest' it has"
    return missing(facts.device.type)


@cache
def missing(device: str) -> str | None:
    """Why FBGEMM does not run on this machine's devices of a type, or None when it does."""
    if importlib.util.find_spec("fbgemm_gpu") is None:
        return f"fbgemm_gpu is not installed: pip install 'shardembed[{device}]'"
    try:
        importlib.import_module(MODULE)
    except (ImportError, OSError, AttributeError, RuntimeError) as error:  # a build for another torch fails in many ways
        return f"fbgemm_gpu does not load here: {error}"
    if device == "cuda" and getattr(importlib.import_module("fbgemm_gpu"), "__variant__", "cuda") == "cpu":
        return "fbgemm-gpu-cpu is installed, which has no kernels for GPUs; fbgemm-gpu has"
    return None


def make(data: SlabData) -> FbgemmKernel:
    """The kernel of a slab that it serves."""
    return FbgemmKernel(data, table_batched(data) if data.weights.numel() else None)  # theirs has at least a row


def table_batched(data: SlabData) -> Any:
    """FBGEMM's module over the memory of a slab."""
    training = importlib.import_module(MODULE)
    common = importlib.import_module("fbgemm_gpu.split_table_batched_embeddings_ops_common")
    configs = importlib.import_module("fbgemm_gpu.split_embedding_configs")
    (rows, width), device = data.weights.shape, data.weights.device
    fused = FORMULAS[type(data.optimizer) if data.state else SGD]  # frozen tables have no state: they are only looked up
    side = "host" if device.type == "cpu" else "dev"
    location = common.EmbeddingLocation.HOST if side == "host" else common.EmbeddingLocation.DEVICE
    computed_on = training.ComputeDevice.CPU if side == "host" else training.ComputeDevice.CUDA
    module = training.SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, width, location, computed_on)],
        optimizer=getattr(configs.EmbOptimType, fused.name),
        weights_precision=getattr(configs.SparseType, DTYPES[data.weights.dtype]),
        stochastic_rounding=False,
        bounds_check_mode=common.BoundsCheckMode.NONE,  # ids were checked where they were routed
        device=device,
    )
    state = {f"momentum{number}": data.state[name] for number, name in enumerate(fused.momenta, start=1)}
    for name, ours in {"weights": data.weights, **state}.items():
        theirs = getattr(module, f"{name}_{side}")
        assert (theirs.numel(), theirs.dtype) == (ours.numel(), ours.dtype), f"FBGEMM lays out {name} in another way"
        theirs.data = ours.view(theirs.shape)
    return module


@dataclass(frozen=True)
class FbgemmKernel(ReferenceKernel):
    """The reference with FBGEMM's sums of bags and updates. Single rows are gathered, and gradients merged, by torch.

    Attributes:
        module: FBGEMM's, over the same memory; None where there are no rows.
    """

    module: Any
    name: ClassVar[str] = "fbgemm"
    fuses: ClassVar[bool] = True

    def lookup(self, rows_E: torch.Tensor, offsets: torch.Tensor | None) -> Source:
        if offsets is None or not rows_E.numel():
            return super().lookup(rows_E, offsets)
        with torch.no_grad():
            return self.module(rows_E, offsets)

    def update(self, waiting: Gradients, order: object, merged: bool, step: Step, factor: float) -> None:
        assert step.mean_square_U is None, "`cannot` has refused slabs of which more is known than their rows say"
        if not waiting.rows_E.numel():
            return
        module, grads_SW = self.module, waiting.grads_SW
        module.set_learning_rate(step.lr)
        module.update_hyper_parameters(FORMULAS[type(self.data.optimizer)].numbers(self.data.optimizer, step.number))
        # Each lookup counts as a step there; of the two counters it takes the one on the host, unless that is 0.
        module.set_optimizer_step(step.number - 1)
        module.iter_cpu.fill_(step.number - 1)
        offsets = waiting.offsets
        if offsets is None:
            offsets = torch.arange(waiting.rows_E.numel() + 1, device=waiting.rows_E.device)
        with torch.enable_grad():
            looked_up = module(waiting.rows_E, offsets)
        looked_up.backward(grads_SW if factor == 1.0 else grads_SW.mul_(factor))
