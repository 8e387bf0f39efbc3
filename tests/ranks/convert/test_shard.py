"""shard() and unshard(): which modules and weights a model has before, between and after, on 1 to 3 ranks."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import shardembed as se
from shardembed.errors import ConfigError, PickleError, PlanError, StepError, UnsupportedError
from tests.harness import run_ranks
from tests.ranks.beside import COLUMNS, F64, ITEMS, USERS, Towers, agree, batches, learn, seeded, weights_of
from tests.ranks.comm.test_collectives import Counted

WORLD_SIZES = (1, 2, 3)
ROWS = {"user": se.row_wise(), "towers.item": se.column_wise()}
QUIET: dict[str, Any] = {"verbose": False, "optimizer": se.optim.SGD(lr=0.5)}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def there_and_back(rank: int, world_size: int) -> None:
    """Every rank starts from weights of its own; all go on with rank 0's."""
    model = seeded(Towers, seed=rank)
    model.user.eval()
    before, paths = weights_of(seeded(Towers)), [path for path, _ in model.named_modules()]
    copied = copy.deepcopy(model)
    assert se.shard(model, plan=ROWS, **QUIET) is model
    assert isinstance(model.user, se.Embedding), "user is not sharded"
    assert isinstance(model.towers["item"], se.EmbeddingBag), "item is not sharded"
    assert [path for path, _ in model.named_modules()] == paths, "the modules have other names"
    assert list(model.state_dict()) == list(before), "the state dict has other keys"
    assert not any("user" in name or "item" in name for name, _ in model.named_parameters()), "tables are Parameters"
    assert [table.name for table in model.user.plan.tables] == ["user", "towers.item"], "not one journey"
    assert not model.user.training, "eval() was forgotten"
    assert model.training, "train() was forgotten"
    assert torch.equal(model.user.rows("user", torch.arange(USERS)), before["user.weight"]), "rows are not rank 0's"
    assert se.unshard(model) is model
    assert type(model.user) is nn.Embedding, "user is not plain"
    assert type(model.towers["item"]) is nn.EmbeddingBag, "item is not plain"
    assert not model.user.training, "eval() was forgotten on the way back"
    after = weights_of(model)
    tables = {name: weight for name, weight in after.items() if not name.startswith("head")}
    assert equal(tables, {name: before[name] for name in tables}), "weights changed on the way"
    assert equal(weights_of(copied), weights_of(seeded(Towers, seed=rank))), "a copy made before sharding changed"


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_names_and_weights_survive_the_way_there_and_back(world_size: int) -> None:
    run_ranks(world_size, there_and_back)


def to_one_rank(rank: int, world_size: int) -> None:
    model = seeded(Towers)
    before = weights_of(model)
    se.shard(model, plan=ROWS, **QUIET)
    se.unshard(model, rank=world_size - 1)
    if rank == world_size - 1:
        assert equal(weights_of(model), before), "weights changed on the way"
    else:
        assert model.user.weight.is_meta, "a rank that was not asked for has the weights"


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_unshard_brings_the_weights_to_one_rank(world_size: int) -> None:
    run_ranks(world_size, to_one_rank)


def from_meta(rank: int, world_size: int) -> list[torch.Tensor]:
    with torch.device("meta"):
        model = Towers()
    se.shard(model, plan=ROWS, **QUIET)
    return [model.user.rows("user", torch.arange(USERS)), model.towers["item"].rows("towers.item", torch.arange(ITEMS))]


def test_tables_on_the_meta_device_start_alike_on_every_number_of_ranks() -> None:
    (expected,) = run_ranks(1, from_meta)
    assert 0.5 < float(torch.cat([part.flatten() for part in expected]).std()) < 1.5
    for world_size in (2, 3):
        for found in run_ranks(world_size, from_meta):
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def meta_elsewhere(rank: int, world_size: int) -> None:
    with torch.device("cpu" if rank == 0 else "meta"):
        model = seeded(Towers)
    se.shard(model, plan=ROWS, **QUIET)
    rows = model.user.rows("user", torch.arange(USERS))
    assert torch.equal(rows, weights_of(seeded(Towers))["user.weight"]), "rows are not rank 0's"


