"""The command line, in this process: what it prints, where, and its exit codes."""

from __future__ import annotations

import ctypes
import json
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from shardembed.cli import failures, launch, main
from shardembed.errors import CollectiveError, DataError, PlanError
from shardembed.recipes import config
from shardembed.tables.plan import Plan

TINY = """
data:
  generator: {users: 100, items: 50, interactions: 900, tastes: 5}
model: {embedding_dim: 8, negatives: 16}
train: {epochs: 3, global_batch_size: 100}
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RANK", "WORLD_SIZE", failures.ERROR_FILE):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY + f"run_dir: {tmp_path / 'runs'}\n")
    return path


def test_train_prints_one_json_line_and_leaves_a_run_folder(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(job), "--json", "--set", "train.epochs=2"]) == 0
    printed = capsys.readouterr()
    summary = json.loads(printed.out)
    assert {"recall@20", "popularity_recall@20", "ndcg@20", "popularity_ndcg@20", "samples_per_second"} <= set(summary)
    assert (summary["ranks"], summary["steps"], len(summary["losses"])) == (1, 14, 14)
    assert "model plan" in printed.err
    folder = Path(summary["run_dir"])
    assert folder.parent == job.parent / "runs"
    assert folder.name.startswith("tiny-")
    assert config.load(folder / "config.yaml").train.epochs == 2
    assert [table.name for table in Plan.load(folder / "plan.json").tables] == ["user", "item"]
    first, *records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert first["settings"]["train.epochs"] == 2
    assert [record.pop("step") for record in records if "evaluation" in record] == [7, 14]
    records = [record for record in records if "evaluation" not in record]
    assert [record["loss"] for record in records[:-1]] == summary["losses"]
    assert [record["step"] for record in records[:-1]] == list(range(1, 15))
    assert records[6]["epoch"] == 1
    assert records[7]["epoch"] == 2
    assert records[-1]["recall@20"] == summary["recall@20"]


def test_two_runs_of_one_second_have_two_folders(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = set()
    for _ in range(2):
        assert main(["train", str(job), "--json", "--max-steps", "1"]) == 0
        summary = json.loads(capsys.readouterr().out)
        folders.add(summary["run_dir"])
        assert summary["steps"] == 1
    assert len(folders) == 2


def test_what_is_shown_fits_eighty_columns(job: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(job.parent)  # paths are shown whole, so they must be short for the rest to be judged
    assert main(["train", job.name, "--max-steps", "2", "--set", "run_dir=runs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("popularity") for line in lines)
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_train_reads_own_files(job: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    users, items = np.repeat(np.arange(20), 5), np.arange(100) % 13
    path = job.parent / f"taken{suffix}"
    if suffix == ".csv":
        path.write_text("\n".join(["who,what", *(f"{user},{item}" for user, item in zip(users, items, strict=True))]) + "\n")
    else:
        parquet.write_table(pa.table({"who": users, "what": items}), path)
    words = ["--set", f"data.path={path}", "--set", "data.user=who", "--set", "data.item=what", "--max-steps", "2"]
    assert main(["train", str(job), "--json", *words]) == 0
    printed = capsys.readouterr()
    summary = json.loads(printed.out)
    assert (summary["steps"], summary["evaluated_users"]) == (2, 20)
    assert "100 interactions of 20 users and 13 items; 20 held out" in printed.err


def test_rows_that_were_left_out_are_reported_and_in_the_summary(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = job.parent / "bad.tsv"
    pairs = [f"{user}\t{item}\n" for user in range(20) for item in range(5)]
    path.write_text("user_id\titem_id\n" + "".join(pairs) + "1\ttwo\n3\n")
    assert main(["train", str(job), "--json", "--max-steps", "2", "--set", f"data.path={path}", "--set", "data.ids=numbered"]) == 2
    complained_once(capsys, f"{path}:102: column 'item_id': 'two' is not an integer")
    words = ["--set", f"data.path={path}", "--set", "data.on_bad_row=skip", "--set", "data.ids=numbered"]
    assert main(["train", str(job), "--json", "--max-steps", "2", *words]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["dropped_rows"] == {"not an integer": 1, "wrong number of fields": 1}
    assert printed.err.count("2 of 102 rows dropped: 1 not an integer, 1 wrong number of fields") == 1
    assert f"  {path}:103: 1 field(s), but the header line has 2" in printed.err.splitlines()


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--set", "train.epoch=3"], "--set train.epoch=3: unknown key 'epoch' in train; did you mean 'epochs'?"),
        (["--set", "train.epochs"], "--set train.epochs: write it as section.key=value"),
        (["--max-steps", "0"], "train.max_steps should be greater than or equal to 1, not 0"),
        (["--set", "data.path=absent.csv"], "absent.csv: cannot read the file"),
        (["--set", "plan.item={kind: table_wise, rank: 3}"], "rank 3"),
        (["--ranks", "0"], "the number of ranks must be at least 1"),
        (["--set", "run_dir=/dev/null/x"], "set run_dir to another folder"),
    ],
)
def test_wrong_input_is_one_message_and_exit_code_2(
    job: Path, extra: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(job), *extra]) == 2
    complained_once(capsys, expected)


@pytest.mark.parametrize(
    ("appended", "expected"),
    [
        ("evaluation: {k: 20}\n", "tiny.yaml:7:1: unknown key 'evaluation'; did you mean 'eval'?"),
        ("eval: {k: many}\n", "tiny.yaml:7:8: eval.k should be a valid integer, not 'many'"),
        ("eval: &cut {k: 20}\n", "tiny.yaml:7:7: &cut: anchors and aliases are not read"),
        (
            "wire_dtype: bfloat\n",
            "tiny.yaml:7:1: wire_dtype: 'bfloat' is not one of float32, bfloat16, float16, int8; did you mean 'bfloat16'?",
        ),
    ],
)
def test_a_mistake_in_the_file_is_placed_before_any_rank_starts(
    job: Path, appended: str, expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(launch, "run_ranks")
    job.write_text(job.read_text() + appended)
    assert main(["train", str(job), "--ranks", "2"]) == 2
    complained_once(capsys, expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "f.csv: cannot read the file: No such file or directory"),
        (
            "usr_id,item_id\n1,2\n",
            "f.csv: there is no column 'user_id' (data.user); did you mean 'usr_id'? The columns are: usr_id, item_id",
        ),
    ],
)
def test_data_that_is_not_there_is_told_before_any_rank_starts(
    job: Path, text: str | None, expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(launch, "run_ranks")
    path = job.parent / "f.csv"
    if text is not None:
        path.write_text(text)
    assert main(["train", str(job), "--ranks", "2", "--set", f"data.path={path}"]) == 2
    complained_once(capsys, expected)


def complained_once(capsys: pytest.CaptureFixture[str], expected: str) -> None:
    text = capsys.readouterr().err
    assert text.count("shardembed: error: ") == 1
    assert expected in text
    assert "Traceback" not in text


def test_wrong_arguments_and_help_exit_as_argparse_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--max-stepz"])
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "train and evaluate a model" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    assert "--max-steps" in capsys.readouterr().out


def test_a_rank_of_another_job_size_is_refused(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["train", str(job), "--ranks", "2"]) == 2
    assert "belongs to a job of 4 ranks already" in capsys.readouterr().err


class Failure:
    """What torchrun's launcher keeps of a rank that failed."""

    def __init__(self, exitcode: int, timestamp: int, data: dict[str, object] | None) -> None:
        self.exitcode, self.timestamp, self.error_file_data = exitcode, timestamp, data

    def signal_name(self) -> str:
        return "SIGKILL"


