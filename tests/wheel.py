"""What `.ci/wheel` runs in new environments, from an empty folder: `python wheel.py SCENE`. No test of pytest's, since the
environments have none.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

COMMAND = (sys.executable, "-m", "shardembed")
SCRIPT = """
import torch, shardembed as se

se.init()
model = torch.nn.Sequential(torch.nn.EmbeddingBag(100, 8, mode="sum"), torch.nn.Linear(8, 1))
se.shard(model, optimizer=se.optim.RowwiseAdagrad(lr=0.5))
optimizer = se.Optimizer(model, dense=torch.optim.Adagrad(model.parameters(), lr=0.1))
ids = torch.arange(64).view(16, 4)
losses = []
for _ in range(10):
    loss = (model(ids) - 1).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0] / 2, losses
se.save_checkpoint("ckpt", model, optimizer=optimizer)
print("trained", losses[0], losses[-1])
"""
JOB = """
data: {path: taken.parquet, user: user, item: item}
model: {embedding_dim: 8, negatives: 16}
train: {epochs: 2, global_batch_size: 50}
"""
KEYED = """
import torch, shardembed as se
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor

se.init()
config = EmbeddingBagConfig(name="t", embedding_dim=8, num_embeddings=20, feature_names=["f"])
emb = se.EmbeddingCollection([config], optimizer=se.optim.SGD(lr=0.1))
batch = KeyedJaggedTensor.from_lengths_sync(["f"], torch.tensor([1, 2, 3]), torch.tensor([2, 1]))
assert emb(batch).to_dict()["f"].shape == (2, 8)
"""


def run(*words: str, code: int = 0, **settings: str) -> str:
    """Both outputs of a command, which must end with `code`."""
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **settings})
    text = done.stdout + done.stderr
    assert done.returncode == code, f"{words} ended with {done.returncode}, not {code}:\n{text}"
    print(text)
    return text


def contents(folder: Path) -> None:
    (wheel,), (archive,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    with tarfile.open(archive) as file:
        sources = {name.partition("/")[2] for name in file.getnames()}
    root = Path(__file__).parents[1]
    package = {str(path.relative_to(root)) for path in (root / "shardembed").rglob("*.py")} | {"shardembed/py.typed"}
    assert package <= set(names), f"not in the wheel: {sorted(package - set(names))}"
    assert package <= sources, f"not in the archive: {sorted(package - sources)}"
    strange = [name for name in names if not name.startswith("shardembed")]
    assert not strange, f"the wheel would install {strange} beside the package"
    shared = {Path(name).relative_to(Path(name).parts[0]) for name in names if ".data/" in name}
    configs = {Path("data/share/shardembed") / path.relative_to(root / "configs") for path in (root / "configs").rglob("*.yaml")}
    assert shared == configs, f"shared data: {sorted(map(str, shared ^ configs))}"
    for name in (
        "tests/conftest.py",
        "tests/unit/tables/test_plan.py",
        "docs/runs.md",
        "requirements/base.txt",
        ".ci/setup",
        "Makefile",
    ):
        assert name in sources, f"{name} is not in the archive"
    assert not [name for name in sources if "__pycache__" in name or name.startswith(("runs/", ".venv"))]
    print(f"{wheel.name}: {len(names)} files, {wheel.stat().st_size:,} bytes")
    print(f"{archive.name}: {len(sources)} files, {archive.stat().st_size:,} bytes")


def core() -> None:
    assert importlib.util.find_spec("pyarrow") is None, "an extra is installed"
    metadata = importlib.metadata.metadata("shardembed")
    where = importlib.util.find_spec("shardembed")
    assert where is not None
    assert str(where.origin).startswith(sys.prefix), where
    assert run(*COMMAND, "--version") == f"shardembed {metadata['Version']}\n"
    script = Path(sys.executable).with_name("shardembed")
    assert run(str(script), "--version") == f"shardembed {metadata['Version']}\n"
    assert "no problems found" in run(*COMMAND, "doctor")
    Path("script.py").write_text(SCRIPT)
    assert "trained" in run(sys.executable, "script.py")
    assert "weight" in run(*COMMAND, "inspect", "ckpt", "--verify")
    assert "no part of the installed package" in run(*COMMAND, "bench", code=2)
    assert "lower bound" in run(*COMMAND, "plan", "dlrm-dcnv2", "--topology", "h100x8", "--seconds", "2")
    Path("taken.yaml").write_text(JOB)
    Path("taken.parquet").write_text("")
    for extra, code, words in (
        ("train", 2, ["taken.yaml"]),
        ("tensorboard", 1, ["quickstart", "--set", "log.tensorboard=true"]),
    ):
        said = run(*COMMAND, "train", *words, code=code)
        assert f"pip install 'shardembed[{extra}]'; `shardembed doctor` shows what is installed" in said, said
    _imports()


def _imports() -> None:
    """How long the import takes beyond torch's own; the best of three, for other processes only make it longer."""
    code = "import time, torch; began = time.perf_counter(); import shardembed; print(time.perf_counter() - began)"
    best = min(float(run(sys.executable, "-c", code)) for _ in range(3))
    print(f"import shardembed takes {best:.2f} s over torch's own import")


