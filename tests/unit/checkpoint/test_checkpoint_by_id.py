"""Dynamic tables on the disk: what a manifest may say of them, what is read by id, and what a stranger may have altered."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardembed as se
from shardembed.checkpoint.describe import contents
from shardembed.checkpoint.format import manifest as manifest_module
from shardembed.checkpoint.format.blocks import Entry
from shardembed.checkpoint.format.manifest import Manifest
from shardembed.checkpoint.format.verify import verify
from shardembed.cli import main
from shardembed.embeddings.stored import StoredTables
from shardembed.errors import CheckpointError, IdRangeError
from tests.unit.checkpoint.by_id import BUCKETS, COLUMNS, EVERYONE, HALVES, KEY, Shard, expected, halves, of, two_of_them, write


@pytest.fixture
def root(tmp_path: Path) -> Path:
    two_of_them(tmp_path)
    return tmp_path


@pytest.mark.parametrize("step", [1, 7])
@pytest.mark.parametrize("block_bytes", [1, 40, 1 << 20])
def test_rows_come_by_ascending_ids_in_blocks_of_any_size(root: Path, step: int, block_bytes: int) -> None:
    ids, rows = expected(step)
    with StoredTables(root, step) as stored:
        table = stored.find("item")
        assert table.rows == len(ids)
        blocks = [(block.first, block.ids.clone(), block.values.clone()) for block in table.blocks(block_bytes=block_bytes)]
        some = ids[[5, 0, 3]]
        assert torch.equal(table.some(some), rows[[5, 0, 3]])
        assert table.chosen([ids[4], ids[1], ids[4]]).tolist() == [ids[1], ids[4]]
        with pytest.raises(IdRangeError, match=r"table 'emb\.item': id 18 at position 1; it is none of the \d+ that have a row"):
            table.chosen([int(ids[0]), 18])
    assert torch.equal(torch.cat([part[1] for part in blocks]), ids)
    assert torch.equal(torch.cat([part[2] for part in blocks]), rows)
    assert [part[0] for part in blocks] == [sum(len(part[1]) for part in blocks[:number]) for number in range(len(blocks))]


def test_a_plain_model_gets_all_ids_or_those_that_are_named(root: Path) -> None:
    ids, rows = expected(7)
    model = nn.ModuleDict({"emb": nn.ModuleDict({"item": nn.Embedding(2, COLUMNS)})})
    found = se.load_plain(root, model)["emb.item"]
    table: Any = model["emb"].item  # pyright: ignore[reportIndexIssue]
    assert table.num_embeddings == len(ids)
    assert torch.equal(table(found(ids)), rows)
    with pytest.raises(IdRangeError, match="id 77 at position 0"):
        found(torch.tensor([77]))
    named = ids[[7, 2]]
    found = se.load_plain(root, model, rows={"emb.item": named})["emb.item"]
    assert torch.equal(table(found(named)), rows[[7, 2]])
    assert table.num_embeddings == 2
    with pytest.raises(CheckpointError, match=r"rows\['emb\.item'\] has id 77, which has no row: \d+ other ids have one"):
        se.load_plain(root, model, rows={"emb.item": [77]})
    padded = nn.ModuleDict({"emb": nn.ModuleDict({"item": nn.Embedding(2, COLUMNS, padding_idx=0)})})
    with pytest.raises(CheckpointError, match="has padding_idx=0, and in a dynamic table the id that stands for nothing"):
        se.load_plain(root, padded)
    with pytest.raises(CheckpointError, match=r"is \(2, 5\) in the model"):
        se.load_plain(root, nn.ModuleDict({"emb": nn.ModuleDict({"item": nn.Embedding(2, 5)})}))


def test_neighbours_and_exports_go_by_id(root: Path, tmp_path: Path) -> None:
    ids, rows = expected(7)
    (found,) = se.embeddings.neighbors(root, "item", [int(ids[3])], k=4, metric="dot")
    scores = rows.double() @ rows[3].double()
    order = sorted((place for place in range(len(ids)) if place != 3), key=lambda place: (-float(scores[place]), place))
    assert list(found.ids) == ids[order[:4]].tolist()
    done = se.embeddings.export_tables(root, tmp_path / "out", format="npy")
    (table,) = done.tables
    assert table.rows == len(ids)
    read = {name: torch.from_numpy(__import__("numpy").load(tmp_path / "out" / name)) for name in table.files}
    assert torch.equal(read["emb.item.ids.npy"], ids)
    assert torch.equal(read["emb.item.npy"], rows)


def test_a_map_draws_ids_that_have_a_row(root: Path) -> None:
    from shardembed.embeddings.components import flatten

    ids, _ = expected(7)
    with StoredTables(root) as stored:
        flat = flatten(stored.find("item"), 5, ids[-1:])
    assert set(flat.ids.tolist()) <= set(ids.tolist())
    assert int(ids[-1]) in flat.ids.tolist()
    assert 5 <= len(flat.ids) <= 6


def test_inspect_says_how_many_of_how_many(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = contents(root / "step-0000000007", manifest_module.read_manifest(root / "step-0000000007")).tables[0]
    assert (found.dynamic, found.capacity, found.updated_rows, found.dropped_ids, found.chunks) == (True, 500, 4, 3, 0)
    assert main(["inspect", str(root), "--verify"]) == 0
    assert "24 of 500" in capsys.readouterr().out
    assert main(["inspect", str(root), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checkpoint"]["tables"][KEY]["shape"] == [24, COLUMNS]


# What a stranger may have altered.


def swapped(ids: torch.Tensor) -> torch.Tensor:
    return ids.flip(0)


def twice(ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([ids[:1], ids[:-1]])


@pytest.mark.parametrize("change", [swapped, twice])
def test_ids_that_do_not_ascend_are_told(tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    shards = halves(EVERYONE)
    write(tmp_path / "step-0000000001", [shards[0], Shard(HALVES[1], change(shards[1].ids))], len(EVERYONE))
    told(tmp_path, rf"rank-00001\.safetensors: the updated rows of '{KEY}' are not ascending numbers")


def test_an_id_in_the_wrong_shard_is_told(tmp_path: Path) -> None:
    one, other = halves(EVERYONE)
    strange = torch.cat([other.ids, one.ids[-1:]]).sort().values
    write(tmp_path / "step-0000000001", [one, Shard(HALVES[1], strange)], len(EVERYONE) + 1)
    told(
        tmp_path,
        rf"rank-00001\.safetensors: the updated rows of '{KEY}' hold id {int(one.ids[-1])}, which belongs to another",
    )


def test_a_strip_that_lacks_an_id_is_told(tmp_path: Path) -> None:
    everyone = of(range(BUCKETS), EVERYONE)
    other = torch.cat([everyone[:-1], torch.tensor([2**63 - 2])])
    strips = [Shard(range(BUCKETS), everyone, None, range(2)), Shard(range(BUCKETS), other, None, range(2, 3))]
    write(tmp_path / "step-0000000001", strips, len(EVERYONE))
    with (
        pytest.raises(CheckpointError, match=f"lacks 1 ids that its table has, id {2**63 - 1}"),
        StoredTables(tmp_path) as stored,
    ):
        list(stored.find("item").blocks())


def told(root: Path, text: str) -> None:
    (problem,) = verify(root / "step-0000000001")
    with pytest.raises(CheckpointError, match=text):
        raise CheckpointError(problem.text)
    assert problem.key == KEY
    with pytest.raises(CheckpointError, match=text), StoredTables(root) as stored:
        stored.find("item")


def entry_of(root: Path) -> tuple[Manifest, Entry]:
    found = manifest_module.read_manifest(root / "step-0000000007")
    return found, found.entries[KEY]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda entry: {"by_id": None}, "buckets or dropped ids, and no dynamic table"),
        (lambda entry: {"by_id": replace(entry.by_id, buckets=3)}, "buckets go up to 3, the tensor has 3"),
        (lambda entry: {"by_id": replace(entry.by_id, buckets=6)}, "of columns 0 to 2"),
        (lambda entry: {"by_id": replace(entry.by_id, buckets=0)}, "ids cannot fall into 0 buckets"),
        (lambda entry: {"by_id": replace(entry.by_id, whole=True)}, "it holds all rows, and ids that have lost theirs"),
        (lambda entry: {"by_id": replace(entry.by_id, whole=True), "dropped": ()}, "its updates hold . rows of 24"),
        (lambda entry: {"updates": entry.updates[:1]}, "of columns 0 to 2"),
        (lambda entry: {"shape": (24, 4)}, "columns up to 3, the tensor has 4"),
        (lambda entry: {"kind": "dense"}, "a dense tensor has no ids"),
    ],
)
def test_what_cannot_be_is_neither_read_nor_written(root: Path, change: Any, says: str) -> None:
    made, entry = entry_of(root)
    with pytest.raises(CheckpointError, match=says):
        replace(made, entries={KEY: replace(entry, **change(entry))}).to_bytes()


def test_an_increment_of_another_cut_is_refused(root: Path) -> None:
    made, entry = entry_of(root)
    assert entry.by_id is not None
    updates = (replace(entry.updates[0], buckets=range(0, 1)), replace(entry.updates[1], buckets=range(1, 2)))
    altered = replace(made, entries={KEY: replace(entry, by_id=replace(entry.by_id, buckets=2), updates=updates)})
    (root / "step-0000000007" / "manifest.json").write_bytes(altered.to_bytes())
    with pytest.raises(CheckpointError, match=rf"which has no '{KEY}' of"):
        StoredTables(root).names  # noqa: B018


def test_format_2_is_read_as_it_was() -> None:
    from tests.unit.checkpoint.test_checkpoint_manifest import A, manifest_of

    made = manifest_of(A)
    data = json.loads(made.to_bytes())
    assert data["format"] == 3
    data["format"] = 2
    del data["checksum"]
    data["checksum"] = manifest_module._checksum(data)
    assert Manifest.parse(json.dumps(data).encode(), "m") == made
