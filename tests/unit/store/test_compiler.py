"""torch's optimizers do without torch's compiler until somebody imports it, and from then on torch has its way."""

from __future__ import annotations

import subprocess
import sys

import pytest

START = """
import sys, torch
from torch import nn
import shardembed as se
from shardembed.store import compiler

def model(dense_optimizer, **settings):
    torch.manual_seed(0)
    emb = se.EmbeddingCollection([se.TableConfig("t", 20, 4)], optimizer=se.optim.SGD(lr=0.1))
    dense = nn.Linear(4, 2)
    parts = nn.ModuleList([emb, dense])
    return emb, dense, se.Optimizer(parts, dense=dense_optimizer(dense.parameters(), **settings))

def train(emb, dense, optimizer):
    for _ in range(2):
        optimizer.zero_grad()
        dense(emb({"t": torch.arange(12).view(4, 3)})["t"]).square().sum().backward()
        optimizer.step()
    return dense.weight.detach().clone()

KINDS = {"SGD": {}, "Adam": {}, "AdamW": {"foreach": False}, "Adagrad": {}, "RMSprop": {}, "NAdam": {}, "Rprop": {}, "ASGD": {}}

def weights():
    return {name: train(*model(getattr(torch.optim, name), lr=0.1, **more)) for name, more in KINDS.items()}
"""


def run(script: str) -> None:
    """`script` in a process in which nobody has imported the compiler."""
    done = subprocess.run([sys.executable, "-c", START + script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_training_is_the_same_and_marks_come_with_the_compiler() -> None:
    run("""
before = weights()
assert not compiler.loaded() and compiler.COMPILER not in sys.modules
methods = ("add_param_group", "zero_grad")
inner = {name: getattr(torch.optim.Optimizer, name).__wrapped__ for name in methods}
ours = {name: vars(inner[name])[compiler.MARKED] for name in methods}

import torch._dynamo
after = weights()
assert compiler.loaded()
for name in KINDS:
    assert torch.equal(before[name], after[name]), name
for name in methods:
    assert vars(inner[name])[compiler.MARKED] is not ours[name], name
""")


@pytest.mark.exhaustive
def test_who_asks_for_the_compiler_during_a_step_gets_it() -> None:
    run("""
emb, dense, optimizer = model(torch.optim.SGD, lr=0.1)
seen = []

def hook(*_):
    assert compiler.COMPILER in sys.modules and not compiler.loaded()
    optimizer.dense.zero_grad()
    assert not compiler.loaded()
    import torch._dynamo.config
    from torch._dynamo import is_compiling
    seen.append(torch._dynamo.config.cache_size_limit)

optimizer.dense.register_step_post_hook(hook)
dense(emb({"t": torch.arange(12).view(4, 3)})["t"]).sum().backward()
optimizer.step()
assert len(seen) == 1 and compiler.loaded() and sys.modules[compiler.COMPILER].__file__
""")


@pytest.mark.exhaustive
def test_a_compiled_function_leaves_the_marked_places_alone() -> None:
    run("""
emb, dense, optimizer = model(torch.optim.SGD, lr=0.1)
train(emb, dense, optimizer)
assert not compiler.loaded()

@torch.compile(backend="eager")
def call(x):
    y = dense(x * 2).sum()
    optimizer.dense.zero_grad()
    return y + 1

x = torch.ones(3, 4)
assert torch.equal(call(x), dense(x * 2).sum() + 1)
assert all(p.grad is None for p in dense.parameters())
""")
