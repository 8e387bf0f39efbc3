"""TorchRec's collections, sharded with one line: the same answers, the same training, and the same modules back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint

import shardembed as se
from shardembed import optim
from tests.harness import run_ranks
from tests.ranks.keyed import (
    COLUMNS,
    ROWS,
    TABLES,
    Batch,
    bag,
    batch_of,
    everything,
    loss_of,
    plan_of,
    single,
    train_whole,
)

torchrec = pytest.importorskip("torchrec")
WORLD_SIZES = (1, 2, 3)
STEPS = 4
OPTIMIZERS = (optim.SGD(lr=0.1), optim.Adagrad(lr=0.1), optim.RowwiseAdagrad(lr=0.1))


def answers(rank: int, world_size: int, plan: str, shared: bool) -> list[str]:
    """What differs from the unsharded model's outputs, of a whole step in one call or of each module's own."""
    whole = everything(torch.float32)
    batches = [batch_of(rank, step, torch.float32) for step in range(3)]
    model = se.shard(
        everything(torch.float32, seed=rank),  # rank 0's weights count
        optimizer=optim.SGD(),
        plan=plan_of(plan, world_size),
        inputs=Batch.inputs if shared else None,
        verbose=False,
    )
    wrong = []
    for number, batch in enumerate(batches):
        calls = model.plain.journey.comm.history.forwards
        found = model(batch)
        calls = model.plain.journey.comm.history.forwards - calls
        if calls != (1 if shared else 6):
            wrong.append(f"rank {rank}: {calls} calls")
        if not batch.keyed.stride():  # nothing comes of it, but the 0 that offsets start with
            wrong += [
                f"rank {rank}: {key} of an empty batch" for key, output in found.items() if output.numel() > ("offsets" in key)
            ]
            continue
        wanted = whole(batch)
        assert list(found) == list(wanted), f"{list(found)}, not {list(wanted)}"
        for key, output in wanted.items():
            same = torch.equal if plan == "auto" else torch.allclose  # partial sums of bags are added in another order
            if found[key].dtype != output.dtype or found[key].requires_grad != output.requires_grad or not same(found[key], output):
                wrong.append(f"rank {rank}, batch {number}: {key}")
    return wrong


@pytest.mark.parametrize("shared", [False, True], ids=["own calls", "one call"])
@pytest.mark.parametrize("plan", ["auto", "mixed"])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_answers_are_torchrecs(world_size: int, plan: str, shared: bool) -> None:
    assert run_ranks(world_size, answers, plan, shared) == [[]] * world_size


Trained = tuple[dict[str, torch.Tensor], bool]


def train(rank: int, world_size: int, optimizer: optim.TableOptimizer, plan: str, shared: bool) -> Trained:
    """The weights after training and unsharding, and whether what was tied is tied again."""
    settings: dict[str, Any] = {"plan": plan_of(plan, world_size), "inputs": Batch.inputs if shared else None}
    model = se.shard(everything(torch.float64), optimizer=optimizer, verbose=False, **settings)
    trained = se.Optimizer(model)
    for step in range(STEPS):
        batch = batch_of(rank, step, torch.float64)
        loss_of(model(batch), batch).backward()
        trained.step()
        trained.zero_grad()
    se.unshard(model)
    weights = {name: weight.detach() for name, weight in model.state_dict().items()}
    return weights, model.tied.weight is model.sparse["ebc"].embedding_bags["sums"].weight


@pytest.mark.parametrize("plan", ["auto", "mixed"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: type(optimizer).__name__)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_training_moves_weights_as_the_unsharded_model_does(world_size: int, optimizer: Any, plan: str) -> None:
    wanted = train_whole(optimizer, STEPS, world_size)
    assert not torch.equal(
        wanted["seq.embeddings.long.weight"], everything(torch.float64).state_dict()["seq.embeddings.long.weight"]
    )
    for weights, tied in run_ranks(world_size, train, optimizer, plan, world_size == 2):
        assert list(weights) == list(wanted)
        assert tied
        for name, weight in wanted.items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def round_trip(rank: int, world_size: int) -> list[str]:
    """What a trip there and back changed."""
    model = everything(torch.float32)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.eval()
    configs = model.sparse["ebc"].embedding_bag_configs(), model.seq.embedding_configs()
    se.shard(model, plan=plan_of("mixed", world_size), optimizer={"sparse.ebc.*": optim.SGD(), "*": optim.Adagrad()}, verbose=False)
    ebc, seq = model.sparse["ebc"], model.seq
    assert list(model.state_dict()) == list(before), f"keys {list(model.state_dict())}"
    assert (ebc.embedding_bag_configs(), seq.embedding_configs()) == configs
    assert (ebc.is_weighted(), model.weighted.is_weighted(), seq.need_indices(), seq.embedding_dim()) == (
        False,
        True,
        True,
        COLUMNS,
    )
    assert seq.embedding_names_by_table() == [["f3@long"], ["f1", "f3@short"]]
    assert ebc.device == seq.device == torch.device("cpu")
    assert [table.name for table in ebc.journey.tables] == list(TABLES)
    assert len(list(model.parameters())) == 0, "tables with an optimizer are no Parameters"
    chosen = {
        ebc.journey.tables[lane.table].name: type(spec.optimizer).__name__ for spec in ebc.journey.specs for lane in spec.lanes
    }
    assert chosen == {name: "SGD" if name.startswith("sparse") else "Adagrad" for name in TABLES}
    rows = ebc.rows("sparse.ebc.means", torch.arange(ROWS))
    assert torch.equal(rows, before["sparse.ebc.embedding_bags.means.weight"])
    model.load_state_dict({name: weight + 1 for name, weight in before.items()})
    se.unshard(model)
    ebc, seq = model.sparse["ebc"], model.seq
    assert type(ebc) is torchrec.EmbeddingBagCollection
    assert type(seq) is torchrec.EmbeddingCollection
    assert (ebc.training, model.weighted.is_weighted(), seq.need_indices()) == (False, True, True)
    assert (ebc.embedding_bag_configs(), seq.embedding_configs()) == configs
    assert ebc.device == seq.device == torch.device("cpu")
    assert list(model.state_dict()) == list(before)
    return [name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name] + 1)]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_names_and_bits_survive_a_trip_there_and_back(world_size: int) -> None:
    assert run_ranks(world_size, round_trip) == [[]] * world_size


def save_and_load(rank: int, world_size: int, folder: str) -> list[str]:
    """What torch's checkpoint of a sharded model, loaded under another plan, does not give back."""
    settings: dict[str, Any] = {"optimizer": optim.SGD(), "verbose": False}
    saved = se.shard(everything(torch.float32), plan=plan_of("mixed", world_size), **settings)
    checkpoint.save(saved.state_dict(), checkpoint_id=folder)
    loaded = se.shard(everything(torch.float32, seed=1), plan=se.table_wise(world_size - 1), **settings)
    checkpoint.load(loaded.state_dict(), checkpoint_id=folder)
    wanted = everything(torch.float32).state_dict()
    return [name for name, weight in se.unshard(loaded).state_dict().items() if not torch.equal(weight, wanted[name])]


