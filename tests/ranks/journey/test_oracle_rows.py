"""What does not depend on the cut: starting weights, reading and loading rows, copies, exact retrieval.

Legend: Q queries, D columns, N rows.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

import shardembed as se
from shardembed import optim
from shardembed.tables.placement import PACKINGS
from shardembed.tables.table_config import Init
from tests.amount import exhaustive, sampled
from tests.harness import run_ranks
from tests.oracle import Case
from tests.ranks.cases import ROWS, cross, layouts
from tests.ranks.sharded import Piece, build, check, pieces, whole

WORLD_SIZES = (1, 2, 3, 4)
LONG = 3 * 4096 + 17  # rows are drawn in blocks of 4096


def numbered(rows: torch.Tensor) -> torch.Tensor:
    """Rows that say which they are."""
    return rows.to(torch.float64).unsqueeze(1) * 16 + torch.arange(3)


STARTS: dict[str, Init | None] = {
    "default": None,
    "normal": se.Normal(0.5, 2.0),
    "uniform": se.Uniform(-1.0, 3.0),
    "constant": se.Constant(0.1),
    "function": numbered,
}


def plain_case(
    tables: list[se.TableConfig], world_size: int, plan: dict[str, se.Placement], optimizer: optim.TableOptimizer | None = None
) -> Case:
    """Tables without a batch."""
    empty = [[[{} for _ in range(world_size)]]]
    return Case(tuple(tables), {table.name: optimizer or optim.SGD() for table in tables}, plan, empty)


def held(rank: int, world_size: int, case: Case) -> list[Piece]:
    return pieces(build(rank, world_size, case))


@pytest.fixture(scope="module")
def starts() -> dict[str, torch.Tensor]:
    """Every start's table as one rank holds it whole."""
    case = plain_case(start_tables(), 1, {})
    case = replace(case, plan={table.name: se.table_wise(0) for table in case.tables})
    weights, _ = whole(case, run_ranks(1, held, case))
    return weights


def start_tables() -> list[se.TableConfig]:
    dtypes = {"function": torch.float64, "uniform": torch.bfloat16}
    return [se.TableConfig(name, LONG, 3, dtype=dtypes.get(name, torch.float32), init=init) for name, init in STARTS.items()]


@pytest.mark.parametrize("world_size", [1, exhaustive(2), 3, exhaustive(4)])
def test_start_weights_are_the_same_bits_on_every_plan(world_size: int, starts: dict[str, torch.Tensor]) -> None:
    assert torch.equal(starts["function"], numbered(torch.arange(LONG)))
    assert torch.equal(starts["constant"], torch.full((LONG, 3), 0.1))
    for layout, (_, placement) in layouts(world_size).items():
        if layout.startswith("column") or layout == "grid":
            ranks = [rank % world_size for rank in (1, 0, 1)]
            placement = se.column_wise(ranks) if layout.startswith("column") else se.grid(2, ranks + ranks[:1])
        tables = start_tables()
        case = plain_case(tables, world_size, {table.name: placement for table in tables})
        weights, _ = whole(case, run_ranks(world_size, held, case))
        for name, start in starts.items():
            assert torch.equal(weights[name], start), f"{name} with {layout}"


def test_start_weights_have_their_distribution(starts: dict[str, torch.Tensor]) -> None:
    normal, uniform, default = starts["normal"], starts["uniform"].float(), starts["default"]
    assert abs(float(normal.mean()) - 0.5) < 0.05
    assert abs(float(normal.std()) - 2.0) < 0.05
    assert -1.0 <= float(uniform.min()) < -0.99
    assert 2.99 < float(uniform.max()) <= 3.0
    assert abs(float(uniform.mean()) - 1.0) < 0.05
    assert 0.99 * LONG**-0.5 < float(default.abs().max()) <= LONG**-0.5
    # No block repeats another.
    assert len(normal[:, 0].unique()) > 0.999 * LONG


@pytest.mark.parametrize("world_size", [exhaustive(2), 3, exhaustive(4)])
def test_copies_stay_the_same_bits_on_all_ranks(world_size: int) -> None:
    for name in ("Adagrad", "RowwiseAdagrad", "FTRL"):
        optimizer = optim.NAMES[name](lr=0.1)
        case = cross(world_size, optimizer, torch.float32, seed=200, steps=3, chosen=lambda layout: layout == "replicated")
        runs = check(case)  # asserts it, where it puts copies together
        first = runs[0].after
        assert len(first) == len(PACKINGS)
        for run in runs[1:]:
            for one, other in zip(first, run.after, strict=True):
                assert torch.equal(one.weights, other.weights)
                assert all(torch.equal(one.state[key], other.state[key]) for key in one.state)


