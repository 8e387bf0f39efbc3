"""The small state of a checkpoint, as it stands in its JSON: checked before any of it is used."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shardembed.errors import CheckpointError

Count = Annotated[int, Field(ge=0, lt=1 << 63)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Group(_Strict):
    """A param group of the dense optimizer: the keys of its weights, and its settings."""

    of: list[str]
    settings: dict[str, Any]


class TableSettings(_Strict):
    """The name of a table's optimizer, and the settings of its param group."""

    optimizer: str
    settings: dict[str, Any]


class OptimizerState(_Strict):
    name: str | None = Field(alias="class")
    groups: list[Group]
    tables: dict[str, TableSettings]
    skipped: Count


class Small(_Strict):
    """`steps`: taken, by table. `scalars`: optimizer state that is no tensor of a weight's shape, by key and name. `stateful`:
    schedulers and extras, by name. `model`: extra state of modules. `random`: a state a rank. Values are as `codec` makes them.
    """

    progress: Any
    optimizer: OptimizerState
    has_optimizer: bool
    steps: dict[str, Count]
    stateful: dict[str, Any]
    model: dict[str, Any]
    scalars: dict[str, dict[str, Any]]
    random: list[Any] = Field(min_length=1)


def checked(data: Any, where: str) -> dict[str, Any]:
    """`data` again, if it is the small state of a checkpoint.

    Raises:
        CheckpointError: it is not; says which part is wrong.
    """
    try:
        return Small.model_validate(data).model_dump(by_alias=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the top level"
        raise CheckpointError(f"{where}: {place}: {first['msg']}") from None
