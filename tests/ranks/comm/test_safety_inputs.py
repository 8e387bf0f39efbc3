"""A batch that one rank refuses: every rank raises the same error, no table changes, and the next good batch works."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import shardembed as se
from shardembed import errors
from tests.harness import run_ranks

TABLES = [
    se.TableConfig("item", 40, 4, feature_names=["bought", "seen"], pooling={"bought": "sum", "seen": None}),
    se.TableConfig("user", 30, 6, pooling="mean"),
]
PLANS: dict[str, Any] = {
    "cut rows": se.row_wise(),
    "cut rows, by bags": se.row_wise(packing="bag"),
    "cut columns": se.column_wise(),
    "only copies": se.replicated(),
    "one cut, one copied": {"item": se.table_wise(1), "user": se.replicated()},
}


def good(rank: int) -> dict[str, Any]:
    drawn = torch.Generator().manual_seed(rank)
    return {
        "bought": (torch.randint(0, 40, (7,), generator=drawn), torch.tensor([0, 2, 2, 7])),
        "seen": torch.randint(0, 40, (2, 3), generator=drawn),
        "user": torch.randint(0, 30, (3 + rank, 2), generator=drawn),
    }


@dataclass(frozen=True)
class Bad:
    """What a culprit passes instead, and what all ranks hear: the error's class, and what its text says."""

    change: Callable[[dict[str, Any]], Any]
    error: type[Exception]
    says: list[str]


def bags(ids: Any, offsets: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda batch: {**batch, "bought": (ids, offsets)}


IDS = torch.arange(7)
RANGE = ["table 'item'", "feature 'seen'", "0 to 39", "num_embeddings=40"]
BATCHES: dict[str, Bad] = {
    "negative id": Bad(lambda b: {**b, "seen": torch.tensor([3, -1])}, errors.IdRangeError, [*RANGE, "id -1 at position 1"]),
    "id too large": Bad(lambda b: {**b, "seen": torch.tensor([40])}, errors.IdRangeError, [*RANGE, "id 40 at position 0"]),
    "id far too large": Bad(lambda b: {**b, "seen": torch.tensor([2**62])}, errors.IdRangeError, [*RANGE, f"id {2**62}"]),
    "texts": Bad(lambda b: {**b, "seen": ["a", "b"]}, errors.DtypeError, ["'seen'", "not str", "torch.from_numpy(se.hash64"]),
    "a list of ids": Bad(lambda b: {**b, "seen": [3]}, errors.InputError, ["'seen'", "ids alone go as a tensor"]),
    "id in a bag": Bad(bags(IDS + 34, torch.tensor([0, 7])), errors.IdRangeError, ["'bought'", "id 40 at position 6"]),
    "offsets start late": Bad(bags(IDS, torch.tensor([1, 7])), errors.OffsetsError, ["'bought'", "run from 1 to 7"]),
    "offsets fall": Bad(bags(IDS, torch.tensor([0, 5, 3, 7])), errors.OffsetsError, ["'bought'", "fall from 5 to 3 at position 2"]),
    "offsets end early": Bad(bags(IDS, torch.tensor([0, 6])), errors.OffsetsError, ["'bought'", "must run from 0 to 7"]),
    "offsets end late": Bad(bags(IDS, torch.tensor([0, 8])), errors.OffsetsError, ["'bought'", "run from 0 to 8"]),
    "no offsets": Bad(bags(IDS, torch.empty(0, dtype=torch.int64)), errors.OffsetsError, ["'bought'", "empty"]),
    "offsets as floats": Bad(bags(IDS, torch.tensor([0.0, 7.0])), errors.DtypeError, ["'bought'", "int32 or int64"]),
    "ids as floats": Bad(lambda b: {**b, "user": torch.rand(3, 2)}, errors.DtypeError, ["'user'", "torch.float32", "ids.long()"]),
    "ids as a list": Bad(lambda b: {**b, "user": [1, 2, 3, 4]}, errors.InputError, ["'user'", "(ids, offsets)"]),
    "ids as nothing": Bad(lambda b: {**b, "user": None}, errors.DtypeError, ["'user'", "not NoneType"]),
    "too many dimensions": Bad(lambda b: {**b, "user": torch.ones(2, 2, 2).long()}, errors.InputError, ["'user'", "[2, 2, 2]"]),
    "unknown feature": Bad(lambda b: {**b, "usr": b["user"]}, errors.FeatureError, ["'usr'", "did you mean 'user'?"]),
    "missing feature": Bad(lambda b: {"seen": b["seen"], "user": b["user"]}, errors.FeatureError, ["['bought']", "empty tensor"]),
    "a bare tensor": Bad(lambda b: b["user"], errors.DtypeError, ["dict of tensors by feature", "not Tensor"]),
    "nothing": Bad(lambda b: None, errors.DtypeError, ["dict of tensors by feature", "not NoneType"]),
}


@dataclass(frozen=True)
class Refusal:
    """What a rank saw of a bad batch: the error, and whether tables and the next good batch were as if it had not been."""

    error: str
    text: str
    same_tables: bool
    same_outputs: bool


def held(emb: se.EmbeddingCollection | se.Embedding | se.EmbeddingBag) -> list[torch.Tensor]:
    """Copies of all weights and optimizer state on this rank."""
    return [tensor.clone() for local in emb.local_shards() for tensor in (local.weights, *local.state.values())]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(here, there) for here, there in zip(one, other, strict=True))


