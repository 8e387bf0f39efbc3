"""`shardembed inspect`: what is shown of a checkpoint, and that `--verify` finds and names all that is damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from shardembed.cli import main
from shardembed.tables.placement import Cluster, column_wise, row_wise
from shardembed.tables.plan import Plan, resolve
from shardembed.tables.table_config import TableConfig
from tests.unit.checkpoint.saved import Writer, increment, numbered, small_checkpoint

FULL, CHANGES = "step-0000000001", "step-0000000002"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A full checkpoint and changes to it."""
    full = small_checkpoint(tmp_path / "ckpt" / FULL)
    increment(tmp_path / "ckpt" / CHANGES, tmp_path / "ckpt" / FULL, full)
    return tmp_path / "ckpt"


def planned(folder: Path, plans: tuple[dict[str, object], ...]) -> None:
    """A checkpoint with one table and `plans`."""
    writer = Writer(folder, plans=plans)
    writer.add("tables.user.weight", numbered(8, 4))
    writer.write()


def damage(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_folder_of_checkpoints_is_listed_and_the_newest_shown(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / ".saving-0000000003-abc").mkdir()
    assert main(["inspect", str(root)]) == 0
    shown = capsys.readouterr().out
    lines = [line.split() for line in shown.splitlines()]
    assert [FULL, "2026-11-24T12:00:00+00:00", "on", "2", "ranks", "4.5", "KiB"] in lines
    assert f"changes since {FULL}" in shown
    assert "step 2, saved 2026-11-24T12:00:00+00:00 on 2 ranks" in shown
    assert f"holds the rows that changed since {FULL}, which it needs" in shown
    assert ["user.weight", "50", "6", "float32", "1.2", "KiB", "5", "rows", "exp_avg,", "step_sums", "1.4", "KiB"] in lines
    assert "5 dense tensors, 219 B, optimizer state 20 B" in shown
    assert ".saving" not in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_what_holds_nan_says_so_and_what_was_saved_last_is_shown_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, lost in (("step-0000000009", ()), ("step-0000000003-r1", ("user.weight",))):
        writer = Writer(tmp_path / name, previous=None, nonfinite=lost)
        writer.add("user.weight", numbered(4, 2))
        writer.write(int(name[5:15]))
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert [each["nonfinite"] for each in found["checkpoints"]] == [[], ["user.weight"]]
    assert found["checkpoint"]["step"] == 3
    assert found["checkpoint"]["nonfinite"] == ["user.weight"]
    lines = printed.err.splitlines()
    first, last = (next(number for number, line in enumerate(lines) if name in line) for name in ("step-0000000009", "-r1"))
    assert first < last
    assert "holds inf or nan" in lines[last]
    assert "inf or nan is in 'user.weight'" in printed.err


def test_one_checkpoint_is_shown_by_its_folder_or_step(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([str(root / FULL)], [str(root), "--step", "1"]):
        assert main(["inspect", *words]) == 0
        shown = capsys.readouterr().out
        assert "step 1, saved" in shown
        assert ["item.weight", "23", "4", "bfloat16", "184", "B", "4", "-"] in [line.split() for line in shown.splitlines()]
    assert main(["inspect", str(root), "--step", "7"]) == 2
    assert "no checkpoint of step 7; there are those of steps 1, 2" in capsys.readouterr().err
    assert main(["inspect", str(root / FULL), "--step", "2"]) == 2
    assert "is the checkpoint of step 1, and not of step 2" in capsys.readouterr().err


def test_a_script_reads_one_json_object(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(root), "--json", "--verify"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert [each["step"] for each in found["checkpoints"]] == [1, 2]
    assert all(each["readable"] and each["stored_bytes"] for each in found["checkpoints"])
    held = found["checkpoint"]
    assert (held["step"], held["base"], held["world_size"], held["dense_tensors"]) == (2, FULL, 2, 5)
    assert (held["tables"]["user.weight"]["shape"], held["tables"]["user.weight"]["updated_rows"]) == ([50, 6], 5)
    assert held["tables"]["user.weight"]["state"] == ["exp_avg", "step_sums"]
    assert found["problems"] == []
    assert "step 2, saved" in printed.err


def test_the_plan_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = [TableConfig("user", 8, 4), TableConfig("item", 9, 2)]
    plan = resolve(tables, {"user": row_wise(), "item": column_wise()}, Cluster(4, 4))
    planned(tmp_path / FULL, (plan.to_json(),))
    assert main(["inspect", str(tmp_path / FULL)]) == 0
    shown = capsys.readouterr().out
    assert "plan for 4 ranks" in shown
    lines = [line.split() for line in shown.splitlines()]
    assert ["user", "row_wise", "unique", "4", "0-3"] in lines
    assert ["item", "column_wise", "bag", "2", "0-1"] in lines
    assert main(["inspect", str(tmp_path / FULL), "--json"]) == 0
    assert Plan.from_json(json.loads(capsys.readouterr().out)["checkpoint"]["plans"][0]) == plan


HUGE = 2**60
BAD_PLANS: dict[str, dict[str, object]] = {
    "another format": {"format": 99},
    "strides of an exabyte": {
        "format": 1,
        "world_size": 1,
        "tables": {
            "a": {
                "num_embeddings": HUGE,
                "embedding_dim": 1,
                "packing": "unique",
                "shards": [{"rows": [0, HUGE, HUGE - 1], "columns": [0, 1], "ranks": [0]}],
            }
        },
    },
    "no table": {"format": 1, "world_size": 1, "tables": []},
    "text": {"format": 1, "world_size": "x", "tables": {"\x1b[31m": 3}},
}


@pytest.mark.parametrize("name", BAD_PLANS)
def test_a_plan_that_cannot_be_read_does_no_harm(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    planned(tmp_path / FULL, (BAD_PLANS[name],))
    assert main(["inspect", str(tmp_path / FULL)]) == 0
    shown = capsys.readouterr().out
    assert "a plan cannot be read: " in shown
    assert "tables.user.weight" in shown
    assert "\x1b" not in shown


def test_verify_names_every_file_and_table_that_is_damaged(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(root), "--verify"]) == 0
    assert "5.8 KiB in 2 checkpoints hashed, all as it was saved" in capsys.readouterr().out
    damage(root / FULL / "rank-00001.safetensors")
    damage(root / CHANGES / "rank-00000.safetensors")
    damage(root / CHANGES / "state.json", 0)
    (root / FULL / "rank-00000.safetensors").unlink()
    (root / FULL / "notes\x1b.txt").write_text("mine")
    assert main(["inspect", str(root), "--verify"]) == 1
    shown = capsys.readouterr().out
    for says in (
        f"{root / FULL / 'rank-00000.safetensors'} is missing",
        f"{root / FULL / 'rank-00001.safetensors'}: rows ",
        f"{root / CHANGES / 'rank-00000.safetensors'}: rows ",
        f"{root / CHANGES / 'state.json'}: bytes 0 to 17 of the small state are damaged",
        f"{root / FULL / 'notes?.txt'} is not a file of this checkpoint, and is never read",
        "5 problems found in 5.8 KiB in 2 checkpoints",
    ):
        assert says in shown, says
    assert main(["inspect", str(root), "--verify", "--json"]) == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert len(problems) == 5
    assert {Path(each["folder"]).name for each in problems} == {FULL, CHANGES}
    assert {each["tensor"] for each in problems if "of '" in each["text"]} >= {"item.weight"}


def test_verify_looks_at_what_changes_stand_on_too(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(root / FULL / "rank-00001.safetensors")
    assert main(["inspect", str(root), "--step", "2", "--verify"]) == 1
    assert "1 problem found in 5.8 KiB in 2 checkpoints" in capsys.readouterr().out
    damage(root / FULL / "rank-00001.safetensors")
    assert main(["inspect", str(root / CHANGES), "--verify"]) == 0


def test_a_manifest_that_is_damaged_hides_nothing_else(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(root / FULL / "rank-00001.safetensors")
    damage(root / CHANGES / "manifest.json", 40)
    assert main(["inspect", str(root)]) == 1
    printed = capsys.readouterr()
    assert [CHANGES, "cannot", "be", "read"] in [line.split() for line in printed.out.splitlines()]
    assert f"{CHANGES}{os.sep}manifest.json" in printed.err
    assert main(["inspect", str(root), "--verify"]) == 1
    shown = capsys.readouterr().out
    assert f"{CHANGES}{os.sep}manifest.json" in shown
    assert "rank-00001.safetensors: rows" in shown
    assert "2 problems found" in shown


def test_a_folder_of_something_else_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "nowhere")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    for words in (["inspect"], ["export", "--out=out"], ["neighbors", "--table=item", "--id=1"], ["map", "--table=item"]):
        assert main([words[0], str(tmp_path), *words[1:]]) == 2
        assert "no complete checkpoint" in capsys.readouterr().err
    torch.save({}, tmp_path / "model.pt")
    assert main(["inspect", str(tmp_path)]) == 2
    assert "reads no pickles" in capsys.readouterr().err


def test_the_best_weights_of_a_run_are_looked_at_too(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = root.parent / "run"
    root.rename(run.parent / "checkpoints")
    run.mkdir()
    (run.parent / "checkpoints").rename(run / "checkpoints")
    (run / "data.json").write_text("{}")
    small_checkpoint(run / "best" / "step-0000000007")
    assert main(["inspect", str(run), "--verify"]) == 0
    assert "best/step-0000000007" in capsys.readouterr().out
    damage(next((run / "best" / "step-0000000007").glob("*.safetensors")))
    assert main(["inspect", str(run), "--verify", "--json"]) == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem["folder"] == str(run / "best" / "step-0000000007")


def test_many_tables_and_long_names_keep_to_the_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = Writer(tmp_path / FULL)
    for number in range(45):
        writer.add(f"model.{'very_' * 20}long.{number}.weight", numbered(4 + number, 2))
    writer.write()
    assert main(["inspect", str(tmp_path / FULL)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:3] == ["and", "5", "more"] for line in lines)
    assert any("..." in line and "long.44.weight" in line for line in lines)
    assert max(len(line) for line in lines if FULL not in line) <= 100