def test_torchs_checkpoints_hold_collections(tmp_path: Path) -> None:
    assert run_ranks(2, save_and_load, str(tmp_path)) == [[], []]


def on_rank_one(rank: int, world_size: int) -> tuple[str, str]:
    model = se.shard(everything(torch.float32), optimizer=optim.SGD(), verbose=False)
    se.unshard(model, rank=1)
    same = all(
        weight.is_meta or torch.equal(weight, everything(torch.float32).get_parameter(name))
        for name, weight in model.named_parameters()
    )
    assert same, "the weights are others"
    return str(model.sparse["ebc"].device), str(model.seq.embeddings["long"].weight.device)


def test_unshard_can_give_the_weights_to_one_rank() -> None:
    assert run_ranks(2, on_rank_one) == [("meta", "meta"), ("cpu", "cpu")]


def from_meta(rank: int, world_size: int, everywhere: bool) -> dict[str, torch.Tensor]:
    device = torch.device("meta" if everywhere or rank == 0 else "cpu")
    bags = [bag("t", ["f1"]), bag("u", ["f2"], weight_init_min=2.0, weight_init_max=3.0)]
    model = nn.ModuleDict(
        {
            "ebc": torchrec.EmbeddingBagCollection(bags, device=device),
            "seq": torchrec.EmbeddingCollection([single("t", ["f1"])], device=device),
        }
    )
    se.unshard(se.shard(model, optimizer=optim.SGD(), plan=se.row_wise(), verbose=False))
    return {name: weight.detach() for name, weight in model.state_dict().items()}


