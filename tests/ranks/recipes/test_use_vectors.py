"""Exported vectors are those by which a job was evaluated: read with NumPy and pyarrow alone, they give its recall."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet
from safetensors.numpy import load_file

import shardembed as se
from shardembed import cli
from shardembed.embeddings.formats import Npy
from shardembed.errors import ConfigError, ExportError
from shardembed.inputs.hash64 import hash64
from shardembed.recipes.use import export
from tests.amount import exhaustive
from tests.harness import run_ranks
from tests.ranks.recipes.using import END, SASREC, TWO_TOWER, VIEWS, Small, asked_of, recall_and_ndcg

FEATURES = ", features: [{name: taste, kind: id, of: user}, {name: price, kind: number, of: item}]"
KINDS = {
    "two_tower": (VIEWS + TWO_TOWER + END, {}),
    "towers": (VIEWS + TWO_TOWER + END, {"towers": "[12]"}),
    "repeats": (VIEWS + TWO_TOWER + END, {"eval": ", repeats: true"}),
    "sasrec": (VIEWS + SASREC + END, {"more": ", time: at"}),
    "sasrec unmet": (VIEWS + SASREC + END, {"more": ", time: at", "eval": ", repeats: false"}),
    "features": (VIEWS + TWO_TOWER + END, {"more": FEATURES}),
    "features in towers": (VIEWS + TWO_TOWER + END, {"more": FEATURES, "towers": "[12]"}),
    "ratio": (VIEWS + TWO_TOWER + END, {"more": ", split: {kind: ratio, share: 0.3, validation: true}"}),
    "best": (
        VIEWS + TWO_TOWER + "checkpoint: {{every_steps: 2}}\n" + END,
        {"towers": "[12]", "eval": ", every_steps: 2, patience: 2"},
    ),
    "bfloat16": (VIEWS + TWO_TOWER + "wire_dtype: bfloat16\n" + END, {"towers": "[12]"}),
}
SAMPLE = ("towers", "sasrec", "features")


@pytest.fixture(scope="module", params=[one if one in SAMPLE else exhaustive(one) for one in KINDS])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Small:
    text, settings = KINDS[request.param]
    return Small.train(tmp_path_factory.mktemp("run"), text, **settings)


def read(folder: Path, form: str, side: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(ids, vectors, names) as others read them."""
    if form == "parquet":
        table = parquet.read_table(folder / f"{side}.parquet")
        values = np.stack(table.column("embedding").to_numpy())
        return table.column("id").to_numpy(), values, table.column("name").to_pylist()
    named = parquet.read_table(folder / f"{side}.names.parquet")
    if form == "npy":
        ids, values = np.load(folder / f"{side}.ids.npy"), np.load(folder / f"{side}.npy")
    else:
        found = load_file(folder / f"{side}.safetensors")
        ids, values = found["ids"], found["weight"]
    assert named.column("id").to_pylist() == ids.tolist()
    return ids, values, named.column("name").to_pylist()


@pytest.mark.parametrize("form", ["parquet", exhaustive("safetensors"), exhaustive("npy")])
def test_exported_vectors_give_the_recall_of_the_job(small: Small, form: str, tmp_path: Path) -> None:
    se.open_run(small.path).export(tmp_path / "vectors", format=form)  # type: ignore[arg-type]
    index = json.loads((tmp_path / "vectors" / "export.json").read_text())
    assert {name: (one["metric"], one["vectors"]) for name, one in index["tables"].items()} == {
        "user": ("dot", "model"),
        "item": ("dot", "model"),
    }
    vectors = {}
    for side in ("user", "item"):
        ids, values, names = read(tmp_path / "vectors", form, side)
        assert values.dtype == np.float32
        assert hash64(names).tolist() == ids.tolist()
        vectors[side] = ids, values
    recall, ndcg = recall_and_ndcg(asked_of(small.config), vectors, 10, small.config.eval.repeats)
    assert recall == pytest.approx(small.summary["recall@10"], abs=1e-6)
    assert ndcg == pytest.approx(small.summary["ndcg@10"], abs=1e-6)
    assert recall > small.summary["popularity_recall@10"]


