"""From settings to sources of clicks. pyarrow is asked for only where there are files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from shardembed.inputs.names import Names
from shardembed.recipes.ctr_config import CtrDataConfig
from shardembed.recipes.data.clicks.reads import ReadClicks, wanted
from shardembed.recipes.data.clicks.rows import ClickSource
from shardembed.recipes.data.criteo.planted import PlantedClicks
from shardembed.recipes.data.criteo.schema import Schema
from shardembed.recipes.data.wanted import NO_BOOKS


def open_sources(config: CtrDataConfig) -> tuple[ClickSource, ClickSource | None]:
    """The source that the settings ask for, and the one for validation where it is another.

    Raises:
        DataError: a file or a column is missing.
    """
    if config.path is None:
        return PlantedClicks(config.generator, Schema.of(config)), None
    source = open_files(config, config.path)
    if not config.validation_path:
        return source, None
    other = open_files(config, config.validation_path, "data.validation_path")
    return source, replace(other, files=source.files.read_alike(other.files))


def open_files(
    config: CtrDataConfig,
    paths: tuple[str, ...],
    setting: str = "data.path",
    *,
    labelled: bool = True,
    books: Mapping[str, Names] = NO_BOOKS,
) -> ReadClicks:
    """The rows of files.

    Args:
        setting: which named them, for messages.
        labelled: rows have a label; else they can only be scored, and their labels are 0.
        books: by column, what keeps texts with their ids.

    Raises:
        DataError: a file or a column is missing.
    """
    from shardembed.recipes.data import opened

    columns = wanted(config, labelled, books)
    layout = None if config.features else Schema.of(config).layout(labelled)
    return ReadClicks(opened.open_files(paths, columns, config.on_bad_row == "skip", setting, layout), columns)
