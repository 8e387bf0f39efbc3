"""Loading into other models: what differs is listed, or handled as asked; and models of every make are saved and loaded."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import shardembed as se
from shardembed.checkpoint.codec import encode
from shardembed.checkpoint.format.blocks import hash_of
from shardembed.errors import CheckpointError
from tests.harness import run_ranks
from tests.unit.checkpoint.altered import limits, signed_again

ROWS = 12


class Towers(nn.Module):
    """Two plain embeddings and a head, to be sharded."""

    def __init__(
        self, users: int = ROWS, width: int = 4, head: int = 1, dtype: torch.dtype = torch.float64, third: bool = False
    ) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.user = nn.Embedding(users, width, dtype=dtype)
        self.item = nn.EmbeddingBag(8, width, mode="sum", dtype=dtype)
        if third:
            self.city = nn.Embedding(5, width, dtype=dtype)
        self.head = nn.Linear(width, head, dtype=dtype)

    def forward(self, users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        vectors = self.user(users) + self.item(items)
        if hasattr(self, "city"):
            vectors = vectors + self.city(users % 5)
        return self.head(vectors).square().mean()


Made = tuple[nn.Module, se.Optimizer]


def made(optimizer: Any = None, plan: Any = "auto", dense: type[torch.optim.Optimizer] = torch.optim.AdamW, **shape: Any) -> Made:
    model = se.shard(Towers(**shape), optimizer=optimizer or se.optim.Adam(lr=0.1), plan=plan)
    return model, se.Optimizer(model, dense(model.parameters(), lr=0.01))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> float:
    rng = np.random.default_rng(number)
    users, items = torch.from_numpy(rng.integers(ROWS, size=4)), torch.from_numpy(rng.integers(8, size=(4, 2)))
    loss = model(users, items)  # the same batch on every rank, so that dense gradients agree without DDP
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def saved(rank: int, world_size: int, folder: str) -> dict[str, torch.Tensor]:
    model, optimizer = made(plan={"user": se.row_wise(), "item": se.column_wise()})
    for number in range(3):
        step(model, optimizer, number)
    se.save_checkpoint(folder, model, optimizer=optimizer)
    return weights(model)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Rows of every table, and dense parameters."""
    found = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name in ("user", "item", "city"):
        module = getattr(model, name, None)
        if module is not None:
            table = module.tables[0]
            found[name] = module.rows(table.name, torch.arange(table.num_embeddings))
    return found


def message_of(work: Callable[[], Any]) -> str:
    try:
        work()
    except CheckpointError as error:
        return str(error)
    raise AssertionError("no CheckpointError")


# What differs


def load_others(rank: int, world_size: int, folder: str) -> dict[str, str]:
    def load(made: Made, **more: Any) -> Callable[[], Any]:
        return lambda: se.load_checkpoint(folder, made[0], optimizer=made[1], **more)

    fits = made()
    before = weights(fits[0])
    model, optimizer = fits
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    found = {
        "rows": message_of(load(made(users=20))),
        "dtype": message_of(load(made(dtype=torch.float32))),
        "optimizer": message_of(load(made(se.optim.RowwiseAdagrad(lr=0.1)))),
        "dense": message_of(load(made(dense=torch.optim.SGD))),
        "third": message_of(load(made(third=True))),
        "none": message_of(lambda: se.load_checkpoint(folder, model)),
        "schedule": message_of(lambda: se.load_checkpoint(folder, model, optimizer=optimizer, scheduler=scheduler)),
        "misspelt": message_of(load(fits, rename={"usr": "user"})),
        "new": message_of(load(fits, new=["user"])),
        "twice": message_of(load(fits, rename={"user": "item"})),
        "step": message_of(load(fits, step=2)),
        "nowhere": message_of(lambda: se.load_checkpoint(folder + "/nowhere", model, optimizer=optimizer)),
    }
    for key, value in weights(fits[0]).items():
        assert torch.equal(value, before[key]), f"{key} was changed by a load that failed"
    return found


