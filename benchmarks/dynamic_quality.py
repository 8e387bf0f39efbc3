"""What dynamic tables are worth in quality: clicks on ids that come and go, ten times more of them than rows.

    python -m benchmarks.dynamic_quality [--markdown PATH]

An id has a weight of its own, a time in which it is about, and a popularity by Zipf's law among those about. A click has
probability sigmoid(bias + sum of the weights of its ids), so what there is to learn is the ids alone, and a row that two of them
share, or that somebody who is gone has left behind, costs what it should. Each prediction is made before its batch is learnt from.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import shardembed as se
from benchmarks import pages
from shardembed.comm.comm import Comm
from shardembed.inputs.hashing import mix
from shardembed.recipes.ctr_metrics import auc

MODULE = "benchmarks.dynamic_quality"
FEATURES = ("user", "item")
ROWS, TIMES, DIM = 1024, 10, 8  # of a table: rows, ids for each of them, columns
STEPS, BATCH, WARM = 1000, 512, 250  # steps in all, samples of each, steps that are not judged
ABOUT = 0.1  # of all steps, that an id is about: as many ids as rows at a time
ZIPF, STRENGTH, BIAS = 1.0, 1.2, -1.0
SEEDS = (0, 1, 2)
MAP_BYTES = 32  # of a row: its place in the map, its id, count and last step
TARGET = 0.002


@dataclass(frozen=True)
class Stream:
    """Clicks of one seed: ids int64 `[steps, features, batch]`, labels and true log-odds float32 `[steps, batch]`."""

    ids: np.ndarray
    labels: np.ndarray
    logits: np.ndarray

    @staticmethod
    def of(seed: int, steps: int = STEPS) -> Stream:
        rng = np.random.default_rng(seed)
        columns = [_column(rng, place, steps) for place in range(len(FEATURES))]
        ids, weights = (np.stack([column[part] for column in columns], 1) for part in (0, 1))
        logits = (BIAS + weights.sum(1)).astype(np.float32)
        labels = (rng.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(np.float32)
        return Stream(ids, labels, logits)


def _column(rng: np.random.Generator, place: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """A feature's ids, and the weight of each."""
    count, life = ROWS * TIMES, ABOUT * steps
    # Some are about when it begins, so that as many are at any time.
    born = rng.uniform(-life, steps, count)
    popular = rng.integers(1, ROWS + 1, count) ** -ZIPF
    weights = rng.normal(0, STRENGTH / np.sqrt(len(FEATURES)), count)
    values = mix(np.arange(count, dtype=np.uint64) + np.uint64(place << 32)).view(np.int64)
    drawn = np.empty((steps, BATCH), np.int64)
    for step in range(steps):
        about = np.flatnonzero((born <= step) & (step < born + life))
        reached = np.cumsum(popular[about])
        drawn[step] = about[np.searchsorted(reached, rng.random(BATCH) * reached[-1], side="right").clip(max=len(about) - 1)]
    return values[drawn], weights[drawn]


