"""TorchRec's own models train after `se.shard` as they did before: the same losses, step by step.

A rank has its part of the global batch; the mean of the ranks' losses is the loss of the whole.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import shardembed as se
from tests.harness import run_ranks
from tests.ranks.beside import learn

torchrec = pytest.importorskip("torchrec")

from torchrec.models.deepfm import SimpleDeepFMNN  # noqa: E402 (after it is known to be there)
from torchrec.models.dlrm import DLRM, DLRM_DCN  # noqa: E402

STEPS, SIZE = 20, 12
DENSE, COLUMNS, ROWS = 5, 8, 40
KEYS = ["f1", "f2", "f3"]
LR = 0.05


def collection() -> Any:
    config = torchrec.EmbeddingBagConfig
    settings = {"embedding_dim": COLUMNS, "num_embeddings": ROWS}
    return torchrec.EmbeddingBagCollection(
        [config(name="t1", feature_names=["f1", "f3"], **settings), config(name="t2", feature_names=["f2"], **settings)]
    )


def build(name: str) -> nn.Module:
    torch.manual_seed(3)
    if name == "DLRM":
        return DLRM(collection(), DENSE, [6, COLUMNS], [5, 1])
    if name == "DLRM_DCN":
        return DLRM_DCN(collection(), DENSE, [6, COLUMNS], [5, 1], dcn_num_layers=2, dcn_low_rank_dim=4)
    return SimpleDeepFMNN(DENSE, collection(), hidden_layer_size=6, deep_fm_dimension=4)


def data(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The global batch: dense features `[SIZE, DENSE]`, lengths `[keys, SIZE]`, ids `[keys, SIZE, 2]`, labels `[SIZE]`."""
    draw = torch.Generator().manual_seed(step)
    ids = torch.randint(0, ROWS, (len(KEYS), SIZE, 2), generator=draw)
    lengths = torch.randint(0, 3, (len(KEYS), SIZE), generator=draw)
    return torch.randn(SIZE, DENSE, generator=draw), lengths, ids, torch.randint(0, 2, (SIZE,), generator=draw).float()


def loss_of(model: nn.Module, name: str, step: int, rank: int, world_size: int) -> torch.Tensor:
    dense, lengths, ids, labels = (part.chunk(world_size, axis)[rank] for part, axis in zip(data(step), (0, 1, 1, 0), strict=True))
    values = ids[torch.arange(2) < lengths.unsqueeze(-1)]
    output = model(dense, torchrec.KeyedJaggedTensor.from_lengths_sync(KEYS, values, lengths.reshape(-1))).squeeze(-1)
    if name == "DeepFM":  # answers probabilities
        return nn.functional.binary_cross_entropy(output, labels)
    return nn.functional.binary_cross_entropy_with_logits(output, labels)


def losses(model: nn.Module, optimizers: list[torch.optim.Optimizer], name: str, rank: int, world_size: int) -> list[float]:
    found = learn(model, optimizers, range(STEPS), loss=lambda model, step: loss_of(model, name, step, rank, world_size))
    return [loss.item() for loss in found]


def losses_before(name: str) -> list[float]:
    """Of the unsharded model: Adagrad for its tables, SGD for the rest."""
    model = build(name)
    tables = [weight for key, weight in model.named_parameters() if "embedding_bags" in key]
    dense = [weight for key, weight in model.named_parameters() if "embedding_bags" not in key]
    optimizers = [torch.optim.Adagrad(tables, lr=LR), torch.optim.SGD(dense, lr=LR)]
    return losses(model, optimizers, name, 0, 1)


def announce(dense_features: torch.Tensor, sparse_features: Any) -> dict[str, Any]:
    return {"sparse_arch.embedding_bag_collection": sparse_features}


def losses_after(rank: int, world_size: int, name: str, shared: bool) -> list[float]:
    model = se.shard(
        build(name),
        optimizer=se.optim.Adagrad(lr=LR),
        plan={"sparse_arch.embedding_bag_collection.t1": se.row_wise()},
        inputs=announce if shared else None,
        verbose=False,
    )
    optimizer = se.Optimizer(model, dense=torch.optim.SGD(model.parameters(), lr=LR))
    wrapped = DistributedDataParallel(model) if world_size > 1 else model
    return losses(wrapped, [optimizer], name, rank, world_size)


@pytest.mark.parametrize("shared", [False, True], ids=["without inputs", "with inputs"])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", ["DLRM", "DLRM_DCN", "DeepFM"])
def test_a_model_of_torchrecs_trains_as_before(name: str, world_size: int, shared: bool) -> None:
    before = torch.tensor(losses_before(name), dtype=torch.float64)
    after = torch.tensor(run_ranks(world_size, losses_after, name, shared), dtype=torch.float64).mean(0)
    assert float((before[0] - before[-1]).abs()) > 1e-3, "nothing was learnt"
    torch.testing.assert_close(after, before, rtol=1e-5, atol=0.0)
