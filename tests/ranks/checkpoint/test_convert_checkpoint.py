"""`convert_checkpoint`: TorchRec's collections from torch.save and torch.distributed.checkpoint, loaded into sharded ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import shardembed as se
from shardembed.cli import main
from shardembed.errors import CheckpointError
from tests.harness import run_ranks

torchrec = pytest.importorskip("torchrec")
BAGS = "sparse.embedding_bags.user.weight"


class Model(nn.Module):
    """A collection of TorchRec, a plain table, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        config = torchrec.EmbeddingBagConfig(name="user", num_embeddings=40, embedding_dim=8, feature_names=["user"])
        self.sparse = torchrec.EmbeddingBagCollection([config])
        self.item = nn.Embedding(30, 4, dtype=torch.bfloat16)
        self.head = nn.Linear(8, 1)


def save_sharded(rank: int, world_size: int, folder: str) -> None:
    """Every rank holds every other rows of the table, as torch's own sharded tensors, and rank 0 the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    model = Model()
    state = {"model": dict(model.state_dict()), "step": 7, "optimizer": {"lr": 0.1}}
    state["model"][BAGS] = distribute_tensor(numbers(), init_device_mesh("cpu", (world_size,)), [Shard(0)])
    dcp.save(state, checkpoint_id=folder)


def numbers() -> torch.Tensor:
    return torch.arange(320.0).reshape(40, 8)


def load_sharded(rank: int, world_size: int, folder: str) -> dict[str, torch.Tensor]:
    model = se.shard(Model(), optimizer=se.optim.SGD(lr=0.1), plan={"sparse.user": se.row_wise()}, verbose=False)
    restored = se.load_checkpoint(folder, model, weights_only=True)
    assert restored.step == 3, restored
    ids = torch.arange(30)
    return {BAGS: model.sparse.rows("sparse.user", torch.arange(40)), "item": model.item(ids), "head": model.head.weight.detach()}


def test_a_collection_that_was_sharded_goes_into_one_that_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_ranks(2, save_sharded, str(tmp_path / "theirs"))
    words = ["convert", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours"), "--prefix", "model.", "--step", "3"]
    assert main(words) == 1
    assert "reading it unpickles, which can run any code" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()
    assert main([*words, "--trusted", "--json", "--table", "item"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["tables"], sorted(found["dense"])) == ([BAGS, "item.weight"], ["head.bias", "head.weight"])
    assert set(found["left_out"]) == {"step", "optimizer.lr"}
    for each in run_ranks(2, load_sharded, str(tmp_path / "ours")):
        assert torch.equal(each[BAGS], numbers())
    assert main(["inspect", str(tmp_path / "ours"), "--verify"]) == 0
    near = se.neighbors(tmp_path / "ours", "sparse.embedding_bags.user", [39], 1)
    assert near[0].ids == (38,)


def test_a_state_dict_of_torch_save_is_read_too(tmp_path: Path) -> None:
    model = Model()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    done = se.convert_checkpoint(tmp_path / "model.pt", tmp_path / "ours", trusted=True)
    assert done.path == tmp_path / "ours" / "step-0000000000"
    assert done.tables == (BAGS,)
    again = Model()
    se.load_plain(tmp_path / "ours", again)
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    second = se.convert_checkpoint(tmp_path / "model.pt", tmp_path / "ours", trusted=True)
    assert second.path.name == "step-0000000000.1"  # nothing is written over


def test_what_is_no_such_checkpoint_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    torch.save(Model(), tmp_path / "whole.pt")
    torch.save([1], tmp_path / "list.pt")
    torch.save({"x": torch.zeros(2, dtype=torch.complex64), "lr": 0.1}, tmp_path / "odd.pt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / ".metadata").write_bytes(b"no pickle")
    for name, says in (
        ("whole.pt", r"torch.load\(weights_only=True\) cannot read it"),
        ("none.pt", "cannot read it: .*No such file"),
        ("list.pt", "holds list, not a state dict"),
        ("odd.pt", "has no tensor to convert"),
        ("empty", "has no .metadata"),
        ("bad", r"\.metadata cannot be read: UnpicklingError"),
    ):
        with pytest.raises(CheckpointError, match=says):
            se.convert_checkpoint(tmp_path / name, tmp_path / "ours", trusted=True)
    assert not (tmp_path / "ours").exists()
