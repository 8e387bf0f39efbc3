"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "absent", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        area: the section that it is shown in.
        name: of the thing.
        status: only a "problem" is a reason to fail.
        text: what was seen.
        fix: what to do to be better off.
    """

    area: str
    name: str
    status: Status
    text: str
    fix: str = ""


def found(area: str, name: str, text: str) -> Finding:
    return Finding(area, name, "ok", text)


def absent(area: str, name: str, text: str, fix: str) -> Finding:
    """Something that nobody needs to have."""
    return Finding(area, name, "absent", text, fix)


def note(area: str, name: str, text: str, fix: str) -> Finding:
    return Finding(area, name, "note", text, fix)


def problem(area: str, name: str, text: str, fix: str) -> Finding:
    return Finding(area, name, "problem", text, fix)
