"""The settings of tables that take any id of 64 bits: how many ids have a row, who gets one, who leaves."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, GetJsonSchemaHandler, ValidationInfo, field_validator, model_validator
from pydantic_core import CoreSchema

import shardembed as se
from shardembed.recipes.common import check_belongs_to_kind, or_text
from shardembed.tables.dynamic import LONGEST
from shardembed.tables.optimizer_section import Section, check_belongs

EVICTIONS = {"lru": (), "lfu": ("halve_every",), "ttl": ("steps",)}  # kind -> the settings it takes
ADMISSIONS = {"min_count": ("count",), "probability": ("p",)}
OF_DYNAMIC = ("capacity", "tables", "eviction", "admission", "unknown")
Kept = Annotated[int, Field(ge=1, le=LONGEST)]
Capacity = Annotated[int, Field(ge=1, lt=1 << 63)]
Chance = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


class EvictionConfig(Section):
    """Who leaves: `lru` and `lfu` when there is no room for a newcomer, `ttl` when no gradient has come in so many `steps`.
    `halve_every` so many steps, counts of `lfu` are halved.
    """

    kind: Literal["lru", "lfu", "ttl"]
    halve_every: Kept | None = None
    steps: Kept | None = None

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @field_validator("halve_every", "steps")
    @classmethod
    def _belongs(cls, value: Any, info: ValidationInfo) -> Any:
        check_belongs(value, info, info.data.get("kind"), EVICTIONS.get(info.data.get("kind") or "", ()))
        return value

    @model_validator(mode="after")
    def _complete(self) -> EvictionConfig:
        if self.kind == "ttl" and self.steps is None:
            raise ValueError("ttl needs 'steps', for example {kind: ttl, steps: 10_000}")
        return self

    def build(self) -> se.LRU | se.LFU | se.TTL:
        if self.kind == "ttl":
            assert self.steps is not None
            return se.TTL(self.steps)
        return se.LRU() if self.kind == "lru" else se.LFU(self.halve_every)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return or_text(handler(schema), ["lru", "lfu"])


class AdmissionConfig(Section):
    """Who gets a row: with `min_count` an id that has occurred `count` times, with `probability` an id with that chance `p` in each
    step in which it occurs.
    """

    kind: Literal["min_count", "probability"]
    count: Kept | None = None
    p: Chance | None = None

    @field_validator("count", "p")
    @classmethod
    def _belongs(cls, value: Any, info: ValidationInfo) -> Any:
        check_belongs(value, info, info.data.get("kind"), ADMISSIONS.get(info.data.get("kind") or "", ()))
        return value

    @model_validator(mode="after")
    def _complete(self) -> AdmissionConfig:
        needed, example = ("count", "3") if self.kind == "min_count" else ("p", "0.1")
        if getattr(self, needed) is None:
            raise ValueError(f"{self.kind} needs {needed!r}, for example {{kind: {self.kind}, {needed}: {example}}}")
        return self

    def build(self) -> se.MinCount | se.Probability:
        if self.kind == "min_count":
            assert self.count is not None
            return se.MinCount(self.count)
        assert self.p is not None
        return se.Probability(self.p)


class DynamicIdsConfig(Section):
    """Ids as the data have them: integers of 64 bits as they are, texts by `se.hash64`. `capacity` ids of a table have a row at
    once (`tables` says it for single ones; `null`: all that come); `unknown` is what evaluation reads for others.
    """

    kind: Literal["dynamic"]
    capacity: Capacity | None = None
    tables: dict[str, Capacity] = Field(default_factory=dict)
    eviction: EvictionConfig | None = None
    admission: AdmissionConfig | None = None
    unknown: Literal["start", "zeros"] = "start"

    @field_validator("eviction")
    @classmethod
    def _has_room(cls, value: EvictionConfig | None, info: ValidationInfo) -> EvictionConfig | None:
        if value is not None and value.kind != "ttl" and info.data.get("capacity", 1) is None:
            raise ValueError(f"{value.kind} makes room where there is a limit: set data.ids.capacity too, or let ids age by ttl")
        return value

    @property
    def dynamic(self) -> se.Dynamic:
        eviction = self.eviction.build() if self.eviction else None
        return se.Dynamic(eviction, self.admission.build() if self.admission else None, self.unknown or "start")

    def rows(self, table: str) -> int | None:
        """How many ids of a table have a row at once; None: without a limit."""
        return self.tables.get(table, self.capacity)

    def made_dynamic(self, table: se.TableConfig) -> se.TableConfig:
        """The table, for any ids."""
        return replace(table, num_embeddings=self.rows(table.name), dynamic=self.dynamic)


class InteractionIdsConfig(DynamicIdsConfig):
    """Ids of users and items. `dynamic`: as they are, whatever they are, as above. `numbered`: they are the numbers of their rows,
    from 0, and a table has a row for every number up to the largest.
    """

    kind: Literal["dynamic", "numbered"]  # type: ignore[assignment]

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @field_validator("capacity", "tables", "eviction", "admission", "unknown")
    @classmethod
    def _belongs(cls, value: Any, info: ValidationInfo) -> Any:
        check_belongs_to_kind(cls, value, info, OF_DYNAMIC if info.data.get("kind") == "dynamic" else ())
        return value

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return or_text(handler(schema), ["dynamic", "numbered"])


def any_ids(settings: InteractionIdsConfig | None, has_path: bool) -> DynamicIdsConfig | None:
    """How tables of users and items take any id; None where ids are the numbers of rows. What files have is any id unless it is
    said to be numbered; what is made up is numbered unless it is said to be dynamic.
    """
    if settings is None:
        return DynamicIdsConfig(kind="dynamic") if has_path else None
    return settings if settings.kind == "dynamic" else None
