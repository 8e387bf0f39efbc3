"""What a finished run is asked for: recommendations and scores by name, on any number of ranks, held to plain NumPy."""

from __future__ import annotations

import csv
import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

import shardembed as se
from shardembed import cli
from shardembed.errors import ConfigError, DataError, UnsupportedError
from shardembed.recipes.use import ranking
from tests.harness import run_ranks
from tests.ranks.recipes.using import CLICKED, CLICKS, END, SASREC, TWO_TOWER, VIEWS, Small, clicks, views


@dataclass(frozen=True)
class Runs:
    """Of each kind; and the views that two of them were trained on."""

    two_tower: Small
    sasrec: Small
    clicks: Small
    views: list[tuple[str, str]]

    def of(self, kind: str) -> Small:
        return getattr(self, kind)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    clicks(folder)
    return Runs(
        Small.train(folder, VIEWS + TWO_TOWER + END, towers="[12]"),
        Small.train(folder, VIEWS + SASREC + END, more=", time: at"),
        Small.train(folder, CLICKS, kind="dlrm"),
        views(folder),
    )


def by_hand(run: Any, queries: dict[str, np.ndarray], user: str, k: int, left_out: set[str]) -> list[str]:
    items = run.vectors("item")
    order = np.argsort(-(items.values @ queries[user]), kind="stable")
    return [name for name in items.names.take(pa.array(order)).to_pylist() if name not in left_out][:k]


@pytest.mark.parametrize("kind", ["two_tower", "sasrec"])
def test_recommends_the_best_of_all_items_and_none_that_were_seen(runs: Runs, kind: str) -> None:
    run = se.open_run(runs.of(kind).path)
    users = ["ü-3", "ü-70", "ü-3", "nobody", "ü-12"]
    queries = dict(zip(("ü-3", "ü-70", "ü-12"), run.queries(["ü-3", "ü-70", "ü-12"]), strict=True))
    seen = {user: {item for one, item in runs.views if one == user} for user in users}
    for exclude_seen in (False, True):
        found = run.recommend(users, 7, exclude_seen=exclude_seen)
        assert found.column("user").to_pylist() == [user for user in users if user != "nobody" for _ in range(7)]
        assert found.column("rank").to_pylist() == [*range(1, 8)] * 4
        lists = np.array(found.column("item").to_pylist()).reshape(4, 7).tolist()
        for user, items in zip(("ü-3", "ü-70", "ü-3", "ü-12"), lists, strict=True):
            assert items == by_hand(run, queries, user, 7, seen[user] if exclude_seen else set())


@pytest.mark.parametrize("kind", ["two_tower", "sasrec"])
def test_users_who_are_unknown_get_what_is_popular_if_it_is_asked_for(runs: Runs, kind: str) -> None:
    found = se.open_run(runs.of(kind).path).recommend(["nobody"], 3, unknown="popular")
    counts: dict[str, int] = {}
    for _, item in runs.views:
        counts[item] = counts.get(item, 0) + 1
    assert [counts[item] for item in found.column("item").to_pylist()] == sorted(counts.values(), reverse=True)[:3]
    assert found.column("score").to_pylist() == [None] * 3


def test_all_items_that_are_left_come_where_they_are_fewer_than_asked_for(runs: Runs) -> None:
    run = se.open_run(runs.two_tower.path)
    items = {item for _, item in runs.views}
    seen = {item for user, item in runs.views if user == "ü-3"}
    found = run.recommend(["ü-3"], 1000, exclude_seen=True)
    assert sorted(found.column("item").to_pylist()) == sorted(items - seen)


def test_a_history_brings_users_whom_training_has_not_seen(runs: Runs, tmp_path: Path) -> None:
    run = se.open_run(runs.sasrec.path)
    path = tmp_path / "history.csv"
    mine = [(item, at) for at, (user, item) in enumerate(runs.views) if user == "ü-5"]
    lines = [*(f"new,{item},{at}" for item, at in reversed(mine)), "strange,never seen,1"]
    path.write_text("viewer,sku,at\n" + "\n".join(lines) + "\n")
    found = run.recommend(["new", "ü-5", "strange"], 5, history=[str(path)])
    assert found.column("user").to_pylist() == ["new"] * 5, "others are not in that history, or with no item that is known"
    assert found.column("item").to_pylist() == run.recommend(["ü-5"], 5).column("item").to_pylist()


def asked_on_ranks(rank: int, world_size: int, runs: dict[str, str], of_clicks: str) -> list[list[dict[str, Any]]]:
    users = ["ü-3", "nobody", *(f"ü-{user}" for user in range(9, 40))]
    found = [se.open_run(run).recommend(users, 5, exclude_seen=True, unknown="popular") for run in runs.values()]
    found += [se.open_run(of_clicks).score(CLICKED[:77], ["note", "shop"])]
    found += [se.open_run(runs["two_tower"]).score({"viewer": ["ü-3", "nobody"], "sku": ["SKU/001", "SKU/001"]})]
    return [table.to_pylist() for table in found]