def train() -> None:
    import numpy as np
    import pyarrow as pa
    from pyarrow import parquet

    rows = np.arange(400)
    parquet.write_table(pa.table({"user": rows % 40, "item": 7 * rows % 23}), "taken.parquet")
    Path("taken.yaml").write_text(JOB)
    summary = json.loads(run(*COMMAND, "train", "taken.yaml", "--json").splitlines()[0])
    assert (summary["ranks"], summary["steps"]) == (1, 16)
    assert (Path(summary["run_dir"]) / "run.html").stat().st_size > 5000
    run(*COMMAND, "map", f"{summary['run_dir']}/checkpoints", "--table", "item", "--out", "map.png")


def tensorboard() -> None:
    words = (
        "train",
        "quickstart",
        "--max-steps",
        "3",
        "--set",
        "data.generator.interactions=3000",
        "--set",
        "log.tensorboard=true",
    )
    run(*COMMAND, *words)
    assert list(Path("runs").rglob("events.out.tfevents.*"))


def mlflow() -> None:
    words = ("--max-steps", "3", "--set", "data.generator.interactions=3000", "--set", "log.mlflow=true")
    run(*COMMAND, "train", "quickstart", *words, MLFLOW_TRACKING_URI="sqlite:///told.db")
    code = "import mlflow; print(len(mlflow.search_runs(search_all_experiments=True, output_format='list')[0].data.metrics))"
    assert int(run(sys.executable, "-c", code, MLFLOW_TRACKING_URI="sqlite:///told.db").split()[-1]) > 2


def _trained() -> str:
    """A run of a few steps."""
    words = ("--max-steps", "3", "--set", "data.generator.interactions=3000", "--json")
    return json.loads(run(*COMMAND, "train", "quickstart", *words).splitlines()[0])["run_dir"]


def faiss() -> None:
    _index("faiss")


def hnswlib() -> None:
    _index("hnswlib")


def _index(kind: str) -> None:
    code = f"import shardembed as se; run = se.open_run({_trained()!r}); index = run.index('item', kind={kind!r})"
    code += "; scores, names = index.search(run.vectors('user').values[:2], 3); assert scores.shape == (2, 3), scores; print(names)"
    run(sys.executable, "-c", code)


def serve() -> None:
    run(*COMMAND, "serve", _trained(), "--out", "served")
    code = "import json, sys, urllib.request as r; body = json.dumps({'user': 1, 'k': 2}).encode(); "
    code += "print(r.urlopen(r.Request(f'http://127.0.0.1:{sys.argv[1]}/recommend', body), timeout=30).read().decode())"
    with subprocess.Popen([sys.executable, "served/serve.py", "--port", "8765"]) as server:
        try:
            for _ in range(100):
                time.sleep(0.3)
                if server.poll() is not None or subprocess.run([sys.executable, "-c", code, "8765"]).returncode == 0:
                    break
            assert server.poll() is None, "the server has ended"
            assert len(json.loads(run(sys.executable, "-c", code, "8765"))["items"]) == 2
        finally:
            server.terminate()


def cpu() -> None:
    said = run(*COMMAND, "doctor", "--ranks", "0")
    assert "fbgemm, torchrec and torch go together" in said


def torchrec() -> None:
    cpu()
    run(sys.executable, "-c", KEYED)


def torchx() -> None:
    run(sys.executable, "-c", "import torchx.specs")
    words = ("run", "--scheduler", "local_cwd", "--wait", "dist.ddp", "-j", "1x1", "-m", "shardembed", "--", "--version")
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    scripts = Path(str(spec.origin)).parents[4] / "bin"  # of the environment that has torch: torchx starts `torchrun` by its name
    found = os.pathsep.join([str(scripts), os.environ["PATH"]])
    assert "SUCCEEDED" in run(sys.executable, "-m", "torchx.cli.main", *words, PATH=found)


def docs() -> None:
    Path("conf.py").write_text('extensions = ["myst_parser", "sphinx.ext.autodoc"]\nhtml_theme = "furo"\n')
    Path("index.md").write_text("# Tables\n\n```{eval-rst}\n.. autofunction:: shardembed.row_wise\n```\n")
    run(sys.executable, "-m", "sphinx", "-W", "-q", ".", "out")
    assert "row_wise" in Path("out/index.html").read_text()


SCENES: dict[str, Callable[[], None]] = {
    scene.__name__: scene for scene in (core, train, tensorboard, mlflow, faiss, hnswlib, serve, cpu, torchrec, torchx, docs)
}

if __name__ == "__main__":
    if sys.argv[1] == "contents":
        contents(Path(sys.argv[2]))
    else:
        SCENES[sys.argv[1]]()
        if sys.argv[1] != "core":
            assert "no problems found" in run(*COMMAND, "doctor", "--ranks", "0")
