"""The page of a run: what its numbers are made of, that it stands alone, and that a run has one whatever became of it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any
from unittest import mock
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import nn

from shardembed.cli import failures, main
from shardembed.embeddings.of_run import CHECKPOINTS
from shardembed.inputs.ids import IdBatch
from shardembed.planner import words
from shardembed.recipes import curves, id_sample, quality_sections, recorded, reliability, run_page, series, verdict
from shardembed.recipes.build import CtrJob
from shardembed.recipes.id_sample import IdSample, statistics
from shardembed.recipes.run_folder import DATA, METRICS, OBSERVED, PAGE, SCALARS, SUMMARY
from shardembed.tables.plan import Plan
from shardembed.tables.table_config import Feature
from tests.unit.pages import stands_alone

JOB = """
data:
  integers: [I1]
  categories: [C1, "<C&2>"]
  ids: {kind: hash, num_embeddings: 50}
  generator: {rows: 2000, max_cardinality: 20}
model: {kind: dlrm, embedding_dim: 4, bottom: [4], top: [4]}
train: {global_batch_size: 100}
checkpoint: {every_steps: 6}
eval: {every_steps: 4}
"""
STEPS = 18


class Crash(BaseException):
    """Nothing of the command line's catches it."""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", failures.ERROR_FILE, failures.QUIET):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "tiny.yaml"
    path.write_text(JOB + f"run_dir: {tmp_path / 'runs'}\n")
    return path


def interrupted(job: Path, step: int, *words: str) -> Path:
    """Run the job up to `step`; returns its folder."""
    made = CtrJob._batch

    def batch(self: CtrJob, part: Any, number: int) -> Any:
        if number == step:
            raise Crash
        return made(self, part, number)

    with mock.patch.object(CtrJob, "_batch", batch), pytest.raises(Crash):
        main(["train", str(job), *words])
    (folder,) = (job.parent / "runs").iterdir()
    return folder


