"""Make up a log of shown advertisements and whether they were clicked, from a logistic model that is known.

    python make_clicks.py clicks.csv [ROWS] [SEED]        or clicks.parquet

Columns: shown_at (ISO 8601), site and advertiser (texts, some sites missing), country, device, tags (texts between bars, or a list
in Parquet), price (from cents to thousands), hour, age (some missing), clicked; and `chance`, what the model gives for a click, for
whoever wants to know how well it could be predicted. Log-odds add up a weight of every text, the mean of the weights of the tags,
and what log(price), the hour and the age do; they rise and fall with the hour and the age, of which a number alone says little.
"""

import sys
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import compute, csv, parquet

TEXTS = (("site", 500, 0.8), ("advertiser", 200, 0.7), ("country", 20, 0.4), ("device", 4, 0.4))  # how many, how much they matter
TAGS, MOST_TAGS = 60, 5
BIAS, MISSING = -1.6, 0.05
DAYS = 10


def make(rows: int, seed: int = 0) -> pa.Table:
    """The log, in the order of time."""
    rng = np.random.default_rng(seed)
    z = np.full(rows, BIAS)
    columns: dict[str, pa.Array] = {}
    began = int(datetime(2026, 3, 1, tzinfo=timezone.utc).timestamp() * 1000)
    moments = np.sort(rng.integers(DAYS * 86_400_000, size=rows)) + began
    columns["shown_at"] = pa.array(moments, pa.timestamp("ms"))
    for name, size, strength in TEXTS:
        values, share = _names(name, size), _shares(size)
        drawn = rng.choice(size, rows, p=share)
        absent = rng.random(rows) < MISSING * (name == "site")
        z += np.where(absent, 0.0, _weights(rng, share, strength)[drawn])
        columns[name] = pa.array(values[drawn], mask=absent)
    share = _shares(TAGS)
    lengths = rng.integers(MOST_TAGS, size=rows, endpoint=True)
    drawn = rng.choice(TAGS, int(lengths.sum()), p=share)
    owner = np.repeat(np.arange(rows), lengths)
    z += np.bincount(owner, _weights(rng, share, 1.5)[drawn], rows) / np.maximum(lengths, 1)
    offsets = np.append(0, np.cumsum(lengths))
    columns["tags"] = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(_names("tag", TAGS)[drawn]))
    price = np.round(np.exp(rng.normal(2.0, 1.5, rows)), 2)
    hour = rng.integers(24, size=rows)
    age, absent = rng.integers(16, 90, size=rows).astype(float), rng.random(rows) < MISSING
    z += -0.4 * (np.log1p(price) - 2.2) + 0.5 * np.sin(2 * np.pi * hour / 24) + np.where(absent, 0.0, 0.6 * np.cos((age - 40) / 12))
    columns |= {"price": pa.array(price), "hour": pa.array(hour), "age": pa.array(age, mask=absent)}
    chance = 1 / (1 + np.exp(-z))
    columns |= {"clicked": pa.array((rng.random(rows) < chance).astype(np.int8)), "chance": pa.array(chance)}
    return pa.table(columns)


def write(table: pa.Table, path: Path) -> None:
    """In the format that the suffix says."""
    if path.suffix == ".parquet":
        parquet.write_table(table, path)
        return
    tags = table["tags"].combine_chunks()
    texts = compute.call_function("binary_join", [tags, "|"])
    csv.write_csv(table.set_column(table.column_names.index("tags"), "tags", texts), path)


def _names(column: str, size: int) -> np.ndarray:
    return np.array([f"{column}-{number:03d}" for number in range(size)])


def _shares(size: int) -> np.ndarray:
    """Popularity by Zipf's law."""
    share = 1 / np.arange(1, size + 1)
    return share / share.sum()


def _weights(rng: np.random.Generator, share: np.ndarray, strength: float) -> np.ndarray:
    """With mean 0 and standard deviation `strength`, as often as each occurs."""
    weights = rng.normal(size=len(share))
    weights -= weights @ share
    return weights * strength / np.sqrt(weights**2 @ share)


if __name__ == "__main__":
    where, *options = sys.argv[1:]
    write(make(*map(int, options or ["200000"])), Path(where))
