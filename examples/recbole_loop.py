"""RecBole: its Trainer trains and evaluates a sharded SASRec with a loss of pairs; se.Optimizer takes the place of its optimizer.

python examples/recbole_loop.py checkpoints
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model.sequential_recommender import SASRec
from recbole.trainer import Trainer
from recbole.utils import init_seed
from torch import nn

import shardembed as se

USERS, ITEMS, TABLES_LR, DENSE_LR = 40, 30, 0.5, 0.05
SETTINGS = {
    "loss_type": "BPR",  # not CE, which multiplies with the whole table
    "train_neg_sample_args": {"distribution": "uniform", "sample_num": 1},
    "eval_args": {
        "mode": {"valid": "uni20", "test": "uni20"},
        "split": {"LS": "valid_and_test"},
        "order": "TO",
        "group_by": "user",
    },
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "MAX_ITEM_LIST_LENGTH": 8,
    **{"hidden_size": 8, "inner_size": 8, "n_layers": 1, "hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0},
    **{"epochs": 2, "train_batch_size": 64, "learner": "sgd", "learning_rate": DENSE_LR, "weight_decay": 0.0},
    **{"use_gpu": False, "state": "CRITICAL", "seed": 1},
}


def prepare() -> tuple[Any, ...]:
    """RecBole's configuration, and its loaders for training, for validation and for the test."""
    random = np.random.default_rng(1)
    rows = [f"{user}\t{random.integers(ITEMS)}\t{time}\n" for user in range(USERS) for time in range(12)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "small", "small.inter")
        file.parent.mkdir()
        file.write_text("user_id:token\titem_id:token\ttimestamp:float\n" + "".join(rows))
        config = Config("SASRec", "small", config_dict={**SETTINGS, "data_path": folder, "checkpoint_dir": folder})
        init_seed(1, reproducibility=True)
        return config, *data_preparation(config, create_dataset(config))


def build(prepared: tuple[Any, ...] | None = None) -> SASRec:
    config, training, *_ = prepared or prepare()
    init_seed(1, reproducibility=True)
    return SASRec(config, training.dataset)


def fit(trainer: Trainer, training: Any, valid: Any) -> Trainer:
    init_seed(2, reproducibility=True)
    # saved=True would pickle what one rank has, and evaluate(load_best_model=True) read it.
    trainer.fit(training, valid, saved=False, verbose=False)
    return trainer


def main(folder: str) -> None:
    se.init()
    config, training, valid, test = prepared = prepare()
    model = build(prepared)
    trainer = Trainer(config, model)
    trainer.optimizer = None  # it has the plain weights
    model = se.shard(model, optimizer=se.optim.SGD(lr=TABLES_LR), plan=se.row_wise())
    trainer.optimizer = se.Optimizer(model, dense=torch.optim.SGD(model.parameters(), lr=DENSE_LR))
    fit(trainer, training, valid).evaluate(test, load_best_model=False)
    se.save_checkpoint(folder, model, optimizer=trainer.optimizer)


def train_plain() -> nn.Module:
    """What it arrives at, without shardembed."""
    config, training, valid, _ = prepared = prepare()
    model = build(prepared)
    trainer = Trainer(config, model)
    tables = [model.item_embedding.weight, model.position_embedding.weight]
    theirs = {id(table) for table in tables}
    dense = [parameter for parameter in model.parameters() if id(parameter) not in theirs]
    trainer.optimizer = torch.optim.SGD([{"params": tables, "lr": TABLES_LR}, {"params": dense, "lr": DENSE_LR}])
    fit(trainer, training, valid)
    return model


if __name__ == "__main__":
    main(sys.argv[1])
