"""State dicts of sharded models: torch.distributed.checkpoint across cuts, plain models' weights, and rows from files."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import safetensors
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import shardembed as se
from shardembed.errors import ConfigError, PickleError, UnsupportedError
from shardembed.modules import boxes
from tests.harness import run_ranks
from tests.ranks.beside import COLUMNS, F64, ITEMS, USERS, Towers, seeded, weights_of
from tests.ranks.convert.test_shard import equal

CUTS: dict[str, dict[str, se.Placement]] = {
    "rows and columns": {"user": se.row_wise(strided=False), "towers.item": se.column_wise()},
    "uneven": {"user": se.table_wise(0), "towers.item": se.grid(2, strided=False)},
    "dealt and copied": {"user": se.row_wise(), "towers.item": se.replicated()},
    "dealt strips": {"user": se.table_wise(0), "towers.item": se.grid(2)},
}


def sharded(seed: int, cut: str, **settings: Any) -> nn.Module:
    optimizer = settings.pop("optimizer", se.optim.SGD())
    return se.shard(seeded(Towers, seed), optimizer=optimizer, plan=CUTS[cut], verbose=False, **settings)


def save(rank: int, world_size: int, folder: str, cut: str, optimizer: se.optim.SGD | None) -> None:
    dcp.save(sharded(1, cut, optimizer=optimizer).state_dict(), checkpoint_id=folder, no_dist=world_size == 1)


def load(rank: int, world_size: int, folder: str, cut: str) -> dict[str, torch.Tensor]:
    model = sharded(2, cut)
    state = model.state_dict()
    dcp.load(state, checkpoint_id=folder, no_dist=world_size == 1)
    model.load_state_dict(state)
    return weights_of(se.unshard(model))


@pytest.mark.parametrize("saved_on", [1, 2, 3])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one rank saves without a group
def test_a_distributed_checkpoint_loads_on_every_cut_and_number_of_ranks(tmp_path: Path, saved_on: int, cut: str) -> None:
    run_ranks(saved_on, save, str(tmp_path), cut, se.optim.SGD() if saved_on < 3 else None)
    expected = weights_of(seeded(Towers, 1))
    for world_size in (1, 2, 3):
        for other in CUTS if world_size == 2 else [cut]:
            for found in run_ranks(world_size, load, str(tmp_path), other):
                assert equal(found, expected), f"{other} on {world_size} ranks"
    plain = weights_of(seeded(Towers, 3))
    dcp.load(plain, checkpoint_id=str(tmp_path), no_dist=True)
    assert equal(plain, expected), "a plain model reads another checkpoint"


def through_torch(rank: int, world_size: int, folder: str) -> None:
    """torch's own get_model_state_dict and set_model_state_dict, and a plain checkpoint into a sharded model."""
    model = sharded(1, "rows and columns")
    state = get_model_state_dict(model)
    dcp.save(state, checkpoint_id=f"{folder}/sharded")
    other = sharded(2, "uneven")
    state = get_model_state_dict(other)
    dcp.load(state, checkpoint_id=f"{folder}/sharded")
    set_model_state_dict(other, state)
    assert equal(weights_of(se.unshard(other)), weights_of(seeded(Towers, 1))), "torch's helpers lose something"
    dcp.save(seeded(Towers, 4).state_dict(), checkpoint_id=f"{folder}/plain")
    dcp.load(model.state_dict(), checkpoint_id=f"{folder}/plain")
    assert equal(weights_of(se.unshard(model)), weights_of(seeded(Towers, 4))), "a plain checkpoint is not loaded"


def test_torchs_state_dict_helpers_and_plain_checkpoints_work(tmp_path: Path) -> None:
    run_ranks(2, through_torch, str(tmp_path))


def dealt_a_few_rows_at_a_time(rank: int, world_size: int, folder: str) -> None:
    with patch.object(boxes, "WINDOW", 64):  # two rows
        save(rank, world_size, folder, "dealt and copied", se.optim.SGD())


def test_dealt_rows_are_saved_as_one_block_a_rank(tmp_path: Path) -> None:
    run_ranks(3, dealt_a_few_rows_at_a_time, str(tmp_path))
    written = dcp.FileSystemReader(str(tmp_path)).read_metadata().state_dict_metadata["user.weight"]
    assert isinstance(written, TensorStorageMetadata)
    assert sorted((chunk.offsets[0], chunk.sizes[0]) for chunk in written.chunks) == [(0, 8), (8, 8), (16, 7)]  # of 23 rows
    plain = weights_of(seeded(Towers, 3))
    dcp.load(plain, checkpoint_id=str(tmp_path), no_dist=True)
    assert equal(plain, weights_of(seeded(Towers, 1)))


def test_rows_that_wait_to_be_loaded_do_nothing_else() -> None:
    rows = boxes.OwnRows.of(((range(1, 6, 2), torch.zeros(3, 2)),), range(6))
    with pytest.raises(UnsupportedError, match="can be loaded into, and nothing else"):
        _ = rows + 1


