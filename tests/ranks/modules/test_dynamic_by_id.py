"""What people do with dynamic tables beside training: who lives, what became of ids, rows by id, retrieval; held against dicts."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

import shardembed as se
from shardembed.errors import ConfigError, FeatureError, InputError, StepError, UnsupportedError
from tests.dynamic_oracle import OracleTable
from tests.harness import run_ranks

COLUMNS = 4
ODD = torch.tensor([-1, -2, 2**63 - 1, -(2**63), 2**31])
SETTINGS = {
    "counted": se.Dynamic(se.LFU(halve_every=2), se.MinCount(2)),
    "aged": se.Dynamic(se.TTL(1), unknown="zeros"),
    "crowded": se.Dynamic(se.LRU()),
}
PLANS: dict[str, Callable[[int], se.Placement]] = {
    "rows": lambda ranks: se.row_wise(),
    "columns": lambda ranks: se.column_wise(),
    "one owner": lambda ranks: se.table_wise(ranks - 1),
}


def start(ids: torch.Tensor) -> torch.Tensor:
    """Small whole numbers that ids begin with, float32 `[n, COLUMNS]`."""
    return torch.stack([(ids >> shift) % 7 - 3 for shift in range(COLUMNS)], 1).float()


def config(dynamic: se.Dynamic, rows: int | None = 256) -> se.TableConfig:
    return se.TableConfig("item", rows, COLUMNS, pooling=None, init=start, dynamic=dynamic)


def batch(step: int, rank: int) -> torch.Tensor:
    """Ids of one rank in a step; some of them several times, others the same on all ranks."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.cat([ODD[: step + 1], torch.randint(step * 60, 600, (150,), generator=generator)])


def collection(world_size: int, plan: str, dynamic: se.Dynamic, rows: int | None = 256) -> se.EmbeddingCollection:
    tables = [se.TableConfig("plain", 7, COLUMNS), config(dynamic, rows)]
    optimizer = se.optim.SGD(lr=0.5)
    placement = {"item": PLANS[plan](world_size), "plain": se.row_wise()}
    return se.EmbeddingCollection(tables, optimizer=optimizer, plan=placement, gradient_reduction="sum")


def train(emb: se.EmbeddingCollection, steps: int, rank: int) -> None:
    """Each occurrence of an id adds a gradient of one, so weights are exact in float32."""
    optimizer = se.Optimizer(emb)
    for step in range(steps):
        vectors = emb({"plain": torch.zeros(1, 1, dtype=torch.int64), "item": batch(step, rank)})
        (vectors["item"].sum() + vectors["plain"].sum()).backward()
        optimizer.step()


def asked(world_size: int) -> torch.Tensor:
    return torch.cat([ODD, torch.arange(0, 700, 3)])


def everything(rank: int, world_size: int, plan: str, setting: str, rows: int | None) -> dict[str, Any]:
    emb = collection(world_size, plan, SETTINGS[setting], rows)
    train(emb, 4, rank)
    ids = asked(world_size)
    with torch.no_grad():
        emb({"plain": torch.zeros(0, 1, dtype=torch.int64), "item": ids})
    queries = torch.arange(-3.0, -3.0 + 2 * COLUMNS + 4 * rank).view(-1, COLUMNS)
    return {
        "living": emb.living("item"),
        "ids": emb.ids("item"),
        "rows": emb.rows("item", ids),
        "topk": (queries, *emb.topk(queries, 5, "item")),
        "tally": emb.tally("item"),
    }


def truth(world_size: int, setting: str, rows: int | None) -> tuple[OracleTable, Counter[str]]:
    table = OracleTable(config(SETTINGS[setting], rows), se.optim.SGD(lr=0.5), start)
    counted: Counter[str] = Counter()
    for step in range(4):
        for rank in range(world_size):
            ids = batch(step, rank)
            table.learn(ids, torch.ones(len(ids), COLUMNS))
        found = table.step()
        counted.update({name: getattr(found, name) for name in ("created", "evicted", "expired", "refused", "waiting")})
    return table, counted


