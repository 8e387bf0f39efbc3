"""What a model in this process was saved as or loaded from last, and which rows have changed since the last full checkpoint, for
increments.

Slabs note the rows that they update, from the first save on that asks for increments. What a full checkpoint holds is forgotten
when it is taken, and remembered again should it fail. Of dynamic tables the ids of that moment are kept, 8 bytes each, and compared
with those there are when an increment is taken: a step has nothing to do for ids that leave.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import nn

from shardembed.checkpoint import folders
from shardembed.checkpoint.format.blocks import Base
from shardembed.checkpoint.inventory import Inventory
from shardembed.checkpoint.living import ids_now
from shardembed.journey.journey import Journey
from shardembed.store.slab import Slab


@dataclass(frozen=True)
class Full:
    """The full checkpoint that increments may stand on.

    Attributes:
        root: the folder of checkpoints that it lies in.
        base: its name there and its checksum.
    """

    root: Path
    base: Base


# Weak: a journey or a model that is gone has no past.
_full: WeakKeyDictionary[Journey, Full] = WeakKeyDictionary()
_last: WeakKeyDictionary[nn.Module, Path] = WeakKeyDictionary()


def came_from(model: nn.Module, path: Path) -> None:
    """The model is what the checkpoint at `path` holds."""
    _last[model] = path.absolute()


def previous_of(model: nn.Module, root: Path) -> str | None:
    """The checkpoint in `root` that the model has come from; None where it has come from none there."""
    last = _last.get(model)
    return last.name if last is not None and last.parent == root.absolute() and folders.Named.of(last.name) else None


def base_of(held: Inventory, root: Path) -> Base | None:
    """What an increment in `root` would stand on; None where that takes a full checkpoint first."""
    found = {_full.get(table.journey) for table in held.tables.values()}
    if len(found) != 1:
        return None
    (full,) = found
    if full is None or full.root != root.absolute() or not (root / full.base.folder / folders.MANIFEST).is_file():
        return None
    return full.base


@dataclass(frozen=True)
class Noted:
    """What was noted of a slab.

    Attributes:
        slab: of which it was.
        touched: rows that had changed; None: nobody had asked.
        ids: that a dynamic slab had in the full checkpoint; likewise.
    """

    slab: Slab
    touched: torch.Tensor | None
    ids: torch.Tensor | None


def start(held: Inventory) -> list[Noted]:
    """Begin to note rows, with none noted. Returns what was noted before."""
    before: list[Noted] = []
    for slab in _slabs(held):
        before.append(Noted(slab, slab.touched, None if slab.dynamic is None else slab.dynamic.noted))
        slab.touched = torch.zeros(slab.weights.shape[0], dtype=torch.bool, device=slab.weights.device)
        if slab.dynamic is not None:
            slab.dynamic.noted = ids_now(slab)
    return before


def succeeded(held: Inventory, root: Path, base: Base) -> None:
    """The full checkpoint that `start` was called for is complete."""
    for table in held.tables.values():
        _full[table.journey] = Full(root.absolute(), base)


def failed(before: list[Noted]) -> None:
    """It is not: what was noted before counts again, together with what has been since."""
    for noted in before:
        slab = noted.slab
        if slab.dynamic is not None:
            slab.dynamic.noted = noted.ids
        if noted.touched is None:
            slab.touched = None
        elif slab.touched is not None:
            slab.touched[: noted.touched.shape[0]] |= noted.touched  # what is noted by now may be of more rows


def stop(held: Inventory) -> None:
    """Note nothing: the rows are about to be written behind the slabs' backs."""
    for table in held.tables.values():
        _full.pop(table.journey, None)
    for slab in _slabs(held):
        slab.touched = None
        if slab.dynamic is not None:
            slab.dynamic.noted = None


def noting(held: Inventory) -> bool:
    return any(slab.touched is not None for slab in _slabs(held))


def _slabs(held: Inventory) -> list[Slab]:
    journeys = {id(table.journey): table.journey for table in held.tables.values()}
    return [slab for journey in journeys.values() for slab in journey.slabs]
