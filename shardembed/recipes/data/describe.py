"""From rows to what is known of users and items, by their numbers."""

from __future__ import annotations

from dataclasses import replace

from shardembed.recipes.config import DataConfig
from shardembed.recipes.data.interactions import Interactions
from shardembed.recipes.data.sides import Gathering, Known


def with_features(data: Interactions, config: DataConfig) -> Interactions:
    """With the values of data.features, in a pass of its own; the same where there are none.

    Raises:
        DataError: what is read is not what it was.
    """
    if not config.features:
        return data
    sides = ("user", "item")
    features = {side: [one for one in config.features if one.of == side] for side in sides}
    gathering = {"user": Gathering(features["user"], data.users), "item": Gathering(features["item"], data.items)}
    places = {side: [place for place, one in enumerate(config.features) if one.of == side] for side in sides}
    row = 0
    for part in range(len(data.source.parts)):
        for chunk in data.source.chunks(part):
            kept = data.kept(row, len(chunk))
            row += len(chunk)
            for side, numbers in zip(sides, (chunk.users, chunk.items), strict=True):
                columns = [chunk.features[place] for place in places[side]]
                # What is held out comes second, whatever the order: it tells only what nothing in training does.
                gathering[side].see(numbers[kept], [column[kept] for column in columns])
                gathering[side].fill(numbers[~kept], [column[~kept] for column in columns])
    return replace(data, known=Known(gathering["user"].side(), gathering["item"].side()))
