"""Clicks made up from a model that is known, so that what a trained model reaches can be compared with what can be reached.

    categories   of each column Zipf popularity, and a random 32-bit value for each; some are missing
    integers     rounded log-normal, some missing
    click        with probability 1 / (1 + exp(-z)), where z adds up a bias, a weight for every category, and a weight for every
                 log(1 + integer)

Every weight is random, and all of them are scaled so that z has the standard deviation `strength`. A missing value has weight 0.
Rows come in blocks with a random stream each, so that parts can be made side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path

import numpy as np

from shardembed.inputs.hashing import hash_integers
from shardembed.recipes.ctr_config import PlantedConfig
from shardembed.recipes.data.clicks.rows import Clicks
from shardembed.recipes.data.criteo.schema import Schema
from shardembed.recipes.data.wanted import MISSING

BLOCK_ROWS = 1 << 14
BLOCKS_A_PART = 4
BIAS = -1.2
MISSING_SHARE = 0.05  # of every third category, and of every second integer
COLUMN_STREAM, ROW_STREAM = 1, 2


class PlantedClicks:
    """The clicks of a `PlantedConfig`, the same for the same settings and schema."""

    def __init__(self, config: PlantedConfig, schema: Schema) -> None:
        self._config, self._schema = config, schema

    @property
    def name(self) -> str:
        c = self._config
        return f"generator ({c.rows:,} rows, up to {c.max_cardinality:,} categories a column, Zipf {c.zipf:g}, seed {c.seed})"

    @property
    def parts(self) -> list[str]:
        return [self.name] * max(1, -(-self._config.rows // (BLOCK_ROWS * BLOCKS_A_PART)))

    def chunks(self, part: int) -> Iterator[Clicks]:
        first = part * BLOCKS_A_PART
        for block in range(first, first + BLOCKS_A_PART):
            count = min(BLOCK_ROWS, self._config.rows - block * BLOCK_ROWS)
            if count > 0:
                yield self._block(block, count)

    def probabilities(self, clicks: Clicks) -> np.ndarray:
        """What the generating model gives for rows, float64 `[n]`: no model can know more."""
        z = np.full(len(clicks), BIAS)
        for place, column in enumerate(self._columns):
            z += column.weights_of(clicks.ids[:, place])
        logs = np.log1p(np.nan_to_num(np.maximum(clicks.numbers.astype(np.float64), 0)))
        return 1 / (1 + np.exp(-(z + logs @ self._integer_weights)))

    def _block(self, block: int, count: int) -> Clicks:
        rng = self._stream(ROW_STREAM, block)
        categories = np.empty((count, len(self._columns)), np.int64)
        for place, column in enumerate(self._columns):
            categories[:, place] = column.draw(rng, count)
            if place % 3 == 2:
                categories[rng.random(count) < MISSING_SHARE, place] = MISSING
        integers = np.floor(np.exp(rng.normal(1.0, 1.0, (count, len(self._schema.integers))))).astype(np.float32)
        integers[:, ::2][rng.random((count, integers[:, ::2].shape[1])) < MISSING_SHARE] = np.nan
        clicks = Clicks(np.zeros(count, np.int8), integers, categories)
        labels = (rng.random(count) < self.probabilities(clicks)).astype(np.int8)
        return Clicks(labels, integers, categories)

    @cached_property
    def _columns(self) -> list[_Column]:
        config, count = self._config, len(self._schema.categories)
        sizes = np.round(np.geomspace(3, config.max_cardinality, count)).astype(int) if count > 1 else [config.max_cardinality]
        scale = config.strength / np.sqrt(count + len(self._schema.integers))
        return [_Column(place, int(size), config, scale, self._stream(COLUMN_STREAM, place)) for place, size in enumerate(sizes)]

    @cached_property
    def _integer_weights(self) -> np.ndarray:
        count = len(self._schema.integers)
        rng = self._stream(COLUMN_STREAM, len(self._schema.categories))
        # The standard deviation of log(1 + integer) is about 0.9 here.
        scale = self._config.strength / np.sqrt(count + len(self._schema.categories)) / 0.9
        return rng.choice([-1.0, 1.0], count) * scale

    def _stream(self, kind: int, number: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=np.array([self._config.seed, kind], np.uint64), counter=[0, 0, 0, number]))


class _Column:
    """The categories of one column: their values, popularity and weights."""

    def __init__(self, place: int, size: int, config: PlantedConfig, scale: float, rng: np.random.Generator) -> None:
        hashed = hash_integers(np.arange(size, dtype=np.uint64), (config.seed << 8) + place & (1 << 64) - 1)
        self.values = np.unique((hashed >> np.uint64(32)).astype(np.int64))  # ascending, for `weights_of`
        popularity = np.arange(1, len(self.values) + 1, dtype=np.float64) ** -config.zipf
        rng.shuffle(popularity)
        self.share = popularity / popularity.sum()
        self._cumulated = np.cumsum(self.share)
        weights = rng.normal(size=len(self.values))
        weights -= weights @ self.share
        self.weights = weights * scale / max(float(np.sqrt(weights**2 @ self.share)), 1e-9)

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        drawn = np.searchsorted(self._cumulated, rng.random(count), side="right")
        return self.values[np.minimum(drawn, len(self.values) - 1)]

    def weights_of(self, values: np.ndarray) -> np.ndarray:
        places = np.minimum(np.searchsorted(self.values, values), len(self.values) - 1)
        return np.where(self.values[places] == values, self.weights[places], 0.0)


def write(path: Path, chunks: Iterable[Clicks], schema: Schema) -> int:
    """Write rows in the layout that the suffix asks for: .parquet or .pq, else text, compressed for .gz. Returns how many."""
    import pyarrow as pa
    from pyarrow import csv, parquet

    types = [pa.int8(), *[pa.int32()] * len(schema.integers), *[pa.string()] * len(schema.categories)]
    layout, rows = pa.schema(list(zip(schema.names, types, strict=True))), 0
    with ExitStack() as stack:
        if path.suffix.lower() in (".parquet", ".pq"):
            writer = stack.enter_context(parquet.ParquetWriter(path, layout))
        else:
            stream = stack.enter_context(pa.output_stream(str(path), compression="gzip" if path.suffix == ".gz" else None))
            options = csv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")
            writer = stack.enter_context(csv.CSVWriter(stream, layout, write_options=options))
        for clicks in chunks:
            integers = [pa.array(np.nan_to_num(column).astype(np.int32), mask=np.isnan(column)) for column in clicks.numbers.T]
            columns = [pa.array(clicks.labels), *integers, *map(_hex, clicks.ids.T)]
            writer.write_batch(pa.record_batch(columns, schema=layout))
            rows += len(clicks)
    return rows


def _hex(column: np.ndarray):  # -> pyarrow.StringArray, which is imported only when it is needed
    import pyarrow as pa

    distinct, places = np.unique(column, return_inverse=True)
    texts = pa.array([None if value == MISSING else f"{value:08x}" for value in distinct.tolist()], pa.string())
    return texts.take(pa.array(places.reshape(-1)))
