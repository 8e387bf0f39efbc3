"""The settings that all training jobs have, whatever they train on what: one frozen model a section."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    GetJsonSchemaHandler,
    PlainSerializer,
    RootModel,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema

from shardembed.config.hints import nearest
from shardembed.config.paths import elsewhere, is_url
from shardembed.tables.optimizer_section import Count, NotNegative, OptimizerSection, Rate, Section, check_belongs

KINDS = {  # kind -> the settings it takes beside `packing`
    "auto": (),
    "table_wise": ("rank",),
    "row_wise": ("ranks", "bounds", "strided"),
    "column_wise": ("ranks",),
    "table_row_wise": ("node", "strided"),
    "grid": ("strips", "ranks", "strided"),
    "replicated": (),
}
EVERY = "*"  # in a plan: all tables that it does not name
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]  # of something that may not always happen
Workers = Annotated[int, Field(ge=0, le=64)]  # processes of each rank


def _of_this_machine(value: str) -> str:
    if said := elsewhere(value):
        raise ValueError(said)
    return value


def _readable(value: str) -> str:
    if not is_url(value) and (said := elsewhere(value)):
        raise ValueError(said)
    return value


LocalPath = Annotated[str, AfterValidator(_of_this_machine)]
DataPath = Annotated[str, AfterValidator(_readable)]  # or a URL
Paths = Annotated[  # of files: one, a folder, a pattern, or a list of these
    tuple[DataPath, ...] | None,
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
    PlainSerializer(lambda value: value[0] if value and len(value) == 1 else value),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}),
]


class TableOptimizerConfig(OptimizerSection):
    """The sparse optimizer of all tables: a name from `shardembed.optim`, its `lr`, and what else it takes."""

    lr: Rate | None = 0.1


class DenseOptimizerConfig(Section):
    """The torch optimizer of the dense part; unused when there is none."""

    name: Literal["AdamW", "Adam", "SGD"] = "AdamW"
    lr: Rate = 1e-3
    weight_decay: NotNegative = 0.0


class OptimizerConfig(Section):
    """What trains the tables, and what trains the rest."""

    tables: TableOptimizerConfig = TableOptimizerConfig()
    dense: DenseOptimizerConfig = DenseOptimizerConfig()


class ScheduleConfig(Section):
    """Learning rates over the steps: from near 0 up to their full size, then down to `final` of it at the last step."""

    warmup_steps: Annotated[int, Field(ge=0)] = 0
    decay: Literal["none", "linear", "cosine"] = "none"
    final: Fraction = 0.0


class TrainConfig(Section):
    """The loop. `global_batch_size` is over all ranks together; `max_steps` ends training early; `autocast` computes the dense part
    in bfloat16. `on_nonfinite` is what happens when a loss or a gradient is inf or nan: the job stops, or the step is skipped.
    """

    epochs: Count = 4
    global_batch_size: Count = 2048
    max_steps: Count | None = None
    seed: Seed = 0
    schedule: ScheduleConfig = ScheduleConfig()
    autocast: Literal["bfloat16"] | None = None
    on_nonfinite: Literal["stop", "skip"] = "stop"


class PlacementConfig(Section):
    """How one table is cut: a kind, or a mapping with the kind and its settings. Rows are dealt out unless `strided: false` or
    `bounds` ask for contiguous blocks.
    """

    kind: Literal["auto", "table_wise", "row_wise", "column_wise", "table_row_wise", "grid", "replicated"] = "auto"
    rank: Annotated[int, Field(ge=0)] | None = None
    ranks: tuple[int, ...] | None = None
    bounds: tuple[int, ...] | None = None
    strided: bool | None = None
    strips: Count | None = None
    node: Annotated[int, Field(ge=0)] | None = None
    packing: Literal["unique", "bag"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @field_validator("rank", "ranks", "bounds", "strided", "strips", "node", "packing")
    @classmethod
    def _belongs(cls, value: Any, info: ValidationInfo) -> Any:
        kind = info.data.get("kind")
        always = () if kind in ("auto", "replicated") else ("packing",)
        check_belongs(value, info, kind, (*always, *KINDS.get(kind or "", ())))
        return value

    @model_validator(mode="after")
    def _complete(self) -> PlacementConfig:
        needed, example = {"table_wise": ("rank", 0), "table_row_wise": ("node", 0), "grid": ("strips", 2)}.get(self.kind, ("", 0))
        if needed and getattr(self, needed) is None:
            raise ValueError(f"{self.kind} needs {needed!r}, for example {{kind: {self.kind}, {needed}: {example}}}")
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return or_text(handler(schema), list(KINDS))


class TablesPlanConfig(RootModel[dict[str, PlacementConfig]]):
    """Where the tables lie: `auto`, one kind for all, or placements by table; "*" stands for all that are not named."""

    model_config = {"frozen": True, "strict": True}

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        if isinstance(value, str):
            if value not in KINDS:
                known = ", ".join(KINDS)
                raise ValueError(f"{value!r} is not one of {known}{nearest(value, KINDS)} (or write a mapping by table)")
            return {} if value == "auto" else {EVERY: value}
        return value

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return or_text(handler(schema), list(KINDS))


class CheckpointConfig(Section):
    """A checkpoint every so many steps, of which the newest `keep` stay. `every_steps: null` saves none, and resumes nothing."""

    every_steps: Count | None = 500
    keep: Count = 2


class EvaluationConfig(Section):
    """`every_steps` evaluates during training too: at the end of each `epoch`, after every so many steps, or not (`null`). `keep`
    says which weights the job ends with: those of the `best` evaluation, or the `last` ones. `patience` ends training after so
    many evaluations in a row of which none is better than the best before by more than `min_gain`.
    """

    every_steps: Count | Literal["epoch"] | None = "epoch"
    keep: Literal["best", "last"] = "best"
    patience: Count | None = None
    min_gain: NotNegative = 0.0

    @field_validator("patience")
    @classmethod
    def _has_evaluations(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("every_steps", 1) is None:
            raise ValueError("patience counts evaluations during training: set eval.every_steps too")
        return value


class MlflowConfig(Section):
    """`true`, or a mapping: the experiment (else that of the active run, or "shardembed"), the name of the run (else that of its
    folder), and the store or server, as MLFLOW_TRACKING_URI would say it.
    """

    experiment: Annotated[str, Field(min_length=1)] | None = None
    run_name: Annotated[str, Field(min_length=1)] | None = None
    tracking_uri: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {} if value is True else value

    @field_validator("tracking_uri")
    @classmethod
    def _no_password(cls, value: str | None) -> str | None:
        if value and "@" in urlsplit(value).netloc:
            raise ValueError("settings are kept with the run: put users and passwords into MLFLOW_TRACKING_URI, or its like")
        return value

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "boolean"}, handler(schema)]}


class LogConfig(Section):
    """What is shown of a run beside its terminal. `page` watches a few steps before every checkpoint and at the end, and writes
    run.html at the end; `tensorboard` writes scalars into the run's folder, and `mlflow` tells MLflow of it.
    """

    page: bool = True
    tensorboard: bool = False
    mlflow: Annotated[MlflowConfig | None, BeforeValidator(lambda value: None if value is False else value)] = None


class RankingConfig(EvaluationConfig):
    """Cut-off of recall and NDCG; `users` evaluates only that many of the held-out users, picked by hash. With `repeats: false`,
    items that a user has met in training are no candidates, and users whose held-out item is one of them are left out and counted.
    """

    k: Count = 20
    users: Count | None = None
    repeats: bool = False


class JobConfig(Section):
    """A whole training job; its kinds say what data, model, plan and evaluation are."""

    name: str | None = Field(default=None, pattern=r"^[\w.-]+$", max_length=100)
    data: Any = None
    model: Any = None
    optimizer: OptimizerConfig = OptimizerConfig()
    train: Any = None
    plan: Any = None
    wire_dtype: Literal["float32", "bfloat16", "float16", "int8"] | None = None
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: Any = None
    log: LogConfig = LogConfig()
    run_dir: LocalPath = "runs"


def or_text(schema: dict[str, Any], texts: list[str]) -> dict[str, Any]:
    """The JSON schema of a section that has a short form: one of `texts`."""
    return {"anyOf": [{"enum": texts}, schema], **({"default": schema["default"]} if "default" in schema else {})}


def check_belongs_to_kind(section: type[Section], value: Any, info: ValidationInfo, taken: Sequence[str]) -> None:
    """As `check_belongs`, of a section whose `kind` takes these settings. What it does not take may be said with its default, as in
    a configuration that was filled in.

    Raises:
        ValueError: names the kind and what it takes.
    """
    assert info.field_name is not None
    if value != section.model_fields[info.field_name].get_default(call_default_factory=True):
        check_belongs(value, info, info.data.get("kind"), taken)


def check_tables(named: dict[str, Any], tables: tuple[str, ...] | None, *others: str) -> None:
    """
    Raises:
        ValueError: `named` has one that is neither among `tables` nor `others`.
    """
    for name in named:
        if tables is not None and name not in (*tables, *others):
            raise ValueError(f"there is no table {name!r}{nearest(name, tables)}; the tables are {', '.join(tables)}")


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{twice[0]!r} occurs twice; every column needs a name of its own")
    return names


Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], AfterValidator(_distinct)]
