"""Sharded tables against plain ones on the ranks of a job: every kind of cut, looked up and updated.

Weights and gradients are small whole numbers, which float32 adds without rounding, whatever the order: a cut that is right has
exactly the plain table's numbers, on any device and any number of ranks. With Adagrad, whose roots round, each number may differ
by 1e-6 of itself and 1e-6.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from shardembed.comm.comm import Comm
from shardembed.comm.job import default_device, ranks_per_node
from shardembed.modules import EmbeddingCollection
from shardembed.optim import SGD, Adagrad
from shardembed.optimizer import Optimizer
from shardembed.tables.placement import (
    PACKINGS,
    Placement,
    column_wise,
    grid,
    replicated,
    row_wise,
    table_row_wise,
    table_wise,
)
from shardembed.tables.pooling import POOLINGS, Pooling
from shardembed.tables.table_config import TableConfig

ROWS, COLUMNS, BAGS, IDS_A_BAG = 96, 8, 24, 4
BOUND = 1e-6
KINDS: dict[str, Pooling] = {"rows" if pooling is None else f"bags by {pooling}": pooling for pooling in POOLINGS}
EXACT = SGD(lr=0.5)
ROUNDED = Adagrad(lr=0.5)
WITH_ADAGRAD = "row_wise, unique"


@dataclass(frozen=True)
class Compared:
    """A kind of cut, and how its tables compare with plain ones.

    Attributes:
        cut: what was compared.
        bound: how far it may be off, in words.
        difference: what is off; empty where it is right.
    """

    cut: str
    bound: str
    difference: str


def compare(comm: Comm, device: torch.device | None = None) -> list[Compared]:
    """Compare every cut, all of them in one collection. Collective; rank 0 gets the answers of all ranks, the others an empty list.

    What raises on all ranks is told too. An error on one rank alone is raised on the others when the time limit has passed.
    """
    found = [_Cut(name, placement, EXACT) for name, placement in cuts(comm.world_size, ranks_per_node(comm.world_size)).items()]
    rounded = next((cut for cut in found if cut.name == WITH_ADAGRAD), found[0])
    found.append(_Cut(f"{rounded.name}, Adagrad", rounded.placement, ROUNDED))
    try:
        differences = _differences(comm, found, device or default_device())
    except Exception as error:
        differences = [f"{type(error).__name__}: {error}"] * len(found)
    answers = [Compared(cut.name, cut.bound, text) for cut, text in zip(found, differences, strict=True)]
    texts = comm.gather_texts("control", "doctor: tell what was found", json.dumps([asdict(each) for each in answers]), to=0)
    return _together([[Compared(**each) for each in json.loads(text)] for text in texts])


def cuts(world_size: int, a_node: int) -> Mapping[str, Placement]:
    """Each kind of cut under each way that ids travel."""
    every = range(world_size)
    strips = next(strips for strips in (2, 1) if world_size % strips == 0)
    kinds = {
        "table_wise": table_wise(world_size - 1),
        "row_wise": row_wise(),
        "row_wise, blocks": row_wise(strided=False),
        "column_wise": column_wise(list(every)[:COLUMNS]),
        "table_row_wise": table_row_wise((world_size - 1) // a_node),
        "grid": grid(strips, list(every)),
        "grid, blocks": grid(strips, list(every), strided=False),
    }
    found = {f"{name}, {packing}": replace(kind, packing=packing) for name, kind in kinds.items() for packing in PACKINGS}
    return {**found, "replicated": replicated()}


@dataclass(frozen=True)
class _Cut:
    """One cut, of a table for each pooling."""

    name: str
    placement: Placement
    optimizer: SGD | Adagrad

    @property
    def bound(self) -> str:
        return "exact" if self.optimizer is EXACT else f"within {BOUND:g}"

    def tables(self) -> list[TableConfig]:
        return [
            TableConfig(f"{self.name}, {kind}", ROWS, COLUMNS, [f"{self.name}, {kind}"], pooling, init=_weights)
            for kind, pooling in KINDS.items()
        ]


def _differences(comm: Comm, found: Sequence[_Cut], device: torch.device) -> list[str]:
    """What differs on this rank, by cut. All calls come first: a rank that sees a difference makes as many as the others."""
    tables = {table.name: cut for cut in found for table in cut.tables()}
    sharded = EmbeddingCollection(
        [table for cut in found for table in cut.tables()],
        optimizer={name: cut.optimizer for name, cut in tables.items()},
        plan={name: cut.placement for name, cut in tables.items()},
        gradient_reduction="sum",
        device=device,
    )
    batches = [_batch(rank) for rank in range(comm.world_size)]
    outputs = sharded({name: batches[comm.rank][KINDS[_kind(name)] is not None].to(device) for name in tables})
    torch.stack([(output * _factors(output)).sum() for output in outputs.values()]).sum().backward()
    Optimizer(sharded).step()
    updated = {name: sharded.rows(name, torch.arange(ROWS)).cpu() for name in tables}
    texts = dict.fromkeys((cut.name for cut in found), "")
    plain = {(kind, cut.optimizer): _plain(kind, cut.optimizer, batches, comm.rank) for cut in found for kind in KINDS}
    for name, cut in tables.items():
        looked_up, weights = plain[_kind(name), cut.optimizer]
        bound = 0.0 if cut.optimizer is EXACT else BOUND
        texts[cut.name] = (
            texts[cut.name]
            or _difference(f"lookup of {_kind(name)}", outputs[name].detach().cpu(), looked_up, 0.0)
            or _difference(f"{_kind(name)} after a step", updated[name], weights, bound)
        )
    return list(texts.values())


def _kind(table: str) -> str:
    return table.rpartition(", ")[2]


def _plain(
    kind: str, optimizer: SGD | Adagrad, batches: Sequence[Mapping[bool, torch.Tensor]], rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a plain table answers to this rank's batch, and its weights after a step on the batches of all ranks."""
    weight, answers = nn.Parameter(_weights(torch.arange(ROWS))), PLAIN[KINDS[kind]]
    outputs = [answers(batch[KINDS[kind] is not None], weight) for batch in batches]
    torch.stack([(output * _factors(output)).sum() for output in outputs]).sum().backward()
    answer = outputs[rank].detach()
    _step(weight, optimizer)
    return answer, weight.detach()