def test_tables_on_the_meta_device_start_as_their_configs_say() -> None:
    (one,) = run_ranks(1, from_meta, True)
    for other in (*run_ranks(2, from_meta, True), *run_ranks(2, from_meta, False)):  # rank 0 decides
        assert all(torch.equal(weight, other[name]) for name, weight in one.items())
    for name in ("ebc.embedding_bags.t.weight", "seq.embeddings.t.weight"):
        assert 0.8 * ROWS**-0.5 < float(one[name].abs().max()) <= ROWS**-0.5
    assert not torch.equal(one["ebc.embedding_bags.t.weight"], one["seq.embeddings.t.weight"])
    assert 2.0 <= float(one["ebc.embedding_bags.u.weight"].min()) < 2.5 < float(one["ebc.embedding_bags.u.weight"].max()) <= 3.0


def half(rank: int, world_size: int) -> bool:
    configs = [bag("t", ["f1", "f2"], data_type=torchrec.modules.embedding_configs.DataType.FP16), bag("u", ["f3"])]
    model = nn.ModuleDict({"ebc": torchrec.EmbeddingBagCollection(configs)})
    batch = batch_of(rank, 2, torch.float32).keyed if rank else batch_of(2, 0, torch.float32).keyed
    wanted = model["ebc"](batch).values()
    found = se.shard(model, optimizer=optim.SGD(), plan=se.row_wise(), verbose=False)["ebc"](batch).values()
    return found.dtype == torch.float32 and torch.equal(found, wanted)


def test_a_table_of_float16_answers_in_float32_as_torchrecs() -> None:
    assert run_ranks(2, half) == [True, True]


def variable(rank: int) -> Any:
    """A batch with 2 bags of f1 and 1 of f2, which stand for 4 and 3 (rank 0), or 3 of each (rank 1)."""
    draw = torch.Generator().manual_seed(rank)
    values = torch.randint(0, ROWS, (6,), generator=draw)
    inverse = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0]]) if rank == 0 else torch.tensor([[0, 1, 0], [0, 0, 0]])
    lengths = torch.tensor([2, 1, 3])
    strides = [[2], [1]]
    return torchrec.KeyedJaggedTensor(
        ["f1", "f2"], values, lengths=lengths, stride_per_key_per_rank=strides, inverse_indices=(["f2", "f1"], inverse.flip(0))
    )


def two_collections() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "ebc": torchrec.EmbeddingBagCollection([bag("t", ["f1"]), bag("u", ["f2", "f1"])]),
            "seq": torchrec.EmbeddingCollection([single("t", ["f1"]), single("u", ["f2"])]),
        }
    )


def of_variable_batch(rank: int, world_size: int) -> list[str]:
    whole, model = two_collections(), two_collections()
    se.shard(model, optimizer=optim.SGD(lr=1.0), plan=se.row_wise(), verbose=False)
    batch = variable(rank)
    wanted, found = whole["ebc"](batch), model["ebc"](batch)
    wrong = [] if torch.equal(found.values(), wanted.values()) else ["values"]
    pairs = zip(whole["seq"](batch).items(), model["seq"](batch).items(), strict=True)
    for (key, one), (name, other) in pairs:
        if key != name or not torch.equal(one.values(), other.values()) or not torch.equal(one.lengths(), other.lengths()):
            wrong.append(key)
        other.values().mul_(2.0)  # in place, which neither the rest nor a gradient may notice
    found.values().mul_(2.0)
    # One optimizer step: bags that are read several times gather the gradients of all their readers.
    (found.values() / 2.0).square().sum().backward()
    se.Optimizer(model).step()
    for other in range(world_size):
        (whole["ebc"](variable(other)).values().square().sum() / world_size).backward()
    for name in ("t", "u"):
        weight = whole["ebc"].embedding_bags[name].weight
        if not torch.allclose(model["ebc"].rows(f"ebc.{name}", torch.arange(ROWS)), weight - weight.grad, atol=1e-6):
            wrong.append(f"trained {name}")
    return wrong


@pytest.mark.parametrize("world_size", [1, 2])
def test_batch_sizes_may_differ_by_key(world_size: int) -> None:
    assert run_ranks(world_size, of_variable_batch) == [[]] * world_size


