"""What `shardembed inspect` shows of the folder of a training run; its page is made again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from shardembed.cli.tables import plain_table
from shardembed.config.shown import one_line
from shardembed.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from shardembed.recipes.recorded import Recorded


def run(folder: Path, console: Console, as_json: bool) -> int:
    """Returns the exit code.

    Raises:
        ConfigError: the page cannot be written.
    """
    from shardembed.recipes import recorded, run_page

    found = recorded.read(folder)
    _show(console, found)
    try:
        page = run_page.write(found)
    except OSError as error:
        raise ConfigError(f"the page of {folder} cannot be written: {error.strerror or error}") from error
    console.print(f"\nwrote {page}", soft_wrap=True)
    if as_json:
        print(json.dumps({**_told(found), "page": str(page)}), flush=True)
    return 0


def _told(found: Recorded) -> dict[str, object]:
    """For a script."""
    from shardembed.recipes import standing

    look = found.look or {}
    return {
        "path": str(found.path),
        "unread": list(found.unread),
        "finished": found.summary is not None,
        "steps": found.summary["steps"] if found.summary is not None else found.curves.steps,
        "loss": found.curves.loss.points[-1].mean if found.curves.loss.points and not found.curves.loss.lost else None,
        "nonfinite_losses": found.curves.loss.strange,
        "skipped_steps": found.curves.skipped,
        "stopped": found.curves.stopped or None,
        "results": found.results,
        "not_better_than": [one.key or one.who for _, one in standing.beaten(found.results)],
        "checkpoint": found.checkpoint,
        "starts": [{name: start[name] for name in ("time", "step", "ranks")} for start in found.starts],
        "step_seconds": look["profile"]["seconds"] if look else None,
        "ranks": look["profile"]["ranks"] if look else None,
    }


def _show(console: Console, found: Recorded) -> None:
    from shardembed.planner import words
    from shardembed.recipes import verdict
    from shardembed.recipes.quality_sections import LOSS_STEPS
    from shardembed.recipes.report import plan_table

    for line in found.unread:
        console.print(f"not read: {one_line(line)}", soft_wrap=True)
    about = f"{found.start['model']} on {words.plural(found.start['ranks'], 'rank')}; " if found.start else ""
    console.print(one_line(found.name), style="bold")
    console.print(one_line(f"{about}{found.state}"))
    table = plain_table("", ["", "value"], ["value"])
    for name, value in found.results.items():
        table.add_row(one_line(name), f"{value:.4f}")
    if found.curves.loss.lost:
        table.add_row("training loss, last step", "inf or nan")
    elif found.curves.loss.points:
        table.add_row("training loss, last steps", f"{found.curves.loss.tail(LOSS_STEPS).mean:.4f}")
    if found.curves.loss.strange:
        table.add_row("losses that were inf or nan", f"{found.curves.loss.strange:,}")
    if found.curves.skipped:
        table.add_row("steps that were skipped", f"{found.curves.skipped:,}")
    if found.look is not None:
        profile = found.look["profile"]
        ranks = profile["ranks"]
        table.add_row("a step", words.duration(profile["seconds"]))
        table.add_row("sent a step, by all ranks", words.size(sum(rank["bytes"] for rank in ranks)))
        read = [rank["rows"] for rank in ranks]
        table.add_row("rows read a step, most / mean", f"{max(read) * len(read) / max(sum(read), 1):.2f}")
    if table.row_count:
        console.print("", table)
    if found.results:
        console.print()
        for one in verdict.judged(found):
            console.print(one_line(f"{one.title} {one.said}"), markup=False, highlight=False)
    if found.plan is not None:
        console.print("", plan_table(found.plan, found.start.get("rows", {})))