def test_every_difference_is_listed_and_nothing_is_changed(tmp_path: Path) -> None:
    run_ranks(2, saved, str(tmp_path))
    answers = run_ranks(2, load_others, str(tmp_path))
    assert answers[0] == answers[1]
    found = answers[0]
    assert found["rows"].splitlines()[0].endswith("step-0000000003: this is a checkpoint of another model; they differ in")
    assert "'user.weight' is [20, 4] in the model and [12, 4] in the checkpoint (grown=[...] loads the first rows" in found["rows"]
    assert "'user.weight.exp_avg' is [20, 4] in the model and [12, 4]" in found["rows"]
    assert "'head.weight' is float32 in the model and float64 in the checkpoint" in found["dtype"]
    assert "table 'user.weight' has the optimizer RowwiseAdagrad, in the checkpoint Adam" in found["optimizer"]
    assert "'user.weight.exp_avg' [12, 4] float64 is not in the model" in found["optimizer"]
    assert "the dense optimizer is SGD, the checkpoint's was AdamW" in found["dense"]
    assert "'city.weight' [5, 4] float64 is not in the checkpoint (new=[...] keeps the model's values)" in found["third"]
    assert "the checkpoint has the state of a AdamW over dense parameters; pass optimizer=" in found["none"]
    assert "scheduler was passed, and the checkpoint has no state of it" in found["schedule"]
    assert "rename: 'usr' names nothing in the checkpoint; did you mean 'user'?" in found["misspelt"]
    assert "'user.weight' was said to be new, and is in the checkpoint" in found["new"]
    assert "would both become 'item.weight'" in found["twice"]
    assert "no checkpoint of step 2; there are those of steps 3" in found["step"]
    assert "nowhere: there is no such folder" in found["nowhere"]


# As asked


def load_changed(rank: int, world_size: int, folder: str) -> Any:
    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.member = nn.Embedding(ROWS + 5, 4, dtype=torch.float64)
            self.item = nn.EmbeddingBag(8, 4, mode="sum", dtype=torch.float64)
            self.city = nn.Embedding(5, 4, dtype=torch.float64)
            self.out = nn.Linear(4, 1, dtype=torch.float64)

    model = se.shard(Renamed(), optimizer=se.optim.Adam(lr=7.0), plan={"member": se.row_wise(), "city": se.replicated()})
    optimizer = se.Optimizer(model, torch.optim.AdamW(model.parameters(), lr=9.0))
    start = model.member.rows("member", torch.arange(ROWS + 5)), model.city.rows("city", torch.arange(5))
    restored = se.load_checkpoint(
        folder, model, optimizer=optimizer, rename={"user": "member", "head": "out"}, grown=["member"], new=["city"]
    )
    member, city = model.member.rows("member", torch.arange(ROWS + 5)), model.city.rows("city", torch.arange(5))
    assert torch.equal(city, start[1])
    assert torch.equal(member[ROWS:], start[0][ROWS:])
    for local in model.member.local_shards():
        later = [number for number, row in enumerate(local.shard.rows) if row >= ROWS]
        assert not local.state["exp_avg"][later].any()
    rates = [group["lr"] for group in optimizer.param_groups]
    state = optimizer.state[model.out.weight]["exp_avg"]
    return (
        restored.step,
        member[:ROWS],
        model.item.rows("item", torch.arange(8)),
        model.out.weight.detach(),
        rates,
        state.abs().sum(),
    )


@pytest.mark.parametrize("ranks", [1, 3])
def test_tables_that_grew_were_renamed_or_are_new_are_handled_as_asked(tmp_path: Path, ranks: int) -> None:
    before = run_ranks(2, saved, str(tmp_path))[0]
    for number, user, item, head, rates, state in run_ranks(ranks, load_changed, str(tmp_path)):
        assert number == 3
        assert torch.equal(user, before["user"])
        assert torch.equal(item, before["item"])
        assert torch.equal(head, before["head.weight"])
        assert rates == [0.01, 0.1]
        assert state > 0


def load_a_part(rank: int, world_size: int, folder: str) -> Any:
    model = se.shard(nn.ModuleDict({"user": nn.Embedding(ROWS, 4, dtype=torch.float64)}), optimizer=se.optim.Adam(lr=0.1))
    optimizer = se.Optimizer(model)
    message = message_of(lambda: se.load_checkpoint(folder, model, optimizer=optimizer, dropped=["item", "head"]))
    restored = se.load_checkpoint(folder, model, dropped=["item", "head"], weights_only=True)
    assert restored.random is None
    assert model["user"].journey.steps == 0
    assert not next(iter(model["user"].local_shards())).state["exp_avg"].any()
    return message, model["user"].rows("user", torch.arange(ROWS))


def test_weights_alone_and_a_part_of_them_are_loaded_as_asked(tmp_path: Path) -> None:
    before = run_ranks(2, saved, str(tmp_path))[0]
    for message, user in run_ranks(2, load_a_part, str(tmp_path)):
        assert "the checkpoint has the state of a AdamW" in message
        assert torch.equal(user, before["user"])


# Other makes of models


