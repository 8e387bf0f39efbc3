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
    books: Mapping[str, Names] | None = None,
) -> ReadClicks:
    """The rows of files.

    Args:
        setting: which named them, for messages.
        labelled: rows have a label; else they can only be scored, and their labels are 0.
        books: by column, what keeps texts with their ids.

    Raises:
        DataError: a file or a column is missing.
    """
    skip = config.on_bad_row == "skip"
    if config.features:
        from shardembed.recipes.data import opened

        columns = wanted(config, labelled, books)
        return ReadClicks(opened.open_files(paths, columns, skip, setting), columns)
    from shardembed.recipes.data.criteo.files import click_files

    schema = Schema(config.label, config.integers, config.categories, config.ids.kind == "dynamic", books or {})
    return click_files(paths, schema, skip, setting, labelled)
