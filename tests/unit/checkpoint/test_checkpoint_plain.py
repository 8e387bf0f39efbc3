"""`load_plain`: whole tables and chosen rows into plain models, from every kind of cut, in one process without a group."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import shardembed as se
from shardembed.checkpoint.format import pieces
from shardembed.checkpoint.format.blocks import Base
from shardembed.checkpoint.selection import IdMap, Selection
from shardembed.errors import CheckpointError, IdRangeError
from tests.amount import examples
from tests.unit.checkpoint.saved import Writer, increment, numbered, small_checkpoint, values
from tests.unit.drawn import layouts

STEP = "step-0000000001"
EACH = examples(40, HealthCheck.function_scoped_fixture)


class Tower(nn.Module):
    """Dense tensors of every make: a cube, a bias, a scalar, a mask, an empty one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        block = nn.Module()
        block.weight = nn.Parameter(torch.zeros(2, 3, 4, dtype=torch.float64).permute(0, 2, 1).contiguous().permute(0, 2, 1))
        block.bias = nn.Parameter(torch.zeros(5))
        self.add_module("0", block)
        self.scale = nn.Parameter(torch.zeros(()))
        self.register_buffer("mask", torch.zeros(3, dtype=torch.bool))
        self.register_buffer("none", torch.zeros(0, 3))
        self.register_buffer("scratch", torch.full((2,), 7.0), persistent=False)


class Model(nn.Module):
    def __init__(self, users: int = 50, items: int = 23, **kwargs: object) -> None:
        super().__init__()
        self.user = nn.Embedding(users, 6, **kwargs)  # type: ignore[arg-type]
        self.item = nn.EmbeddingBag(items, 4, mode="sum", dtype=torch.bfloat16)
        self.tower = Tower()


def loaded_as(model: nn.Module, wanted: dict[str, torch.Tensor]) -> None:
    """The model has all of `wanted` that it has a place for."""
    found = model.state_dict()
    assert found
    for key, tensor in found.items():
        assert torch.equal(tensor, wanted[key]), key
        assert tensor.dtype == wanted[key].dtype


def test_whole_tables_and_dense_tensors_arrive(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / STEP)
    model = Model()
    before = dict(model.named_parameters())
    assert se.load_plain(tmp_path, model) == {}
    loaded_as(model, values())
    assert all(parameter is before[name] for name, parameter in model.named_parameters())  # an optimizer may hold them
    assert model.tower.scratch.tolist() == [7.0, 7.0]
    assert not torch.distributed.is_initialized()


def test_rows_that_changed_since_the_full_checkpoint_are_the_new_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 24)
    full = small_checkpoint(tmp_path / STEP)
    _, wanted = increment(tmp_path / "step-0000000002", tmp_path / STEP, full)
    model = Model()
    se.load_plain(tmp_path, model)
    loaded_as(model, wanted)
    some = Model(users=4)
    (ids,) = se.load_plain(str(tmp_path), some, rows={"user": [31, 2, 0, 3]}).values()
    assert torch.equal(some.user.weight, wanted["user.weight"][ids.ids])
    older = Model()
    se.load_plain(tmp_path, older, step=1)
    loaded_as(older, values())
    with pytest.raises(CheckpointError, match=r"is the checkpoint of step 2, and not of step 1"):
        se.load_plain(tmp_path / "step-0000000002", older, step=1)


@EACH
@given(st.data(), st.integers(1, 40), st.integers(1, 5))
def test_any_rows_of_any_cut_arrive_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: st.DataObject, rows: int, columns: int
) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", data.draw(st.integers(1, 100)))
    root = tmp_path / str(len(list(tmp_path.iterdir())))
    table = numbered(rows, columns)
    writer = Writer(root / STEP)
    layout = data.draw(layouts(rows, columns, world_size=3))
    writer.add("t.weight", table, [(shard.ranks[0], shard.rows, shard.columns) for shard in layout.shards])
    full = writer.write()
    ids = data.draw(st.permutations(range(rows)))[: data.draw(st.integers(0, rows))]
    if data.draw(st.booleans()):
        changed = torch.tensor(sorted(data.draw(st.sets(st.integers(0, rows - 1)))), dtype=torch.int64)
        table = table.clone()
        table[changed] += 1000
        later = Writer(root / "step-0000000002", Base(STEP, full.checksum))
        later.update("t.weight", table, changed, range(columns))
        later.write(step=2)
    model = nn.ModuleDict({"t": nn.Embedding(data.draw(st.sampled_from([rows, len(ids)])), columns)})
    found = se.load_plain(root, model, rows={"t": torch.tensor(ids, dtype=torch.int32)})["t"]
    embedding = model["t"]
    assert isinstance(embedding, nn.Embedding)
    assert (embedding.num_embeddings, tuple(embedding.weight.shape)) == (len(ids), (len(ids), columns))
    assert torch.equal(embedding.weight, table[ids])
    assert found.ids.tolist() == ids
    asked = torch.tensor(ids[::-1] + ids, dtype=torch.int64).reshape(2, -1)
    assert torch.equal(embedding(found(asked)), table[asked])


