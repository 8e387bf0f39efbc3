"""Torch-RecHub: CTRTrainer trains a sharded AFM, with se.Optimizer, or with a torch optimizer and a penalty on the tables.

torchrun --nproc-per-node 2 examples/rechub_loop.py checkpoints
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from averaged import average_before_steps
from torch import nn
from torch.utils.data import DataLoader, Subset
from torch_rechub.basic.features import SequenceFeature, SparseFeature
from torch_rechub.basic.initializers import RandomNormal
from torch_rechub.models.ranking import AFM
from torch_rechub.trainers import CTRTrainer
from torch_rechub.utils.data import TorchDataset

import shardembed as se

SAMPLES, BATCH, EPOCHS, TABLES_LR, DENSE_LR, L2 = 512, 32, 2, 0.5, 0.05, 1e-2


def data() -> TorchDataset:
    random = np.random.default_rng(1)
    user, item = random.integers(0, 100, SAMPLES), random.integers(0, 50, SAMPLES)
    history = random.integers(0, 50, (SAMPLES, 4))
    label = (random.normal(size=100)[user] > 0).astype(np.float64)
    return TorchDataset({"user": user, "item": item, "history": history}, label)


def build() -> AFM:
    torch.manual_seed(0)
    start = RandomNormal(0, 0.1)
    user, item = SparseFeature("user", 100, 8, initializer=start), SparseFeature("item", 50, 8, initializer=start)
    # Not a model with batch normalisation, whose statistics are those of a rank's own samples, sharded or not.
    return AFM([user, item, SequenceFeature("history", 50, 8, shared_with="item", padding_idx=0)], 8, 16)


def train(trainer: CTRTrainer) -> nn.Module:
    """As its fit(), which ends with torch.save, and so in a PickleError."""
    loader = DataLoader(Subset(data(), range(se.rank(), SAMPLES, se.world_size())), BATCH // se.world_size())
    for _ in range(EPOCHS):
        trainer.train_one_epoch(loader)
    return trainer.model


def main(folder: str) -> None:
    se.init()
    model = sharded(se.optim.SGD(lr=TABLES_LR))

    def both(parameters: Any, **settings: Any) -> se.Optimizer:
        return se.Optimizer(model, dense=torch.optim.SGD(parameters, **settings))

    trainer = CTRTrainer(model, optimizer_fn=both, optimizer_params={"lr": DENSE_LR})
    average_before_steps(trainer.optimizer, model)
    train(trainer)
    se.save_checkpoint(folder, model, optimizer=trainer.optimizer)


def penalised(folder: str) -> None:
    se.init()
    model = sharded(None)
    trainer = CTRTrainer(model, optimizer_fn=torch.optim.SGD, optimizer_params={"lr": DENSE_LR})
    # In place of regularization_params={"embedding_l2": L2}, which looks for nn.Embeddings.
    trainer.reg_loss_fn = lambda model: L2 * sum(shard.square().sum() for shard in se.ignored(model))
    average_before_steps(trainer.optimizer, model)
    train(trainer)
    se.save_checkpoint(folder, model, optimizer=trainer.optimizer)


def sharded(optimizer: se.optim.SGD | None) -> AFM:
    model = build()
    for feature in model.fm_features:
        vars(feature).pop("embed", None)  # a feature keeps the plain table that it has made
    return se.shard(model, optimizer=optimizer, plan=se.row_wise())


def train_plain(l2: float = 0.0) -> nn.Module:
    """What both arrive at: one process, no shardembed. With a penalty, one learning rate for all."""
    model = build()
    theirs = [] if l2 else [table.weight for table in model.embedding.embed_dict.values()]
    dense = [parameter for parameter in model.parameters() if not any(parameter is table for table in theirs)]

    def groups(_: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": theirs, "lr": TABLES_LR}, {"params": dense, "lr": lr}])

    regularization = {"embedding_l2": l2}
    return train(CTRTrainer(model, optimizer_fn=groups, optimizer_params={"lr": DENSE_LR}, regularization_params=regularization))


if __name__ == "__main__":
    main(sys.argv[1])