def refuse(emb: Any, call: Callable[[], Any], again: Callable[[], list[torch.Tensor]]) -> Refusal:
    tables, outputs = held(emb), again()
    try:
        call()
    except errors.ShardEmbedError as error:
        return Refusal(type(error).__name__, str(error), same(held(emb), tables), same(again(), outputs))
    return Refusal("none", "", same_tables=False, same_outputs=False)


def train(emb: Any, optimizer: se.Optimizer, outputs: list[torch.Tensor]) -> None:
    torch.stack([output.square().sum() for output in outputs]).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def refuse_batches(rank: int, world_size: int, plan: str, culprits: list[int]) -> dict[str, Refusal]:
    """Train a step, then let the culprits pass every bad batch; train another step in the end."""
    emb = se.EmbeddingCollection(TABLES, plan=PLANS[plan], optimizer=se.optim.Adagrad())
    optimizer = se.Optimizer(emb)

    def outputs() -> list[torch.Tensor]:
        return list(emb(good(rank)).values())

    train(emb, optimizer, outputs())
    found = {
        name: refuse(emb, lambda bad=bad: emb(bad.change(good(rank)) if rank in culprits else good(rank)), outputs)
        for name, bad in BATCHES.items()
    }
    before = held(emb)
    train(emb, optimizer, outputs())
    mine = [tensor for tensor in before if tensor.numel()]
    assert not mine or not same(held(emb), before), "the step after the bad batches changed nothing"
    return found


def check_refused(ranks: list[dict[str, Refusal]], wanted: dict[str, Bad], culprits: list[int]) -> None:
    also = f" (rank(s) {culprits[1:]} also refused their batch)" if len(culprits) > 1 else ""
    for name, bad in wanted.items():
        first = ranks[0][name]
        assert first.error == bad.error.__name__, f"{name}: {first}"
        assert first.text.startswith(f"rank {culprits[0]}: "), first.text
        assert first.text.endswith(also), first.text
        assert first.text.count("rank ") == 1, f"two prefixes: {first.text}"
        assert all(part in first.text for part in bad.says), first.text
        for rank, found in enumerate(ranks):
            assert found[name] == first, f"{name}: rank {rank} saw {found[name]}, rank 0 {first}"
        assert first.same_tables, f"{name}: the tables changed"
        assert first.same_outputs, f"{name}: the next batch came out different"


@pytest.mark.parametrize("plan", PLANS)
def test_every_rank_refuses_the_bad_batch_of_one(plan: str) -> None:
    check_refused(run_ranks(2, refuse_batches, plan, [1]), BATCHES, [1])


def test_every_rank_hears_of_the_first_of_several_bad_batches() -> None:
    check_refused(run_ranks(3, refuse_batches, "cut rows", [0, 2]), BATCHES, [0, 2])
    check_refused(run_ranks(2, refuse_batches, "only copies", [0, 1]), BATCHES, [0, 1])