def test_a_model_on_the_meta_device_becomes_real(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / STEP)
    with torch.device("meta"):
        model = Model()
        some = Model(padding_idx=7)
    se.load_plain(tmp_path, model)
    loaded_as(model, values())
    found = se.load_plain(tmp_path, some, rows={"user": [3, 7], "item": torch.tensor([22, 0, 1])})
    assert torch.equal(some.user.weight, values()["user.weight"][[3, 7]])
    assert torch.equal(some.item.weight, values()["item.weight"][[22, 0, 1]])
    assert (some.user.num_embeddings, some.user.padding_idx, some.item.num_embeddings) == (2, 1, 3)
    assert some.user.weight.requires_grad
    assert set(found) == {"user", "item"}
    assert repr(found["item"]) == "IdMap('item', 3 rows)"
    bag = torch.tensor([[0, 22]])
    assert torch.equal(some.item(found["item"](bag)), functional.embedding_bag(bag, values()["item.weight"], mode="sum"))


def test_tables_take_another_dtype_and_dense_tensors_keep_theirs(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / STEP)
    model = Model()
    model.user.weight.requires_grad_(False)
    se.load_plain(tmp_path, model, dtype=torch.float16)
    wanted = values()
    assert torch.equal(model.user.weight, wanted["user.weight"].half())
    assert torch.equal(model.item.weight, wanted["item.weight"].half())
    assert not model.user.weight.requires_grad
    assert model.tower.scale.dtype == torch.float32
    double = Model()
    double.user.double()
    se.load_plain(tmp_path, double)  # as the model is
    assert torch.equal(double.user.weight, wanted["user.weight"].double())
    with pytest.raises(CheckpointError, match=r"dtype=torch.int64: tables are of floating-point numbers"):
        se.load_plain(tmp_path, model, dtype=torch.int64)


def test_a_part_of_the_model_is_enough_and_shared_weights_stay_shared(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / STEP)
    model = nn.ModuleDict({"user": nn.Embedding(50, 6), "other": nn.Embedding(50, 6)})
    model["other"].weight = model["user"].weight  # the checkpoint has it once
    se.load_plain(tmp_path, model, rows={"user": [9, 1]}, dtype=torch.bfloat16)
    assert model["other"].weight is model["user"].weight
    assert torch.equal(model["user"].weight, values()["user.weight"][[9, 1]].bfloat16())
    assert model["other"].num_embeddings == 2


def wrong_models() -> dict[str, tuple[nn.Module, dict[str, object], str]]:
    def tables(**others: nn.Module) -> nn.ModuleDict:
        return nn.ModuleDict({"user": nn.Embedding(50, 6), **others})

    misnamed = nn.ModuleDict({"users": nn.Embedding(50, 6)})
    return {
        "name": (misnamed, {}, r"'users.weight' is in the model only; did you mean 'user.weight'\?"),
        "more": (tables(mlp=nn.Linear(2, 2)), {}, r"'mlp.weight' is in the model only(.|\n)*'mlp.bias' is in the model only"),
        "shape": (
            nn.ModuleDict({"user": nn.Embedding(49, 6)}),
            {},
            r"'user.weight' is \(49, 6\) in the model and \(50, 6\) in the",
        ),
        "columns": (nn.ModuleDict({"user": nn.Embedding(50, 5)}), {}, r"is \(50, 5\) in the model"),
        "count": (nn.ModuleDict({"user": nn.Embedding(3, 6)}), {"user": [1, 2]}, "of which 2 rows are wanted"),
        "integers": (
            nn.ModuleDict({"user": nn.Embedding(50, 6, _weight=torch.zeros(50, 6, dtype=torch.int32), _freeze=True)}),
            {},
            "int32",
        ),
        "no table": (
            tables(),
            {"item": [1]},
            "'item' is no nn",
        ),
        "near": (tables(), {"usr": [1]}, r"'usr' is no nn.Embedding, .*did you mean 'user'\?; there are 'user'"),
        "id": (tables(), {"user": [50]}, r"rows\['user'\] has id 50, and the table's ids are 0 to 49"),
        "negative": (tables(), {"user": [3, -1]}, "has id -1"),
        "twice": (tables(), {"user": [3, 1, 3]}, "has id 3 twice"),
        "floats": (tables(), {"user": [0.5]}, r"must be a list of ids, not torch.float32 of shape \(1,\)"),
        "mask": (tables(), {"user": torch.ones(50, dtype=torch.bool)}, "must be a list of ids, not torch.bool"),
        "matrix": (tables(), {"user": [[1]]}, r"of shape \(1, 1\)"),
        "padding": (
            nn.ModuleDict({"user": nn.Embedding(50, 6, padding_idx=0)}),
            {"user": [1, 2]},
            "padding_idx=0, which is not among",
        ),
    }


