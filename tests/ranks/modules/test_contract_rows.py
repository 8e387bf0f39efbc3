"""What the contract means where several ranks share a table: who counts, who renormalises, and which pairs are refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import shardembed as se
from shardembed.errors import DisagreementError, PlanError
from tests.harness import run_ranks

ROWS, COLUMNS = 12, 6
CUTS: dict[str, se.Placement] = {
    "table": se.table_wise(0),
    "rows": se.row_wise(strided=False),
    "dealt": se.row_wise(packing="bag"),
    "columns": se.column_wise(),
    "grid": se.grid(2, ranks=[0, 1, 1, 0]),
}
ALL = torch.arange(ROWS)


def table(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0), dtype=dtype)


def renormalise(rank: int, world_size: int, norm_type: float) -> list[str]:
    """Read and look up a table that is too long, in every way there is."""
    wrong = []
    for name, plan in CUTS.items():
        settings: dict[str, Any] = {"max_norm": 1.0, "norm_type": norm_type, "plan": plan, "optimizer": se.optim.SGD()}
        emb = se.Embedding.from_pretrained(table(), **settings)
        emb.topk(torch.randn(2, COLUMNS, dtype=torch.float64), 3, "embedding")
        if not torch.equal(emb.rows("embedding", ALL), table()):
            wrong.append(f"{name}: reading changed rows")
        expected = table()
        # Row 3 is on both ranks, and twice on the second; rank 0 comes with nothing at last.
        calls = [([3, 5], [3, 3, 7]), ([1], [2]), ([], [9])]
        modes = (torch.enable_grad, torch.no_grad, torch.inference_mode)
        for mode, ids in zip(modes, calls, strict=True):
            F.embedding(torch.tensor(ids[0] + ids[1]), expected, max_norm=1.0, norm_type=norm_type)
            mine = torch.tensor(ids[rank], dtype=torch.int64)
            with mode():
                found = emb(mine)
            for what, one, other in (("output", found, expected[mine]), ("rows", emb.rows("embedding", ALL), expected)):
                if not torch.allclose(one, other, rtol=1e-12, atol=0):
                    wrong.append(f"{name}: {what} after {mode.__name__}")
    return wrong


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.5, float("inf")])
def test_rows_are_renormalised_in_every_forward_and_in_no_reading(norm_type: float) -> None:
    assert run_ranks(2, renormalise, norm_type) == [[], []]


def count_together(rank: int, world_size: int) -> list[str]:
    """One table, four features, two of them bags: the frequency is that of the whole call, whatever part of it a rank has."""
    wrong = []
    names = ["sums", "means", "lists", "more"]
    pooling: Any = {"sums": "sum", "means": "mean", "lists": None, "more": None}
    for name, plan in CUTS.items():
        config = se.TableConfig(
            "t", ROWS, COLUMNS, names, pooling, torch.float64, padding_idx=2, scale_grad_by_freq=True, sparse=True
        )
        emb = se.EmbeddingCollection([config], plan=plan, gradient_reduction="sum")
        numbers = torch.Generator().manual_seed(1)
        batches = [{n: torch.randint(0, ROWS, (3, 2), generator=numbers) for n in names} for _ in range(world_size)]
        torch.stack([output.sum() for output in emb(batches[rank]).values()]).sum().backward()
        flat = torch.cat([batch[n].reshape(-1) for batch in batches for n in names])
        # A bag's mean also divides by how many of its ids are no padding.
        kept = [(batch["means"] != 2).sum(1, keepdim=True).clamp(min=1).expand(3, 2).reshape(-1) for batch in batches]
        ones = torch.ones(6)
        parts = [kept[number].double() if n == "means" else ones for number in range(world_size) for n in names]
        weight = torch.zeros(ROWS, COLUMNS, dtype=torch.float64, requires_grad=True)
        found = F.embedding(flat, weight, padding_idx=2, scale_grad_by_freq=True) / torch.cat(parts).unsqueeze(1)
        found.sum().backward()
        assert weight.grad is not None
        for parameter in emb.parameters():
            shard = parameter.shard.shard  # type: ignore[union-attr]
            expected = weight.grad[shard.rows.start : shard.rows.stop : shard.rows.step, shard.columns.start : shard.columns.stop]
            held = parameter.grad.to_dense() if parameter.grad is not None else torch.zeros_like(parameter)
            if not torch.allclose(held, expected, rtol=1e-12, atol=1e-15):
                wrong.append(f"{name}: {shard}")
    return wrong


def test_frequencies_are_counted_over_ranks_and_features_of_a_call() -> None:
    assert run_ranks(2, count_together) == [[], []]


PAIRS: list[dict[str, Any]] = [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"max_norm": 1.0, "scale_grad_by_freq": True}]


def refuse(rank: int, world_size: int, settings: dict[str, Any]) -> list[str]:
    """What is said to copies by the three ways to make a table; "auto" and other plans must take it."""
    said = []
    for make in (
        lambda plan: se.Embedding(ROWS, COLUMNS, **settings, plan=plan, feature="item"),
        lambda plan: se.EmbeddingBag(ROWS, COLUMNS, **settings, plan={"item": plan} if plan != "auto" else plan, feature="item"),
        lambda plan: se.EmbeddingCollection([se.TableConfig("item", ROWS, COLUMNS, **settings)], plan=plan),
    ):
        try:
            make(se.replicated())
            said.append("")
        except PlanError as error:
            said.append(str(error))
        module = make("auto")
        module.rows("item", ALL)
        assert world_size == 1 or not module.plan.tables[0].layout.copied, "auto must not copy such a table"
    return said


@pytest.mark.parametrize("settings", PAIRS, ids=str)
def test_copies_cannot_renormalise_or_count(settings: dict[str, Any]) -> None:
    """They answer without a word to the other ranks. One rank alone has nobody to ask."""
    assert run_ranks(1, refuse, settings) == [["", "", ""]]
    for said in run_ranks(2, refuse, settings):
        for text in said:
            assert re.match(rf"table 'item': {' and '.join(settings)} on a replicated table .* use table_wise\(\) or", text), text


def keep_copies(rank: int, world_size: int) -> bool:
    """Nothing is counted for a frozen table, so it may be copied."""
    emb = se.Embedding(ROWS, COLUMNS, scale_grad_by_freq=True, _freeze=True, plan=se.replicated())
    return emb(ALL).shape == (ROWS, COLUMNS)


def test_a_frozen_table_that_would_count_may_be_copied() -> None:
    assert run_ranks(2, keep_copies) == [True, True]


DIFFERENT: list[dict[str, Any]] = [
    {"padding_idx": 1},
    {"max_norm": 1.0},
    {"scale_grad_by_freq": True},
    {"_freeze": True},
    {"sparse": True},
]


def disagree(rank: int, world_size: int, settings: dict[str, Any]) -> None:
    se.Embedding(ROWS, COLUMNS, plan=se.row_wise(), feature="item", **(settings if rank else {}))


@pytest.mark.parametrize("settings", DIFFERENT, ids=str)
def test_ranks_agree_on_every_argument(settings: dict[str, Any]) -> None:
    for outcome in run_ranks(2, disagree, settings, expect_errors=True):
        assert isinstance(outcome.error, DisagreementError), outcome.error
        assert "table 'item'" in str(outcome.error)


def start_anew(rank: int, world_size: int) -> list[torch.Tensor]:
    """The rows of reset modules: made fresh, or from a file that every rank maps."""
    found = []
    for plan in CUTS.values():
        for given in (None, table(torch.float32)):
            emb = se.EmbeddingBag(ROWS, COLUMNS, _weight=given, padding_idx=1, plan=plan, optimizer=se.optim.Adagrad())
            emb.load_rows("embedding", torch.ones(ROWS, COLUMNS))
            emb.reset_parameters(seed=7)
            found.append(emb.rows("embedding", ALL))
    return found


def test_reset_parameters_gives_the_same_rows_on_every_plan() -> None:
    first, *others = [rows for found in run_ranks(2, start_anew) for rows in found]
    assert not first[1].any()
    assert float(first.std()) > 0.5
    assert all(torch.equal(first, other) for other in others)


def map_file(rank: int, world_size: int, path: str) -> list[bool]:
    """Read back what was mapped."""
    found = []
    for plan in CUTS.values():
        mapped = torch.from_file(path, shared=False, size=ROWS * COLUMNS, dtype=torch.float64).view(ROWS, COLUMNS)
        emb = se.Embedding.from_pretrained(mapped, plan=plan)
        found.append(torch.equal(emb.rows("embedding", ALL), table()))
    return found


def test_every_rank_reads_its_part_of_a_mapped_file(tmp_path: Path) -> None:
    table().numpy().tofile(tmp_path / "rows")
    assert run_ranks(2, map_file, str(tmp_path / "rows")) == [[True] * len(CUTS)] * 2


def freeze_some(rank: int, world_size: int) -> list[str]:
    """A frozen table beside one that learns, with weights of ids on both."""
    tables = [
        se.TableConfig("still", ROWS, COLUMNS, dtype=torch.float64, frozen=True),
        se.TableConfig("moving", ROWS, COLUMNS, dtype=torch.float64),
    ]
    emb = se.EmbeddingCollection(tables, plan={"still": se.column_wise(), "moving": se.row_wise()}, optimizer=se.optim.Adam())
    before = emb.rows("still", ALL), emb.rows("moving", ALL)
    ids, offsets = torch.tensor([1, 2, 3]), torch.tensor([0, 1, 3])
    weights = torch.ones(3, dtype=torch.float64, requires_grad=True)
    found = emb({"still": (ids, offsets, weights), "moving": (ids, offsets)})
    (found["still"].sum() + found["moving"].sum()).backward()
    se.Optimizer(emb).step()
    wrong = []
    if weights.grad is None or not torch.allclose(weights.grad, before[0][ids].sum(1)):
        wrong.append("gradient of weights")
    if not torch.equal(emb.rows("still", ALL), before[0]):
        wrong.append("a frozen table moved")
    if torch.equal(emb.rows("moving", ALL), before[1]):
        wrong.append("the other did not")
    if any(local.state for local in emb.local_shards() if local.table == "still"):
        wrong.append("a frozen table has optimizer state")
    return wrong


def test_a_frozen_table_stays_and_passes_gradients_of_weights() -> None:
    assert run_ranks(2, freeze_some) == [[], []]
