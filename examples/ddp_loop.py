"""A loop of your own with DistributedDataParallel.

torchrun --nproc-per-node 2 examples/ddp_loop.py checkpoints
"""

from __future__ import annotations

import sys

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from two_tower import BATCH, CLIP, DENSE_LR, EPOCHS, TABLES_LR, build, data, loss_of, schedule

import shardembed as se


def main(folder: str) -> None:
    se.init()
    model = se.shard(build(), optimizer=se.optim.Adagrad(lr=TABLES_LR), plan=se.row_wise())
    ddp = DistributedDataParallel(model) if se.world_size() > 1 else model
    optimizer = se.Optimizer(model, dense=torch.optim.Adagrad(model.parameters(), lr=DENSE_LR))
    scheduler = schedule(optimizer)
    sampler = DistributedSampler(data(), se.world_size(), se.rank(), shuffle=False)
    for epoch in range(EPOCHS):
        for batch in DataLoader(data(), BATCH // se.world_size(), sampler=sampler):
            loss_of(ddp, batch).backward()
            se.clip_grad_norm_(model, CLIP)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        se.save_checkpoint(folder, model, optimizer=optimizer, scheduler=scheduler, progress={"epoch": epoch + 1})


if __name__ == "__main__":
    main(sys.argv[1])
