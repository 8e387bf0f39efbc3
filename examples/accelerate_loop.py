"""Hugging Face Accelerate: it deals out batches and wraps the model; se.Optimizer is the only optimizer.

torchrun --nproc-per-node 2 examples/accelerate_loop.py checkpoints
"""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from two_tower import BATCH, CLIP, DENSE_LR, EPOCHS, TABLES_LR, build, data, loss_of, schedule

import shardembed as se


def main(folder: str) -> None:
    se.init()  # before Accelerator, which takes the process group that exists
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    model = se.shard(build().to(accelerator.device), optimizer=se.optim.Adagrad(lr=TABLES_LR), plan=se.row_wise())
    optimizer = se.Optimizer(model, dense=torch.optim.Adagrad(model.parameters(), lr=DENSE_LR))
    scheduler = schedule(optimizer)
    # The scheduler stays outside: prepared, it would take as many steps at a time as there are ranks.
    trained, stepped, loader = accelerator.prepare(model, optimizer, DataLoader(data(), BATCH // se.world_size()))
    for epoch in range(EPOCHS):
        for batch in loader:
            accelerator.backward(loss_of(trained, batch))
            se.clip_grad_norm_(model, CLIP)  # in place of accelerator.clip_grad_norm_, which does not know the tables
            stepped.step()
            stepped.zero_grad()
            scheduler.step()
        # In place of accelerator.save_state, which pickles what one rank has.
        se.save_checkpoint(folder, model, optimizer=optimizer, scheduler=scheduler, progress={"epoch": epoch + 1})


if __name__ == "__main__":
    main(sys.argv[1])
