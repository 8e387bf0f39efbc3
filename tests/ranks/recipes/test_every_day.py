"""Today's job begins from yesterday's run: ids keep their rows to the bit, new ones get rows, and the model goes on learning."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from pyarrow import parquet
from rich.console import Console

import shardembed as se
from shardembed.errors import ConfigError, DataError
from shardembed.inputs.hash64 import hash64
from shardembed.recipes import config, recorded, run_page, since_section, train
from tests.amount import exhaustive
from tests.harness import run_ranks
from tests.unit.pages import stands_alone

TASTES = 6
JOB = """
name: daily
data: {{path: {path}, user: viewer, item: sku{ids}}}
model: {{embedding_dim: 8, negatives: 32, towers: {towers}}}
train: {{epochs: {epochs}, global_batch_size: 250}}
checkpoint: {{every_steps: 10}}
eval: {{k: 5, repeats: true}}
run_dir: {folder}/runs
"""
TEXTS, NUMBERED = "", ", ids: numbered"

Rows = dict[str, dict[int, tuple[list[float], list[float]]]]  # by table and id: vector and optimizer state


def write_day(folder: Path, day: int, numbered: bool = False) -> tuple[set[int], set[int]]:
    """Views of users with a taste each, most of them of items of that taste. On day 2 a fifth of users and items are others, and
    the file begins with these. Returns users and items.
    """
    draw = np.random.default_rng(day)
    users = draw.integers(60, size=1500) + 12 * (day - 1)
    items = draw.integers(5, size=1500) * TASTES + users % TASTES
    items = np.where(draw.random(1500) < 0.15, draw.integers(5 * TASTES, size=1500), items) + TASTES * (day - 1)
    order = np.argsort(-users, kind="stable") if day == 2 else np.arange(1500)
    users, items = users[order], items[order]
    columns = [users, items] if numbered else [[f"u-{user}" for user in users], [f"sku {item}" for item in items]]
    parquet.write_table(pa.table(columns, names=["viewer", "sku"]), folder / f"day{day}.parquet")
    return set(users.tolist()), set(items.tolist())


def job_of(folder: Path, day: int, ids: str = TEXTS, **settings: object) -> str:
    path = folder / f"job{day}.yaml"
    given = {"towers": "[]", "epochs": 6 if day == 1 else 2, **settings}
    path.write_text(JOB.format(path=folder / f"day{day}.parquet", ids=ids, folder=folder, **given))
    return str(path)


def rows_of(tables: se.EmbeddingCollection) -> Rows:
    """What this rank has in its slabs, of whole rows: read where it lies, by no code that loads or saves."""
    found: Rows = {}
    for slab in tables.journey.slabs:
        for shard in slab.shards() if slab.dynamic is None else ():
            there = found.setdefault(shard.table, {})
            for place, number in enumerate(shard.shard.rows):
                there[number] = (shard.weights[place].tolist(), shard.state["sum"][place].reshape(-1).tolist())
        if slab.dynamic is not None:
            there = found.setdefault(slab.table_of(slab.spec.lanes[0]), {})
            places = slab.dynamic.census.living(slab.dynamic.steps)
            ids = slab.dynamic.census.ids_S[places].tolist()
            for number, place in zip(ids, places.tolist(), strict=True):
                there[number] = (slab.weights[place].tolist(), slab.state["sum"][place].reshape(-1).tolist())
    return found


def trained(rank: int, world_size: int, job: str, former: str | None = None, options: tuple[str, ...] = ()) -> dict[str, Any]:
    """The summary; the rows before training and after; what was said."""
    before: list[Rows] = []
    loop = train.train

    def watched(job: Any, *rest: Any) -> Any:
        before.append(rows_of(job.model.tables))
        return loop(job, *rest)

    said = io.StringIO()
    with mock.patch.object(train, "train", watched):
        done = train.work(config.load(job, options), Console(file=said, width=300), from_run=former)
    return {"summary": done.summary, "before": before[0], "after": rows_of(done.job.model.tables), "said": said.getvalue()}


def joined(found: list[dict[str, Any]], when: str) -> Rows:
    """Of all ranks together."""
    tables: Rows = {}
    for one in found:
        for name, rows in one[when].items():
            tables.setdefault(name, {}).update(rows)
    return tables


@pytest.mark.parametrize(
    ("first", "second", "towers"), [(1, 2, "[]"), exhaustive(2, 1, "[6]"), exhaustive(2, 3, "[]")], ids=["1-2", "2-1", "2-3"]
)
def test_ids_keep_their_rows_and_the_model_goes_on(tmp_path: Path, first: int, second: int, towers: str) -> None:
    (old_users, old_items), (users, items) = write_day(tmp_path, 1), write_day(tmp_path, 2)
    one = run_ranks(first, trained, job_of(tmp_path, 1, towers=towers))
    former = one[0]["summary"]["run_dir"]
    two = run_ranks(second, trained, job_of(tmp_path, 2, towers=towers), former)
    assert joined(two, "before") == joined(one, "after"), "vectors and state, to the bit"
    names = {"user": ("u-{}", old_users, users), "item": ("sku {}", old_items, items)}
    for table, (form, then, now) in names.items():
        known, here = ({int(hash64([form.format(number)])[0]) for number in each} for each in (then, now))
        after = set(joined(two, "after")[table])
        assert after == known | here
        counts = two[0]["summary"]["since"]["tables"][table]
        assert counts == {"kept": len(known), "new": len(here - known), "gone": 0}
        assert counts["new"] > 0
    summary = two[0]["summary"]
    assert summary["recall@5"] > summary["before"]["recall@5"] + 0.02 > summary["before"]["popularity_recall@5"]
    fresh = run_ranks(1, trained, job_of(tmp_path, 2, towers=towers), None, ("name=fresh",))[0]["summary"]
    assert summary["losses"][0] < 0.9 * fresh["losses"][0], "what was learned yesterday helps"
    texts = se.Names(Path(summary["run_dir"]) / "names" / "item").texts()
    assert set(texts.values()) == {f"sku {item}" for item in old_items | items}, "of ids that are not in today's data too"


def test_yesterdays_model_is_what_evaluate_says_of_it(tmp_path: Path) -> None:
    """The metrics of before are those of the former checkpoint on today's data, which another command loads by itself."""
    from shardembed.recipes import evaluation

    write_day(tmp_path, 1), write_day(tmp_path, 2)
    one = run_ranks(1, trained, job_of(tmp_path, 1))[0]["summary"]
    job = job_of(tmp_path, 2)
    two = run_ranks(1, trained, job, one["run_dir"])[0]["summary"]
    alone = evaluation.run(config.load(job), Console(quiet=True), one["run_dir"])
    assert two["before"] == {name: alone[name] for name in two["before"]}


