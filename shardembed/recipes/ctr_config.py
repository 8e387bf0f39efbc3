"""The settings of a job that predicts clicks.

`data.features` lists the columns; those that are ids have a table each, with their name. Without it the columns are those of the
Criteo layout, which `data.integers` and `data.categories` name: numbers and ids in the same sense.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from shardembed.recipes.common import (
    EVERY,
    EvaluationConfig,
    Fraction,
    JobConfig,
    Names,
    Paths,
    Probability,
    Seed,
    TablesPlanConfig,
    TrainConfig,
    Workers,
    check_belongs_to_kind,
    check_tables,
)
from shardembed.recipes.features_config import (
    ColumnName,
    FeatureConfig,
    Features,
    check_features,
    check_texts,
    names_of_ids,
    with_roles,
)
from shardembed.recipes.ids_config import OF_DYNAMIC, DynamicIdsConfig
from shardembed.tables.optimizer_section import Count, Float, NotNegative, Section

CTR_MODELS = ("dlrm", "dcnv2", "wide")
IDS_TAKE = {"hash": ("num_embeddings", "tables", "seed"), "vocabulary": ("min_count", "max_size"), "dynamic": OF_DYNAMIC}
INTEGERS = tuple(f"I{number}" for number in range(1, 14))
CATEGORIES = tuple(f"C{number}" for number in range(1, 27))


class PlantedConfig(Section):
    """Clicks made up on the spot, from a logistic model over categories of Zipf popularity and over integers.

    `strength` is the standard deviation of the model's log-odds: the larger, the higher its AUC.
    """

    rows: Count = 200_000
    max_cardinality: Annotated[int, Field(ge=3, lt=1 << 24)] = 1000
    zipf: NotNegative = 1.1
    strength: NotNegative = 1.5
    seed: Seed = 0


class IdsConfig(DynamicIdsConfig):
    """How categories become rows. `hash`: `num_embeddings` rows a table (`tables` says it for single ones), of which row 0 is for
    missing values. `vocabulary`: the values that occur at least `min_count` times, at most `max_size` of them; row 0 is for all
    others and for missing values. `dynamic`: any id of 64 bits, integers as they are and texts by `se.hash64`; `capacity` of a
    table have a row at once (`tables` says it for single ones, `null`: all that come).
    """

    kind: Literal["hash", "vocabulary", "dynamic"] = "hash"  # type: ignore[assignment]
    num_embeddings: Annotated[int, Field(ge=2, lt=1 << 63)] = 10_000
    tables: dict[str, Annotated[int, Field(ge=2, lt=1 << 63)]] = Field(default_factory=dict)
    seed: Seed = 0
    min_count: Count = 1
    max_size: Count | None = None
    unknown: Literal["start", "zeros"] | None = None  # type: ignore[assignment]

    @field_validator("num_embeddings", "tables", "seed", "min_count", "max_size", "capacity", "eviction", "admission", "unknown")
    @classmethod
    def _belongs(cls, value: Any, info: ValidationInfo) -> Any:
        check_belongs_to_kind(cls, value, info, IDS_TAKE.get(info.data.get("kind") or "", ()))
        return value


class SplitConfig(Section):
    """Which rows are held out: `hash` picks a `fraction` of them by a hash of their number, `last` takes the end of the data, and
    `time` those of the latest times (by `data.time`; rows of one moment stay together, so it may be some more). As many are held
    out once more with `validation: true`, for the evaluations during training: others by the hash, or those before the test.
    """

    kind: Literal["hash", "last", "time"] = "hash"
    fraction: Fraction = 0.1
    seed: Seed = 0
    validation: bool = False

    @model_validator(mode="after")
    def _has_parts(self) -> SplitConfig:
        if self.validation and not self.fraction:
            raise ValueError("validation: with fraction 0 there are no rows for it; use a fraction above 0")
        return self


class CtrDataConfig(Section):
    """Where clicks come from. `path` is a file, a pattern such as day_*.gz, or a list of these; `null` is the built-in generator.

    `features` lists the columns that a model takes; files then have a header, and texts or any integers are ids, as all `ids` of
    kind `dynamic` (the default then). `time` names a column of times, `texts` those that are read as texts though they hold digits.

    Without `features`, files are of the Criteo layout. Text files have no header then: the label, `integers`, `categories`, by
    tabs. Of Parquet files these are column names. Categories are hexadecimal numbers of 32 bits or integers, and with dynamic `ids`
    any texts or integers.

    `validation_path` names files whose rows alone are held out, in place of those that `split` picks; with `split.validation` they
    are the test, and `split` picks of `path` what is for validation. `workers` processes of each rank read what is trained on,
    ahead of the training; with 0 each rank reads between its steps.
    """

    path: Paths = None
    validation_path: Paths = None
    label: ColumnName = "label"
    time: ColumnName | None = None
    features: Features = ()
    integers: Names = INTEGERS
    categories: Names = CATEGORIES
    texts: Names = ()
    on_bad_row: Literal["raise", "skip"] = "raise"
    ids: IdsConfig = IdsConfig()
    split: SplitConfig = SplitConfig()
    generator: PlantedConfig = PlantedConfig()
    shuffle_buffer: Annotated[int, Field(ge=0)] = 1 << 16
    workers: Workers = 0

    @model_validator(mode="before")
    @classmethod
    def _with_roles(cls, values: Any) -> Any:
        found = with_roles(values, ("label", "time"))
        if not isinstance(found, dict) or not found.get("features"):
            return found
        for name in ("integers", "categories"):
            if found.get(name):
                raise ValueError(f"features: they take the place of data.{name}; list its columns there, and leave it out")
        ids = found.get("ids", {})
        ids = {"kind": "dynamic", **ids} if isinstance(ids, dict) else ids  # which any text or integer is an id of
        return {**found, "integers": (), "categories": (), "ids": ids}

    @field_validator("validation_path")
    @classmethod
    def _beside_a_path(cls, value: Any, info: ValidationInfo) -> Any:
        if value and info.data.get("path", ()) is None:
            raise ValueError("validation files go with files to train on: set data.path too")
        return value

    @field_validator("categories")
    @classmethod
    def _once(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if not value and not info.data.get("features", True):
            raise ValueError("there must be one at least")
        others = (info.data.get("label"), *info.data.get("integers", ()))
        for name in value:
            if name in others or name == EVERY or "." in name:
                why = "is no integer or label too" if name in others else "may not be '*' or hold a dot"
                raise ValueError(f"{name!r}: a category has a table of that name, which {why}")
        return value

    @field_validator("ids")
    @classmethod
    def _known(cls, value: IdsConfig, info: ValidationInfo) -> IdsConfig:
        listed = tuple(one.name for one in info.data.get("features", ()) if one.has_table)
        check_tables(value.tables, listed or info.data.get("categories"))
        return value

    @model_validator(mode="after")
    def _fits(self) -> CtrDataConfig:
        check_features(self.features, {"label": self.label, "time": self.time}, sides=False)
        if self.features and not self.tables:
            raise ValueError(
                "features: none of them is an id, so there is no table to train; give a number some buckets, which make an id of it"
            )
        if self.features and self.path is None:
            raise ValueError("features: these are columns of files, which data.path names; the generator has columns of its own")
        for name, given in (("time", self.time), ("texts", self.texts)):
            if given and not self.features:
                raise ValueError(f"{name}: goes with data.features, and not with the columns of the Criteo layout")
        check_texts(self.texts, names_of_ids(self.features))
        if self.split.kind == "time" and self.time is None:
            raise ValueError("split: to split by time set data.time too, to the name of a column of times")
        parts = (not self.validation_path) + self.split.validation
        if parts * self.split.fraction >= 1:
            twice = ", as the test and for validation," if parts == 2 else ""
            leaves = f"split.fraction {self.split.fraction:g}{twice} leaves nothing to train on"
            raise ValueError(f"{leaves}; use one below {1 / parts:g}")
        return self

    @property
    def columns(self) -> Features:
        """What a model takes, of the Criteo layout too."""
        numbers = (FeatureConfig(name=name, kind="number") for name in self.integers)
        return self.features or (*numbers, *(FeatureConfig(name=name, kind="id") for name in self.categories))

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of the tables."""
        return tuple(one.name for one in self.columns if one.has_table)


