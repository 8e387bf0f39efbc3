"""What the sections of all our YAML files share: strict and frozen models, the kinds of numbers in them, the sparse optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from shardembed import optim

Count = Annotated[int, Field(ge=1, lt=1 << 63)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Float = Literal["float32", "bfloat16", "float16", "float64"]
OptimizerName = Literal["SGD", "Adagrad", "RowwiseAdagrad", "Adam", "AdamW", "FTRL"]


class Section(BaseModel):
    # strict: `epochs: yes` is a mistake, not 1.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class OptimizerSection(Section):
    """A sparse optimizer: a name from `shardembed.optim` and the settings it takes."""

    name: OptimizerName = "RowwiseAdagrad"
    lr: Rate | None = None
    eps: NotNegative | None = None
    betas: tuple[float, float] | None = None
    weight_decay: NotNegative | None = None
    beta: NotNegative | None = None
    l1: NotNegative | None = None
    l2: NotNegative | None = None

    @field_validator("eps", "betas", "weight_decay", "beta", "l1", "l2")
    @classmethod
    def _belongs(cls, value: Any, info: ValidationInfo) -> Any:
        name = info.data.get("name")
        check_belongs(value, info, name, OPTIMIZERS.get(name, ()))
        return value

    def build(self) -> optim.TableOptimizer:
        """The settings that were given; the others keep the optimizer's own defaults."""
        return getattr(optim, self.name)(**self.model_dump(exclude={"name"}, exclude_none=True))


# lr first, then what the optimizer takes beside it.
OPTIMIZERS = {name: tuple(field.name for field in fields(getattr(optim, name))) for name in get_args(OptimizerName)}


def check_belongs(value: Any, info: ValidationInfo, owner: str | None, taken: Sequence[str]) -> None:
    """A setting that its owner (a kind, an optimizer) does not take is a mistake, even though others take it.

    Raises:
        ValueError: names the owner and what it takes.
    """
    if owner is None or value is None:  # the name itself was wrong, which has its own error
        return
    if info.field_name not in taken:
        raise ValueError(f"{owner} takes no {info.field_name!r}" + (f"; it takes {', '.join(taken)}" if taken else ""))
