"""What rank processes need, loaded: `harness` has a process import this module, and ranks are forks of it.

That is sound because nothing here starts a thread (the end of this module holds it to that).
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import pickle
import sys
from itertools import product

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: its threads would not be in a fork

import torch
import torch._dynamo  # what DistributedDataParallel imports when it is made, and slow

from shardembed.comm import comm
from tests.oracle import EXAMPLES
from tests.ranks import sharded
from tests.ranks.cases import cross

torch.set_num_threads(1)
for name in ("torchrec", "torchmetrics", "torch.distributed.fsdp", "torch.distributed.checkpoint"):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)


def train_once() -> None:
    """Load what is loaded at the first step: above all the compiled kernels, which ranks would else compile beside each other."""
    for optimizer, dtype in product(EXAMPLES.values(), (torch.float32, torch.float64)):
        case = cross(1, optimizer, dtype, steps=1, chosen=lambda layout: layout == "row_even")
        sharded.train(0, 1, [pickle.dumps(case.of_rank(0))])
    comm._known.clear()


def threads() -> int:
    return len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 1


train_once()
gc.collect()
gc.freeze()  # forks then share what is loaded, and need not walk it
assert threads() == 1, "forks of a process that has threads are not sound"
