"""Which slabs the Triton kernels serve, and that they compile for a GPU: wide loads, exact arithmetic, atomics in maps alone."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import shardembed as se
from shardembed.errors import ConfigError
from shardembed.kernels import triton
from shardembed.kernels.choose import choose
from shardembed.kernels.kernel import SlabFacts
from shardembed.kernels.triton.formulas import FORMULAS
from shardembed.optim import SGD, Adam, NoOptimizer

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ATOMIC = {"_insert_slots", "_rebuild"}  # whole numbers, of which the larger keeps its place, whoever comes first
REPOSITORY = Path(__file__).parents[3]


def test_they_are_chosen_for_gpus(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="shardembed"):
        assert choose("auto", SlabFacts(Adam(), torch.bfloat16, 33, 1000, GPU)) == "triton"
    assert "kernel triton" in caplog.text
    assert choose("auto", SlabFacts(NoOptimizer(), torch.float32, 8, 1000, GPU)) == "triton", "for lookup and merge"
    assert choose("reference", SlabFacts(Adam(), torch.float32, 8, 1000, GPU)) == "reference"


def test_on_a_cpu_they_are_for_the_interpreter_and_never_taken_of_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("auto", SlabFacts(SGD(), torch.float16, 8, 1000, CPU)) == "reference"
    assert choose("triton", SlabFacts(SGD(), torch.float16, 8, 1000, CPU)) == "triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(
        ConfigError, match=r"kernel='triton' cannot serve 1,000 x 8 .*only in Triton's interpreter \(TRITON_INTERPRET=1\)"
    ):
        choose("triton", SlabFacts(SGD(), torch.float16, 8, 1000, CPU))
    with pytest.raises(ConfigError, match="not on cpu"):
        se.Embedding(4, 2, optimizer=SGD(), kernel="triton", device="cpu")


@pytest.mark.parametrize(
    ("dtype", "width", "why"),
    [(torch.float32, triton.MAX_WIDTH + 1, "for 1 to 4,096 columns"), (torch.float8_e4m3fn, 8, "no torch.float8_e4m3fn")],
)
def test_what_they_do_not_serve_the_reference_does(
    dtype: torch.dtype, width: int, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="shardembed"):
        assert choose("auto", SlabFacts(SGD(), dtype, width, 1000, GPU)) == "reference"
    assert "kernel reference (triton: its kernels" in caplog.text
    with pytest.raises(ConfigError, match=why):
        choose("triton", SlabFacts(SGD(), dtype, width, 1000, GPU))


def test_a_machine_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: None)
    assert choose("auto", SlabFacts(SGD(), torch.float32, 8, 10, GPU)) == "reference"
    with pytest.raises(ConfigError, match="triton is not installed"):
        choose("triton", SlabFacts(SGD(), torch.float32, 8, 10, GPU))


def test_a_triton_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("libtriton.so: no such file")

    monkeypatch.setattr(triton.importlib, "import_module", broken)
    assert triton.cannot(SlabFacts(SGD(), torch.float32, 8, 10, GPU)) == "triton does not load here: libtriton.so: no such file"


@pytest.mark.exhaustive
def test_they_compile_for_a_gpu_and_do_what_they_say(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(Path(__file__).with_name("compile_triton.py"))]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len(found) == 21 + len({formula.function for formula in FORMULAS.values()})
    for said in found:
        assert said["machine_code"], said
        assert (said["atomics"] > 0) == (said["kernel"].strip() in ATOMIC), said
        assert said["approximate"] == 0, said
        assert said["races"] == [], said
        if said["kernel"].startswith(("_draw", "_update")):
            assert said["fused"] == 0, said
        if said["kernel"].startswith("_update"):
            assert said["wide_loads"], said
        if said["kernel"].startswith("_lookup"):
            assert said["wide_loads"], said
            assert said["wide_stores"], said