def test_a_state_dict_is_not_pickled() -> None:
    model = sharded(1, "rows and columns")
    with pytest.raises(PickleError, match=r"'user' lies cut.*torch.distributed.checkpoint.save.*se.unshard\(model, rank=0\)"):
        torch.save(model.state_dict(), io.BytesIO())


def test_a_handle_does_not_compute() -> None:
    handle = sharded(1, "rows and columns").state_dict()["user.weight"]
    assert (tuple(handle.shape), handle.dtype) == ((USERS, COLUMNS), F64)
    assert repr(handle) == "TableHandle('user', 23 x 4 torch.float64, 1 shard(s) here)"
    with pytest.raises(UnsupportedError, match=r"'user' lies cut.*rows\(table, ids\)"):
        _ = handle + 1


def keep_best(rank: int, world_size: int) -> None:
    """The usual way to keep the best weights in memory; and what another cut says to it."""
    model, other = sharded(1, "uneven"), sharded(1, "rows and columns")
    best = copy.deepcopy(model.state_dict())
    own = model.state_dict()
    model.load_state_dict(seeded(Towers, 2).state_dict())
    model.load_state_dict(own)  # refers to the weights themselves, as with torch's modules
    ids = torch.arange(USERS)
    assert torch.equal(model.user.rows("user", ids), seeded(Towers, 2).user.weight), "a plain state dict is not loaded"
    model.load_state_dict(best)
    assert torch.equal(model.user.rows("user", ids), seeded(Towers, 1).user.weight), "the copy does not bring its weights back"
    with pytest.raises(RuntimeError, match=r"user.weight: table 'user' is not cut as the one.*torch.distributed.checkpoint"):
        other.load_state_dict(best)


def test_a_copied_state_dict_brings_the_weights_back() -> None:
    run_ranks(2, keep_best)


def test_keys_and_shapes_that_do_not_fit_are_torchs_own_error() -> None:
    model, state = sharded(1, "rows and columns"), seeded(Towers, 2).state_dict()
    lacking = {name: value for name, value in state.items() if name != "user.weight"}
    with pytest.raises(RuntimeError, match=r"Missing key.*user.weight"):
        model.load_state_dict(lacking)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*user.scale"):
        model.load_state_dict({**state, "user.scale": torch.zeros(1)})
    found = model.load_state_dict({**lacking, "user.scale": torch.zeros(1)}, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == (["user.weight"], ["user.scale"])
    with pytest.raises(RuntimeError, match=r"user.weight: table 'user' is \(23, 4\), the source has shape \(2, 4\)"):
        model.load_state_dict({**state, "user.weight": torch.zeros(2, COLUMNS)})


class Recording:
    """An array that remembers what was read of it."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.shape, self.seen = values, values.shape, np.zeros(values.shape, dtype=int)

    def __getitem__(self, where: Any) -> np.ndarray:
        self.seen[where] += 1
        return self.values[where]


def read_own_part(rank: int, world_size: int, cut: str) -> np.ndarray:
    model, source = sharded(1, cut), Recording(np.arange(ITEMS * 6.0).reshape(ITEMS, 6))
    model.towers["item"].load_rows("towers.item", source)
    rows = model.towers["item"].rows("towers.item", torch.arange(ITEMS))
    assert torch.equal(rows, torch.from_numpy(source.values)), "the rows are other ones"
    return source.seen


@pytest.mark.parametrize("cut", CUTS)
def test_each_rank_reads_its_own_part_only(cut: str) -> None:
    seen = sum(run_ranks(3, read_own_part, cut))
    assert (seen == (3 if CUTS[cut]["towers.item"] == se.replicated() else 1)).all()


def from_files(rank: int, world_size: int, folder: str, cut: str) -> None:
    model, expected = sharded(1, cut), weights_of(seeded(Towers, 5))
    mapped = np.load(f"{folder}/item.npy", mmap_mode="r")
    model.towers["item"].load_rows("towers.item", mapped)
    with safetensors.safe_open(f"{folder}/user.safetensors", "pt") as file:
        model.user.load_rows("user", file.get_slice("user"))
        with pytest.raises(ConfigError, match=r"'towers.item' is \(17, 6\), the source has shape \(23, 4\)"):
            model.towers["item"].load_rows("towers.item", file.get_slice("user"))
    found = weights_of(se.unshard(model))
    for name in ("user.weight", "towers.item.weight"):
        assert torch.equal(found[name], expected[name]), f"{name} of {cut}"


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.filterwarnings("error")
def test_rows_load_from_mapped_and_safetensors_files(tmp_path: Path, cut: str) -> None:
    weights = weights_of(seeded(Towers, 5))
    np.save(tmp_path / "item.npy", weights["towers.item.weight"].numpy())
    save_file({"user": weights["user.weight"]}, tmp_path / "user.safetensors")
    run_ranks(2, from_files, str(tmp_path), cut)
