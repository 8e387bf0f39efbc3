"""`shardembed train` without training: a dry run, the schema, the settings, and evaluation of a checkpoint with its predictions."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import yaml
from pyarrow import parquet

import shardembed as se
from shardembed.cli import failures, main
from shardembed.cli.model_workload import of_training
from shardembed.recipes import config, dry_run
from shardembed.recipes.build import CtrJob
from shardembed.recipes.data import plausible
from shardembed.recipes.tasks import SequenceTask, TwoTowerTask

CONFIGS = {path.stem: path for path in sorted((Path(__file__).parents[3] / "configs" / "train").glob("*.yaml"))}
TASKS = {"two_tower": TwoTowerTask, "sasrec": SequenceTask}
JOB = """
data:
  integers: [I1]
  categories: [C1, C2, C3]
  ids: {kind: vocabulary, min_count: 2}
  split: {kind: last, fraction: 0.25}
  generator: {rows: 2000, max_cardinality: 20}
model: {kind: dlrm, embedding_dim: 4, bottom: [4], top: [4]}
train: {global_batch_size: 100, schedule: {warmup_steps: 3, decay: linear}}
checkpoint: {every_steps: 5}
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", failures.ERROR_FILE, failures.QUIET):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "tiny.yaml"
    path.write_text(JOB + f"run_dir: {tmp_path / 'runs'}\n")
    return path


