"""What is wanted of the columns of a file, and what reading gives of them.

| kind | values | missing |
|---|---|---|
| row | int64 `[n]`, ids from 0 | a bad row |
| user | int64 `[n]`, any whole number of 64 bits with a sign | a bad row |
| key | int64 `[n]`: whole numbers of 64 bits as they are, texts by `se.hash64` | a bad row |
| id | as key | MISSING |
| hex | int64 `[n]`: whole numbers as they are, texts of 1 to 8 hexadecimal digits | MISSING |
| ids | `Lists`, of a column of lists, or of texts with a separator | an empty list |
| number | float32 `[n]`, finite | NaN |
| label | int8 `[n]`, 0 or 1 | a bad row |
| time | int64 `[2, n]`: whole numbers, or microseconds since 1970; and the nanoseconds beyond | a bad row |
| as_is | `AsIs`: what stands there, to be carried along | null |

Legend: n rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import numpy as np

from shardembed.inputs.names import Names
from shardembed.recipes.data.bad import NONE, Dropped
from shardembed.recipes.data.lists import Lists
from shardembed.recipes.features_config import FeatureConfig

MISSING = np.iinfo(np.int64).min  # an id that is not there
WantedKind = Literal["row", "user", "key", "id", "hex", "ids", "number", "label", "time", "as_is"]
ANY_IDS = ("key", "id", "ids")  # kinds whose values are whole numbers or texts, as the files say
NO_BOOKS: Mapping[str, Names] = MappingProxyType({})


@dataclass(frozen=True)
class Wanted:
    """A column that is read.

    Attributes:
        name: of the column.
        kind: what its values become, see above.
        setting: where it was asked for, for messages: data.user, data.features.
        separator: between the ids of a text, of kind ids.
        text: it is read as texts, though all its values be digits.
        names: keeps texts with their ids.
    """

    name: str
    kind: WantedKind
    setting: str
    separator: str | None = None
    text: bool = False
    names: Names | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Read:
    """Consecutive good rows of a file.

    Attributes:
        columns: the values of each column that was wanted, in that order.
        dropped: rows among them that were bad, and left out.
    """

    columns: tuple[np.ndarray | Lists, ...]
    dropped: Dropped = NONE


def wanted_of(features: Sequence[FeatureConfig], texts: Sequence[str], books: Mapping[str, Names] = NO_BOOKS) -> tuple[Wanted, ...]:
    """The columns of features.

    Args:
        texts: names of those that are read as texts though they hold digits. books: by name, what keeps texts with their ids.
    """
    return tuple(
        Wanted(one.name, one.kind, "data.features", one.separator, one.name in texts, books.get(one.name)) for one in features
    )