def own_optimizer(rank: int, world_size: int, folder: str, kind: str, save: bool) -> Any:
    """Tables as Parameters, under a torch optimizer."""
    sparse = kind == "SparseAdam"
    plan = {"user": se.row_wise(strided=save), "item": se.column_wise() if save else se.replicated()}
    towers = Towers()
    towers.user.sparse = towers.item.sparse = sparse
    model = se.shard(towers, optimizer=None, plan=plan)
    tables = list(se.ignored(model))
    dense = [parameter for parameter in model.parameters() if parameter not in set(tables)]
    order = sorted(tables, key=lambda parameter: (parameter.shard.table, parameter.shard.shard.columns.start))
    made = torch.optim.SparseAdam(order, lr=0.1) if sparse else torch.optim.Adagrad([*order, *dense], lr=0.1)
    if save:
        for number in range(3):
            step(model, made, number)
        se.save_checkpoint(folder, model, optimizer=made, step=3)
    else:
        se.load_checkpoint(folder, model, optimizer=made)
    return weights(model)["user"], [step(model, made, number) for number in range(3, 6)]


@pytest.mark.parametrize("kind", ["Adagrad", "SparseAdam"])
def test_state_of_a_torch_optimizer_over_exposed_shards_is_cut_anew(tmp_path: Path, kind: str) -> None:
    before = run_ranks(2, own_optimizer, str(tmp_path), kind, True)
    for ranks in (1, 2, 3):
        for user, losses in run_ranks(ranks, own_optimizer, str(tmp_path), kind, False):
            assert torch.equal(user, before[0][0])
            assert losses == pytest.approx(before[0][1], rel=1e-12)


def fully_sharded(rank: int, world_size: int, folder: str, save: bool) -> Any:
    torch.manual_seed(3)
    towers = Towers(head=5)
    model = se.shard(towers, optimizer=se.optim.SGD(lr=0.1))
    if world_size > 1:
        fully_shard(model, ignored_params=se.ignored(model))
    optimizer = se.Optimizer(model, torch.optim.Adam(model.parameters(), lr=0.01))
    if save:
        for number in range(3):
            step(model, optimizer, number)
        se.save_checkpoint(folder, model, optimizer=optimizer)
    else:
        se.load_checkpoint(folder, model, optimizer=optimizer)
    head = model.head.weight.detach()
    average = optimizer.state[model.head.weight]["exp_avg"]
    whole = [part.full_tensor() if isinstance(part, DTensor) else part.clone() for part in (head, average)]
    return whole, [step(model, optimizer, number) for number in range(3, 6)]


def test_parameters_that_fsdp_has_cut_are_saved_as_they_are_cut(tmp_path: Path) -> None:
    before = run_ranks(2, fully_sharded, str(tmp_path), True)
    for ranks in (1, 2, 3):
        for (head, average), losses in run_ranks(ranks, fully_sharded, str(tmp_path), False):
            assert torch.equal(head, before[0][0][0])
            assert torch.equal(average, before[0][0][1])
            assert losses == pytest.approx(before[0][1], rel=1e-12)


