"""`shardembed plan`, in this process: what it prints and writes, where, and how it tells a new user what was wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shardembed.cli import main
from shardembed.tables.plan import Plan

WORKLOAD = """
global_batch_size: 4096
tables:
  - {name: users, num_embeddings: 2000000, embedding_dim: 32, ids_per_sample: [1]}
  - {name: items, num_embeddings: 300000, embedding_dim: 32, ids_per_sample: [1, 20]}
  - {name: words, num_embeddings: 50000, embedding_dim: 64, ids_per_sample: [40]}
  - {name: days, num_embeddings: 7, embedding_dim: 8, ids_per_sample: [1]}
"""
CLUSTER = ["--topology", "h100x8"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "shop.yaml"
    path.write_text(WORKLOAD)
    return path


def found(capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    """The JSON object on stdout, and what stderr has."""
    printed = capsys.readouterr()
    return json.loads(printed.out), printed.err


def test_a_plan_is_shown_saved_and_written_as_a_page(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved, shown = model.with_name("plan.json"), model.with_name("plan.html")
    assert (
        main(["plan", str(model), *CLUSTER, "--ranks", "2", "--out", str(saved), "--report", str(shown), "--seconds", "0.5"]) == 0
    )
    printed = capsys.readouterr()
    assert printed.err == "", "progress went where there is no terminal"
    lines = printed.out.splitlines()
    assert "shop: 4 tables on 2 ranks of h100x8" in lines[0]
    assert f"wrote {saved}" in lines
    assert max(len(line) for line in lines if not line.startswith("wrote")) <= 100
    plan = Plan.load(saved)
    assert plan.world_size == 2
    assert plan.hash in shown.read_text()
    assert "How many ranks" in shown.read_text()


def test_json_is_one_object_and_the_same_for_a_seed(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pins = [f"--pin={wish}" for wish in ("users=row_wise:4", "items=packing:bag", "words=row_wise", "days=replicated")]
    plans = []
    for _ in range(2):
        assert main(["plan", str(model), *CLUSTER, "--ranks", "4", "--json", "--seed", "3", *pins]) == 0
        plans.append(found(capsys)[0])
    assert {"step_seconds", "lower_bound_seconds", "gap", "plan_seconds", "memory_bytes", "tables"} <= set(plans[0])
    assert len(plans[0]["memory_bytes"]) == 4
    assert list(plans[0]["tables"]) == ["users", "items", "words", "days"]
    assert plans[0]["lower_bound_seconds"] <= plans[0]["step_seconds"]
    assert plans[0]["plan_hash"] == plans[1]["plan_hash"]


def test_batch_optimizer_and_memory_go_before_the_files(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(model), *CLUSTER, "--ranks", "2", "--json", "--seconds", "0.5"]
    assert main(words) == 0
    plain, _ = found(capsys)
    assert main([*words, "--batch", "8192", "--optimizer", "Adam", "--memory", "40"]) == 0
    other, _ = found(capsys)
    assert (plain["global_batch_size"], other["global_batch_size"]) == (4096, 8192)
    assert other["memory_by_category"]["optimizer state"] > 10 * plain["memory_by_category"]["optimizer state"]
    assert other["memory_limit_bytes"] < plain["memory_limit_bytes"]
    assert other["step_seconds"] > plain["step_seconds"]


def test_a_table_is_explained(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(model), *CLUSTER, "--ranks", "4", "--explain", "items", "--seconds", "0.5"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("items: ")
    assert "its layouts, every other table left where it is" in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_sweep_is_shown_and_drawn(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = model.with_name("sweep.png")
    words = ["plan", str(model), *CLUSTER, "--sweep", "ranks=1..4", "--seconds", "0.5"]
    assert main([*words, "--plot", str(drawn)]) == 0
    assert "Fastest:" in capsys.readouterr().out
    assert drawn.read_bytes().startswith(b"\x89PNG")
    assert main([*words, "--json"]) == 0
    assert [point["ranks"] for point in found(capsys)[0]["points"]] == [1, 2, 4]


def test_two_plans_are_compared(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for ranks in (2, 4):
        files.append(str(model.with_name(f"{ranks}.json")))
        words = ["--ranks", str(ranks), "--out", files[-1], "--pin", "users=row_wise", "--seconds", "0.5"]
        assert main(["plan", str(model), *CLUSTER, *words]) == 0
    capsys.readouterr()
    assert main(["plan", "--diff", *files]) == 0
    text = capsys.readouterr().out
    assert "Ranks 2-3 are new" in text
    assert "2 shards -> 4" in text
    assert main(["plan", "--diff", *files, "--json"]) == 0
    # Of rows dealt out over 2 ranks and then 4, half of each old shard stays where it is.
    assert found(capsys)[0]["tables"]["users"]["arriving_bytes"] == 2000000 * 32 * 4 // 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "say what to plan"),
        (["shop.yaml"], "--topology is missing: one of "),
        (["shop.yaml", "--topology", "h100x9"], "did you mean 'h100x8'?"),
        (["shap.yaml", *CLUSTER], "shap.yaml"),
        (["shop.yaml", *CLUSTER, "--ranks", "0"], "--ranks 0: must be above 0"),
        (["shop.yaml", *CLUSTER, "--batch", "-1"], "--batch -1: must be above 0"),
        (["shop.yaml", *CLUSTER, "--memory", "2"], "so nothing is left for tables"),
        (["shop.yaml", *CLUSTER, "--optimizer", "Adagard"], "did you mean 'Adagrad'?"),
        (["shop.yaml", *CLUSTER, "--ids", "20"], "shop.yaml says itself how many ids a sample has"),
        (["shop.yaml", *CLUSTER, "--ids", "many"], "write --ids FEATURE=NUMBER"),
        (["shop.yaml", *CLUSTER, "--ids", "2", "--ids", "items=3"], "not both"),
        (["shop.yaml", *CLUSTER, "--pin", "users=row_wize"], "did you mean 'row_wise'?"),
        (["shop.yaml", *CLUSTER, "--pin", "users=row_wise", "--forbid", "row_wise"], "forbidden for all tables"),
        (["shop.yaml", *CLUSTER, "--explain", "item"], "there is no such table; did you mean 'items'?"),
        (["shop.yaml", *CLUSTER, "--sweep", "8..64"], "write ranks=8..4096"),
        (["shop.yaml", *CLUSTER, "--sweep", "ranks=1..2", "--ranks", "2"], "leave --ranks out"),
        (["shop.yaml", *CLUSTER, "--sweep", "ranks=1..2", "--out", "x.json"], "--out is for one plan"),
        (["shop.yaml", *CLUSTER, "--sweep", "ranks=1..2", "--explain", "items"], "are different questions"),
        (["shop.yaml", *CLUSTER, "--plot", "x.png"], "--plot draws a sweep"),
        (["shop.yaml", *CLUSTER, "--out", "absent/x.json"], "there is no folder absent"),
        (["--diff", "absent.json", "absent.json"], "absent.json: cannot read the file"),
        (["--diff", "shop.yaml", "shop.yaml"], "shop.yaml: "),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    model: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(model.parent)
    assert main(["plan", *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("shardembed: error:") == 1
    assert expected in printed.err
