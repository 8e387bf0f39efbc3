"""Features of what the generator of two towers makes up: they tell something of tastes, but not all.

| name | kind | of | what it is |
|---|---|---|---|
| genre | id | item | the item's taste; of every tenth item another |
| tags | ids | item | up to three, of which the first hangs on the taste |
| price | number | item | nothing but noise |
| segment | id | user | the user's main taste; of every third user another |
| age | number | user | nothing but noise |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from shardembed.errors import DataError
from shardembed.recipes.data.lists import Lists, Values
from shardembed.recipes.features_config import FeatureConfig

STREAM = 0x46656174  # keeps these draws apart from those of interactions
WRONG_GENRE, WRONG_SEGMENT, MOST_TAGS = 0.1, 1 / 3, 3


def _genre(tastes: np.ndarray, count: int, rng: np.random.Generator) -> Values:
    return _mistaken(tastes, count, WRONG_GENRE, rng)


def _tags(tastes: np.ndarray, count: int, rng: np.random.Generator) -> Values:
    lengths = rng.integers(MOST_TAGS + 1, size=len(tastes))
    values = rng.integers(2 * count, size=int(lengths.sum()))
    first = (np.cumsum(lengths) - lengths)[lengths > 0]
    values[first] = 2 * tastes[lengths > 0] + rng.integers(2, size=len(first))
    return Lists(values, lengths)


def _segment(tastes: np.ndarray, count: int, rng: np.random.Generator) -> Values:
    return _mistaken(tastes, count, WRONG_SEGMENT, rng)


def _price(tastes: np.ndarray, count: int, rng: np.random.Generator) -> Values:
    return np.exp(rng.normal(2.0, 1.0, len(tastes))).astype(np.float32)


def _age(tastes: np.ndarray, count: int, rng: np.random.Generator) -> Values:
    return rng.integers(18, 80, len(tastes)).astype(np.float32)


def _mistaken(tastes: np.ndarray, count: int, share: float, rng: np.random.Generator) -> np.ndarray:
    return np.where(rng.random(len(tastes)) < share, rng.integers(count, size=len(tastes)), tastes)


MADE: dict[str, tuple[str, str, Callable[[np.ndarray, int, np.random.Generator], Values]]] = {  # name -> kind, of, values
    "genre": ("id", "item", _genre),
    "tags": ("ids", "item", _tags),
    "price": ("number", "item", _price),
    "segment": ("id", "user", _segment),
    "age": ("number", "user", _age),
}


def check_made(features: Sequence[FeatureConfig]) -> None:
    """
    Raises:
        DataError: one that the generator does not make, or not so.
    """
    for feature in features:
        if MADE.get(feature.name, ("", "", None))[:2] != (feature.kind, feature.of):
            known = ", ".join(f"{name} ({kind} of {of})" for name, (kind, of, _) in MADE.items())
            raise DataError(
                f"data.features: the built-in generator makes no {feature.name!r} that is {feature.kind} of {feature.of}; it has "
                f"{known}. Set data.path for columns of your own"
            )


def made_values(feature: FeatureConfig, tastes: np.ndarray, count: int, seed: int) -> Values:
    """The value of a feature for each user or item: of tastes int64 `[n]`, of `count` that there are."""
    kinds = list(MADE)
    rng = np.random.default_rng([seed, STREAM, kinds.index(feature.name)])
    return MADE[feature.name][2](tastes, count, rng)
