"""`PendingStep`, walked without a process group: every transition, every refusal, every reset."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shardembed.errors import MissedStepWarning, StepError
from shardembed.journey.pending import EngineRun, PendingStep, State

NAMES = ("user", "item", "tag")
TABLES = frozenset({0, 1, 2})
STEPPED = frozenset({0, 1})  # the third has the user's own optimizer
NOBODY: frozenset[int] = frozenset()
FINE, BAD = torch.zeros(1), torch.ones(1)
PACKAGE = Path(__file__).parents[3] / "shardembed"


def made(at_once: bool = False) -> PendingStep:
    return PendingStep(NAMES, STEPPED, at_once, torch.device("cpu"))


def learn(pending: PendingStep, run: int, frozen: frozenset[int] = NOBODY, tables: frozenset[int] = TABLES) -> bool:
    """A forward and its backward."""
    pending.looked_up()
    pending.backward_began(run, tables)
    return pending.gradients_arrived(frozen)


def take(pending: PendingStep) -> float:
    if pending.state is State.WAITING:
        pending.reduced()
    factor = pending.step_began()
    pending.taken()
    return factor


def is_idle(pending: PendingStep) -> bool:
    return (pending.state, pending.waiting, pending.factor, pending.unchecked) == (State.IDLE, False, None, True)


def test_a_step_goes_from_idle_to_idle() -> None:
    pending = made()
    assert is_idle(pending)
    pending.looked_up()
    assert is_idle(pending), "a forward alone leaves nothing that waits"
    pending.backward_began(1, TABLES)
    assert not pending.waiting, "what has not arrived does not wait"
    assert not pending.gradients_arrived(NOBODY)
    assert pending.state is State.WAITING
    pending.reduced()
    assert pending.state is State.REDUCED
    assert pending.waiting
    assert pending.step_began() == 1.0
    assert pending.steps == 1
    pending.taken()
    assert is_idle(pending)


@pytest.mark.parametrize("reduce", [False, True])
def test_what_is_dropped_counts_no_step(reduce: bool) -> None:
    pending = made()
    learn(pending, 1)
    pending.checked(FINE)
    pending.scaled(torch.tensor([0.5], dtype=torch.float64))
    if reduce:
        pending.reduced()
    pending.dropped()
    assert is_idle(pending)
    assert pending.steps == 0
    learn(pending, 2)
    assert take(pending) == 1.0, "a factor has outlived what it was for"
    assert pending.steps == 1


def clipped(pending: PendingStep) -> None:
    pending.reduced()


def unscaled(pending: PendingStep) -> None:
    pending.checked(FINE)
    assert pending.factor is not None
    pending.factor.mul_(0.5)  # as a GradScaler does


def overflown(pending: PendingStep) -> None:
    pending.checked(BAD)


def scaled_by_half(pending: PendingStep) -> None:
    pending.scaled(torch.tensor([0.5], dtype=torch.float64))


REFUSALS: list[tuple[Callable[[PendingStep], None], str]] = [
    (clipped, "between clip_grad_norm_ and Optimizer.step"),
    (unscaled, "had been unscaled or found not finite"),
    (overflown, "had been unscaled or found not finite"),
    (scaled_by_half, "had been unscaled or found not finite"),
]


@pytest.mark.parametrize(("done", "said"), REFUSALS)
def test_a_backward_may_not_follow_what_it_would_spoil(done: Callable[[PendingStep], None], said: str) -> None:
    pending = made()
    learn(pending, 1)
    done(pending)
    before = (pending.state, pending.factor, pending.unchecked)
    with pytest.raises(StepError, match=said):
        pending.backward_began(2, TABLES)
    assert (pending.state, pending.factor, pending.unchecked) == before
    pending.dropped()
    learn(pending, 3)


def test_a_backward_voids_a_look_that_found_nothing() -> None:
    pending = made()
    pending.expect(2)
    learn(pending, 1)
    pending.checked(FINE)
    assert not pending.unchecked
    learn(pending, 2)
    assert pending.unchecked
    assert pending.factor is None


def test_a_look_and_scalings_come_in_any_order() -> None:
    half = torch.tensor([0.5], dtype=torch.float64)
    orders: list[list[Callable[[PendingStep], object]]] = [
        [PendingStep.reduced, lambda p: p.scaled(half), lambda p: p.checked(FINE)],
        [lambda p: p.checked(FINE), PendingStep.reduced, lambda p: p.scaled(half)],
        [lambda p: p.scaled(half), lambda p: p.checked(FINE), PendingStep.reduced],
    ]
    for order in orders:
        pending = made()
        learn(pending, 1)
        for done in order:
            done(pending)
        assert not pending.unchecked
        assert pending.factor is not None
        assert pending.factor.dtype == torch.float64
        assert take(pending) == 0.5


def test_a_scaling_does_not_hide_what_is_not_finite() -> None:
    pending = made()
    learn(pending, 1)
    pending.scaled(torch.zeros(1, dtype=torch.float64))
    pending.checked(BAD)
    assert pending.factor is not None
    assert pending.factor.isnan()
    pending.made_finite()
    pending.reduced()
    assert pending.step_began() == 0.0


IMPOSSIBLE: list[tuple[State, Callable[[PendingStep], object], str]] = [
    (State.IDLE, PendingStep.reduced, "nothing is to be reduced: nothing waits"),
    (State.REDUCED, PendingStep.reduced, "nothing is to be reduced: .* copies are together"),
    (State.IDLE, lambda pending: pending.checked(FINE), "nothing to look at"),
    (State.IDLE, lambda pending: pending.scaled(FINE), "nothing to scale"),
    (State.IDLE, PendingStep.step_began, "after the reduction: nothing waits"),
    (State.WAITING, PendingStep.step_began, "after the reduction: gradients wait"),
    (State.IDLE, PendingStep.taken, "no step was begun: nothing waits"),
    (State.WAITING, PendingStep.taken, "no step was begun: gradients wait"),
]


@pytest.mark.parametrize(("state", "done", "said"), IMPOSSIBLE)
def test_what_no_caller_may_do_is_found_out(state: State, done: Callable[[PendingStep], object], said: str) -> None:
    pending = made()
    if state is not State.IDLE:
        learn(pending, 1)
    if state is State.REDUCED:
        pending.reduced()
    with pytest.raises(AssertionError, match=said):
        done(pending)
    assert pending.state is state


def heard(pending: PendingStep, *, forward: bool, run: int) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if forward:
            pending.looked_up()
        pending.backward_began(run, TABLES)
        pending.gradients_arrived(NOBODY)
    return [str(one.message) for one in caught if one.category is MissedStepWarning]


def test_one_pass_too_many_is_warned_of_once_a_step() -> None:
    pending = made()
    pending.expect(2)
    for _ in range(2):
        texts = [heard(pending, forward=True, run=run) for run in range(5)]
        assert [len(one) for one in texts] == [0, 0, 1, 0, 0]
        assert "'user', 'item', 'tag': gradients of 3 backward passes are waiting" in texts[2][0]
        assert "2 was asked for" in texts[2][0]
        pending.dropped()


def test_backwards_of_one_forward_are_one_pass() -> None:
    pending = made()
    assert not any(heard(pending, forward=run == 0, run=run) for run in range(3))
    assert heard(pending, forward=True, run=3), "a second forward was not counted"


def test_each_backward_is_a_step_with_update_backward() -> None:
    pending = made(at_once=True)
    for run in range(3):
        assert learn(pending, run), "its step is not due"
        assert take(pending) == 1.0
        assert is_idle(pending)
    assert pending.steps == 3
    assert not learn(pending, 3, frozen=STEPPED), "a step of tables that are all frozen"


def test_lookups_of_one_run_are_one_step_with_update_backward() -> None:
    pending = made(at_once=True)
    for run, table in [(1, 0), (1, 1), (2, 0), (2, 1)]:
        assert learn(pending, run, tables=frozenset({table}))
        take(pending)
    assert pending.steps == 2


def test_a_table_looked_up_twice_is_refused_with_update_backward_alone() -> None:
    pending = made(at_once=True)
    pending.backward_began(1, frozenset({0, 1}))
    with pytest.raises(StepError, match=r"table 'item' was looked up twice in a forward.*use update='step'"):
        pending.backward_began(1, frozenset({1, 2}))
    pending.backward_began(2, frozenset({1}))
    kept = made()
    for _ in range(2):
        kept.backward_began(1, frozenset({1}))


def test_runs_of_the_engine_are_told_apart() -> None:
    run = EngineRun().joined(7, frozenset({0}))
    assert run.fresh
    again = run.joined(7, frozenset({1}))
    assert (again.fresh, again.tables, again.twice) == (False, frozenset({0, 1}), NOBODY)
    assert again.joined(7, frozenset({1, 2})).twice == {1}
    assert again.joined(8, frozenset({1})) == EngineRun(8, frozenset({1}))
    outside = EngineRun().joined(-1, frozenset({0}))
    assert outside.joined(-1, frozenset({0})) == outside, "no run is no run that goes on"


def test_tables_miss_the_steps_that_they_were_frozen_in_throughout() -> None:
    pending = made()
    frozen = frozenset({0})
    for runs in ([NOBODY], [frozen], [frozen, NOBODY], [NOBODY, frozen], [frozen, frozen], [frozenset({2})]):
        pending.expect(len(runs))
        for number, of_run in enumerate(runs):
            learn(pending, number, of_run)
        take(pending)
    assert pending.steps == 6
    assert [pending.steps_of(name) for name in NAMES] == [4, 6, 6]
    learn(pending, 9, frozen)
    pending.dropped()
    learn(pending, 10)
    take(pending)
    assert pending.steps_of("user") == 5, "a table has missed a step for a backward that was dropped"


def test_a_backward_in_which_all_are_frozen_leaves_nothing_that_waits() -> None:
    pending = made()
    assert not learn(pending, 1, frozen=STEPPED)
    assert is_idle(pending)


def test_all_is_dropped_when_the_last_table_is_forgotten() -> None:
    pending = made()
    pending.expect(2)
    assert not pending.forgot(TABLES), "nothing waits, so nothing is to be dropped"
    learn(pending, 1)
    assert not pending.forgot(frozenset({0}))
    assert pending.waiting
    assert pending.forgot(frozenset({1})), "the table of the user's own optimizer does not count"
    pending.dropped()
    learn(pending, 2)
    assert not pending.forgot(frozenset({1})), "what was forgotten before the drop counts again"
    learn(pending, 3)
    assert not pending.forgot(frozenset({0})), "table 1 has learned since"


def test_counts_go_on_from_what_they_said() -> None:
    pending, other = made(), made()
    for number, frozen in enumerate([NOBODY, frozenset({1}), frozenset({1})]):
        learn(pending, number, frozen)
        take(pending)
    other.restore({name: pending.steps_of(name) for name in NAMES})
    assert (other.steps, other.missed) == (pending.steps, pending.missed) == (3, {1: 2})
    other.restore({})
    assert other.steps == 3
    other.restore({"item": 5})
    assert [other.steps_of(name) for name in NAMES] == [5, 5, 5]


class Walk(RuleBasedStateMachine):
    """Any order of what users do, beside a plain account of it."""

    def __init__(self) -> None:
        super().__init__()
        self.pending = made()
        self.arrived, self.reduced, self.factor, self.steps, self.run = 0, False, 1.0, 0, 0

    @rule(frozen=st.sampled_from([NOBODY, frozenset({0}), STEPPED]))
    def backward(self, frozen: frozenset[int]) -> None:
        self.run += 1
        self.pending.looked_up()
        if self.reduced or self.factor != 1.0:
            with pytest.raises(StepError):
                self.pending.backward_began(self.run, TABLES)
            return
        self.pending.backward_began(self.run, TABLES)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MissedStepWarning)
            self.pending.gradients_arrived(frozen)
        self.arrived += frozen != STEPPED

    @precondition(lambda self: self.arrived)
    @rule(by=st.sampled_from([0.5, 1.0, 2.0]))
    def scale(self, by: float) -> None:
        self.pending.scaled(torch.tensor([by], dtype=torch.float64))
        self.factor *= by

    @precondition(lambda self: self.arrived)
    @rule()
    def look(self) -> None:
        self.pending.checked(FINE)

    @precondition(lambda self: self.arrived and not self.reduced)
    @rule()
    def reduce(self) -> None:
        self.pending.reduced()
        self.reduced = True

    @precondition(lambda self: self.arrived)
    @rule()
    def step(self) -> None:
        assert take(self.pending) == self.factor
        self.steps += 1
        self._forget()

    @rule()
    def drop(self) -> None:
        self.pending.dropped()
        self._forget()

    def _forget(self) -> None:
        self.arrived, self.reduced, self.factor = 0, False, 1.0

    @invariant()
    def agrees(self) -> None:
        assert self.pending.waiting == bool(self.arrived)
        assert (self.pending.state is State.REDUCED) == self.reduced
        assert self.pending.steps == self.steps
        assert self.arrived or is_idle(self.pending)


TestWalk = Walk.TestCase
TestWalk.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)


def assigned(tree: ast.AST) -> Iterator[ast.Attribute]:
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AugAssign) else []
        for target in targets:
            yield from (part for part in ast.walk(target) if isinstance(part, ast.Attribute))


def test_nobody_writes_into_a_journey_or_its_step() -> None:
    """Neither `journey.x = ...` nor `....pending.x = ...`, anywhere: who has to do with them calls their methods."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text()
        for target in assigned(ast.parse(text)) if "journey" in text else ():
            owner = ast.unparse(target.value).rpartition(".")[2]
            if owner in ("journey", "pending", "freezing"):
                found.append(f"{path.relative_to(PACKAGE)}:{target.lineno}: {ast.unparse(target)}")
    assert not found, "\n".join(found)