@pytest.mark.parametrize(
    ("world_size", "plan", "setting", "rows"),
    [(1, "rows", "crowded", 256), (2, "rows", "counted", 256), (3, "columns", "crowded", 256), (2, "one owner", "aged", None)],
)
def test_whoever_asks_is_told_what_dicts_say(world_size: int, plan: str, setting: str, rows: int | None) -> None:
    table, counted = truth(world_size, setting, rows)
    live = torch.tensor(table.live)
    # What has died of age is gone for whoever asks, though the table's next step is the one that notices.
    eviction = table.settings.eviction
    if isinstance(eviction, se.TTL):
        live = torch.tensor([id_ for id_ in table.live if table.rows[id_].last + eviction.steps > table.now])
        counted["expired"] += len(table.live) - len(live)
        table.rows = {id_: table.rows[id_] for id_ in live.tolist()}
    weights = table.read(live, training=False).float()
    for found in run_ranks(world_size, everything, plan, setting, rows):
        assert torch.equal(found["ids"], live)
        assert torch.equal(found["living"].ids, live)
        assert found["living"].lasts.tolist() == [table.rows[id_].last for id_ in live.tolist()]
        if setting == "counted":
            assert found["living"].counts.tolist() == [table._halved(table.rows[id_]) for id_ in live.tolist()]
        else:
            assert found["living"].counts is None
        assert torch.equal(found["rows"], table.read(asked(world_size), training=False).float())
        queries, scores, ids = found["topk"]
        best = (queries @ weights.t()).sort(dim=1, descending=True, stable=True)
        assert torch.equal(scores, best.values[:, :5])
        assert torch.equal(ids, live[best.indices[:, :5]])
        tally = found["tally"]
        for name, number in counted.items():
            assert getattr(tally, name) == number, name
        assert (tally.live, tally.candidates) == (len(live), len(table.candidates))
        assert tally.unknown == len(set(asked(world_size).tolist()) - set(live.tolist()))
        assert tally.created > 0


def loaded(rank: int, world_size: int, plan: str, rows: int | None) -> list[torch.Tensor]:
    emb = collection(world_size, plan, se.Dynamic(se.LRU() if rows else None), rows)
    train(emb, 2, rank)
    before = emb.living("item")
    ids = torch.cat([ODD, torch.arange(2000, 2040), before.ids[5:9]])
    values = torch.arange(float(len(ids) * COLUMNS)).view(-1, COLUMNS)
    emb.load_rows("item", ids, values.numpy())
    found = [emb.rows("item", ids), values, emb.ids("item"), torch.cat([before.ids, ids]).unique()]
    train(emb, 1, rank)  # new rows learn, and old ones go on
    found += [emb.rows("item", ids)[5:-4], values[5:-4]]
    emb.reset_parameters()
    return [*found, emb.rows("item", found[2]), start(found[2])]


@pytest.mark.parametrize(("world_size", "plan", "rows"), [(1, "rows", 2000), (2, "columns", 2000), (3, "rows", None)])
def test_rows_are_loaded_by_id(world_size: int, plan: str, rows: int | None) -> None:
    for found in run_ranks(world_size, loaded, plan, rows):
        for one, other in zip(found[::2], found[1::2], strict=True):
            assert torch.equal(one, other)


def refused(rank: int, world_size: int, folder: str) -> list[str]:
    emb = collection(world_size, "rows", SETTINGS["crowded"])
    train(emb, 1, rank)
    before = emb.ids("item"), emb.rows("item", emb.ids("item"))
    many, two = torch.arange(1000), torch.arange(2)
    attempts: list[tuple[type[BaseException], Callable[[], Any]]] = [
        (ConfigError, lambda: emb.load_rows("item", many, torch.zeros(1000, COLUMNS))),
        (ConfigError, lambda: emb.load_rows("item", two, torch.zeros(3, COLUMNS))),
        (ConfigError, lambda: emb.load_rows("item", torch.zeros(256, COLUMNS))),
        (ConfigError, lambda: emb.load_rows("plain", two, torch.zeros(2, COLUMNS))),
        (InputError, lambda: emb.load_rows("item", torch.tensor([3, 3]), torch.zeros(2, COLUMNS))),
        (InputError, lambda: emb.load_rows("item", two + rank, torch.zeros(2, COLUMNS))),
        (ConfigError, lambda: emb.ids("plain")),
        (ConfigError, lambda: emb.tally("plain")),
        (FeatureError, lambda: emb.ids("nobody")),
        (ConfigError, lambda: emb.topk(torch.zeros(1, COLUMNS), 10_000, "item")),
        (RuntimeError, lambda: emb.load_state_dict(emb.state_dict())),  # torch's, of all keys
        (UnsupportedError, lambda: copy.deepcopy(emb.state_dict())),
        (UnsupportedError, lambda: emb.state_dict()["item.weight"] + 1),
        (CheckpointException, lambda: dcp.save(emb.state_dict(), checkpoint_id=folder)),  # its own, with each rank's
    ]
    said: list[str] = []
    for kind, attempt in attempts:
        with pytest.raises(kind) as caught:
            attempt()
        said.append(str(caught.value))
    emb({"plain": torch.zeros(1, 1, dtype=torch.int64), "item": many})["item"].sum().backward()
    with pytest.raises(StepError, match="zero_grad"):
        emb.load_rows("item", two, torch.zeros(2, COLUMNS))
    se.Optimizer(emb).zero_grad()
    assert torch.equal(emb.ids("item"), before[0]), "somebody came or left"
    torch.testing.assert_close(emb.rows("item", before[0]), before[1], rtol=0, atol=0)
    return said


