"""From sources of clicks to what training and evaluation need: counts, vocabularies, a split, and global batches.

    scan         one pass that the ranks share: rows of each part and their fingerprints, the distinct categories
    training     the rows to train on, as they come; like all later passes held to what the scan saw
    validation   the others

Which rows a global batch holds depends on the data and the seed alone. Every rank reads the whole stream of an epoch and keeps its
part of each batch; memory is O(shuffle buffer). Row numbers count good rows over all parts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from shardembed.comm.comm import Comm
from shardembed.errors import DataError, ShardEmbedError, rebuild, travels
from shardembed.inputs.vocab import Counts, Vocabulary
from shardembed.recipes.ctr_config import CtrDataConfig, SplitConfig
from shardembed.recipes.data.bad import NONE, Dropped
from shardembed.recipes.data.criteo.planted import PlantedClicks
from shardembed.recipes.data.criteo.rows import MISSING, Clicks, ClickSource, Schema, concatenate
from shardembed.recipes.data.fingerprint import FirstPass, Seen, fingerprint_of, held_to
from shardembed.recipes.data.stream import hash_rows, rechunked, shuffled, shuffler

CHUNK_ROWS = 1 << 15  # whose split is worked out at once
ENOUGH_DROPPED = 100_000


@dataclass(frozen=True)
class Counted:
    """What a scan found in one source.

    Attributes:
        seen: of each part, what later passes are held to.
        positives: clicks in all of them.
        dropped: what was left out.
    """

    seen: tuple[Seen, ...]
    positives: int
    dropped: Dropped = NONE

    @property
    def total(self) -> int:
        return sum(one.rows for one in self.seen)


@dataclass(frozen=True)
class ClickData:
    """Scanned sources.

    Attributes:
        source: of training.
        validation: a source of its own, or None where rows of `source` are split off.
        split: how they are.
        counted: what the scan found in `source`.
        counted_validation: what it found in `validation`, if there is one.
        vocabularies: one a category, of all rows of `source`; empty where categories are hashed.
    """

    source: ClickSource
    validation: ClickSource | None
    split: SplitConfig
    counted: Counted
    counted_validation: Counted | None
    vocabularies: tuple[Vocabulary, ...] = field(default=(), repr=False)

    @property
    def dropped(self) -> Dropped:
        return self.counted.dropped + (self.counted_validation.dropped if self.counted_validation else NONE)

    @property
    def training_rows(self) -> int:
        return self.counted.total - (0 if self.validation is not None else self._held_out)

    @property
    def validation_rows(self) -> int:
        return self.counted_validation.total if self.counted_validation is not None else self._held_out

    @property
    def _held_out(self) -> int:
        total = self.counted.total
        if self.split.kind == "last":
            return total - self._first_last
        return sum(int(self._held(first, min(CHUNK_ROWS, total - first)).sum()) for first in range(0, total, CHUNK_ROWS))

    @property
    def _first_last(self) -> int:
        return self.counted.total - round(self.counted.total * self.split.fraction)

    def _held(self, first: int, count: int) -> np.ndarray:
        """Which of the rows from `first` on are for validation: bool `[count]`."""
        if self.split.kind == "last":
            return np.arange(first, first + count) >= self._first_last
        # The upper 53 bits as a number from 0 to 1: exact, whatever the fraction.
        return (hash_rows(self.split.seed, first, count) >> np.uint64(11)).astype(np.float64) < self.split.fraction * 2.0**53

    def training(self) -> Iterator[Clicks]:
        """The rows to train on, in the order of the source.

        Raises:
            DataError: the data are not what they were when they were scanned.
        """
        return _all(self.source, self.counted) if self.validation is not None else self._part(held=False)

    def held_out(self) -> Iterator[Clicks]:
        """The rows for validation, in the order of the source; raises as `training`."""
        if self.validation is None:
            return self._part(held=True)
        assert self.counted_validation is not None
        return _all(self.validation, self.counted_validation)

    def _part(self, held: bool) -> Iterator[Clicks]:
        row = 0
        for clicks in _all(self.source, self.counted):
            yield clicks[self._held(row, len(clicks)) == held]
            row += len(clicks)

    def batches(self, batch_size: int, buffer_rows: int, seed: int, epoch: int) -> Iterator[Clicks]:
        """The global batches of one epoch of training."""
        mixed = shuffled(self.training(), buffer_rows, shuffler(seed, epoch), concatenate)
        return rechunked(mixed, batch_size, concatenate)

    def validation_batches(self, batch_size: int) -> Iterator[Clicks]:
        return rechunked(self.held_out(), batch_size, concatenate)

    def validation_numbers(self, batch_size: int) -> Iterator[np.ndarray]:
        """The row numbers int64 `[b]` of each of `validation_batches`: among the good rows of the source that they come from, from
        0 over all of its parts, as the split counts them.
        """
        total = self.counted.total if self.counted_validation is None else self.counted_validation.total
        waiting = np.empty(0, np.int64)
        for first in range(0, total, CHUNK_ROWS):
            count = min(CHUNK_ROWS, total - first)
            picked = np.arange(count) if self.validation is not None else np.flatnonzero(self._held(first, count))
            waiting = np.concatenate([waiting, first + picked])
            whole = len(waiting) // batch_size * batch_size
            for start in range(0, whole, batch_size):
                yield waiting[start : start + batch_size]
            waiting = waiting[whole:]
        if len(waiting):
            yield waiting

    def describe(self) -> str:
        """What the data are known by: hardly any other data have the same."""
        parts = [self.counted, *([self.counted_validation] if self.counted_validation else [])]
        return "; ".join(
            f"{one.total} rows, {one.positives} of them clicks, in the order {fingerprint_of(one.seen)}" for one in parts
        )


def open_sources(config: CtrDataConfig) -> tuple[ClickSource, ClickSource | None]:
    """The source that the settings ask for, and the one for validation where it is another.

    Raises:
        DataError: a file or a column is missing.
    """
    schema = Schema.of(config)
    if config.path is None:
        return PlantedClicks(config.generator, schema), None
    from shardembed.recipes.data.criteo.files import ClickFiles  # pyarrow is asked for only here

    skip = config.on_bad_row == "skip"
    source = ClickFiles(config.path, schema, skip)
    other = ClickFiles(config.validation_path, schema, skip, "data.validation_path") if config.validation_path else None
    return source, other


def scan(config: CtrDataConfig, comm: Comm) -> ClickData:
    """Count rows and, where they are asked for, build vocabularies; each rank reads its share of the parts. Collective.

    Raises:
        DataError: on all ranks: a source cannot be read on one of them, or holds no rows, or mostly bad ones.
    """
    source = other = None
    values: list[Counts] = []
    mine: dict[str, object] = {}
    try:
        source, other = open_sources(config)
        values = [Counts() for _ in config.categories] if config.ids.kind == "vocabulary" else []
        mine = {"found": [_scan_parts(one, comm, values * (one is source)) for one in (source, other) if one is not None]}
    except ShardEmbedError as error:
        mine = {"error": travels(error)}
    told = [json.loads(text) for text in comm.gather_texts("control", "scan the data", json.dumps(mine))]
    failed = [one["error"] for one in told if "error" in one]
    if failed:
        raise rebuild(*failed[0])
    assert source is not None
    counted = [_joined([one["found"][place] for one in told]) for place in range(1 + (other is not None))]
    for one, found in zip((source, other), counted, strict=False):
        assert one is not None
        _refuse_wrong_file(one, found)
    ids = config.ids
    vocabularies = tuple(counts.merged(comm).vocabulary(ids.min_count, ids.max_size) for counts in values)
    data = ClickData(source, other, config.split, counted[0], counted[1] if other is not None else None, vocabularies)
    if not data.training_rows:
        raise DataError(f"{source.name}: all rows are for validation, none is left to train on; make data.split.fraction smaller")
    return data


def _scan_parts(source: ClickSource, comm: Comm, values: list[Counts]) -> dict[str, object]:
    seen: list[tuple[int, int, str]] = []  # a part, and what was seen of it
    rows, positives, dropped = 0, 0, NONE
    for part in range(comm.rank, len(source.parts), comm.world_size):
        first = FirstPass()
        for clicks in source.chunks(part):
            first.see(clicks)
            rows += len(clicks)
            dropped += clicks.dropped
            if len(dropped) > max(ENOUGH_DROPPED, rows):
                break  # the wrong file: `_refuse_wrong_file` says so
            positives += int(clicks.labels.sum())
            for place, counts in enumerate(values):
                column = clicks.categories[:, place]
                counts.add(column[column != MISSING])
        seen.append((part, *first.seen.to_json()))
    return {"seen": seen, "positives": positives, "kinds": dropped.kinds, "places": dropped.places}


def _joined(told: list[dict]) -> Counted:
    seen = {part: Seen.from_json(rest) for one in told for part, *rest in one["seen"]}
    dropped = sum((Dropped(one["kinds"], tuple(one["places"])) for one in told), NONE)
    return Counted(tuple(seen[part] for part in sorted(seen)), sum(one["positives"] for one in told), dropped)


def _refuse_wrong_file(source: ClickSource, counted: Counted) -> None:
    dropped = counted.dropped
    if len(dropped) > counted.total:
        raise DataError(
            f"{source.name}: {len(dropped):,} of {counted.total + len(dropped):,} rows hold no click ({dropped}); is this the "
            f"right file, with the right columns? The first: {dropped.places[0]}"
        )
    if not counted.total:
        raise DataError(f"{source.name}: there are no rows in it")


def _all(source: ClickSource, counted: Counted) -> Iterator[Clicks]:
    for part, (seen, name) in enumerate(zip(counted.seen, source.parts, strict=True)):
        yield from held_to(seen, partial(source.chunks, part), name, concatenate)
