"""YAML that remembers where every value stood, so that an error can say file, line and column.

The text is composed to PyYAML nodes, which carry marks, and turned into plain values next to a map from the path of a value
("train", "epochs") to its place. Sequences become tuples, since the settings they end in are frozen. What makes a configuration
hard to read or hostile to load is refused: anchors, aliases, tags, duplicate keys, deep nesting, files that are not small, numbers
with more digits than any setting has (PyYAML takes quadratic time for some).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from shardembed.config import plain_json
from shardembed.errors import ConfigError

MAX_BYTES = 1 << 20
MAX_DEPTH = 16
MAX_VALUES = 100_000  # PyYAML takes some 50 us and 2 KB for each
MAX_DIGITS = 64
SHOWN = 80  # characters of a value in a message
_KNOWN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null")}
_NUMBER_TAGS = {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"}

ValuePath = tuple[str | int, ...]


@dataclass(frozen=True)
class Place:
    """Where a value stood.

    Attributes:
        source: a file, an option of the command line, or a value that a program gave.
        line: of the file, from 1; None where there is none.
        column: of the line, from 1.
    """

    source: str
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}:{self.column}"


@dataclass
class Located:
    """Plain values that know where they stood.

    Attributes:
        values: as YAML has them.
        places: of all of them, by path. The place of a mapping's entry is that of its key.
    """

    values: dict[str, Any]
    places: dict[ValuePath, Place] = field(default_factory=dict)

    def place(self, path: Sequence[str | int]) -> Place:
        """The place of `path`, or of the innermost value around it that was written down."""
        for length in range(len(path), 0, -1):
            if tuple(path[:length]) in self.places:
                return self.places[tuple(path[:length])]
        return self.places[()]

    def override(self, option: str) -> None:
        """Apply `a.b=value`; the value is YAML. Mappings on the way are made where they are missing.

        Raises:
            ConfigError: no `=`, an unreadable value, or a path through something that is not a mapping.
        """
        shown = f"--set {option}"
        dotted, equals, text = option.partition("=")
        keys = dotted.strip().split(".")
        if not equals or not all(keys):
            raise ConfigError(f"{shown}: write it as section.key=value, for example --set train.epochs=3")
        self._put(keys, shown, *_read(text, shown))

    def put(self, dotted: str, value: Any) -> None:
        """As `override`, for a value that a program gives."""
        shown = f"settings[{dotted!r}]"
        keys = dotted.split(".") if isinstance(dotted, str) else []
        if not keys or not all(keys):
            raise ConfigError(f"{shown}: a setting is named as section.key, for example 'train.epochs'")
        places: dict[ValuePath, Place] = {}
        self._put(keys, shown, _plain(value, (), places, shown), places)

    def _put(self, keys: Sequence[str], shown: str, value: Any, places: dict[ValuePath, Place]) -> None:
        inner: dict[str, Any] = self.values
        for depth, key in enumerate(keys[:-1]):
            if inner.get(key) is None:
                inner[key] = {}
                self.places[tuple(keys[: depth + 1])] = Place(shown)
            if not isinstance(inner[key], dict):
                path = ".".join(keys[: depth + 1])
                raise ConfigError(f"{shown}: {path} is the single value {brief(inner[key])}, it has no keys; set {path} itself")
            inner = inner[key]
        inner[keys[-1]] = value
        for path in [path for path in self.places if path[: len(keys)] == tuple(keys)]:
            del self.places[path]
        self.places.update({(*keys, *path): place for path, place in places.items()})


def of(values: Mapping[str, Any]) -> Located:
    """What a program gives, with the place of each value in words of Python: `config['train']['epochs']`.

    Raises:
        ConfigError: a key is no text, a value is of no kind that a setting may be, or they are nested too deeply.
    """
    places: dict[ValuePath, Place] = {}
    return Located(_plain(values, (), places, "config"), places)


def load(path: str | Path, named: bool = True) -> Located:
    """Read a YAML file whose top level is a mapping.

    Args:
        named: by the user, who may mean a pipe, or a link; one that was found in a folder must be a regular file there.

    Raises:
        ConfigError: the file cannot be read, is larger than 1 MiB, or is not YAML of the plain kind (see the top of the module).
    """
    try:
        with plain_json.opened(path, named) as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot read the configuration: {getattr(error, 'strerror', None) or error}") from error
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path}: a configuration of more than {MAX_BYTES} bytes is not read; is this the right file?")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: the file is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    values, places = _read(text, str(path))
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{places[()]}: the top level must be a mapping of sections (data:, model:, ...), not {_kind(values)}")
    return Located(values, places)


def brief(value: object) -> str:
    """The repr of a value, cut short: nobody reads a megabyte of it."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