def test_only_rank_zero_needs_the_weights() -> None:
    run_ranks(3, meta_elsewhere)


class Shared(nn.Module):
    """`first` and `second` share a weight, `again` is `first` itself; `first` is called twice, once by keyword. Answers are written
    into.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Embedding(USERS, COLUMNS, dtype=F64)
        self.second = nn.EmbeddingBag(USERS, COLUMNS, mode="sum", dtype=F64)
        self.second.weight = self.first.weight
        self.inner = nn.Module()
        self.inner.again = self.first

    def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        twice = self.first(one)
        twice *= 3.0
        twice += self.inner.again(input=other)
        return twice.tanh_() + self.second(input=one, offsets=torch.arange(len(one)))


def shared_inputs(one: torch.Tensor, other: torch.Tensor) -> dict[str, Any]:
    return {"first": [one, other], "second": (one, torch.arange(len(one)))}


def train_shared(rank: int, world_size: int, announced: bool) -> dict[str, torch.Tensor]:
    model = seeded(Shared)
    se.shard(model, plan=se.row_wise(), inputs=shared_inputs if announced else None, **QUIET)
    assert model.inner.again is model.first, "one module has become two"
    assert [table.name for table in model.first.journey.tables] == ["first"], "one weight has become two tables"
    optimizer = se.Optimizer(model)
    for users, items, _ in batches(3):
        output = model(users.tensor_split(world_size)[rank], items[:, 0].tensor_split(world_size)[rank])
        output.square().sum().div(12 / world_size).backward()
        optimizer.step()
    se.unshard(model)
    assert model.second.weight is model.first.weight, "the tie is lost"
    assert model.inner.again is model.first, "one module has become two on the way back"
    return weights_of(model)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("announced", [False, True], ids=["own calls", "inputs="])
@pytest.mark.filterwarnings("error")
def test_tied_weights_and_modules_called_twice_learn_as_one_table(world_size: int, announced: bool) -> None:
    plain = seeded(Shared)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
    learn(plain, [optimizer], batches(3), loss=lambda model, batch: model(batch[0], batch[1][:, 0]).square().sum() / 12)
    agree(run_ranks(world_size, train_shared, announced), weights_of(plain))


FEATURES = [f"f{i}" for i in range(26)]


class Wide(nn.Module):
    """26 tables, as for click prediction."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.ModuleDict({name: nn.EmbeddingBag(20 + i, 3, dtype=F64) for i, name in enumerate(FEATURES)})

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.bags[name](ids) for name, ids in wide_parts(batch).items()], 1)


