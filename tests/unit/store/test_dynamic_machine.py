"""A walk of a dynamic table beside its oracle: lookups, evaluations, steps, skipped steps, zero_grad, freezing, checkpoints.

What hypothesis finds here is a shortest walk; `tests/ranks/store/test_dynamic_ids.py` walks on several ranks.
"""

from __future__ import annotations

import tempfile
from contextlib import nullcontext

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

import shardembed as se
from tests.amount import examples
from tests.dynamic_cases import Learned, batches, dynamic_configs
from tests.ranks.dynamic import EXACT, FEATURES, Expected, Move, Player, Setup, compare, compare_outputs, without_numba

COLUMNS = 2
OPTIMIZERS = (EXACT, se.optim.RowwiseAdagrad(lr=0.1), se.optim.FTRL(lr=0.1))  # none counts steps, which freezing would leave out


class Walk(RuleBasedStateMachine):
    """Of one rank. `_player` is the table, `_expected` the oracle."""

    def __init__(self) -> None:
        super().__init__()
        self._moves = 0
        self._frozen = False

    @initialize(
        config=dynamic_configs(COLUMNS, **FEATURES, init=se.Normal(0.25, 1.0)),
        optimizer=st.sampled_from(OPTIMIZERS),
        packing=st.sampled_from(("unique", "bag")),
        deterministic=st.booleans(),
    )
    def begin(self, config: se.TableConfig, optimizer: se.optim.TableOptimizer, packing: str, deterministic: bool) -> None:
        plan = se.row_wise(packing="bag" if packing == "bag" else "unique")
        self._folder = tempfile.TemporaryDirectory()
        other = se.grid(2, ranks=[0, 0], packing="unique")
        self._setup = Setup(config, optimizer, plan, deterministic=deterministic, other_plan=other, folder=self._folder.name)
        self._player, self._expected = Player(self._setup, 0), Expected(self._setup)

    def _move(self, move: Move) -> None:
        self._moves += 1
        expected = self._expected.move(move)
        self._player.move(move)
        for found in expected:
            compare_outputs(self._setup, self._player.seen.outputs[-1], found, f"move {self._moves}")

    @rule(single=batches(), bags=batches())
    def learn(self, single: Learned, bags: Learned) -> None:
        self._move(Move("learn", ((single, bags),)))

    @rule(single=batches(), bags=batches())
    def learn_and_step(self, single: Learned, bags: Learned) -> None:
        self._move(Move("learn", ((single, bags),)))
        self._move(Move("step"))

    @rule(single=batches(), bags=batches())
    def look(self, single: Learned, bags: Learned) -> None:
        self._move(Move("look", ((single, bags),)))

    @rule(single=batches(), bags=batches())
    def skip(self, single: Learned, bags: Learned) -> None:
        self._move(Move("skip", ((single, bags),)))

    @rule()
    def step(self) -> None:
        self._move(Move("step"))

    @rule()
    def drop(self) -> None:
        self._move(Move("drop"))

    @precondition(lambda self: not self._frozen)
    @rule()
    def freeze(self) -> None:
        self._frozen = True
        self._move(Move("freeze"))

    @precondition(lambda self: self._frozen)
    @rule()
    def thaw(self) -> None:
        self._frozen = False
        self._move(Move("thaw"))

    @rule()
    def reload(self) -> None:
        self._frozen = False
        self._move(Move("reload"))

    @invariant()
    def holds(self) -> None:
        """What lives, candidates, tallies and bits are the oracle's after each move."""
        if self._moves:
            compare(self._setup, [self._player.strips()], self._expected, f"move {self._moves}")

    def teardown(self) -> None:
        if hasattr(self, "_folder"):
            self._folder.cleanup()


@pytest.mark.parametrize("plain", [False, True])
def test_a_walk_ends_where_the_oracle_ends(plain: bool) -> None:
    """plain: in torch alone, as where Numba is not installed."""
    settings = hypothesis.settings(examples(15 if plain else 40), stateful_step_count=12)
    with without_numba() if plain else nullcontext():
        run_state_machine_as_test(Walk, settings=settings)
