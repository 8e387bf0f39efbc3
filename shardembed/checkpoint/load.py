"""`load_checkpoint`: choose, compare, copy, restore. Each rank reads what its own shards need."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from shardembed.checkpoint import chance, folders, optimizing, tracking
from shardembed.checkpoint.arriving import Arrival
from shardembed.checkpoint.codec import decode
from shardembed.checkpoint.inventory import Inventory, take
from shardembed.checkpoint.living import Members
from shardembed.checkpoint.matching import Wishes, fits, listing, match
from shardembed.checkpoint.reader import Reader
from shardembed.checkpoint.retention import warn_of
from shardembed.checkpoint.save import finish_pending
from shardembed.checkpoint.snapshot import Job
from shardembed.checkpoint.together import on_first, together
from shardembed.comm.comm import Comm
from shardembed.errors import CheckpointError, NoRoomWarning
from shardembed.journey.journey import Journey

WEIGHTS = ("table", "table_ids", "dense")  # kinds of entries
LEFT_OUT = "weights_only=True loads tables, parameters and buffers, and leaves optimizers, schedulers and counters as they are"


@dataclass(frozen=True)
class Restored:
    """What was loaded.

    Attributes:
        step: of the checkpoint.
        path: its folder.
        progress: what the saver passed.
        random: "restored" where each rank has its own random state again, "reseeded" from it on another number of ranks, None where
            none was asked for.
        world_size: of the job that saved it.
    """

    step: int
    path: Path
    progress: Any
    random: Literal["restored", "reseeded"] | None
    world_size: int


def load_checkpoint(
    folder: str | Path,
    model: nn.Module,
    *,
    optimizer: Any = None,
    scheduler: Any = None,
    extra: Mapping[str, Any] | None = None,
    step: int | None = None,
    rename: Mapping[str, str] | None = None,
    grown: Sequence[str] = (),
    new: Sequence[str] = (),
    dropped: Sequence[str] = (),
    weights_only: bool = False,
    anew: bool = False,
) -> Restored:
    """Load the newest complete checkpoint of `folder` into a model and what trains it, in place. Collective.

    It may have been saved on any number of ranks, under any plan. Each rank reads its own shards only, in pieces that are checked
    against their hashes; no rank holds a whole table, and buffers take 16 MiB. All of a checkpoint must find its place: what the
    model or the call lacks is an error that lists it.

    A dynamic table may have another capacity here. Where buckets are full, its LRU or LFU chooses who is left out, and rank 0 warns
    (`NoRoomWarning`); where nobody leaves (TTL, no eviction) that is an error. Another eviction or admission may need what the
    checkpoint does not have, `TABLE.weight.ids.count` say, which `new` lets begin at 0, or not need what it has, which `dropped`
    leaves out. Ids without a row begin from now on with the seed that the saved table had.

    Args:
        folder: as for `save_checkpoint`, or the folder of one checkpoint.
        optimizer, scheduler, extra: as they were saved; needed where the checkpoint has their state.
        step: this one, rather than the newest.
        rename: names in the checkpoint -> names in the model. Here and below, a name is a key of `state_dict`, a module or table,
            or, but for `rename`, a pattern of such.
        grown: tables that may have more rows here; the additional ones keep their starting values, and zero state.
        new: tensors that the checkpoint does not have; they keep their values.
        dropped: tensors of the checkpoint that are not wanted.
        weights_only: tables, parameters and buffers alone; all else stays as it is. Ids of dynamic tables are then as old as they
            were, as far as the model here has taken steps.
        anew: another training begins, with what this one has learned: tables, parameters, buffers, their optimizers' state, and the
            steps that tables have taken, by which ids age and Adam corrects its means. What a job has decided stays as it is here:
            learning rates and all other settings, the count of skipped steps, schedulers, `extra`, and random states.

    Raises:
        CheckpointError: on every rank: there is no checkpoint, it is damaged (file, tensor and rows are named), of a newer format,
            or it differs from the model (every difference is listed; nothing has been changed then). After damage the model is
            partly loaded: load another checkpoint before training on. Gradients that wait for a step are dropped.
    """
    finish_pending()
    job = Job.of(model, optimizer, scheduler, extra)
    comm = job.comm()
    held = take(job.model, comm.rank, comm.world_size)
    wishes = Wishes(dict(rename or {}), tuple(grown), tuple(new), tuple(dropped))
    path = Path(on_first(comm, "choose a checkpoint", lambda: str(folders.chosen(folder, step))))
    with ExitStack() as stack:
        readers: list[Reader] = []

        def opened() -> str:
            readers.append(stack.enter_context(Reader(path)))
            return readers[0].manifest.checksum

        _agree(together(comm, "read the manifest", opened, long=True), path)
        loading = _Loading(job, held, comm, readers[0], wishes, weights_only, anew)
        # Changes nothing yet: a checkpoint of another model leaves this one as it was.
        left = together(comm, "compare with the model", loading.compare)
        tracking.stop(held)
        together(comm, "read", loading.copy, long=True)
        together(comm, "restore", loading.restore)
        manifest = readers[0].manifest
        tracking.came_from(job.model, path)
        if comm.rank == 0:
            warn_of(path, manifest.nonfinite)
            _warn_of_left(path, [json.loads(text) for text in left])
        return Restored(manifest.step, path, loading.progress, loading.random, manifest.world_size)


def _agree(checksums: Sequence[str], path: Path) -> None:
    if len(set(checksums)) > 1:
        raise CheckpointError(
            f"{path}: ranks read different manifests here ({', '.join(checksums)}); all ranks need one file system"
        )


def _warn_of_left(path: Path, left: Sequence[Mapping[str, int]]) -> None:
    """Say how many ids of which tables have no row here; `left` is what each rank has of it."""
    for key in sorted({key for one in left for key in one}):
        if count := sum(one.get(key, 0) for one in left):
            text = f"{path}: {count:,} ids of {key!r} found their buckets full here and are left out, as its eviction chooses"
            warnings.warn(f"{text}; with more num_embeddings there is room for them", NoRoomWarning, stacklevel=3)


class _Loading:
    """One rank's way through a load."""

    def __init__(
        self, job: Job, held: Inventory, comm: Comm, reader: Reader, wishes: Wishes, weights_only: bool, anew: bool
    ) -> None:
        self.job, self.held, self.comm, self.reader, self.wishes = job, held, comm, reader, wishes
        self.weights_only, self.anew = weights_only, anew
        self.dense = None if weights_only else optimizing.dense_of(job.optimizer)
        self.small: dict[str, Any] = {}
        self.progress: Any = None
        self.random: Literal["restored", "reseeded"] | None = None
        self._sources: dict[str, str] = {}
        self._arrivals: dict[Members, Arrival] = {}
        self._items = dict(held.items)
        self._owned: list[list[optimizing.Owner]] = []
        self._states: list[tuple[optimizing.Owner, str, Any]] = []

    def compare(self) -> str:
        """Find out all that does not fit. Changes nothing."""
        entries = self.reader.manifest.entries
        misfits: list[str] = []
        self.wishes.check(entries, self._items)
        self.small = self._renamed(self.reader.small)
        if self.weights_only:
            self._items = {key: item for key, item in self._items.items() if item.kind in WEIGHTS}
            entries = {key: entry for key, entry in entries.items() if entry.kind in WEIGHTS}
        elif self.dense is not None:
            self._owned = optimizing.owners(self.job.model, self.held, self.dense)
            misfits, unmade = self._make_states(self.dense)
            entries = {key: entry for key, entry in entries.items() if key not in unmade}
        else:  # said below, once
            entries = {key: entry for key, entry in entries.items() if entry.kind != "dense_state"}
        if not self.weights_only and not self.anew and len(self.small["random"]) == self.comm.world_size:
            chance.checked(self.small["random"][self.comm.rank])  # before anything is changed
        self._sources, lines = match(entries, self._items, self.wishes)
        if not self.weights_only:
            lines += misfits + self._lacking()
        if not lines:
            self._arrivals, lines = self._coming()
        if lines:
            raise CheckpointError(
                f"{self.reader.path}: this is a checkpoint of another model; they differ in\n{listing(lines)}\n{LEFT_OUT}"
            )
        return json.dumps({key: arrival.left for key, arrival in self._of_tables()})

    def _coming(self) -> tuple[dict[Members, Arrival], list[str]]:
        """Who comes to dynamic tables, and who finds no place where nobody leaves: a line each."""
        found = self.reader.arrivals([(self._items[key], source) for key, source in self._sources.items()])
        lines = [
            f"{table.key!r}: {found[members].left} of its ids on this rank find no place in the {table.config.num_embeddings} rows "
            f"of the model, and nobody leaves (eviction={table.config.dynamic.eviction!r}): give it more"
            for table in self.held.tables.values()
            for members in self._members(table.key)
            if members in found and found[members].left and not members.census.policy.evicts and table.config.dynamic is not None
        ]
        for key in self._sources:  # those who were counted before belong to rows that are no more
            absent = self._members(f"{key}.candidates.last")
            found |= {members: Arrival.nobody(members) for members in absent if members not in found}
        return found, lines

    def _members(self, key: str) -> list[Members]:
        return [region.members for region in self._items[key].living] if key in self._items else []

    def _of_tables(self) -> list[tuple[str, Arrival]]:
        """Of each dynamic table that is loaded and has its first columns here, who comes."""
        firsts = [
            (key, region.members)
            for key in self._sources
            if self._items[key].kind == "table"
            for region in self._items[key].living
            if region.columns.start == 0
        ]
        return [(key, self._arrivals[members]) for key, members in firsts]

    def _renamed(self, small: dict[str, Any]) -> dict[str, Any]:
        """Small state with the keys of the model."""
        renamed = self.wishes.renamed
        optimizer = small["optimizer"]
        groups = [{**group, "of": sorted(map(renamed, group["of"]))} for group in optimizer["groups"]]
        tables = {renamed(key): value for key, value in optimizer["tables"].items()}
        by_key = {name: {renamed(key): value for key, value in small[name].items()} for name in ("steps", "scalars")}
        return {**small, **by_key, "optimizer": {**optimizer, "groups": groups, "tables": tables}}

    def _make_states(self, dense: torch.optim.Optimizer) -> tuple[list[str], set[str]]:
        """Tensors for the saved state of the dense optimizer, which makes its own only in its first step. Their sizes are a
        stranger's word, so they are held against the parameters and against the files before there is any memory for them.
        Where they do not fit, none is made: why, a line each, and the keys of the entries that stay without a tensor.
        """
        by_weight: dict[str, list[tuple[str, Any]]] = {}
        for key, entry in self.reader.manifest.entries.items():
            if entry.kind in ("dense_state", "table_state") and self.wishes.renamed(key) not in self.held.items:
                by_weight.setdefault(self.wishes.renamed(entry.of), []).append((key[len(entry.of) + 1 :], entry))
        saved = [
            optimizing.Saved(owner, group, name, entry, self.reader.manifest.entries[entry.of])
            for group, owned in zip(dense.param_groups, self._owned, strict=True)
            for owner in owned
            for name, entry in by_weight.get(owner.key, [])
        ]
        lines = optimizing.misfits(saved, dense) + optimizing.misfit_scalars(self.small["scalars"], self._owned, dense)
        if not lines:
            self.reader.check_files([one.entry.key for one in saved])
            self._states = [one.make() for one in saved]
            self._items.update(optimizing.items_of(self._states, self.held, self.comm))
        return lines, {one.entry.key for one in saved} if lines else set()

    def _lacking(self) -> list[str]:
        """What the checkpoint has state of and the call does not name, and the other way round."""
        fresh = {key for key in self.held.items if fits(self.wishes.new, key)}
        optimizer = self.small["optimizer"]
        kept = [
            {**group, "of": [key for key in group["of"] if not fits(self.wishes.dropped, key)]} for group in optimizer["groups"]
        ]
        saved = {**optimizer, "groups": kept}
        lines = optimizing.differences(saved, self.dense, self._owned, self.held, fresh)
        if self.small["has_optimizer"] != (self.job.optimizer is not None) and not lines and not self.anew:
            had, has = ("with", "without") if self.small["has_optimizer"] else ("without", "with")
            lines.append(f"it was saved {had} optimizer= and is loaded {has} it: learning rates would be lost")
        if self.anew:
            return lines
        then, now = set(self.small["stateful"]), set(self.job.stateful())
        lines += [f"the checkpoint has the state of {name}, which was not passed" for name in sorted(then - now)]
        lines += [f"{name} was passed, and the checkpoint has no state of it" for name in sorted(now - then)]
        return lines

    def copy(self) -> str:
        """Read the rows of every shard that lies here."""
        for arrival in self._arrivals.values():
            arrival.seat()
        self.reader.copy([(self._items[key], source) for key, source in self._sources.items()], self._arrivals)
        return ""

    def restore(self) -> str:
        """Small state, when all tensors have been loaded."""
        self._restore_model()
        journeys = {id(table.journey): table.journey for table in self.held.tables.values()}.values()
        for journey in journeys:
            journey.drop()  # gradients of other weights
        if not self.weights_only:
            self._restore_training(journeys)
        for arrival in self._arrivals.values():
            arrival.keep_ages()
        return ""

    def _restore_training(self, journeys: Iterable[Journey]) -> None:
        steps = self.small["steps"]
        for journey in journeys:
            own = {key: table for key, table in self.held.tables.items() if table.journey is journey}
            # A table that is new here has taken none, so that Adam corrects its means as those of a first step.
            taken = {table.name: steps.get(key, 0) for key, table in own.items() if key in steps or fits(self.wishes.new, key)}
            journey.restore_steps(taken)
        self._restore_optimizer()
        if self.anew:
            return
        for name, one in self.job.stateful().items():
            one.load_state_dict(decode(self.small["stateful"][name], name))
        self._restore_random()
        self.progress = decode(self.small["progress"], "progress")

    def _restore_model(self) -> None:
        for key, value in self.small["model"].items():
            module, _, name = key.rpartition(".")
            if key in self.held.plain and name == nn.modules.module._EXTRA_STATE_KEY_SUFFIX:
                self.job.model.get_submodule(module).set_extra_state(decode(value, key))

    def _restore_optimizer(self) -> None:
        if self.job.optimizer is None:
            return
        if self.dense is not None:
            # Not only overwritten: an optimizer may have state of steps that the checkpoint does not know.
            self.dense.state.clear()
            for owner, name, value in self._states:
                self.dense.state[owner.parameter][name] = value
            for owner in (owner for group in self._owned for owner in group):
                for name, value in self.small["scalars"].get(owner.key, {}).items():
                    self.dense.state[owner.parameter][name] = decode(value, f"{owner.key}.{name}")
        if self.small["has_optimizer"] and not self.anew:
            optimizing.restore_groups(self.small["optimizer"], self.job.optimizer, self.held)

    def _restore_random(self) -> None:
        states = self.small["random"]
        if len(states) == self.comm.world_size:
            chance.restore(states[self.comm.rank])
            self.random = "restored"
        else:
            chance.reseed(json.dumps(states[0]), self.comm.rank)
            self.random = "reseeded"
