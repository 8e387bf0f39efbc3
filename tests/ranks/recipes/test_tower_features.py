"""Features of users and items in two towers: the same training as that of a plain torch model in one process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from torch import nn
from torch.nn import functional as F

from shardembed.comm.comm import Comm
from shardembed.recipes import tasks
from shardembed.recipes.config import Config
from shardembed.recipes.data.sides import Side
from shardembed.recipes.data.wanted import MISSING
from tests.harness import run_ranks

USERS, ITEMS, ROWS, DIM, STEPS = 20, 12, 160, 4, 12
LR, DENSE_LR, TEMPERATURE = 0.5, 0.1, 0.5
FEATURES = [
    {"name": "country", "kind": "id", "of": "user"},
    {"name": "age", "kind": "number", "of": "user", "buckets": (20.0, 40.0)},
    {"name": "income", "kind": "number", "of": "user"},
    {"name": "genre", "kind": "id", "of": "item"},
    {"name": "tags", "kind": "ids", "of": "item", "pooling": "sum"},
    {"name": "words", "kind": "ids", "of": "item"},
    {"name": "price", "kind": "number", "of": "item"},
    {"name": "year", "kind": "number", "of": "item", "scale": "raw"},
]


def write(path: Path) -> None:
    """Interactions in which all rows of a user or item say the same of it; some features are missing, and some lists empty."""
    rng = np.random.default_rng(0)
    users, items = rng.integers(USERS, size=ROWS), rng.integers(ITEMS, size=ROWS)
    users[:USERS], items[-ITEMS:] = np.arange(USERS), np.arange(ITEMS)
    tags = [rng.integers(6, size=number % 3).tolist() for number in range(ITEMS)]
    words = [rng.integers(5, size=(number + 1) % 4).tolist() for number in range(ITEMS)]
    columns = {
        "user_id": users.tolist(),
        "item_id": items.tolist(),
        "country": [int(user % 4) if user % 5 else None for user in users],
        "age": [float(user * 3) for user in users],
        "income": [float(user * 100 - 300) if user % 3 else None for user in users],
        "genre": [int(item % 3) for item in items],
        "tags": [tags[item] for item in items],
        "words": [words[item] for item in items],
        "price": [float(item * 2.5) for item in items],
        "year": [float(item / ITEMS) for item in items],
    }
    parquet.write_table(pa.table(columns), path)


def config(path: Path, ids: str, towers: tuple[int, ...] = (3,), features: Any = FEATURES, **model: Any) -> Config:
    return Config.model_validate(
        {
            "data": {"path": str(path), "ids": ids, "features": tuple(features)},
            "model": {"embedding_dim": DIM, "negatives": 7, "towers": towers, "temperature": TEMPERATURE, "init_std": 0.3, **model},
            "optimizer": {"tables": {"name": "SGD", "lr": LR}, "dense": {"name": "SGD", "lr": DENSE_LR}},
            "train": {"global_batch_size": 25, "epochs": 8},
        }
    )


@dataclass(frozen=True)
class Trained:
    """What a rank has at the end, and had at the start: vectors of all users and items, losses, rows of tables, dense weights."""

    losses: list[float]
    queries: torch.Tensor
    items: torch.Tensor
    rows: dict[str, torch.Tensor]
    dense: dict[str, torch.Tensor]
    recall: float


def trained(rank: int, world_size: int, settings: Config) -> Trained:
    task = tasks.prepare(settings, Comm.of())
    job = task.build()
    model, data = job.model, task.data
    ids = data.ids
    numbers = {"user": torch.arange(data.users), "item": torch.arange(data.items)}
    if ids is not None:
        numbers = {"user": torch.from_numpy(ids.users), "item": torch.from_numpy(ids.items)}
    for side in (data.known.users, data.known.items):
        numbers |= {one.name: wanted_ids(side, one.name) for one in side.features if one.has_table}
    sizes = {table.name: table for table in model.tables.tables}
    for name, wanted in numbers.items():
        if sizes[name].dynamic is None and (wanted == MISSING).any():
            numbers[name] = torch.where(wanted == MISSING, sizes[name].num_embeddings - 1, wanted)
    for parameter in model.parameters():  # towers and linear maps start as nothing, which would hide a missing one
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    rows = {name: model.tables.rows(name, wanted) for name, wanted in numbers.items()}
    dense = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses = [job.step(part, step) for step, part in enumerate(task.parts(range(STEPS)))]
    total = Comm.of().all_reduce("losses", torch.stack(losses)) / world_size
    mine = slice(0, None) if rank == 0 else slice(0, 0)  # ranks may ask for different numbers
    queries = model.query_vectors_of(torch.arange(data.users)[mine])
    items = model.item_vectors_of(torch.arange(data.items)[mine])
    return Trained(total.tolist(), queries, items, rows, dense, task.evaluate(job).score)


def wanted_ids(side: Side, name: str) -> torch.Tensor:
    """Every id that a feature has, ascending."""
    feature, values = next((one, values) for one, values in zip(side.features, side.values, strict=True) if one.name == name)
    if feature.buckets:
        return torch.arange(len(feature.buckets) + 1)
    return torch.from_numpy(np.unique(values.values if feature.kind == "ids" else values))  # type: ignore[union-attr]


class Plain(nn.Module):
    """The model in torch alone, from the values that were written, with the starting weights of another."""

    def __init__(self, begun: Trained, known: dict[str, list[Any]], names: dict[str, list[int]]) -> None:
        super().__init__()
        self.rows = nn.ParameterDict({name: nn.Parameter(rows.clone()) for name, rows in begun.rows.items()})
        self.dense = nn.ParameterDict({name.replace(".", "/"): nn.Parameter(value.clone()) for name, value in begun.dense.items()})
        self.known, self.names = known, names

    def bags(self, name: str, numbers: torch.Tensor, mode: str) -> torch.Tensor:
        """As nn.EmbeddingBag: one bag a number."""
        lists = [self.known[name][number] for number in numbers.tolist()]
        flat = torch.tensor([self.names[name].index(one) for each in lists for one in each], dtype=torch.int64)
        ends = torch.tensor([0, *np.cumsum([len(each) for each in lists])], dtype=torch.int64)
        return F.embedding_bag(flat, self.rows[name], ends, mode=mode, include_last_offset=True)

    def numbers(self, names: tuple[str, ...], wanted: torch.Tensor) -> torch.Tensor:
        scales = {"year": lambda x: x}
        columns = [
            [
                scales.get(name, lambda x: np.sign(x) * np.log1p(abs(x)))(self.known[name][number] or 0.0)
                for number in wanted.tolist()
            ]
            for name in names
        ]
        return torch.tensor(columns, dtype=torch.float32).T.reshape(len(wanted), len(names))

    def tower(self, side: str, x: torch.Tensor) -> torch.Tensor:
        weight = {name: self.dense[f"{side}_tower/layers/{name}"] for name in ("0/weight", "0/bias", "2/weight", "2/bias")}
        hidden = F.relu(F.linear(x, weight["0/weight"], weight["0/bias"]))
        return x + F.linear(hidden, weight["2/weight"], weight["2/bias"])

    def queries(self, users: torch.Tensor) -> torch.Tensor:
        country = [[self.known["country"][user]] for user in users.tolist()]
        age = [[int(np.searchsorted([20, 40], self.known["age"][user], side="right"))] for user in users.tolist()]
        x = self.rows["user"][users]
        for name, lists in (("country", country), ("age", age)):
            x = x + self.rows[name][[self.names[name].index(one) for (one,) in lists]]
        x = x + F.linear(self.numbers(("income",), users), self.dense["user_features/linear/weight"])
        return F.normalize(self.tower("user", x), dim=1) / TEMPERATURE

    def items(self, items: torch.Tensor) -> torch.Tensor:
        genre = [self.names["genre"].index(self.known["genre"][item]) for item in items.tolist()]
        x = (
            self.rows["item"][items]
            + self.rows["genre"][genre]
            + self.bags("tags", items, "sum")
            + self.bags("words", items, "mean")
        )
        x = x + F.linear(self.numbers(("price", "year"), items), self.dense["item_features/linear/weight"])
        return self.tower("item", x)

    def loss(self, users: torch.Tensor, items: torch.Tensor, negatives: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
        queries = self.queries(users)
        right = (queries * self.items(items)).sum(1, keepdim=True)
        wrong = queries @ self.items(negatives).T - expected[negatives]
        wrong = wrong.masked_fill(items[:, None] == negatives, -torch.inf)
        return F.cross_entropy(torch.cat([right, wrong], 1), torch.zeros(len(users), dtype=torch.int64))


def known_of(path: Path) -> dict[str, list[Any]]:
    """What the rows say of each user and item, by number."""
    table = parquet.read_table(path).to_pydict()
    found: dict[str, list[Any]] = {}
    for feature in FEATURES:
        key, count = ("user_id", USERS) if feature["of"] == "user" else ("item_id", ITEMS)
        found[feature["name"]] = [table[feature["name"]][table[key].index(number)] for number in range(count)]
    return found


def train_plain(path: Path, begun: Trained, settings: Config) -> tuple[Plain, list[float]]:
    """The same steps on the same batches."""
    task = tasks.TwoTowerTask(settings, tasks._scanned(settings.data))
    known = known_of(path)
    side_of = {feature["name"]: feature for feature in FEATURES}
    names: dict[str, list[Any]] = {}
    for name, feature in side_of.items():
        if feature["kind"] != "number":
            values = [one for each in known[name] for one in (each if isinstance(each, list) else [each])]
            missing = [None] if None in values else []
            names[name] = [*missing, *sorted({one for one in values if one is not None})]
    names["age"] = [0, 1, 2]
    if settings.data.any_ids is None:
        known["country"] = [-1 if one is None else one for one in known["country"]]
        names["country"] = [-1, 0, 1, 2, 3]
    model = Plain(begun, known, names)
    optimizer = torch.optim.SGD(
        [{"params": list(model.rows.parameters()), "lr": LR}, {"params": list(model.dense.parameters())}], lr=DENSE_LR
    )
    sampler = task.build().sampler
    losses = []
    for step, part in enumerate(task.parts(range(STEPS))):
        loss = model.loss(part.users, part.items, sampler.draw(step), sampler.log_expected)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return model, losses


@pytest.mark.parametrize("ids", ["numbered", "dynamic"])
def test_training_is_that_of_a_plain_model(tmp_path: Path, ids: str) -> None:
    path = tmp_path / "rows.parquet"
    write(path)
    settings = config(path, ids)
    alone = run_ranks(1, trained, settings)[0]
    plain, losses = train_plain(path, alone, settings)
    with torch.no_grad():
        queries, items = plain.queries(torch.arange(USERS)), plain.items(torch.arange(ITEMS))
    assert losses[0] > 1.1 * losses[-1], "it learns"
    for ranks in (1, 2, 3):
        found = [alone] if ranks == 1 else run_ranks(ranks, trained, settings)
        assert found[0].losses == pytest.approx(losses, rel=1e-4)
        torch.testing.assert_close(found[0].queries, queries, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found[0].items, items, rtol=1e-3, atol=1e-4)
        assert {one.recall for one in found} == {alone.recall}
