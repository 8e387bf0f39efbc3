"""From settings to a source of interactions."""

from __future__ import annotations

from shardembed.recipes.config import DataConfig
from shardembed.recipes.data.generate import GeneratedInteractions
from shardembed.recipes.data.source import Source


def open_source(config: DataConfig) -> Source:
    """The source that the settings ask for.

    Raises:
        DataError: the file is not there, has an unknown suffix, or lacks one of the two columns.
    """
    if config.path is None:
        return GeneratedInteractions(config.generator)
    from shardembed.recipes.data.files import FileInteractions  # pyarrow is asked for only here

    return FileInteractions(config.path, config.user, config.item, config.on_bad_row)