DEEP = ("embedding_dim", "bottom", "top", "dropout")
MODEL_TAKES = {"dlrm": DEEP, "dcnv2": (*DEEP, "cross_layers", "cross_rank"), "wide": ()}  # kind -> the settings it takes


class CtrModelConfig(Section):
    """DLRM, DLRM with a low-rank cross network (`dcnv2`: DCN v2), or a `wide` one, which is linear: a weight for every id and every
    number, and no more. `bottom` and `top` list hidden sizes of the two MLPs, `dropout` is after each of them.
    """

    kind: Literal["dlrm", "dcnv2", "wide"] = "dlrm"
    embedding_dim: Count = 16
    bottom: tuple[Count, ...] = (64,)
    top: tuple[Count, ...] = (64, 32)
    dropout: Probability = 0.0
    cross_layers: Count = 3
    cross_rank: Count = 64
    table_dtype: Float = "float32"

    @field_validator("embedding_dim", "bottom", "top", "dropout", "cross_layers", "cross_rank")
    @classmethod
    def _belongs(cls, value: Any, info: ValidationInfo) -> Any:
        check_belongs_to_kind(cls, value, info, MODEL_TAKES.get(info.data.get("kind") or "", ()))
        return value

    @property
    def width(self) -> int:
        """Columns of the tables."""
        return 1 if self.kind == "wide" else self.embedding_dim


class CtrTrainConfig(TrainConfig):
    epochs: Count = 1


class CtrConfig(JobConfig):
    """A whole training job of a model that predicts clicks."""

    data: CtrDataConfig = CtrDataConfig()
    model: CtrModelConfig = CtrModelConfig()
    train: CtrTrainConfig = CtrTrainConfig()
    plan: TablesPlanConfig = TablesPlanConfig({})
    eval: EvaluationConfig = EvaluationConfig()

    @field_validator("plan")
    @classmethod
    def _known(cls, value: TablesPlanConfig, info: ValidationInfo) -> TablesPlanConfig:
        data = info.data.get("data")
        check_tables(value.root, data.tables if data is not None else None, EVERY)
        return value