@pytest.mark.parametrize("name", wrong_models())
def test_a_model_that_does_not_fit_is_left_alone(tmp_path: Path, name: str) -> None:
    small_checkpoint(tmp_path / STEP)
    model, rows, says = wrong_models()[name]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=says):
        se.load_plain(tmp_path, model, rows=rows)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_checkpoint_may_be_copied_to_any_name(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "ckpt" / STEP)
    (tmp_path / "ckpt" / "step-000000000\u0669").mkdir()  # a nine, and no name of a checkpoint
    shutil.copytree(tmp_path / "ckpt" / STEP, tmp_path / "served")
    for folder in (tmp_path / "ckpt", tmp_path / "served"):
        model = Model()
        se.load_plain(folder, model)
        loaded_as(model, values())


def test_damage_is_told_where_it_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 24)
    manifest = small_checkpoint(tmp_path / STEP)
    block = manifest.entries["user.weight"].chunks[0].block  # rows 0 to 29
    path = tmp_path / STEP / block.file
    data = bytearray(path.read_bytes())
    data[block.offset] ^= 1
    path.write_bytes(data)
    model = nn.ModuleDict({"user": nn.Embedding(50, 6)})
    with pytest.raises(CheckpointError, match=r"rows 0 to 1, columns 0 to 2 of 'user.weight' are damaged"):
        se.load_plain(tmp_path, model)
    se.load_plain(tmp_path, model, rows={"user": [2, 49]})  # and rows of other pieces are as good as ever
    assert torch.equal(model["user"].weight, values()["user.weight"][[2, 49]])


def test_ids_that_were_not_loaded_are_told() -> None:
    found = IdMap("user", torch.tensor([30, 10, 20]))
    assert found(torch.tensor([[10, 20], [30, 10]], dtype=torch.int32)).tolist() == [[1, 2], [0, 1]]
    assert found(torch.empty(0, dtype=torch.int64)).tolist() == []
    assert len(found) == 3
    with pytest.raises(IdRangeError, match=r"'user': id 11 at position 2 is not one of the 3 rows that were loaded"):
        found(torch.tensor([[10, 20], [11, 12]]))
    with pytest.raises(IdRangeError, match="id 1 at position 0 is not one of the 0 rows"):
        IdMap("user", torch.empty(0, dtype=torch.int64))(torch.tensor([1]))


@given(st.data(), st.integers(1, 60))
def test_a_selection_finds_its_rows_in_any_chunk(data: st.DataObject, total: int) -> None:
    ids = data.draw(st.permutations(range(total)))[: data.draw(st.integers(0, total))]
    selection = Selection(total, IdMap("t", torch.tensor(ids, dtype=torch.int64)))
    for _ in range(3):
        rows = range(data.draw(st.integers(0, total - 1)), data.draw(st.integers(1, total)), data.draw(st.integers(1, 9)))
        if not rows:
            continue
        positions, places = selection.of_chunk(rows)
        assert isinstance(positions, torch.Tensor)
        assert isinstance(places, torch.Tensor)
        wanted = {row: ids.index(row) for row in rows if row in ids}
        assert {rows[at]: place for at, place in zip(positions.tolist(), places.tolist(), strict=True)} == wanted


def test_a_process_of_its_own_needs_nothing_of_the_job(tmp_path: Path) -> None:
    """What a server does: no group, no environment of a job."""
    small_checkpoint(tmp_path / STEP)
    code = (
        "import sys, torch, shardembed as se\n"
        "model = torch.nn.ModuleDict({'user': torch.nn.Embedding(50, 6)})\n"
        f"ids = se.load_plain({str(tmp_path)!r}, model, rows={{'user': [49, 5]}}, dtype=torch.float64)\n"
        "print(model['user'](ids['user'](torch.tensor([5]))).tolist())\n"
        "print(torch.distributed.is_initialized())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    row = numbered(50, 6)[5].double()
    assert done.stdout.split("\n")[:2] == [str([row.tolist()]), "False"]
