"""How many collectives run: what docs/collectives.md promises, against what is counted inside torch.distributed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import shardembed as se
from shardembed.tables.pooling import POOLINGS
from tests.harness import run_ranks

Calls = dict[str, int]
PHASES = ("forward", "backward", "step")
NAMES = {"alltoall_base_": "all-to-all", "allreduce_": "all-reduce"}
SMALL = [
    se.TableConfig("a", 40, 4, dtype=torch.float64),
    se.TableConfig("b", 30, 6, feature_names=["b", "b list"], pooling={"b": "mean", "b list": None}),
]
ROWS, COLUMNS, COPIES = se.row_wise(), se.column_wise(), se.replicated()


class Counted(TorchDispatchMode):
    """Counts every operator of torch.distributed's process groups, whoever calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            self.calls[NAMES.get(name, name)] += 1
        return func(*args, **(kwargs or {}))


def ids_for(emb: se.EmbeddingCollection, rank: int) -> dict[str, torch.Tensor]:
    rows = {feature.name: emb.tables[feature.table].num_embeddings for feature in emb.features}
    return {name: torch.randint(0, count, (3 + rank, 4)) for name, count in rows.items()}


def count(
    rank: int, build: Callable[[], Any], *, clip: bool = False, scale: bool = False, sync: bool = False, **settings: Any
) -> dict[str, Calls]:
    """What one whole step calls, by phase; the tally of the library must say the same."""
    emb = build()
    shards = list(emb.parameters())  # there are some with optimizer=None
    optimizer: torch.optim.Optimizer = torch.optim.SGD(shards, lr=0.1) if shards else se.Optimizer(emb, **settings)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, enabled=scale)
    tally, found = emb.journey.comm.tally, {}

    def forward() -> torch.Tensor:
        batches = [ids_for(emb, rank)] * 2
        batch = next(iter(se.synced(batches))) if sync else batches[0]
        return torch.stack([output.double().sum() for output in emb(batch).values()]).sum()

    def step() -> None:
        scaler.unscale_(optimizer)
        if clip:
            se.clip_grad_norm_(emb, 1.0)
        scaler.step(optimizer)
        scaler.update()

    loss: list[torch.Tensor] = []
    phases: list[Callable[[], object]] = [
        lambda: loss.append(forward()),
        lambda: scaler.scale(loss[0]).backward(),
        step,
    ]
    for phase, run in zip(PHASES, phases, strict=True):
        tally.clear()
        with Counted() as counted:
            run()
        found[phase] = dict(counted.calls)
        assert tallied(tally) == found[phase], f"{phase}: the tally says {tallied(tally)}, torch.distributed {found[phase]}"
    return found


def tallied(tally: Any) -> Calls:
    return {name.replace("_", "-"): calls for name, calls in tally.operations().items()}


def count_call(rank: int, call: Callable[[se.EmbeddingCollection], object]) -> dict[str, Calls]:
    """What one call outside training makes."""
    emb = collection(ROWS)
    emb.journey.comm.tally.clear()
    with Counted() as counted:
        call(emb)
    assert tallied(emb.journey.comm.tally) == dict(counted.calls), "the tally is not honest"
    return {"forward": dict(counted.calls), "backward": {}, "step": {}}