def test_an_interrupted_run_goes_on_by_the_same_command(tmp_path: Path) -> None:
    write_day(tmp_path, 1), write_day(tmp_path, 2)
    one = run_ranks(1, trained, job_of(tmp_path, 1))[0]["summary"]["run_dir"]
    job = job_of(tmp_path, 2)
    whole = run_ranks(2, trained, job, one)[0]["summary"]
    run = Path(whole["run_dir"])
    (run / "summary.json").unlink()  # as if it had ended after its first checkpoint
    for path in (run / "checkpoints").iterdir():
        if path.is_dir() and "0010" not in path.name:
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    again = run_ranks(2, trained, job, one)[0]
    assert again["summary"]["run_dir"] == whole["run_dir"]
    assert "resuming" in again["said"]
    for name in ("before", "since", "recall@5", "losses", "steps"):
        assert again["summary"][name] == whole[name], name
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line] == list(
        range(1, whole["steps"] + 1)
    )
    (run / "summary.json").unlink()
    for former, now in ((None, "begins from nothing"), (str(run / "checkpoints" / "step-0000000010"), "begins from daily-")):
        said = run_ranks(2, trained, job, former)[0]["said"]
        assert f"is unfinished, but it began from {Path(one).name}/" in said
        assert now in said


def test_numbered_tables_grow_at_their_end(tmp_path: Path) -> None:
    (old_users, old_items), (users, items) = (write_day(tmp_path, day, numbered=True) for day in (1, 2))
    one = run_ranks(2, trained, job_of(tmp_path, 1, NUMBERED))
    two = run_ranks(1, trained, job_of(tmp_path, 2, NUMBERED), one[0]["summary"]["run_dir"])
    after, before = joined(one, "after"), joined(two, "before")
    for table, then, now in (("user", old_users, users), ("item", old_items, items)):
        assert len(after[table]) == max(then) + 1
        assert len(before[table]) == max(then | now) + 1
        assert {number: before[table][number] for number in after[table]} == after[table]
        assert all(state == [0.0] for number, (_, state) in before[table].items() if number not in after[table])
        assert two[0]["summary"]["since"]["tables"][table] == {
            "kept": max(then) + 1,
            "new": max(now) - max(then),
            "gone": 0,
        }
    assert "item: more rows than there, at the end" in two[0]["said"]
    # And back: a table is never smaller than it was.
    three = run_ranks(1, trained, job_of(tmp_path, 1, NUMBERED, epochs=1), two[0]["summary"]["run_dir"])
    assert joined(three, "before") == joined(two, "after")


