"""The reference of our YAML files, from the JSON schemas of their pydantic models."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel

from shardembed.planner.topology_sections import TopologySection
from shardembed.planner.workload_sections import ReuseFile, WorkloadSection
from shardembed.recipes.config import Config
from shardembed.recipes.ctr_config import CtrConfig
from shardembed.recipes.sequence_config import SequenceConfig
from shardembed.tables.optimizer_section import Section

ROOTS: dict[str, type[BaseModel]] = {
    "two_tower": Config,
    "clicks": CtrConfig,
    "sequences": SequenceConfig,
    "topology": TopologySection,
    "workload": WorkloadSection,
    "reuse": ReuseFile,
}
LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
HUGE = 1 << 62  # a limit that only says "an int64"


def made(name: str) -> str:
    """Every section of one kind of file, each once, however often it occurs."""
    root = ROOTS[name]
    found: dict[type[BaseModel], list[str]] = {}
    for path, model in _walk(root, ""):
        found.setdefault(model, []).append(path)
    return "\n".join(_section(model, paths, name) for model, paths in found.items())


def _walk(model: type[BaseModel], path: str) -> Iterator[tuple[str, type[BaseModel]]]:
    yield path, model
    for name, field in model.model_fields.items():
        name = field.alias or name
        for inner in _models_in(field.annotation):
            here = path if name == "root" else f"{path}.{name}".lstrip(".")
            yield from _walk(inner, f"{here}.*" if name == "root" else here)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def _section(model: type[BaseModel], paths: list[str], root: str) -> str:
    paths = [path.strip(".") or "the file" for path in paths]
    several = len(paths) > 4
    title = f"{paths[0]} and {len(paths) - 1} more" if several else ", ".join(f"`{p}`" if p != "the file" else p for p in paths)
    text = [f"### {title[0].upper()}{title[1:]}" if title.startswith("the") else f"### {title}", _said(model)]
    if several:
        text.append("Also " + ", ".join(f"`{path}`" for path in paths[1:]) + ".")
    schema = model.model_json_schema(by_alias=True)
    rows = list(_rows(_object_of(schema)))
    if rows:
        text.append("\n".join(["| key | value | default |", "|---|---|---|", *rows]))
    return "\n\n".join(text) + "\n"


def _said(model: type[BaseModel]) -> str:
    """Its docstring, or that of the section it goes on from; pydantic's own says nothing of ours."""
    ours = (base.__doc__ for base in model.__mro__ if base is not Section and base not in Section.__mro__)
    return inspect.cleandoc(next(filter(None, ours), ""))


def _object_of(schema: dict[str, Any]) -> dict[str, Any]:
    """The mapping form of a section that has a short form too."""
    return next((_object_of(one) for one in schema.get("anyOf", ()) if one.get("type") == "object"), schema)


def _rows(schema: dict[str, Any]) -> Iterator[str]:
    required = schema.get("required", ())
    for name, field in schema.get("properties", {}).items():
        default = "required" if name in required else _default(field)
        yield f"| `{name}` | {_kind(field)} | {default} |"


def _default(field: dict[str, Any]) -> str:
    value = field.get("default")
    if isinstance(value, dict) or (value is None and "$ref" in field):
        return ""  # the defaults of its own keys
    if isinstance(value, list) and len(value) > 4:
        return f"`{value[0]}` to `{value[-1]}`"
    return f"`{_yaml(value)}`" if "default" in field else "empty"


def _yaml(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"[{', '.join(map(_yaml, value))}]" if isinstance(value, list) else str(value)


def _kind(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        kinds = [_kind(one) for one in field["anyOf"]]
        return " or ".join(dict.fromkeys(kinds))
    if "$ref" in field:
        return "a section, below"
    if "const" in field or "enum" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    kind = field.get("type")
    if kind == "array":
        return f"list of {_kind(field.get('items', {}))}" if field.get("items") else "list of two numbers"
    if kind == "object":
        inner = field.get("additionalProperties")
        return f"mapping from names to {_kind(inner)}" if isinstance(inner, dict) else "a section"
    said = {"integer": "whole number", "number": "number", "string": "text", "boolean": "`true`, `false`", "null": "`null`"}
    limits = [f"{sign} {field[key]:g}" for key, sign in LIMITS.items() if key in field and abs(field[key]) < HUGE]
    return " ".join([said.get(kind or "", "see above"), *limits])