def count_ahead(rank: int) -> dict[str, Calls]:
    """What a batch costs of a loop that is left after two, when a third has been sent; the dispatch mode does not see threads."""
    emb = collection(ROWS)
    optimizer, comm = se.Optimizer(emb), emb.journey.comm
    list(se.prefetched([], emb))  # makes the groups
    main, beside = comm.tallies[:2]
    for tally in (main, beside):
        tally.clear()
    batches = [ids_for(emb, rank)] * 3
    for number, ticket in enumerate(se.prefetched(batches, emb)):
        torch.stack([output.double().sum() for output in emb(ticket).values()]).sum().backward()
        optimizer.step()
        if number == 1:
            break
    assert set(tallied(main)) == set(tallied(beside)) == {"all-to-all"}, "there are other calls"
    ahead, later = tallied(beside)["all-to-all"], main.calls["all_to_all", "forward: send back"]
    backward = tallied(main)["all-to-all"] - later
    assert (ahead % 3, later % 2, backward % 2) == (0, 0, 0), "batches differ"
    return {"forward": {"all-to-all": ahead // 3 + later // 2}, "backward": {"all-to-all": backward // 2}, "step": {}}


ADAGRAD = se.optim.Adagrad()


def collection(plan: Any, optimizer: Any = ADAGRAD, **settings: Any) -> se.EmbeddingCollection:
    return se.EmbeddingCollection(SMALL, plan=plan, optimizer=optimizer, **settings)


def beside(rows: int) -> se.EmbeddingCollection:
    """A cut table and a copied one of some 300 KB, of whose `rows` the batch touches 12 and more."""
    tables = [SMALL[0], se.TableConfig("b", rows, 300_000 // (4 * rows))]
    return se.EmbeddingCollection(tables, plan=MIXED, optimizer=ADAGRAD)


def of_one_dtype(optimizer: Any) -> se.EmbeddingCollection:
    return se.EmbeddingCollection(SMALL[1:], plan=ROWS, optimizer=optimizer)


def renormalised() -> se.EmbeddingCollection:
    tables = [se.TableConfig(f"t{i}", 20, 4 + i, max_norm=1.0) for i in range(3)]
    return se.EmbeddingCollection(tables, plan=COLUMNS, optimizer=ADAGRAD)


def everything(rank: int) -> dict[str, Calls]:
    optimizer = {"a": se.optim.RowwiseAdagrad(), "b": se.optim.SGD()}
    return count(rank, lambda: collection({"a": COLUMNS, "b": COPIES}, optimizer), clip=True, sync=True, on_nonfinite="skip")


ROWWISE = " or ".join(f"`{name}`" for name, kind in se.optim.NAMES.items() if kind.rowwise)
MIXED = {"a": ROWS, "b": COPIES}
# A line of the table -> how to see it on one rank of several.
OPTIONS: dict[str, Callable[[int], dict[str, Calls]]] = {
    "one rank, whatever is used": everything,
    "cut tables: any number, cut in any ways": lambda rank: count(rank, many_tables),
    "only replicated tables": lambda rank: count(rank, lambda: collection(COPIES)),
    "+ replicated tables beside cut ones": lambda rank: count(rank, lambda: collection(MIXED)),
    "+ replicated tables beside cut ones, large, and few of their rows touched": lambda rank: count(rank, lambda: beside(3000)),
    "+ replicated tables beside cut ones, large, and most of their rows touched": lambda rank: count(rank, lambda: beside(12)),
    f"+ {ROWWISE} on tables whose columns are cut": lambda rank: count(
        rank, lambda: collection(COLUMNS, se.optim.RowwiseAdagrad())
    ),
    "+ `max_norm` on tables whose columns are cut": lambda rank: count(rank, renormalised),
    "+ `clip_grad_norm_`": lambda rank: count(rank, lambda: collection(ROWS), clip=True),
    "+ `Optimizer(on_nonfinite=...)`": lambda rank: count(rank, lambda: collection(ROWS), on_nonfinite="raise"),
    "+ `torch.amp.GradScaler`": lambda rank: count(rank, lambda: collection(ROWS), scale=True),
    "+ `synced(loader)`": lambda rank: count(rank, lambda: collection(ROWS), sync=True),
    "+ `prefetched(loader, model)`": lambda rank: count_ahead(rank),
    '+ `update="backward"`': lambda rank: count(rank, lambda: collection(ROWS, update="backward")),
    "+ `deterministic=True`": lambda rank: count(rank, lambda: collection(ROWS, deterministic=True)),
    "+ `deterministic=True` and replicated tables": lambda rank: count(rank, lambda: collection(MIXED, deterministic=True)),
    "+ `optimizer=None`": lambda rank: count(rank, lambda: collection(ROWS, None)),
    "+ `optimizer=None` and replicated tables": lambda rank: count(rank, lambda: collection(MIXED, None)),
    "+ `optimizer=None` and `torch.amp.GradScaler`": lambda rank: count(rank, lambda: of_one_dtype(None), scale=True),
    "`rows(table, ids)`": lambda rank: count_call(rank, lambda emb: emb.rows("a", torch.arange(5))),
    "`topk(queries, k, table)`": lambda rank: count_call(rank, lambda emb: emb.topk(torch.rand(2 + rank, 6), 3, "b")),
}


def many_tables() -> se.EmbeddingCollection:
    """20 tables that share as little as they can: width, dtype, plan, packing, pooling and optimizer all differ."""
    last = se.Comm.of().world_size - 1
    cuts = [
        ROWS,
        se.row_wise(strided=False, packing="bag"),
        se.row_wise(bounds=[5] * last),
        COLUMNS,
        se.table_wise(last),
        se.grid(2),
    ]
    optimizers = [se.optim.SGD(), se.optim.Adagrad(), se.optim.Adam(), se.optim.FTRL()]
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
    poolings = list(POOLINGS)
    tables = [
        se.TableConfig(f"t{i}", 20 + i, 3 + i % 4, dtype=dtypes[i % 4], pooling=poolings[i % len(poolings)]) for i in range(20)
    ]
    plan = {table.name: cuts[i % len(cuts)] for i, table in enumerate(tables)}
    chosen = {table.name: optimizers[i % 3] for i, table in enumerate(tables)}
    chosen["t0"] = se.optim.RowwiseAdagrad()  # whole rows, so nothing to exchange
    return se.EmbeddingCollection(tables, plan=plan, optimizer=chosen)


def in_rank(rank: int, world_size: int, option: str) -> dict[str, Calls]:
    return OPTIONS[option](rank)


def documented() -> dict[str, dict[str, Calls]]:
    """The table of docs/collectives.md, with what a plus adds put on top of cut tables."""
    text = (Path(__file__).parents[3] / "docs" / "collectives.md").read_text()
    lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert lines[0] == ["option", *PHASES]
    table = {line[0]: dict(zip(PHASES, map(read_cell, line[1:]), strict=True)) for line in lines[2:]}
    base = table["cut tables: any number, cut in any ways"]
    for option, calls in table.items():
        if option.startswith("+"):
            table[option] = {phase: dict(Counter(base[phase]) + Counter(calls[phase])) for phase in PHASES}
    return table


def read_cell(cell: str) -> Calls:
    calls = [part.split(" ") for part in cell.split(", ") if part]
    assert all(re.fullmatch(r"\d+ (all-to-all|all-reduce)", " ".join(part)) for part in calls), f"cannot read {cell!r}"
    return {name: int(number) for number, name in calls}


def test_the_table_and_this_file_name_the_same_options() -> None:
    assert list(documented()) == list(OPTIONS)


@pytest.mark.parametrize("option", OPTIONS)
def test_as_many_collectives_run_as_documented(option: str) -> None:
    for world_size in [1] if option.startswith("one rank") else [2, 3]:
        assert run_ranks(world_size, in_rank, option) == [documented()[option]] * world_size


def count_everything(rank: int, world_size: int) -> dict[str, Calls]:
    return everything(rank)


def test_options_add_up() -> None:
    wanted = {
        "forward": {"all-reduce": 1, "all-to-all": 3},
        "backward": {"all-to-all": 1},
        "step": {"all-to-all": 1, "all-reduce": 3},  # copies, clipping, finiteness
    }
    assert run_ranks(2, count_everything) == [wanted] * 2
