"""From settings to a source of interactions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from shardembed.inputs.names import Names
from shardembed.recipes.common import JobConfig
from shardembed.recipes.config import DataConfig
from shardembed.recipes.ctr_config import CtrDataConfig
from shardembed.recipes.data.chain import PlantedSequences
from shardembed.recipes.data.clicks.sources import open_sources
from shardembed.recipes.data.generate import GeneratedInteractions
from shardembed.recipes.data.kept import Kept
from shardembed.recipes.data.lists import Values
from shardembed.recipes.data.numbering import Ids, Numbered, made_up
from shardembed.recipes.data.sides import SIDES, SideName
from shardembed.recipes.data.source import Source
from shardembed.recipes.data.wanted import NO_BOOKS, Wanted, wanted_of
from shardembed.recipes.features_config import FeatureConfig
from shardembed.recipes.sequence_config import SequenceDataConfig

if TYPE_CHECKING:
    from shardembed.recipes.data.opened import Files


def check_data(config: JobConfig) -> None:
    """Look whether files and columns are there, and read none of them further.

    Raises:
        DataError: a file is not there, has an unknown suffix, or lacks a column.
    """
    if isinstance(config.data, CtrDataConfig):
        open_sources(config.data)
        return
    source = open_source(config.data)
    for side in SIDES if isinstance(config.data, DataConfig) else ():
        for _ in rows_of_side(config.data, side, source):
            break


def open_source(config: DataConfig | SequenceDataConfig, books: Mapping[str, Names] = NO_BOOKS) -> Source:
    """The source that the settings ask for; books: by table, where texts are to be noted with their ids.

    Raises:
        DataError: the file is not there, has an unknown suffix, or lacks one of the columns.
    """
    sequences = isinstance(config, SequenceDataConfig)
    features = of_rows(config) if isinstance(config, DataConfig) else ()
    if config.path is None:
        return PlantedSequences(config.generator) if sequences else GeneratedInteractions(config.generator, features)
    from shardembed.recipes.data.files import FileInteractions  # pyarrow is asked for only here

    return FileInteractions(
        config.path,
        config.user,
        config.item,
        config.on_bad_row,
        config.time if sequences or config.split.by_time else None,
        features,
        any_user=sequences,
        any_id=config.any_ids is not None,
        texts=config.texts,
        books=books,
    )


def of_rows(config: DataConfig) -> tuple[FeatureConfig, ...]:
    """The features whose values stand in the rows of interactions."""
    files = {"user": config.users, "item": config.items}
    return tuple(one for one in config.features if one.of is not None and files[one.of] is None)


def open_numbered(config: DataConfig | SequenceDataConfig) -> tuple[Source, Ids | None]:
    """As `open_source`, with numbers from 0 whatever the ids are; and these, where they are others. Reads the source for them.

    Raises:
        DataError: also where it cannot be read.
    """
    source = open_source(config)
    if config.path is not None:
        source = Kept(source)
    if config.any_ids is None:
        return source, None
    if config.path is None:
        return source, Ids(made_up("user", config.generator.users), made_up("item", config.generator.items))
    users, items = (_listed(config, side, source) for side in SIDES)
    numbered = Numbered.of(source, users, items)
    return numbered, numbered.ids


def _listed(config: DataConfig | SequenceDataConfig, side: SideName, source: Source) -> Iterator[np.ndarray]:
    """The ids of users or items that a file describes, whether interactions have them or not."""
    if isinstance(config, DataConfig):
        for ids, _ in rows_of_side(config, side, source):
            yield ids


def rows_of_side(
    config: DataConfig, side: SideName, source: Source, books: Mapping[str, Names] = NO_BOOKS
) -> Iterator[tuple[np.ndarray, tuple[Values, ...]]]:
    """Of users or items that have a file of their own: ids int64 `[n]`, and the columns of features, a part after the other.
    Arguments and errors as `open_side`; also where a row is bad.
    """
    files = open_side(config, side, source, books)
    if files is None:
        return
    for part in range(len(files.parts)):
        for read in files.chunks(part):
            ids, *columns = read.columns
            assert isinstance(ids, np.ndarray)
            yield ids, tuple(columns)


def open_side(config: DataConfig, side: SideName, source: Source, books: Mapping[str, Names] = NO_BOOKS) -> Files | None:
    """The files with a row for each user or item; None where there are none.

    Args:
        source: of the interactions, as it was opened: the ids of users and items are read like those.
        books: by table, where texts are to be noted with their ids.

    Raises:
        DataError: as `open_source`, or the ids are texts, and those of interactions numbers.
    """
    paths, key = (config.users, config.user) if side == "user" else (config.items, config.item)
    if paths is None:
        return None
    from shardembed.recipes.data.opened import open_files

    features = [one for one in config.features if one.of == side]
    any_id = config.any_ids is not None
    wanted = [Wanted(key, "key" if any_id else "row", f"data.{side}", text=any_id and key in config.texts, names=books.get(side))]
    files = open_files(
        list(paths), [*wanted, *wanted_of(features, config.texts, books)], config.on_bad_row == "skip", f"data.{side}s"
    )
    interactions = files_of(source)
    return files if interactions is None else interactions.read_alike(files)


def files_of(source: Source) -> Files | None:
    """What interactions are read of, whatever is made of them on the way; None where they are made up."""
    from shardembed.recipes.data.files import FileInteractions

    while isinstance(source, Kept | Numbered):
        source = source.source
    return source.files if isinstance(source, FileInteractions) else None