@dataclass(frozen=True)
class Contender:
    """A way to give ids rows.

    Attributes:
        name: in the page.
        rows: of a table; None: as many as come.
        dynamic: of tables; None: ids share rows by id modulo rows.
    """

    name: str
    rows: int | None
    dynamic: se.Dynamic | None = None

    def tables(self) -> list[se.TableConfig]:
        init = se.Normal(0.0, 0.01)
        return [se.TableConfig(name, self.rows, DIM, pooling=None, init=init, dynamic=self.dynamic) for name in FEATURES]

    def ids(self, given: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(given if self.dynamic is not None else given % self.rows)


UNLIMITED, HASHED = "no limit", "hashed, as many rows"
ROW_BYTES = 4 * (DIM + 1)  # weights and rowwise Adagrad's state
CONTENDERS = (
    Contender(UNLIMITED, None, se.Dynamic()),
    Contender("LRU", ROWS, se.Dynamic(se.LRU())),
    Contender("LFU(halve_every=25)", ROWS, se.Dynamic(se.LFU(25))),
    Contender("LRU, MinCount(2)", ROWS, se.Dynamic(se.LRU(), se.MinCount(2))),
    Contender("LFU(halve_every=25), MinCount(2)", ROWS, se.Dynamic(se.LFU(25), se.MinCount(2))),
    Contender("LFU()", ROWS, se.Dynamic(se.LFU())),
    Contender("nobody leaves", ROWS, se.Dynamic()),
    Contender(HASHED, ROWS),
    Contender("hashed, as many bytes", ROWS * (ROW_BYTES + MAP_BYTES) // ROW_BYTES),
)


class Sum(nn.Module):
    """The log-odds are a weighted sum of what the ids' rows add up to."""

    def __init__(self, contender: Contender, seed: int) -> None:
        super().__init__()
        optimizer = se.optim.RowwiseAdagrad(lr=0.3)
        self.tables = se.EmbeddingCollection(contender.tables(), optimizer=optimizer, seed=seed)
        torch.manual_seed(seed)
        self.head = nn.Linear(DIM, 1)

    def forward(self, ids: dict[str, torch.Tensor]) -> torch.Tensor:
        found = self.tables(ids)
        return self.head(sum(found[name] for name in FEATURES)).squeeze(1)


def predictions(contender: Contender, stream: Stream, seed: int) -> Iterator[torch.Tensor]:
    """The log-odds of each batch, before it is learnt from."""
    model = Sum(contender, seed)
    optimizer = se.Optimizer(model, torch.optim.Adam(model.head.parameters(), 0.01))
    for ids, labels in zip(stream.ids, stream.labels, strict=True):
        found = model({name: contender.ids(column) for name, column in zip(FEATURES, ids, strict=True)})
        yield found.detach()
        F.binary_cross_entropy_with_logits(found, torch.from_numpy(labels)).backward()
        optimizer.step()
        optimizer.zero_grad()


def area(scores: np.ndarray, stream: Stream, warm: int = WARM) -> float:
    """AUC of what comes after the warm-up."""
    labels = stream.labels[warm:].reshape(-1).astype(np.int8)
    return auc(scores[warm:].reshape(-1).astype(np.float32), labels, Comm.of(), torch.device("cpu"))


def measured(seeds: Sequence[int], contenders: Sequence[Contender] = CONTENDERS) -> dict[str, list[float]]:
    """AUC of each contender, one a seed, and of the truth."""
    found: dict[str, list[float]] = {}
    for seed in seeds:
        stream = Stream.of(seed)
        found.setdefault("the truth", []).append(area(stream.logits, stream))
        for contender in contenders:
            began = time.perf_counter()
            scores = torch.stack(list(predictions(contender, stream, seed))).numpy()
            found.setdefault(contender.name, []).append(area(scores, stream))
            print(
                f"seed {seed}: {contender.name}: {found[contender.name][-1]:.4f} in {time.perf_counter() - began:.0f} s", flush=True
            )
    return found


def page(found: dict[str, list[float]]) -> list[str]:
    means = {name: float(np.mean(areas)) for name, areas in found.items()}
    kept = {one.name: means[one.name] for one in CONTENDERS if one.dynamic and one.rows and one.dynamic.eviction}
    best = max(kept, key=lambda name: kept[name])
    behind, ahead = means[UNLIMITED] - kept[best], kept[best] - means[HASHED]
    lines = pages.heading("Quality of dynamic tables", MODULE)
    lines += pages.paragraph(
        f"Two features, {ROWS * TIMES:,} ids of 64 bits each, {ROWS:,} rows a table of {DIM} columns, {STEPS:,} steps of {BATCH}",
        f"clicks. An id is about for {ABOUT:.0%} of the time, some {ROWS:,} are at once, and popularity follows Zipf's law with",
        f"exponent {ZIPF:g}. A prediction is made before its batch is learnt from; AUC is of those after step {WARM}. The truth",
        "predicts with the log-odds that clicks were drawn by. Hashed: id modulo rows in a fixed table, also with the rows that",
        f"the memory of map, ids, counts and last steps would hold ({MAP_BYTES} bytes a row). Rows start by Normal(0, 0.01), and",
        "rowwise Adagrad trains them.",
    )
    rows = [
        [name, f"{means[name]:.4f}", *(f"{one:.4f}" for one in areas), f"{means[name] - means[UNLIMITED]:+.4f}"]
        for name, areas in found.items()
    ]
    seeds = [f"seed {seed}" for seed in SEEDS[: len(rows[0]) - 3]]
    lines += pages.table(["rows go to", "AUC, mean", *seeds, "to no limit"], rows)
    verdict = "reached" if behind <= TARGET else "missed"
    above = [name for name, area in kept.items() if area > means[HASHED]]
    lines += [
        "",
        *pages.paragraph(
            f"**Above hashing into as many rows:** {len(above)} of {len(kept)} evictions; {best} by {ahead:.4f}.",
            f"**Within {TARGET} of tables without a limit:** {verdict}: {best} is {behind:.4f} behind.",
        ),
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="write the page there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = page(measured(SEEDS))
    print("\n".join(lines))
    if options.markdown is not None:
        options.markdown.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
