"""A folder that is served answers as the run does, over HTTP, where there is no shardembed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import shardembed as se
from shardembed import cli
from shardembed.recipes.use.box.clicks import Clicks
from shardembed.recipes.use.box.files import settings_of
from shardembed.recipes.use.box.ids import Refused
from shardembed.recipes.use.box.retrieval import Retrieval
from tests.amount import exhaustive
from tests.ranks.recipes.using import CLICKED, CLICKS, END, SASREC, TWO_TOWER, VIEWS, Small, clicks, views

STARTING_SECONDS = 120


def built(small: Small, out: Path) -> Path:
    assert cli.main(["serve", str(small.path), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def two_tower(tmp_path_factory: pytest.TempPathFactory) -> tuple[Small, Path]:
    folder = tmp_path_factory.mktemp("two")
    small = Small.train(folder, VIEWS + TWO_TOWER + END, towers="[12]")
    return small, built(small, folder / "served")


@pytest.fixture(scope="module")
def sasrec(tmp_path_factory: pytest.TempPathFactory) -> tuple[Small, Path]:
    folder = tmp_path_factory.mktemp("sasrec")
    small = Small.train(folder, VIEWS + SASREC + END, more=", time: at")
    return small, built(small, folder / "served")


def pairs(answer: list[dict[str, Any]]) -> list[tuple[Any, Any]]:
    return [(one["item"], pytest.approx(one["score"], rel=1e-5, abs=1e-6)) for one in answer]


def test_two_towers_answer_as_the_run_does(two_tower: tuple[Small, Path]) -> None:
    small, folder = two_tower
    served, run = Retrieval(folder, settings_of(folder)), se.open_run(small.path)
    users = ["ü-3", "ü-70", "ü-12"]
    answers = served.answer([served.read({"user": user, "k": 9}) for user in users])
    for user, answer in zip(users, answers, strict=True):
        assert [(one["item"], one["score"]) for one in answer] == pairs(run.recommend([user], 9).to_pylist())
    left_out = [answers[0][0]["item"], answers[0][3]["item"], "never seen"]
    (answer,) = served.answer([served.read({"user": "ü-3", "k": 7, "exclude": left_out})])
    assert [(one["item"], one["score"]) for one in answer] == pairs([one for one in answers[0] if one["item"] not in left_out])
    rows = [{"viewer": "ü-3", "sku": answers[0][2]["item"]}, {"viewer": "nobody", "sku": "SKU/001"}]
    assert served.score(rows)["scores"] == [pytest.approx(answers[0][2]["score"], rel=1e-5), None]


def test_sequences_answer_as_the_run_does(sasrec: tuple[Small, Path], tmp_path: Path) -> None:
    small, folder = sasrec
    served, run = Retrieval(folder, settings_of(folder)), se.open_run(small.path)
    seen = views(tmp_path)
    histories = [[item for user, item in seen if user == name] for name in ("ü-3", "ü-70")]
    histories += [["never seen", histories[0][0], "nor this", histories[0][1]]]
    file = tmp_path / "history.csv"
    rows = [f"{user},{item},{at}" for user, history in enumerate(histories) for at, item in enumerate(history)]
    file.write_text("viewer,sku,at\n" + "\n".join(rows) + "\n")
    answers = served.answer([served.read({"history": history, "k": 9}) for history in histories])
    for user, answer in enumerate(answers):
        wanted = run.recommend([str(user)], 9, history=[str(file)]).to_pylist()
        assert [(one["item"], one["score"]) for one in answer] == pairs(wanted)


@pytest.mark.parametrize(
    ("kind", "ids"),
    [
        ("dlrm", "dynamic"),
        ("wide", "{kind: vocabulary, min_count: 2}"),
        exhaustive("dcnv2", "{kind: hash, num_embeddings: 20}"),
        exhaustive("wide", "{kind: dynamic, unknown: zeros}"),
    ],
)
def test_clicks_are_predicted_as_the_run_does(kind: str, ids: str, tmp_path: Path) -> None:
    clicks(tmp_path)
    text = CLICKS.replace("run_dir", "optimizer: {{tables: {{name: Adagrad, lr: 0.3}}}}\nrun_dir")
    text = (
        text
        if ids == "dynamic"
        else text.replace("  features:", f"  ids: {ids.replace('{', '{{').replace('}', '}}')}\n  features:")
    )
    small = Small.train(tmp_path, text, kind=kind)
    folder = built(small, tmp_path / "served")
    served = Clicks(folder, settings_of(folder))
    rows = [{name: row[name] for name in ("shop", "tags", "price", "hour")} for row in CLICKED[:50]]
    rows += [
        {"shop": "new", "tags": "t1|new|t0", "price": None, "hour": 12.0},
        {"shop": None, "tags": None, "price": -3, "hour": None},
    ]
    wanted = se.open_run(small.path).score(rows).column("prediction").to_pylist()
    assert served.score(rows)["predictions"] == pytest.approx(wanted, rel=1e-5)
    listed = [{**row, "tags": row["tags"].split("|")} if row["tags"] else row for row in rows]
    assert served.score(listed)["predictions"] == pytest.approx(wanted, rel=1e-5)
    assert len(set(wanted)) > 10
    with pytest.raises(Refused, match="there is no column 'shopp'"):
        served.score([{"shopp": 1}])
    with pytest.raises(Refused, match="'x' is no number"):
        served.score([{"price": "x"}])


@contextmanager
def serving(folder: Path, tmp_path: Path) -> Iterator[int]:
    """The port of a server whose process finds no shardembed."""
    starlette, uvicorn = pytest.importorskip("starlette"), pytest.importorskip("uvicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    hidden = tmp_path / "without" / "shardembed"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ModuleNotFoundError('shardembed is not here', name='shardembed')\n")
    paths = [str(hidden.parent), *(str(Path(one.__file__).parents[1]) for one in (starlette, uvicorn) if one.__file__)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(folder / "serve.py"), "--port", str(port), "--threads", "1"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            until = time.monotonic() + STARTING_SECONDS
            while time.monotonic() < until and process.poll() is None:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.05)
            assert process.poll() is None, process.stderr and process.stderr.read()
            yield port
        finally:
            process.terminate()


def ask(port: int, path: str, body: Any = None, method: str | None = None) -> tuple[int, Any]:
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_answers_over_http(two_tower: tuple[Small, Path], tmp_path: Path) -> None:
    small, folder = two_tower
    wanted = se.open_run(small.path).recommend(["ü-3"], 4).to_pylist()
    with serving(folder, tmp_path) as port:
        status, about = ask(port, "/health")
        assert (status, about["status"], about["items"], about["run"]) == (200, "ok", 60, small.path.name)
        status, answer = ask(port, "/recommend", {"user": "ü-3", "k": 4})
        assert status == 200
        assert [(one["item"], one["score"]) for one in answer["items"]] == pairs(wanted)
        assert ask(port, "/score", {"rows": [{"viewer": "ü-3", "sku": wanted[1]["item"]}]})[1] == {
            "scores": [pytest.approx(wanted[1]["score"], rel=1e-5)]
        }
        for path, body, code, said in [
            ("/recommend", {"user": "nobody"}, 404, "user 'nobody' is unknown"),
            ("/recommend", {"user": "ü-3", "k": 0}, 400, "k must be"),
            ("/recommend", {"user": "ü-3", "history": []}, 400, "no field 'history'"),
            ("/recommend", {"user": 1.5}, 400, "must be a text or a whole number"),
            ("/recommend", b"{", 400, "no JSON"),
            ("/recommend", b"[" * 100_000, 400, "no JSON"),
            ("/recommend", None, 405, "POST /recommend"),
            ("/score", {"rows": [{"viewer": "ü-3"}]}, 400, "row 0: there is no 'sku'"),
            ("/score", {"rows": [1]}, 400, "list of objects"),
            ("/score", b'{"rows": [{"viewer": "\\ud800", "sku": "a"}]}', 400, "half of a character"),
            ("/score", b" " * (5 << 20), 413, "bytes"),
            ("/elsewhere", None, 404, "there are GET /health"),
        ]:
            status, told = ask(port, path, body)
            assert (status, said in told["error"]) == (code, True), told
        assert ask(port, "/health")[0] == 200


def test_a_folder_that_is_there_is_not_written_over(two_tower: tuple[Small, Path], capsys: pytest.CaptureFixture[str]) -> None:
    small, folder = two_tower
    assert cli.main(["serve", str(small.path), "--out", str(folder)]) == 2
    assert "is not written over" in capsys.readouterr().err
    assert cli.main(["serve", str(folder), "--out", "elsewhere"]) == 2
