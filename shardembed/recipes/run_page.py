"""A run as one HTML page that stands alone, made of the files in its folder, whether it is finished or not.

First how good the model is, then where its tables lie, and what a step takes.
"""

from __future__ import annotations

import os
from pathlib import Path

from shardembed.planner import html, words
from shardembed.recipes import id_sections, quality_sections, run_sections, since_section
from shardembed.recipes.recorded import Recorded
from shardembed.recipes.run_folder import PAGE, publish

NO_LOOK = html.Markup(
    '<p class="dim">Not recorded: the run has neither come to a checkpoint nor to its end, or <code>log.page</code> is false.</p>'
)


def write(run: Recorded) -> Path:
    """Make the page of a run, in place of the one that its folder has.

    Raises:
        OSError: it cannot be written.
    """
    path = run.path / PAGE
    publish(path, render(run), f"{os.getpid()}.new")  # an inspection and the run may write at once
    return path


def render(run: Recorded) -> str:
    start, look = run.start, run.look
    ranks = f" on {words.plural(start['ranks'], 'rank')}" if start else ""
    about = f"{start['model']}{ranks}; {run.state}" if start else run.state
    parts = [html.filled("<h1>{}</h1>", run.name), html.filled('<p class="dim">{}</p>', about)]
    if run.unread:
        parts.append(html.section("Not read", *run.unread))
    parts += [quality_sections.quality(run), since_section.since(run), quality_sections.results(run)]
    parts += [run_sections.work(run), id_sections.dynamic(run)]
    parts += [run_sections.plan(run)] if run.plan is not None else []
    if look is not None:
        parts += [run_sections.stages(look["profile"], look["step"])]
    parts += [run_sections.ranks(run)]
    if look is not None:
        parts += [run_sections.memory(look["memory"]), run_sections.ids(run)]
    else:
        parts += [html.section("Time, memory and ids", NO_LOOK)]
    return html.document(run.name, [*parts, run_sections.environment(run)])
