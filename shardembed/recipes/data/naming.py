"""The names of ids that are texts, kept in a run's folder: a folder of `se.Names` a table, for whoever shows ids after training."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import quote

from shardembed.errors import DataError
from shardembed.inputs.names import Names
from shardembed.recipes.config import DataConfig
from shardembed.recipes.ctr_config import CtrDataConfig
from shardembed.recipes.data.choose import files_of, open_side, open_source, rows_of_side
from shardembed.recipes.data.clicks.encode import looked_up
from shardembed.recipes.data.clicks.sources import open_files
from shardembed.recipes.data.numbering import made_up
from shardembed.recipes.data.sides import SIDES
from shardembed.recipes.features_config import names_of_ids
from shardembed.recipes.sequence_config import SequenceDataConfig


def folder_of(folder: Path, table: str) -> Path:
    """Where in `folder` the names of a table are."""
    return folder / quote(table, safe="")


def bring_names(folder: Path, former: Path) -> None:
    """Copy what another run has kept: an id of its tables may live on without being in the data. Not collective.

    Raises:
        DataError: they cannot be read or written.
    """
    try:
        if former.is_dir():
            shutil.copytree(former, folder, dirs_exist_ok=True)
    except (OSError, shutil.Error) as error:
        raise DataError(f"{former}: cannot copy the names to {folder}: {getattr(error, 'strerror', None) or error}") from error


def had_texts(folder: Path, table: str) -> bool:
    """The ids of a table were texts in the run that has kept their names there."""
    return any(folder_of(folder, table).glob("*.parquet"))


def id_columns(config: DataConfig | SequenceDataConfig | CtrDataConfig) -> dict[str, tuple[str, bool]]:
    """By table whose ids have names, the column in the files, and whether it holds texts. Empty where nothing is read.

    Raises:
        DataError: a file cannot be read.
    """
    if config.path is None:
        return {}
    if isinstance(config, CtrDataConfig):
        texts = open_files(config, config.path).files.texts if config.ids.kind == "dynamic" or config.features else {}
        return {table: (table, texts[table]) for table in looked_up(config) if table in texts}
    if config.any_ids is None:
        return {}
    source = open_source(config)
    opened, columns = [files_of(source)], {"item": config.item}
    if isinstance(config, DataConfig):
        columns = {"user": config.user, **columns, **{name: name for name in names_of_ids(config.features)}}
        opened += [open_side(config, side, source) for side in SIDES]
    texts = {name: kind for files in reversed(opened) if files is not None for name, kind in files.texts.items()}
    return {table: (column, texts[column]) for table, column in columns.items() if column in texts}


def keep_names(config: DataConfig | SequenceDataConfig | CtrDataConfig, folder: Path, rank: int, world_size: int) -> None:
    """Read this rank's share of the files once more, and keep what texts of theirs have which ids. Not collective. Where there are
    files with any ids, the folder is there afterwards, though none of them be a text.

    Raises:
        DataError: they cannot be read, or the names not written.
    """
    if isinstance(config, CtrDataConfig):
        if config.path is None or not (config.ids.kind == "dynamic" or config.features):
            return  # categories are numbers
        _of_clicks(config, config.path, folder, rank, world_size)
    elif config.any_ids is None:
        return
    elif config.path is not None:
        _of_interactions(config, folder, rank, world_size)
    elif rank == 0:
        made_up("item", config.generator.items, folder_of(folder, "item"))
        made_up("user", config.generator.users, folder_of(folder, "user"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be made: {error.strerror or error}") from error


def _of_interactions(config: DataConfig | SequenceDataConfig, folder: Path, rank: int, world_size: int) -> None:
    tables = ["user", "item"]  # users of sequences have no table, and are asked for by name all the same
    if isinstance(config, DataConfig):
        tables += names_of_ids(config.features)
    with ExitStack() as open_names:
        books = {table: open_names.enter_context(Names(folder_of(folder, table))) for table in tables}
        source = open_source(config, books)
        for part in range(rank, len(source.parts), world_size):
            _read(source.chunks(part))
        if rank == 0 and isinstance(config, DataConfig):
            for side in SIDES:
                _read(rows_of_side(config, side, source, books))


def _of_clicks(config: CtrDataConfig, paths: tuple[str, ...], folder: Path, rank: int, world_size: int) -> None:
    with ExitStack() as open_names:
        books = {name: open_names.enter_context(Names(folder_of(folder, name))) for name in looked_up(config)}
        source = open_files(config, paths, books=books)
        for part in range(rank, len(source.parts), world_size):
            _read(source.chunks(part))


def _read(chunks: Iterable[object]) -> None:
    for _ in chunks:
        pass
