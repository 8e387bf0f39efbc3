"""The settings of a job that predicts the next item of a sequence: a SASRec-style model on interactions with times."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from shardembed.recipes.common import (
    EVERY,
    JobConfig,
    Paths,
    Probability,
    RankingConfig,
    Seed,
    TablesPlanConfig,
    TrainConfig,
    check_tables,
)
from shardembed.recipes.features_config import check_texts, with_roles
from shardembed.recipes.ids_config import DynamicIdsConfig, InteractionIdsConfig, any_ids
from shardembed.recipes.split_config import LAST, RankingSplitConfig, check_split
from shardembed.tables.optimizer_section import Count, Float, NotNegative, Rate, Section

SEQUENCE_MODELS = ("sasrec",)
SEQUENCE_TABLES = ("item",)


class ChainConfig(Section):
    """Sequences made up on the spot, from a Markov chain: each item has `successors` that follow it, the first most often, and with
    probability `noise` any item follows, by popularity. `length` is the mean of a user.
    """

    users: Count = 10_000
    items: Annotated[int, Field(ge=2, lt=1 << 32)] = 2_000
    length: Count = 20
    successors: Count = 5
    noise: Probability = 0.2
    zipf: NotNegative = 0.8
    seed: Seed = 0


class SequenceDataConfig(Section):
    """Where interactions come from. `path` is a file, a pattern, or a list of these; `null` is the built-in generator. A
    file's format is told by its suffix.

    Every rank holds all of it in memory and takes batches from there, so there are no `workers` that read ahead.

    `time` is a column of whole numbers or of dates, by which each user's rows are sorted; `null` where they are in order already.
    Users and items may be texts or any integers of 64 bits, unless `ids: numbered` says that items are numbered from 0; columns in
    `texts` are read as texts though they hold digits.
    """

    path: Paths = None
    user: str = "user_id"
    item: str = "item_id"
    time: str | None = "timestamp"
    texts: tuple[str, ...] = ()
    on_bad_row: Literal["raise", "skip"] = "raise"
    ids: InteractionIdsConfig | None = None
    generator: ChainConfig = ChainConfig()
    split: RankingSplitConfig = LAST
    holdout_seed: Seed = 0

    @model_validator(mode="before")
    @classmethod
    def _with_roles(cls, values: Any) -> Any:
        return with_roles(values, ("user", "item", "time"))

    @model_validator(mode="after")
    def _ends_in_time(self) -> SequenceDataConfig:
        if self.split.validation and not self.split.by_time:
            raise ValueError("split: validation is for last and time, after which a sequence goes on; leave it out")
        check_split(self.split, self.time)
        check_texts(self.texts, (self.user, self.item))
        return self

    @field_validator("ids")
    @classmethod
    def _known(cls, value: InteractionIdsConfig | None) -> InteractionIdsConfig | None:
        check_tables(value.tables if value else {}, SEQUENCE_TABLES)
        return value

    @property
    def any_ids(self) -> DynamicIdsConfig | None:
        """As of two towers."""
        return any_ids(self.ids, self.path is not None)


class SequenceModelConfig(Section):
    """Causal self-attention over the last `max_length` items of a user; `feedforward` is the hidden size behind the attention."""

    kind: Literal["sasrec"] = "sasrec"
    embedding_dim: Count = 64
    max_length: Count = 50
    layers: Count = 2
    heads: Count = 2
    feedforward: Count = 128
    dropout: Probability = 0.1
    negatives: Count = 512
    init_std: Rate = 0.05
    table_dtype: Float = "float32"

    @field_validator("heads")
    @classmethod
    def _divides(cls, value: int, info: ValidationInfo) -> int:
        dim = info.data.get("embedding_dim", value)
        if dim % value:
            raise ValueError(f"{value} heads do not divide embedding_dim {dim}; each takes an equal part of the columns")
        return value


class SequenceTrainConfig(TrainConfig):
    """The loop, whose samples are sequences, one a user and epoch."""

    epochs: Count = 10
    global_batch_size: Count = 256


class SequenceEvalConfig(RankingConfig):
    """As of two towers, but users may come back to an item: repeats are ranked unless it is said that they are not."""

    repeats: bool = True


class SequenceConfig(JobConfig):
    """A whole training job of a model that predicts the next item."""

    data: SequenceDataConfig = SequenceDataConfig()
    model: SequenceModelConfig = SequenceModelConfig()
    train: SequenceTrainConfig = SequenceTrainConfig()
    plan: TablesPlanConfig = TablesPlanConfig({})
    eval: SequenceEvalConfig = SequenceEvalConfig()

    @field_validator("plan")
    @classmethod
    def _known(cls, value: TablesPlanConfig) -> Any:
        check_tables(value.root, SEQUENCE_TABLES, EVERY)
        return value