# What a plain table answers, exactly: bags have 4 ids, and halves and quarters of whole numbers are floats too.
PLAIN: dict[Pooling, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "sum": partial(F.embedding_bag, mode="sum"),
    "mean": partial(F.embedding_bag, mode="mean"),
    "sqrtn": lambda ids, weight: F.embedding(ids, weight).sum(1) / IDS_A_BAG**0.5,
    "max": partial(F.embedding_bag, mode="max"),
    None: F.embedding,
}


def _weights(rows: torch.Tensor) -> torch.Tensor:
    """Whole numbers from -6 to 6."""
    columns = torch.arange(COLUMNS, device=rows.device)
    return ((rows.unsqueeze(1) * 7 + columns * 3) % 13 - 6).to(torch.float32)


def _batch(rank: int) -> dict[bool, torch.Tensor]:
    """Bags of ids, and ids."""
    generator = torch.Generator().manual_seed(rank)
    return {
        True: torch.randint(ROWS, (BAGS, IDS_A_BAG), generator=generator),
        False: torch.randint(ROWS // 3, (BAGS,), generator=generator),  # many twice
    }


def _factors(output: torch.Tensor) -> torch.Tensor:
    """Whole numbers from -2 to 2, which the gradients are sums of."""
    return (torch.arange(output.numel(), device=output.device) % 5 - 2).reshape(output.shape).to(output.dtype)


def _step(weight: torch.Tensor, optimizer: SGD | Adagrad) -> None:
    kind = torch.optim.SGD if isinstance(optimizer, SGD) else torch.optim.Adagrad
    kind([weight], lr=optimizer.lr).step()


def _difference(what: str, found: torch.Tensor, wanted: torch.Tensor, bound: float) -> str:
    if found.shape != wanted.shape:
        return f"{what}: shape {tuple(found.shape)}, the plain table gives {tuple(wanted.shape)}"
    wrong = ~((found - wanted).abs() <= bound * (1 + wanted.abs()))
    if not bool(wrong.any()):
        return ""
    at = wrong.nonzero()[0].tolist()
    first = f"{float(found[tuple(at)]):g} for {float(wanted[tuple(at)]):g} at {at}"
    return f"{what}: {int(wrong.sum())} of {wrong.numel()} numbers differ, first {first}"


def _together(each: list[list[Compared]]) -> list[Compared]:
    """One answer a cut: the first rank's that differs."""
    found = []
    for answers in zip(*each, strict=True):
        wrong = next((rank for rank, answer in enumerate(answers) if answer.difference), None)
        first = answers[0]
        found.append(first if wrong is None else Compared(first.cut, first.bound, f"rank {wrong}: {answers[wrong].difference}"))
    return found
