"""`table_map`: principal components as an exact decomposition has them, a sample that is one, and a picture with names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shardembed as se
from shardembed.cli import main
from shardembed.embeddings import components
from shardembed.embeddings.stored import StoredTables
from shardembed.errors import ConfigError, ExportError, IdRangeError
from tests.unit.checkpoint.saved import Writer

STEP = "step-0000000001"
NONE = torch.empty(0, dtype=torch.int64)


def saved(folder: Path, table: torch.Tensor) -> Path:
    writer = Writer(folder / STEP)
    writer.add("model.item.weight", table)
    writer.write()
    return folder


def lengthy() -> torch.Tensor:
    """Far from zero, longest along one direction and then another."""
    generator = torch.Generator().manual_seed(3)
    scales = torch.tensor([1.0, 9, 0.5, 4])
    turned = torch.linalg.qr(torch.randn(4, 4, generator=generator)).Q
    return (torch.randn(200, 4, generator=generator) * scales) @ turned + 1000


@pytest.mark.parametrize("block_bytes", [16, 500, 1 << 20])
def test_components_are_those_of_all_rows_at_once(tmp_path: Path, block_bytes: int) -> None:
    table = lengthy()
    with StoredTables(saved(tmp_path, table)) as stored:
        flat = components.flatten(stored.find("item"), 1000, NONE, block_bytes=block_bytes)
    centred = table.double() - table.double().mean(0)
    _, sizes, directions = torch.linalg.svd(centred, full_matrices=False)
    wanted = centred @ directions[:2].T
    for found, exact in zip(flat.points.T, wanted.T, strict=True):  # each up to its sign
        assert torch.allclose(found * torch.sign(found @ exact), exact, atol=1e-8)
    assert flat.shares == pytest.approx((sizes.square() / sizes.square().sum())[:2].tolist(), rel=1e-9)
    assert flat.ids.tolist() == list(range(200))


def test_rows_with_nan_count_nowhere_and_narrow_tables_are_flat(tmp_path: Path) -> None:
    table = lengthy()
    holed = torch.cat([table, torch.full((1, 4), torch.nan), torch.full((1, 4), torch.inf)])
    with StoredTables(saved(tmp_path / "a", holed)) as stored, StoredTables(saved(tmp_path / "b", table)) as other:
        found = components.flatten(stored.find("item"), 1000, NONE, block_bytes=100)
        whole = components.flatten(other.find("item"), 1000, NONE, block_bytes=100)
    assert found.left_out == 2
    assert torch.equal(found.ids, whole.ids)
    assert torch.allclose(found.points, whole.points)
    with StoredTables(saved(tmp_path / "c", table[:, :1])) as stored:
        flat = components.flatten(stored.find("item"), 1000, NONE)
    assert flat.shares == (1.0, 0.0)
    assert not flat.points[:, 1].any()
    with StoredTables(saved(tmp_path / "d", torch.ones(3, 2))) as stored:
        assert components.flatten(stored.find("item"), 1000, NONE).shares == (0.0, 0.0)
    with StoredTables(saved(tmp_path / "e", holed[200:])) as stored, pytest.raises(ConfigError, match="no row without inf or nan"):
        components.flatten(stored.find("item"), 1000, NONE)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 9))
def test_a_sample_has_each_row_once_and_the_asked_ones_too(rows: int, sample: int, seed: int) -> None:
    always = torch.tensor([0, rows - 1])
    found = components._sample(rows, sample, always, seed)
    assert torch.equal(found, found.unique())
    assert {0, rows - 1} <= set(found.tolist()) <= set(range(rows))
    assert min(sample, rows) <= len(found) <= min(sample + 2, rows)
    assert torch.equal(found, components._sample(rows, sample, always, seed))


def test_a_sample_prefers_no_row() -> None:
    counts = torch.zeros(20)
    for seed in range(400):
        counts[components._sample(20, 10, NONE, seed)] += 1
    assert int(counts.min()) > 150  # of 200 expected, with a deviation of 10
    assert int(counts.max()) < 250


def test_the_picture_has_names_of_points_far_apart_and_of_those_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path, lengthy())
    (tmp_path / "vocab.txt").write_text("".join(f"film {row} costs $5_{row}^2\n" for row in range(200)))
    words = ["map", str(tmp_path), "--table", "item", "--names", str(tmp_path / "vocab.txt"), "--id", "7", "--sample", "100"]
    out = tmp_path / "map.svg"
    assert main([*words, "--out", str(out), "--json", "--labels", "9"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["step"], found["table"]) == (200, 1, "model.item")
    assert found["drawn"] in (100, 101)
    assert found["named"][0] == 7
    assert 4 <= len(found["named"]) <= 9
    text = out.read_text()
    for row in found["named"]:
        assert f">film {row} costs $5_{row}^2<" in text, "no formula is made of it"
    assert text.count(">film") == len(found["named"])
    assert ">first principal component (" in text
    before = out.read_bytes()
    assert main([*words, "--out", str(out), "--labels", "9"]) == 0
    assert out.read_bytes() == before  # replaced by the same
    shown = capsys.readouterr().out
    assert f"of 200 rows, {len(found['named'])} of them named" in shown
    assert max(len(line) for line in shown.splitlines()[1:]) <= 80
    drawn = se.table_map(tmp_path, "item", tmp_path / "map.png", labels=3)
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert (drawn.drawn, len(drawn.named)) == (200, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["map.png", "map.svg", STEP, "vocab.txt"]


def test_what_cannot_be_drawn_is_told(tmp_path: Path) -> None:
    saved(tmp_path, lengthy())
    for out, settings, kind, says in (
        ("map.gif", {}, ConfigError, r"map.gif: a picture's name must end in one of \.png"),
        ("map.png", {"sample": 0}, ConfigError, "sample=0"),
        ("map.png", {"ids": [200]}, IdRangeError, "id 200 at position 0; its ids are 0 to 199"),
        ("nowhere/map.png", {}, ExportError, r"map.png cannot be written: No such file"),
    ):
        with pytest.raises(kind, match=says):
            se.table_map(tmp_path, "item", tmp_path / out, **settings)
    assert [path.name for path in tmp_path.iterdir()] == [STEP]
