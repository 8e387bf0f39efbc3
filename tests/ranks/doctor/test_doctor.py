"""The doctor's comparison of sharded tables with plain ones: right on every number of ranks, and it sees what is wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import shardembed as se
from shardembed.cli import main
from shardembed.doctor import packages, parity
from tests.harness import run_ranks

ROOT = Path(__file__).parents[3]


def compared(rank: int, world_size: int) -> list[parity.Compared]:
    return parity.compare(se.init(timeout=60), torch.device("cpu"))


@pytest.mark.parametrize("ranks", [1, 4])
def test_every_cut_has_the_plain_tables_numbers(ranks: int) -> None:
    found, *others = run_ranks(ranks, compared)
    assert not any(others)  # rank 0 alone is told
    assert [each for each in found if each.difference] == []
    assert len(found) == 16
    kinds = {"table_wise", "row_wise", "column_wise", "table_row_wise", "grid", "replicated"}
    assert {each.cut.partition(",")[0] for each in found} == kinds
    assert [(each.cut, each.bound) for each in found if each.bound != "exact"] == [("row_wise, unique, Adagrad", "within 1e-06")]


def with_wrong_numbers(rank: int, world_size: int) -> list[parity.Compared]:
    """Rank 1 expects another number in a row of the plain tables."""
    plain = parity._step

    def off(weight: torch.Tensor, optimizer: se.optim.SGD | se.optim.Adagrad) -> None:
        plain(weight, optimizer)
        with torch.no_grad():
            weight[5, 3] += 1 if rank == 1 else 0

    parity._step = off
    try:
        return compared(rank, world_size)
    finally:
        parity._step = plain


def with_an_error(rank: int, world_size: int) -> list[parity.Compared]:
    """A table on a rank that there is not."""
    cuts = parity.cuts
    parity.cuts = lambda *_: {"none": se.table_wise(world_size)}
    try:
        return compared(rank, world_size)
    finally:
        parity.cuts = cuts


def test_a_number_that_is_wrong_on_one_rank_is_found_and_errors_are_told() -> None:
    found, nothing = run_ranks(2, with_wrong_numbers)
    assert nothing == []
    assert len(found) == 16
    for each in found:
        assert each.difference.startswith("rank 1: bags by sum after a step: 1 of 768 numbers differ, first "), each
        assert each.difference.endswith("at [5, 3]")
    found, _ = run_ranks(2, with_an_error)
    assert [each.cut for each in found] == ["none", "none, Adagrad"]
    assert found[0].difference.startswith("rank 0: PlanError: ")


@pytest.mark.exhaustive
def test_the_command_compares_on_ranks_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "failures", lambda modules: {})  # importing all that is installed takes long
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    code = main(["doctor", "--ranks", "2", "--json", "--dir", str(tmp_path)])
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    told = [each["text"] for each in found["findings"] if each["area"] == "parity"]
    assert told == ["15 of 15 cuts on 2 ranks (cpu), lookup and update", "1 of 1 cuts on 2 ranks (cpu), lookup and update"]
    problems = [each for each in found["findings"] if each["status"] == "problem"]
    assert found["ok"] == (not problems)
    assert code == (1 if problems else 0)  # a machine that has some is no failure of this test
    assert all(each["fix"] for each in problems)
    assert os.listdir(tmp_path) == []
