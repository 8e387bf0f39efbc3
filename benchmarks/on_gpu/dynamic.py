"""Dynamic tables: which ids live, and what they have learned, as on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch

import shardembed as se
from benchmarks.launches import as_on_a_device
from benchmarks.on_gpu.check import Here

CPU = torch.device("cpu")
STEPS, DIM = 6, 16
ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # makes ids of all 64 bits of small numbers
SETTINGS = {
    "no limit": (None, se.Dynamic()),
    "LRU": (2_000, se.Dynamic(eviction=se.LRU())),
    "LFU, halved, after two": (2_000, se.Dynamic(eviction=se.LFU(halve_every=2), admission=se.MinCount(2))),
    "TTL": (None, se.Dynamic(eviction=se.TTL(2), unknown="zeros")),
}


@dataclass(frozen=True)
class Trained:
    """What came of some steps.

    Attributes:
        ids: that live, ascending. rows: what evaluation reads of all ids there have been.
        tally: what became of ids.
    """

    ids: torch.Tensor
    rows: torch.Tensor
    tally: object


def train(device: torch.device, kernel: str, limit: int | None, dynamic: se.Dynamic, samples: int) -> Trained:
    table = se.TableConfig("t", limit, DIM, ["bags", "list"], {"bags": "sum", "list": None}, dynamic=dynamic)
    dense = se.TableConfig("d", 500, DIM)
    emb = se.EmbeddingCollection(
        [table, dense],
        optimizer=se.optim.RowwiseAdagrad(0.1),
        plan={"t": se.row_wise(), "d": se.row_wise()},
        device=device,
        kernel=kernel,  # pyright: ignore[reportArgumentType]
    )
    optimizer, numbers = se.Optimizer(emb), 40 * samples
    for step in range(STEPS):
        seed = torch.Generator().manual_seed(step)
        drawn = (numbers ** torch.rand(samples, 5, generator=seed)).long() + 20 * step  # old ids stay away
        batch = {"bags": drawn * ODD, "list": drawn[:, 0] * ODD, "d": torch.randint(500, (samples, 3), generator=seed)}
        found = emb({name: ids.to(device) for name, ids in batch.items()})
        torch.stack([output.square().sum() for output in found.values()]).sum().backward()
        optimizer.step()
    everybody = torch.arange(numbers + 20 * STEPS) * ODD
    with torch.no_grad():
        rows = emb({"bags": everybody[:0].view(0, 1), "list": everybody.to(device), "d": everybody[:0].view(0, 1)})["list"]
    (keys,) = (slab.dynamic for slab in emb.journey.slabs if slab.dynamic is not None)
    ids = keys.census.ids_S[keys.census.living(keys.steps)].sort().values
    return Trained(ids.cpu(), rows.cpu(), keys.tally)


def dynamic(here: Here) -> Iterator[str]:
    """The same ids, and rows that differ by the order of sums alone."""
    samples = 20 if here.small else 2_000
    for name, (limit, settings) in SETTINGS.items():
        limit = limit if limit is None or not here.small else limit // 10
        wanted = train(CPU, "reference", limit, settings, samples)
        with as_on_a_device() if here.small else nullcontext():
            found = train(here.device, "triton", limit, settings, samples)
        far = float((found.rows - wanted.rows).abs().max())
        yield f"{name}: {len(wanted.ids):,} ids live, rows differ from the CPU's by {far:.2g} at most; {wanted.tally}"
        assert torch.equal(found.ids, wanted.ids), f"{name}: other ids live than on the CPU"
        assert found.tally == wanted.tally, f"{name}: {found.tally}"
        assert far < 1e-3, f"{name}: rows differ by {far:.3g}"
