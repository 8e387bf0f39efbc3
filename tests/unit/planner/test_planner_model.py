"""What to plan for is read from models, lists of tables and training configurations, as from workload files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shardembed.cli import model_workload
from shardembed.errors import ConfigError, DataError
from shardembed.optim import Adam, RowwiseAdagrad
from shardembed.planner.workload import Counts, Uniform
from tests.unit.planner.test_planner_workload import TABLE, TOP

MODELS = """
import torch
from torch import nn
import shardembed as se
from shardembed.planner.workload import workload_of

class Model(nn.Module):
    def __init__(self, rows=10**12):
        super().__init__()
        self.user = nn.Embedding(rows, 128)
        self.tags = nn.EmbeddingBag(50, 8, mode="mean")
        self.top = nn.Linear(8, 1)

class Values(Model):
    def __init__(self):
        super().__init__(100)
        assert self.top.weight.sum().item() < 100

def plain(): return Model()
def values(): return Values()
def bare(): return nn.EmbeddingBag(10**12, 8)
def configs(): return [se.TableConfig("t", 10**12, 8, ["a", "b"], {"a": "sum", "b": None})]
def sharded(): return nn.ModuleDict({"x": se.EmbeddingCollection(
    [se.TableConfig("t", 10, 8)], optimizer=se.optim.SGD(lr=0.1), device="cpu")})
def dynamic(): return se.EmbeddingCollection(
    [se.TableConfig("t", 10**9, 64, dynamic=se.Dynamic(se.LRU()))], optimizer=se.optim.SGD(lr=0.1), device="meta")
def workload(): return workload_of(configs(), 3.0, 128)
def dense(): return nn.Sequential(nn.Linear(2, 2))
def number(): return 3
def broken(): return [][0]
"""

TORCHREC = """
import torchrec
from torch import nn

def build():
    config = torchrec.EmbeddingBagConfig(name="t", embedding_dim=8, num_embeddings=10**9, feature_names=["f"])
    return nn.ModuleDict({"sparse": torchrec.EmbeddingBagCollection(tables=[config], device="meta")})
"""


@pytest.fixture
def models(tmp_path: Path) -> Path:
    path = tmp_path / "some_models.py"
    path.write_text(MODELS)
    return path


def test_a_model_becomes_its_tables_without_taking_their_memory(models: Path) -> None:
    found = model_workload.read(f"{models}:plain", 8)  # 465 TiB
    assert (found.name, found.global_batch_size) == (f"{models}:plain", model_workload.BATCH)
    user, tags = found.tables
    assert (user.table.name, user.table.num_embeddings, user.table.embedding_dim, user.table.pooling_of("user")) == (
        *("user", 10**12, 128),
        None,
    )
    assert (tags.table.name, tags.table.pooling_of("tags")) == ("tags", "mean")
    assert (user.ids_per_sample, tags.ids_per_sample, user.skew, user.optimizer) == ((1.0,), (10.0,), Uniform(), RowwiseAdagrad())


def test_ids_and_batch_can_be_given(models: Path) -> None:
    found = model_workload.read(f"{models}:plain", 8, global_batch_size=64, ids_per_sample={"tags": 3.0})
    assert (found.global_batch_size, [load.ids_per_sample for load in found.tables]) == (64, [(1.0,), (3.0,)])
    found = model_workload.read(f"{models}:configs", 8, ids_per_sample=5.0)
    assert [load.ids_per_sample for load in found.tables] == [(5.0, 5.0)]
    with pytest.raises(ConfigError, match=r"names 'tag', which is no feature; did you mean 'tags'\?"):
        model_workload.read(f"{models}:plain", 8, ids_per_sample={"tag": 3.0})


def test_everything_with_tables_is_understood(models: Path) -> None:
    def names(function: str) -> list[str]:
        return [load.table.name for load in model_workload.read(f"{models}:{function}", 8).tables]

    assert names("values") == ["user", "tags"]  # not on the meta device
    assert names("bare") == ["model"]
    assert names("configs") == names("sharded") == names("dynamic") == names("workload") == ["t"]
    assert model_workload.read(f"{models}:workload", 8).global_batch_size == 128


def test_collections_of_torchrec_are_understood(tmp_path: Path) -> None:
    pytest.importorskip("torchrec")
    path = tmp_path / "rec.py"
    path.write_text(TORCHREC)
    (load,) = model_workload.read(f"{path}:build", 8).tables
    assert (load.table.name, load.table.feature_names, load.table.num_embeddings) == ("sparse.t", ("sparse.f",), 10**9)


def test_modules_are_found_in_the_working_folder(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models.parent)
    monkeypatch.setattr("sys.path", ["/nowhere"])
    assert model_workload.read("some_models:configs", 8).tables[0].table.name == "t"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("no_such_module:build", "no_such_module: cannot be imported: ModuleNotFoundError"),
        ("{models}:plian", "there is no function 'plian' in {models}; did you mean 'plain'?"),
        ("{models}:number", "number gave int; it must return a model, a list of tables"),
        ("{models}:dense", "the model has no nn.Embedding, nn.EmbeddingBag or TorchRec collection to shard"),
        ("{models}:broken", "broken: the function failed: IndexError: list index out of range ({models}:30)"),
        ("nothing.yaml", "nothing.yaml: there is no such file"),
        ("dlrm", "'dlrm' is neither a file nor one of the workloads that come along"),
    ],
)
def test_what_is_no_model_is_told(models: Path, source: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        model_workload.read(source.format(models=models), 8)
    assert says.format(models=models) in str(caught.value)


def test_workload_files_are_told_from_training_configurations(tmp_path: Path) -> None:
    path = tmp_path / "w.yaml"
    path.write_text(f"{TOP}tables: [{{name: a, {TABLE}}}]")
    assert model_workload.read(str(path), 8, global_batch_size=32).global_batch_size == 32
    assert model_workload.read("synthetic-tiny", 8).name == "synthetic-tiny"
    path.write_text(f"tables: [{{name: a, {TABLE}}}]")
    with pytest.raises(ConfigError, match="global_batch_size Field required"):
        model_workload.read(str(path), 8)


def test_a_training_configuration_gives_its_tables_and_its_data(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(
        "data: {generator: {users: 300, items: 200, interactions: 4000, tastes: 5}}\n"
        "model: {embedding_dim: 16, negatives: 32, table_dtype: bfloat16}\noptimizer: {tables: {name: Adam, lr: 0.5}}\n"
        "train: {global_batch_size: 128}\nwire_dtype: bfloat16\n"
    )
    found = model_workload.read(str(path), 4)
    user, item = found.tables
    assert (found.name, found.global_batch_size, found.wire_dtype) == ("job", 128, torch.bfloat16)
    assert (user.table.num_embeddings, item.table.num_embeddings) == (300, 200)
    assert (user.ids_per_sample, item.ids_per_sample) == ((1.0,), (1.0, 1.0))  # 32 negatives for 32 samples a rank
    assert (item.table.embedding_dim, item.table.dtype, item.optimizer) == (16, torch.bfloat16, Adam(0.5))
    assert isinstance(user.skew, Counts)
    assert isinstance(item.skew, Counts)
    # Half of the item table's ids are negatives, drawn from all items.
    positives = int(user.skew.counts.sum())
    assert found.samples == positives, "what an epoch trains on, with what is held out left out"
    assert item.skew.counts.sum() == pytest.approx(2 * positives, rel=0.02)
    assert item.skew.counts.min() > 0
    path.write_text("data: {path: none.parquet}\n")
    with pytest.raises(DataError, match=r"none\.parquet"):
        model_workload.read(str(path), 4)
