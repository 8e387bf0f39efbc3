"""From sources of clicks to what training and evaluation need: counts, vocabularies, a split, and global batches.

    scan         one pass that the ranks share: rows of each part and their fingerprints, the distinct categories
    training     the rows to train on, as they come; like all later passes held to what the scan saw
    held_out     those for the test, or those for evaluations during training where these are others

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
from shardembed.recipes.ctr_config import CtrDataConfig
from shardembed.recipes.data.bad import ENOUGH_DROPPED, NONE, Dropped, refuse_wrong_file
from shardembed.recipes.data.clicks.encode import NumberColumns, looked_up
from shardembed.recipes.data.clicks.moments import Moments
from shardembed.recipes.data.clicks.rows import Clicks, ClickSource, concatenate
from shardembed.recipes.data.clicks.sources import open_sources
from shardembed.recipes.data.clicks.split import CHUNK_ROWS, Split, with_times
from shardembed.recipes.data.fingerprint import FirstPass, Seen, fingerprint_of, held_to
from shardembed.recipes.data.held import TEST, TRAINING, VALIDATION
from shardembed.recipes.data.stream import rechunked, shuffled, shuffler
from shardembed.recipes.data.wanted import MISSING


@dataclass(frozen=True)
class Counted:
    """What a scan found in one source.

    Attributes:
        seen: of each part, what later passes are held to.
        positives: clicks in all of them.
        dropped: what was left out.
        moments: of the numbers as a model takes them.
    """

    seen: tuple[Seen, ...]
    positives: int
    dropped: Dropped = NONE
    moments: Moments | None = field(default=None, compare=False)

    @property
    def total(self) -> int:
        return sum(one.rows for one in self.seen)


@dataclass(frozen=True)
class ClickData:
    """Scanned sources.

    Attributes:
        source: of training.
        test: a source of its own for the test, or None where its rows are split off `source`.
        split: what the rows of `source` are for.
        counted: what the scan found in `source`.
        counted_test: what it found in `test`, if there is one.
        vocabularies: one for each column of ids, of all rows of `source`; empty where there are none.
    """

    source: ClickSource
    test: ClickSource | None
    split: Split
    counted: Counted
    counted_test: Counted | None
    vocabularies: tuple[Vocabulary, ...] = field(default=(), repr=False)

    @property
    def dropped(self) -> Dropped:
        return self.counted.dropped + (self.counted_test.dropped if self.counted_test else NONE)

    @property
    def validates(self) -> bool:
        """Rows are held out for evaluations during training, which have no part in the result."""
        return VALIDATION in self.split.held

    @property
    def training_rows(self) -> int:
        return self.split.counts[TRAINING]

    @property
    def validation_rows(self) -> int:
        """Rows for evaluations during training alone."""
        return self.split.counts[VALIDATION]

    @property
    def test_rows(self) -> int:
        """Rows that the result is of."""
        return self.counted_test.total if self.counted_test is not None else self.split.counts[TEST]

    def training(self) -> Iterator[Clicks]:
        """The rows to train on, in the order of the source.

        Raises:
            DataError: the data are not what they were when they were scanned.
        """
        return self._part(TRAINING)

    def held_out(self, validation: bool = False) -> Iterator[Clicks]:
        """The rows that the result is of, or those for evaluations during training alone, in the order of the source; raises as
        `training`.
        """
        if validation or self.test is None:
            return self._part(VALIDATION if validation else TEST)
        assert self.counted_test is not None
        return _all(self.test, self.counted_test)

    def _part(self, part: int) -> Iterator[Clicks]:
        row = 0
        for clicks in _all(self.source, self.counted):
            yield clicks[self.split.of(row, clicks) == part]
            row += len(clicks)

    def batches(self, batch_size: int, buffer_rows: int, seed: int, epoch: int) -> Iterator[Clicks]:
        """The global batches of one epoch of training."""
        mixed = shuffled(self.training(), buffer_rows, shuffler(seed, epoch), concatenate)
        return rechunked(mixed, batch_size, concatenate)

    def held_batches(self, batch_size: int, validation: bool = False) -> Iterator[Clicks]:
        """What is `held_out`, by so many rows."""
        return rechunked(self.held_out(validation), batch_size, concatenate)

    def held_numbers(self, batch_size: int, validation: bool = False) -> Iterator[np.ndarray]:
        """The row numbers int64 `[b]` of each of `held_batches`: among the good rows of the source that they come from, from 0 over
        all of its parts, as the split counts them.
        """
        waiting, first = np.empty(0, np.int64), 0
        for held in self._held(validation):
            waiting = np.concatenate([waiting, first + np.flatnonzero(held)])
            first += len(held)
            whole = len(waiting) // batch_size * batch_size
            for start in range(0, whole, batch_size):
                yield waiting[start : start + batch_size]
            waiting = waiting[whole:]
        if len(waiting):
            yield waiting

    def _held(self, validation: bool) -> Iterator[np.ndarray]:
        """Whether rows are among those held out, bool, chunk after chunk of the source that those come from."""
        if self.counted_test is not None and not validation:
            yield from (np.ones(count, bool) for _, count in _chunked(self.counted_test.total))
            return
        part = VALIDATION if validation else TEST
        if not self.split.by_time:
            yield from (self.split.of_numbers(first, count) == part for first, count in _chunked(self.counted.total))
            return
        row = 0  # and only reading them tells
        for clicks in _all(self.source, self.counted):
            yield self.split.of(row, clicks) == part
            row += len(clicks)

    def describe(self) -> str:
        """What the data are known by: hardly any other data have the same."""
        parts = [self.counted, *([self.counted_test] if self.counted_test else [])]
        return "; ".join(
            f"{one.total} rows, {one.positives} of them clicks, in the order {fingerprint_of(one.seen)}" for one in parts
        )


def scan(config: CtrDataConfig, comm: Comm) -> ClickData:
    """Count rows and, where they are asked for, build vocabularies; each rank reads its share of the parts. Collective.

    Raises:
        DataError: on all ranks: a source cannot be read on one of them, or holds no rows, or mostly bad ones.
    """
    source = other = None
    first = _FirstReading(config, comm)
    mine: dict[str, object] = {}
    try:
        source, other = open_sources(config)
        mine = {"found": [first.of(source, trained_on=True), *([first.of(other, trained_on=False)] if other is not None else [])]}
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
        _refuse(one, found)
    ids, total = config.ids, counted[0].total
    vocabularies = tuple(counts.merged(comm).vocabulary(ids.min_count, ids.max_size) for counts in first.values.values())
    split = Split.asked(config, total)
    split = with_times(split, np.concatenate(first.times), comm) if split.by_time else split
    data = ClickData(source, other, split, counted[0], counted[1] if other is not None else None, vocabularies)
    _refuse_empty_parts(data)
    return data


def _refuse_empty_parts(data: ClickData) -> None:
    split, name = data.split, data.source.name
    if not data.training_rows:
        together = "rows of one moment stay together; " if split.by_time else ""
        raise DataError(f"{name}: {together}all rows are held out, none is left to train on; make data.split.fraction smaller")
    for part, rows in (("validation", data.validation_rows), ("the test", data.test_rows)):
        if data.validates and not rows:
            raise DataError(f"{name}: of {split.total:,} rows none is for {part}; make data.split.fraction larger")


class _FirstReading:
    """What this rank sees of the parts that it reads.

    Attributes:
        values: of each column that gets a vocabulary, how often its ids occur.
        times: of all rows of the source that is trained on, where they are split by time.
    """

    def __init__(self, config: CtrDataConfig, comm: Comm) -> None:
        self._config, self._comm = config, comm
        self._numbers = NumberColumns.of(config)
        self.values = {name: Counts() for name in looked_up(config)} if config.ids.kind == "vocabulary" else {}
        self.times = [np.empty(0, np.int64)]

    def of(self, source: ClickSource, trained_on: bool) -> dict[str, object]:
        seen: list[tuple] = []  # a part, and what was seen of it
        rows, positives, dropped = 0, 0, NONE
        for part in range(self._comm.rank, len(source.parts), self._comm.world_size):
            first, moments = FirstPass(), Moments.none(len(self._numbers.columns))
            for clicks in source.chunks(part):
                first.see(clicks)
                rows += len(clicks)
                dropped += clicks.dropped
                if len(dropped) > max(ENOUGH_DROPPED, rows):
                    break  # the wrong file: `refuse_wrong_file` says so
                positives += int(clicks.labels.sum())
                if trained_on:
                    moments += self._look(clicks)
            seen.append((part, first.seen.to_json(), moments.to_json()))
        return {"seen": seen, "positives": positives, "kinds": dropped.kinds, "places": dropped.places}

    def _look(self, clicks: Clicks) -> Moments:
        if self.values:
            columns = iter([*clicks.ids.T, *(column.values for column in clicks.lists)])
            ids = {one.name: next(columns) for kind in ("id", "ids") for one in self._config.columns if one.kind == kind}
            for name, counts in self.values.items():
                counts.add(ids[name][ids[name] != MISSING])
        if clicks.times is not None and Split.asked(self._config, 0).by_time:
            self.times.append(clicks.times)
        return Moments.of(self._numbers(clicks.numbers))


def _joined(told: list[dict]) -> Counted:
    parts = {part: (Seen.from_json(seen), Moments.from_json(moments)) for one in told for part, seen, moments in one["seen"]}
    dropped = sum((Dropped(one["kinds"], tuple(one["places"])) for one in told), NONE)
    in_order = [parts[part] for part in sorted(parts)]
    moments = [moments for _, moments in in_order]
    return Counted(
        tuple(seen for seen, _ in in_order),
        sum(one["positives"] for one in told),
        dropped,
        sum(moments[1:], moments[0]) if moments else None,
    )


def _refuse(source: ClickSource, counted: Counted) -> None:
    refuse_wrong_file(source.name, counted.total, counted.dropped, "click")
    if not counted.total:
        raise DataError(f"{source.name}: there are no rows in it")


def _all(source: ClickSource, counted: Counted) -> Iterator[Clicks]:
    for part, (seen, name) in enumerate(zip(counted.seen, source.parts, strict=True)):
        yield from held_to(seen, partial(source.chunks, part), name, concatenate)


def _chunked(total: int) -> Iterator[tuple[int, int]]:
    """Of rows numbered from 0 the first one and the number of those that are looked at together."""
    return ((first, min(CHUNK_ROWS, total - first)) for first in range(0, total, CHUNK_ROWS))