CALLS: dict[str, Bad] = {
    "Embedding: id too large": Bad(lambda m: m["one"](torch.tensor([[5, 30]])), errors.IdRangeError, ["'one'", "id 30", "0 to 29"]),
    "Embedding: floats": Bad(lambda m: m["one"](torch.rand(2)), errors.DtypeError, ["'one'", "torch.float32"]),
    "Embedding: no tensor": Bad(lambda m: m["one"](3), errors.DtypeError, ["'one'", "not int"]),
    "EmbeddingBag: negative id": Bad(
        lambda m: m["bag"](torch.tensor([[5, -7]])), errors.IdRangeError, ["'bag'", "id -7 at position 1"]
    ),
    "EmbeddingBag: no offsets": Bad(lambda m: m["bag"](torch.tensor([5])), errors.InputError, ["'bag'", "need offsets"]),
    "EmbeddingBag: offsets too many": Bad(
        lambda m: m["bag"](torch.tensor([[5]]), torch.tensor([0])), errors.InputError, ["'bag'", "offsets must be None"]
    ),
    "EmbeddingBag: offsets start late": Bad(
        lambda m: m["bag"](torch.tensor([5, 6]), torch.tensor([1])), errors.OffsetsError, ["'bag'", "the first bag must begin at 0"]
    ),
    "EmbeddingBag: weights of a mean": Bad(
        lambda m: m["bag"](torch.tensor([[5]]), None, torch.ones(1, 1)), errors.InputError, ["'bag'", "pooling 'sum'"]
    ),
    "rows: id too large": Bad(lambda m: m["many"].rows("user", torch.tensor([99])), errors.IdRangeError, ["'user'", "id 99"]),
    "rows: floats": Bad(lambda m: m["many"].rows("user", torch.rand(1)), errors.DtypeError, ["ids must be int32 or int64"]),
    "rows: an array": Bad(
        lambda m: m["many"].rows("user", np.array([1])), errors.DtypeError, ["not ndarray; use torch.from_numpy"]
    ),
    "rows: unknown table": Bad(
        lambda m: m["many"].rows("usr", torch.tensor([0])), errors.FeatureError, ["no table 'usr'", "['item', 'user']"]
    ),
    "rows: which of several tables": Bad(
        lambda m: m["many"].rows(torch.tensor([0])), errors.FeatureError, ["2 tables, so name one", "['item', 'user']"]
    ),
    "topk: k too large": Bad(lambda m: m["many"].topk(torch.rand(1, 6), 31, "user"), errors.ConfigError, ["'user'", "31"]),
    "topk: k is no number": Bad(lambda m: m["many"].topk(torch.rand(1, 6), None, "user"), errors.ConfigError, ["not None"]),
    "topk: queries too wide": Bad(lambda m: m["many"].topk(torch.rand(1, 7), 2, "user"), errors.ConfigError, ["[Q, 6]", "[1, 7]"]),
    "topk: no queries": Bad(lambda m: m["many"].topk(None, 2, "user"), errors.ConfigError, ["[Q, 6]", "not NoneType"]),
    "topk: unknown table": Bad(lambda m: m["many"].topk(torch.rand(1, 6), 2, "usr"), errors.FeatureError, ["no table 'usr'"]),
}
GOOD: dict[str, Callable[[Any], Any]] = {
    "Embedding": lambda m: m["one"](torch.tensor([[5, 29]])),
    "EmbeddingBag": lambda m: m["bag"](torch.tensor([[5, 29]])),
    "rows": lambda m: m["many"].rows("user", torch.tensor([29])),
    "topk": lambda m: m["many"].topk(torch.rand(1, 6, generator=torch.Generator().manual_seed(1)), 2, "user")[0],
}


def refuse_calls(rank: int, world_size: int, plan: str) -> dict[str, Refusal]:
    modules = {
        "one": se.Embedding(30, 4, feature="one", plan=PLANS[plan], optimizer=se.optim.Adagrad()),
        "bag": se.EmbeddingBag(30, 4, feature="bag", plan=PLANS[plan], optimizer=se.optim.Adagrad()),
        "many": se.EmbeddingCollection(TABLES, plan=PLANS[plan], optimizer=se.optim.Adagrad()),
    }
    found = {}
    for name, bad in CALLS.items():
        right = GOOD[name.split(":")[0]]
        touched = modules[{"Embedding": "one", "EmbeddingBag": "bag"}.get(name.split(":")[0], "many")]
        wrong = bad.change if rank == 0 else right
        found[name] = refuse(touched, lambda wrong=wrong: wrong(modules), lambda right=right: [right(modules)])
    return found


@pytest.mark.parametrize("plan", ["cut rows", "cut rows, by bags", "only copies"])
def test_every_rank_refuses_the_bad_call_of_one(plan: str) -> None:
    check_refused(run_ranks(2, refuse_calls, plan), CALLS, [0])


class Broken(dict[str, Any]):
    """A batch whose values cannot be had."""

    def __getitem__(self, key: str) -> Any:
        raise OSError("the disk is gone")


def refuse_broken(rank: int, world_size: int) -> tuple[str, str, list[int]]:
    emb = se.EmbeddingCollection(TABLES, plan=se.row_wise())
    try:
        emb(Broken(good(rank)) if rank == 1 else good(rank))
    except (errors.ShardEmbedError, OSError) as error:
        return type(error).__name__, str(error), list(emb(good(rank))["user"].shape)
    return "none", "", []


def test_an_error_of_another_kind_stays_itself_and_reaches_the_others() -> None:
    told, own = run_ranks(2, refuse_broken)
    assert told == ("InputError", "rank 1: OSError: the disk is gone", [3, 6])
    assert own == ("OSError", "the disk is gone", [4, 6])


def trace(rank: int, world_size: int, tracing: list[int]) -> tuple[str, str]:
    emb, ids = se.Embedding(30, 4, plan=se.row_wise(), optimizer=se.optim.Adagrad()), torch.tensor([5, 29])
    said = ("none", "")
    try:
        if rank in tracing:
            torch.jit.trace(emb, ids)
        else:
            emb(ids)
    except errors.ShardEmbedError as error:
        said = type(error).__name__, str(error)
    assert torch.equal(emb(ids), emb.rows(ids)), "no call is answered after a refused trace"
    return said


@pytest.mark.parametrize("tracing", [[0, 1], [1]], ids=str)
def test_a_trace_is_refused_on_all_ranks_and_they_go_on(tracing: list[int]) -> None:
    for name, text in run_ranks(2, trace, tracing):
        assert name == "UnsupportedError"
        assert "torch.jit.trace cannot follow ids to other ranks" in text


def test_a_trace_is_refused_on_one_rank_too() -> None:
    assert trace(0, 1, [0])[0] == "UnsupportedError"