def trained(job: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[dict[str, Any], str]:
    """The summary, and what was said."""
    capsys.readouterr()
    assert main(["train", str(job), "--json", *words]) == 0
    printed = capsys.readouterr()
    return json.loads(printed.out), printed.err


def test_a_run_ends_with_a_page_of_its_numbers(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary, said = trained(job, capsys)
    folder = Path(summary["run_dir"])
    assert f"page: {folder / PAGE}" in said.splitlines()
    text = (folder / PAGE).read_text()
    stands_alone(text)
    observed = json.loads((folder / OBSERVED).read_text())
    look = observed["look"]
    assert (look["step"], look["profile"]["steps"]) == (STEPS, 2)  # an evaluation came after step 16
    assert look["profile"]["loading"] > 0
    weights = look["memory"]["categories"]["weights"]
    assert weights["actual"] == weights["planned"] == 2 * 50 * 4 * 4
    plan = Plan.load(folder / "plan.json")
    shown = [
        f"finished after {STEPS} steps",
        "DLRM on 1 rank",
        f"{summary['auc']:.4f}",
        f"plan {plan.hash}",
        "<code>&lt;C&amp;2&gt;</code>",
        "50 x 4",
        *look["profile"]["stages"],
        words.duration(look["profile"]["seconds"]),
        "Row 0 of a table is for ids that are missing.",
        "numba" if "numba" in observed["starts"][0]["kernels"] else "reference",
        "every_steps: 6",
    ]
    for each in shown:
        assert each in text, f"{each} is not on the page"
    assert (
        text.index("How good the model is") < text.index("<h2>Result") < text.index("How it was sharded") < text.index("<h2>Plan")
    )
    assert summary["normalized_entropy"] > 1 > summary["auc"] > 0.5, "so few steps teach which is likelier, and no chances"
    first, *_ = verdict.judged(recorded.read(folder))
    assert f"<b>{first.title}</b> {first.said}" in text
    assert first.title.startswith("The model is not better than")
    assert "the share of clicks" in first.title
    # What others reach is drawn beside the model's, and the share of clicks, which is the same each time, is not.
    lower = [f"{name} in validation, lower is better" for name in ("normalized_entropy", "log_loss")]
    drawn = ["training loss", "auc in validation, higher is better", "calibration in validation, 1 is right", *lower]
    assert sorted(re.findall(r"<figcaption>([^<]*)", text)) == sorted([*drawn, reliability.NAME])
    assert ">generator</text>" in text
    assert ">logistic</text>" in text
    auc = text[text.index('aria-label="auc ') :].partition("</svg>")[0]
    assert auc.count("<circle") == 5 + 2 + 2, "the evaluation at the end is a point too, and what is always the same has two ends"
    bins = summary["calibration_bins"]
    assert sum(bins["rows"]) == summary["evaluated_rows"]
    clicks = sum(share * rows for share, rows in zip(bins["observed"], bins["rows"], strict=True))
    assert clicks == pytest.approx(summary["click_rate"] * summary["evaluated_rows"])
    plot = text[text.index(f'aria-label="{reliability.NAME}"') :].partition("</svg>")[0]
    assert plot.count("<circle") == len(bins["rows"])


def run_with(folder: Path, evaluations: list[dict[str, float]], losses: list[float], **summary: Any) -> str:
    """The page of a run of ten steps and an evaluation an epoch."""
    lines: list[dict[str, Any]] = []
    for epoch, (evaluation, loss) in enumerate(zip(evaluations, losses, strict=True), 1):
        lines += [{"step": 10 * epoch - 9 + step, "epoch": epoch, "loss": loss} for step in range(10)]
        lines.append({"step": 10 * epoch, "evaluation": evaluation})
    folder.mkdir(exist_ok=True)
    (folder / METRICS).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    found = {**evaluations[-1], "steps": 10 * len(losses), **summary}
    (folder / SUMMARY).write_text(json.dumps(found))
    run = recorded.read(folder)
    assert not run.unread
    text = run_page.render(run)
    stands_alone(text)
    return text


def test_a_model_that_is_not_better_than_what_costs_nothing_is_told_first(tmp_path: Path) -> None:
    found = {"recall@10": 0.2, "popularity_recall@10": 0.25, "ndcg@10": 0.3, "popularity_ndcg@10": 0.1}
    text = run_with(tmp_path, [{"recall@10": 0.1}, found], [2.0, 1.0])
    said = "The model is not better than popular items.</b> recall@10 0.2000, and popular items 0.2500. Before"
    assert said in text
    assert text.index(said) < text.index("<figure>")
    assert "It overfits" not in text
    assert ">popularity</text>" in text
    assert ">epoch 2</text>" in text
    assert "baseline; the model has 0.80 times as much" in text
    many = {"auc": 0.5} | {f"base{number}_auc": 0.6 for number in range(50)}
    text = run_with(tmp_path, [many], [1.0])
    assert "The model is not better than base0, base1, base2 and 47 more.</b> auc 0.5000, and base0 0.6000;" in text
    assert "; and 47 more. Before it is used" in text
    text = run_with(tmp_path, [{"x": 0.1}], [1.0])
    assert "No baseline." in text
    assert "It was evaluated once, at the end." in text


def test_inspect_says_it_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "r"
    run_with(folder, [{"auc": value, "log_loss": 0.3, "base_log_loss": 0.2} for value in (0.7, 0.8, 0.75)], [3.0, 2.0, 1.0])
    (folder / CHECKPOINTS).mkdir()
    (folder / DATA).write_text("{}")
    assert main(["inspect", str(folder), "--json"]) == 0
    printed = capsys.readouterr()
    said = " ".join(printed.err.split())
    assert "The model is not better than the share of clicks. log_loss 0.3000, and the share of clicks 0.2000." in said
    assert "It overfits. auc was best at step 20" in said
    assert json.loads(printed.out)["not_better_than"] == ["base_log_loss"]


def test_a_run_that_overfits_is_told_with_its_steps(tmp_path: Path) -> None:
    evaluations = [{"auc": value, "logistic_auc": 0.6} for value in (0.7, 0.8, 0.75)]
    text = run_with(tmp_path, evaluations, [3.0, 2.0, 1.0])
    assert "The model is better than logistic regression:</b> auc 0.7500, and logistic regression 0.6000." in text
    said = "auc was best at step 20 with 0.8000 and is 0.7500 at step 30, while the training loss went on falling, from 2.0000 to 1"
    assert said in text
    kept = run_with(tmp_path, evaluations, [3.0, 2.0, 1.0], auc=0.8, best_step=20)
    assert said in kept, "the last weights do, though the best are kept"
    assert "The weights of step 20 were kept" in kept
    assert "the weights of step 20; higher is better" in kept
    assert "auc 0.8000, and" in kept
    assert "were kept" not in text


def test_a_baseline_on_other_rows_than_the_curve_is_not_drawn_in_it(tmp_path: Path) -> None:
    """As where evaluations during training are of rows for validation, and the result is of the test."""
    evaluations = [{"auc": value, "logistic_auc": 0.6} for value in (0.7, 0.8)]
    run_with(tmp_path, evaluations, [3.0, 2.0], auc=0.75, logistic_auc=0.65)
    run = recorded.read(tmp_path)
    drawn = {line.name: [point.mean for point in line.points] for line in quality_sections.lines_of(run, "auc")}
    assert drawn == {"auc": [0.7, 0.8], "logistic": [0.6, 0.6]}
    assert run.results == {"auc": 0.75, "logistic_auc": 0.65}


def test_a_page_with_nothing_evaluated_says_so(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"step": 1, "epoch": 1, "loss": 0.5}\n')
    text = run_page.render(recorded.read(tmp_path))
    stands_alone(text)
    assert "The model has not been evaluated yet" in text
    assert "No baseline" not in text


@pytest.mark.parametrize(
    "bins", [{"predicted": [0.5], "observed": [2.0], "rows": [1]}, {"predicted": [], "observed": [], "rows": [1]}, 3]
)
def test_bins_that_no_job_writes_are_not_read(tmp_path: Path, bins: Any) -> None:
    (tmp_path / SUMMARY).write_text(json.dumps({"steps": 3, "auc": 0.5, "calibration_bins": bins}))
    run = recorded.read(tmp_path)
    assert "calibration_bins" in run.unread[0]
    assert "Not read" in run_page.render(run)


def test_ids_are_those_of_training_alone(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary, _ = trained(job, capsys)
    ids = json.loads((Path(summary["run_dir"]) / OBSERVED).read_text())["look"]["ids"]
    rows = 2000 - summary["evaluated_rows"]
    for one in ids.values():
        assert one["lookups"] == rows  # fewer than a sample holds
        assert sum(one["ids_by_hits"]) == one["distinct"] <= 50
        assert sum(one["lookups_by_hits"]) == one["lookups"]
        assert 0 < one["top"]["1"] < one["top"]["10"] <= one["top"]["100"] == 1


def test_an_interrupted_run_has_a_page_by_inspect_and_a_resumed_one_all_of_it(
    job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, _ = trained(job, capsys, "--set", f"run_dir={job.parent / 'whole'}")
    folder = interrupted(job, 14)
    assert not (folder / PAGE).exists()
    capsys.readouterr()
    assert main(["inspect", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "unfinished, at step 12 of 18; its newest checkpoint is step-0000000012" in said
    assert max(map(len, said.splitlines()[:-1])) <= 100
    text = (folder / PAGE).read_text()
    stands_alone(text)
    assert "Result so far" in text
    assert "12 steps" in text or "up to 12" in text
    resumed, _ = trained(job, capsys)
    assert resumed["run_dir"] == str(folder)
    assert resumed["auc"] == whole["auc"]
    stands_alone((folder / PAGE).read_text())
    found, expected = (series.read(Path(each) / METRICS) for each in (folder, whole["run_dir"]))
    assert found == expected
    assert [point.step for point in found.loss.points] == list(range(1, STEPS + 1))
    assert [point.step for point in found.metrics["auc"].points] == [4, 8, 12, 16, STEPS]
    observed = json.loads((folder / OBSERVED).read_text())
    assert [start["step"] for start in observed["starts"]] == [0, 12]
    assert main(["inspect", str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["finished"], told["steps"], told["results"]["auc"]) == (True, STEPS, resumed["auc"])
    assert [start["ranks"] for start in told["starts"]] == [1, 1]
    assert main(["inspect", str(folder), "--verify"]) == 0
    assert "hashed, all as it was saved" in capsys.readouterr().out
    assert main(["inspect", str(folder), "--step", "18"]) == 0
    assert "step 18, saved" in capsys.readouterr().out


def test_what_cannot_be_read_is_left_out_of_the_page(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = interrupted(job, 14)
    for name in ("plan.json", "config.yaml", OBSERVED):
        (folder / name).write_text("{")
    with open(folder / METRICS, "a") as file:
        file.write('{"step": 13, "lo')
    assert main(["inspect", str(folder)]) == 0
    assert "unfinished, at step 12; its newest" in capsys.readouterr().out
    text = (folder / PAGE).read_text()
    stands_alone(text)
    assert "Not recorded" in text


def test_a_page_that_cannot_be_written_ends_nothing(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.object(run_page, "publish", side_effect=OSError(28, "No space left on device")):
        summary, said = trained(job, capsys)
        assert "page: cannot be written: No space left on device" in said
        assert main(["inspect", summary["run_dir"]]) == 2
    assert "cannot be written: No space left on device" in capsys.readouterr().err


def test_nothing_is_watched_where_no_page_is_wanted_and_the_numbers_are_the_same(
    job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_page, _ = trained(job, capsys)
    without, said = trained(job, capsys, "--set", "log.page=false")
    assert "page: none, since log.page is false" in said
    assert not (Path(without["run_dir"]) / PAGE).exists()
    assert json.loads((Path(without["run_dir"]) / OBSERVED).read_text())["look"] is None
    for name in ("losses", "auc", "log_loss"):
        assert without[name] == with_page[name]


def test_tensorboard_has_every_step_once_also_of_a_resumed_run(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = interrupted(job, 14, "--set", "log.tensorboard=true")
    summary, _ = trained(job, capsys, "--set", "log.tensorboard=true")
    assert summary["run_dir"] == str(folder)
    events = EventAccumulator(str(folder / SCALARS), size_guidance={"scalars": 0}).Reload()
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == list(range(1, STEPS + 1))
    assert [event.value for event in losses] == pytest.approx(summary["losses"], rel=1e-6)
    assert [event.step for event in events.Scalars("eval/auc")] == [4, 8, 12, 16, STEPS]
    assert events.Scalars("learning rate/tables")[-1].value == pytest.approx(0.1)
    assert events.Scalars("learning rate/dense")[-1].value == pytest.approx(1e-3)


def test_without_tensorboard_the_extra_and_the_doctor_are_named_before_a_rank_starts(
    job: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorboard", None)
    assert main(["train", str(job), "--ranks", "2", "--set", "log.tensorboard=true"]) == 1
    said = capsys.readouterr().err
    assert "log.tensorboard: true needs tensorboard: pip install 'shardembed[tensorboard]'; `shardembed doctor` shows" in said
    assert not (job.parent / "runs").exists()


def test_statistics_count_what_was_sampled() -> None:
    ids = np.repeat([0, 7, 3, 9], [1, 3, 8, 4])
    found = statistics(ids)
    assert (found["lookups"], found["distinct"], found["reserved"]) == (16, 4, 1 / 16)
    assert found["top"] == {"1": 0.5, "10": 1.0, "100": 1.0, "1000": 1.0}
    assert found["ids_by_hits"] == [1, 1, 1, 1]  # once, 2 to 3 times, 4 to 7, 8 to 15
    assert found["lookups_by_hits"] == [1, 3, 4, 8]


def test_a_sample_is_bounded_and_spread_over_the_whole_run() -> None:
    module = nn.Identity()
    sample = IdSample(module, [Feature("a", 0, None)])
    for step in range(1000):
        with sample.watching():
            module({"a": torch.full((3 * id_sample.IDS,), step)})
        module({"a": torch.full((5,), -1)})  # not of a training step
    kept = torch.cat(sample._parts["a"])
    assert len(kept) <= id_sample.BATCHES * id_sample.IDS
    steps = kept.unique()
    assert id_sample.BATCHES // 2 <= len(steps) <= id_sample.BATCHES
    assert steps.diff().unique().tolist() == [16]
    assert steps[0] == 0
    assert sample.found()["a"]["distinct"] == len(steps)
    sample.close()
    module({"a": torch.zeros(3)})


@pytest.mark.parametrize("kind", ["tensor", "bags", "nested", "batch"])
def test_ids_are_found_in_every_form_of_a_batch(kind: str) -> None:
    module, features = nn.Identity(), [Feature("a", 0, "sum")]
    sample = IdSample(module, features)
    ids, offsets = torch.tensor([4, 5, 5]), torch.tensor([0, 1, 3])
    given: Any = {
        "tensor": {"a": ids},
        "bags": {"a": (ids, offsets)},
        "nested": {"a": torch.nested.nested_tensor_from_jagged(ids, offsets)},
        "batch": IdBatch.of({"a": (ids, offsets)}, features),
    }[kind]
    with sample.watching():
        module(given)
    assert sample.found()["a"]["lookups_by_hits"] == [1, 2]


def test_curves_keep_bounded_points_and_exact_means() -> None:
    found = series.Series()
    values = np.sin(np.arange(10_007)) + np.arange(10_007) / 1000
    for step, value in enumerate(values.tolist(), 1):
        found.add(step, value)
    found.add(10_008, math.nan)
    assert series.POINTS <= len(found.points) <= 2 * series.POINTS
    assert found.strange == 1
    assert sum(point.count for point in found.points) == len(values)
    assert sum(point.total for point in found.points) == pytest.approx(values.sum())
    tail = found.tail(20)
    assert 20 <= tail.count < 20 + found.points[0].count
    assert tail.mean == pytest.approx(values[-tail.count :].mean())
    first = 0
    for point in found.points:
        part = values[first : first + point.count]
        assert (point.step, point.low, point.high) == (first + len(part), part.min(), part.max())
        first += point.count


@pytest.mark.parametrize("values", [[0.5], [0.25, 0.25], [-3e-7, 2e-7, 1e-7], [1e9, 2.5e9], [0.7, 0.6925, 0.69]])
def test_a_chart_has_round_ticks_around_its_values(values: list[float]) -> None:
    points = [series.Point(10 * step, 1, value, value, value) for step, value in enumerate(values, 1)]
    text = curves.chart([curves.Line("a < b", points), curves.Line("other", points)], "a & b")
    drawn = ElementTree.fromstring(text)
    said = [each.text or "" for each in drawn.iter("text")]
    assert said[-2:] == ["a < b", "other"]
    places = [float(each.get("y", "0")) for each in list(drawn.iter("text"))[-2:]]
    assert abs(places[0] - places[1]) >= curves.TEXT  # named without overlap, though the lines lie on each other
    for path in drawn.iter("path"):
        numbers = [float(number) for number in re.findall(r"-?\d+\.?\d*", path.get("d", ""))]
        assert min(numbers) >= 0
        assert max(numbers) <= curves.WIDTH
    ticks = [float(each.replace(",", "")) for each in said[: said.index("step")] if re.fullmatch(r"-?[\d.,]+(e[+-]?\d+)?", each)]
    assert min(ticks) <= min(values)
    assert max(ticks) >= max(values)


@pytest.mark.parametrize("values", [(1191, 1192, 1192), (10, 10, 10), (0, 12, 7), (2800, 2977, 3000)])
def test_counts_have_whole_numbers_at_their_axis(values: tuple[int, ...]) -> None:
    points = [series.Point(10 * step, 1, value, value, value) for step, value in enumerate(values, 1)]
    ends = re.findall(r'text-anchor="end"[^>]*>([^<]*)<', curves.chart([curves.Line("ids", points)], "ids"))
    assert len(ends) >= 2
    assert all(one.replace(",", "").isdigit() for one in ends)
