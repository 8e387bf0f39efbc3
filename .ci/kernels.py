"""Compile the kernels of the CPU, so that no first run after set-up waits for them: a step with every optimizer that has one."""

import torch

import shardembed as se
from shardembed.kernels.cpu import FORMULAS
from shardembed.tables.placement import PACKINGS

TABLES = [se.TableConfig("bags", 64, 8), se.TableConfig("ids", 64, 8, pooling=None)]

for kind in FORMULAS:
    for packing in PACKINGS:
        plan = se.row_wise(packing=packing)
        emb = se.EmbeddingCollection(TABLES, optimizer=kind(lr=0.1), plan=plan, device="cpu")
        out = emb({"bags": torch.arange(12).view(4, 3) // 2, "ids": torch.arange(6)})
        torch.cat([vectors.flatten() for vectors in out.values()]).sum().backward()
        se.Optimizer(emb).step()
