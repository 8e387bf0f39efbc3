"""Clicks from files that are named or matched by patterns: text of the Criteo layout, and Parquet with its columns."""

from __future__ import annotations

from collections.abc import Sequence

from shardembed.recipes.data.clicks.reads import ReadClicks
from shardembed.recipes.data.criteo.schema import Schema
from shardembed.recipes.data.layout import Layout
from shardembed.recipes.data.opened import open_files
from shardembed.recipes.data.wanted import Wanted


def click_files(
    patterns: Sequence[str], schema: Schema, skip: bool, setting: str = "data.path", labelled: bool = True
) -> ReadClicks:
    """The rows of several files, file after file; each file is a part.

    Args:
        patterns: paths or patterns; what one pattern matches is read in the order of the names.
        setting: where the patterns came from, for messages.
        skip: leave out bad rows, and say which in the chunks.
        labelled: they have the label; else rows are to be scored, and text files lack its field.

    Raises:
        DataError: a file or a column is missing.
    """
    category = "id" if schema.any_id else "hex"
    columns = (
        *((Wanted(schema.label, "label", "data.label"),) if labelled else ()),
        *(Wanted(name, "number", "data.integers") for name in schema.integers),
        *(Wanted(name, category, "data.categories", names=schema.books.get(name)) for name in schema.categories),
    )
    names = tuple(one.name for one in columns)
    described = str(schema) if labelled else f"{len(names)}: {schema.values}"
    layout = Layout("\t", names, f"{described}, with a tab between two", texts=schema.any_id)
    return ReadClicks(open_files(list(patterns), columns, skip, setting, layout), columns)
