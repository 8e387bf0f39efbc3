"""Deterministic mode: after some steps the same ids live, with the same counts and the same bits, whatever the plan, the ranks,
whether ids are sent ahead, and however the occurrences of a step fall into micro-batches.
"""

from __future__ import annotations

import hashlib
from itertools import product
from typing import Any

import pytest
import torch

import shardembed as se
from tests.amount import sample_of
from tests.harness import run_ranks
from tests.ranks.dynamic import CROWD, FEATURES

SAMPLES, STEPS, COLUMNS = 8, 8, 8
PLANS: dict[str, se.Placement] = {
    "row_wise": se.row_wise(packing="unique"),
    "row_wise bag": se.row_wise(packing="bag"),
    "blocks": se.row_wise(strided=False, packing="bag"),
    "from one": se.row_wise([0], strided=False),
    "column_wise": se.column_wise(packing="unique"),
    "column_wise bag": se.column_wise(packing="bag"),
    "grid": se.grid(4),
    "grid bag": se.grid(4, strided=False, packing="bag"),
    "table_wise": se.table_wise(0),
    "table_wise bag": se.table_wise(0, packing="bag"),
    "table_row_wise": se.table_row_wise(0, packing="bag"),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "lru": {"num_embeddings": 300, "dynamic": se.Dynamic(se.LRU())},
    "lfu": {"num_embeddings": 256, "dynamic": se.Dynamic(se.LFU(halve_every=3), se.Probability(0.8)), "padding_idx": CROWD[7]},
    "ttl": {"num_embeddings": 400, "dynamic": se.Dynamic(se.TTL(2), se.MinCount(2)), "scale_grad_by_freq": True},
    "full": {"num_embeddings": 256, "dynamic": se.Dynamic(None, se.MinCount(2), "zeros"), "padding_idx": 5},
    "grows": {"num_embeddings": None, "dynamic": se.Dynamic()},
    "narrow": {"num_embeddings": 300, "dynamic": se.Dynamic(se.LRU()), "dtype": torch.bfloat16},  # rounded by the noise of ids
}
OPTIMIZERS = {"lru": se.optim.Adam(lr=0.1), "lfu": se.optim.RowwiseAdagrad(lr=0.1), "ttl": se.optim.FTRL(lr=0.1)}
OPTIMIZERS["narrow"] = OPTIMIZERS["lru"]
Picture = dict[str, dict[str, Any]]


def tables() -> list[se.TableConfig]:
    """Of all kinds, with a feature of single ids and one of bags each."""
    found = []
    for name, settings in CONFIGS.items():
        features = [f"{name} {feature}" for feature in FEATURES["feature_names"]]
        pooling = dict(zip(features, FEATURES["pooling"].values(), strict=True))
        found.append(se.TableConfig(name, embedding_dim=COLUMNS, feature_names=features, pooling=pooling, **settings))
    return found


