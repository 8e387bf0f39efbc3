"""From settings to a source of interactions."""

from __future__ import annotations

from shardembed.recipes.common import JobConfig
from shardembed.recipes.config import DataConfig
from shardembed.recipes.ctr_config import CtrDataConfig
from shardembed.recipes.data.criteo.clicks import open_sources
from shardembed.recipes.data.generate import GeneratedInteractions
from shardembed.recipes.data.source import Source


def check_data(config: JobConfig) -> None:
    """Look whether files and columns are there, and read none of them further.

    Raises:
        DataError: a file is not there, has an unknown suffix, or lacks a column.
    """
    if isinstance(config.data, CtrDataConfig):
        open_sources(config.data)
    else:
        open_source(config.data)


def open_source(config: DataConfig) -> Source:
    """The source that the settings ask for.

    Raises:
        DataError: the file is not there, has an unknown suffix, or lacks one of the two columns.
    """
    if config.path is None:
        return GeneratedInteractions(config.generator)
    from shardembed.recipes.data.files import FileInteractions  # pyarrow is asked for only here

    return FileInteractions(config.path, config.user, config.item, config.on_bad_row)
