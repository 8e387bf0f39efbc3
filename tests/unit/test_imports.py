"""What is imported when: a rank that starts waits for every module."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import shardembed as se

PACKAGE = Path(se.__file__).parent
BESIDE_TORCH = {"numpy", "shardembed"}
HEAVY = {  # some tenths of a second each
    "matplotlib",
    "pandas",
    "pyarrow",
    "pydantic",
    "rich",
    "scipy.linalg",
    "scipy.optimize",
    "scipy.sparse",
    "sympy",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.utils.data",
}
IMPORT = """
import sys, torch
before = set(sys.modules)
import shardembed
"""
STEP = """
import sys, torch
from torch import nn
before = set(sys.modules)
import shardembed as se
emb = se.EmbeddingCollection([se.TableConfig("t", 100, 8)], optimizer=se.optim.RowwiseAdagrad(lr=0.1), plan=se.row_wise())
dense = nn.Linear(8, 1)
optimizer = se.Optimizer(nn.ModuleList([emb, dense]), dense=torch.optim.Adam(dense.parameters(), fused=False))
optimizer.zero_grad()
dense(emb({"t": torch.arange(12).view(4, 3)})["t"]).sum().backward()
optimizer.step()
"""
TELL = "\nimport json; print(json.dumps(sorted(set(sys.modules) - before)))"


def loaded_by(script: str) -> set[str]:
    """The modules that are there after `script`, without those that torch brings."""
    return set(json.loads(subprocess.check_output([sys.executable, "-c", script + TELL], text=True)))


def test_a_training_job_waits_for_no_library_of_the_planner() -> None:
    loaded = loaded_by("import sys; before = set()\nimport shardembed.recipes.train, shardembed.embeddings.of_run")
    assert not {name for name in loaded if name.startswith("shardembed.planner")}


def test_the_package_brings_nothing_but_itself() -> None:
    found = loaded_by(IMPORT)
    assert not {name for name in found if name.startswith("torch.")}
    names = {name.partition(".")[0] for name in found} - set(sys.stdlib_module_names) - BESIDE_TORCH
    # Compiled modules of NumPy bring some that have no folder of their own.
    assert not {name for name in names if not name.startswith(("_", "cython"))}


def test_a_first_step_loads_neither_a_planner_nor_a_compiler() -> None:
    found = loaded_by(STEP)
    if found & HEAVY:  # kernels that were not on the disk yet have been compiled, which takes all of Numba
        found = loaded_by(STEP)
    assert not found & HEAVY


def test_what_comes_later_is_what_type_checkers_see() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {node.module: {name.name for name in node.names} for node in block.body if isinstance(node, ast.ImportFrom)}
    rooms = {f"shardembed.{name}" for name in seen.pop("shardembed", set())}
    assert {home: set(names) for home, names in se._LATER.items()} == {**seen, **{room: set() for room in rooms}}


def test_every_public_name_is_there_and_no_other() -> None:
    for name in se.__all__:
        assert getattr(se, name) is not None
    assert set(se.__all__) <= set(dir(se))
    for home, names in se._LATER.items():
        for name in names:
            assert getattr(se, name) is getattr(importlib.import_module(home), name)
    with pytest.raises(AttributeError, match="module 'shardembed' has no attribute 'nothing'"):
        se.nothing  # noqa: B018
