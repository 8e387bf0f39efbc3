"""Dynamic tables on 1 to 4 ranks against dicts by id: who lives, counts, steps, candidates, tallies, weights, state, outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count, product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

import shardembed as se
from tests.amount import examples, exhaustive, sample_of
from tests.dynamic_cases import FEW, dynamic_configs
from tests.oracle import EXAMPLES
from tests.ranks.dynamic import (
    CROWD,
    EXACT,
    FEATURES,
    KINDS,
    Expected,
    Kind,
    Move,
    Player,
    Setup,
    check,
    compare_outputs,
    script_of,
)

COLUMNS = 4
NORMAL = se.Normal(0.25, 1.0)  # spread starting values make wrong rows visible


def placements(ranks: int) -> list[se.Placement]:
    """Buckets may be fewer than ranks."""
    last = ranks - 1
    return [
        se.row_wise(packing="unique"),
        se.row_wise(packing="bag"),
        se.row_wise([last, 0, last], strided=False, packing="bag"),
        se.column_wise(packing="unique"),
        se.column_wise([last, 0], packing="bag"),
        se.grid(2, ranks=[*range(ranks), *range(ranks)]),
        se.table_wise(last, packing="bag"),
        se.table_wise(0),
        se.table_row_wise(0, packing="bag"),
    ]


@st.composite
def cases(draw: st.DrawFn, ranks: int, optimizers: Sequence[se.optim.TableOptimizer], **settings: Any) -> tuple[Setup, list[Move]]:
    config = draw(dynamic_configs(COLUMNS, **FEATURES, init=NORMAL, **settings))
    optimizer, plan = draw(st.sampled_from(optimizers)), draw(st.sampled_from(placements(ranks)))
    deterministic, ahead = draw(st.booleans()), draw(st.booleans())
    backward = draw(st.integers(0, 5)) == 0
    positive = isinstance(optimizer, se.optim.Lion)
    setup = Setup(config, optimizer, plan, ranks, deterministic, ahead, backward, positive)
    ids = CROWD if config.num_embeddings >= 200 and draw(st.booleans()) else FEW
    kinds = ("learn", "look", "drop") if backward else KINDS
    return setup, script_of(draw(st.integers(0, 2**16)), ranks, draw(st.integers(1, 16)), ids, kinds)


DTYPES = (torch.float64, torch.float32)
CHECKS = (HealthCheck.data_too_large, HealthCheck.large_base_example)


@pytest.mark.parametrize("ranks", [1, 2, 3, exhaustive(4)])
def test_ids_come_and_go_as_the_rules_say(ranks: int) -> None:
    """To the bit."""

    @examples({1: 120, 2: 60}.get(ranks, 30), *CHECKS)
    @given(cases(ranks, [EXACT]))
    def of(case: tuple[Setup, list[Move]]) -> None:
        check(*case)

    of()


@pytest.mark.parametrize("ranks", [2, exhaustive(3)])
def test_tables_that_are_frozen_for_a_while(ranks: int) -> None:
    """Time goes on, since another table learns: rows die, and none comes. Of optimizers that count no steps."""
    kinds: tuple[Kind, ...] = (*KINDS, "freeze", "thaw", "thaw")

    @examples(40, *CHECKS)
    @given(cases(ranks, [EXACT, EXAMPLES["RowwiseAdagrad"]]), st.integers(0, 2**16))
    def of(case: tuple[Setup, list[Move]], seed: int) -> None:
        check(replace(case[0], backward=False), script_of(seed, ranks, 16, kinds=kinds))

    of()


@pytest.mark.parametrize("ranks", [2, exhaustive(3)])
def test_a_checkpoint_in_between_changes_nothing(ranks: int, tmp_path: Path) -> None:
    """But the plan."""
    numbers = count()

    @examples(30, *CHECKS)
    @given(cases(ranks, [EXACT]), st.sampled_from(placements(ranks)), st.integers(0, 2**16))
    def of(case: tuple[Setup, list[Move]], other: se.Placement, seed: int) -> None:
        setup = replace(case[0], backward=False, other_plan=other, folder=str(tmp_path / str(next(numbers))))
        check(setup, script_of(seed, ranks, 12, kinds=(*KINDS, "reload")))

    of()


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_table_that_was_made_frozen_has_no_rows(deterministic: bool) -> None:
    config = se.TableConfig("item", 300, COLUMNS, dynamic=se.Dynamic(se.LRU()), dtype=torch.float64, frozen=True, **FEATURES)
    setup = Setup(config, EXACT, se.row_wise(), deterministic=deterministic)
    player, expected = Player(setup, 0), Expected(setup)
    expected.frozen = True
    for move in script_of(1, 1, 12):
        for found in expected.move(move):
            player.move(move)
            compare_outputs(setup, player.seen.outputs[-1], found, move.kind)
    assert [strip.rows for strip in player.strips()] == [{}]
    assert player.emb.journey.steps == 0


@pytest.mark.parametrize("deterministic", [False, True])
def test_backwards_that_a_table_does_not_learn_from_leave_nothing_behind(deterministic: bool) -> None:
    """Else what waits for a step would grow with each of them."""
    own, table = se.TableConfig("own", 4, COLUMNS), se.TableConfig("item", None, COLUMNS, dynamic=se.Dynamic())
    emb = se.EmbeddingCollection([own, table], optimizer={"own": None, "item": EXACT}, deterministic=deterministic)
    (slab,) = [slab for slab in emb.journey.slabs if slab.dynamic is not None]
    assert slab.dynamic is not None
    known = slab.dynamic.nbytes
    parameters = [parameter for parameter in emb.parameters() if parameter.numel() == 4 * COLUMNS]
    for freezes in (False, True):
        for first in range(0, 5000, 500):
            found = emb({"own": torch.tensor([1]), "item": torch.arange(first, first + 500)})
            loss = found["own"].sum() + found["item"].sum()
            if not freezes:  # autograd is asked for the other table alone
                assert torch.autograd.grad(loss, parameters)[0].any()
                continue
            emb.freeze("item")
            loss.backward()
            emb.freeze("item", False)
    assert slab.dynamic.nbytes == known
    assert slab.weights.shape[0] < 2000, "rows for the strangers of one batch"


def test_ids_of_32_bits_are_those_of_64() -> None:
    config = se.TableConfig("item", 300, COLUMNS, dynamic=se.Dynamic(), padding_idx=-3, dtype=torch.float64, **FEATURES)
    player = Player(Setup(config, EXACT, se.row_wise(packing="bag")), 0)
    ids, offsets, other = torch.tensor([-1, -3, 5, 2**31 - 1, -(2**31)]), torch.tensor([0, 2, 5]), torch.tensor([0])
    found = [
        player.emb({"single": ids.to(dtype), "bags": (ids.to(dtype), offsets.to(dtype)), "other": other.to(dtype)})
        for dtype in (torch.int64, torch.int32)
    ]
    for name, wide in found[0].items():
        assert torch.equal(found[1][name], wide)
    torch.stack([output.sum() for output in found[1].values()]).sum().backward()
    player.optimizer.step()
    assert sorted(id_ for strip in player.strips() for id_ in strip.rows) == [-(2**31), -1, 5, 2**31 - 1]


@pytest.mark.parametrize("ranks", [exhaustive(1), 2])
def test_without_numba_all_is_the_same(ranks: int) -> None:
    @examples(20, *CHECKS)
    @given(cases(ranks, [EXACT]))
    def of(case: tuple[Setup, list[Move]]) -> None:
        check(*case, plain=True)

    of()


@pytest.mark.parametrize(("ranks", "dtype"), sample_of(product((1, 2, 3), DTYPES), (1, torch.float64), (2, torch.float32)))
def test_rows_learn_by_every_optimizer(ranks: int, dtype: torch.dtype) -> None:
    @examples(40, *CHECKS)
    @given(cases(ranks, list(EXAMPLES.values()), dtype=dtype))
    def of(case: tuple[Setup, list[Move]]) -> None:
        check(*case)

    of()