def test_two_ranks_answer_as_one_does(runs: Runs) -> None:
    paths = {kind: str(runs.of(kind).path) for kind in ("two_tower", "sasrec")}
    alone = run_ranks(1, asked_on_ranks, paths, str(runs.clicks.path))[0]
    first, second = run_ranks(2, asked_on_ranks, paths, str(runs.clicks.path))
    assert second == [[]] * 4, "rank 0 has the answers"
    for one, other in zip(alone, first, strict=True):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert {**left, "score": 0, "prediction": 0} == {**right, "score": 0, "prediction": 0}
            scores = [[row.get(name) or 0.0 for name in ("score", "prediction")] for row in (left, right)]
            assert scores[0] == pytest.approx(scores[1], rel=1e-5)


@pytest.mark.parametrize("kind", ["two_tower", "sasrec"])
def test_the_score_of_a_user_and_an_item_is_that_of_the_recommendation(runs: Runs, kind: str) -> None:
    run = se.open_run(runs.of(kind).path)
    found = run.recommend(["ü-3", "ü-70"], 6)
    rows = {"viewer": found.column("user"), "sku": found.column("item"), "row": pa.array(range(12))}
    scored = run.score(rows, ["row"])
    assert scored.column("row").to_pylist() == [*range(12)]
    np.testing.assert_allclose(scored.column("score").to_numpy(), found.column("score").to_numpy(), rtol=1e-5)
    strange = run.score([{"viewer": "ü-3", "sku": "never seen"}, {"viewer": "nobody", "sku": "SKU/001"}])
    assert strange.column("score").to_pylist() == [None, None]


def test_predictions_are_those_of_an_evaluation(runs: Runs, tmp_path: Path) -> None:
    path = runs.clicks.path
    words = ["train", str(path / "config.yaml"), "--evaluate", str(path), "--predict", str(tmp_path / "predicted")]
    assert cli.main(words) == 0
    wanted = parquet.read_table(tmp_path / "predicted" / "part-00000.parquet")
    rows = [CLICKED[row] for row in wanted.column("row").to_pylist()]
    found = se.open_run(path).score([{name: row[name] for name in ("shop", "tags", "price", "hour")} for row in rows])
    np.testing.assert_allclose(found.column("prediction").to_numpy(), wanted.column("prediction").to_numpy(), rtol=1e-6)


