"""The settings of single columns: what they hold, and how a model takes that.

`data.user`, `data.item`, `data.time` and `data.label` name the columns of a role, `data.features` lists all others. The list may
hold the roles too, as kinds of a feature: `{name: viewer, kind: user}` is `user: viewer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from shardembed.config.hints import nearest
from shardembed.recipes.common import check_belongs_to_kind
from shardembed.tables.optimizer_section import Section

ROLES = ("user", "item", "time", "label")
TAKES = {"id": (), "ids": ("separator", "pooling"), "number": ("scale", "buckets")}  # kind -> the settings it takes
ColumnName = Annotated[str, Field(min_length=1)]
Edge = Annotated[float, Field(allow_inf_nan=False)]


class FeatureConfig(Section):
    """A column, which a model takes as an `id` (text or any integer), as `ids` (a list of these, or a text with a `separator`
    between two), or as a `number`.

    `of` says whose it is, where rows are interactions of users with items. `pooling` makes one vector of the rows of several ids.
    `scale` of a number x is `raw`, or `log`: sign(x) log(1 + |x|). `buckets` are ascending edges that make an id of a number: how
    many of them are not above it. A missing id is an id of its own, a missing list is empty, a missing number is 0.
    """

    name: ColumnName
    kind: Literal["id", "ids", "number"]
    of: Literal["user", "item"] | None = None
    separator: Annotated[str, Field(min_length=1, max_length=8)] | None = None
    pooling: Literal["mean", "sum"] = "mean"
    scale: Literal["log", "raw"] = "log"
    buckets: Annotated[tuple[Edge, ...], Field(min_length=1)] | None = None

    @field_validator("separator", "pooling", "scale", "buckets")
    @classmethod
    def _belongs(cls, value: Any, info: ValidationInfo) -> Any:
        check_belongs_to_kind(cls, value, info, TAKES.get(info.data.get("kind") or "", ()))
        return value

    @field_validator("buckets")
    @classmethod
    def _ascending(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and any(low >= high for low, high in pairwise(value)):
            raise ValueError("the edges of buckets must ascend, each above the one before")
        return value

    @property
    def has_table(self) -> bool:
        """Its values are ids, with rows in a table of its name."""
        return self.kind != "number" or self.buckets is not None


Features = tuple[FeatureConfig, ...]


def with_roles(values: Any, roles: tuple[str, ...]) -> Any:
    """The values of a `data` section, in which what `features` says of roles stands where the roles do. Others are left as they
    are, for whoever checks them.

    Raises:
        ValueError: a role is given twice, or the data of this job have no such role.
    """
    if not isinstance(values, dict) or not isinstance(values.get("features"), list | tuple):
        return values
    found, rest = dict(values), []
    for feature in values["features"]:
        kind = feature.get("kind") if isinstance(feature, dict) else None
        if kind not in ROLES:
            rest.append(feature)
            continue
        if kind not in roles:
            raise ValueError(f"features: a column of kind {kind!r} is of no use to this model; leave it out")
        if set(feature) != {"name", "kind"}:
            raise ValueError(f"features: a column of kind {kind!r} has a name and nothing else")
        if found.get(kind) not in (None, feature["name"]) or (kind in found and kind not in values):
            raise ValueError(f"features: {found[kind]!r} and {feature['name']!r} are both said to be the {kind}")
        found[kind] = feature["name"]
    found["features"] = tuple(rest)  # as strict models want it
    return found


def check_features(features: Features, taken: dict[str, str | None], sides: bool) -> None:
    """
    Args:
        taken: columns by the role that they have. sides: features are a user's or an item's.

    Raises:
        ValueError: a column is named twice, or it is not said whose one is, or is said in vain; names that no table may have.
    """
    names = [feature.name for feature in features]
    for feature in features:
        role = next((role for role, name in taken.items() if name == feature.name), None)
        if names.count(feature.name) > 1 or role is not None:
            raise ValueError(f"features: {feature.name!r} is listed twice" if role is None else _is_role(feature.name, role))
        if feature.has_table and (feature.name == "*" or "." in feature.name):
            raise ValueError(f"features: {feature.name!r} has a table of that name, which may not be '*' or hold a dot")
        if sides and feature.of is None:
            raise ValueError(f"features: {feature.name!r}: say whose it is by of: user, or of: item")
        if not sides and feature.of is not None:
            raise ValueError(f"features: {feature.name!r}: 'of' is for data of users and items; leave it out")


def check_texts(texts: Sequence[str], ids: Sequence[str]) -> None:
    """
    Args:
        texts: columns that are said to be read as texts. ids: those that hold ids, which alone may be.

    Raises:
        ValueError: one of `texts` is none of these.
    """
    for name in texts:
        if name not in ids:
            raise ValueError(f"texts: {name!r} is no column of ids{nearest(name, ids)}; those are {', '.join(ids)}")


def names_of_ids(features: Features) -> tuple[str, ...]:
    """The names of those whose values are ids in the files."""
    return tuple(one.name for one in features if one.kind != "number")


def _is_role(name: str, role: str) -> str:
    return f"features: {name!r} is the {role} (data.{role}) and so no feature beside that; leave it out of the list"
