"""From pydantic's errors to messages with a place, what was wrong, and the nearest name that exists."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, RootModel, ValidationError
from pydantic.fields import FieldInfo

from shardembed.config.hints import nearest
from shardembed.config.located import Located, brief
from shardembed.errors import ConfigError

MISTAKES_SHOWN = 20


def explain(error: ValidationError, root: type[BaseModel], document: Located) -> ConfigError:
    """One error that lists pydantic's, the first ones if they are many, each with its place in `document`."""
    lines = []
    for detail in error.errors(include_url=False)[:MISTAKES_SHOWN]:
        path = detail["loc"]
        place = document.place(path)
        lines.append(f"{place}: {_sentence(path, dict(detail), root)}")
    more = error.error_count() - MISTAKES_SHOWN
    if more > 0:
        lines.append(f"and {more} more")
    return ConfigError("\n".join(lines))


def _sentence(path: tuple[str | int, ...], detail: dict[str, Any], root: type[BaseModel]) -> str:
    dotted = ".".join(map(str, path)) or "the configuration"
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        keys = _keys(root, path[:-1])
        inside = f" in {'.'.join(map(str, path[:-1]))}" if path[:-1] else ""
        return f"unknown key {brief(str(path[-1]))}{inside}{nearest(str(path[-1]), keys)} (keys here: {', '.join(keys)})"
    if kind == "literal_error":
        choices = [choice.strip(" '") for choice in context["expected"].replace(" or ", ",").split(",")]
        return f"{dotted}: {brief(value)} is not one of {', '.join(choices)}{nearest(str(value), choices)}"
    if kind == "model_type":
        keys = _keys(root, path)
        return f"{dotted} must be a mapping with keys {', '.join(keys)}, not {brief(value)}"
    if kind == "value_error":
        return f"{dotted}: {context['error']}"
    message = detail["msg"].removeprefix("Input ").replace("instance of ", "")
    return f"{dotted} {message}, not {brief(value)}"


def _keys(root: type[BaseModel], path: tuple[str | int, ...]) -> list[str]:
    """The keys of the section at `path`."""
    section = root
    for step in path:
        fields = _fields(section)
        if issubclass(section, RootModel):  # a mapping by free names: the step is one of them
            section = _section(section.model_fields["root"].annotation) or section
        elif step in fields:
            section = _section(fields[step].annotation) or section
    return [str(name) for name in _fields(section)]


def _fields(section: type[BaseModel]) -> dict[str | int, FieldInfo]:
    """By the name they have in a file."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def _section(annotation: Any) -> type[BaseModel] | None:
    """The model in `X`, `X | None`, `tuple[X, ...]` or `dict[str, X]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _section(inner)) is not None), None)