def samples(step: int, of: range) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Ids and slopes of some samples of the global batch. Slopes differ by orders of magnitude: float sums depend on the order."""
    given: dict[str, Any] = {}
    slopes: dict[str, torch.Tensor] = {}
    for number, feature in enumerate(feature for table in tables() for feature in table.feature_names or ()):
        ids, lines, lengths = [], [], []
        for sample in of:
            draw = torch.Generator().manual_seed(1000 * step + 100 * number + sample)
            count = int(torch.randint(0, 40, (1,), generator=draw)) * (sample % 3 != step % 3)
            picked = (torch.rand(count, generator=draw) ** 3 * len(CROWD)).long()
            ids += [CROWD[place] for place in picked.tolist()]
            lengths.append(count)
            sizes = 10.0 ** torch.randn(count if number % 2 == 0 else 1, 1, generator=draw)
            lines.append(torch.randn(len(sizes), COLUMNS, generator=draw) * sizes)
        flat = torch.tensor(ids, dtype=torch.int64)
        given[feature] = flat if number % 2 == 0 else (flat, torch.tensor([0, *lengths]).cumsum(0))
        slopes[feature] = torch.cat(lines) if lines else torch.zeros(0, COLUMNS)
    return given, slopes


def train(rank: int, world_size: int, plan: str, ahead: bool, micro: int) -> Picture:
    """What this rank holds in the end: of each table and strip, by id."""
    emb = se.EmbeddingCollection(
        tables(),
        optimizer={name: OPTIMIZERS.get(name, se.optim.SGD(lr=0.1)) for name in CONFIGS},
        plan=PLANS[plan],
        gradient_reduction="sum",
        deterministic=True,
    )
    optimizer = se.Optimizer(emb, micro_batches=micro)
    size = SAMPLES // micro // world_size
    # A micro-batch is a stretch of the samples, of which each rank has one again.
    batches = [
        samples(step, range(first := (part * world_size + rank) * size, first + size))
        for step in range(STEPS)
        for part in range(micro)
    ]
    coming = emb.prefetch(batches[0][0]) if ahead else None
    for number, (given, slopes) in enumerate(batches):
        now, coming = coming, emb.prefetch(batches[number + 1][0]) if ahead and number + 1 < len(batches) else None
        outputs = emb(given if now is None else now)
        torch.stack([(output * slopes[name]).sum() for name, output in outputs.items()]).sum().backward()
        if number % micro == micro - 1:
            optimizer.step()
    with torch.no_grad():
        emb(batches[-1][0])
    return {f"{emb.tables[slab.spec.lanes[0].table].name} {slab.spec.lanes[0].columns}": _held(slab) for slab in emb.journey.slabs}


def _held(slab: Any) -> dict[str, Any]:
    keys, found = slab.dynamic, {}
    for name, census in (("rows", keys.census), ("candidates", keys.candidates)):
        if census is not None:
            slots = census.living(keys.steps)
            counts = census.counts_S[slots].tolist() if census.policy.counts else [0] * slots.numel()
            facts = zip(counts, census.lasts_S[slots].tolist(), strict=True)
            found[name] = dict(zip(census.ids_S[slots].tolist(), facts, strict=True))
    slots = keys.census.living(keys.steps)
    for name, tensor in {"weights": slab.weights, **slab.state}.items():
        found[name] = dict(zip(keys.census.ids_S[slots].tolist(), tensor[slots].clone(), strict=True))
    found["tally"], found["unknown"] = keys.tally, keys.unknown
    return found


def whole(runs: list[Picture]) -> Picture:
    """By table: who lives with which counts, candidates, sums of tallies; a hash of the bits of weights and state."""
    found: Picture = {}
    for table in CONFIGS:
        columns = sorted(
            {key for run in runs for key in run if key.startswith(table)}, key=lambda key: int(key.split("(")[1].split(",")[0])
        )
        first = [run[columns[0]] for run in runs]
        facts: dict[str, Any] = {"unknown": sum(part["unknown"] for part in first)}
        facts["tally"] = sum((part["tally"] for part in first[1:]), first[0]["tally"])
        for name in ("rows", "candidates"):
            facts[name] = {id_: seen for part in first for id_, seen in part.get(name, {}).items()}
        for name in first[0].keys() - {"rows", "candidates", "tally", "unknown"}:
            parts: dict[int, list[torch.Tensor]] = {}
            for key in columns:
                strip = {id_: values for run in runs for id_, values in run[key][name].items()}
                assert strip.keys() == facts["rows"].keys(), f"{table}: strips of columns differ in who lives"
                for id_, values in strip.items():
                    if values.dim() or key == columns[0]:
                        parts.setdefault(id_, []).append(values.view(-1))
                    else:
                        assert torch.equal(parts[id_][0], values.view(-1)), f"{table}: strips of columns differ in {name} of {id_}"
            bits = b"".join(torch.cat(parts[id_]).view(torch.uint8).numpy().tobytes() for id_ in sorted(parts))
            facts[name] = hashlib.sha256(bits).hexdigest()
        found[table] = facts
    return found


_truth: dict[int, Picture] = {}


def truth(micro: int) -> Picture:
    """By one rank; micro-batches agree on quanta each for themselves, so only these bits are their own."""
    if micro not in _truth:
        _truth[micro] = whole(run_ranks(1, train, "row_wise", False, micro))
    return _truth[micro]


CASES = list(product(PLANS, (1, 2, 4), (False, True), (1, 2)))


OFTEN = (
    ("row_wise bag", 2, True, 2),
    ("grid bag", 2, False, 1),
    ("column_wise", 2, True, 1),
    ("blocks", 4, True, 2),
    ("table_row_wise", 4, False, 1),
)


@pytest.mark.parametrize(("plan", "ranks", "ahead", "micro"), sample_of(CASES, *OFTEN))
def test_who_lives_with_which_bits_does_not_depend_on_the_plan(plan: str, ranks: int, ahead: bool, micro: int) -> None:
    found, expected = whole(run_ranks(ranks, train, plan, ahead, micro)), truth(micro)
    for table in CONFIGS:
        for name, value in expected[table].items():
            assert found[table][name] == value, f"{table}: {name}"


def test_who_lives_does_not_depend_on_micro_batches() -> None:
    one, two = truth(1), truth(2)
    for table in CONFIGS:
        for name in ("rows", "candidates", "tally"):
            assert one[table][name] == two[table][name], f"{table}: {name}"
    tallies = {name: truth(1)[name]["tally"] for name in CONFIGS}
    assert min(tallies["lru"].evicted, tallies["lfu"].evicted, tallies["ttl"].expired, tallies["full"].refused) > 0, tallies
    assert min(tallies["lfu"].waiting, tallies["ttl"].waiting, tallies["grows"].created, truth(1)["full"]["unknown"]) > 0, tallies
