"""PyTorch Lightning: a LightningModule with automatic optimization, and se.Optimizer as its only optimizer.

torchrun --nproc-per-node 2 examples/lightning_loop.py checkpoints
"""

from __future__ import annotations

import sys
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from two_tower import BATCH, CLIP, DENSE_LR, EPOCHS, TABLES_LR, TwoTower, build, data, loss_of, schedule

import shardembed as se


class Sharded(lightning.LightningModule):
    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder
        self.model: TwoTower | None = None

    def configure_model(self) -> None:
        # Here the process group exists, and DistributedDataParallel does not wrap the module yet. Called once a stage.
        if self.model is None:
            self.model = se.shard(build(), optimizer=se.optim.Adagrad(lr=TABLES_LR), plan=se.row_wise())

    def configure_optimizers(self) -> Any:
        # `self`, not `self.model`: the dense optimizer may hold any parameter of the module.
        optimizer = se.Optimizer(self, dense=torch.optim.Adagrad(self.parameters(), lr=DENSE_LR))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule(optimizer), "interval": "step"}}

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        assert self.model is not None
        return loss_of(self.model, batch)

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        # Lightning's own would give every rank the norm of its dense gradients alone.
        if gradient_clip_val is not None:
            se.clip_grad_norm_(self, gradient_clip_val)

    def on_train_epoch_end(self) -> None:
        # In place of ModelCheckpoint, which pickles what one rank has.
        assert self.model is not None
        optimizer, scheduler = self.optimizers(use_pl_optimizer=False), self.lr_schedulers()
        progress = {"epoch": self.current_epoch + 1}
        se.save_checkpoint(self.folder, self.model, optimizer=optimizer, scheduler=scheduler, progress=progress)


def main(folder: str) -> None:
    comm = se.init()
    trainer = lightning.Trainer(
        accelerator="auto",
        devices="auto" if torch.cuda.is_available() else comm.world_size,  # on CPUs: how many ranks torchrun starts on a node
        strategy=DDPStrategy() if comm.world_size > 1 else "auto",
        max_epochs=EPOCHS,
        gradient_clip_val=CLIP,
        enable_checkpointing=False,
        use_distributed_sampler=False,  # Lightning's own always shuffles; left on, it is as good, with other batches
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    sampler = DistributedSampler(data(), comm.world_size, comm.rank, shuffle=False)
    trainer.fit(Sharded(folder), DataLoader(data(), BATCH // comm.world_size, sampler=sampler))


if __name__ == "__main__":
    main(sys.argv[1])
