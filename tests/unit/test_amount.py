"""What `make test` takes of many cases: every value of every parameter, and nothing is lost."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from tests.amount import sample_of, sampled

CASES = [
    list(product((1, 2, 3, 4), ("a", "b", "c"), (None, [0]))),
    [(1, "a"), (1, "b"), (2, "a")],
    [(1,), (1,), (2,)],
    [],
]


def left_out(case: Any) -> bool:
    return any(mark.name == "exhaustive" for mark in getattr(case, "marks", ()))


@pytest.mark.parametrize("cases", CASES, ids=len)
def test_a_sample_has_every_value_and_the_rest_is_kept(cases: list[tuple[Any, ...]]) -> None:
    found = sampled(cases)
    assert [case.values if left_out(case) else case for case in found] == cases
    chosen = [case for case in found if not left_out(case)]
    for values, sample in zip(zip(*cases, strict=True), zip(*chosen, strict=True), strict=True):
        assert {str(value) for value in sample} == {str(value) for value in values}


def test_a_sample_of_a_product_is_as_small_as_its_longest_part() -> None:
    assert [left_out(case) for case in sampled(CASES[0])].count(False) == 4


def test_a_sample_that_is_named_is_the_sample_and_the_rest_is_kept() -> None:
    found = sample_of(CASES[1], (2, "a"))
    assert [case.values for case in found] == CASES[1]
    assert [case.values for case in found if not left_out(case)] == [(2, "a")]
    with pytest.raises(AssertionError, match=r"\[\(3, 'a'\)\] are none of the cases"):
        sample_of(CASES[1], (3, "a"))
