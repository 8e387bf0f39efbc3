"""From settings to objects: the model with its optimizer, ready for a training loop."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import shardembed as se
from shardembed.comm import Comm, default_device
from shardembed.recipes.config import Config, DenseOptimizerConfig, PlanConfig
from shardembed.recipes.data.interactions import Interactions, rank_slice
from shardembed.recipes.data.source import Chunk
from shardembed.recipes.models.sampling import NegativeSampler
from shardembed.recipes.models.two_tower import Batch, TwoTower


@dataclass(frozen=True)
class Job:
    """A model that is ready to train. `wrapped` is what a step calls: the model itself, or DistributedDataParallel around it."""

    model: TwoTower
    wrapped: torch.nn.Module
    optimizer: se.Optimizer
    sampler: NegativeSampler

    def step(self, chunk: Chunk, step: int) -> torch.Tensor:
        """Train on one global batch. Collective. Returns this rank's loss; the mean over the ranks is the loss of the batch."""
        loss = self.wrapped(self._batch(chunk, step))
        with Comm.of().guarding("average dense gradients"):
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def _batch(self, chunk: Chunk, step: int) -> Batch:
        device = self.model.log_expected.device
        part = rank_slice(chunk, se.rank(), se.world_size())
        users, items = (torch.from_numpy(np.ascontiguousarray(ids)).to(device) for ids in (part.users, part.items))
        return Batch(users, items, self.sampler.draw(step).to(device), len(chunk))


def build(config: Config, data: Interactions) -> Job:
    """The model and everything that trains it. Collective.

    Raises:
        ConfigError, PlanError: settings that do not fit the tables or the ranks.
    """
    sampler = NegativeSampler(data.item_counts, config.model.negatives, config.train.seed)
    model = TwoTower(
        config.model,
        data.users,
        data.items,
        sampler.log_expected,
        optimizer=config.optimizer.tables.build(),
        plan=placements(config.plan),
        wire_dtype=getattr(torch, config.wire_dtype) if config.wire_dtype else None,
        seed=config.train.seed,
    ).to(default_device())
    parameters = list(model.parameters())
    dense = _dense_optimizer(config.optimizer.dense, parameters) if parameters else None
    wrapped: torch.nn.Module = model
    if parameters and se.world_size() > 1:
        # The one buffer is the same on every rank and never changes. Buckets that were rearranged after the first batch of a
        # process would change the order of sums on three ranks, and so the bits of a resumed run: looking for unused parameters
        # prevents it.
        wrapped = DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=True)
    return Job(model, wrapped, se.Optimizer(model, dense), sampler)


def placements(config: PlanConfig) -> dict[str, se.Placement]:
    """The placements that are not left to the default plan, by table."""
    chosen = {}
    for table, placement in (("user", config.user), ("item", config.item)):
        if placement.kind != "auto":
            settings = placement.model_dump(exclude={"kind"}, exclude_none=True)
            chosen[table] = getattr(se, placement.kind)(**settings)
    return chosen


def _dense_optimizer(config: DenseOptimizerConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return getattr(torch.optim, config.name)(parameters, lr=config.lr, weight_decay=config.weight_decay)
