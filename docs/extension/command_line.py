"""The command line reference, from the parsers themselves."""

from __future__ import annotations

import argparse
import os
from unittest import mock

from shardembed import cli


def made(_: str) -> str:
    """All subcommands, a section each."""
    return "\n".join(section(name) for name in cli.COMMANDS)


def parser_of(command: str) -> argparse.ArgumentParser:
    parser = cli._parser([command])
    subcommands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return subcommands.choices[command]


def section(name: str) -> str:
    parser = parser_of(name)
    with mock.patch.dict(os.environ, {"COLUMNS": "80"}):
        usage = parser.format_usage().replace("usage: ", "").replace("\n" + " " * len("usage: "), "\n")
    parts = [f"## {name}", parser.description or "", f"```text\n{usage}```"]
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if not isinstance(action, argparse._HelpAction)]
        if actions:
            title = group.title or ""
            parts += [f"{title[0].upper()}{title[1:]}:", _table(actions)]
    return "\n\n".join(parts) + "\n"


def _table(actions: list[argparse.Action]) -> str:
    rows = [f"| {_name(action)} | {_cell(action.help or '')} |" for action in actions]
    return "\n".join(["| | |", "|---|---|", *rows])


def _name(action: argparse.Action) -> str:
    if action.nargs == 0:
        value = ""
    else:
        metavar = action.metavar or (action.dest.upper() if action.option_strings else action.dest)
        value = " ".join(metavar) if isinstance(metavar, tuple) else metavar
        if action.choices is not None and action.metavar is None:
            value = "{" + ",".join(map(str, action.choices)) + "}"
    return "`" + _cell(f"{', '.join(action.option_strings)} {value}".strip()) + "`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("%%", "%").replace("<", "&lt;").replace("*", "\\*")
