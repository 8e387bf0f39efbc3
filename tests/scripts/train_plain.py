"""A training script as people write it. train_sharded.py is the same with its tables sharded; see test_user_script.py."""

import torch
from torch import nn

USERS, ITEMS, BATCH, STEPS = 500, 300, 32, 30


class TwoTower(nn.Module):
    def __init__(self):
        super().__init__()
        self.user = nn.Embedding(USERS, 16)
        self.item = nn.Embedding(ITEMS, 16)
        self.tower = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, user, item):
        return self.tower(torch.cat([self.user(user), self.item(item)], 1)).squeeze(1)


def batches():
    generator = torch.Generator().manual_seed(1)
    taste = torch.randn(USERS, generator=generator)
    for _ in range(STEPS):
        user = torch.randint(0, 40, (BATCH,), generator=generator)
        yield user, torch.randint(0, ITEMS, (BATCH,), generator=generator), (taste[user] > 0).float()


def main():
    rank, world_size = 0, 1
    torch.manual_seed(0)
    model = TwoTower()
    trained = model
    optimizer = torch.optim.Adagrad(
        [{"params": [model.user.weight, model.item.weight], "lr": 0.1}, {"params": model.tower.parameters(), "lr": 0.02}]
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for batch in batches():
        user, item, label = (tensor.tensor_split(world_size)[rank] for tensor in batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.binary_cross_entropy_with_logits(trained(user, item).float(), label)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    with torch.no_grad():
        user, item, label = next(iter(batches()))
        loss = nn.functional.binary_cross_entropy_with_logits(model(user, item), label)
    if rank == 0:
        print(f"{loss:.6f}")


if __name__ == "__main__":
    main()