class Oddities(nn.Module):
    """Tied weights, a parameter that is not contiguous, an empty one, a buffer that is not saved, extra state."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.one = nn.Linear(3, 3, bias=False)
        self.two = nn.Linear(3, 3, bias=False)
        self.two.weight = self.one.weight
        self.turned = nn.Parameter(torch.full((4, 3), start).t())
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.register_buffer("kept", torch.full((2,), start))
        self.register_buffer("scratch", torch.full((2,), start), persistent=False)
        self.extra: Any = {"start": start}
        nn.init.constant_(self.one.weight, start)

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def oddly(rank: int, world_size: int, folder: str, save: bool) -> Any:
    model = Oddities(1.0 if save else 2.0)
    if save:
        with torch.no_grad():
            model.turned.copy_(torch.arange(12.0).view(3, 4))
        se.save_checkpoint(folder, model, step=1)
    else:
        restored = se.load_checkpoint(folder, model)
        assert restored.step == 1
    return model.state_dict(), model.scratch, model.turned.stride()


def test_a_model_without_tables_and_with_oddities_is_saved_too(tmp_path: Path) -> None:
    (before, _, stride), _ = run_ranks(2, oddly, str(tmp_path), True)
    for after, scratch, stride_after in run_ranks(3, oddly, str(tmp_path), False):
        assert before.keys() == after.keys()
        for key, value in before.items():
            assert torch.equal(value, after[key]) if isinstance(value, torch.Tensor) else value == after[key], key
        assert scratch.tolist() == [2.0, 2.0]
        assert stride == stride_after


def test_a_step_must_be_named_where_nothing_counts(tmp_path: Path) -> None:
    assert "pass step=" in message_of(lambda: se.save_checkpoint(tmp_path, Oddities(1.0)))


# Damage


def load_damaged(rank: int, world_size: int, folder: str) -> list[str]:
    model, optimizer = made()
    return [message_of(lambda: se.load_checkpoint(folder, model, optimizer=optimizer))]


@pytest.mark.parametrize("how", ["altered", "cut short", "gone", "manifest", "state"])
def test_damage_is_named_by_every_rank(tmp_path: Path, how: str) -> None:
    run_ranks(2, saved, str(tmp_path))
    folder = tmp_path / "step-0000000003"
    file = folder / {"manifest": "manifest.json", "state": "state.json"}.get(how, "rank-00001.safetensors")
    data = bytearray(file.read_bytes())
    if how == "gone":
        file.unlink()
    elif how == "cut short":
        file.write_bytes(data[:-8])
    else:
        data[-100] ^= 1
        file.write_bytes(data)
    answers = run_ranks(2, load_damaged, str(tmp_path))
    assert answers[0] == answers[1]
    message = answers[0][0]
    assert str(file) in message, message
    said = {"altered": "are damaged", "cut short": "is cut short", "gone": "is missing", "manifest": "manifest", "state": "state"}
    assert said[how] in message
    assert "load an older checkpoint" in message or "not valid JSON" in message
    if how == "altered":
        assert "of 'user.weight" in message or "of 'item.weight" in message or "of 'head" in message


# Forged


def forged(folder: Path, how: str) -> None:
    """Alter what a checkpoint says of the state of `head.weight` or of random generators, and sign it again."""
    data = json.loads((folder / "manifest.json").read_bytes())
    state = json.loads((folder / "state.json").read_bytes())
    key = "head.weight.exp_avg"
    if how in ("huge", "gone"):
        entry = data["entries"]["head.weight.factor"] = copy.deepcopy(data["entries"][key])  # state may have other shapes
        (chunk,) = entry["chunks"]
        rows = 1 << 30 if how == "huge" else 1000
        entry["shape"] = [rows]
        chunk.update(rows=[0, rows, 1], columns=[0, 1], bytes=8 * rows, rows_a_piece=1 << 20, offset=64)
        chunk.update(hashes=["0" * 32] * -(-rows // (1 << 20)), file="rank-00009.safetensors")
        data["files"]["rank-00009.safetensors"] = {"bytes": 64 + 8 * rows}
    elif how in ("short", "no dimension"):  # torch's fused AdamW would read past the end
        data["entries"].pop(key)
        state["scalars"].setdefault("head.weight", {})["exp_avg"] = encode(torch.zeros(2 if how == "short" else ()), "state")
    else:
        for saved in state["random"]:
            saved["numpy"]["state"]["pos"] = 2**30
    text = json.dumps(state).encode()
    (folder / "state.json").write_bytes(text)
    data["files"]["state.json"] = {"bytes": len(text)}
    data["state"].update(bytes=len(text), hashes=[hash_of(text)])
    (folder / "manifest.json").write_bytes(signed_again(data))


def load_forged(rank: int, world_size: int, folder: str) -> str:
    model, optimizer = made()
    before = weights(model)
    with limits(1 << 30):
        message = message_of(lambda: se.load_checkpoint(folder, model, optimizer=optimizer))
    for key, value in weights(model).items():
        assert torch.equal(value, before[key]), f"{key} was changed by a load that failed"
    return message


FORGED = {
    "huge": "the state of the dense optimizer takes 8,589,9.* bytes, which is no state of parameters of",
    "gone": r"rank-00009\.safetensors is missing",
    "short": r"optimizer state 'exp_avg' of 'head.weight' is \[2\] in the checkpoint, its parameter needs \[1, 4\]",
    "no dimension": r"optimizer state 'exp_avg' of 'head.weight' is \[\] in the checkpoint",
    "random": "the random state of numpy is malformed: pos must be a whole number from 0 to 624",
}


@pytest.mark.parametrize("ranks", [1, 2])
def test_forged_state_is_refused_before_it_takes_memory_or_changes_anything(tmp_path: Path, ranks: int) -> None:
    run_ranks(ranks, saved, str(tmp_path / "first"))
    for how, says in FORGED.items():
        shutil.copytree(tmp_path / "first", tmp_path / how)
        forged(tmp_path / how / "step-0000000003", how)
        answers = run_ranks(ranks, load_forged, str(tmp_path / how))
        assert len(set(answers)) == 1
        assert re.search(says, answers[0]), answers[0]
