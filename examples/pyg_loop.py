"""PyTorch Geometric: nodes without features of their own have rows in sharded tables, looked up by their numbers.

torchrun --nproc-per-node 2 examples/pyg_loop.py checkpoints
"""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch_geometric.data import HeteroData
from torch_geometric.nn import SAGEConv
from torch_geometric.utils import bipartite_subgraph

import shardembed as se

USERS, ITEMS, EDGES, BATCH, STEPS, TABLES_LR, DENSE_LR = 60, 40, 400, 64, 8, 0.1, 0.02


class Links(nn.Module):
    """Does this user want this item?"""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(USERS, 16), nn.Embedding(ITEMS, 16)
        self.to_item, self.to_user = SAGEConv((16, 16), 16), SAGEConv((16, 16), 16)

    def forward(self, part: HeteroData) -> torch.Tensor:
        # Rows are asked for by the nodes of this part of the graph, not read from `weight`, which would be the whole table.
        user, item = self.user(part["user"].n_id), self.item(part["item"].n_id)
        edges = part["user", "wants", "item"].edge_index
        item, user = self.to_item((user, item), edges).relu(), self.to_user((item, user), edges.flip(0)).relu()
        asked = part["user", "wants", "item"].edge_label_index
        return (user[asked[0]] * item[asked[1]]).sum(-1)


def build() -> Links:
    torch.manual_seed(0)
    return Links()


def parts(rank: int, world_size: int) -> list[tuple[HeteroData, torch.Tensor]]:
    """This rank's share of the edges of every step, with as many that are drawn, and their labels. With PyG's compiled extension,
    LinkNeighborLoader makes such parts.
    """
    generator = torch.Generator().manual_seed(1)
    wants = torch.stack([torch.randint(n, (EDGES,), generator=generator) for n in (USERS, ITEMS)])
    found = []
    for step in range(STEPS):
        some = torch.arange(step * BATCH, (step + 1) * BATCH) % EDGES
        drawn = torch.stack([torch.randint(n, (BATCH,), generator=generator) for n in (USERS, ITEMS)])
        asked = torch.cat([wants[:, some], drawn], 1)[:, rank::world_size].contiguous()
        label = torch.cat([torch.ones(BATCH), torch.zeros(BATCH)])[rank::world_size]
        users, items = asked[0].unique(), asked[1].unique()
        edges, _ = bipartite_subgraph((users, items), wants, relabel_nodes=True, size=(USERS, ITEMS))
        part = HeteroData()
        part["user"].n_id, part["item"].n_id = users, items
        part["user", "wants", "item"].edge_index = edges
        numbers = torch.stack([torch.searchsorted(users, asked[0]), torch.searchsorted(items, asked[1])])
        part["user", "wants", "item"].edge_label_index = numbers
        found.append((part, label))
    return found


def main(folder: str) -> None:
    se.init()
    model = se.shard(build(), optimizer=se.optim.Adagrad(lr=TABLES_LR), plan=se.row_wise())
    ddp = DistributedDataParallel(model) if se.world_size() > 1 else model
    optimizer = se.Optimizer(model, dense=torch.optim.Adagrad(model.parameters(), lr=DENSE_LR))
    for part, label in parts(se.rank(), se.world_size()):
        nn.functional.binary_cross_entropy_with_logits(ddp(part), label).backward()
        optimizer.step()
        optimizer.zero_grad()
    se.save_checkpoint(folder, model, optimizer=optimizer)


def train_plain(world_size: int) -> Links:
    """What it arrives at: one process, no shardembed, the parts of all ranks one after the other."""
    model = build()
    tables = [model.user.weight, model.item.weight]
    dense = [*model.to_item.parameters(), *model.to_user.parameters()]
    optimizer = torch.optim.Adagrad([{"params": tables, "lr": TABLES_LR}, {"params": dense, "lr": DENSE_LR}])
    for of_ranks in zip(*(parts(rank, world_size) for rank in range(world_size)), strict=True):
        for part, label in of_ranks:
            (nn.functional.binary_cross_entropy_with_logits(model(part), label) / world_size).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


if __name__ == "__main__":
    main(sys.argv[1])
