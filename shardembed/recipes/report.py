"""What a training job shows: configuration, plan and memory at the start, progress, and the result."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from types import MappingProxyType, TracebackType

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import shardembed as se
from shardembed.config.shown import ending
from shardembed.observe.tables import bytes_text
from shardembed.recipes.common import JobConfig
from shardembed.recipes.data.bad import Dropped
from shardembed.recipes.metrics import Score
from shardembed.recipes.resolved import resolved_yaml
from shardembed.tables.plan import TablePlan

MODEL_NAMES = {
    "two_tower": "two-tower model",
    "dlrm": "DLRM",
    "dcnv2": "DLRM-DCNv2",
    "wide": "linear model",
    "sasrec": "SASRec model",
}
IN_A_LINE = 2  # metrics
MAX_RANKS_SHOWN = 8
MAX_TABLES_SHOWN, MAX_WIDTH = 4, 54  # with a column each, all these together
MAX_PLAN = 40  # lines, for a table or for several that are alike
NAME, RANKS_LISTED = 16, 2
QUIET_SECONDS = 5.0  # between lines where no bar can be drawn
SCATTERED = 100  # rows of a table for each row of data from which on its ids are hardly numbered from 0


@dataclass(frozen=True)
class Holding:
    """What one rank holds.

    Attributes:
        rows: of each table (whole rows or strips of them).
        weights: bytes.
        state: bytes of optimizer state.
    """

    rows: dict[str, int]
    weights: int
    state: int


def holdings(plan: se.Plan, tables: Sequence[se.TableConfig], config: JobConfig, ids: Mapping[str, int]) -> list[Holding]:
    """What each rank holds under `plan` when all rows are there, of `tables` with the optimizer of a job.

    ids: how many the data have for a table, by its name: of one without a limit that many will be there, and none where nobody
        knows.
    """
    itemsize, optimizer = getattr(torch, config.model.table_dtype).itemsize, config.optimizer.tables.build()
    state_itemsize = max(itemsize, 4)  # state is kept in float32, or in float64 for float64 tables
    # Of what the plan counts.
    rows_of = {table.name: ids.get(table.name, 0) / table.cut_rows if table.grows else table.bucket_rows for table in tables}
    found = []
    for rank in range(plan.world_size):
        rows: dict[str, int] = {}
        weights = state = 0
        for table in plan.tables:
            mine = [shard for shard in table.layout.shards if rank in shard.ranks]
            rows[table.name] = sum(round(len(shard.rows) * rows_of[table.name]) for shard in mine)
            for shard in mine:
                held = round(len(shard.rows) * rows_of[table.name])
                elements = held * len(shard.columns)
                weights += elements * itemsize
                for shape in optimizer.state.values():
                    state += (held if shape == "row" else elements) * state_itemsize
        found.append(Holding(rows, weights, state))
    return found


def show_start(
    console: Console,
    config: JobConfig,
    described: list[str],
    plan: se.Plan,
    held: list[Holding],
    tables: Sequence[se.TableConfig],
) -> None:
    """Everything that is known before the first step; `described` are the lines about the data."""
    model = MODEL_NAMES[config.model.kind]
    title = Text.assemble((str(config.name), "bold"), f": {model}, {plan.world_size} rank{'s' * (plan.world_size > 1)}")
    console.rule(title, align="left", style="dim")
    # Broken by the terminal where it must be: a path stays one word.
    console.print(resolved_yaml(config), soft_wrap=True, highlight=False, markup=False)
    console.print(Text("\ndata", "bold"))
    for line in described:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    console.print()
    console.print(plan_table(plan, sizes(tables)), "", sep="\n")
    if tables and all(table.grows for table in tables) and not any(sum(holding.rows.values()) for holding in held):
        console.print("tables without a limit begin empty and grow as ids come", "", sep="\n", soft_wrap=True, highlight=False)
        return
    console.print(holdings_table(plan, held), "", sep="\n")
    if any(table.grows for table in tables):
        text = (
            "a table without a limit is counted with the ids of the data, where these are known beforehand, and grows as they come"
        )
        console.print(text, "", sep="\n", soft_wrap=True, highlight=False)


def dropped_lines(dropped: Dropped, rows: int) -> list[str]:
    """What was left out beside `rows` good ones, in words."""
    if not len(dropped):
        return []
    return [f"{len(dropped):,} of {rows + len(dropped):,} rows dropped: {dropped}", *(f"  {place}" for place in dropped.places)]


def scattered_lines(rows: int, tables: dict[str, int]) -> list[str]:
    """A warning for each of `tables`, by what its ids name, that is far larger than `rows` of data can fill."""
    return [
        f"warning: {name} ids go to {size - 1:,}, but there are only {rows:,} interactions: a table has a row for every id; number "
        "them from 0"
        for name, size in tables.items()
        if size > SCATTERED * rows
    ]


def show_warnings(console: Console, lines: list[str]) -> None:
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def sizes(tables: Sequence[se.TableConfig]) -> dict[str, str]:
    """The rows of those of which a plan counts something else, in words."""
    return {table.name: "no limit" if table.grows else f"{table.num_embeddings:,}" for table in tables if table.dynamic is not None}


def plan_table(plan: se.Plan, rows: Mapping[str, str] = MappingProxyType({})) -> Table:
    """rows: of `sizes`."""
    table = _table("model plan", ["table", "rows x columns", "cut", "packing", "shards", "ranks"])
    # Tables beside each other that are alike have one line.
    alike = [(cells, [part.name for part in parts]) for cells, parts in groupby(plan.tables, partial(_planned, rows=rows))]
    for cells, names in alike[:MAX_PLAN]:
        first, last = (_short(name, NAME if len(names) == 1 else NAME // 2) for name in (names[0], names[-1]))
        several = f"{first}, {last}" if len(names) == 2 else f"{first} to {last} ({len(names):,})"
        table.add_row(first if len(names) == 1 else several, *cells)
    if len(alike) > MAX_PLAN:
        table.add_row(f"and {sum(len(names) for _, names in alike[MAX_PLAN:]):,} more", *[""] * 5)
    return table


def _planned(part: TablePlan, rows: Mapping[str, str]) -> tuple[str, ...]:
    size = f"{rows.get(part.name, f'{part.num_embeddings:,}')} x {part.embedding_dim}"
    return size, part.kind, part.packing, str(len(part.layout.shards)), _rank_list(sorted(part.layout.ranks))


def _short(name: str, limit: int = NAME) -> str:
    """The end of a name, which tells tables apart better than its beginning."""
    return ending(name, limit)


def _rank_list(ranks: list[int]) -> str:
    if len(ranks) > 1 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"{ranks[0]}-{ranks[-1]}"
    more = len(ranks) - RANKS_LISTED
    return ",".join(map(str, ranks[:RANKS_LISTED])) + (f" +{more}" if more > 0 else "")


def holdings_table(plan: se.Plan, held: list[Holding]) -> Table:
    names = [table.name for table in plan.tables]
    single = len(names) <= MAX_TABLES_SHOWN and sum(len(_short(name)) + len(" rows  ") for name in names) <= MAX_WIDTH

    def counted(holding: Holding) -> list[str]:
        return [f"{rows:,}" for rows in (holding.rows.values() if single else [sum(holding.rows.values())])]

    columns = ["rank", *([f"{_short(name)} rows" for name in names] if single else ["rows"]), "weights", "state"]
    table = _table("held by each rank", columns)
    for rank, holding in enumerate(held[:MAX_RANKS_SHOWN]):
        rows = counted(holding)
        table.add_row(str(rank), *rows, bytes_text(holding.weights), bytes_text(holding.state))
    if len(held) > MAX_RANKS_SHOWN:
        largest = max(held, key=lambda holding: holding.weights + holding.state)
        rows = counted(largest)
        table.add_row("fullest", *rows, bytes_text(largest.weights), bytes_text(largest.state))
    return table


def _table(title: str, columns: list[str]) -> Table:
    look = {"title_justify": "left", "title_style": "bold", "header_style": "dim", "box": None, "pad_edge": False}
    table = Table(title=title, padding=(0, 2, 0, 0), **look)
    for column in columns:
        left = column in ("", "table", "cut", "packing", "rank", "ranks")
        table.add_column(column, justify="left" if left else "right", no_wrap=column != "cut", overflow="fold")
    return table


class ProgressReport:
    """A bar with loss and samples a second on a terminal; elsewhere a line every few seconds, and one at the end."""

    def __init__(self, console: Console, steps: int) -> None:
        self._console, self._steps = console, steps
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._spoke = time.monotonic()

    def __enter__(self) -> ProgressReport:
        if self._console.is_terminal and not self._console.is_dumb_terminal:  # the latter would show no bar, and no line either
            columns = (
                TextColumn("training"),
                BarColumn(bar_width=None),
                TextColumn("{task.completed}/{task.total}  {task.fields[said]}"),
                TimeRemainingColumn(compact=True),
            )
            self._bar = Progress(*columns, console=self._console, expand=True)
            self._task = self._bar.add_task("training", total=self._steps, said="")
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def note(self, text: str) -> None:
        """A line that stays."""
        (self._console if self._bar is None else self._bar.console).print(text, highlight=False, markup=False)

    def update(self, step: int, loss: float | None, rate: float) -> None:
        """Say where training stands: after `step` steps, with the last loss (None: inf or nan) and samples a second."""
        said = f"loss {'inf or nan' if loss is None else f'{loss:.3f}'}  {rate:,.0f} samples/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, said=said)
        elif step == self._steps or time.monotonic() - self._spoke >= QUIET_SECONDS:
            self._spoke = time.monotonic()
            self._console.print(f"step {step}/{self._steps}  {said}", highlight=False)


@dataclass(frozen=True)
class LeftOut:
    """What an evaluation did not ask.

    Attributes:
        repeats: held-out items that their users had met before.
        strangers: users who have nothing in training.
    """

    repeats: int = 0
    strangers: int = 0


def show_retrieval(
    console: Console, k: int, left_out: LeftOut, model: Score, popularity: Score, generator: Score | None = None
) -> None:
    """The model against the baseline, and against what made the data where that is known."""
    table = _table(f"{model.users:,.0f} users, what is held out of each", ["", f"recall@{k}", f"NDCG@{k}"])
    for name, one in (("model", model), ("popularity", popularity), ("generator", generator)):
        if one is None:
            continue
        table.add_row(name, f"{one.recall:.4f}", f"{one.ndcg:.4f}")
    for name, one in (("popularity", popularity), ("generator", generator)):
        if one is not None:
            pairs = ((model.recall, one.recall), (model.ndcg, one.ndcg))
            table.add_row(f"model / {name}", *(f"{mine / theirs:.2f}x" if theirs else "-" for mine, theirs in pairs))
    console.print("", table, "", sep="\n")
    say = partial(console.print, soft_wrap=True, highlight=False)
    if left_out.repeats:
        say(
            f"left out: {left_out.repeats:,} held-out item{'s' * (left_out.repeats > 1)} that the user had met before "
            "(eval.repeats: true asks for them, and ranks all items)"
        )
    if left_out.strangers:
        say(f"left out: {left_out.strangers:,} user{'s' * (left_out.strangers > 1)} with nothing in training")
    if not model.users:
        say("warning: no user was left to ask, so the metrics say nothing")
    elif model.recall <= popularity.recall:
        console.print(
            f"warning: the model finds no more than popularity does: recall@{k} {model.recall:.4f} against "
            f"{popularity.recall:.4f}. Train for longer, with another rate, or with fewer dimensions"
        )


def in_words(metrics: Mapping[str, object]) -> str:
    """The first metrics of an evaluation, on a line."""
    return ", ".join([f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float)][:IN_A_LINE])


def show_skipped(console: Console, skipped: int, steps: int) -> None:
    """How many of all `steps` of a run were skipped, if any were."""
    if skipped:
        text = f"{skipped:,} of {steps:,} steps were skipped, because their loss or a gradient was inf or nan"
        console.print(text, soft_wrap=True, highlight=False)


def show_end(console: Console, took: dict[str, float], rate: float, path: Path, page: str) -> None:
    """The seconds that each part `took`, and where the run's files and its page are."""
    parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in took.items())
    console.print(f"{parts}; {rate:,.0f} samples/s in training", highlight=False)
    for line in (f"run folder: {path}", f"page: {page}"):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
