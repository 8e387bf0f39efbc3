"""Hugging Face transformers: the Trainer trains a BERT whose tables are sharded; se.Optimizer is the only optimizer.

torchrun --nproc-per-node 2 examples/transformers_loop.py checkpoints
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

import shardembed as se

SAMPLES, BATCH, EPOCHS, TABLES_LR, DENSE_LR, CLIP = 128, 16, 2, 0.05, 0.005, 1.0


class Sentences(Dataset[dict[str, torch.Tensor]]):
    """Words 1 to 199; a sentence is of the class that its first word says."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.words = torch.randint(1, 200, (SAMPLES, 8), generator=generator)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        words = self.words[index]
        return {"input_ids": words, "attention_mask": torch.ones_like(words), "labels": (words[0] > 100).long()}


def build() -> BertForSequenceClassification:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(vocab_size=200, max_position_embeddings=16, **size, **without))


class Clip(TrainerCallback):
    """In place of `max_grad_norm`, with which the Trainer takes a norm of the dense gradients alone."""

    def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
        se.clip_grad_norm_(model, CLIP)


def arguments(folder: str, **more: Any) -> TrainingArguments:
    return TrainingArguments(
        folder,
        per_device_train_batch_size=BATCH // se.world_size(),
        num_train_epochs=EPOCHS,
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        average_tokens_across_devices=False,  # else this model's loss and gradients are multiplied by the number of ranks
        save_strategy="no",  # in place of its checkpoints, which no rank has the tables for: se.save_checkpoint
        report_to=[],
        disable_tqdm=True,
        **more,
    )


def main(folder: str) -> None:
    se.init()
    model = se.shard(build(), optimizer=se.optim.Adagrad(lr=TABLES_LR), plan=se.row_wise())
    optimizer = se.Optimizer(model, dense=torch.optim.Adagrad(model.parameters(), lr=DENSE_LR))
    # Without a scheduler the Trainer makes its own, which lowers both learning rates to 0.
    trainer = Trainer(model, arguments(folder, max_grad_norm=0.0), train_dataset=Sentences(), optimizers=(optimizer, None))
    trainer.add_callback(Clip())
    trainer.train()
    se.save_checkpoint(folder, model, optimizer=optimizer)


def train_plain(folder: str) -> nn.Module:
    """What it arrives at: one process, no shardembed."""
    model = build()
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    theirs = {id(table) for table in tables}
    dense = [parameter for parameter in model.parameters() if id(parameter) not in theirs]
    optimizer = torch.optim.Adagrad([{"params": tables, "lr": TABLES_LR}, {"params": dense, "lr": DENSE_LR}])
    Trainer(model, arguments(folder, max_grad_norm=CLIP), train_dataset=Sentences(), optimizers=(optimizer, None)).train()
    return model


if __name__ == "__main__":
    main(sys.argv[1])
