"""The settings of a training job: one frozen model a section, read from YAML and from `--set`.

`load` gives a `Config` or raises one `ConfigError` that lists every mistake with file, line and column (or the `--set` it came
from) and, for a misspelt name, the nearest one that exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from shardembed import located
from shardembed.explain import explain
from shardembed.sections import Count, Float, NotNegative, OptimizerSection, Rate, Section, check_belongs

TABLES = ("user", "item")
KINDS = {  # kind -> the settings it takes beside `packing`
    "auto": (),
    "table_wise": ("rank",),
    "row_wise": ("ranks", "bounds", "strided"),
    "column_wise": ("ranks",),
    "table_row_wise": ("node", "strided"),
    "grid": ("strips", "ranks", "strided"),
    "replicated": (),
}
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]


class GeneratorConfig(Section):
    """Interactions made up on the spot: users with a few planted tastes each, items of Zipf popularity."""

    users: Count = 40_000
    items: Count = 20_000
    interactions: Count = 600_000
    tastes: Count = 100
    zipf: NotNegative = 0.8
    seed: Seed = 0


class DataConfig(Section):
    """Where interactions come from. `path: null` is the built-in generator; a file's format is told by its suffix.

    `on_bad_row: skip` leaves out rows of a file that do not hold two ids, and reports them.
    """

    path: str | None = None
    user: str = "user_id"
    item: str = "item_id"
    on_bad_row: Literal["raise", "skip"] = "raise"
    generator: GeneratorConfig = GeneratorConfig()
    holdout_seed: Seed = 0
    shuffle_buffer: Annotated[int, Field(ge=0)] = 1 << 18


class ModelConfig(Section):
    """The two towers. `towers` lists hidden sizes of a residual MLP on top of both tables; empty means none."""

    embedding_dim: Count = 64
    towers: tuple[Count, ...] = ()
    negatives: Count = 512
    temperature: Rate = 0.5
    init_std: Rate = 0.05
    table_dtype: Float = "float32"


class TableOptimizerConfig(OptimizerSection):
    """The sparse optimizer of both tables: a name from `shardembed.optim`, its `lr`, and what else it takes."""

    lr: Rate | None = 0.1


class DenseOptimizerConfig(Section):
    """The torch optimizer of the towers; unused when there are none."""

    name: Literal["AdamW", "Adam", "SGD"] = "AdamW"
    lr: Rate = 1e-3
    weight_decay: NotNegative = 0.0


class OptimizerConfig(Section):
    tables: TableOptimizerConfig = TableOptimizerConfig()
    dense: DenseOptimizerConfig = DenseOptimizerConfig()


class TrainConfig(Section):
    """The loop. `global_batch_size` is over all ranks together; `max_steps` ends training early."""

    epochs: Count = 4
    global_batch_size: Count = 2048
    max_steps: Count | None = None
    seed: Seed = 0


class PlacementConfig(Section):
    """How one table is cut: a kind, or a mapping with the kind and its settings."""

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


class PlanConfig(Section):
    """Where the tables lie: `auto`, or a placement for some of the tables."""

    user: PlacementConfig = PlacementConfig()
    item: PlacementConfig = PlacementConfig()

    @model_validator(mode="before")
    @classmethod
    def _auto(cls, value: Any) -> Any:
        if isinstance(value, str):
            if value != "auto":
                raise ValueError(f"{value!r} is not a plan; write 'auto', or a mapping by table: {{user: row_wise, item: auto}}")
            return {}
        return value


class CheckpointConfig(Section):
    """A checkpoint every so many steps, of which the newest `keep` stay. `every_steps: null` saves none, and resumes nothing."""

    every_steps: Count | None = 500
    keep: Count = 2


class EvalConfig(Section):
    """Cut-off of recall and NDCG; `users` evaluates only that many of the held-out users, picked by hash."""

    k: Count = 20
    users: Count | None = None


class Config(Section):
    """A whole training job."""

    name: str | None = Field(default=None, pattern=r"^[\w.-]+$", max_length=100)
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    plan: PlanConfig = PlanConfig()
    wire_dtype: Literal["float32", "bfloat16", "float16", "int8"] | None = None
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    run_dir: str = "runs"


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file and apply `--set` overrides (`"train.epochs=3"`), in order.

    Raises:
        ConfigError: something in the file or in an override is wrong; all mistakes are listed, each with its place.
    """
    document = located.load(path)
    for option in overrides:
        document.override(option)
    if document.values.get("name") is None:
        document.values["name"] = Path(path).stem
    try:
        return Config.model_validate(document.values)
    except ValidationError as error:
        raise explain(error, Config, document) from None
