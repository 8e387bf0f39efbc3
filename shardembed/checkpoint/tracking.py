"""What a model in this process was saved as or loaded from last, and which rows have changed since the last full checkpoint, for
increments.

Slabs note the rows that they update, from the first save on that asks for increments. What a full checkpoint holds is forgotten
when it is taken, and remembered again should it fail.
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


def start(held: Inventory) -> list[tuple[Slab, torch.Tensor | None]]:
    """Begin to note rows, with none noted. Returns what was noted before."""
    before: list[tuple[Slab, torch.Tensor | None]] = []
    for slab in _slabs(held):
        before.append((slab, slab.touched))
        slab.touched = torch.zeros(slab.weights.shape[0], dtype=torch.bool, device=slab.weights.device)
    return before


def succeeded(held: Inventory, root: Path, base: Base) -> None:
    """The full checkpoint that `start` was called for is complete."""
    for table in held.tables.values():
        _full[table.journey] = Full(root.absolute(), base)


def failed(before: list[tuple[Slab, torch.Tensor | None]]) -> None:
    """It is not: what was noted before counts again, together with what has been since."""
    for slab, noted in before:
        if noted is None:
            slab.touched = None
        elif slab.touched is not None:
            slab.touched |= noted


def stop(held: Inventory) -> None:
    """Note nothing: the rows are about to be written behind the slabs' backs."""
    for table in held.tables.values():
        _full.pop(table.journey, None)
    for slab in _slabs(held):
        slab.touched = None


def noting(held: Inventory) -> bool:
    return any(slab.touched is not None for slab in _slabs(held))


def _slabs(held: Inventory) -> list[Slab]:
    journeys = {id(table.journey): table.journey for table in held.tables.values()}
    return [slab for journey in journeys.values() for slab in journey.slabs]