SEQUENCES = """
data: {{path: {path}, user: viewer, item: sku, time: null{ids}}}
model: {{kind: sasrec, embedding_dim: 8, negatives: 32, max_length: 8, layers: 1}}
train: {{epochs: 3, global_batch_size: 20}}
eval: {{k: 5, repeats: true}}
run_dir: {folder}/runs
"""


@pytest.mark.parametrize("ids", [TEXTS, exhaustive(NUMBERED)], ids=["texts", "numbered"])
def test_sequences_go_on_too(tmp_path: Path, ids: str) -> None:
    jobs = []
    for day in (1, 2):
        write_day(tmp_path, day, numbered=ids == NUMBERED)
        jobs.append(tmp_path / f"sequences{day}.yaml")
        jobs[-1].write_text(SEQUENCES.format(path=tmp_path / f"day{day}.parquet", folder=tmp_path, ids=ids))
    one = run_ranks(1, trained, str(jobs[0]))
    two = run_ranks(2, trained, str(jobs[1]), one[0]["summary"]["run_dir"])
    after, before = joined(one, "after")["item"], joined(two, "before")["item"]
    assert {item: before[item] for item in after} == after
    summary = two[0]["summary"]
    assert summary["recall@5"] > summary["before"]["recall@5"]
    assert summary["since"]["tables"]["item"]["new"] > 0


def test_ids_that_died_leave_by_their_age(tmp_path: Path) -> None:
    """Steps of the former run count: an id that it saw last in its first steps is old when this one begins."""
    (old_users, _), (users, _) = write_day(tmp_path, 1), write_day(tmp_path, 2)
    ids = ", ids: {{kind: dynamic, eviction: {{kind: ttl, steps: 8}}}}".replace("{{", "{").replace("}}", "}")
    one = run_ranks(1, trained, job_of(tmp_path, 1, ids))[0]
    two = run_ranks(2, trained, job_of(tmp_path, 2, ids), one["summary"]["run_dir"])
    living = set(joined(two, "after")["user"])
    counts = two[0]["summary"]["since"]["tables"]["user"]
    known, here = ({int(hash64([f"u-{number}"])[0]) for number in each} for each in (old_users, users))
    assert living <= here, "the others were not seen in as many steps as an epoch has"
    assert counts == {"kept": len(living & known), "new": len(living - known), "gone": len(known - living)}
    assert counts["gone"] > 0


def test_rates_and_steps_begin_anew(tmp_path: Path) -> None:
    write_day(tmp_path, 1), write_day(tmp_path, 2)
    options = ("train.schedule.decay=linear", "optimizer.tables.lr=0.3", "optimizer.dense.weight_decay=0.1")
    one = run_ranks(1, trained, job_of(tmp_path, 1, towers="[6]"), None, options)[0]["summary"]["run_dir"]
    seen = run_ranks(1, settings_before, job_of(tmp_path, 2, towers="[6]"), one)[0]
    assert seen == {"tables": 0.1, "dense": 1e-3, "weight_decay": 0.0, "step": 0, "skipped": 0}


def settings_before(rank: int, world_size: int, job: str, former: str) -> dict[str, float]:
    found: dict[str, float] = {}
    loop = train.train

    def watched(job: Any, task: Any, console: Any, run: Any, begun: Any, *rest: Any) -> Any:
        groups = job.optimizer.param_groups
        found.update(tables=groups[-1]["lr"], dense=groups[0]["lr"], weight_decay=groups[0]["weight_decay"])
        found.update(step=begun.step, skipped=job.optimizer.skipped)
        state = job.optimizer.dense.state[groups[0]["params"][0]]
        assert float(state["exp_avg"].abs().sum()) > 0, "what the dense optimizer has learned comes along"
        return loop(job, task, console, run, begun, *rest)

    with mock.patch.object(train, "train", watched):
        train.work(config.load(job), Console(quiet=True), from_run=former)
    return found


