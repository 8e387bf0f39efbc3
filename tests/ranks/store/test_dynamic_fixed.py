"""A dynamic table without a limit is, to the bit, the fixed one in which the same ids are rows and start alike: outputs of every
forward, and after training weights and optimizer state.

Legend: N ids, D columns, B bags.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch

import shardembed as se
from shardembed.store.starting import fill_rows
from tests.amount import sample_of
from tests.dynamic_cases import EXTREMES
from tests.harness import run_ranks
from tests.oracle import EXAMPLES, Bags, make_bags
from tests.ranks.cases import POOLINGS

N, D, SEED, STEPS = 40, 4, 5, 4
STRANGE = (*EXTREMES, *(id_ * 0x9E3779B97F4A7C15 % 2**64 - 2**63 for id_ in range(1, N + 1 - len(EXTREMES))))
PADDING = 2  # a row; the id of it is the largest there is


@dataclass(frozen=True)
class Way:
    """How two tables are trained. around: what is done beside it; see `Learner`. loose: the bound where owners differ, who add up
    parts of bags. numbered: ids are the numbers of rows, as noise goes by.
    """

    plan: Callable[[int], se.Placement] = lambda last: se.row_wise(packing="unique")
    optimizer: str = "RowwiseAdagrad"
    dtype: torch.dtype = torch.float32
    deterministic: bool = False
    wire: torch.dtype | None = None
    update: Literal["step", "backward"] = "step"
    micro: int = 1
    ahead: Literal["no", "prefetch", "prefetched"] = "no"
    around: str = ""
    loose: float = 0.0
    numbered: bool = False
    table: tuple[tuple[str, Any], ...] = ()

    @property
    def poolings(self) -> dict[str, tuple[str | None, bool]]:
        """As nn.EmbeddingBag, which does not know how often the ids of a maximum occur."""
        return {name: kind for name, kind in POOLINGS.items() if kind[0] != "max" or "scale_grad_by_freq" not in dict(self.table)}


WAYS: dict[str, Way] = {
    "plain": Way(),
    "blocks": Way(lambda last: se.row_wise(strided=False, packing="unique")),
    "twice": Way(lambda last: se.row_wise([last, 0, last], strided=False, packing="unique")),
    "column_wise": Way(lambda last: se.column_wise(packing="unique")),
    # Two strips of a fixed table lie in one slab, for which autograd adds up in another order.
    "grid": Way(lambda last: se.grid(2, ranks=[*range(last + 1)] * 2, packing="unique"), loose=2e-6),
    "table_wise": Way(lambda last: se.table_wise(last, packing="unique")),
    "table_row_wise": Way(lambda last: se.table_row_wise(0, packing="unique")),
    "bags": Way(lambda last: se.row_wise(packing="bag"), loose=2e-6),
    "bags of columns": Way(lambda last: se.column_wise(packing="bag")),
    "bags, deterministic": Way(lambda last: se.row_wise(packing="bag"), deterministic=True, loose=2e-6),
    **{f"{name}": Way(optimizer=name) for name in EXAMPLES},
    **{
        f"{name}, deterministic": Way(lambda last: se.grid(2, ranks=[*range(last + 1)] * 2), name, deterministic=True)
        for name in EXAMPLES
    },
    "float64": Way(dtype=torch.float64),
    "bfloat16": Way(dtype=torch.bfloat16, optimizer="Adam", numbered=True),
    "float16": Way(lambda last: se.column_wise(), dtype=torch.float16, deterministic=True, numbered=True),
    "bfloat16, nearest": Way(dtype=torch.bfloat16, table=(("rounding", "nearest"),)),
    "wire bfloat16": Way(wire=torch.bfloat16),
    "wire int8": Way(wire=torch.int8),
    "backward": Way(update="backward"),
    "micro-batches": Way(micro=2),
    "micro-batches, deterministic": Way(micro=2, deterministic=True),
    "ahead": Way(ahead="prefetch", micro=2),
    "ahead, deterministic": Way(ahead="prefetched", deterministic=True),
    "ahead, by another thread": Way(ahead="prefetched", optimizer="Adam", micro=2),
    "clipped": Way(around="clip", dtype=torch.float64, loose=1e-12),
    "clipped, deterministic": Way(
        lambda last: se.column_wise(), around="clip", dtype=torch.float64, deterministic=True, loose=1e-12
    ),
    "skips": Way(around="skip", optimizer="Adam"),
    "zeroes": Way(around="zero"),
    "scaled": Way(around="scaler", optimizer="Adam", micro=2),
    "frozen": Way(around="freeze", optimizer="Adam"),
    "dropped": Way(around="drop", optimizer="AdamW"),
    "by frequency": Way(table=(("scale_grad_by_freq", True),)),
    "by frequency, deterministic": Way(table=(("scale_grad_by_freq", True),), deterministic=True, micro=2),
    "max_norm": Way(table=(("max_norm", 1.0),)),
    "max_norm, deterministic": Way(table=(("max_norm", 1.0),), deterministic=True, micro=2),
    "max_norm inf": Way(lambda last: se.table_wise(0), table=(("max_norm", 0.5), ("norm_type", float("inf")))),
    "reference": Way(optimizer="Adam", around="reference"),
}
WAYS = {
    name: replace(way, table=(*way.table, ("padding_idx", PADDING))) if number % 2 else way
    for number, (name, way) in enumerate(WAYS.items())
}
OFTEN = ("plain", "grid", "bags", "Adam, deterministic", "wire int8", "bfloat16", "scaled", "frozen", "max_norm")


def rows_of(ids: tuple[int, ...], dynamic: se.TableConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """What the rows of the fixed table begin with."""

    def start(rows: torch.Tensor) -> torch.Tensor:
        found = torch.empty(len(rows), D, dtype=torch.float32)
        fill_rows(found, replace(dynamic, dtype=torch.float32), SEED, torch.tensor(ids)[rows], range(D))
        return found

    return start


class Learner:
    """One of both tables on this rank. ids: of the rows of the fixed one."""

    def __init__(self, way: Way, last: int, ids: tuple[int, ...], fixed: bool) -> None:
        self.way, self.fixed, self.named = way, fixed, torch.tensor(ids)
        settings = dict(way.table)
        padding = settings.pop("padding_idx", None)
        kinds = {name: kind for name, (kind, _) in way.poolings.items()}
        settings = {"feature_names": list(kinds), "pooling": kinds, "dtype": way.dtype, **settings}
        table = se.TableConfig(
            "item",
            None,
            D,
            init=se.Normal(0.1, 0.5),
            padding_idx=None if padding is None else ids[padding],
            dynamic=se.Dynamic(),
            **settings,
        )
        if fixed:
            table = se.TableConfig("item", len(ids), D, init=rows_of(ids, table), padding_idx=padding, **settings)
        other = se.TableConfig("other", 3, D, dtype=torch.float32)
        optimizer = EXAMPLES[way.optimizer]
        self.emb = se.EmbeddingCollection(
            [table, other],
            optimizer={"item": optimizer, "other": optimizer},
            plan={"item": way.plan(last), "other": se.row_wise()},
            wire_dtype=way.wire,
            update=way.update,
            deterministic=way.deterministic,
            kernel="reference" if way.around == "reference" else "auto",
            seed=SEED,
        )
        policy: Any = way.around if way.around in ("skip", "zero") else None
        self.optimizer = se.Optimizer(self.emb, on_nonfinite=policy, micro_batches=way.micro)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=way.around == "scaler")

    def batch(self, bags: dict[str, Bags]) -> dict[str, Any]:
        given: dict[str, Any] = {"other": torch.tensor([0, 2])}
        for name, part in bags.items():
            given[name] = (part.ids if self.fixed else self.named[part.ids], *part.given[1:])
        return given

    def train(self, batches: list[list[dict[str, Bags]]]) -> list[torch.Tensor]:
        """All outputs."""
        found: list[torch.Tensor] = []
        coming = self._given([self.batch(bags) for step in batches for bags in step])
        for number, step in enumerate(batches):
            if self.way.around == "freeze" and number in (1, 3):
                self.emb.freeze("item", number == 1)
            for bags in step:
                outputs = self.emb(next(coming))
                found += [outputs[name].detach().clone() for name in bags]
                self._backward(outputs, bags, ill=number == 2)
            if self.way.update == "step":
                self._step(number)
        return found

    def _given(self, batches: list[dict[str, Any]]) -> Iterator[Any]:
        """What the collection is called with: batches, or what stands for those whose ids have been sent."""
        if self.way.ahead == "prefetched":
            yield from se.prefetched(batches, self.emb)
            return
        if self.way.ahead == "no":
            yield from batches
            return
        ticket = self.emb.prefetch(batches[0])
        for batch in batches[1:]:
            now, ticket = ticket, self.emb.prefetch(batch)
            yield now
        yield ticket

    def _backward(self, outputs: Any, bags: dict[str, Bags], ill: bool) -> None:
        parts = [(outputs[name].float() * part.slopes.float()).sum() for name, part in bags.items()]
        parts.append(outputs["other"].float().square().sum())
        loss = torch.stack(parts).sum()
        if ill and self.way.around in ("skip", "zero", "scaler"):
            loss = loss + torch.stack([(outputs[name].float() * torch.inf).sum() for name in bags]).sum()
        self.scaler.scale(loss).backward()

    def _step(self, number: int) -> None:
        if self.way.around == "drop" and number == 2:
            self.optimizer.zero_grad()
        if self.way.around == "clip":
            self.scaler.unscale_(self.optimizer)
            se.clip_grad_norm_(self.emb, 0.5)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def held(self) -> dict[tuple[int, int, str], torch.Tensor]:
        """By row of the fixed table, first column and name what lies here; rows that are not stored are left out."""
        found: dict[tuple[int, int, str], torch.Tensor] = {}
        for slab in self.emb.journey.slabs:
            for lane in slab.spec.lanes:
                if self.emb.tables[lane.table].name != "item":
                    continue
                if slab.dynamic is not None:
                    places = slab.dynamic.census.living(slab.dynamic.steps)
                    numbers = [int((self.named == id_).nonzero()) for id_ in slab.dynamic.census.ids_S[places]]
                else:
                    blocks = [block for block in lane.blocks if slab.rank in block.shard.ranks]
                    numbers = [row for block in blocks for row in block.shard.rows]
                    places = torch.tensor(
                        [block.first_key + i for block in blocks for i in range(len(block.shard.rows))], dtype=torch.int64
                    )
                for name, tensor in {"": slab.weights, **slab.state}.items():
                    for row, values in zip(numbers, tensor[places].clone(), strict=True):
                        found[row, lane.columns.start, name] = values
        return found

    def read(self) -> torch.Tensor:
        """All rows, as an evaluation reads them, `[N, D]`."""
        nothing = torch.empty(0, dtype=torch.int64)
        batch: dict[str, Any] = {"other": nothing}
        for name, (kind, weighted) in self.way.poolings.items():
            rows = torch.arange(len(self.named)) if kind is None else nothing
            weights = (nothing.float(),) if weighted else ()
            batch[name] = (rows if self.fixed else self.named[rows]) if kind is None else (nothing, torch.tensor([0]), *weights)
        with torch.no_grad():
            found = self.emb(batch)
        return next(found[name] for name, (kind, _) in self.way.poolings.items() if kind is None)


def drawn(way: Way, rank: int) -> list[list[dict[str, Bags]]]:
    """`[step][micro-batch]`; every rank has an empty batch now and then."""
    seed = torch.Generator().manual_seed(100 + rank)

    def batch(number: int) -> dict[str, Bags]:
        size = (3, 0, 5, 2)[(rank + number) % 4]
        return {name: make_bags(seed, N, D, kind, size, 4, weighted=weighted) for name, (kind, weighted) in way.poolings.items()}

    return [[batch(step * way.micro + part) for part in range(way.micro)] for step in range(STEPS)]


Held = dict[tuple[int, int, str], torch.Tensor]


def train(rank: int, world_size: int, way: str) -> tuple[list[Held], list[list[torch.Tensor]], list[torch.Tensor]]:
    """Both: what they hold, their outputs, all rows. The fixed one comes first."""
    ids = tuple(range(N)) if WAYS[way].numbered else STRANGE
    both = [Learner(WAYS[way], world_size - 1, ids, fixed) for fixed in (True, False)]
    outputs = [learner.train(drawn(WAYS[way], rank)) for learner in both]
    rows = [learner.read() for learner in both]
    assert {name for _, _, name in both[0].held()} >= {name for _, _, name in both[1].held()}
    return [learner.held() for learner in both], outputs, rows


def same(found: torch.Tensor, expected: torch.Tensor, loose: float, what: str) -> None:
    assert found.dtype == expected.dtype, what
    if loose:
        torch.testing.assert_close(found, expected, rtol=loose, atol=loose, msg=lambda text: f"{what}: {text}")
    else:
        assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0)), f"{what}: {found} and {expected} differ"


def check(way: str, ranks: int) -> None:
    runs = run_ranks(ranks, train, way)
    loose = WAYS[way].loose
    for rank, (_, (fixed, dynamic), rows) in enumerate(runs):
        for number, (one, other) in enumerate(zip(dynamic, fixed, strict=True)):
            same(one, other, loose, f"{way}: output {number} of rank {rank}")
        same(rows[1], rows[0], loose, f"{way}: rows as rank {rank} reads them")
    fixed = {key: value for held, _, _ in runs for key, value in held[0].items()}
    dynamic = {key: value for held, _, _ in runs for key, value in held[1].items()}
    assert dynamic, "nothing has been learned"
    for key, value in fixed.items():
        if key in dynamic:
            same(dynamic[key], value, loose, f"{way}: row, column and state {key}")
        elif key[2]:
            assert not value.any(), f"{way}: {key} of the fixed table has learned, and the dynamic one has no such row"
    assert dynamic.keys() <= fixed.keys()
    padding = dict(WAYS[way].table).get("padding_idx")
    assert padding is None or not any(row == padding for row, _, _ in dynamic), "padding has a row"


CASES = [(way, ranks) for way in WAYS for ranks in (1, 2, 3)]


@pytest.mark.parametrize(("way", "ranks"), sample_of(CASES, *((way, 2) for way in OFTEN), ("micro-batches", 1)))
def test_what_is_learned_is_what_a_fixed_table_learns(way: str, ranks: int) -> None:
    check(way, ranks)
