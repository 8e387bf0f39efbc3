"""`shardembed train --guess`: a first configuration from the columns of a file, by their names and by what they hold. It is a draft
for somebody who knows the data, so that every line says what was guessed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from shardembed.errors import DataError
from shardembed.recipes import config
from shardembed.recipes.config import TAKEN
from shardembed.recipes.data.opened import open_all
from shardembed.recipes.guess_columns import Column, look


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


USERS = _set(
    "user uid userid visitor visitorid customer customerid member viewer account reader buyer player client person session "
    "sessionid profile reviewer reviewerid listener"
)
ITEMS = _set(
    "item itemid iid product productid sku movie movieid video videoid article articleid asin track song book isbn content listing "
    "offer ad adid news document doc page artist app game recipe course job"
)
TIMES = _set("time timestamp ts date datetime created when day at unixtime")
LABELS = _set("label click clicked clicks target y conversion converted purchased bought like liked outcome")
IDS = _set("id code zip key hash type category class group")
NUMBERS = _set(
    "age price count cnt num number amount qty quantity duration length width height score rating views likes size days hours "
    "seconds minutes total value year rank position"
)
EPOCHS = (1e8, 1e19)  # whole numbers that may be times: seconds of 1973 to nanoseconds of 2286
FEW = 12  # distinct whole numbers, which are taken for ids
SPARSE = 100  # times as large as there are distinct ones: ids
SKEWED = 20  # times the median: a number is taken by its logarithm
SENTENCE = 3  # words that a text has in the mean
SMALL = 100_000  # rows
SAMPLED = 1 << 20  # bytes whose lines are counted
STEPS = 500  # that a model should take at least
MOST_EPOCHS = {True: 5, False: 20}  # of clicks, which are soon known by heart, and of interactions


@dataclass
class Draft:
    """What is made of the columns.

    Attributes:
        user: a column, or None.
        item: likewise.
        time: likewise.
        label: likewise.
        features: columns with the settings of each.
        left: columns that are not used, and why.
    """

    user: Column | None = None
    item: Column | None = None
    time: Column | None = None
    label: Column | None = None
    features: list[tuple[Column, dict[str, object]]] = field(default_factory=list)
    left: list[tuple[Column, str]] = field(default_factory=list)


def run(path: str, out: str | None, console: Console) -> str:
    """Look at files, say what is in them, and return a configuration, which is also written to `out`.

    Raises:
        DataError: they cannot be read, or have no columns that make a job; `out` is there already.
    """
    if out is not None and os.path.exists(out):
        raise DataError(f"--out {out}: is there already; name another file, or remove it")
    files = open_all([path], "--guess")
    columns = look(files[0])
    draft = drafted(columns, files[0].place.path, files[0].hint)
    rows = max((one.rows for one in columns), default=0)
    console.print(Text(f"{files[0].place}: the first {rows:,} rows"), soft_wrap=True)
    console.print(_seen(columns, draft))
    text = written(draft, path, _rows(files[0].place.path, columns))
    _check(text)
    if out is not None:
        try:
            Path(out).write_text(text, encoding="utf-8")
        except OSError as error:
            raise DataError(f"--out {out}: cannot be written: {error.strerror or error}") from error
        console.print(Text(f"written to {out}: look through it, then: shardembed train {out}"), soft_wrap=True)
    return text


def drafted(columns: Sequence[Column], name: str, hint: str = "") -> Draft:
    """
    Args:
        name: of the file, for messages.
        hint: behind the names of its columns.

    Raises:
        DataError: no columns that make a job.
    """
    draft = Draft()
    draft.label = _best(columns, LABELS, [one for one in columns if one.is_label])
    ids = [one for one in columns if one.is_id and one is not draft.label]
    draft.user, draft.item = _best(columns, USERS, ids), _best(columns, ITEMS, ids)
    flags = [one for one in columns if one.is_label]
    if draft.label is None and (draft.user is None or draft.item is None) and len(flags) == 1:
        draft.label = flags[0]
    times = [one for one in columns if one.holds == "dates" or (one.holds == "whole numbers" and _may_be_times(one))]
    draft.time = _best(columns, TIMES, times) or next((one for one in times if one.holds == "dates"), None)
    if draft.label is None and (draft.user is None or draft.item is None):
        wanted = [what for what, found in (("users", draft.user), ("items", draft.item)) if found is None]
        raise DataError(
            f"{name}: no column looks like {' or '.join(wanted)}, and none like a label of 0 and 1; the columns are: "
            f"{', '.join(one.name for one in columns)}" + (hint or ". Name them in a configuration, as docs/training.md shows")
        )
    _add_features(draft, columns)
    return draft


def _add_features(draft: Draft, columns: Sequence[Column]) -> None:
    clicks = draft.label is not None
    roles = (draft.label, draft.time) if clicks else (draft.user, draft.item, draft.time)
    for column in columns:
        if column in roles:
            continue
        settings, why = _feature(column, clicks)
        if settings is not None and not clicks:
            side = _side(column, draft)
            settings, why = (
                (None, "belongs neither to a user nor to an item alone") if side is None else ({**settings, "of": side}, "")
            )
        if settings is None:
            draft.left.append((column, why))
        else:
            draft.features.append((column, settings))


def _feature(column: Column, clicks: bool) -> tuple[dict[str, object] | None, str]:
    """The settings of a feature, or None and why it is none."""
    words = _words(column.name)
    if column.holds in ("nothing", "what is not read", "dates"):
        return None, {"nothing": "no value in the first rows", "dates": "a date"}.get(column.holds, f"holds {column.examples}")
    if column.distinct < 2:
        return None, "always the same"
    if column.holds == "lists":
        settings: dict[str, object] = {"kind": "ids"}
    elif column.holds == "texts of lists":
        settings = {"kind": "ids", "separator": column.separator}
    elif column.holds == "texts":
        if column.words >= SENTENCE:
            return None, "looks like sentences"
        settings = {"kind": "id"}
    elif column.holds == "whole numbers" and _counts_as_id(column, words):
        settings = {"kind": "id"}
    else:
        settings = {"kind": "number", "scale": _scale(column)}
    if settings["kind"] != "number" and (column.name == "*" or "." in column.name or (not clicks and column.name in TAKEN)):
        return None, "a table cannot have that name; rename the column"
    return settings, ""


def _counts_as_id(column: Column, words: list[str]) -> bool:
    if IDS.intersection(words):
        return True
    if NUMBERS.intersection(words):
        return False
    largest = float(np.abs(column.numbers).max()) if column.numbers is not None and len(column.numbers) else 0.0
    return column.distinct <= FEW or (column.distinct > 1000 and largest > SPARSE * column.distinct)


def _scale(column: Column) -> str:
    assert column.numbers is not None
    low, middle, high = (float(one) for one in np.quantile(column.numbers, (0, 0.5, 1)))
    return "log" if low >= 0 and high > SKEWED * (middle + 1) else "raw"


def _side(column: Column, draft: Draft) -> str | None:
    """Whose a column is: the one that always has the same value in it."""
    assert draft.user is not None
    assert draft.item is not None
    share = {side: _constant(column, one) for side, one in (("user", draft.user), ("item", draft.item))}
    for side in ("user", "item"):
        if side in _words(column.name) and share[side] >= 0.9:
            return side
    best = max(share, key=lambda side: share[side])
    return best if share[best] >= 0.99 else None


def _constant(column: Column, of: Column) -> float:
    """Of the values of `of` that occur more than once, the share with one value of `column`; missing ones do not count."""
    there = column.codes >= 0
    keys, values = of.codes[there], column.codes[there]
    order = np.lexsort((values, keys))
    keys, values = keys[order], values[order]
    if not len(keys):
        return 0.0
    starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
    ends = np.append(starts[1:], len(keys))
    several = ends - starts > 1
    if not several.any():
        return 0.0
    return float((values[starts] == values[ends - 1])[several].mean())


def _best(columns: Sequence[Column], names: frozenset[str], among: Sequence[Column]) -> Column | None:
    """The column whose name says most that it has a role."""
    scores = [(_score(one.name, names), -place, one) for place, one in enumerate(columns) if one in among]
    found = max((one for one in scores if one[0] > 0), key=lambda one: one[:2], default=None)
    return found[2] if found is not None else None


def _score(name: str, names: frozenset[str]) -> int:
    words = _words(name)
    if "".join(words) in names:
        return 4
    rest = [word for word in words if word not in names and word not in ("id", "is", "the")]
    return 3 - len(rest) if names.intersection(words) else 0


def _words(name: str) -> list[str]:
    parts = re.sub(r"([a-z])([A-Z])", r"\1_\2", name)
    return [word for word in re.split(r"[^0-9a-z]+", parts.lower()) if word]


def _may_be_times(column: Column) -> bool:
    numbers = column.numbers
    return numbers is not None and len(numbers) > 0 and EPOCHS[0] <= float(numbers.min()) <= float(numbers.max()) <= EPOCHS[1]


def written(draft: Draft, path: str, rows: int) -> str:
    """The configuration."""
    clicks = draft.label is not None
    lines = [
        f"# From the first rows of {path}, by shardembed train --guess: a draft to look through.",
        "data:",
        f"  path: {_yaml(path)}",
    ]
    for role in ("label", "time") if clicks else ("user", "item", "time"):
        column: Column | None = getattr(draft, role)
        if column is not None:
            lines.append(f"  {role}: {_yaml(column.name)}  # {column.holds}, such as {column.examples}")
    taken = [one for one in (draft.label, draft.time, *(() if clicks else (draft.user, draft.item))) if one is not None]
    counts = [(one.name, "missing or wrong", one.missing + one.mistakes) for one in taken]
    counts += [(one.name, "wrong", one.mistakes) for one, _ in draft.features]  # one that is missing is no mistake there
    bad = [f"{name} is {what} in {count:,}" for name, what, count in counts if count]
    if bad:
        lines.append(f"  on_bad_row: skip  # {', '.join(bad)} of the first rows")
    if draft.time is not None:
        lines.append(
            "  split: {kind: time, fraction: 0.1}  # the newest rows" if clicks else "  split: last  # of each user, by time"
        )
    if draft.features:
        lines.append("  features:")
    for column, settings in draft.features:
        said = ", ".join(f"{key}: {_yaml(value)}" for key, value in {"name": column.name, **settings}.items())
        lines.append(f"    - {{{said}}}  # {column.holds}, such as {column.examples}")
    lines += [f"  # {column.name}: left out, {why}" for column, why in draft.left]
    other = "or wide, or dcnv2" if clicks else "or sasrec, which goes by what follows what"
    if not clicks and draft.features:
        other = "sasrec goes by what follows what, without features"
    lines.append(f"model: {{kind: {'dlrm' if clicks else 'two_tower'}}}  # {other}")
    batch = 256 if rows < SMALL else 2048
    epochs = min(MOST_EPOCHS[clicks], max(1 if clicks else 4, -(-STEPS * batch // max(rows, 1))))
    lines.append(f"train: {{epochs: {epochs}, global_batch_size: {batch}}}  # for about {rows:,} rows")
    return "\n".join(line.replace("\n", " ") for line in lines) + "\n"


def _yaml(value: object) -> str:
    """A value on one line."""
    text = yaml.safe_dump([value], default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.strip()[1:-1]


def _rows(path: str, columns: Sequence[Column]) -> int:
    """About how many rows there are: by the lines of the first part of a plain file, or as many as were looked at."""
    seen = max((one.rows for one in columns), default=0)
    try:
        if path.lower().endswith((".parquet", ".pq")):
            from pyarrow import parquet

            return parquet.read_metadata(path).num_rows
        if not path.lower().endswith((".csv", ".tsv")):  # lines of a compressed one are not to be counted
            return seen
        with open(path, "rb") as file:
            part = file.read(SAMPLED)
        return max(seen, int(os.path.getsize(path) * part.count(b"\n") / max(len(part), 1)))
    except (OSError, ValueError):
        return seen


def _check(text: str) -> None:
    """That what was written can be loaded."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "job.yaml"
        path.write_text(text, encoding="utf-8")
        config.load(path)


def _seen(columns: Sequence[Column], draft: Draft) -> Table:
    """What was seen, a row a column."""
    roles = {id(getattr(draft, role)): role for role in ("label", "time", *([] if draft.label else ["user", "item"]))}
    said = {id(column): ", ".join(map(str, settings.values())) for column, settings in draft.features}
    said |= {id(column): f"left out: {why}" for column, why in draft.left}
    table = Table()
    for heading in ("column", "holds", "distinct", "missing", "such as", "taken as"):
        table.add_column(heading, overflow="fold")
    for one in columns:
        taken = roles.get(id(one)) or said.get(id(one), "")
        cells = (one.name, one.holds, f"{one.distinct:,}", f"{one.missing:,}", one.examples, taken)
        table.add_row(*map(Text, cells))  # in which brackets are no markup
    return table
