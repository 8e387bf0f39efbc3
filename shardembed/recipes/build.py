"""From settings to objects: the model with its optimizer, ready for a training loop."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NoReturn, TypedDict, TypeVar

import torch
from torch.nn.parallel import DistributedDataParallel

import shardembed as se
from shardembed.comm.comm import Comm
from shardembed.comm.job import default_device
from shardembed.errors import DataError
from shardembed.recipes.common import EVERY, DenseOptimizerConfig, JobConfig, PlacementConfig
from shardembed.recipes.config import Config
from shardembed.recipes.ctr_config import CtrConfig
from shardembed.recipes.data.clicks.encode import ClickBatch, Encoder
from shardembed.recipes.data.clicks.moments import Moments
from shardembed.recipes.data.clicks.scan import ClickData
from shardembed.recipes.data.interactions import Interactions, Pairs
from shardembed.recipes.data.numbering import Ids
from shardembed.recipes.data.sequences import SequencePart, Sequences
from shardembed.recipes.ids_config import DynamicIdsConfig
from shardembed.recipes.models import ctr
from shardembed.recipes.models.any_ids import AnyIds
from shardembed.recipes.models.ctr import ClickModel
from shardembed.recipes.models.sampling import NegativeSampler
from shardembed.recipes.models.sasrec import Sasrec, SequenceBatch, dropout_of
from shardembed.recipes.models.two_tower import Batch, TwoTower
from shardembed.recipes.sequence_config import SEQUENCE_TABLES, SequenceConfig

Read = TypeVar("Read")


@dataclass(frozen=True)
class TrainingJob:
    """A model that is ready to train.

    Attributes:
        model: the model itself.
        wrapped: what a step calls: the model, or DistributedDataParallel around it.
        optimizer: of tables and dense parameters.
    """

    model: Any
    wrapped: torch.nn.Module
    optimizer: se.Optimizer

    def step(self, part: Any, step: int) -> torch.Tensor:
        """Train on this rank's part of a global batch. Collective. Returns this rank's loss; the mean over the ranks is the loss of
        the batch.

        Raises:
            NonFiniteGradientError: on all ranks: the loss or a gradient of any is inf or nan, and the job is to stop for that.
        """
        loss = self.wrapped(self._batch(part.to(default_device()), step))
        # A loss that is not finite may have finite gradients (log-loss of an infinite logit): then these are to be nan, so that the
        # optimizer sees on every rank what it is to see, in the one look that it takes.
        slope = torch.ones_like(loss).masked_fill(~torch.isfinite(loss.detach()), torch.nan)
        with Comm.of().guarding("average dense gradients"):
            loss.backward(slope)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def given(self, read: Iterator[Read]) -> Iterator[Read]:
        """What `read` gives, each of which the model is called with next, on all ranks. A DataError of one rank goes to all of
        them, in the place of its call.
        """
        while True:
            try:
                found = next(read)
            except StopIteration:
                return
            except DataError as error:
                self._refuse(error)
            yield found

    def _refuse(self, error: DataError) -> NoReturn:
        def nothing() -> NoReturn:
            raise error

        # A call that raises while its batch is read, so the error goes to all ranks with the counts that they wait for.
        self.model.tables.journey.forward(nothing, ())
        raise AssertionError("a call without a batch goes on")

    def _batch(self, part: Any, step: int) -> Any:
        """The part as the model takes it."""
        raise NotImplementedError


@dataclass(frozen=True)
class Job(TrainingJob):
    """A two-tower model's.

    Attributes:
        model: the two towers.
        sampler: of the negatives.
    """

    model: TwoTower
    sampler: NegativeSampler

    def _batch(self, part: Pairs, step: int) -> Batch:
        return Batch(part.users, part.items, self.sampler.draw(step).to(part.users.device), part.global_size, part.first, step)


@dataclass(frozen=True)
class CtrJob(TrainingJob):
    """That of a model which predicts clicks.

    Attributes:
        model: of any kind.
        encoder: makes its batches of clicks.
        config: of the job.
    """

    model: ClickModel
    encoder: Encoder
    config: CtrConfig

    def _batch(self, part: ClickBatch, step: int) -> ClickBatch:
        return replace(part, drop=ctr.dropout_of(self.config.model, self.config.train.seed, step, part.first))


@dataclass(frozen=True)
class SequenceJob(TrainingJob):
    """That of a model which predicts the next item.

    Attributes:
        model: SASRec's.
        sampler: of the negatives.
        config: of the job.
    """

    model: Sasrec
    sampler: NegativeSampler
    config: SequenceConfig

    def _batch(self, part: SequencePart, step: int) -> SequenceBatch:
        return SequenceBatch(
            part.items,
            torch.from_numpy(part.lengths),
            self.sampler.draw(step).to(part.items.device),
            part.targets,
            dropout_of(self.config.model, self.config.train.seed, step, part.first),
        )


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
        any_ids=_any_ids(config.data.any_ids, data.ids),
        known=data.known,
        **_settings(config),
    ).to(default_device())
    return Job(model, *_trained(model, config), sampler)


def build_ctr(config: CtrConfig, data: ClickData) -> CtrJob:
    """As `build`."""
    encoder = Encoder.of(config.data, data.vocabularies)
    # Numbers of the Criteo layout are logarithms, and were trained on as they are before there were others.
    moments = data.counted.moments if config.data.features and encoder.numbers.columns else None
    model = click_model(config, encoder, moments)
    return CtrJob(model, *_trained(model, config), encoder, config)


def click_model(config: CtrConfig, encoder: Encoder, moments: Moments | None) -> ClickModel:
    """A model that predicts clicks, on this rank's device. Collective.

    Args:
        moments: of the numbers. A model that is to be loaded takes any, of the columns there are.
    """
    return ClickModel(
        config.model,
        len(encoder.numbers.columns),
        config.data.columns,
        encoder.sizes,
        moments=moments,
        ids=config.data.ids if config.data.ids.kind == "dynamic" else None,
        **_settings(config),
    ).to(default_device())


def build_sequence(config: SequenceConfig, data: Sequences) -> SequenceJob:
    """As `build`."""
    sampler = NegativeSampler(data.item_counts, config.model.negatives, config.train.seed)
    model = Sasrec(
        config.model,
        data.items,
        sampler.log_expected,
        any_ids=_any_ids(config.data.any_ids, data.ids),
        **_settings(config),
    ).to(default_device())
    return SequenceJob(model, *_trained(model, config), sampler, config)


def _any_ids(settings: DynamicIdsConfig | None, ids: Ids | None) -> AnyIds | None:
    return None if settings is None or ids is None else AnyIds(settings, ids)


class _Settings(TypedDict):
    """What every model takes, whatever it predicts."""

    autocast: torch.dtype | None
    optimizer: se.optim.TableOptimizer
    plan: dict[str, se.Placement]
    wire_dtype: torch.dtype | None
    seed: int


def _settings(config: JobConfig) -> _Settings:
    return {
        "autocast": _dtype(config.train.autocast),
        "optimizer": config.optimizer.tables.build(),
        "plan": placements(config),
        "wire_dtype": _dtype(config.wire_dtype),
        "seed": config.train.seed,
    }


def _trained(model: torch.nn.Module, config: JobConfig) -> tuple[torch.nn.Module, se.Optimizer]:
    """What a step calls, and what then steps."""
    parameters = list(model.parameters())
    dense = _dense_optimizer(config.optimizer.dense, parameters) if parameters else None
    wrapped: torch.nn.Module = model
    if parameters and se.world_size() > 1:
        # Buffers are the same on every rank and never change. Buckets that were rearranged after the first batch of a
        # process would change the order of sums on three ranks, and so the bits of a resumed run: looking for unused parameters
        # prevents it.
        with warnings.catch_warnings():
            # torch wants another name for `broadcast_buffers`, which not all versions have and which does something else.
            warnings.simplefilter("ignore", FutureWarning)
            wrapped = DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=True)
    return wrapped, se.Optimizer(model, dense, on_nonfinite="raise" if config.train.on_nonfinite == "stop" else "skip")


def placements(config: JobConfig) -> dict[str, se.Placement]:
    """The placements that are not left to the default plan, by table."""
    if isinstance(config, CtrConfig | SequenceConfig):
        named, tables = config.plan.root, SEQUENCE_TABLES if isinstance(config, SequenceConfig) else config.data.tables
        wanted = {table: named.get(table) or named.get(EVERY) or PlacementConfig() for table in tables}
    else:
        assert isinstance(config, Config)
        wanted = {"user": config.plan.user, "item": config.plan.item}
    chosen = {}
    for table, placement in wanted.items():
        if placement.kind != "auto":
            settings = placement.model_dump(exclude={"kind"}, exclude_none=True)
            chosen[table] = getattr(se, placement.kind)(**settings)
    return chosen


def _dtype(name: str | None) -> torch.dtype | None:
    return getattr(torch, name) if name else None


def _dense_optimizer(config: DenseOptimizerConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return getattr(torch.optim, config.name)(parameters, lr=config.lr, weight_decay=config.weight_decay)
