"""The settings of a job that predicts clicks: DLRM or DLRM-DCNv2 on files of the Criteo layout.

`data.integers` and `data.categories` name the columns; every category has a table of its own, with its name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from shardembed.recipes.common import (
    EVERY,
    EvaluationConfig,
    Fraction,
    JobConfig,
    Names,
    Paths,
    Seed,
    TablesPlanConfig,
    TrainConfig,
    Workers,
    check_tables,
)
from shardembed.recipes.ids_config import OF_DYNAMIC, DynamicIdsConfig
from shardembed.tables.optimizer_section import Count, Float, NotNegative, Section, check_belongs

CTR_MODELS = ("dlrm", "dcnv2")
TAKES = {"hash": ("num_embeddings", "tables", "seed"), "vocabulary": ("min_count", "max_size"), "dynamic": OF_DYNAMIC}
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
        # What a kind does not take may be said with its default, as in a configuration that was filled in.
        assert info.field_name is not None
        if value != cls.model_fields[info.field_name].get_default(call_default_factory=True):
            check_belongs(value, info, info.data.get("kind"), TAKES.get(info.data.get("kind") or "", ()))
        return value


class SplitConfig(Section):
    """Which rows are for validation: `hash` picks them by a hash of their number, `last` takes the end of the data."""

    kind: Literal["hash", "last"] = "hash"
    fraction: Fraction = 0.1
    seed: Seed = 0


class CtrDataConfig(Section):
    """Where clicks come from. `path` is a file, a pattern such as day_*.gz, or a list of these; `null` is the built-in generator.

    Text files have no header: the label, then `integers`, then `categories`, by tabs. Of Parquet files these are column names.
    Categories are hexadecimal numbers of 32 bits or integers, and with dynamic `ids` any texts or integers.
    `validation_path` names files that are for validation alone, in place of `split`. `workers` processes of each rank read what is
    trained on, ahead of the training; with 0 each rank reads between its steps.
    """

    path: Paths = None
    validation_path: Paths = None
    label: Annotated[str, Field(min_length=1)] = "label"
    integers: Names = INTEGERS
    categories: Annotated[Names, Field(min_length=1)] = CATEGORIES
    on_bad_row: Literal["raise", "skip"] = "raise"
    ids: IdsConfig = IdsConfig()
    split: SplitConfig = SplitConfig()
    generator: PlantedConfig = PlantedConfig()
    shuffle_buffer: Annotated[int, Field(ge=0)] = 1 << 16
    workers: Workers = 0

    @field_validator("validation_path")
    @classmethod
    def _beside_a_path(cls, value: Any, info: ValidationInfo) -> Any:
        if value and info.data.get("path", ()) is None:
            raise ValueError("validation files go with files to train on: set data.path too")
        return value

    @field_validator("categories")
    @classmethod
    def _once(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        others = (info.data.get("label"), *info.data.get("integers", ()))
        for name in value:
            if name in others or name == EVERY or "." in name:
                why = "is no integer or label too" if name in others else "may not be '*' or hold a dot"
                raise ValueError(f"{name!r}: a category has a table of that name, which {why}")
        return value

    @field_validator("ids")
    @classmethod
    def _known(cls, value: IdsConfig, info: ValidationInfo) -> IdsConfig:
        check_tables(value.tables, info.data.get("categories"))
        return value

    @model_validator(mode="after")
    def _holds_out(self) -> CtrDataConfig:
        if self.split.fraction == 1 and not self.validation_path:
            raise ValueError("split.fraction 1 leaves nothing to train on; use a fraction below 1")
        return self


class CtrModelConfig(Section):
    """DLRM, or DLRM with a low-rank cross network (DCN v2). `bottom` and `top` list hidden sizes of the two MLPs."""

    kind: Literal["dlrm", "dcnv2"] = "dlrm"
    embedding_dim: Count = 16
    bottom: tuple[Count, ...] = (64,)
    top: tuple[Count, ...] = (64, 32)
    cross_layers: Count = 3
    cross_rank: Count = 64
    table_dtype: Float = "float32"

    @field_validator("cross_layers", "cross_rank")
    @classmethod
    def _belongs(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        if value != cls.model_fields[info.field_name].default:
            check_belongs(value, info, info.data.get("kind"), ("cross_layers", "cross_rank") * (info.data.get("kind") == "dcnv2"))
        return value


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
        check_tables(value.root, data.categories if data is not None else None, EVERY)
        return value
