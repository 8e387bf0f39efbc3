"""Plain models whose tables become dynamic by `se.shard`, and back: what rows become, and what a plain module
answers."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import nn

import shardembed as se
from shardembed.errors import ConfigError, DtypeError, PlanError, UnsupportedError
from tests.harness import run_ranks

HASHES = torch.tensor([[2**62 + 5, -1, 3], [-(2**63), 7, 2**62 + 5]])


class Model(nn.Module):
    """A table that two modules share, one with bags, and a plain one."""

    def __init__(self, rows: int = 40, mode: str = "mean", device: str | None = None) -> None:
        super().__init__()
        self.item = nn.Embedding(rows, 4, padding_idx=7, device=device)
        self.basket = nn.EmbeddingBag(rows, 4, mode=mode, padding_idx=7, device=device)
        self.basket.weight = self.item.weight
        self.tags = nn.EmbeddingBag(rows, 4, mode=mode, max_norm=1.0)
        self.user = nn.Embedding(5, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        alone = self.item(ids).sum(1) + self.basket(ids) + self.tags(ids.flatten(), torch.arange(0, ids.numel(), ids.shape[1]))
        return alone + self.user(ids % 5).sum(1)


def sharded(model: Any, **settings: Any) -> Any:
    return se.shard(model, optimizer=se.optim.SGD(lr=0.5), verbose=False, gradient_reduction="sum", **settings)


def step(model: nn.Module, ids: torch.Tensor) -> None:
    optimizer = se.Optimizer(model)
    model(ids).sum().backward()
    optimizer.step()


def rows_become_ids(rank: int, world_size: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(3 if rank == 0 else 4)
    model: Any = Model()
    plain: Any = Model()
    plain.load_state_dict(model.state_dict())
    sharded(model, dynamic={"item": se.Dynamic(se.LRU()), "tag*": se.Dynamic()}, capacity={"tags": None})
    before = model.item.ids(), model.tags.ids()
    ids = torch.tensor([[1, 2, 39], [0, 7, 2]])
    with torch.no_grad():
        same = model(ids), plain(ids)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5 * world_size)  # the ranks' batches are alike
    for _ in range(2):
        step(model, ids)
        optimizer.zero_grad()
        plain(ids).sum().backward()
        optimizer.step()
    return (*before, *same, model.item.rows(ids), plain.item.weight.detach()[ids])


@pytest.mark.parametrize("world_size", [1, 2])
def test_rows_become_ids_with_their_weights(world_size: int) -> None:
    found = run_ranks(world_size, rows_become_ids)
    for item, tags, *_ in found:
        assert item.tolist() == [id_ for id_ in range(40) if id_ != 7], "padding has no row"
        assert tags.tolist() == list(range(40))
    _, _, ours, theirs, trained, plain = found[0]  # whose weights were taken
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(trained, plain, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(other[4], trained) for other in found), "ranks read the same rows"


def plain_again(rank: int, world_size: int, unknown: str, mode: str, only: int | None) -> tuple[Any, ...]:
    model: Any = Model(mode=mode)
    dynamic = se.Dynamic(unknown=unknown)  # pyright: ignore[reportArgumentType]
    sharded(model, dynamic={"*": dynamic}, fresh=["*"], plan={"item": se.column_wise()})
    assert not model.item.ids().numel(), "no id of a fresh table has a row"
    step(model, HASHES + rank)
    model.eval()
    asked = torch.cat([HASHES, HASHES + 100, torch.tensor([[7, 7, 7]])])
    with torch.no_grad():
        before = model(asked), model.item(asked), model.tags(asked[0], torch.tensor([0, 2]))
        ids = model.item.ids()
        se.unshard(model, rank=only)
        assert model.item.weight is model.basket.weight
        if only not in (None, rank):
            assert model.item.weight.is_meta
            assert model.item.ids.is_meta
            return ()
        again = pickle.loads(pickle.dumps(model))
        after = again(asked), again.item(asked), again.tags(asked[0], torch.tensor([0, 2]))
    empty = se.IdEmbedding(model.item.table, model.item.seed)
    empty.load_state_dict(model.item.state_dict())
    return before, after, ids, model.item.ids, empty(asked).detach(), model.training


@pytest.mark.parametrize(
    ("world_size", "unknown", "mode", "only"), [(1, "start", "max", None), (3, "zeros", "mean", 1), (2, "start", "sum", None)]
)
def test_a_plain_module_answers_as_the_sharded_one_in_evaluation(
    world_size: int, unknown: str, mode: str, only: int | None
) -> None:
    for found in filter(None, run_ranks(world_size, plain_again, unknown, mode, only)):
        before, after, ids, kept, loaded, training = found
        assert torch.equal(after[1], before[1])
        torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)
        assert torch.equal(ids, kept)
        assert len(ids) >= 4
        assert torch.equal(loaded, before[1])
        assert not training
        strangers = before[1][2:4].abs().sum(-1)
        assert bool((strangers == 0).all()) == (unknown == "zeros")
        assert not before[1][-1].any(), "padding reads zeros"


def test_an_unsharded_table_learns_as_a_plain_one() -> None:
    table = se.TableConfig("item", None, 3, pooling="sum", dynamic=se.Dynamic(unknown="zeros"))
    module = se.IdEmbedding(table)
    module.fill(torch.tensor([-5, 2**40]), torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    out = module(torch.tensor([2**40, 9, 2**40, -5]), torch.tensor([0, 1]))
    assert out.tolist() == [[4.0, 5.0, 6.0], [5.0, 7.0, 9.0]]
    (out * torch.tensor([[1.0], [10.0]])).sum().backward()
    assert module.weight.grad is not None
    assert module.weight.grad.tolist() == [[10.0] * 3, [11.0] * 3]
    with pytest.raises(ConfigError, match="ascend"):
        module.fill(torch.tensor([3, 3]), torch.zeros(2, 3))


def test_a_plain_module_takes_no_ids_that_it_would_not_find() -> None:
    module = se.IdEmbedding(se.TableConfig("item", None, 2, pooling=None, dynamic=se.Dynamic(unknown="zeros")))
    module.load_state_dict({"ids": torch.tensor([1, 2]), "weight": torch.ones(2, 2)})
    for wrong in ([2, 1, 3], [1, 1, 3]):
        with pytest.raises(RuntimeError, match="ids: ids of table 'item' must ascend, each once; nothing of it was loaded"):
            module.load_state_dict({"ids": torch.tensor(wrong), "weight": torch.zeros(3, 2)})
    assert torch.equal(module(torch.tensor([1, 2, 3], dtype=torch.int32)).detach(), torch.tensor([[1.0] * 2, [1.0] * 2, [0.0] * 2]))
    for ids in (torch.tensor([1.5]), torch.tensor([True])):  # either would be taken for id 1
        with pytest.raises(DtypeError, match="table 'item': ids must be int32 or int64, not torch"):
            module(ids)


def test_what_cannot_become_dynamic_is_refused_before_anything_changes() -> None:
    def attempt(rows: int = 1000, **settings: Any) -> Any:
        model: Any = Model(rows)
        try:
            return se.shard(model, verbose=False, **{"optimizer": se.optim.SGD(lr=0.1), **settings})
        except Exception:
            assert type(model.item) is nn.Embedding, "half of it was converted"
            raise

    lru = se.Dynamic(se.LRU())
    with pytest.raises(
        ConfigError, match=r"of its 1,000 rows find no place .* capacity={'item': (\d+)}.*fresh=\['item'\]"
    ) as caught:
        attempt(dynamic={"item": lru})
    capacity = int(str(caught.value).split("capacity={'item': ")[1].split("}")[0])
    assert 1000 < capacity < 2000
    assert len(attempt(dynamic={"item": lru}, capacity={"item": capacity}).item.ids()) == 999
    for settings, said in [
        ({"dynamic": lru}, "by name or pattern of tables, dynamic=.* say, not"),
        ({"dynamic": {"none*": lru}}, "matches no table"),
        ({"dynamic": {"item": lru}, "fresh": ["user"]}, "becomes dynamic"),
        ({"dynamic": {"item": lru}, "capacity": {"user": 3}}, "becomes dynamic"),
        ({"dynamic": {"item": lru}, "capacity": {"item": None}}, "without a limit"),
        ({"dynamic": {"item": "LRU"}, "fresh": ["*"]}, "se.Dynamic"),
        ({"dynamic": {"user": lru}, "optimizer": None}, "optimizer of your own|your own optimizer"),
    ]:
        with pytest.raises(ConfigError, match=said):
            attempt(**settings)
    model = attempt(40, dynamic={"item": lru})
    se.unshard(model)
    with pytest.raises(UnsupportedError, match=r"item is an IdEmbedding.*skip="):
        se.shard(model, optimizer=se.optim.SGD(lr=0.1), verbose=False)


def copied(rank: int, world_size: int) -> str:
    with pytest.raises(PlanError) as caught:
        sharded(Model(), dynamic={"item": se.Dynamic()}, plan={"item": se.replicated()})
    return str(caught.value)


def test_copies_are_refused() -> None:
    assert all("row_wise()" in said for said in run_ranks(2, copied))


def keyed(rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, str]:
    """A collection of TorchRec's with a dynamic table and a plain one: what it answers, and the sums of rows that it should."""
    torchrec = pytest.importorskip("torchrec")
    configs = [
        torchrec.EmbeddingBagConfig(name=f"t{name}", embedding_dim=4, num_embeddings=9, feature_names=[name]) for name in "ab"
    ]
    model: Any = nn.Module()
    model.ebc = torchrec.EmbeddingBagCollection(configs)
    sharded(model, dynamic={"ebc.ta": se.Dynamic()}, capacity={"ebc.ta": None}, fresh=["*.ta"])
    flat = HASHES.flatten() + rank
    batch = torchrec.KeyedJaggedTensor(["a", "b"], torch.cat([flat, torch.arange(4)]), lengths=torch.tensor([3, 3, 2, 2]))
    optimizer = se.Optimizer(model)
    before = model.ebc.rows("ebc.ta", flat)
    model.ebc(batch).values().sum().backward()
    optimizer.step()
    rows, plain = model.ebc.rows("ebc.ta", flat), model.ebc.rows("ebc.tb", torch.arange(4))
    wanted = torch.cat([rows.view(2, 3, 4).sum(1), plain.view(2, 2, 4).sum(1)], 1)
    occurred = (flat.unsqueeze(1) == torch.cat([HASHES.flatten() + each for each in range(world_size)])).sum(1, keepdim=True)
    with pytest.raises(UnsupportedError, match="ebc: TorchRec's collections take row numbers") as caught:
        se.unshard(model)
    return model.ebc(batch).values().detach(), wanted, rows, before - 0.5 * occurred, str(caught.value)


@pytest.mark.parametrize("world_size", [1, 2])
def test_tables_of_a_torchrec_collection_become_dynamic(world_size: int) -> None:
    pytest.importorskip("torchrec")
    for answer, wanted, rows, learned, _ in run_ranks(world_size, keyed):
        torch.testing.assert_close(answer, wanted, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(rows, learned, rtol=1e-6, atol=1e-6)