def of_processed_features(rank: int, world_size: int) -> list[str]:
    """Positions have weights that are learnt, outside the collection."""
    from torchrec.modules.feature_processor_ import PositionWeightedModule
    from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection

    def build() -> nn.Module:
        torch.manual_seed(0)
        ebc = torchrec.EmbeddingBagCollection([bag("t", ["f1", "f2"])], is_weighted=True)
        positions = {name: PositionWeightedModule(max_feature_length=5) for name in ("f1", "f2")}
        return FeatureProcessedEmbeddingBagCollection(ebc, positions)

    whole, model = build(), se.shard(build(), optimizer=optim.SGD(), plan=se.row_wise(), verbose=False)
    batch = torchrec.KeyedJaggedTensor(["f2", "f1"], torch.tensor([1, 2, 3, 1, 4, 4]), lengths=torch.tensor([2, 1, 0, 3]))
    wanted, found = whole(batch), model(batch)
    wrong = [] if torch.equal(found.values(), wanted.values()) else ["values"]
    wanted.values().square().sum().backward()
    found.values().square().sum().backward()
    for name, parameter in model.named_parameters():
        if not torch.allclose(parameter.grad, whole.get_parameter(name).grad, rtol=1e-5):
            wrong.append(name)
    return wrong if len(list(model.parameters())) == 2 else ["parameters"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_weights_of_positions_are_learnt(world_size: int) -> None:
    assert run_ranks(world_size, of_processed_features) == [[]] * world_size


def of_configs(rank: int, world_size: int) -> bool:
    """`se.EmbeddingCollection` on TorchRec's configs, with a feature of two tables."""
    configs = [bag("t", ["f1", "f2"]), bag("u", ["f3", "f1"], "MEAN")]
    ebc = torchrec.EmbeddingBagCollection(configs)
    emb = se.EmbeddingCollection(configs, optimizer=optim.SGD())
    for name, module in ebc.embedding_bags.items():
        emb.load_rows(name, module.weight)
    whole = batch_of(0, 0, torch.float32).keyed
    parts = whole.to_dict()
    batch = torchrec.KeyedJaggedTensor.from_jt_dict(
        {key: torchrec.JaggedTensor(parts[key].values(), lengths=parts[key].lengths()) for key in ("f1", "f2", "f3")}
    )
    wanted, found = ebc(batch), emb(batch)
    same = found.keys() == wanted.keys() and torch.equal(found.values(), wanted.values())
    ebc = torchrec.EmbeddingBagCollection([bag("t", ["f1", "f2"])])
    emb = se.EmbeddingCollection([bag("t", ["f1", "f2"])], optimizer=optim.SGD())
    emb.load_rows("t", ebc.embedding_bags["t"].weight)
    batch = variable(rank)
    return same and torch.equal(emb(batch).values(), ebc(batch).values())


def test_a_collection_takes_configs_that_share_a_feature() -> None:
    assert run_ranks(2, of_configs) == [True, True]


def reset(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    model = se.shard(everything(torch.float32), optimizer=optim.SGD(), plan=plan_of("mixed", world_size), verbose=False)
    for module in (model.sparse["ebc"], model.plain):
        module.reset_parameters()
    given = se.Embedding.from_pretrained(torch.full((ROWS, COLUMNS), 5.0), plan=se.row_wise())
    loaded = given.rows("embedding", torch.arange(ROWS))
    given.reset_parameters()
    drawn = {"given": given.rows("embedding", torch.arange(ROWS)), "loaded": loaded}
    return drawn | {name: weight.detach() for name, weight in se.unshard(model).state_dict().items()}


def test_reset_parameters_draws_what_the_module_would_have_started_from() -> None:
    one, two = run_ranks(1, reset)[0], run_ranks(2, reset)[1]
    assert all(torch.equal(weight, two[name]) for name, weight in one.items())
    before = everything(torch.float32).state_dict()
    assert 0.8 * ROWS**-0.5 < float(one["sparse.ebc.embedding_bags.means.weight"].abs().max()) <= ROWS**-0.5
    for name in ("plain.weight", "given"):
        assert 0.5 < float(one[name].std()) < 1.5
        assert not torch.equal(one[name], before["plain.weight"])
    assert torch.equal(one["loaded"], torch.full((ROWS, COLUMNS), 5.0))
    assert torch.equal(one["seq.embeddings.long.weight"], before["seq.embeddings.long.weight"])