def test_what_it_cannot_begin_from_is_refused(tmp_path: Path) -> None:
    write_day(tmp_path, 1)
    job = job_of(tmp_path, 1)
    one = Path(run_ranks(1, trained, job)[0]["summary"]["run_dir"])
    digits = tmp_path / "digits.csv"
    digits.write_text("viewer,sku\n" + "".join(f"{row % 7},{row % 5}\n" for row in range(50)))
    for former, option, said in (
        (tmp_path, (), "is no run of `shardembed train`; give its folder"),
        (
            one,
            ("model.kind=sasrec", "model.negatives=8", "data.time=null"),
            "is a two-tower model, and this job trains a SASRec model",
        ),
        (one, (f"data.path={digits}",), r"column 'viewer' had texts in .* and has whole numbers here, .* data.texts: \[viewer\]"),
        (one, ("data.ids=numbered",), "the ids of 'user' were any ids in .* and are numbers of rows here"),
        (one, ("model.embedding_dim=4",), r"'tables.item.weight' is .* in the model and .*\n.*\n.*model.embedding_dim"),
    ):
        with pytest.raises(ConfigError, match=said):
            train.work(without_towers(job, option), Console(quiet=True), from_run=former)
    (one / "summary.json").unlink()
    with pytest.raises(ConfigError, match="is unfinished: give its own command again first, or one of its checkpoints"):
        train.work(config.load(job), Console(quiet=True), from_run=one, fresh=True)
    newest = max((one / "checkpoints").iterdir())
    assert train.work(config.load(job), Console(quiet=True), from_run=newest, fresh=True).summary["before"] is not None


def without_towers(job: str, options: tuple[str, ...]) -> Any:
    values = yaml.safe_load(Path(job).read_text())
    del values["model"]["towers"]
    return config.given(values, dict(_parsed(option) for option in options))


def _parsed(option: str) -> tuple[str, Any]:
    name, _, value = option.partition("=")
    return name, None if value == "null" else int(value) if value.isdigit() else value


def test_the_page_compares_the_two(tmp_path: Path) -> None:
    write_day(tmp_path, 1), write_day(tmp_path, 2)
    one = run_ranks(1, trained, job_of(tmp_path, 1))[0]["summary"]
    two = run_ranks(1, trained, job_of(tmp_path, 2), one["run_dir"])[0]["summary"]
    run = recorded.read(Path(two["run_dir"]))
    text = run_page.render(run)
    stands_alone(text)
    section = str(since_section.since(run))
    assert section in text
    assert f"Since {Path(one['run_dir']).name}" in section
    assert f"{two['before']['recall@5']:.4f}" in section
    assert f"{two['recall@5'] - two['before']['recall@5']:+.4f}" in section
    assert run.curves.metrics["recall@5"].points[0].step == 0
    assert since_section.since(recorded.read(Path(one["run_dir"]))) == ""
    (run.path / "since.json").write_text('{"run": 3}')
    assert "Not read: since.json" in since_section.since(run)


CLICKS = """
name: clicks
data:
  path: {path}
  integers: [I1]
  categories: {categories}
  ids: {ids}
  split: {{kind: hash, fraction: 0.2}}
model: {{embedding_dim: 4, kind: dcnv2, bottom: [4], top: [4], cross_layers: 1, cross_rank: 4}}
train: {{epochs: {epochs}, global_batch_size: 200}}
run_dir: {folder}/runs
"""


def write_clicks(folder: Path, day: int) -> dict[str, list[int]]:
    draw = np.random.default_rng(10 + day)
    values = {name: (draw.zipf(1.5, 1600) % 20 + 7 * (day - 1)) for name in ("C1", "C2", "C3")}
    odds = np.sin(values["C1"] * 2.0) * 1.5 + np.cos(values["C2"]) * 1.5
    labels = (draw.random(1600) < 1 / (1 + np.exp(-odds))).astype(int)
    columns = {"label": labels, "I1": draw.integers(9, size=1600), **values}
    parquet.write_table(pa.table(columns), folder / f"clicks{day}.parquet")
    return {name: each.tolist() for name, each in values.items()}


def clicks_job(folder: Path, day: int, ids: str = "{kind: vocabulary}", categories: str = "[C1, C2]") -> str:
    path = folder / f"clicks{day}.yaml"
    given = {"ids": ids, "categories": categories, "epochs": 4 if day == 1 else 2}
    path.write_text(CLICKS.format(path=folder / f"clicks{day}.parquet", folder=folder, **given))
    return str(path)


