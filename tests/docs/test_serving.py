"""docs/using-embeddings.md leaves a model behind that examples/serve serves where there is no shardembed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.docs import pages


def python(folder: Path, *words: str) -> str:
    """What a script prints in a process that finds none of these, whatever is installed."""
    for name in ("shardembed", "numpy", "safetensors"):
        path = folder / "without" / name
        path.mkdir(parents=True, exist_ok=True)
        (path / "__init__.py").write_text(f"raise ModuleNotFoundError('{name} is not here', name='{name}')\n")
    environment = {**os.environ, "PYTHONPATH": str(folder / "without")}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.exhaustive
def test_the_page_runs_and_its_model_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = "".join(pages.run_page("docs/using-embeddings.md"))
    made = {"ckpt", "items.png", "small", "some", "tables", "picked", "served", "vocab.txt", "views.csv", "runs"}
    assert {path.name for path in tmp_path.iterdir()} == made
    assert "nearest rows of item to id 43, film 43" in said
    assert "[7, 42] (2, 16)\n" in said
    assert "3 False True\n" in said
    (tmp_path / "serve.py").write_bytes((pages.EXAMPLES / "serve" / "serve.py").read_bytes())
    checks = "import serve; from pathlib import Path; serve.build(Path('served'))\n"
    checks += "try:\n    import shardembed\nexcept ImportError as error:\n    print(error)\n"
    assert python(tmp_path, "-c", checks) == "shardembed is not here\n"
    printed = re.findall(r"^item (\d+): (-?\d+\.\d+)$", python(tmp_path, "serve.py", "score", "served", "7"), flags=re.MULTILINE)
    wanted = scores(tmp_path, 7)
    best = np.argsort(-wanted)[:5]
    assert [int(item) for item, _ in printed] == best.tolist()
    assert [float(score) for _, score in printed] == pytest.approx(wanted[best].tolist(), abs=1e-3)


def scores(folder: Path, user: int) -> np.ndarray:
    """Of all items, as NumPy reckons them from the exported numbers."""
    tables = folder / "served" / "tables"
    users, items = (np.load(tables / f"{name}.npy") * np.load(tables / f"{name}.scale.npy")[:, None] for name in ("user", "item"))
    dense = torch.load(folder / "served" / "dense.pt", weights_only=True)
    tower = users[user] @ dense["tower.weight"].numpy().T + dense["tower.bias"].numpy()
    return items @ tower