def test_what_cannot_be_is_refused_by_all_ranks_alike(tmp_path: Path) -> None:
    one, other = run_ranks(2, refused, str(tmp_path))
    assert one == other
    for said in one[-4:]:
        assert "'item' is dynamic" in said
        assert "se.save_checkpoint" in said
    assert "find no place in table 'item'" in one[0]
    assert "num_embeddings" in one[0]
    assert "different ids" in one[5]
    assert "given 2 times" in one[4]
    assert "'plain' is not dynamic" in one[6]


def drop_ins(rank: int, world_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What `se.Embedding` and `se.EmbeddingBag` answer before and after a step, and what torch's own do over the same rows."""
    ids = torch.cat([ODD, torch.tensor([5, 5, -1])]) + rank
    everyone = torch.cat([ODD, torch.tensor([5, 5, -1, 6]), ODD + 1]).unique()
    settings: Any = {"dynamic": se.Dynamic(), "optimizer": se.optim.SGD(lr=0.5), "gradient_reduction": "sum"}
    found = []
    for ours, plain in [
        (se.Embedding(None, COLUMNS, padding_idx=6, **settings), nn.Embedding),
        (se.EmbeddingBag(4096, COLUMNS, mode="max", **settings), partial(nn.EmbeddingBag, mode="max")),
    ]:
        theirs = plain(len(everyone), COLUMNS, padding_idx=None if ours.padding_idx is None else int((everyone == 6).nonzero()))
        theirs.weight.data.copy_(ours.rows(everyone))
        shape = (2, -1)
        numbers = [
            torch.searchsorted(everyone, torch.cat([ODD, torch.tensor([5, 5, -1])]) + each).view(shape)
            for each in range(world_size)
        ]
        optimizers = se.Optimizer(ours), torch.optim.SGD(theirs.parameters(), lr=0.5)
        for _ in range(2):
            output, expected = ours(ids.view(shape)), theirs(numbers[rank])
            found.append((output.detach(), expected.detach()))
            output.square().sum().backward()
            torch.stack([theirs(each).square().sum() for each in numbers]).sum().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        found.append((ours.rows(everyone), theirs.weight.detach()))
        with pytest.raises(ConfigError, match="load_rows"):
            ours.load_rows(torch.zeros(3, COLUMNS))
        ours.load_rows(torch.tensor([2**40]), torch.ones(1, COLUMNS))
        found.append((ours.rows(torch.tensor([[2**40]])), torch.ones(1, 1, COLUMNS)))
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_drop_ins_are_torchs_own_over_all_ids(world_size: int) -> None:
    for found in run_ranks(world_size, drop_ins):
        for ours, theirs in found:
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_rows_that_are_loaded_between_a_forward_and_its_backward_are_the_ones_that_learn() -> None:
    emb = collection(1, "rows", se.Dynamic())
    ids = torch.tensor([3, 2**50])
    given = {"plain": torch.zeros(1, 1, dtype=torch.int64), "item": ids}
    out = emb(given)["item"]
    emb.load_rows("item", ids[1:], torch.full((1, COLUMNS), 10.0))
    out.sum().backward()
    se.Optimizer(emb).step()
    assert emb.ids("item").tolist() == ids.tolist()
    assert torch.equal(emb.rows("item", ids), torch.stack([start(ids[:1])[0] - 0.5, torch.full((COLUMNS,), 9.5)]))


def test_ids_that_are_lists_may_be_none_and_have_to_fit_in_64_bits() -> None:
    emb = collection(1, "rows", se.Dynamic())
    emb.load_rows("item", [], torch.empty(0, COLUMNS))
    assert not emb.ids("item").numel()
    for wrong in ([2**63], ["a"], [[1], [2, 3]], None):
        with pytest.raises(InputError, match="load_rows: ids of table 'item' must be integers"):
            emb.load_rows("item", wrong, torch.ones(1, COLUMNS))
    assert not emb.ids("item").numel()
