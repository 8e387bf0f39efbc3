"""Which checkpoints of a folder stay when another one is complete, and what is said of those that hold inf or nan."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from shardembed.checkpoint import folders
from shardembed.checkpoint.folders import Named
from shardembed.checkpoint.format.manifest import read_manifest
from shardembed.errors import CheckpointError, NonFiniteWarning

MOST_NAMED = 5


@dataclass(frozen=True)
class _About:
    """What a manifest says of its checkpoint beside what it holds. Format 1 said nothing of being finite, so all of these are."""

    previous: Named | None = None
    base: Named | None = None
    finite: bool = False


class _Folder:
    """The checkpoints of a folder; a manifest is read once, and when it is asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[Named, _About] = {}

    def about(self, name: Named) -> _About:
        if name not in self._known:
            self._known[name] = _About()  # of a damaged one, for which nothing else is cleaned away
            with suppress(CheckpointError):
                found = read_manifest(self._root / str(name))
                previous, base = found.previous, found.base
                self._known[name] = _About(
                    Named.of(previous) if previous is not None else None,
                    Named.of(base.folder) if base is not None else None,
                    not found.nonfinite,
                )
        return self._known[name]

    def way(self, to: Named, there: Iterable[Named]) -> Iterator[Named]:
        """`to`, what it was trained on from, what that was, and so on, as far as they are still there."""
        left, name = set(there), to
        while name is not None and name in left:
            left.discard(name)  # manifests are believed nothing: they could lead in a circle
            yield name
            name = self.about(name).previous

    def first_finite(self, names: Iterable[Named]) -> Named | None:
        return next((name for name in names if self.about(name).finite), None)


def kept(root: Path, written: Named, keep: int | None) -> set[Named]:
    """What stays once `written` is complete: what a step was saved as last, of the `keep` newest steps.

    Those that training came by on its way to `written` count as newer than all others, so that what it left behind when it went
    back goes first. Where none that stay is finite, the newest finite one stays beside them. So does what increments stand on.
    """
    found, folder = folders.listed(root), _Folder(root)
    by_step: dict[int, Named] = {}
    if keep is not None:
        for name in folder.way(written, found):
            # Of several checkpoints of a step the one on the way counts, which need not be the newest.
            by_step.setdefault(name.step, name)
            if len(by_step) == keep:
                break
    newest_first = [*by_step.values(), *reversed(found)]
    for name in newest_first:
        if keep is None or len(by_step) < keep:
            by_step.setdefault(name.step, name)
    stay = set(by_step.values())
    if folder.first_finite(stay) is None:
        finite = folder.first_finite(newest_first)
        stay |= {finite} if finite is not None else set()
    return stay | {base for name in stay if (base := folder.about(name).base) is not None}


def newest_finite(root: Path) -> str | None:
    """The name of the newest checkpoint in `root` that holds neither inf nor nan; None where there is none."""
    with suppress(CheckpointError):
        found = _Folder(root).first_finite(reversed(folders.listed(root)))
        return None if found is None else str(found)
    return None


def warn_of(path: Path, nonfinite: Sequence[str]) -> None:
    """Say that these tensors of the checkpoint at `path` are not finite, if there are any."""
    if nonfinite:
        other = newest_finite(path.parent)
        there = f"the newest one there that does not is {other}" if other else "there is none beside it that does not"
        warnings.warn(f"{path} holds inf or nan in {said(nonfinite)}; {there}", NonFiniteWarning, stacklevel=3)


def said(keys: Sequence[str]) -> str:
    """Some tensors, in words."""
    more = f" and {len(keys) - MOST_NAMED} more" if len(keys) > MOST_NAMED else ""
    return f"{', '.join(map(repr, keys[:MOST_NAMED]))}{more}"