def quantised(rows: int, columns: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Small whole numbers: scores are exact in every order of summation, and most of them are tied."""
    return torch.randint(-2, 3, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(dtype)


Found = list[tuple[str, int, torch.Tensor, torch.Tensor, torch.Tensor]]


def retrieve(rank: int, world_size: int, case: Case, ks: list[int]) -> Found:
    """Load every table, then ask for the best rows: (table, k, queries, scores, ids). Rank 0 asks nothing in every second call."""
    emb = build(rank, world_size, case)
    found: Found = []
    for number, table in enumerate(case.tables):
        emb.load_rows(table.name, quantised(table.num_embeddings, table.embedding_dim, 7, table.dtype))
        for k in ks:
            size = 0 if rank == 0 and (number + k) % 2 else 3 + rank
            queries_QD = quantised(size, table.embedding_dim, 100 + rank, torch.float32)
            found.append((table.name, k, queries_QD, *emb.topk(queries_QD, k, table.name)))
    return found


@pytest.mark.parametrize("world_size", [1, exhaustive(2), 3, exhaustive(4)])
def test_topk_is_exact_ties_included(world_size: int) -> None:
    tables, plan = [], {}
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for number, (layout, (columns, placement)) in enumerate(layouts(world_size).items()):
        tables.append(se.TableConfig(layout, ROWS, columns, dtype=dtypes[number % 4]))
        plan[layout] = placement
    case = plain_case(tables, world_size, plan)
    for found in run_ranks(world_size, retrieve, case, [1, 2, 5, ROWS - 1, ROWS]):
        for name, k, queries_QD, scores_QK, ids_QK in found:
            columns = layouts(world_size)[name][0]
            scores_QN = queries_QD.double() @ quantised(ROWS, columns, 7, torch.float64).t()
            # A stable sort keeps tied rows in the order of their ids.
            order_QN = torch.argsort(scores_QN, dim=1, descending=True, stable=True)[:, :k]
            assert torch.equal(ids_QK, order_QN), f"{name}, k={k}"
            assert torch.equal(scores_QK.double(), scores_QN.gather(1, order_QN)), f"{name}, k={k}"


def fine_scores(rank: int, world_size: int, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that differ in digits which only a float64 has."""
    emb = build(rank, world_size, case)
    rows = torch.ones(ROWS, 2, dtype=torch.float64)
    rows[:, 0] += torch.arange(ROWS) * 1e-12
    emb.load_rows("fine", rows)
    return emb.topk(torch.tensor([[1.0, 0.0]], dtype=torch.float64), 3, "fine")


@pytest.mark.parametrize("first", [torch.float32, torch.float64], ids=["float32 first", "float64 first"])
def test_topk_scores_in_the_dtype_of_its_table(first: torch.dtype) -> None:
    """Whatever other tables the collection has."""
    tables = [se.TableConfig("other", 5, 2, dtype=first), se.TableConfig("fine", ROWS, 2, dtype=torch.float64)]
    case = plain_case(tables, 2, {"other": se.row_wise(), "fine": se.row_wise()})
    for scores, ids in run_ranks(2, fine_scores, case):
        assert scores.dtype == torch.float64
        assert ids.tolist() == [[ROWS - 1, ROWS - 2, ROWS - 3]]


def read_and_load(rank: int, world_size: int, case: Case) -> list[str]:
    """Load every table, read it in several shapes, and read it from its shards."""
    emb = build(rank, world_size, case)
    wrong = []
    for table in case.tables:
        source = torch.randn(ROWS, table.embedding_dim, generator=torch.Generator().manual_seed(5)).to(table.dtype)
        before = [local.state[key].clone() for local in emb.local_shards() for key in local.state]
        # A NumPy array too, as a memory-mapped file is; bfloat16 has none.
        emb.load_rows(table.name, source if table.dtype == torch.bfloat16 else source.numpy())
        for ids in (
            torch.arange(ROWS),
            torch.tensor([[3, 3], [0, ROWS - 1]], dtype=torch.int32)[rank % 2],
            torch.empty((0, 2), dtype=torch.int64),
            torch.full((2, 1, rank), 5),
            torch.tensor(ROWS // 2),
        ):
            found = emb.rows(table.name, ids)
            if found.requires_grad or not torch.equal(found, source[ids.long()]):
                wrong.append(f"rank {rank}: rows of {table.name} at {tuple(ids.shape)}")
        for local in emb.local_shards():
            if local.table == table.name:
                rows, columns = local.shard.rows, local.shard.columns
                part = source[rows.start : rows.stop : rows.step, columns.start : columns.stop]
                if not torch.equal(local.weights, part):
                    wrong.append(f"rank {rank}: shard {local.shard} of {table.name}")
        after = [local.state[key] for local in emb.local_shards() for key in local.state]
        if not all(torch.equal(one, other) for one, other in zip(before, after, strict=True)):
            wrong.append(f"rank {rank}: loading {table.name} touched optimizer state")
    return wrong


@pytest.mark.parametrize(
    ("world_size", "dtype"), sampled(product(WORLD_SIZES, [torch.float32, torch.bfloat16, torch.float64])), ids=str
)
def test_rows_are_read_and_loaded_on_every_layout(world_size: int, dtype: torch.dtype) -> None:
    tables = [se.TableConfig(layout, ROWS, columns, dtype=dtype) for layout, (columns, _) in layouts(world_size).items()]
    plan = {layout: placement for layout, (_, placement) in layouts(world_size).items()}
    case = plain_case(tables, world_size, plan, optim.Adagrad())
    assert run_ranks(world_size, read_and_load, case) == [[]] * world_size
