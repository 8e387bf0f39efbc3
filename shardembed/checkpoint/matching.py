"""Which entry of a checkpoint each tensor of a model is loaded from: decided before anything is read. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from shardembed.checkpoint.format.blocks import Entry
from shardembed.checkpoint.inventory import Item
from shardembed.config.hints import nearest
from shardembed.errors import CheckpointError

SHOWN = 20


@dataclass(frozen=True)
class Wishes:
    """What the caller allows a checkpoint and a model to differ in. Names are keys, or what stands before a dot in them (a module,
    a table); `*` and `?` match as in file names.

    Attributes:
        rename: names in the checkpoint -> names in the model.
        grown: tensors that may have more rows in the model; those keep their values.
        new: tensors that only the model has; they keep their values.
        dropped: tensors that only the checkpoint has.
    """

    rename: Mapping[str, str]
    grown: Sequence[str]
    new: Sequence[str]
    dropped: Sequence[str]

    def renamed(self, key: str) -> str:
        """The key in the model of a key in the checkpoint; the longest name that fits decides."""
        # The longest first, or `a` would take what `a.b` is for.
        for old in sorted(self.rename, key=len, reverse=True):
            if key == old or key.startswith(old + "."):
                return self.rename[old] + key[len(old) :]
        return key

    def check(self, saved: Iterable[str], own: Iterable[str]) -> None:
        """Raises CheckpointError where a name means nothing, as a misspelt one does."""
        saved, own = list(saved), list(own)
        for option, names, keys in (
            ("rename", self.rename, saved),
            ("dropped", self.dropped, [self.renamed(key) for key in saved]),
            ("grown", self.grown, own),
            ("new", self.new, own),
        ):
            for name in names:
                if not any(fits([name], key) for key in keys):
                    near = nearest(name, [*keys, *(key.rpartition(".")[0] for key in keys)]) or "."
                    where = "the checkpoint" if option in ("rename", "dropped") else "the model"
                    raise CheckpointError(f"{option}: {name!r} names nothing in {where}{near}")


def fits(names: Iterable[str], key: str) -> bool:
    """One of `names` is the key, a part of it up to a dot, or a pattern of such."""
    return any(key == name or key.startswith(f"{name}.") or (_is_pattern(name) and _fits(name, key)) for name in names)


def _is_pattern(name: str) -> bool:
    return any(each in name for each in "*?[")


def _fits(pattern: str, key: str) -> bool:
    """Each part of the key up to a dot, since `*` stands for dots too."""
    return fnmatchcase(key, pattern) or any(fnmatchcase(key[: dot.start()], pattern) for dot in re.finditer(r"\.", key))


def match(entries: Mapping[str, Entry], items: Mapping[str, Item], wishes: Wishes) -> tuple[dict[str, str], list[str]]:
    """(key in the checkpoint by key in the model, what does not fit: a line each)."""
    by_new: dict[str, str] = {}
    lines: list[str] = []
    for key in entries:
        name = wishes.renamed(key)
        if name in by_new:
            lines.append(f"{by_new[name]!r} and {key!r} of the checkpoint would both become {name!r}")
        by_new[name] = key
    for key, item in items.items():
        if key not in by_new:
            if not fits(wishes.new, key):
                lines.append(f"{key!r} {_size(item)} is not in the checkpoint (new=[...] keeps the model's values)")
        elif fits(wishes.new, key):
            lines.append(f"{key!r} was said to be new, and is in the checkpoint")
        else:
            lines += _misfit(item, entries[by_new[key]], fits(wishes.grown, key))
    for name, key in by_new.items():
        if name not in items and not fits(wishes.dropped, name):
            lines.append(
                f"{key!r} {_size(entries[key])} is not in the model (dropped=[...] leaves it out; rename={{...}} if it is there)"
            )
    return {key: by_new[key] for key in items if key in by_new}, lines


def _misfit(item: Item, entry: Entry, grown: bool) -> list[str]:
    if (item.by_id is None) != (entry.by_id is None):
        kinds = ["has a row a number", "is dynamic"]
        here, there = item.by_id is not None, entry.by_id is not None
        hint = " (fill the plain model with se.load_plain, then se.shard(..., dynamic=...) makes its rows ids)" if here else ""
        return [f"{item.key!r} {kinds[here]} in the model, and {kinds[there]} in the checkpoint{hint}"]
    if item.dtype != entry.dtype:
        return [f"{item.key!r} is {_dtype(item.dtype)} in the model and {_dtype(entry.dtype)} in the checkpoint"]
    if item.shape == entry.shape or (item.by_id is not None and item.shape[1:] == entry.shape[1:]):
        return []
    more_rows = bool(item.shape) and item.shape[1:] == entry.shape[1:] and item.shape[0] > entry.shape[0]
    if more_rows and grown:
        return []
    hint = " (grown=[...] loads the first rows and keeps the others)" if more_rows else ""
    return [f"{item.key!r} is {list(item.shape)} in the model and {list(entry.shape)} in the checkpoint{hint}"]


def _size(tensor: Item | Entry) -> str:
    return f"{list(tensor.shape)} {_dtype(tensor.dtype)}"


def _dtype(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def listing(lines: Sequence[str]) -> str:
    """Differences, a line each; long lists are cut."""
    more = [f"  and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n".join([*(f"  {line}" for line in lines[:SHOWN]), *more])
