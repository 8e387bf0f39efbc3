"""How much is tried: a sample by `make test`, everything by `make test-all` (`pytest --all`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import hypothesis
import pytest

ALL = 60  # examples of the profile "all"


def examples(number: int, *allowed: hypothesis.HealthCheck) -> hypothesis.settings:
    """As many examples with the profile "all", and in proportion with the others. allowed: health checks that do not apply."""
    profile = hypothesis.settings.default
    assert profile is not None
    checks = [*profile.suppress_health_check, *allowed]
    return hypothesis.settings(max_examples=max(1, number * profile.max_examples // ALL), suppress_health_check=checks)


def exhaustive(*values: Any) -> Any:
    """A case, for `parametrize`, that only `make test-all` runs."""
    return pytest.param(*values, marks=pytest.mark.exhaustive)


def sample_of(cases: Iterable[tuple[Any, ...]], *chosen: tuple[Any, ...]) -> list[Any]:
    """These cases, for `parametrize`: the chosen ones, and the rest exhaustive.

    For parameters whose values other tests try, one by one: then not even `sampled` must have them all.
    """
    cases = list(cases)
    strangers = [case for case in chosen if case not in cases]
    assert not strangers, f"{strangers} are none of the cases"
    return [pytest.param(*case) if case in chosen else exhaustive(*case) for case in cases]


def sampled(cases: Iterable[tuple[Any, ...]]) -> list[Any]:
    """These cases, for `parametrize`: as few as have every value of every parameter, and the rest exhaustive.

    Of several that serve alike the first is taken. Parameters that belong together are one parametrisation then:
    `sampled(product(worlds, dtypes))`, since stacked decorators would cross the samples.
    """
    cases = list(cases)
    places = [{(number, repr(value)) for number, value in enumerate(case)} for case in cases]
    missing, chosen = set[tuple[int, str]]().union(*places), set[int]()
    while missing:
        best = max(range(len(cases)), key=lambda at: len(places[at] & missing))
        chosen.add(best)
        missing -= places[best]
    return [case if at in chosen else exhaustive(*case) for at, case in enumerate(cases)]