class _Loader(yaml.SafeLoader):
    """Refuses anchors, tags, deep nesting and too many values; reads 1e-3 as a number, as YAML 1.2 does and PyYAML does not."""

    def __init__(self, text: str, source: str) -> None:
        super().__init__(text)
        self.source = source
        self.depth = 0
        self.values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None:
            sign = "*" if isinstance(event, yaml.AliasEvent) else "&"
            where = _mark(self.source, event.start_mark)
            name = brief(event.anchor)[1:-1]
            raise ConfigError(f"{where}: {sign}{name}: anchors and aliases are not read; write the values out")
        if getattr(event, "tag", None) is not None:
            where = _mark(self.source, event.start_mark)
            raise ConfigError(f"{where}: the tag {brief(event.tag)}: tags are not read; write the value alone")
        self.values += 1
        if self.values > MAX_VALUES:
            raise ConfigError(f"{_mark(self.source, event.start_mark)}: more than {MAX_VALUES} values; is this the right file?")
        if self.depth > MAX_DEPTH:
            raise ConfigError(f"{_mark(self.source, event.start_mark)}: nested deeper than {MAX_DEPTH} levels")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _mark(source: str, mark: yaml.Mark | None) -> Place:
    if mark is None or source.startswith("--set "):  # an option is one place; a column inside it helps nobody
        return Place(source)
    return Place(source, mark.line + 1, mark.column + 1)


def _read(text: str, source: str) -> tuple[Any, dict[ValuePath, Place]]:
    """The value of a YAML text, and its places."""
    places: dict[ValuePath, Place] = {}
    try:
        loader = _Loader(text, source)
        node = loader.get_single_node()
        places[()] = _mark(source, node.start_mark if node is not None else None)
        value = _value(loader, node, (), places, source) if node is not None else None
    except ConfigError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ConfigError(f"{_mark(source, mark)}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {str(error).splitlines()[0]}") from error
    except (ValueError, OverflowError) as error:  # escapes and versions of too many digits
        raise ConfigError(f"{source}: not valid YAML: {error}") from error
    return value, places


def _value(loader: _Loader, node: yaml.Node, path: ValuePath, places: dict[ValuePath, Place], source: str) -> Any:
    if path not in places:
        places[path] = _mark(source, node.start_mark)
    if isinstance(node, yaml.MappingNode):
        return _mapping(loader, node, path, places, source)
    if isinstance(node, yaml.SequenceNode):
        return tuple(_value(loader, item, (*path, index), places, source) for index, item in enumerate(node.value))
    if node.tag not in _KNOWN_TAGS:
        raise ConfigError(f"{_mark(source, node.start_mark)}: {brief(node.value)} reads as {node.tag}; quote it if it is a text")
    if node.tag in _NUMBER_TAGS and len(node.value) > MAX_DIGITS:
        raise ConfigError(f"{_mark(source, node.start_mark)}: a number of more than {MAX_DIGITS} digits; quote it if it is a text")
    try:
        return loader.construct_object(node, deep=True)
    except ValueError as error:  # such as the integer 0x_
        raise ConfigError(f"{_mark(source, node.start_mark)}: {error}") from error


def _mapping(
    loader: _Loader, node: yaml.MappingNode, path: ValuePath, places: dict[ValuePath, Place], source: str
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        where = _mark(source, key_node.start_mark)
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
            raise ConfigError(f"{where}: a key must be a plain name, not {_shown(key_node)}; quote it if it is meant as text")
        key = key_node.value
        if key in result:
            raise ConfigError(f"{where}: key {brief(key)} occurs twice; it already stood in line {places[(*path, key)].line}")
        places[(*path, key)] = where
        result[key] = _value(loader, value_node, (*path, key), places, source)
    return result


def _plain(value: Any, path: ValuePath, places: dict[ValuePath, Place], source: str) -> Any:
    """A value as YAML would have given it, and its places."""
    place = places[path] = Place(source + "".join(f"[{step!r}]" for step in path))
    if len(path) > MAX_DEPTH:
        raise ConfigError(f"{place}: nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ConfigError(f"{place}: a key must be a text, not {brief(key)}")
        return {key: _plain(inner, (*path, key), places, source) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_plain(inner, (*path, index), places, source) for index, inner in enumerate(value))
    if isinstance(value, np.generic):  # a number of a sweep over np.linspace, say
        value = value.item()
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if value is None or isinstance(value, str | int | float):
        return value
    if hasattr(value, "columns"):  # a table of pandas, polars or Arrow, whose repr has many lines
        raise ConfigError(
            f"{place}: a {type(value).__name__} is no setting; write it to a .parquet file, and name that as data.path"
        )
    raise ConfigError(f"{place}: {brief(value)} is a {type(value).__name__}, and no setting is one")


def _shown(node: yaml.Node) -> str:
    return brief(node.value) if isinstance(node, yaml.ScalarNode) else "a list or mapping"


def _kind(value: object) -> str:
    return "a list" if isinstance(value, tuple) else f"the single value {brief(value)}"