def printed(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    capsys.readouterr()
    assert main(["train", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def fits(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """The part of JSON schema that ours uses."""
    if "$ref" in schema:
        return fits(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    if "anyOf" in schema:
        return any(fits(value, one, root) for one in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        return value in [*schema.get("enum", []), *([schema["const"]] if "const" in schema else [])]
    kinds = {
        "string": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
        "null": type(None),
        "array": list,
        "object": dict,
    }
    if not isinstance(value, kinds[schema["type"]]) or (isinstance(value, bool) and schema["type"] != "boolean"):
        return False
    if isinstance(value, int | float) and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        return False
    if isinstance(value, list):
        return all(fits(one, schema.get("items", {"type": "string"}), root) for one in value)
    if isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties", False)
        return all(fits(one, known.get(key, others), root) if known.get(key, others) else False for key, one in value.items())
    return True


def test_the_schema_takes_our_files_and_refuses_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    schema = printed(capsys, "--schema")
    assert len(CONFIGS) == 10
    for path in CONFIGS.values():
        # Numbers such as 2e-3 are texts for PyYAML; what a configuration is filled up to has none.
        assert main(["train", str(path), "--print-config"]) == 0
        values = yaml.safe_load(capsys.readouterr().out)
        assert fits(values, schema, schema), path
        assert not fits({**values, "trian": {}}, schema, schema)
        assert not fits({**values, "model": {**values["model"], "kind": "dlmr"}}, schema, schema)
        assert not fits({**values, "train": {**values["train"], "epochs": 0}}, schema, schema)
        assert fits({**values, "plan": "auto"}, schema, schema)
    assert fits({"model": {"kind": "dlrm"}, "plan": {"*": {"kind": "grid", "strips": 2}, "C1": "row_wise"}}, schema, schema)
    assert fits({"model": {"kind": "dlrm"}, "data": {"path": "x"}}, schema, schema)
    assert fits({"model": {"kind": "dlrm"}, "data": {"path": ["x", "y"]}}, schema, schema)


def test_printed_settings_are_the_settings(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(job), "--print-config", "--set", "plan.C2=row_wise"]) == 0
    path = job.with_name("again.yaml")
    path.write_text(capsys.readouterr().out)
    assert config.load(path) == config.load(job, ["plan.C2=row_wise"])


def test_a_dry_run_plans_and_counts_and_leaves_nothing(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, job, "--dry-run", "--ranks", 4, "--set", "plan.C3=row_wise", "--set", "optimizer.tables.name=Adam")
    assert (found["ranks"], found["steps"], found["training_rows"]) == (4, 15, 1500)
    assert [table["cut"] for table in found["tables"].values()] == ["replicated", "replicated", "row_wise"]
    rows = [table["rows"] for table in found["tables"].values()]
    assert sum(one["weights"] for one in found["memory"]) == 4 * 4 * (4 * (rows[0] + rows[1]) + rows[2])
    assert all(one["state"] == 2 * one["weights"] for one in found["memory"])
    assert found["fullest_rank"]["bytes"] >= found["memory"][found["fullest_rank"]["rank"]]["weights"]
    assert not (job.parent / "runs").exists()
    for path, setting, tables in (
        (CONFIGS["quickstart"], "data.generator.interactions=9000", {"user", "item"}),
        (CONFIGS["sasrec"], "data.generator.users=500", {"item"}),
    ):
        assert printed(capsys, path, "--dry-run", "--ranks", 2, "--set", setting)["tables"].keys() == tables


@pytest.mark.parametrize("kind", ["dlrm", "two_tower", "sasrec"])
def test_tables_without_a_limit_are_counted_with_the_ids_of_the_data(
    job: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = job.with_name("log.csv")
    rows = [(f"u{row % 30}", f"i{row % 17}", row, row % 2) for row in range(600)]
    data.write_text("user,item,time,label\n" + "".join(f"{user},{item},{time},{label}\n" for user, item, time, label in rows))
    columns = "user: user, item: item, time: time"
    if kind == "dlrm":
        columns = "split: {kind: last}, features: [{name: user, kind: id}, {name: item, kind: id}]"
    path = job.with_name("log.yaml")
    path.write_text(f"data: {{path: {data}, {columns}}}\nmodel: {{kind: {kind}, embedding_dim: 4}}\nrun_dir: {job.parent}\n")
    found = printed(capsys, path, "--dry-run", "--ranks", 2)
    ids = 17 if kind == "sasrec" else 30 + 17
    assert sum(rank["weights"] for rank in found["memory"]) == pytest.approx(ids * 4 * 4, abs=2 * 4 * 4), "whole rows a rank"
    assert found["fullest_rank"]["weights"] == pytest.approx(ids * 4 * 4 / 2)
    assert main(["train", str(path), "--dry-run"]) == 0
    assert f"tables without a limit count here with the {ids} ids of the data" in capsys.readouterr().out
    assert sum(load.ids or 0 for load in of_training(path, ranks=2).tables) == ids


def test_a_dry_run_shows_a_plan_that_cannot_be(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(job), "--dry-run", "--ranks", "2", "--set", "plan.C1={kind: table_wise, rank: 5}"]) == 2
    assert "table 'C1'" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["two_tower", "sasrec"])
def test_ids_far_above_the_number_of_interactions_are_told_before_tables_are_made(
    job: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = job.with_name("taken.tsv")
    data.write_text(
        "user\titem\ttimestamp\n" + "".join(f"{user}\t{item}\t{item}\n" for user in range(5) for item in (1, 2, 3, 2400 + user))
    )
    path = job.with_name("ranking.yaml")
    path.write_text(
        f"data: {{path: {data}, user: user, item: item, ids: numbered}}\nmodel: {{kind: {kind}, embedding_dim: 4}}\n"
        f"run_dir: {job.parent / 'runs'}"
    )
    told = "warning: item ids go to 2,404, but there are only 20 interactions: a table has a row for every id; number them from 0\n"
    assert main(["train", str(path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.count(told) == out.count("warning") == 1
    with mock.patch.object(TASKS[kind], "build", side_effect=Crash), pytest.raises(Crash):
        main(["train", str(path)])
    assert told in capsys.readouterr().out
    data.write_text(data.read_text().replace("\t240", "\t19"))
    assert main(["train", str(path), "--dry-run"]) == 0
    assert "warning" not in capsys.readouterr().out


def test_a_dry_run_says_when_a_job_does_not_fit_the_memory_that_is_free(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    listing = job.with_name("meminfo")
    monkeypatch.setattr(plausible, "MEMORY", listing)
    monkeypatch.setattr(dry_run, "default_device", lambda: dry_run.CPU)
    for free, told in ((1, True), (1 << 40, False)):
        listing.write_text(f"MemTotal: 9 kB\nMemAvailable: {free} kB\n")
        assert main(["train", str(job), "--dry-run", "--ranks", "2"]) == 0
        out = capsys.readouterr().out
        assert ("but this machine has 1.0 KiB of memory free: the job does not fit on it" in out) is told
        assert ("warning: the 2 ranks together need " in out) is told


class Crash(BaseException):
    """Nothing of the command line's catches it."""


def test_a_run_is_resumed_evaluated_and_its_predictions_written(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = printed(capsys, job, "--set", f"run_dir={job.parent / 'whole'}")
    made = CtrJob._batch

    def batch(self: CtrJob, part: Any, step: int) -> Any:
        if step == 8:
            raise Crash
        return made(self, part, step)

    with mock.patch.object(CtrJob, "_batch", batch), pytest.raises(Crash):
        main(["train", str(job)])
    trained = printed(capsys, job)
    folder = Path(trained["run_dir"])
    for name in ("losses", "auc", "normalized_entropy", "steps"):
        assert trained[name] == whole[name], name
    assert len(list((job.parent / "runs").iterdir())) == 1
    vocabulary = se.Vocabulary.load(folder / "vocabularies" / "C3.txt")
    assert min(vocabulary.counts) >= 2
    found = printed(capsys, job, "--evaluate", folder, "--predict", job.parent / "out")
    for name in ("auc", "normalized_entropy", "calibration", "evaluated_rows"):
        assert found[name] == trained[name], name
    table = parquet.read_table(job.parent / "out")
    assert table.column("row").to_pylist() == list(range(1500, 2000))
    predictions, labels = (table.column(name).to_numpy() for name in ("prediction", "label"))
    assert predictions.mean() / labels.mean() == pytest.approx(trained["calibration"], rel=1e-5)
    above = np.sign(predictions[labels == 1][:, None] - predictions[labels == 0][None])
    assert (above.mean() + 1) / 2 == pytest.approx(trained["auc"], abs=1e-4)
    assert main(["train", str(job), "--evaluate", str(folder), "--predict", str(job.parent / "out")]) == 2
    assert "holds predictions already" in capsys.readouterr().err


def test_other_data_are_evaluated_by_the_vocabularies_of_the_run(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(printed(capsys, job, "--max-steps", 1)["run_dir"])
    other = ["--set", "data.generator.max_cardinality=60", "--set", "data.generator.rows=4000"]
    for path in (folder, folder / "checkpoints", se.newest_checkpoint(folder / "checkpoints")):
        assert printed(capsys, job, "--evaluate", path, *other)["evaluated_rows"] == 1000
    alone = (folder / "checkpoints").rename(job.parent / "alone")  # nothing there says what rows stand for
    assert main(["train", str(job), "--evaluate", str(alone), *other]) == 2
    said = capsys.readouterr().err
    assert re.search(
        r"--evaluate: the tables of this job do not fit those of .*alone.*: table 'C\d' has \d+ rows here and \d+ in", said
    )
    assert said.endswith("leave that as it was in training, and give new rows as data.validation_path\n")
    assert len(said.splitlines()) == 1


def test_a_checkpoint_of_other_tables_is_refused_where_they_take_any_id(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Such tables have no number of rows to compare: what is wrong is said by the checkpoint itself."""
    log = job.parent / "log.csv"
    log.write_text("user_id,item_id\n" + "".join(f"u{row % 7},i{row * 5 % 11}\n" for row in range(60)))
    ranking = job.parent / "ranking.yaml"
    ranking.write_text(
        f"data: {{path: {log}}}\nmodel: {{embedding_dim: 4}}\nlog: {{page: false}}\nrun_dir: {job.parent / 'runs'}\n"
    )
    folder = printed(capsys, ranking, "--max-steps", 1)["run_dir"]
    assert main(["train", str(ranking), "--evaluate", str(folder), "--set", "model.embedding_dim=8"]) == 1
    said = capsys.readouterr().err
    assert "do not fit those" not in said
    assert "is [1048576, 8] in the model and [11, 4] in the checkpoint" in said


def test_a_rank_of_a_job_leaves_its_process_group(job: Path) -> None:
    """In a process of its own, which a rank ties to whoever started it."""
    ends = f"import sys; from shardembed.cli import main; assert main(['train', {str(job)!r}, '--max-steps', '1']) == 0; "
    ends += "import torch.distributed as dist; sys.exit(dist.is_initialized())"
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run([sys.executable, "-c", ends], env={**os.environ, **rank}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_evaluation_of_rows_that_were_trained_on_is_told(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(printed(capsys, job, "--max-steps", 1)["run_dir"])
    assert main(["train", str(job), "--evaluate", str(folder)]) == 0
    assert capsys.readouterr().err == ""
    assert main(["train", str(job), "--evaluate", str(folder), "--set", "data.split.fraction=0.5"]) == 0
    assert capsys.readouterr().err == (
        "shardembed: warning: the run was trained with data.split kind last, fraction 0.25, seed 0: rows that it was trained on "
        "may be among those evaluated\n"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--predict", "x"], "--predict goes with --evaluate CHECKPOINT"),
        ([CONFIGS["quickstart"], "--evaluate", "x", "--predict", "y"], "a two-tower model ranks items"),
        ([CONFIGS["sasrec"], "--evaluate", "x", "--predict", "y"], "a SASRec model ranks items"),
        (None, "which configuration?"),
    ],
)
def test_options_that_do_not_go_together_are_named(
    job: Path, words: list[Any] | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [] if words is None else words if len(words) > 2 else [job, *words]
    assert main(["train", *map(str, words)]) == 2
    assert message in capsys.readouterr().err


def test_jobs_that_come_along_go_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "quickstart", "--print-config"]) == 0
    assert "name: quickstart" in capsys.readouterr().out
    assert main(["train", "quickstrat"]) == 2
    said = capsys.readouterr().err
    assert "'quickstrat' is neither a file nor one of the jobs that come along; did you mean 'quickstart'?" in said
    assert main(["train", "absent.yaml"]) == 2
    assert "absent.yaml: there is no such file; those that come along go by name: " in capsys.readouterr().err
