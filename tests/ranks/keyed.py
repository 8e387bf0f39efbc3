"""A model with every kind of table that `shard` takes, TorchRec's above all, and batches for it.

What it is held against is itself, unsharded, on the batches of all ranks: TorchRec's own modules, in plain torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import shardembed as se
from shardembed import optim
from tests.oracle import LEARNERS

torchrec = pytest.importorskip("torchrec")

ROWS, COLUMNS = 13, 4
KEYS = ("f1", "f2", "f3", "spare")  # nobody looks "spare" up
BATCH_SIZES = (3, 0, 2)  # by rank, turning from step to step: every rank is empty once
TABLES = ("sparse.ebc.sums", "sparse.ebc.means", "weighted.t", "seq.long", "seq.short", "plain")


def bag(name: str, features: list[str], pooling: str = "SUM", **settings: Any) -> Any:
    return torchrec.EmbeddingBagConfig(
        num_embeddings=ROWS,
        embedding_dim=COLUMNS,
        name=name,
        feature_names=features,
        pooling=torchrec.PoolingType[pooling],
        **settings,
    )


def single(name: str, features: list[str], **settings: Any) -> Any:
    return torchrec.EmbeddingConfig(num_embeddings=ROWS, embedding_dim=COLUMNS, name=name, feature_names=features, **settings)


@dataclass(frozen=True)
class Batch:
    """`other` is a second batch for the collection that is called twice; `ids` are the plain module's."""

    keyed: Any
    other: Any
    ids: torch.Tensor
    slopes: int  # seed of what outputs are multiplied with

    def inputs(self) -> dict[str, Any]:
        """What `shard(inputs=)` is to be told."""
        tables = {"sparse.ebc": [self.keyed, self.other], "weighted": self.keyed, "seq": self.keyed}
        return {**tables, "plain": self.ids, "tied": (self.ids,)}


class Everything(nn.Module):
    """Collections with both poolings, shared features, weights and sequences; a plain module, and one tied to a collection."""

    def __init__(self) -> None:
        super().__init__()
        ebc = torchrec.EmbeddingBagCollection([bag("sums", ["f2", "f1"]), bag("means", ["f1", "f3"], "MEAN")])
        self.sparse = nn.ModuleDict({"ebc": ebc})
        self.weighted = torchrec.EmbeddingBagCollection([bag("t", ["f3", "f1"])], is_weighted=True)
        self.seq = torchrec.EmbeddingCollection([single("long", ["f3"]), single("short", ["f1", "f3"])], need_indices=True)
        self.plain = nn.Embedding(ROWS, COLUMNS)
        self.tied = nn.Embedding(ROWS, COLUMNS)
        self.tied.weight = ebc.embedding_bags["sums"].weight

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        outputs: dict[str, torch.Tensor] = {}
        for name, keyed in (("", batch.keyed), ("again ", batch.other)):
            found = self.sparse["ebc"](keyed)
            assert found.key_dim() == 1
            outputs |= {name + key: found[key] for key in found.keys()}  # noqa: SIM118 (it is no mapping)
            outputs[f"{name}whole"] = found.values()
        weighted = self.weighted(batch.keyed)
        outputs |= {f"weighted {key}": part for key, part in weighted.to_dict().items()}
        for key, jagged in self.seq(batch.keyed).items():
            outputs |= {f"seq {key}": jagged.values(), f"seq {key} lengths": jagged.lengths()}
            outputs |= {f"seq {key} indices": jagged.weights(), f"seq {key} offsets": jagged.offsets()}
        return {**outputs, "plain": self.plain(batch.ids), "tied": self.tied(batch.ids)}


def keyed(draw: torch.Generator, size: int, dtype: torch.dtype) -> Any:
    """Random bags, some empty, with the keys in random order."""
    keys = [KEYS[i] for i in torch.randperm(len(KEYS), generator=draw)]
    lengths = torch.randint(0, 4, (len(keys) * size,), generator=draw, dtype=torch.int32)
    values = torch.randint(0, ROWS, (int(lengths.sum()),), generator=draw)
    weights = torch.rand(len(values), generator=draw, dtype=dtype) - 0.25
    return torchrec.KeyedJaggedTensor(keys, values, weights, lengths=lengths)


def batch_of(rank: int, step: int, dtype: torch.dtype) -> Batch:
    draw = torch.Generator().manual_seed(1000 * rank + step)
    size = BATCH_SIZES[(rank + step) % len(BATCH_SIZES)]
    first, second = keyed(draw, size, dtype), keyed(draw, size, dtype)
    return Batch(first, second, torch.randint(0, ROWS, (size, 2), generator=draw), 1000 * rank + step)


def loss_of(outputs: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
    """Linear: TorchRec rounds its outputs to float32, and a gradient that depends on them could not be held to 1e-10."""
    draw = torch.Generator().manual_seed(batch.slopes)
    learnt = [output for output in outputs.values() if output.requires_grad]
    parts = [(output * torch.randn(output.shape, generator=draw)).sum(dtype=torch.float64) for output in learnt]
    return torch.stack(parts).sum()


def everything(dtype: torch.dtype, seed: int = 0) -> Everything:
    """The same start everywhere. TorchRec's own start is narrow; this one makes wrong rows visible."""
    torch.manual_seed(seed)
    model = Everything().to(dtype)
    for weight in model.parameters():
        nn.init.normal_(weight)
    return model


def plan_of(name: str, world_size: int) -> Any:
    """ "auto"; or a cut of its own for every table."""
    if name != "mixed":
        return name
    last = world_size - 1
    placements = (
        se.row_wise(strided=False, packing="bag"),
        se.column_wise([0, last]),
        se.row_wise(),
        se.table_wise(last),
        se.replicated(),
        se.grid(2, ranks=[0, last, last, 0]),
    )
    return dict(zip(TABLES, placements, strict=True))


def train_whole(optimizer: optim.TableOptimizer, steps: int, world_size: int) -> dict[str, torch.Tensor]:
    """The weights after training the unsharded model in float64 on the batches of all ranks."""
    model = everything(torch.float64)
    learners = {weight: LEARNERS[type(optimizer)](weight, optimizer) for weight in model.parameters()}
    for step in range(steps):
        for rank in range(world_size):
            batch = batch_of(rank, step, torch.float64)
            if batch.keyed.stride():  # TorchRec 1.8 fails on a batch without bags; it would add nothing
                loss_of(model(batch), batch).backward()
        for weight, learner in learners.items():
            if weight.grad is not None:  # one rank alone has an empty batch now and then
                weight.grad /= world_size  # not the loss, whose gradient TorchRec rounds to float32
                learner.step(weight.grad, weight.grad.abs().sum(1) > 0)
            weight.grad = None
    return {name: weight.detach() for name, weight in model.state_dict().items()}
