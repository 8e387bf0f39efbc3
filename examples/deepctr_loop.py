"""DeepCTR-Torch: fit() trains a sharded DeepFM, with se.Optimizer, or with a torch optimizer and DeepCTR's own penalties.

torchrun --nproc-per-node 2 examples/deepctr_loop.py checkpoints
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from averaged import average_before_steps
from deepctr_torch.inputs import SparseFeat, VarLenSparseFeat
from deepctr_torch.models import DeepFM
from torch import nn

import shardembed as se

SAMPLES, BATCH, EPOCHS, TABLES_LR, DENSE_LR, L2 = 512, 32, 2, 0.1, 0.02, 1e-2


def data() -> tuple[dict[str, np.ndarray], np.ndarray]:
    random = np.random.default_rng(1)
    user, item = random.integers(0, 100, SAMPLES), random.integers(0, 50, SAMPLES)
    history = random.integers(0, 50, (SAMPLES, 4))  # 0: nothing
    return {"user": user, "item": item, "history": history}, (random.normal(size=100)[user] > 0).astype(np.float64)


def build(l2: float = 0.0) -> DeepFM:
    user, item = SparseFeat("user", 100, embedding_dim=8), SparseFeat("item", 50, embedding_dim=8)
    columns = [user, item, VarLenSparseFeat(SparseFeat("history", 50, 8, embedding_name="item"), maxlen=4)]
    return DeepFM(columns, columns, dnn_hidden_units=(16,), l2_reg_linear=l2, l2_reg_embedding=l2, init_std=0.1)


def fit(model: DeepFM, optimizer: torch.optim.Optimizer) -> DeepFM:
    """On this rank's part of the data, which is all of it where there is one."""
    model.compile(optimizer, "binary_crossentropy")  # DeepCTR adds up the losses of a batch
    part = slice(se.rank(), None, se.world_size())
    inputs, labels = data()
    rank_batch = BATCH // se.world_size()
    mine = {name: values[part] for name, values in inputs.items()}
    model.fit(mine, labels[part], batch_size=rank_batch, epochs=EPOCHS, verbose=0, shuffle=False)
    return model


def main(folder: str) -> None:
    se.init()
    model = build()  # no penalties on tables: l2_reg_linear=0 and l2_reg_embedding=0
    model.regularization_weight.clear()  # lists of the plain weights
    model = se.shard(model, optimizer=se.optim.Adagrad(lr=TABLES_LR), plan=se.row_wise(), gradient_reduction="sum")
    optimizer = se.Optimizer(model, dense=torch.optim.Adagrad(model.parameters(), lr=DENSE_LR))
    average_before_steps(optimizer, model, total=True)
    fit(model, optimizer)
    se.save_checkpoint(folder, model, optimizer=optimizer)


def penalised(folder: str) -> None:
    se.init()
    model = build()
    model.regularization_weight.clear()
    model = se.shard(model, optimizer=None, plan=se.row_wise(), gradient_reduction="sum")
    model.add_regularization_weight(model.embedding_dict.parameters(), l2=L2)  # of the shards now
    model.add_regularization_weight(model.linear_model.parameters(), l2=L2)
    optimizer = groups(model, [*model.embedding_dict.parameters(), *model.linear_model.parameters()])
    average_before_steps(optimizer, model, total=True)
    fit(model, optimizer)
    se.save_checkpoint(folder, model, optimizer=optimizer)


def groups(model: DeepFM, tables: list[nn.Parameter]) -> torch.optim.Optimizer:
    """A torch optimizer with a learning rate of the tables' own."""
    theirs = {id(table) for table in tables}
    dense = [parameter for parameter in model.parameters() if id(parameter) not in theirs]
    return torch.optim.Adagrad([{"params": tables, "lr": TABLES_LR}, {"params": dense, "lr": DENSE_LR}])


def train_plain(l2: float = 0.0) -> DeepFM:
    """What both arrive at: one process, no shardembed."""
    model = build(l2)
    return fit(model, groups(model, [*model.embedding_dict.parameters(), *model.linear_model.parameters()]))


if __name__ == "__main__":
    main(sys.argv[1])
