"""The model and the data of these examples, and the plain training in one process that each of them is compared with."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

USERS, ITEMS, SAMPLES, BATCH, EPOCHS = 500, 300, 512, 32, 2
TABLES_LR, DENSE_LR, CLIP = 0.1, 0.02, 1.0


class TwoTower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(USERS, 16)
        self.item = nn.Embedding(ITEMS, 16)
        self.head = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, user: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([self.user(user), self.item(item)], 1)).squeeze(1)


def build() -> TwoTower:
    torch.manual_seed(0)  # on every rank the same
    return TwoTower()


def data() -> Dataset[tuple[torch.Tensor, ...]]:
    """(user, item, label)"""
    generator = torch.Generator().manual_seed(1)
    user = torch.randint(0, USERS, (SAMPLES,), generator=generator)
    item = torch.randint(0, ITEMS, (SAMPLES,), generator=generator)
    taste = torch.randn(USERS, generator=generator)
    return TensorDataset(user, item, (taste[user] > 0).to(torch.get_default_dtype()))


def loss_of(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    user, item, label = batch
    return nn.functional.binary_cross_entropy_with_logits(model(user, item), label)


def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """A learning rate that falls with every step."""
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)


def train_plain() -> TwoTower:
    """What every example arrives at: one process, `nn.Embedding`, no shardembed."""
    model = build()
    tables = {"params": [model.user.weight, model.item.weight], "lr": TABLES_LR}
    optimizer = torch.optim.Adagrad([tables, {"params": model.head.parameters(), "lr": DENSE_LR}])
    scheduler = schedule(optimizer)
    for _ in range(EPOCHS):
        for batch in DataLoader(data(), BATCH):
            loss_of(model, batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    return model
