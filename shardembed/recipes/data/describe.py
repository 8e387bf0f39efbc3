"""From rows and files to what is known of users and items, by their numbers."""

from __future__ import annotations

from dataclasses import replace

from shardembed.errors import DataError
from shardembed.recipes.config import DataConfig
from shardembed.recipes.data.choose import of_rows, rows_of_side
from shardembed.recipes.data.interactions import Interactions
from shardembed.recipes.data.numbering import NOBODY, OTHER_IDS, Numbers
from shardembed.recipes.data.sides import SIDES, Gathering, Known, Side, SideName


def with_features(data: Interactions, config: DataConfig) -> Interactions:
    """With the values of data.features, in passes of their own, and with users and items that only files of theirs have.

    Raises:
        DataError: a file cannot be read, or is not what it was.
    """
    if not config.features:
        return data
    numbered = _with_all(data, config)
    by_rows = _of_rows(numbered, config)
    found = {side: by_rows.get(side) or _of_file(numbered, config, side) for side in SIDES}
    return replace(numbered, known=Known(found["user"], found["item"]))


def _with_all(data: Interactions, config: DataConfig) -> Interactions:
    """With a number for each user and item of a file, though it occurs in no interaction."""
    if data.ids is not None:
        users, items = len(data.ids.users), len(data.ids.items)
    else:
        users, items = (
            max(count, _largest(data, config, side) + 1) for side, count in zip(SIDES, (data.users, data.items), strict=True)
        )
    return data.with_room(users, items)


def _largest(data: Interactions, config: DataConfig, side: SideName) -> int:
    return max((int(ids.max()) for ids, _ in rows_of_side(config, side, data.source) if len(ids)), default=-1)


def _of_rows(data: Interactions, config: DataConfig) -> dict[SideName, Side]:
    """Of the sides whose features stand in the rows of interactions."""
    read = of_rows(config)
    features = {side: [one for one in read if one.of == side] for side in SIDES}
    gathering = {side: Gathering(features[side], count) for side, count in zip(SIDES, (data.users, data.items), strict=True)}
    row = 0
    for part in range(len(data.source.parts) if read else 0):
        for chunk in data.source.chunks(part):
            kept = data.kept(row, len(chunk))
            row += len(chunk)
            for side, numbers, counts in zip(SIDES, (chunk.users, chunk.items), (data.user_counts, data.item_counts), strict=True):
                columns = [chunk.features[place] for place, one in enumerate(read) if one.of == side]
                gathering[side].see(numbers[kept], [column[kept] for column in columns])
                # Of what is held out only of whom training has no row: a value that came late may tell what was taken then.
                new = ~kept & (counts[numbers] == 0)
                gathering[side].see(numbers[new], [column[new] for column in columns])
    return {side: gathering[side].side() for side in SIDES if features[side]}


def _of_file(data: Interactions, config: DataConfig, side: SideName) -> Side:
    """Of a side that has a file of its own, or no features."""
    features = [one for one in config.features if one.of == side]
    count = data.users if side == "user" else data.items
    gathering = Gathering(features, count)
    number_of = None if data.ids is None else Numbers(data.ids.users if side == "user" else data.ids.items)
    for ids, columns in rows_of_side(config, side, data.source):
        numbers = ids if number_of is None else number_of(ids)
        if len(numbers) and not (numbers.min() > NOBODY and numbers.max() < count):
            raise DataError(f"{', '.join(_paths(config, side))}: {OTHER_IDS}")
        gathering.see(numbers, columns)
    return gathering.side()


def _paths(config: DataConfig, side: SideName) -> tuple[str, ...]:
    return (config.users if side == "user" else config.items) or ()
