"""A configuration with all defaults filled in, as YAML that reads well and can be loaded again."""

from __future__ import annotations

from typing import Any

import yaml
from pydantic import BaseModel, RootModel

from shardembed.recipes.common import JobConfig

WIDTH = 78


def resolved_yaml(config: JobConfig) -> str:
    """The settings, a section a line where it fits. What is not set is left out, unless that differs from the default."""
    values = _set(config, config.model_dump(mode="json"))
    if config.data.path is not None:
        del values["data"]["generator"]
    values["plan"] = _short(values["plan"]) or "auto"
    return "\n".join(line for key, value in values.items() for line in _lines(key, value, ""))


def _set(section: BaseModel, values: dict[str, Any]) -> dict[str, Any]:
    """The values of a section without those that are None by default."""
    if isinstance(section, RootModel):
        return {name: _set(inner, values[name]) for name, inner in section.root.items()}
    found = {}
    for name, field in type(section).model_fields.items():
        inner = getattr(section, name)
        if inner is not None or field.default is not None:
            found[name] = _set(inner, values[name]) if isinstance(inner, BaseModel) else _listed(inner, values[name])
    return found


def _listed(inner: Any, values: Any) -> Any:
    """Of a list of sections what each says: most of their settings are for some kinds alone."""
    if not isinstance(inner, tuple) or not all(isinstance(one, BaseModel) for one in inner):
        return values
    return [one.model_dump(mode="json", exclude_defaults=True) for one in inner]


def _short(plan: dict[str, dict[str, Any]]) -> dict[str, Any] | str:
    """The short form of placements that are no more than their kind."""
    if not plan:
        return "auto"
    return {table: placement["kind"] if len(placement) == 1 else placement for table, placement in plan.items()}


def _lines(key: str, value: Any, indent: str) -> list[str]:
    """`key: value` on one line, else filled like a paragraph, else with a line or more for every key of `value`."""
    line = f"{indent}{key}: {_flow(value)}"
    if len(line) <= WIDTH or not value or not isinstance(value, (dict, list)):
        return [line]
    if isinstance(value, list):
        return _filled(f"{indent}{key}: [", [_flow(item) for item in value], "]")
    if any(isinstance(inner, dict) or (isinstance(inner, list) and len(_flow(inner)) > WIDTH // 2) for inner in value.values()):
        return [f"{indent}{key}:"] + [line for name, inner in value.items() for line in _lines(name, inner, indent + "  ")]
    return _filled(f"{indent}{key}: {{", [f"{name}: {_flow(inner)}" for name, inner in value.items()], "}")


def _filled(start: str, items: list[str], end: str) -> list[str]:
    """Items after `start`, aligned; no item is broken, so that long paths stay whole."""
    lines = [start + items[0]]
    for item in items[1:]:
        if len(lines[-1]) + len(item) + 3 <= WIDTH:  # comma, blank, and a comma or the end
            lines[-1] += f", {item}"
        else:
            lines[-1] += ","
            lines.append(" " * len(start) + item)
    lines[-1] += end
    return lines


class _Dumper(yaml.SafeDumper):
    """Texts with line breaks are written with escapes, so that every value is one line."""


_Dumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')
)


def _flow(value: Any) -> str:
    """`value` on one line."""
    text = yaml.dump([value], Dumper=_Dumper, default_flow_style=True, sort_keys=False, width=float("inf"), allow_unicode=True)
    return text.rstrip("\n")[1:-1]
