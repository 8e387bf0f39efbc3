"""FBGEMM as a kernel that is asked for by name: the numbers of the reference, and what it lacks refused by name."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import shardembed as se
from shardembed.errors import ConfigError
from shardembed.kernels import fbgemm
from shardembed.kernels.choose import choose
from shardembed.kernels.fbgemm import FORMULAS, FbgemmKernel, make
from shardembed.kernels.formulas import Step
from shardembed.kernels.gradients import Gradients
from shardembed.kernels.kernel import SlabData, SlabFacts, gathered
from shardembed.kernels.reference import ReferenceKernel
from shardembed.optim import FTRL, SGD, Adam, AdamW, RowwiseAdagrad, RowwiseAdam, TableOptimizer
from tests.oracle import EXAMPLES

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FACTS = SlabFacts(RowwiseAdagrad(0.1), torch.float32, 8, 1000, CPU)
MINE = [one for one in EXAMPLES.values() if type(one) in FORMULAS and FORMULAS[type(one)].on_cpu]
needs_fbgemm = pytest.mark.skipif(fbgemm.missing("cpu") is not None, reason=str(fbgemm.missing("cpu")))


def data_of(optimizer: TableOptimizer, weights: torch.Tensor) -> SlabData:
    shapes = {"row": weights.shape[:1], "element": weights.shape}
    state = {name: torch.zeros(shapes[shape], device=weights.device) for name, shape in optimizer.state.items()}
    return SlabData(weights, state, optimizer, torch.float32)


def drawn(rows: int, width: int, segments: int, bags: bool) -> Gradients:
    """Some rows many times, some segments empty."""
    lengths = torch.randint(0, 5, (segments,)) if bags else torch.ones(segments, dtype=torch.int64)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    rows_E = (torch.rand(int(offsets[-1])).square() * rows).long()
    return Gradients(rows_E, offsets if bags else None, torch.randn(segments, width))


@needs_fbgemm
@pytest.mark.parametrize("optimizer", MINE, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("width", [4, 16, 20, 128])
@pytest.mark.parametrize("bags", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_steps_are_the_references(optimizer: TableOptimizer, width: int, bags: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    start = torch.randn(30, width).to(dtype)
    fused, plain = make(data_of(optimizer, start.clone())), ReferenceKernel(data_of(optimizer, start.clone()))
    place = fused.data.weights.data_ptr()
    for step, segments in enumerate([40, 0, 7, 1], start=1):
        waiting = drawn(30, width, segments, bags)
        rows_U, grads_UW = plain.merge(waiting, None)
        merged = Gradients(rows_U, None, grads_UW.clone())
        as_it_is = step != 3
        fused.update(waiting if as_it_is else merged, None, not as_it_is, Step(0.1 / step, step), 0.5)
        plain.update(Gradients(rows_U, None, grads_UW), None, True, Step(0.1 / step, step), 0.5)
    assert fused.data.weights.data_ptr() == place
    eps = torch.finfo(dtype).eps  # a few roundings of the table's dtype, one a step
    torch.testing.assert_close(fused.data.weights.float(), plain.data.weights.float(), rtol=8 * eps, atol=16 * eps)
    for name, state in fused.data.state.items():
        torch.testing.assert_close(state, plain.data.state[name], rtol=1e-5, atol=1e-5)
    assert not torch.equal(fused.data.weights, start)


@needs_fbgemm
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_lookups_are_the_references(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weights = torch.randn(30, 12).to(dtype)
    theirs, plain = make(data_of(SGD(0.1), weights)), ReferenceKernel(data_of(SGD(0.1), weights))
    for segments in (0, 1, 50):
        asked = drawn(30, 12, segments, True)
        found = gathered(theirs.lookup(asked.rows_E, asked.offsets))
        torch.testing.assert_close(found, gathered(plain.lookup(asked.rows_E, asked.offsets)), rtol=1e-6, atol=1e-6)
        assert not found.requires_grad
        single = gathered(theirs.lookup(asked.rows_E, None))
        assert torch.equal(single, weights[asked.rows_E])
    assert isinstance(make(data_of(SGD(0.1), weights[:0])), FbgemmKernel), "a rank without rows"


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"optimizer": FTRL(0.1)}, "it has no update for FTRL"),
        ({"optimizer": Adam(0.1)}, "it has no update for Adam on CPUs"),
        ({"dtype": torch.float64}, "in float32 or float16 here, not in torch.float64"),
        ({"width": 6}, "a multiple of 4 columns"),
        ({"device": torch.device("meta")}, "not for meta"),
        ({"device": GPU, "width": 4096}, "on a GPU its rows have 2,048 columns at most"),
        ({"shares_squares": True}, "cuts the rows of the table into strips"),
        ({"rounds_at_random": True}, "rounds at random by numbers of its own"),
    ],
)
def test_what_it_lacks_is_refused_by_name(given: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigError, match=rf"kernel='fbgemm' cannot serve .*{why}"):
        choose("fbgemm", replace(FACTS, **given))  # type: ignore[arg-type]


def test_collections_say_what_their_slabs_lack() -> None:
    cases = {
        "a multiple of 4 columns": {},
        "rounds at random": {"dtype": torch.float16, "embedding_dim": 8},
    }
    for why, given in cases.items():
        table = se.TableConfig("t", 10, **{"embedding_dim": 6, **given})  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=why):
            se.EmbeddingCollection([table], optimizer=SGD(), kernel="fbgemm")
    with pytest.raises(ConfigError, match="cannot be deterministic"):
        se.EmbeddingCollection([se.TableConfig("t", 10, 8)], optimizer=SGD(), kernel="fbgemm", deterministic=True)


def test_a_machine_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fbgemm.importlib.util, "find_spec", lambda name: None)
    fbgemm.missing.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"fbgemm_gpu is not installed: pip install 'shardembed\[cpu\]'"):
            choose("fbgemm", FACTS)
        assert choose("auto", FACTS) != "fbgemm"
    finally:
        fbgemm.missing.cache_clear()


@needs_fbgemm
def test_the_build_for_cpus_has_nothing_for_gpus() -> None:
    import fbgemm_gpu

    if getattr(fbgemm_gpu, "__variant__", "cuda") == "cpu":
        assert "fbgemm-gpu-cpu is installed" in str(fbgemm.cannot(replace(FACTS, device=GPU)))


def test_it_is_not_loaded_unless_asked_for() -> None:
    code = (
        "import sys, torch, shardembed as se\n"
        "emb = se.EmbeddingCollection([se.TableConfig('t', 10, 8)], optimizer=se.optim.SGD())\n"
        "emb({'t': torch.ones(2, 2, dtype=torch.int64)})['t'].sum().backward()\n"
        "se.Optimizer(emb).step()\n"
        "assert 'fbgemm_gpu' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_adam_there_is_adam_here() -> None:
    """By their formula, in float64: the bias of v is corrected before the root, eps added behind."""
    torch.manual_seed(0)
    for settings in (Adam(0.1, eps=1e-3), AdamW(0.1, eps=1e-3, weight_decay=0.3), RowwiseAdam(0.1, eps=1e-3, weight_decay=0.3)):
        start = torch.randn(5, 8, dtype=torch.float64)
        shapes = {"row": (5,), "element": (5, 8)}
        state = {name: torch.zeros(shapes[shape], dtype=torch.float64) for name, shape in settings.state.items()}
        ours = ReferenceKernel(SlabData(start.clone(), state, settings, torch.float64))
        w, m, v = start.clone(), torch.zeros(5, 8, dtype=torch.float64), torch.zeros(shapes[settings.state["exp_avg_sq"]]).double()
        for step in (1, 2, 3):
            g = torch.randn(5, 8, dtype=torch.float64)
            ours.update(Gradients(torch.arange(5), None, g.clone()), None, True, Step(0.1, step), 1.0)
            given = FORMULAS[type(settings)].numbers(settings, step)
            beta1, beta2, eps, decay = (given[name] for name in ("beta1", "beta2", "eps", "weight_decay"))
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * (g.square().mean(1) if settings.rowwise else g.square())
            root = (v / (1 - beta2**step)).sqrt() + eps
            w = w - 0.1 * (m / (1 - beta1**step) / (root.unsqueeze(1) if settings.rowwise else root) + decay * w)
        torch.testing.assert_close(ours.data.weights, w, rtol=1e-12, atol=1e-12)