def wide_parts(batch: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(zip(FEATURES, batch.unbind(1), strict=True))


def wide_inputs(batch: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"bags.{name}": ids for name, ids in wide_parts(batch).items()}


def count_wide(rank: int, world_size: int, announced: bool) -> tuple[dict[str, int], torch.Tensor]:
    model = se.shard(seeded(Wide), plan=se.row_wise(), inputs=wide_inputs if announced else None, **QUIET)
    optimizer = se.Optimizer(model)
    ids = torch.randint(0, 20, (4, 26, 2), generator=torch.Generator().manual_seed(rank))
    with Counted() as counted:
        output = model(ids)
        output.sum().backward()
        optimizer.step()
    torch.testing.assert_close(output, seeded(Wide)(ids), rtol=0, atol=0)
    return dict(counted.calls), output.detach()


@pytest.mark.parametrize("announced", [False, True], ids=["own calls", "inputs="])
def test_inputs_make_one_journey_of_26_tables(announced: bool) -> None:
    wanted = {"all-to-all": 4 if announced else 26 * 4}
    assert [calls for calls, _ in run_ranks(2, count_wide, announced)] == [wanted] * 2


def wrong_inputs(rank: int, world_size: int, how: str) -> None:
    def inputs(user: torch.Tensor, item: torch.Tensor) -> dict[str, Any]:
        changed = (user + 1) % USERS
        return {
            "other ids": {"user": changed, "towers.item": item},
            "other order": {"user": [changed, user], "towers.item": item},
            "unknown": {"usr": user, "towers.item": item},
            "fewer": {"towers.item": item},
            "copies": {"user": user.clone(), "towers.item": (item.clone(), None)},
        }[how]

    model = se.shard(seeded(Towers), plan=ROWS, inputs=inputs, **QUIET)
    user, item, _ = batches(1)[0]
    torch.testing.assert_close(model(user, item), seeded(Towers)(user, item), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("how", "error", "said"),
    [
        ("other ids", StepError, "user was called with other ids than inputs= announced"),
        ("other order", StepError, "a list where it is called several times, in that order"),
        ("unknown", se.ShardEmbedError, r"rank 0: inputs= names 'usr'.*they are \['towers.item', 'user'\]"),
    ],
)
def test_inputs_that_do_not_match_the_calls_are_an_error(how: str, error: type[Exception], said: str) -> None:
    for outcome in run_ranks(2, wrong_inputs, how, expect_errors=True):
        with pytest.raises(error, match=said):
            raise outcome.error


@pytest.mark.parametrize("how", ["fewer", "copies"])
def test_inputs_may_leave_modules_out_and_copy_tensors(how: str) -> None:
    run_ranks(2, wrong_inputs, how)


class Tied(Towers):
    """An output layer that shares its weight with the users' table."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(COLUMNS, USERS, bias=False, dtype=F64)
        self.out.weight = self.user.weight


class Scaled(nn.Embedding):
    """A subclass with a forward of its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def scaled() -> nn.Module:
    model = Towers()
    model.user = Scaled(USERS, COLUMNS, dtype=F64)
    return model


def hooked() -> nn.Module:
    model = Towers()
    model.user.register_forward_hook(lambda module, args, output: 2 * output)
    return model


def parametrised() -> nn.Module:
    model = Towers()
    nn.utils.parametrizations.weight_norm(model.user)
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], type[Exception], str]] = {
    "tied to a layer": (Tied, {}, ConfigError, r"user: its weight is also 'out.weight'.*skip=\['user'\]"),
    "own forward": (scaled, {}, ConfigError, r"user is a Scaled.*skip=\['user'\]"),
    "hooks": (hooked, {}, ConfigError, r"user has hooks.*after shard"),
    "parametrised": (parametrised, {}, ConfigError, r"user is a ParametrizedEmbedding.*skip=\['user'\]"),
    "no table": (lambda: nn.Linear(2, 2), {}, ConfigError, "no nn.Embedding, nn.EmbeddingBag or TorchRec collection"),
    "itself a table": (lambda: nn.Embedding(3, 2), {}, ConfigError, "itself a table"),
    "all skipped": (Towers, {"skip": ["user", "towers.*"]}, ConfigError, "no nn.Embedding, nn.EmbeddingBag or TorchRec collection"),
    "unknown in plan": (Towers, {"plan": {"usr": se.row_wise()}}, PlanError, r"\['usr'\].*\['towers.item', 'user'\]"),
    "unknown skip": (Towers, {"skip": ["usr"]}, ConfigError, r"skip=.*'usr'.*\['user', 'towers.item'\]"),
    "too many ranks": (Towers, {"plan": {"user": se.table_wise(7)}}, PlanError, "'user' has a shard on rank 7, but the job has 1"),
    "wrong optimizer": (Towers, {"optimizer": {"user*": se.optim.SGD()}}, ConfigError, "'towers.item': no optimizer is given"),
    "torch's optimizer": (Towers, {"optimizer": torch.optim.SGD}, ConfigError, r"'user': the optimizer must be one of se.optim"),
    "optimizer for nobody": (Towers, {"optimizer": {"x": None, "*": None}}, ConfigError, r"'x', which matches no table.*'user'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_sharded_is_refused_with_its_path_and_the_way_out(what: str) -> None:
    build, settings, error, said = REFUSED[what]
    model = build()
    before = {path: id(module) for path, module in model.named_modules()}
    with pytest.raises(error, match=said):
        se.shard(model, **{**QUIET, **settings})
    assert {path: id(module) for path, module in model.named_modules()} == before, "a refused model is changed"


def test_skip_leaves_tables_as_they_are() -> None:
    tied = Tied()
    se.shard(tied, skip=["user"], **QUIET)
    assert tied.user.weight is tied.out.weight
    assert isinstance(tied.towers["item"], se.EmbeddingBag)


def test_sharding_twice_is_refused() -> None:
    model = se.shard(Towers(), **QUIET)
    with pytest.raises(ConfigError, match="user is sharded already; shard a model once, before wrapping it"):
        se.shard(model, **QUIET)
    with pytest.raises(ConfigError, match="the model has no sharded table"):
        se.unshard(Towers())


def test_a_sharded_model_is_not_copied_or_pickled() -> None:
    model = se.shard(Towers(), **QUIET)
    with pytest.raises(PickleError, match=r"\['user'\] lie cut over the ranks.*before shard\(\)"):
        copy.deepcopy(model)


def test_the_weight_of_a_sharded_table_is_described_and_not_computed_with() -> None:
    weight = se.shard(Towers(), **QUIET).user.weight
    assert (tuple(weight.shape), weight.dtype, weight.device) == ((USERS, COLUMNS), F64, torch.device("cpu"))
    with pytest.raises(UnsupportedError, match=r"'user' lies cut.*rows\(table, ids\).*se.unshard\(\)"):
        nn.init.normal_(weight)
    with pytest.raises(UnsupportedError, match=r"'user' was to become 'weight' of a Linear.*skip=\['user'\]"):
        nn.Linear(COLUMNS, USERS).weight = weight


def test_the_optimizer_and_plan_of_each_table_are_chosen_by_name_and_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    model = Towers()
    model.user.weight.requires_grad = False
    model.towers["tag"] = nn.EmbeddingBag(5, 2)
    optimizer = {"towers.item": se.optim.Adam(lr=0.25), "towers.*": se.optim.Adagrad(), "*": se.optim.SGD(lr=0.5)}
    se.shard(model, optimizer=optimizer, plan={"user": se.table_wise(0)})
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "shardembed: 3 table(s) over 1 rank(s)",
        "  user         23 x 4 float64, table_wise, frozen",
        "  towers.item  17 x 6 float64, table_wise, Adam(lr=0.25, eps=1e-08, betas=(0.9, 0.999))",
        "  towers.tag   5 x 2 float32, table_wise, Adagrad(lr=0.01, eps=1e-10)",
        "  each module makes its own calls; inputs= lets all tables share one",
    ]


def frozen(rank: int, world_size: int) -> None:
    model = seeded(Towers)
    model.user.weight.requires_grad = False
    before = weights_of(model)
    se.shard(model, plan=ROWS, **QUIET)
    optimizer = se.Optimizer(model)
    user, item, _ = batches(1)[0]
    assert not model.user(user).requires_grad, "the output of a frozen table requires grad"
    model(user, item).sum().backward()
    optimizer.step()
    se.unshard(model)
    assert not model.user.weight.requires_grad, "it is frozen no more"
    assert torch.equal(model.user.weight, before["user.weight"]), "a frozen table moved"
    assert not torch.equal(model.towers["item"].weight, before["towers.item.weight"]), "the other table did not learn"


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_weight_that_requires_no_grad_is_frozen(world_size: int) -> None:
    run_ranks(world_size, frozen)


# Prints, in MiB, the peak above the plain model while it is sharded, and what is left above it afterwards.
MEMORY = """
import re, torch, shardembed as se
from torch import nn
from shardembed.kernels import grouping
grouping.missing()  # loads the compiled kernels, which take memory of their own
model = nn.ModuleList(nn.Embedding(2**19, 16) for _ in range(4))  # 32 MiB each
# Not ru_maxrss: a process inherits that from the one that started it.
mib = lambda field: int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 2**10
peak, now = mib("VmHWM"), mib("VmRSS")
se.shard(model, optimizer=se.optim.SGD(), verbose=False)
print(mib("VmHWM") - peak, mib("VmRSS") - now)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_sharding_takes_no_more_memory_than_it_says() -> None:
    """One table's shards and one piece beside the plain tables (32 + 32 MiB here), which are let go one by one; rows that nobody
    has written take no memory.
    """
    ran = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    peak, left = map(float, ran.stdout.split())
    assert 32 < peak < 32 + 32 + 48, f"{peak:.0f} MiB"
    assert left < 48, f"{left:.0f} MiB: plain tables are still there"
