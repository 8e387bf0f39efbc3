"""A checkpoint that is being read: its manifest, its small state, and copies of rows into the tensors of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

from shardembed.checkpoint import small
from shardembed.checkpoint.arriving import Arrival, arrival, check_met
from shardembed.checkpoint.filling import Cut, Wanted, check_files, fill
from shardembed.checkpoint.format.manifest import read_manifest, resolve
from shardembed.checkpoint.format.pieces import Files, read_state
from shardembed.checkpoint.format.strict import loads
from shardembed.checkpoint.inventory import Item
from shardembed.checkpoint.living import Members


class Reader:
    """The checkpoint in a folder; use it in a `with`.

    Raises:
        CheckpointError: the manifest is missing, damaged, of a newer format, or stands on a full checkpoint that is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = read_manifest(path)
        self._manifests, self.sources = resolve(self.manifest, path)
        self._files: dict[Path, Files] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Reader:
        self._files = {folder: self._stack.enter_context(Files(folder, found)) for folder, found in self._manifests.items()}
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @cached_property
    def small(self) -> dict[str, Any]:
        """The small state, checked (see `small`)."""
        where = str(self.path / "state.json")
        return small.checked(loads(read_state(self._files[self.path]), where, floats=True), where)

    def check_files(self, keys: Iterable[str]) -> None:
        """Hold what the manifest says of these entries against the files that they lie in; reads headers alone.

        Raises:
            CheckpointError: a file is missing, of another size, or its header contradicts the manifest.
        """
        check_files([self.sources[key] for key in keys], self._files)

    def arrivals(self, wanted: Sequence[tuple[Item, str]]) -> dict[Members, Arrival]:
        """Who of the ids in the checkpoint comes to the dynamic tables here; changes nothing.

        Args:
            wanted: all that is to be loaded, each with the key of its entry.

        Raises:
            CheckpointError: what says which ids there are is damaged.
        """
        keys = {item.key: key for item, key in wanted}
        found: dict[Members, Arrival] = {}
        for item, key in wanted:
            for region in item.living:
                if region.members not in found:
                    base = item.key.rpartition(".")[0] if item.kind == "table_ids" else f"{item.key}.ids"
                    about = {name: self.sources[keys[f"{base}.{name}"]] for name in ("last", "count") if f"{base}.{name}" in keys}
                    found[region.members] = arrival(region, self.sources[key], about, self._files)
        return found

    def copy(self, wanted: Sequence[tuple[Item, str]], arrivals: Mapping[Members, Arrival]) -> None:
        """Fill the regions of each item from the entry of this key, as far as the entry's rows go, and of a dynamic table those of
        the ids that arrive, which have been seated.

        Raises:
            CheckpointError: something that was read is damaged; files, tensor and rows are named.
        """
        regions = [(item, self.sources[key], region) for item, key in wanted for region in item.regions]
        parts = [Wanted(item.key, source, Cut(region.rows), region.columns, region.data) for item, source, region in regions]
        living = [
            arrivals[region.members].wanted(item, region, self.sources[key]) for item, key in wanted for region in item.living
        ]
        fill([*parts, *living], self._files)
        for one in living:
            check_met(one, self.path)
        for _, _, region in regions:
            region.come_home()
