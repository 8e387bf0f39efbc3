"""`profile` and `memory`: what they say of a model at work, against what is known of it otherwise."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import shardembed as se
from shardembed.comm.comm import Comm
from shardembed.comm.stages import STAGES
from shardembed.errors import ConfigError, StepError
from shardembed.observe import footprint
from shardembed.observe.timing import balance, summary
from shardembed.planner.communicators import communicator_bytes
from tests.harness import run_ranks

TABLES = [se.TableConfig("a", 40, 8), se.TableConfig("b", 30, 4, pooling=None), se.TableConfig("c", 10, 4)]
PLAN: dict[str, Any] = {"a": se.column_wise(), "b": se.row_wise(strided=False), "c": se.replicated()}


def build(plan: Any = PLAN, optimizer: Any = None, **settings: Any) -> se.EmbeddingCollection:
    return se.EmbeddingCollection(TABLES, plan=plan, optimizer=optimizer or se.optim.RowwiseAdagrad(lr=0.1), **settings)


def batch_of(rank: int) -> dict[str, torch.Tensor]:
    return {table.name: torch.arange(6).view(2, 3) + rank for table in TABLES}


def train(emb: se.EmbeddingCollection, loop: Any) -> None:
    optimizer = se.Optimizer(emb)
    for batch in loop:
        torch.stack([output.sum() for output in emb(batch).values()]).sum().backward()
        optimizer.step()


def profiled(rank: int, world_size: int, ahead: bool) -> tuple[dict[str, Any], str, dict[str, tuple[int, int]]]:
    """What is said of three steps, and what was counted: collectives and bytes of the main thread and beside it."""
    emb = build()
    loader = [batch_of(rank)] * 3
    train(emb, se.prefetched(loader[:1], emb) if ahead else [])  # makes the groups
    tallies = emb.journey.comm.tallies
    for tally in tallies:
        tally.clear()
    with se.profile(emb) as found:
        train(emb, se.prefetched(loader, emb) if ahead else loader)
        counted = {name: tally.totals() for name, tally in zip(("main", "beside"), tallies, strict=False)}
    return found.as_dict(), found.table(), counted


BOTH = {"read", "make route", "send ids", "max_norm", "lookup", "send back", "combine", "send grads", "accumulate", "step"}


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_stage_is_there_with_the_collectives_and_bytes_that_were_counted(world_size: int, ahead: bool) -> None:
    answers = run_ranks(world_size, profiled, ahead)
    for found, table, counted in answers:
        assert found == answers[0][0], "ranks disagree"
        stages = found["stages"]
        wanted = BOTH | {"reduce copies", "share row squares"} | ({"wait for ids"} if ahead else set())
        assert set(stages) == wanted
        assert list(stages) == [name for name in STAGES if name in stages]
        assert (found["steps"], found["world_size"]) == (3, world_size)
        early = {"read", "make route", "send ids"}
        assert {name for name, stage in stages.items() if stage["beside"]} == (early if ahead else set())
        for name, stage in stages.items():
            assert stage["calls"] == pytest.approx(4 / 3 if ahead and name in ("read", "send ids", "wait for ids") else 1)
            assert 0 <= stage["fastest"] <= stage["seconds"] <= stage["slowest"] <= found["seconds"] or stage["beside"]
            assert stage["waiting"] == 0 or stage["collectives"] > 0
            assert name in table
        collectives = sum(calls for calls, _ in counted.values())
        assert sum(stage["collectives"] for stage in stages.values()) == pytest.approx(collectives / 3)
        assert json.loads(json.dumps(found)) == found
        # Of "a", cut by columns, each rank reads the six ids of every rank; those of "b" all lie on rank 0; "c" is copied.
        assert [rank["rows"] for rank in found["ranks"]] == ([18] if world_size == 1 else [12 + 12 + 6, 12 + 6])
    for which, names in (("main", wanted - early if ahead else wanted), ("beside", early if ahead else set())):
        sent = sum(counted.get(which, (0, 0))[1] for _, _, counted in answers) / world_size
        assert sum(stages[name]["bytes"] for name in names) == pytest.approx(sent / 3)
    for rank, (_, _, counted) in enumerate(answers):
        assert found["ranks"][rank]["bytes"] == pytest.approx(sum(sent for _, sent in counted.values()) / 3)


def test_the_slowest_rank_and_the_waiting_of_the_others_are_named() -> None:
    def rank(seconds: float, latest: list[float]) -> dict[str, Any]:
        stage = {"calls": 4, "seconds": seconds, "bytes": 80, "collectives": 8, "beside": False, "latest": latest}
        return {"seconds": 10.0, "steps": 2, "rows": int(100 * seconds), "stages": {"send back": stage}}

    found = summary([rank(2.0, [0.25, 0.75]), rank(4.0, [9.0, 0.75, 0.25])])
    stage = found["stages"]["send back"]
    assert (stage["seconds"], stage["slowest"], stage["slowest_rank"], stage["fastest"]) == (1.5, 2.0, 1, 1.0)
    # To each of the last two calls another rank came last, so that one waited 0.5 s: half of it on average, two calls a step.
    assert stage["waiting"] == pytest.approx(0.5)
    assert (stage["bytes"], stage["collectives"], stage["calls"]) == (40, 4, 2)
    assert (found["seconds"], found["elsewhere"]) == (5.0, 3.5)
    assert found["ranks"] == [{"seconds": 5.0, "bytes": 40, "rows": 100}, {"seconds": 5.0, "bytes": 40, "rows": 200}]
    assert balance(found["ranks"]) == "rows read a step: 150 by a rank on average, most by rank 1 (200)"


def left(rank: int, world_size: int) -> list[str]:
    """What is said where a profile is asked for too early, ended in an error, or is one too many."""
    emb, said = build(), []

    def hear(call: Any) -> None:
        with pytest.raises((StepError, ConfigError)) as error:
            call()
        said.append(str(error.value))

    with se.profile(emb) as found:
        hear(found.table)
        hear(lambda: se.profile(emb).__enter__())
    with pytest.raises(LookupError), se.profile(emb) as failed:
        raise LookupError
    hear(failed.as_dict)
    hear(lambda: se.profile(nn.Linear(1, 1)).__enter__())
    with se.profile(emb) as evaluated:
        emb.rows("b", torch.arange(2))
    assert evaluated.as_dict()["steps"] == 1
    return said


def test_a_profile_that_is_not_there_is_not_made_up() -> None:
    for early, second, failed, nothing in run_ranks(2, left):
        assert early == failed == "the profile is not complete: its `with` block has not ended, or ended in an error"
        assert second == "the model is being profiled already; end that block first"
        assert nothing.startswith("the model has no sharded tables to look at")


def ranges(rank: int, world_size: int) -> set[str]:
    emb = build()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen, se.profile(emb):
        train(emb, [batch_of(rank)])
    return {event.key.removeprefix("shardembed: ") for event in seen.key_averages() if event.key.startswith("shardembed: ")}


def test_stages_are_ranges_of_torchs_profiler() -> None:
    assert run_ranks(1, ranges) == [BOTH | {"reduce copies", "share row squares"}]


# Memory.


class Model(nn.Module):
    def __init__(self, emb: nn.Module) -> None:
        super().__init__()
        self.emb, self.head = emb, nn.Linear(4, 2, bias=False)


def held(rank: int, world_size: int, plan: Any, optimizer: Any) -> tuple[dict[str, Any], str, int, int]:
    """What is said before a step; bytes of the shards and their state; bytes of the gradients that wait."""
    emb = build(plan, optimizer)
    model = Model(emb)
    model.head.weight.grad = torch.zeros(2, 4)
    torch.stack([output.sum() for output in emb(batch_of(rank)).values()]).sum().backward()
    found = se.memory(model, samples=2)
    tensors = [tensor for local in emb.local_shards() for tensor in (local.weights, *local.state.values())]
    waiting = [slab.waiting() for slab in emb.journey.slabs]
    grads = sum(one.grads_SW.nbytes for one in waiting if one is not None)
    return found.as_dict(), found.table(), sum(tensor.nbytes for tensor in tensors), grads


WHOLE = {"a": se.table_wise(0), "b": se.table_wise(0), "c": se.row_wise()}


@pytest.mark.parametrize("plan", [PLAN, WHOLE, se.row_wise(strided=False)], ids=["mixed", "whole", "rows"])
@pytest.mark.parametrize("optimizer", [se.optim.RowwiseAdagrad(), se.optim.Adam()], ids=lambda one: type(one).__name__)
def test_what_was_planned_of_weights_and_state_is_what_is_there(plan: Any, optimizer: Any) -> None:
    answers = run_ranks(2, held, plan, optimizer)
    for rank, (found, table, size, grads) in enumerate(answers):
        lines = found["categories"]
        for line in (lines["weights"], lines["optimizer state"], *found["tables"].values()):
            assert line["planned"] == line["actual"], line
            assert line["largest_planned"] == line["largest_actual"]
        assert lines["weights"]["actual"] + lines["optimizer state"]["actual"] == size
        assert sum(line["actual"] for line in found["tables"].values()) == size
        assert grads <= lines["waiting gradients"]["actual"] <= 4 * grads + 1000
        assert lines["exchange buffers"]["actual"] > 0
        assert (lines["dense parameters"]["actual"], lines["dense gradients"]["actual"]) == (32, 32)
        assert lines["process, at most"]["actual"] >= lines["process"]["actual"] > size
        sizes = [one[2] for one in answers]
        if sizes[0] != sizes[1]:
            assert lines["weights"]["largest_rank"] == sizes.index(max(sizes))
        assert (found["rank"], found["world_size"], found["samples"]) == (rank, 2, 2)
        assert "table a" in table
        assert json.loads(json.dumps(found)) == found


def said_of_communicators(rank: int, world_size: int) -> list[dict[str, Any]]:
    """What a CPU says of them, and then as if its tables lay on a GPU."""
    found = [se.memory(build()).as_dict()["categories"]]
    real = footprint.topology_of
    on_gpu = mock.patch.object(footprint, "topology_of", lambda *args: replace(real(*args), device="cuda"))
    taken = mock.patch.object(Comm, "communicator_bytes", 7 if rank == 0 else 9)
    with on_gpu, taken:
        found.append(se.memory(build()).as_dict()["categories"])
    return found


def test_communicators_are_told_where_there_are_any() -> None:
    for rank, (on_cpu, on_gpu) in enumerate(run_ranks(2, said_of_communicators)):
        assert "communicators" not in on_cpu
        planned = communicator_bytes(2, 2)
        assert on_gpu["communicators"] == {
            "planned": planned,
            "actual": (7, 9)[rank],
            "largest_planned": planned,
            "largest_actual": 9,
            "largest_rank": 1,
        }


def test_shards_of_a_torch_optimizer_are_no_dense_parameters() -> None:
    def exposed() -> dict[str, Any]:
        emb = se.EmbeddingCollection(TABLES, optimizer=None)
        return se.memory(Model(emb)).as_dict()["categories"]

    lines = exposed()
    assert lines["dense parameters"]["actual"] == 32
    assert lines["optimizer state"]["actual"] == lines["optimizer state"]["planned"] == 0
    with pytest.raises(ConfigError, match="the model has no sharded tables to look at"):
        se.memory(nn.Linear(1, 1))


def held_by_id(rank: int, world_size: int, rows: int | None) -> tuple[dict[str, Any], list[int], set[str]]:
    """What is said of a dynamic table, and in numbers: places of this rank, weights, state, what remembers ids."""
    settings = se.Dynamic(se.LFU() if rows else se.TTL(5), se.MinCount(1))
    emb = se.EmbeddingCollection(
        [se.TableConfig("item", rows, 4, dynamic=settings), se.TableConfig("plain", 8, 4)],
        optimizer=se.optim.Adam(),
        plan={"item": se.row_wise(), "plain": se.table_wise(0)},
    )
    optimizer = se.Optimizer(emb)
    with se.profile(emb) as seen:
        ids = {"item": torch.arange(3000).view(-1, 1) - 7, "plain": torch.zeros(3000, 1, dtype=torch.int64)}
        torch.stack([output.sum() for output in emb(ids).values()]).sum().backward()
        optimizer.step()
    (slab,) = (slab for slab in emb.journey.slabs if slab.dynamic is not None)
    assert slab.dynamic is not None
    assert slab.dynamic.candidates is not None
    places = slab.dynamic.census.places
    state = sum(tensor.nbytes for tensor in slab.state.values())
    known = slab.dynamic.census, slab.dynamic.candidates
    ids_bytes = sum(part.nbytes for one in known for part in (one.ids_S, one.lasts_S, one.counts_S))
    return se.memory(emb).as_dict(), [places, places * 16, state, ids_bytes], {*seen.as_dict()["stages"]}


@pytest.mark.parametrize("rows", [4096, None])
def test_memory_of_a_dynamic_table_is_counted_with_what_finds_its_ids(rows: int | None) -> None:
    for rank, (found, (places, weights, state, known), stages) in enumerate(run_ranks(2, held_by_id, rows)):
        lines, table = found["categories"], found["tables"]["item"]
        plain = 8 * 16 if rank == 0 else 0
        if rows:
            assert places == rows // 2
            assert lines["weights"]["planned"] == lines["weights"]["actual"]
        assert lines["weights"]["actual"] == weights + plain
        remembered = lines["optimizer state"]["actual"] - state - 2 * plain
        assert known < remembered < 4 * known
        assert table["actual"] == weights + state + remembered
        assert lines["rows of unknown ids"]["actual"] >= 0
        assert {"find ids", "commit ids"} <= stages
