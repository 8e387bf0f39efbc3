"""What a Comm knows of the calls made on it, and that nobody else writes it down there."""

from __future__ import annotations

import ast
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch

from shardembed.comm.comm import Comm
from shardembed.comm.history import History
from shardembed.comm.tag import DIGITS, ROW, TAG, reduced, tag_of, with_room

PACKAGE = Path(__file__).parents[3] / "shardembed"
OF_A_COMM = {"comm", "_comm", "side", "beside", "of", "history", "tally"}  # what a Comm, or a part of one, is called


def writes(source: str) -> list[str]:
    """Where an attribute of a Comm, or of a part of one, is assigned or deleted."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            owner = node.value.func if isinstance(node.value, ast.Call) else node.value
            name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
            if name in OF_A_COMM:
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


def test_a_comm_is_written_to_by_itself_only() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE / "comm"]
    found = {str(path.relative_to(PACKAGE)): lines for path in files if (lines := writes(path.read_text()))}
    assert len(files) > 100
    assert not found, f"a Comm is told what happens by methods of its history: {found}"


@pytest.mark.parametrize(
    "source",
    ["comm.step = 1", "self.comm.forwards += 1", "del comm.tally", "journey.comm.history.step: int = 3", "comm.side().step = 2"],
)
def test_a_write_is_found(source: str) -> None:
    assert len(writes(source)) == 1


@pytest.mark.parametrize("name", [name for name, kept in vars(History).items() if isinstance(kept, property)])
def test_what_is_counted_cannot_be_assigned(name: str) -> None:
    with pytest.raises(AttributeError):
        setattr(Comm(None, 1.0).history, name, 7)


def test_a_history_tells_what_happened() -> None:
    history = History()
    assert [history.register("user", 3), history.register("item", 2)] == [1, 2]
    assert (list(history.collections), history.slots) == (["user", "item"], 3)
    assert [history.open_call(), history.open_call()] == [1, history.forwards] == [1, 2]
    history.stepped(4)
    history.stepped(2)  # of another collection
    assert history.step == 4
    history.stand_at(2)
    assert history.step == 2
    history.note("backward", "send gradients", 7)
    assert history.about == "of forward call 7"
    history.note("step", "reduce copies", 2)
    assert history.about == "of collection 2: item"
    history.note("control", "agree", 0)
    assert not history.about


EVENTS: dict[str, Callable[[History], object]] = {
    "a collective": lambda history: history.note("control", "agree", 0),
    "another stage": lambda history: history.note("control", "disagree", 0),
    "another call": lambda history: history.note("backward", "agree", 2),
    "another step": lambda history: (history.stepped(1), history.note("control", "agree", 0)),
    "twice": lambda history: (history.note("control", "agree", 0), history.note("control", "agree", 0)),
    "lent": lambda history: history.lent(History()),
    "sent ahead": lambda history: history.sent_ahead(1, 5),
    "sent ahead from elsewhere": lambda history: history.sent_ahead(1, 6),
    "nothing": lambda history: None,
}


def test_the_checksum_tells_histories_apart() -> None:
    def checksum(event: Callable[[History], object]) -> int:
        history = History()
        event(history)
        return history.checksum

    found = {name: checksum(event) for name, event in EVENTS.items()}
    assert len(set(found.values())) == len(EVENTS), found
    assert found == {name: checksum(event) for name, event in EVENTS.items()}


def test_a_comm_that_is_lent_knows_the_collections_of_that_moment() -> None:
    lender, borrower = History(), History("beside the loop")
    lender.register("user", 3)
    borrower.lent(lender)
    lender.register("item", 9)
    assert (list(borrower.collections), borrower.slots) == (["user"], 3)
    borrower.note("forward", "counts", 0)
    assert borrower.about == "beside the loop"


@pytest.mark.parametrize("maximum", [False, True])
def test_a_reduced_tag_is_the_expected_one_only_where_all_ranks_have_it(maximum: bool) -> None:
    """Three ranks, all checksums of two digits up to 3: no mixture looks like ranks that agree."""
    checksums = [low | high << 6 for low, high in product(range(4), repeat=2)]
    for each in product(checksums, repeat=3):
        tags = [tag_of(checksum, maximum) for checksum in each]
        arrived = [max(column) if maximum else sum(column) for column in zip(*tags, strict=True)]
        for tag in tags:
            assert (arrived == reduced(tag, 3, maximum)) == (len(set(each)) == 1), each


def test_a_tag_is_exact_in_float32_on_4096_ranks() -> None:
    largest = tag_of(2**32 - 1, maximum=False)
    assert len(largest) == TAG == 2 * DIGITS
    expected = reduced(largest, 4096, maximum=False)
    assert torch.tensor(expected, dtype=torch.float32).tolist() == expected


@pytest.mark.parametrize("values", [0, 1, ROW, ROW + 1])
def test_control_messages_have_few_lengths(values: int) -> None:
    row = with_room(torch.ones(values))
    assert (row.numel() - TAG) % ROW == 0
    assert values <= row.numel() - TAG < values + ROW
    assert row.sum() == values
