"""train_plain.py with its tables sharded over the ranks of a job: torchrun --nproc-per-node 2 train_sharded.py"""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import shardembed as se

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
    rank, world_size = se.init().rank, se.world_size()
    torch.manual_seed(0)
    model = se.shard(TwoTower(), optimizer=se.optim.Adagrad(lr=0.1), plan=se.row_wise())
    trained = DistributedDataParallel(model)
    optimizer = se.Optimizer(model, dense=torch.optim.Adagrad(model.parameters(), lr=0.02))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for batch in batches():
        user, item, label = (tensor.tensor_split(world_size)[rank] for tensor in batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.binary_cross_entropy_with_logits(trained(user, item).float(), label)
        loss.backward()
        se.clip_grad_norm_(model, 1.0)
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
