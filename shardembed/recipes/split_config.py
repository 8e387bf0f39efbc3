"""The settings of what is held out of training, where items are ranked for users."""

from __future__ import annotations

from datetime import date, datetime, timedelta, timezone
from typing import Annotated, Any, Literal

from pydantic import Field, GetJsonSchemaHandler, ValidationInfo, field_validator, model_validator
from pydantic_core import CoreSchema

from shardembed.recipes.common import or_text
from shardembed.tables.optimizer_section import Section, check_belongs

SPLITS = {"leave_one_out": (), "last": (), "ratio": ("share",), "time": ("share", "start")}  # kind -> the settings it takes
BY_TIME = ("last", "time")  # kinds that go by data.time
Part = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]


class RankingSplitConfig(Section):
    """Which interactions are held out, of two or more that a user has: one by hash (`leave_one_out`), the `last`, a `share` of them
    by hash (`ratio`), or, whatever users have, the newest `share` of all or those from `start` on (`time`: a number or a date, as
    data.time has them). With `validation: true` as many are held out once more, for the evaluations during training.
    """

    kind: Literal["leave_one_out", "last", "ratio", "time"]
    share: Part | None = None
    start: int | str | None = None
    validation: bool = False

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("start"), date):  # as YAML reads what looks like one
            return {**value, "start": value["start"].isoformat()}
        return {"kind": value} if isinstance(value, str) else value

    @field_validator("share", "start")
    @classmethod
    def _belongs(cls, value: Any, info: ValidationInfo) -> Any:
        check_belongs(value, info, info.data.get("kind"), SPLITS.get(info.data.get("kind") or "", ()))
        return value

    @field_validator("start")
    @classmethod
    def _is_time(cls, value: int | str | None) -> int | str | None:
        if isinstance(value, str):
            _microseconds(value)
        return value

    @model_validator(mode="after")
    def _complete(self) -> RankingSplitConfig:
        if self.kind == "ratio" and self.share is None:
            raise ValueError("ratio needs 'share', for example {kind: ratio, share: 0.1}")
        if self.kind == "time" and (self.share is None) == (self.start is None):
            raise ValueError("time needs one of 'share' and 'start', for example {kind: time, share: 0.1}")
        if self.validation and self.start is not None:
            raise ValueError("validation: give 'share' rather than 'start', by which two parts are held out one before the other")
        return self

    @property
    def moment(self) -> int:
        """`start` as sources give times: dates are microseconds since 1970."""
        assert self.start is not None
        return _microseconds(self.start) if isinstance(self.start, str) else self.start

    @property
    def by_time(self) -> bool:
        """It goes by data.time."""
        return self.kind in BY_TIME

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return or_text(handler(schema), ["leave_one_out", "last"])


LEAVE_ONE_OUT, LAST = RankingSplitConfig(kind="leave_one_out"), RankingSplitConfig(kind="last")


def _microseconds(text: str) -> int:
    try:
        moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        raise ValueError(f"{text!r} is no ISO 8601 date such as 2024-05-31 or 2024-05-31T18:30:00") from None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
    return (moment - datetime(1970, 1, 1, tzinfo=timezone.utc)) // timedelta(microseconds=1)


def check_split(split: RankingSplitConfig, time: str | None) -> None:
    """
    Raises:
        ValueError: a split by moments of data that have none.
    """
    if split.kind == "time" and time is None:
        raise ValueError("split: time goes by data.time, which is not set")
