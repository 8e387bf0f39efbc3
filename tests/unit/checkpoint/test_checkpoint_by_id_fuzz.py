"""Hundreds of altered checkpoints of a dynamic table: each gives the rows that were saved, or others that somebody has signed, or
an error in words; no other error, no memory beyond an allowance, no hang.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import shardembed as se
from shardembed.cli import main
from shardembed.embeddings.stored import StoredTables
from shardembed.errors import CheckpointError, ConfigError
from tests.ranks.living import Trained, batch_of, built, train
from tests.unit.checkpoint.altered import altered, limits, scramble, signed_again
from tests.unit.checkpoint.by_id import COLUMNS, expected, two_of_them

SAVED = expected(7)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:

    two_of_them(tmp_path)
    with limits():
        yield tmp_path


def read(root: Path) -> tuple[torch.Tensor, torch.Tensor] | None:
    """All ids and rows; None where that is refused."""
    try:
        with StoredTables(root) as stored:
            table = stored.find("item")
            blocks = [(block.ids.clone(), block.values.clone()) for block in table.blocks(block_bytes=100)]
            model = nn.ModuleDict({"emb": nn.ModuleDict({"item": nn.Embedding(2, table.columns)})})
            se.load_plain(root, model, dtype=table.dtype if table.dtype.is_floating_point else None)
    except (CheckpointError, ConfigError):
        return None
    assert blocks or not table.rows
    if not blocks:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, COLUMNS)
    return torch.cat([ids for ids, _ in blocks]), torch.cat([rows for _, rows in blocks])


def test_any_value_in_a_manifest_that_is_signed_again(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = root / "step-0000000007" / "manifest.json"
    original = path.read_bytes()
    refused = 0
    for seed in range(400):
        path.write_bytes(signed_again(altered(random.Random(seed), json.loads(original))))
        refused += read(root) is None
        if seed % 10 == 0:
            assert main(["inspect", str(root), "--verify"]) in (0, 1)
            assert "Traceback" not in capsys.readouterr().err
    assert refused > 250


@pytest.mark.parametrize("name", ["step-0000000001", "step-0000000007"])
def test_any_bytes_of_a_file_of_ids_and_rows(root: Path, name: str) -> None:
    path = root / name / "rank-00001.safetensors"
    original = path.read_bytes()
    refused = 0
    for seed in range(200):
        path.write_bytes(scramble(random.Random(seed), original))
        found = read(root)
        refused += found is None
        assert found is None or all(torch.equal(one, other) for one, other in zip(found, SAVED, strict=True))
    assert refused > 150


def saved(folder: Path) -> Trained:
    job = built(1, tables={"item": (300, se.Dynamic(se.LFU(halve_every=2), se.MinCount(2)))})
    train(job, 0, 1, range(4))
    job.save(folder)
    return job


@pytest.mark.exhaustive
def test_what_is_loaded_from_a_manifest_that_is_signed_again_trains_on(tmp_path: Path) -> None:
    """Or it is refused; and the next checkpoint, which is right, loads after what has gone wrong."""
    job = saved(tmp_path / "right")
    saved(tmp_path / "wrong")
    path = tmp_path / "wrong" / "step-0000000004" / "manifest.json"
    original = path.read_bytes()
    data = json.loads(original)
    refused = 0
    with limits():
        for seed in range(120):
            drawn = json.loads(original)
            key = random.Random(seed).choice(list(data["entries"]))
            drawn["entries"][key] = altered(random.Random(seed), {"entry": drawn["entries"][key]}).get("entry")
            path.write_bytes(signed_again(drawn))
            try:
                job.load(tmp_path / "wrong")
            except CheckpointError:
                refused += 1
            else:
                train(job, 0, 1, range(4, 5))
    assert 60 < refused < 120
    job.load(tmp_path / "right")
    fresh = saved(tmp_path / "again")
    ids = batch_of(fresh.model, 5, 0, 1)
    with torch.no_grad():
        assert torch.equal(job.model.tables(ids)["item"], fresh.model.tables(ids)["item"])


@pytest.mark.filterwarnings("ignore::shardembed.errors.NoRoomWarning")
@pytest.mark.parametrize(("name", "value"), [("last", -5), ("last", 2**31 - 1), ("count", -(2**31))])
def test_last_steps_and_counts_that_cannot_be_do_no_harm(tmp_path: Path, name: str, value: int) -> None:
    job = built(1, tables={"item": (300, se.Dynamic(se.LFU(halve_every=2)))})
    train(job, 0, 1, range(4))
    (slab,) = job.model.tables.journey.slabs
    assert slab.dynamic is not None
    census = slab.dynamic.census
    living = census.living(slab.dynamic.steps)
    numbers = census.lasts_S if name == "last" else census.counts_S
    before = census.living
    census.living = lambda steps: living  # type: ignore[method-assign]  # the save is to believe that they are there
    numbers[living[::2]] = value
    job.save(tmp_path)
    census.living = before  # type: ignore[method-assign]
    for rows in (300, 100):
        other = built(1, tables={"item": (rows, se.Dynamic(se.LFU(halve_every=2)))})
        other.load(tmp_path)
        (found,) = other.model.tables.journey.slabs
        assert found.dynamic is not None
        there = found.dynamic.census
        here = there.living(found.dynamic.steps)
        assert len(here) == min(len(living), rows)
        assert 0 <= int(there.lasts_S[here].min()) <= int(there.lasts_S[here].max()) <= 4
        assert int(there.counts_S[here].min()) >= 0
        train(other, 0, 1, range(4, 7))
