"""The section of a run's page on the run that it began from: metrics before and after, and what has become of ids."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shardembed.config import plain_json
from shardembed.planner import html
from shardembed.recipes.observed import Count
from shardembed.recipes.recorded import Recorded
from shardembed.recipes.run_folder import SINCE
from shardembed.recipes.run_sections import folded

Text = Annotated[str, Field(max_length=1000)]
ABOUT = (
    "This run began with the model of {}, as it was at step {}. Before: that model on the data of this run, before a step was "
    "taken; after: at the end. Kept: ids that had a row there and have it still; new: got one in this run; gone: had one there."
)


class Ids(BaseModel):
    kept: Count
    new: Count
    gone: Count


class Told(BaseModel):
    """What `since.json` may hold, since a run's folder may come from anybody."""

    model_config = ConfigDict(strict=True, extra="allow")
    run: Text
    checkpoint: Text
    step: Count
    notes: Annotated[list[Text], Field(max_length=10_000)] = []
    before: dict[Text, Any] | None = None
    after: dict[Text, Any] | None = None
    tables: dict[Text, Ids] = {}


def since(run: Recorded) -> html.Markup:
    """Nothing where it began from none."""
    try:
        told = Told.model_validate(plain_json.read(run.path / SINCE))
    except FileNotFoundError:
        return html.NOTHING
    except (OSError, ValueError, ValidationError) as error:
        return html.section("Since the run before", html.filled('<p class="dim">Not read: {}</p>', f"{SINCE}: {error!s:.300}"))
    parts = [html.filled("<p>{}</p>", ABOUT.format(told.run, f"{told.step:,}"))]
    rows = [[html.code(name), _shown(told.before, name), _shown(told.after, name), _change(told, name)] for name in _metrics(told)]
    if rows:
        parts.append(html.table(["metric", "before", "after", "change"], rows, "lnnn"))
    ids = [[html.code(name), *(f"{count:,}" for count in (one.kept, one.new, one.gone))] for name, one in told.tables.items()]
    if ids:
        parts.append(folded(["ids of table", "kept", "new", "gone"], ids, "lnnn"))
    if told.notes:
        parts.append(html.folded("what is not as it was there", html.joined([html.text(note) for note in told.notes], "<br>")))
    return html.section(f"Since {told.run.rstrip('/').rpartition('/')[2]}", *parts)


def _metrics(told: Told) -> list[str]:
    both = told.after or told.before or {}
    return [name for name, value in both.items() if isinstance(value, float)]


def _shown(metrics: dict[str, Any] | None, name: str) -> str:
    value = (metrics or {}).get(name)
    return f"{value:.4f}" if isinstance(value, float) else "-"


def _change(told: Told, name: str) -> str:
    then, now = ((metrics or {}).get(name) for metrics in (told.before, told.after))
    return f"{now - then:+.4f}" if isinstance(then, float) and isinstance(now, float) else "-"
