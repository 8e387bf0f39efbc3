"""What of a checkpoint goes into a model that may differ from the one it was saved of: decided from names and shapes alone. Pure.

Tables keep their rows, and larger ones grow at their end. A table or a parameter that is new begins fresh, as does a parameter of
another shape (a layer that takes in more features); what is there no more is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardembed.checkpoint.format.blocks import Entry
from shardembed.checkpoint.inventory import Item

GONE = "(gone)."  # before the names of parameters that have another shape now


@dataclass(frozen=True)
class Carried:
    """How a checkpoint is loaded into a model.

    Attributes:
        grown: keys of tables with more rows here.
        fresh: keys of weights that begin as they do in any new job, apart from `reshaped`.
        reshaped: of parameters that do so because they have another shape there.
        left_out: keys of weights that only the checkpoint has.
        lists: of the ids of dynamic tables (last steps, counts), those that begin at 0, and those that are of no use here.
    """

    grown: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    lists: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())

    @property
    def whole(self) -> bool:
        """The dense part is the one that was saved, so that the model is too, but for rows."""
        return not self.fresh and not self.reshaped and not self.left_out

    def as_options(self) -> dict[str, Any]:
        """For `load_checkpoint`."""
        return {
            "grown": self.grown,
            "new": (*self.fresh, *self.reshaped, *self.lists[0]),
            "dropped": (*self.left_out, *(GONE + key for key in self.reshaped), *self.lists[1]),
            "rename": {key: GONE + key for key in self.reshaped},
        }


def carried(entries: Mapping[str, Entry], items: Mapping[str, Item]) -> Carried:
    """
    Args:
        entries: of the checkpoint, by key. items: of the model.
    """
    weights = {key: item for key, item in items.items() if item.kind in ("table", "dense")}
    there = {key for key, entry in entries.items() if entry.kind in ("table", "dense")}
    both = [key for key in weights if key in there]
    fresh = tuple(key for key in weights if key not in there)
    left_out = tuple(key for key in entries if key in there and key not in weights)
    began = tuple(key for key, item in items.items() if item.kind == "table_ids" and item.of in there and key not in entries)
    ended = tuple(key for key, entry in entries.items() if entry.kind == "table_ids" and entry.of in weights and key not in items)
    return Carried(
        tuple(key for key in both if _grows(entries[key], weights[key])),
        fresh,
        tuple(key for key in both if weights[key].kind == "dense" and weights[key].shape != entries[key].shape),
        left_out,
        (began, ended),
    )


def _grows(entry: Entry, item: Item) -> bool:
    rows = item.kind == "table" and item.by_id is None and entry.by_id is None
    return rows and item.shape[1:] == entry.shape[1:] and item.shape[0] > entry.shape[0]
