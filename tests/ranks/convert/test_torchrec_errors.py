"""What a sharded TorchRec collection refuses, it refuses on every rank, and says where and what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import shardembed as se
from shardembed import optim
from shardembed.errors import ConfigError, DtypeError, FeatureError, InputError, PlanError, StepError, UnsupportedError
from tests.harness import run_ranks
from tests.ranks.keyed import ROWS, Batch, bag, batch_of, everything, keyed, single

torchrec = pytest.importorskip("torchrec")


def jagged(keys: list[str], lengths: list[int], **settings: Any) -> Any:
    return torchrec.KeyedJaggedTensor(keys, torch.zeros(sum(lengths), dtype=torch.int64), lengths=torch.tensor(lengths), **settings)


def inverted(keys: list[str], rows: list[list[int]]) -> Any:
    strides = [[2], [1], [1]]
    inverse = (keys, torch.tensor(rows))
    return jagged(["f1", "f2", "f3"], [1, 1, 1, 1], stride_per_key_per_rank=strides, inverse_indices=inverse)


# What is wrong -> the module it is given to, the batch, the error.
WRONG: dict[str, tuple[str, Callable[[], Any], type[Exception], str]] = {
    "a key is missing": (
        "sparse.ebc",
        lambda: jagged(["f3", "x", "f2"], [1, 1, 0]),
        FeatureError,
        "sparse.ebc: the KeyedJaggedTensor lacks the key(s) ['f1']; it has ['f3', 'x', 'f2']",
    ),
    "several keys are missing": (
        "seq",
        lambda: jagged(["x"], [1]),
        FeatureError,
        "seq: the KeyedJaggedTensor lacks the key(s) ['f3', 'f1']; it has ['x']",
    ),
    "a dict": ("sparse.ebc", lambda: {"f1": torch.zeros(1)}, DtypeError, "sparse.ebc takes a KeyedJaggedTensor, not dict"),
    "an id out of range": (
        "sparse.ebc",
        lambda: torchrec.KeyedJaggedTensor(["f1", "f2", "f3"], torch.tensor([1, ROWS]), lengths=torch.tensor([1, 1, 0])),
        InputError,
        f"table 'sparse.ebc.sums', feature 'sparse.ebc.f2': id {ROWS} at position 0",
    ),
    "no weights": (
        "weighted",
        lambda: jagged(["f1", "f3"], [1, 1]),
        InputError,
        "weighted is weighted, but the KeyedJaggedTensor has no weights",
    ),
    "batch sizes that differ": (
        "sparse.ebc",
        lambda: jagged(["f1", "f2", "f3"], [1, 1, 1, 1], stride_per_key_per_rank=[[2], [1], [1]]),
        InputError,
        "sparse.ebc: batch sizes differ by key, {'f2': 1, 'f1': 2, 'f3': 1}",
    ),
    "inverse indices without a key": (
        "sparse.ebc",
        lambda: inverted(["f1", "f2"], [[0, 1], [0, 0]]),
        FeatureError,
        "sparse.ebc: the inverse_indices lack the key 'f3'; they have ['f1', 'f2']",
    ),
    "inverse indices that point outside": (
        "sparse.ebc",
        lambda: inverted(["f1", "f2", "f3"], [[0, 1], [0, 1], [0, 0]]),
        InputError,
        "inverse_indices of 'f2' point outside its 1 bag(s)",
    ),
}


def refused(rank: int, world_size: int, cases: list[str]) -> dict[str, str]:
    """What rank 1's wrong batches are answered with; the tables serve on afterwards."""
    model = se.shard(everything(torch.float32), optimizer=optim.SGD(), plan=se.row_wise(), verbose=False)
    good = keyed(torch.Generator().manual_seed(rank), 2, torch.float32)
    said = {}
    for case in cases:
        path, make, error, _ = WRONG[case]
        try:
            model.get_submodule(path)(make() if rank == world_size - 1 else good)
        except error as found:
            said[case] = str(found)
        model.get_submodule(path)(good)
    return said


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_wrong_batch_is_refused_on_all_ranks(world_size: int) -> None:
    for said in run_ranks(world_size, refused, list(WRONG)):
        assert list(said) == list(WRONG)
        for case, text in said.items():
            assert WRONG[case][3] in text, case


def refused_inputs(rank: int, world_size: int) -> list[str]:
    said = []
    cases: list[tuple[Callable[[Batch], dict[str, Any]], type[Exception]]] = [
        (lambda batch: {"sparse.ebc.sums": batch.keyed}, FeatureError),
        (lambda batch: {**batch.inputs(), "seq": {}}, DtypeError),
        (lambda batch: {**batch.inputs(), "seq": batch.other}, StepError),
    ]
    for wrong, error in cases:
        model = se.shard(everything(torch.float32), optimizer=optim.SGD(), inputs=wrong, verbose=False)
        with pytest.raises(error) as found:
            model(batch_of(0, 0, torch.float32))
        said.append(str(found.value))
    return said


def test_inputs_that_do_not_fit_are_refused() -> None:
    for names, kind, other in run_ranks(2, refused_inputs):
        assert (
            "inputs= names 'sparse.ebc.sums', which is not a sharded module here; they are ['plain', 'seq', 'sparse.ebc'," in names
        )
        assert "seq takes a KeyedJaggedTensor, not dict" in kind
        assert "seq was called with other ids than inputs= announced" in other


