"""The columns of a file of the Criteo layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from shardembed.inputs.names import Names
from shardembed.recipes.ctr_config import CtrDataConfig


@dataclass(frozen=True)
class Schema:
    """The columns of a file, in the order that text files have them.

    Attributes:
        label: the name of the column with clicks.
        integers: names of the columns of numbers.
        categories: names of the columns of categories.
        any_id: categories are any integers of 64 bits or texts, which get the ids of `se.hash64`; else integers or hexadecimal.
        books: by category, what keeps texts with their ids.
    """

    label: str
    integers: tuple[str, ...]
    categories: tuple[str, ...]
    any_id: bool = False
    books: Mapping[str, Names] = field(default_factory=dict, compare=False)

    @staticmethod
    def of(config: CtrDataConfig) -> Schema:
        return Schema(config.label, config.integers, config.categories, config.ids.kind == "dynamic")

    @property
    def names(self) -> tuple[str, ...]:
        return (self.label, *self.integers, *self.categories)

    @property
    def values(self) -> str:
        """What there is beside the label, in words."""
        return f"{len(self.integers)} integers and {len(self.categories)} categories"

    def __str__(self) -> str:
        return f"{len(self.names)}: the label, {self.values}"
