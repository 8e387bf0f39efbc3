"""Thirty-one wrong configurations and data files, each with the message it gives: where it is, and what is near."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from shardembed.cli import failures, launch, main

COLUMNS = "data: {path: DATA, integers: [I1], categories: [C1, C2]"
CLICKS = COLUMNS + "}\nmodel: {kind: dlrm, embedding_dim: 4}\n"
PAIRS = "data: {path: DATA, ids: numbered}\nmodel: {embedding_dim: 4}\n"
LOGS = "data: {path: DATA}\nmodel: {kind: sasrec, embedding_dim: 4}\n"
GOOD = "1\t3\tab\tcd\n0\t\t\tab\n" * 20


def clicks_table(**columns: object) -> Callable[[Path], None]:
    found = {"label": [1, 0], "I1": [1, 2], "C1": ["a", "b"], "C2": ["a", "b"], **columns}
    return lambda path: parquet.write_table(pa.table({name: values for name, values in found.items() if values}), path)


CONFIGS = {
    "model: {kind: dlmr}\n": ":1:9: model.kind: 'dlmr' is not one of two_tower, dlrm, dcnv2, wide, sasrec; did you mean 'dlrm'?",
    "model:\n  kind: dlrm\n  botom: [8]\n": ":3:3: unknown key 'botom' in model; did you mean 'bottom'?",
    "model: {kind: dlrm, cross_rank: 8}\n": ":1:21: model.cross_rank: dlrm takes no 'cross_rank'",
    "model: {kind: dcnv2}\neval: {k: 20}\n": ":2:8: unknown key 'k' in eval",
    "model: {kind: dlrm}\neval: {patience: 2, every_steps: null}\n": (
        ":2:8: eval.patience: patience counts evaluations during training: set"
    ),
    "model: {kind: dlrm}\ntrain: {schedule: {decay: cosin}}\n": (
        ":2:20: train.schedule.decay: 'cosin' is not one of none, linear, cosine; did you mean 'cosine'?"
    ),
    "model: {kind: dlrm}\ndata: {split: {fraction: 1.5}}\n": ":2:16: data.split.fraction should be less than or equal to 1",
    "model: {kind: dlrm}\ndata:\n  ids: {kind: vocabulary, seed: 3}\n": ":3:27: data.ids.seed: vocabulary takes no 'seed'; it",
    "model: {kind: dlrm}\ndata:\n  ids: {tables: {c3: 5}}\n": ":3:3: data.ids: there is no table 'c3'; did you mean",
    "model: {kind: dlrm}\nplan: {C0: row_wise}\n": ":2:1: plan: there is no table 'C0'; did you mean",
    "model: {kind: dlrm}\nplan: rowwise\n": ":2:1: plan: 'rowwise' is not one of auto, table_wise, row_wise",
    "model: {kind: dlrm}\ndata: {integers: [a, a]}\n": ":2:8: data.integers: 'a' occurs twice",
    "model: {kind: dlrm}\ndata: {user: who}\n": ":2:8: unknown key 'user' in data",
    "model: {kind: sasrec, heads: 3}\n": ":1:23: model.heads: 3 heads do not divide embedding_dim 64; each takes an equal part",
    "model: {kind: sasrec}\nplan: {user: row_wise}\n": ":2:1: plan: there is no table 'user'",
    "model: {kind: sasrec}\ndata: {times: when}\n": ":2:8: unknown key 'times' in data; did you mean 'time'?",
}
FILES = {
    ("a.txt", "1\t3\tab\tcd\n2\t3\tab\tcd\n"): ":2: column 'label' (field 1): '2' is no label, which is 0 or 1",
    ("b.txt", GOOD + "1\tx\tab\tcd\n"): ":41: column 'I1' (field 2): 'x' is no number",
    ("c.txt", GOOD + "1\t3\tab\tcdx\n"): ":41: column 'C2' (field 4): 'cdx' is no category, which is 1 to 8 hexadecimal digits",
    ("d.txt", GOOD + "1\t3\tab\n"): ":41: 3 field(s), but a row has 4: the label, 1 integers and 2 categories",
    (
        "e.txt",
        "label\tI1\tC1\tC2\n" + GOOD,
    ): ":1: column 'label' (field 1): 'label' is no label; files of this layout",
    ("f.txt", "1,3,ab,cd\n"): ":1: 1 field(s), but a row has 4",
    ("g.txt", ""): ": there are no rows in it",
    ("h.parquet", clicks_table(C2=[], c2=["a", "b"])): ": there is no column 'C2' (data.categories); did you mean 'c2'?",
    ("i.parquet", clicks_table(C1=["a", "x"])): ": row 1 (from 0), column 'C1': 'x' is no category",
    ("j.parquet", clicks_table(I1=[[1], [2]])): ": column 'I1' (data.integers) holds list<element: int64>; numbers must be numbers",
    ("k.csv", "usr_id,item_id\n1,2\n"): ": there is no column 'user_id' (data.user); did you mean 'usr_id'?",
    ("m.csv", "user_id,item_id,timestamp\n1,2,monday\n"): ":2: column 'timestamp': 'monday' is neither a whole number nor an ISO",
    ("n.csv", "user_id,item_id,time\n1,2,3\n"): ": there is no column 'timestamp' (data.time); did you mean 'time'?",
    ("o.csv", "user_id,item_id,timestamp\n1,2,3\n2,2,4\n"): ": no user has three interactions: one is held out",
    ("l.csv", "user_id,item_id\n1,2\n1,-2\n"): ":3: column 'item_id': -2 is negative; number users and items from 0",
}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", failures.ERROR_FILE, failures.QUIET):
        monkeypatch.delenv(name, raising=False)


def told(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What the command says on its way to exit code 2."""
    assert main(["train", *map(str, words)]) == 2
    text = capsys.readouterr().err
    assert text.count("shardembed: error: ") == 1
    assert "Traceback" not in text
    return text


@pytest.mark.parametrize(("text", "message"), CONFIGS.items())
def test_a_wrong_configuration_is_told_with_its_place_before_any_rank_starts(
    tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(launch, "run_ranks")
    path = tmp_path / "job.yaml"
    path.write_text(text)
    assert f"{path}{message}" in told(capsys, path, "--ranks", 2)


@pytest.mark.parametrize(("file", "message"), FILES.items(), ids=[name for name, _ in FILES])
@pytest.mark.parametrize("dry", [False, True])
def test_a_wrong_data_file_is_told_with_its_place(
    tmp_path: Path, file: tuple[str, str | Callable[[Path], None]], message: str, dry: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    name, content = file
    data = tmp_path / name
    if isinstance(content, str):
        data.write_text(content)
    else:
        content(data)
    path = tmp_path / "job.yaml"
    job = CLICKS if not name.endswith(".csv") else LOGS if name in ("m.csv", "n.csv", "o.csv") else PAIRS
    path.write_text(job.replace("DATA", str(data)) + f"run_dir: {tmp_path / 'runs'}\n")
    assert f"{data}{message}" in told(capsys, path, *["--dry-run"] * dry)
    assert not (tmp_path / "runs").exists()
