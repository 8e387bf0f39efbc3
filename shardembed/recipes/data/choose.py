"""From settings to a source of interactions."""

from __future__ import annotations

from shardembed.inputs.names import Names
from shardembed.recipes.common import JobConfig
from shardembed.recipes.config import DataConfig
from shardembed.recipes.ctr_config import CtrDataConfig
from shardembed.recipes.data.chain import PlantedSequences
from shardembed.recipes.data.criteo.clicks import open_sources
from shardembed.recipes.data.generate import GeneratedInteractions
from shardembed.recipes.data.numbering import Ids, Numbered, made_up
from shardembed.recipes.data.source import Source
from shardembed.recipes.sequence_config import SequenceDataConfig


def check_data(config: JobConfig) -> None:
    """Look whether files and columns are there, and read none of them further.

    Raises:
        DataError: a file is not there, has an unknown suffix, or lacks a column.
    """
    if isinstance(config.data, CtrDataConfig):
        open_sources(config.data)
    else:
        open_source(config.data)


def open_source(config: DataConfig | SequenceDataConfig, names: tuple[Names | None, Names | None] = (None, None)) -> Source:
    """The source that the settings ask for; names: of users and of items, where texts are to be noted with their ids.

    Raises:
        DataError: the file is not there, has an unknown suffix, or lacks one of the columns.
    """
    sequences = isinstance(config, SequenceDataConfig)
    if config.path is None:
        return PlantedSequences(config.generator) if sequences else GeneratedInteractions(config.generator)
    from shardembed.recipes.data.files import FileInteractions  # pyarrow is asked for only here

    return FileInteractions(
        config.path,
        config.user,
        config.item,
        config.on_bad_row,
        config.time if sequences else None,
        any_user=sequences,
        any_id=config.any_ids is not None,
        texts=config.texts,
        names=names,
    )


def open_numbered(config: DataConfig | SequenceDataConfig) -> tuple[Source, Ids | None]:
    """As `open_source`, with numbers from 0 whatever the ids are; and these, where they are others. Reads the source for them.

    Raises:
        DataError: also where it cannot be read.
    """
    source = open_source(config)
    if config.any_ids is None:
        return source, None
    if config.path is None:
        return source, Ids(made_up("user", config.generator.users), made_up("item", config.generator.items))
    numbered = Numbered.of(source)
    return numbered, numbered.ids