def exported(rank: int, world_size: int, run: str, out: str) -> None:
    se.open_run(run).export(out, format="npy")


def test_two_ranks_export_what_one_does(small: Small, tmp_path: Path) -> None:
    run_ranks(2, exported, str(small.path), str(tmp_path / "two"))
    se.open_run(small.path).export(tmp_path / "one", format="npy")
    for name in ("user.npy", "item.npy", "user.ids.npy", "item.ids.npy"):
        np.testing.assert_allclose(np.load(tmp_path / "two" / name), np.load(tmp_path / "one" / name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrong", [{"format": "csv"}, {"dtype": "float99"}])
def test_a_choice_that_does_not_exist_is_told(small: Small, wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not one of"):
        se.open_run(small.path).export(tmp_path / "vectors", **wrong)
    assert not (tmp_path / "vectors").exists()


def failing(rank: int, world_size: int, run: str, out: str, step: str) -> str:
    class Full(Npy):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            if step == "begin":
                raise OSError(errno.ENOSPC, "no space left")

        def __exit__(self, *args: Any) -> None:
            super().__exit__(*args)
            if step == "end":
                raise OSError(errno.ENOSPC, "no space left")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "writer_of", lambda form, *args: Full(*args))
        with pytest.raises(ExportError, match="no space left"):
            se.open_run(run).export(out, format="npy")
    return ", ".join(path.name for path in Path(out).parent.iterdir())


@pytest.mark.parametrize("step", ["begin", "end"])
def test_a_disk_that_is_full_ends_the_export_on_all_ranks(small: Small, step: str, tmp_path: Path) -> None:
    run_ranks(2, failing, str(small.path), str(tmp_path / "vectors"), step)
    assert [*tmp_path.iterdir()] == []


def test_a_run_is_exported_by_what_its_model_compares_unless_rows_are_asked_for(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = se.open_run(small.path).vectors("item")
    names, ids = made.names.slice(2, 2).to_pylist(), made.ids[2:4].tolist()
    words = ["export", str(small.path), "--format", "parquet", "--table", "item"]
    chosen = f"--rows={','.join(map(str, ids))}"
    assert cli.main([*words, "--out", str(tmp_path / "model"), chosen, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["tables"]["item"]
    assert (told["vectors"], told["metric"], told["rows"], told["names"]) == ("model", "dot", 2, "item.parquet")
    found = parquet.read_table(tmp_path / "model" / "item.parquet")
    assert found.column("id").to_pylist() == ids
    assert found.column("name").to_pylist() == names
    assert cli.main([*words, "--out", str(tmp_path / "rows"), chosen, "--vectors", "rows", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["tables"]
    assert [one["vectors"] for one in rows.values()] == ["rows"]
    assert cli.main(["export", str(small.path), "--out", str(tmp_path / "none"), "--table", "tastes"]) == 2
    assert "compares vectors of user and item; tables as they lie: --vectors rows" in capsys.readouterr().err
    assert cli.main([*words, "--out", str(tmp_path / "none"), "--rows=1"]) == 2
    assert "ids that have a vector" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_neighbours_go_by_the_names_and_the_vectors_of_the_run(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["neighbors", str(small.path), "--table", "item", "--id", "SKU/004", "--k", "5", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["queries"]
    assert found["name"] == "SKU/004"
    made = se.open_run(small.path).vectors("item")
    names = made.names.to_pylist()
    scores = made.values.astype(np.float64) @ made.values[names.index("SKU/004")]
    order = [names[place] for place in np.argsort(-scores, kind="stable") if names[place] != "SKU/004"]
    assert [one["name"] for one in found["neighbors"]] == order[:5]
    assert cli.main(["neighbors", str(small.path), "--table", "item", "--id", "never seen"]) == 2
    assert "nothing of that name has a row in table 'item'" in capsys.readouterr().err