def test_vocabularies_grow_at_their_end(tmp_path: Path) -> None:
    values = write_clicks(tmp_path, 1), write_clicks(tmp_path, 2)
    one = run_ranks(1, trained, clicks_job(tmp_path, 1))
    two = run_ranks(2, trained, clicks_job(tmp_path, 2), one[0]["summary"]["run_dir"])
    after, before = joined(one, "after"), joined(two, "before")
    for name in ("C1", "C2"):
        then, now = (
            se.Vocabulary.load(Path(found[0]["summary"]["run_dir"]) / "vocabularies" / f"{name}.txt") for found in (one, two)
        )
        assert now.values[: len(then.values)] == then.values, "never in another order"
        assert set(now.values) == set(values[0][name]) | set(values[1][name])
        assert len(set(now.values)) == len(now.values)
        assert {row: before[name][row] for row in after[name]} == after[name]
    summary = two[0]["summary"]
    assert summary["auc"] > summary["before"]["auc"]
    # Beside a feature that is new, in another order: each goes on from its own.
    three = run_ranks(1, trained, clicks_job(tmp_path, 2, categories="[C3, C2, C1]"), one[0]["summary"]["run_dir"])
    began = joined(three, "before")
    assert {name: {row: began[name][row] for row in after[name]} for name in after} == after
    (Path(one[0]["summary"]["run_dir"]) / "vocabularies" / "C1.txt").write_text("\\other\t0\tintegers\n")
    with pytest.raises(DataError, match=r"C1.txt: has values for 1 rows, and its table .*; was the file altered"):
        train.work(config.load(clicks_job(tmp_path, 2)), Console(quiet=True), from_run=one[0]["summary"]["run_dir"])


def test_features_that_come_and_go_are_named(tmp_path: Path) -> None:
    write_clicks(tmp_path, 1), write_clicks(tmp_path, 2)
    ids = "{kind: hash, num_embeddings: 50}"
    one = run_ranks(1, trained, clicks_job(tmp_path, 1, ids, "[C1, C2]"))
    two = run_ranks(2, trained, clicks_job(tmp_path, 2, ids, "[C2, C3, C1]"), one[0]["summary"]["run_dir"])
    after, before = joined(one, "after"), joined(two, "before")
    assert {name: before[name] for name in ("C1", "C2")} == after
    assert {tuple(state) for _, state in before["C3"].values()} == {(0.0,)}
    said = two[0]["said"]
    assert "C3: not there, begins fresh" in said
    assert "of another shape there, begins fresh" in said
    assert two[0]["summary"]["before"] is None
    assert "its model cannot be evaluated on these data, since parts of this one are new" in said
    assert two[0]["summary"]["since"]["tables"]["C3"] == {"kept": 0, "new": 50, "gone": 0}
    with pytest.raises(
        ConfigError, match=r"the ids of 'C1' were hashed into 50 rows with seed 0 in .* and are hashed into 60 rows"
    ):
        train.work(
            config.load(clicks_job(tmp_path, 2, "{kind: hash, num_embeddings: 60}")),
            Console(quiet=True),
            from_run=str(one[0]["summary"]["run_dir"]),
        )
    # Another optimizer: the vectors come along, and its state does not.
    three = run_ranks(
        1, trained, clicks_job(tmp_path, 2, ids, "[C1, C2]"), one[0]["summary"]["run_dir"], ("optimizer.tables.name=Adagrad",)
    )
    mine = three[0]["before"]
    for name, rows in after.items():
        torch.testing.assert_close([mine[name][row][0] for row in rows], [vector for vector, _ in rows.values()], rtol=0, atol=0)
    assert "so their state begins fresh" in three[0]["said"]


def write_texts(folder: Path, day: int, skus: list[str], genres: list[str]) -> str:
    """A job on views in a text file, whose users are whole numbers."""
    draw = np.random.default_rng(day)
    rows = [(user, skus[number % len(skus)], genres[number % len(genres)]) for user, number in draw.integers(30, size=(600, 2))]
    (folder / f"day{day}.csv").write_text("viewer,sku,genre\n" + "".join(",".join(map(str, row)) + "\n" for row in rows))
    path = Path(job_of(folder, day, ids=", features: [{name: genre, kind: id, of: item}]"))
    path.write_text(path.read_text().replace(".parquet", ".csv"))
    return str(path)


@pytest.mark.parametrize(("column", "days"), [("sku", (["7", "8"], ["7", "8-B"])), ("genre", (["a", "1"], ["2", "1"]))])
def test_a_column_of_whole_numbers_and_one_of_texts_are_told_apart(
    tmp_path: Path, column: str, days: tuple[list[str], list[str]]
) -> None:
    plain = {"skus": ["7", "8"], "genres": ["1", "2"]}
    first, second = (write_texts(tmp_path, day, **{**plain, f"{column}s": said}) for day, said in enumerate(days, 1))
    run = run_ranks(1, trained, first)[0]["summary"]["run_dir"]
    with pytest.raises(ConfigError, match=f"--from: column '{column}' had .* none would be known"):
        train.work(config.load(second), Console(quiet=True), from_run=run)
