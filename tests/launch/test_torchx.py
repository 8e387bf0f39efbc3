"""The torchx component: what it makes of its arguments, and a job of two nodes that torchx starts on this machine."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.jobs import ROOT, end, finish, free_port, start, write_job

pytest.importorskip("torchx.specs", reason="torchx is not installed: pip install 'torchx==0.7.*'")
TORCHX = Path(sys.executable).with_name("torchx")
COMPONENT = ROOT / "launch" / "components.py"


@pytest.fixture(scope="module")
def components() -> ModuleType:
    """Loaded from its file, as torchx does."""
    spec = importlib.util.spec_from_file_location("components", COMPONENT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_one_node_takes_any_free_port_and_several_meet_on_the_first(components: ModuleType) -> None:
    (alone,) = components.train(config="a.yaml", j="8").roles
    assert alone.num_replicas == 1
    assert "--nnodes=1 --nproc-per-node=8 " in alone.args[1]
    assert "--rdzv-endpoint=localhost:0 " in alone.args[1]
    (several,) = components.train("--set=name=$x y", config="a.yaml", j="4x8", port=23456, env={"NCCL_SOCKET_IFNAME": "eth0"}).roles
    assert (several.num_replicas, several.min_replicas, several.env) == (4, 4, {"NCCL_SOCKET_IFNAME": "eth0"})
    assert "--nnodes=4 --nproc-per-node=8 " in several.args[1]
    assert '--rdzv-endpoint="$$head:23456" ' in several.args[1]
    # Two dollars: torchx takes one.
    assert several.args[1].endswith("-m shardembed train a.yaml '--set=name=$$x y'")


@pytest.mark.parametrize("words", [("--config", "a.yaml", "--fresh"), ("--fresh", "--config=a.yaml")])
def test_the_configuration_may_stand_after_the_dashes(components: ModuleType, words: tuple[str, ...]) -> None:
    (role,) = components.train(*words).roles
    assert role.args[1].endswith("-m shardembed train a.yaml --fresh")


def test_a_mistake_is_told(components: ModuleType) -> None:
    with pytest.raises(ValueError, match="which configuration"):
        components.train("--fresh")
    for shape in ("2x", "x2", "0x2", "two"):
        with pytest.raises(ValueError, match=f"-j {shape}: give nodes x ranks"):
            components.train(config="a.yaml", j=shape)


@pytest.mark.launcher
def test_torchx_starts_two_nodes_on_this_machine(tmp_path: Path) -> None:
    job = write_job(tmp_path, steps=20)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the component asks for `python`
    words = (TORCHX, "run", "--wait", "--log", "--scheduler", "local_cwd", f"{COMPONENT}:train", "-j", "2x1", "--port", free_port())
    process = start(tmp_path, *words, "--", "--config", job, PATH=path, GLOO_SOCKET_IFNAME="lo")
    try:
        assert "Job finished: SUCCEEDED" in finish(tmp_path, process)
    finally:
        end(process)
    (summary,) = tmp_path.glob("runs/*/summary.json")
    assert '"ranks": 2' in summary.read_text()
