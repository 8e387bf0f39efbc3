"""The columns of a file of the Criteo layout, and how its text files are written. Nothing else says what is read of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shardembed.inputs.names import Names
from shardembed.recipes.ctr_config import CtrDataConfig
from shardembed.recipes.data.layout import Layout
from shardembed.recipes.data.wanted import NO_BOOKS, Wanted


@dataclass(frozen=True)
class Schema:
    """The columns of a file, in the order that text files have them.

    Attributes:
        label: the name of the column with clicks.
        integers: names of the columns of numbers.
        categories: names of the columns of categories.
        any_id: categories are any integers of 64 bits or texts, which get the ids of `se.hash64`; else integers or hexadecimal.
    """

    label: str
    integers: tuple[str, ...]
    categories: tuple[str, ...]
    any_id: bool = False

    @staticmethod
    def of(config: CtrDataConfig) -> Schema:
        return Schema(config.label, config.integers, config.categories, config.ids.kind == "dynamic")

    @property
    def names(self) -> tuple[str, ...]:
        return (self.label, *self.integers, *self.categories)

    def wanted(self, labelled: bool = True, books: Mapping[str, Names] = NO_BOOKS) -> tuple[Wanted, ...]:
        """What is read of files.

        Args:
            labelled: they have the label; else rows are to be scored, and text files lack its field.
            books: by category, what keeps texts with their ids.
        """
        kind = "id" if self.any_id else "hex"
        return (
            *((Wanted(self.label, "label", "data.label"),) if labelled else ()),
            *(Wanted(name, "number", "data.integers") for name in self.integers),
            *(Wanted(name, kind, "data.categories", names=books.get(name)) for name in self.categories),
        )

    def layout(self, labelled: bool = True) -> Layout:
        """That of text files, which have no header line."""
        names = self.names if labelled else (*self.integers, *self.categories)
        values = f"{len(self.integers)} integers and {len(self.categories)} categories"
        described = f"{len(names)}: {'the label, ' if labelled else ''}{values}, with a tab between two"
        return Layout("\t", names, described, texts=self.any_id)
