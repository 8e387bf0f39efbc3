"""What `observed.json` and `summary.json` may hold, since a run's folder may come from anybody: `watch` and `train` write them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shardembed.config import plain_json

Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Number = Annotated[float, Field(ge=-1e300, le=1e300, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Histogram = Annotated[list[Count], Field(max_length=64)]
MOST_BINS = 1000
Shares = Annotated[list[Share], Field(max_length=MOST_BINS)]
FORMAT = 1


class _Part(BaseModel):
    # More than is known here is left alone: a newer version may have written it.
    model_config = ConfigDict(strict=True, extra="allow")


class Held(_Part):
    """What a rank holds: rows, and bytes."""

    rows: Count
    weights: Count
    state: Count


class Start(_Part):
    """When, at which step and on what a job of the run began."""

    time: str
    step: Count
    steps: Count | None = None
    model: str
    ranks: Annotated[int, Field(ge=1, lt=1 << 31)]
    ranks_per_node: Count
    host: str
    system: str
    processor: str
    cores: Count | None
    threads: Count
    device: str
    kernels: list[str]
    versions: dict[str, str]
    data: list[str]
    reserved: str = ""
    features: dict[str, str] = {}
    rows: dict[str, str] = {}
    held: list[Held] = []


class Stage(_Part):
    seconds: Number
    slowest: Number
    slowest_rank: Count
    waiting: Number
    bytes: Number
    collectives: Number
    beside: bool


class Rank(_Part):
    bytes: Number
    rows: Number


class Profile(_Part):
    steps: Count
    seconds: Number
    elsewhere: Number
    loading: Number | None = None
    ranks: Annotated[list[Rank], Field(min_length=1)]
    stages: dict[str, Stage]


class Line(_Part):
    """Of the rank that has most of a kind of memory."""

    largest_planned: Number | None
    largest_actual: Number | None
    largest_rank: Count | None


class Memory(_Part):
    samples: Count
    categories: dict[str, Line]
    tables: dict[str, Line]


class Top(_Part):
    """Shares of the lookups, by how many rows they go to."""

    one: Share = Field(alias="1")
    ten: Share = Field(alias="10")
    hundred: Share = Field(alias="100")
    thousand: Share = Field(alias="1000")


class Ids(_Part):
    lookups: Count
    distinct: Count
    top: Top
    reserved: Share
    ids_by_hits: Histogram
    lookups_by_hits: Histogram


class Look(_Part):
    step: Count
    profile: Profile
    memory: Memory
    ids: dict[str, Ids]


class Observed(_Part):
    format: Literal[1]
    starts: list[Start]
    look: Look | None


class CalibrationBins(_Part):
    """Rows for validation in bins by their predictions: of each the mean prediction, the share of clicks, and how many rows."""

    predicted: Shares
    observed: Shares
    rows: Annotated[list[Count], Field(max_length=MOST_BINS)]

    @model_validator(mode="after")
    def _alike(self) -> CalibrationBins:
        if not len(self.predicted) == len(self.observed) == len(self.rows):
            raise ValueError("predicted, observed and rows must be lists of the same length")
        return self


class Summary(_Part):
    """What `summary.json` must have; metrics are its other numbers. `best_step` made the weights that were evaluated, where these
    are not the last.
    """

    steps: Count
    samples_per_second: Number | None = None
    best_step: Count = 0
    calibration_bins: CalibrationBins | None = None


def observed(path: Path) -> dict[str, Any]:
    """What `observed.json` says.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is not what `watch` writes.
    """
    return _checked(path, Observed)


def summary(path: Path) -> dict[str, Any]:
    """As `observed`, of `summary.json`."""
    return _checked(path, Summary)


def _checked(path: Path, form: type[BaseModel]) -> dict[str, Any]:
    found = plain_json.read(path)
    try:
        form.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc'])) or 'the top level'}: {first['msg']}") from None
    return found