def test_a_file_is_scored_row_by_row_and_bad_rows_are_told_or_left_out(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "today.csv", tmp_path / "scored.csv"
    file.write_text("note,shop,tags,price,hour\na,shop 1,t1|t0,3,4\nb,,,,\nc,shop 2,t1,x,5\nd,new,t9,-2,23\n")
    words = ["score", str(runs.clicks.path), "--data", str(file), "--out", str(out), "--columns", "note,shop"]
    assert cli.main(words) == 2
    assert f"{file}:4: column 'price': 'x' is no number" in capsys.readouterr().err
    assert not out.exists()
    assert cli.main([*words, "--on-bad-row=skip", "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["dropped_rows"] == {"no number": 1}
    with out.open(newline="") as lines:
        found = list(csv.DictReader(lines))
    assert [(row["note"], row["shop"]) for row in found] == [("a", "shop 1"), ("b", ""), ("d", "new")]
    rows = [{"shop": "shop 1", "tags": "t1|t0", "price": 3, "hour": 4}, {"shop": None, "tags": None, "price": None, "hour": None}]
    wanted = se.open_run(runs.clicks.path).score([*rows, {"shop": "new", "tags": "t9", "price": -2, "hour": 23}])
    assert [float(row["prediction"]) for row in found] == pytest.approx(wanted.column("prediction").to_pylist(), rel=1e-5)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl", ".csv.gz"])
def test_users_come_from_a_file_and_answers_go_into_one(runs: Runs, suffix: str, tmp_path: Path) -> None:
    users, out = tmp_path / f"users{suffix}", tmp_path / f"out{suffix.removesuffix('.gz')}"
    names = ["ü-3", "ü-4", "ü-3"]
    if suffix == ".parquet":
        parquet.write_table(pa.table({"viewer": pa.array(names).dictionary_encode()}), users)
    else:
        text = "\n".join(["other,viewer", *(f"1,{name}" for name in names)] if suffix.startswith(".csv") else names) + "\n"
        users.write_bytes(gzip.compress(text.encode()) if suffix == ".csv.gz" else text.encode())
    assert cli.main(["recommend", str(runs.two_tower.path), "--users", str(users), "--k", "2", "--out", str(out)]) == 0
    if suffix == ".parquet":
        found = parquet.read_table(out).to_pylist()
    else:
        with out.open(newline="") as lines:
            found = list(csv.DictReader(lines)) if suffix.startswith(".csv") else [json.loads(line) for line in lines]
    assert [row["user"] for row in found] == ["ü-3", "ü-3", "ü-4", "ü-4"], "each user once"
    assert [row["item"] for row in found] == se.open_run(runs.two_tower.path).recommend(["ü-3", "ü-4"], 2).column(
        "item"
    ).to_pylist()
    assert [path for path in tmp_path.iterdir() if path not in (users, out)] == []


@pytest.mark.parametrize(
    ("wanted", "error", "said"),
    [
        ({"users": [None]}, DataError, "is missing; remove it"),
        ({"users": ["a"], "k": 0}, ConfigError, "k=0"),
        ({"users": ["a"], "unknown": "populr"}, ConfigError, "did you mean 'popular'"),
        ({"users": ["a"], "history": ["x.csv"]}, ConfigError, "two towers know users by their rows"),
        ({"users": ["a"], "data": ["x.csv"]}, ConfigError, "exclude_seen"),
        ({"users": ["a"], "data": ["nowhere.csv"], "exclude_seen": True}, DataError, "nowhere.csv"),
    ],
)
def test_wishes_that_cannot_be_had_are_refused(runs: Runs, wanted: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        se.open_run(runs.two_tower.path).recommend(**wanted)


@pytest.mark.parametrize(("name", "text"), [("users.csv", "viewer\n"), ("users.txt", "\n\n")])
def test_a_file_without_users_is_told(runs: Runs, name: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    users = tmp_path / name
    users.write_text(text)
    words = ["recommend", str(runs.two_tower.path), "--users", str(users), "--out", str(tmp_path / "out.csv")]
    assert cli.main(words) == 2
    assert f"{users}: there are no users in it" in capsys.readouterr().err
    assert not (tmp_path / "out.csv").exists()


def test_what_a_model_is_not_for_is_refused(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = se.open_run(runs.clicks.path)
    with pytest.raises(UnsupportedError, match="predicts clicks"):
        run.recommend(["a"])
    with pytest.raises(UnsupportedError, match="predicts clicks"):
        run.vectors("item")
    assert cli.main(["recommend", str(runs.clicks.path), "--users=all", f"--out={tmp_path / 'out.csv'}"]) == 2
    assert "predicts clicks" in capsys.readouterr().err
    with pytest.raises(DataError, match="there is no column 'hour'"):
        run.score([{"shop": "a", "tags": "b", "price": 1}])
    with pytest.raises(ConfigError, match="is no folder of a run"):
        se.open_run(tmp_path)


def test_what_is_one_thing_is_not_taken_for_its_letters(runs: Runs, tmp_path: Path) -> None:
    run = se.open_run(runs.two_tower.path)
    with pytest.raises(DataError, match="users must be a list or a column"):
        run.recommend("ü-3")
    with pytest.raises(DataError, match="users must be a list or a column"):
        run.queries("ü-3")
    path = tmp_path / "pairs.csv"
    path.write_text("viewer,sku,price\nü-3,SKU/001,7\n")
    for rows in (path, str(path), [path], (str(path),)):
        assert run.score(rows, "price").column("price").to_pylist() == ["7"]
    seen = run.recommend(["ü-3"], 60, exclude_seen=True, data=path).column("item").to_pylist()
    assert len(seen) == 59
    assert "SKU/001" not in seen
    done = run.export(tmp_path / "vectors", "item")
    assert [table.name for table in done.tables] == ["item"]


@pytest.mark.parametrize("option", ["history", "data", "users"])
def test_data_may_be_anywhere(runs: Runs, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["recommend", str(runs.sasrec.path), f"--{option}", "memory://nowhere/views.csv", f"--out={tmp_path / 'out.csv'}"]
    words += [] if option == "users" else ["--users=all", "--exclude-seen"]
    assert cli.main(words) == 2
    told = capsys.readouterr().err
    assert "nowhere/views.csv" in told
    assert "neither read nor written" not in told


def test_users_that_can_be_gone_through_once_are_enough(runs: Runs) -> None:
    found = se.open_run(runs.two_tower.path).recommend((name for name in ("ü-3", "nobody", "ü-4")), 1, unknown="popular")
    assert found.column("user").to_pylist() == ["ü-3", "nobody", "ü-4"]


@pytest.mark.parametrize(("suffix", "code"), [(".csv", 0), (".jsonl", 2), (".parquet", 2)])
def test_bytes_that_are_no_text_are_carried_where_bytes_can_be(
    runs: Runs, suffix: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "today.csv", tmp_path / f"out{suffix}"
    file.write_bytes(b"shop,tags,price,hour,note\na,t1,1,2,Jos\xe9\n")
    words = ["score", str(runs.clicks.path), "--data", str(file), "--columns=note", "--out", str(out)]
    assert cli.main(words) == code
    assert ("column 'note' is no UTF-8" in capsys.readouterr().err) == (code == 2)
    assert out.exists() == (code == 0)


def test_lines_of_json_have_null_where_json_has_no_number(runs: Runs, tmp_path: Path) -> None:
    file, out = tmp_path / "today.parquet", tmp_path / "out.jsonl"
    notes = {"note": [float("nan"), 1.5], "list": [[1.0, float("inf")], [2.0]]}
    parquet.write_table(pa.table({"shop": ["a", "b"], "tags": ["t", "t"], "price": [1, 2], "hour": [3, 4], **notes}), file)
    words = ["score", str(runs.clicks.path), "--data", str(file), "--columns=note,list", "--out", str(out)]
    assert cli.main(words) == 0
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in out.read_text().splitlines())
    assert (first["note"], first["list"], second["note"], second["list"]) == (None, [1.0, None], 1.5, [2.0])


def test_queries_of_histories_are_made_a_few_at_a_time(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    run = se.open_run(runs.sasrec.path)
    users = [f"ü-{user}" for user in range(20)]
    wanted, whole = run.queries(users), run.vectors("user")
    sizes: list[int] = []
    queries = type(run._opened.model).queries

    def counting(model: Any, items_nD: Any, lengths: Any) -> Any:
        sizes.append(len(lengths))
        return queries(model, items_nD, lengths)

    monkeypatch.setattr(ranking, "BATCH_POSITIONS", 3 * 8)  # of at most 8 items each
    monkeypatch.setattr(type(run._opened.model), "queries", counting)
    np.testing.assert_allclose(run.queries(users), wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(run.vectors("user").values, whole.values, rtol=1e-5, atol=1e-6)
    assert max(sizes) == 3


def test_a_run_without_weights_is_told(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_bytes((runs.two_tower.path / "config.yaml").read_bytes())
    for words in (
        ["recommend", str(run), "--users=all", f"--out={tmp_path / 'out.csv'}"],
        ["score", str(run), "--data=views.csv", f"--out={tmp_path / 'out.csv'}"],
        ["serve", str(run), f"--out={tmp_path / 'served'}"],
    ):
        assert cli.main(words) == 2
        assert "there is no complete checkpoint in it" in capsys.readouterr().err


def test_a_run_is_opened_without_its_data(runs: Runs, tmp_path: Path) -> None:
    small = Small.train(tmp_path, VIEWS + TWO_TOWER + END)
    (tmp_path / "views.csv").unlink()
    run = se.open_run(small.path)
    assert run.recommend(["ü-3"], 2).num_rows == 2
    with pytest.raises(DataError, match=r"views.csv"):
        run.recommend(["ü-3"], 2, exclude_seen=True)


def test_users_and_items_that_are_numbered_from_0(tmp_path: Path) -> None:
    rows = [(user, item) for user in range(20) for item in range(user % 4, 24, 4)]
    (tmp_path / "views.csv").write_text("viewer,sku\n" + "\n".join(f"{user},{item}" for user, item in rows) + "\n")
    text = (VIEWS + TWO_TOWER + END).replace("{more}", ", ids: numbered").replace("epochs: 3", "epochs: 30")
    job = tmp_path / "job.yaml"
    job.write_text(text.format(folder=tmp_path, towers="[]", eval=""))
    run = se.train(job, quiet=True).open()
    found = run.recommend(["5", "7", "21", "x"], 4)
    assert found.column("user").to_pylist() == ["5"] * 4 + ["7"] * 4, "as they were given"
    assert found.schema.field("item").type == pa.int64()
    assert run.recommend([5, 21, -3], 4).column("user").to_pylist() == [5] * 4, "21 and -3 have no row"
    exported = run.vectors("item")
    assert exported.ids.tolist() == [*range(24)]


def test_features_that_have_changed_since_the_training_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    skus = {item for _, item in views(tmp_path)}
    files = tmp_path / "items.csv"
    files.write_text("sku,genre\n" + "".join(f"{item},{len(item) % 3}\n" for item in sorted(skus)))
    more = f", items: {files}, features: [{{name: genre, kind: id, of: item}}]"
    small = Small.train(tmp_path, VIEWS + TWO_TOWER + END, more=more)
    capsys.readouterr()
    se.open_run(small.path)
    assert "changed" not in capsys.readouterr().err
    files.write_text(files.read_text().replace(",1\n", ",2\n").replace(",0\n", ",1\n"))
    se.open_run(small.path)
    assert f"warning: {small.path}: the data have changed since" in capsys.readouterr().err