class Doubled(torchrec.EmbeddingBagCollection):
    """A subclass that answers otherwise."""

    def forward(self, features: Any) -> Any:
        return super().forward(features)


def model_of(ebc: Any) -> nn.ModuleDict:
    return nn.ModuleDict({"ebc": ebc, "plain": nn.Embedding(ROWS, 4)})


def with_optimizer() -> nn.Module:
    from torch.distributed.optim import _apply_optimizer_in_backward

    model = everything(torch.float32)
    _apply_optimizer_in_backward(torch.optim.SGD, model.seq.parameters(), {"lr": 0.1})
    return model


def tied_to_a_layer() -> nn.Module:
    model = model_of(torchrec.EmbeddingBagCollection([bag("t", ["f"])]))
    model["head"] = nn.Linear(4, ROWS)
    model["head"].weight = model["ebc"].embedding_bags["t"].weight
    return model


def test_a_model_that_cannot_be_sharded_is_refused() -> None:
    settings: dict[str, Any] = {"optimizer": optim.SGD(), "verbose": False}
    with pytest.raises(PlanError, match=r"the plan names \['sparse.ebc'\], which are not tables of this model.*'sparse.ebc.means'"):
        se.shard(everything(torch.float32), plan={"sparse.ebc": se.row_wise()}, **settings)
    with pytest.raises(ConfigError, match=r"sparse.ebc is sharded already"):
        se.shard(se.shard(everything(torch.float32), **settings), **settings)
    with pytest.raises(ConfigError, match="itself a table, a EmbeddingBagCollection"):
        se.shard(torchrec.EmbeddingBagCollection([bag("t", ["f"])]), **settings)
    with pytest.raises(UnsupportedError, match=r"ebc: Doubled has a forward of its own.*skip=\['ebc'\]"):
        se.shard(model_of(Doubled([bag("t", ["f"])])), **settings)
    hooked = everything(torch.float32)
    hooked.sparse["ebc"].register_forward_pre_hook(lambda module, args: None)
    with pytest.raises(ConfigError, match=r"sparse.ebc has hooks.*skip=\['sparse.ebc'\]"):
        se.shard(hooked, **settings)
    hooked = everything(torch.float32)
    hooked.seq.embeddings["long"].register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(ConfigError, match=r"seq.embeddings.long has hooks.*skip=\['seq'\]"):
        se.shard(hooked, **settings)
    with pytest.raises(ConfigError, match=r"seq.long: its weight has an optimizer from apply_optimizer_in_backward"):
        se.shard(with_optimizer(), **settings)
    with pytest.raises(ConfigError, match=r"ebc.t: its weight is also 'head.weight'.*skip=\['ebc'\]"):
        se.shard(tied_to_a_layer(), **settings)
    with pytest.raises(ConfigError, match=r"skip= names \['sparse.ebc.sums'\], but sparse.ebc is converted as a whole"):
        se.shard(everything(torch.float32), skip=["*.sums"], **settings)
    filled = torchrec.EmbeddingBagCollection([bag("t", ["f"], init_fn=nn.init.zeros_)], device=torch.device("meta"))
    with pytest.raises(ConfigError, match=r"table 'ebc.t': TorchRec's init_fn fills a whole tensor"):
        se.shard(model_of(filled), **settings)


def remapped() -> nn.Module:
    from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection
    from torchrec.modules.mc_modules import DistanceLFU_EvictionPolicy, ManagedCollisionCollection, MCHManagedCollisionModule

    config = bag("t", ["f"])
    device = torch.device("cpu")
    module = MCHManagedCollisionModule(
        device=device, zch_size=ROWS, eviction_interval=2, eviction_policy=DistanceLFU_EvictionPolicy(), input_hash_size=100
    )
    remap = ManagedCollisionCollection({"t": module}, embedding_configs=[config])
    return model_of(ManagedCollisionEmbeddingBagCollection(torchrec.EmbeddingBagCollection([config]), remap))


def test_ids_that_each_rank_would_number_its_own_way_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"ebc: ManagedCollisionEmbeddingBagCollection gives ids new.*skip=\['ebc'\]"):
        se.shard(remapped(), optimizer=optim.SGD(), verbose=False)
    model = se.shard(remapped(), optimizer=optim.SGD(), skip=["ebc"], verbose=False)
    assert type(model["plain"]) is se.Embedding
    assert type(model["ebc"]._embedding_module) is torchrec.EmbeddingBagCollection


def test_what_is_skipped_stays_as_it_is() -> None:
    for skip in (["ebc"], ["ebc.*"], ["eb*"]):
        model = model_of(Doubled([bag("t", ["f"]), bag("u", ["g"])]))
        se.shard(model, optimizer=optim.SGD(), skip=skip, verbose=False)
        assert type(model["ebc"]) is Doubled
        assert type(model["ebc"].embedding_bags["t"]) is nn.EmbeddingBag
        assert type(model["plain"]) is se.Embedding


def test_a_sharded_collection_says_where_its_tables_are() -> None:
    model = nn.ModuleDict({"seq": torchrec.EmbeddingCollection([single("t", ["f"])])})
    se.shard(model, optimizer=optim.SGD(), verbose=False)
    with pytest.raises(AttributeError, match=r"the tables of seq lie cut over the ranks.*Its tables are \['seq.t'\]"):
        model["seq"].embeddings["t"]
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        _ = model["seq"].other
