"""What the sections of all our YAML files share: strict and frozen models, the kinds of numbers in them, the sparse optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, create_model, field_validator

from shardembed import optim

Count = Annotated[int, Field(ge=1, lt=1 << 63)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Float = Literal["float32", "bfloat16", "float16", "float64"]


class Section(BaseModel):
    # strict: `epochs: yes` is a mistake, not 1.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


# By optimizer, the settings it takes.
OPTIMIZERS = {name: tuple(field.name for field in fields(kind)) for name, kind in optim.NAMES.items()}


def _taken() -> dict[str, Any]:
    """All settings of all optimizers, as fields that may be left out."""
    types = {name: hint for kind in optim.KINDS for name, hint in get_type_hints(kind).items() if get_origin(hint) is not ClassVar}
    found: dict[str, Any] = {name: Rate if name == "lr" else NotNegative if hint is float else hint for name, hint in types.items()}
    return {name: (hint | None, None) for name, hint in found.items()}


if TYPE_CHECKING:

    class _Settings(Section):
        name: str = "RowwiseAdagrad"
        lr: float | None = None

else:
    # The name first: what is checked after it is looked up by it.
    name = Literal[tuple(OPTIMIZERS)]
    _Settings = create_model("_Settings", __base__=Section, name=(name, "RowwiseAdagrad"), **_taken())


class OptimizerSection(_Settings):
    """A sparse optimizer: a name from `shardembed.optim` and the settings it takes."""

    @field_validator("*")
    @classmethod
    def _belongs(cls, value: Any, info: ValidationInfo) -> Any:
        name = info.data.get("name")
        if info.field_name != "name" and name is not None:
            check_belongs(value, info, name, OPTIMIZERS[name])
        return value

    def build(self) -> optim.TableOptimizer:
        """The settings that were given; the others keep the optimizer's own defaults."""
        return optim.NAMES[self.name](**self.model_dump(exclude={"name"}, exclude_none=True))


def check_belongs(value: Any, info: ValidationInfo, owner: str | None, taken: Sequence[str]) -> None:
    """A setting that its owner (a kind, an optimizer) does not take is a mistake, even though others take it.

    Raises:
        ValueError: names the owner and what it takes.
    """
    if owner is None or value is None:  # the name itself was wrong, which has its own error
        return
    if info.field_name not in taken:
        raise ValueError(f"{owner} takes no {info.field_name!r}" + (f"; it takes {', '.join(taken)}" if taken else ""))
