"""`neighbors`: exact, against a reference that sorts everything; ties by id; whatever the blocks and cuts; shown and as JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

import shardembed as se
from shardembed.cli import main
from shardembed.embeddings import nearest as module
from shardembed.embeddings.names import names_of
from shardembed.errors import ConfigError, DataError, IdRangeError
from tests.amount import examples
from tests.unit.checkpoint.saved import Writer

STEP = "step-0000000001"
EACH = examples(25, HealthCheck.function_scoped_fixture)


def saved(folder: Path, table: torch.Tensor) -> None:
    """Two ranks, columns and rows cut."""
    rows, columns = table.shape
    half = columns // 2 or columns
    cuts = [(0, range(0, rows, 2), range(half)), (1, range(1, rows, 2), range(half)), (1, range(rows), range(half, columns))]
    writer = Writer(folder / STEP)
    writer.add("model.item.weight", table, [cut for cut in cuts if len(cut[1]) and len(cut[2])])
    writer.write()


def reference(table: torch.Tensor, query: int, k: int, metric: str) -> list[int]:
    """By exact sums (`math.fsum`), sorted by score and then by id."""
    rows = [[float(x) for x in row] for row in table]

    def dot(a: list[float], b: list[float]) -> float:
        return math.fsum(x * y for x, y in zip(a, b, strict=True))

    def score(row: list[float]) -> float:
        if metric == "dot":
            return dot(row, rows[query])
        size = math.sqrt(dot(row, row)) * math.sqrt(dot(rows[query], rows[query]))
        return dot(row, rows[query]) / size if size else 0.0

    scores = {number: score(row) for number, row in enumerate(rows) if number != query}
    return sorted(scores, key=lambda number: (-scores[number], number))[:k]


@EACH
@given(data=st.data())
@pytest.mark.parametrize("metric", module.METRICS)
def test_whole_numbers_have_their_neighbours_exactly_with_many_ties(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, metric: Any, data: st.DataObject
) -> None:
    monkeypatch.setattr(module, "AT_A_TIME", data.draw(st.sampled_from([1, 12, 1 << 19])))
    rows, columns = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 5))
    numbers = data.draw(st.lists(st.integers(-1, 1), min_size=rows * columns, max_size=rows * columns))
    table = torch.tensor(numbers, dtype=torch.float32).reshape(rows, columns)
    query, k = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(1, 14))
    if metric == "cosine":
        table[query, 0] = 1
    folder = tmp_path_factory.mktemp("ckpt")
    saved(folder, table)
    (found,) = se.neighbors(folder, "item", [query], k, metric=metric, block_bytes=data.draw(st.sampled_from([1, 40, 1 << 20])))
    assert found.id == query
    assert list(found.scores) == sorted(found.scores, reverse=True)
    if metric == "dot":  # sums of whole numbers are exact, so ties are ties
        assert list(found.ids) == reference(table, query, k, metric)
    else:  # which the roots of a cosine are not; equal rows have equal scores all the same, and come by id
        assert len(found.ids) == min(k, rows - 1)
        wanted = reference(table, query, rows, metric)[: len(found.ids)]
        assert torch.allclose(_cosines(table, query)[list(found.ids)], _cosines(table, query)[wanted], atol=1e-6)
        pairs = zip(zip(found.ids, found.scores, strict=True), zip(found.ids[1:], found.scores[1:], strict=True), strict=False)
        assert all(a < b for (a, score), (b, other) in pairs if score == other)


def _cosines(table: torch.Tensor, query: int) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(table, table[query : query + 1], dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("metric", module.METRICS)
def test_random_rows_have_the_neighbours_that_exact_sums_give(tmp_path: Path, metric: Any, dtype: torch.dtype) -> None:
    table = torch.randn(300, 13, generator=torch.Generator().manual_seed(1)).to(dtype)
    table[[20, 150, 299]] = table[7].clone()  # copies, far apart
    saved(tmp_path, table)
    found = se.neighbors(tmp_path, "item", [7, 5], 6, metric=metric, block_bytes=1000)
    assert [list(near.ids) for near in found] == [reference(table, query, 6, metric) for query in (7, 5)]
    if metric == "cosine":
        assert found[0].ids[:3] == (20, 150, 299)
        assert found[0].scores[0] == found[0].scores[2] == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("columns", [1, 3, 16, 33])
def test_scores_do_not_depend_on_where_a_row_lies(columns: int) -> None:
    row = torch.randn(1, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    alone = module._sums(row.clone())
    for count in (2, 7, 64, 1001):
        assert bool((module._sums(row.repeat(count, 1)) == alone).all())
    assert float(alone) == pytest.approx(float(row.sum()), rel=1e-13)


def test_rows_without_direction_or_with_nan(tmp_path: Path) -> None:
    table = torch.tensor([[1.0, 0], [0, 0], [float("nan"), 1], [-1, 0], [2, 0], [float("inf"), 0]])
    saved(tmp_path, table)
    (found,) = se.neighbors(tmp_path, "item", [0])
    assert found == se.neighbors(tmp_path, "item", torch.tensor([0]))[0]
    assert (found.ids, found.scores) == ((4, 1, 3), (1.0, 0.0, -1.0))
    (found,) = se.neighbors(tmp_path, "item", [1], metric="dot")
    assert found.ids == (0, 3, 4)
    for ids, says in (([1], "row 1 is all zeros and has no direction; compare it with the metric 'dot'"), ([2], "row 2 holds inf")):
        with pytest.raises(ConfigError, match=says):
            se.neighbors(tmp_path, "item", ids)
    with pytest.raises(IdRangeError, match=r"id 6 at position 1; its ids are 0 to 5"):
        se.neighbors(tmp_path, "item", [0, 6])
    with pytest.raises(ConfigError, match="metric='cosin' is not one of cosine, dot; did you mean 'cosine'"):
        se.neighbors(tmp_path, "item", [0], metric="cosin")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="k=0"):
        se.neighbors(tmp_path, "item", [0], 0)


def test_the_command_shows_names_and_fits_80_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = torch.eye(12)
    table[3] = table[1] * 2
    saved(tmp_path, table)
    (tmp_path / "vocab.txt").write_text("".join(f"film {row}{' of a very long name' * 5 * (row == 3)}\n" for row in range(12)))
    words = ["neighbors", str(tmp_path), "--table", "item", "--id", "1", "5", "1", "--k", "3"]
    assert main([*words, "--names", str(tmp_path / "vocab.txt")]) == 0
    shown = capsys.readouterr().out
    lines = [line.rstrip() for line in shown.splitlines()]
    assert lines[0] == "nearest rows of item to id 1, film 1"
    assert lines[1].split() == ["rank", "id", "cosine", "name"]
    assert lines[2].startswith("   1   3  1.0000  film 3 of a very long name")
    assert lines[2].endswith("...")
    assert [line.split() for line in lines[3:5]] == [["2", "0", "0.0000", "film", "0"], ["3", "2", "0.0000", "film", "2"]]
    assert lines[6] == "nearest rows of item to id 5, film 5"
    assert len(lines) == 14
    assert " ".join(lines[12:]) == "cosine of rows as they lie in the table; the checkpoint does not say what its model compares"
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in shown
    assert main([*words, "--names", str(tmp_path / "vocab.txt"), "--json", "--metric", "dot"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metric"] == "dot"
    assert [query["id"] for query in found["queries"]] == [1, 5]
    assert found["queries"][0]["neighbors"][1] == {"id": 0, "name": "film 0", "score": 0.0}
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["queries"][0]["neighbors"][0] == {"id": 3, "score": 1.0}


def test_names_are_read_up_to_the_last_one_that_is_wanted(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_bytes(b"a\nb\r\n\nl\xc3\xa9st\xc2\x85word\n\xff\n")
    assert names_of(path, [3, 0, 1, 2, 0]) == {0: "a", 1: "b", 2: "", 3: "l\u00e9st\x85word"}
    with pytest.raises(DataError, match=r"vocab.txt:5: this line is not UTF-8"):
        names_of(path, [4])
    path.write_text("a\nb\n")
    with pytest.raises(DataError, match=r"vocab.txt has no line 3, which would name id 2"):
        names_of(path, [2, 1])
    with pytest.raises(DataError, match=r"none.txt cannot be read: No such file"):
        names_of(tmp_path / "none.txt", [0])


def test_a_folder_of_names_names_ids_and_integers_name_themselves(tmp_path: Path) -> None:
    one, other, _ = se.hash64(["a", "b", "c"], names=tmp_path / "names").tolist()
    assert names_of(tmp_path / "names", [other, 7, one]) == {one: "a", other: "b", 7: "7"}


def test_the_file_of_a_vocabulary_names_rows_by_their_values(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.txt"
    se.Vocabulary.build([["a\tb", "c", "c", "\\other"]]).save(path)
    assert names_of(path, [0, 1]) == {0: "(other values)", 1: "c"}
    assert set(names_of(path, [2, 3]).values()) == {"a\tb", "\\other"}
    se.Vocabulary.build([[7, 7, -3]]).save(path)
    assert names_of(path, [1, 2]) == {1: "7", 2: "-3"}
    with pytest.raises(DataError, match="has no line 4"):
        names_of(path, [3])


def test_commands_take_ids_of_64_bits_and_the_texts_whose_hashes_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["u-1", "u-2", str(1 << 63), "u-3"]
    least = -(1 << 63)
    emb = se.Embedding(None, 4, dynamic=se.Dynamic(), optimizer=se.optim.SGD(lr=0.1), seed=1)
    emb.load_rows(torch.cat([torch.from_numpy(se.hash64(texts)), torch.tensor([least, 7])]), torch.rand(6, 4))
    se.save_checkpoint(tmp_path / "ckpt", torch.nn.ModuleDict({"user": emb}), step=1)
    words = ["neighbors", str(tmp_path / "ckpt"), "--table", "user", "--json", "--k", "1", "--id"]
    assert main([*words, *texts[:3], str(least), "7"]) == 0
    queries = json.loads(capsys.readouterr().out)["queries"]
    assert [query["id"] for query in queries] == [*se.hash64(texts[:3]).tolist(), least, 7]
    ids = [least, *se.hash64(texts[:2]).tolist()]
    (tmp_path / "ids.txt").write_text("".join(f"{each}\n" for each in ids))
    for out, chosen in (("a", f"--rows={','.join(map(str, ids))}"), ("b", f"--rows-file={tmp_path / 'ids.txt'}")):
        words = ["export", str(tmp_path / "ckpt"), "--out", str(tmp_path / out), "--table", "user", "--format", "npy", chosen]
        assert main(words) == 0
        (file,) = (tmp_path / out).glob("*.ids.npy")
        assert np.load(file).tolist() == sorted(ids)
