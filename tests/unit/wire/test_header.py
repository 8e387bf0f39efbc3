"""The header of the counts message: whatever ranks differ in is noticed, described and answered with the advice that belongs to it.

Everything here runs over the fields of `Header`, so a new one is held to it too.
"""

from __future__ import annotations

import re
from dataclasses import fields

import numpy as np
import pytest

from shardembed.errors import DisagreementError
from shardembed.journey.messages import Call, header_of
from shardembed.wire import header as headers
from shardembed.wire.fingerprint import MASKED, described, fingerprint
from shardembed.wire.header import AGREED, FIELDS, Agreed, Header, Mode, Told, compare, counts_of, fill, numbers, refused, untold
from shardembed.wire.message import Numbers

NAMES = ["user, item", "other"]
SAME = Header(**{**dict.fromkeys(FIELDS, 0), "collection": 1})
COUNTS = np.array([[[3, 5], [4, 6]], [[0, 7], [0, 8]]])  # of 2 slabs, segments and keys, by rank


def rows(*each: Header) -> Numbers:
    return np.stack([fill(header, COUNTS, slots=3)[rank] for rank, header in enumerate(each)])


def heard(*each: Header) -> tuple[list[str], str]:
    """What is said of each rank's call, and the advice."""
    with pytest.raises(DisagreementError) as caught:
        compare(rows(*each), NAMES)
    found = re.fullmatch(r"ranks are not making the same call: rank 0 makes (.*); rank 1 makes (.*)", str(caught.value))
    assert found, caught.value
    advice = max((f". {field.advice}" for field in AGREED.values() if found[2].endswith(f". {field.advice}")), key=len)
    return [found[1], found[2].removesuffix(advice)], advice.removeprefix(". ")


@pytest.mark.parametrize("name", AGREED)
def test_ranks_that_differ_in_one_field_hear_what_it_is_and_what_to_do(name: str) -> None:
    said, advice = heard(SAME, SAME._replace(**{name: getattr(SAME, name) + 1}))
    assert advice == AGREED[name].advice
    assert (said[0] == said[1]) == (AGREED[name].says is untold), f"{name}: ranks are told {said}"


@pytest.mark.parametrize("name", AGREED)
def test_an_error_on_its_way_keeps_back_only_what_a_rank_that_refuses_its_arguments_lacks(name: str) -> None:
    sent = rows(SAME._replace(error_bytes=20), SAME._replace(**{name: getattr(SAME, name) + 1}))
    assert refused(sent)
    if AGREED[name].refused:
        with pytest.raises(DisagreementError):
            compare(sent, NAMES)
    else:
        compare(sent, NAMES)


@pytest.mark.parametrize("name", FIELDS)
def test_each_field_is_explained(name: str) -> None:
    field = FIELDS[name]
    assert field.meaning
    if isinstance(field, Agreed):
        assert field.advice, f"{name} leads to no advice"
        assert not field.unless or list(AGREED).index(field.unless) < list(AGREED).index(name), f"{name}: {field.unless}"


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if isinstance(field, Told)])
def test_what_each_rank_has_for_itself_is_not_compared(name: str) -> None:
    compare(rows(SAME, SAME._replace(**{name: 30})), NAMES)


def test_rows_keep_their_counts() -> None:
    sent = rows(SAME, SAME)
    compare(sent, NAMES)
    assert not refused(sent)
    assert sent.shape == (2, numbers(slabs=3))
    assert sent[1].tolist() == [*SAME, 5, 6, 7, 8, 0, 0]
    assert np.array_equal(counts_of(sent, 2), COUNTS)


EVALUATION = "a forward in evaluation mode (no_grad) of collection 1 (user, item)"
DESCRIBED: list[tuple[dict[str, int], str]] = [
    (
        {"collection": 2, "mode": 3, "steps": 4},
        "topk() of collection 2 (other), after 4 optimizer step(s), without gradients waiting for the next",
    ),
    ({"collection": 2, "frozen": 2}, "a forward in evaluation mode (no_grad) of collection 2 (other)"),
    ({"mode": 2, "number": 5, "k": 9}, "rows() of collection 1 (user, item), its call 5"),
    ({"table": 3}, f"{EVALUATION}, with k=0 and table number 3 of these"),
    ({"table": 3, "k": 4}, f"{EVALUATION}, with k=4 and table number 3 of these"),
    ({"frozen": 6}, f"{EVALUATION}, with table number 1, 2 of these frozen since they were made"),
]


@pytest.mark.parametrize(("other", "text"), DESCRIBED)
def test_the_first_difference_decides_on_the_advice_and_hides_what_means_nothing_beside_it(
    other: dict[str, int], text: str
) -> None:
    said, advice = heard(SAME, SAME._replace(**other))
    assert said[1] == text
    assert advice == next(AGREED[name].advice for name in AGREED if name in other)


CHANGED = {"mode": Mode.TOPK, "waiting": True}


@pytest.mark.parametrize("name", [field.name for field in fields(Call)])
def test_all_that_a_call_says_goes_into_the_header(name: str) -> None:
    call = Call(Mode.TRAINING, 0, False)
    changed = Call(**{**vars(call), name: CHANGED.get(name, 3)})
    one, other = (header_of(each, 2, 7, 8, 0) for each in (call, changed))
    assert one != other, f"Call.{name} does not travel"


def test_a_field_that_says_nothing_of_itself_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"Header\.padding does not say whether ranks must agree"):
        headers._field("padding", int)


def test_a_fingerprint_tells_sets_of_tables_apart() -> None:
    sets = [frozenset(s) for s in ((), (0,), (1,), (0, 1), (MASKED - 1,), (MASKED,), (0, MASKED), range(100))]
    found = [fingerprint(tables) for tables in sets]
    assert len(set(found)) == len(sets)
    assert all(0 <= number < 1 << 63 for number in found)
    assert [described(number) for number in found[:4]] == [
        "none of these",
        "table number 0 of these",
        "table number 1 of these",
        "table number 0, 1 of these",
    ]
    assert described(found[-1]) == "others of these"