def test_a_launched_rank_hands_its_failure_to_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left = []
    for rank, error in enumerate([PlanError("first"), CollectiveError("second"), ZeroDivisionError("bug")]):
        monkeypatch.setenv(failures.ERROR_FILE, str(tmp_path / f"{rank}.json"))
        monkeypatch.setenv(failures.QUIET, "1")
        monkeypatch.setenv("RANK", str(rank))
        left.append(failures.report(error))
    assert left == [2, 1, 1]
    assert capsys.readouterr().err == ""
    told = {rank: Failure(left[rank], 5, json.loads((tmp_path / f"{rank}.json").read_text())) for rank in range(3)}
    assert failures.first_of({2: told[2], 1: told[1], 0: told[0]}) == failures.Told("first", 2)
    other = failures.first_of({2: told[2]})
    assert other.code == 1
    assert other.message.startswith("unexpected error on rank 2\n")
    assert other.message.endswith("ZeroDivisionError: bug")


def test_a_rank_that_was_killed_is_told() -> None:
    told = failures.first_of({1: Failure(-9, 3, {}), 0: Failure(-15, 4, None)})
    assert (told.code, told.message) == (1, "rank 1 was killed by SIGKILL")
    assert str(told).startswith("rank 1 was killed by SIGKILL; if memory ran out")


def test_exit_codes_tell_input_from_other_failures() -> None:
    assert failures.exit_code(DataError("x")) == 2
    assert failures.exit_code(CollectiveError("x")) == 1


def test_ctrl_c_is_not_lost_in_a_callback_of_c_code(capsys: pytest.CaptureFixture[str]) -> None:
    """As Numba's compiler calls back: there an exception cannot be raised, only printed."""

    @ctypes.CFUNCTYPE(None)
    def interrupted() -> None:
        raise KeyboardInterrupt

    def works_on() -> None:
        interrupted()
        threading.Event().wait(60)

    with failures.interrupts_arrive(), pytest.raises(KeyboardInterrupt):
        works_on()
    assert capsys.readouterr().err == ""


def test_ctrl_c_at_the_very_end_of_a_command_is_not_left_to_the_interpreter() -> None:
    """What it asks for again would come while Python ends, and end the process by the signal."""

    @ctypes.CFUNCTYPE(None)
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), failures.interrupts_arrive():
        interrupted()  # and the command is through
    waiting = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer) and thread.is_alive()]
    for thread in waiting:
        thread.join()  # a cancelled one ends at once, and interrupts nobody
    assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]


def test_a_misspelt_command_is_told_with_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian", "job.yaml"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("shardembed: error: 'trian' is not a command; did you mean 'train'? (commands: plan, bench, ")
    assert main(["xyzzy"]) == 2
    assert "did you mean" not in capsys.readouterr().err
