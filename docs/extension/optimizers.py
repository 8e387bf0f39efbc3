"""The table of the optimizers that tables can have, from their settings."""

from __future__ import annotations

from dataclasses import fields

from shardembed import optim

SHAPES = {"row": "one number a row", "element": "as large as the table"}


def made(_: str) -> str:
    """A line an optimizer: settings with their defaults, state, and whether cut columns cost an exchange."""
    lines = ["| Optimizer | Settings | State | Where columns are cut |", "|---|---|---|---|"]
    for name, kind in optim.NAMES.items():
        settings = ", ".join(
            f"`{field.name}={field.default:g}`" if isinstance(field.default, float) else f"`{field.name}={field.default}`"
            for field in fields(kind)
        )
        state = ", ".join(f"`{each}` ({SHAPES[shape]})" for each, shape in kind.state.items())
        exchanged = "one number a row is exchanged" if kind.rowwise else "nothing more"
        lines.append(f"| `{name}` | {settings} | {state or 'none'} | {exchanged} |")
    return "\n".join(lines)
