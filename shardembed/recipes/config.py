"""The settings of a training job: one frozen model a section, read from YAML and from `--set`.

`load` gives a `Config` or raises one `ConfigError` that lists every mistake with file, line and column (or the `--set` it came
from) and, for a misspelt name, the nearest one that exists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, GetJsonSchemaHandler, TypeAdapter, ValidationError, model_validator
from pydantic_core import CoreSchema

from shardembed.config import located
from shardembed.config.explain import explain
from shardembed.config.hints import nearest
from shardembed.errors import ConfigError
from shardembed.recipes.common import (
    JobConfig,
    Paths,
    PlacementConfig,
    Probability,
    RankingConfig,
    Seed,
    TrainConfig,
    Workers,
    check_tables,
    or_text,
)
from shardembed.recipes.ctr_config import CTR_MODELS, CtrConfig
from shardembed.recipes.features_config import Features, check_features, check_texts, names_of_ids, with_roles
from shardembed.recipes.ids_config import DynamicIdsConfig, InteractionIdsConfig, any_ids
from shardembed.recipes.sequence_config import SEQUENCE_MODELS, SequenceConfig
from shardembed.recipes.split_config import LEAVE_ONE_OUT, RankingSplitConfig, check_split
from shardembed.tables.optimizer_section import Count, Float, NotNegative, Rate, Section

TABLES = ("user", "item")
TAKEN = (*TABLES, "negatives")  # names in the model, of which no feature may have one
MODELS = ("two_tower", *CTR_MODELS, *SEQUENCE_MODELS)
AnyConfig: TypeAlias = "Config | CtrConfig | SequenceConfig"


class GeneratorConfig(Section):
    """Interactions made up on the spot: users with a few planted tastes each, items of Zipf popularity."""

    users: Count = 40_000
    items: Count = 20_000
    interactions: Count = 600_000
    tastes: Count = 100
    zipf: NotNegative = 0.8
    seed: Seed = 0


class DataConfig(Section):
    """Where interactions come from. `path` is a file, a pattern, or a list of these; `null` is the built-in generator. A
    file's format is told by its suffix.

    `on_bad_row: skip` leaves out rows of a file that do not hold two ids, and reports them. `workers` processes of each rank read
    what is trained on, ahead of the training; with 0 each rank reads between its steps. Users and items are texts or any integers
    of 64 bits, unless `ids: numbered` says that they are numbered from 0; columns in `texts` are texts though they hold digits.
    `features` are what else is known of a user or an item: columns of the interactions, of which the last row in training counts,
    or of files `users` and `items` with a row for each. `split` says what is held out, maybe by the column `time`.
    """

    path: Paths = None
    user: str = "user_id"
    item: str = "item_id"
    time: str | None = None
    features: Features = ()
    users: Paths = None
    items: Paths = None
    texts: tuple[str, ...] = ()
    on_bad_row: Literal["raise", "skip"] = "raise"
    ids: InteractionIdsConfig | None = None
    generator: GeneratorConfig = GeneratorConfig()
    split: RankingSplitConfig = LEAVE_ONE_OUT
    holdout_seed: Seed = 0
    shuffle_buffer: Annotated[int, Field(ge=0)] = 1 << 18
    workers: Workers = 0

    @model_validator(mode="before")
    @classmethod
    def _with_roles(cls, values: Any) -> Any:
        return with_roles(values, ("user", "item", "time"))

    @model_validator(mode="after")
    def _known(self) -> DataConfig:
        check_features(self.features, {"user": self.user, "item": self.item, "time": self.time}, sides=True)
        check_tables(self.ids.tables if self.ids else {}, (*TABLES, *(one.name for one in self.features if one.has_table)))
        check_split(self.split, self.time)
        if self.split.kind == "time" and self.path is None:
            raise ValueError("split: time goes by data.time, and what the generator makes has no times: set data.path")
        check_texts(self.texts, (self.user, self.item, *names_of_ids(self.features)))
        for feature in self.features:
            if feature.name in TAKEN:
                raise ValueError(
                    f"features: {feature.name!r} is what the model itself calls something; give the column another name"
                )
        for side, path in (("user", self.users), ("item", self.items)):
            if path is not None and not any(feature.of == side for feature in self.features):
                raise ValueError(f"{side}s: no feature is said to be of: {side}, so nothing would be read of that file")
        return self

    @property
    def any_ids(self) -> DynamicIdsConfig | None:
        """How tables take any id; None where ids are the numbers of rows."""
        return any_ids(self.ids, self.path is not None)


class ModelConfig(Section):
    """The two towers. `towers` lists hidden sizes of a residual MLP on top of both tables; empty means none. `dropout` is of what
    goes into the towers: the row of a user or item with what features add.
    """

    kind: Literal["two_tower"] = "two_tower"
    embedding_dim: Count = 64
    towers: tuple[Count, ...] = ()
    dropout: Probability = 0.0
    negatives: Count = 512
    temperature: Rate = 0.5
    init_std: Rate = 0.05
    table_dtype: Float = "float32"


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

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return or_text(handler(schema), ["auto"])


class Config(JobConfig):
    """A whole training job of a two-tower model."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    plan: PlanConfig = PlanConfig()
    eval: RankingConfig = RankingConfig()


def load(path: str | Path, overrides: Sequence[str] = (), named: bool = True) -> AnyConfig:
    """Read a configuration file and apply `--set` overrides (`"train.epochs=3"`), in order. `model.kind` says which kind of job it
    is. `named` by the user, or else found in a folder, where it must be a regular file.

    Raises:
        ConfigError: something in the file or in an override is wrong; all mistakes are listed, each with its place.
    """
    document = located.load(path, named)
    for option in overrides:
        document.override(option)
    if document.values.get("name") is None:
        document.values["name"] = Path(path).stem
    return _validated(document)


def given(config: str | Path | Mapping[str, Any] | JobConfig, settings: Mapping[str, Any] | None = None) -> JobConfig:
    """The configuration that a program gives, as a file, as nested mappings, or ready; then `settings` by their dotted names.

    Raises:
        ConfigError: as `load`; the place of a value is said in words of Python.
    """
    if isinstance(config, JobConfig):
        if settings:
            raise ConfigError("settings: a configuration that is ready takes no further ones; give a file or a dict")
        return config
    if not isinstance(config, str | Path | Mapping):
        raise ConfigError(f"config: a file, a dict or a configuration is wanted, not {located.brief(config)}")
    is_file = isinstance(config, str | Path)
    document = located.load(config) if is_file else located.of(config)
    for name, value in (settings or {}).items():
        document.put(name, value)
    if document.values.get("name") is None:
        document.values["name"] = Path(config).stem if is_file else "run"
    return _validated(document)


def _validated(document: located.Located) -> AnyConfig:
    kind = _kind(document)
    root = CtrConfig if kind in CTR_MODELS else SequenceConfig if kind in SEQUENCE_MODELS else Config
    try:
        return root.model_validate(document.values)
    except ValidationError as error:
        raise explain(error, root, document) from None


def schema() -> dict[str, Any]:
    """The JSON schema of a configuration file, for editors."""
    found = TypeAdapter(Config | CtrConfig | SequenceConfig).json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "shardembed train", **found}


def _kind(document: located.Located) -> object:
    model = document.values.get("model")
    kind = model.get("kind", "two_tower") if isinstance(model, dict) else "two_tower"
    if kind not in MODELS:
        place = document.place(("model", "kind"))
        said = f"{located.brief(kind)} is not one of {', '.join(MODELS)}{nearest(str(kind), MODELS)}"
        raise ConfigError(f"{place}: model.kind: {said}")
    return kind
