"""Sections of a run's page: the plan, stages, ranks, memory, ids, and what it ran on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from shardembed._version import __version__
from shardembed.planner import html, words
from shardembed.recipes.curves import bars
from shardembed.recipes.recorded import Recorded
from shardembed.tables.plan import Plan

OPEN = 12  # rows of a table that show at once; the others unfold
MAX_RANKS = 32  # with a line each
TOP = ("1", "10", "100", "1000")


def work(run: Recorded) -> html.Markup:
    """How fast it was, what was sent and what is held; nothing where nobody knows."""
    shown = []
    rate = (run.summary or {}).get("samples_per_second")
    if rate is not None:
        shown.append(("samples a second", words.number(rate), "in training, restarts included"))
    if run.look is not None:
        profile = run.look["profile"]
        sent = [rank["bytes"] for rank in profile["ranks"]]
        steps = f"mean of {words.plural(profile['steps'], 'step')} up to {run.look['step']:,}"
        shown.append(("a step", words.duration(profile["seconds"]), steps))
        if len(sent) > 1:
            shown.append(
                ("sent a step", words.size(sum(sent)), f"by all ranks for the tables; most by one {words.size(max(sent))}")
            )
    held = [one["weights"] + one["state"] for one in run.start.get("held", ())]
    if held:
        shown.append(("tables of the fullest rank", words.size(max(held)), "weights and optimizer state"))
    return html.section("How it was sharded, and how fast it was", html.cards(shown)) if shown else html.NOTHING


def plan(run: Recorded) -> html.Markup:
    assert run.plan is not None
    rows_of = run.start.get("rows", {})
    rows = [
        [
            html.code(table.name),
            f"{rows_of.get(table.name, f'{table.num_embeddings:,}')} x {table.embedding_dim}",
            table.kind,
            words.place(table),
            words.travel(table) if run.plan.world_size > 1 else "-",
            f"{len(table.layout.shards):,}",
        ]
        for table in run.plan.tables
    ]
    names = ["table", "rows x columns", "kind", "where it lies", "what travels", "shards"]
    return html.section("Plan", _plan_words(run.plan), folded(names, rows, "lnopon"))


def _plan_words(plan: Plan) -> str:
    return (
        f"Where the rows and columns of each table lie, of {words.plural(plan.world_size, 'rank')} (plan {plan.hash}). Distinct "
        "rows travel once a batch; sums of bags are made by the rows' owners."
    )


def stages(profile: Mapping[str, Any], step: int) -> html.Markup:
    """Where a step's time goes."""
    loading = profile.get("loading")
    found = [(name, each) for name, each in profile["stages"].items()]
    rest = max(0.0, profile["elsewhere"] - (loading or 0.0))
    times = [each["seconds"] for _, each in found] + [rest, loading or 0.0]
    most = max([*times, 1e-12])
    texts = words.durations([*times, *(each["slowest"] for _, each in found), *(each["waiting"] for _, each in found)])
    count, rows = len(found), []
    for number, (name, each) in enumerate(found):
        slowest = f"{texts[len(times) + number]} (rank {each['slowest_rank']:,})"
        waiting = texts[len(times) + count + number] if each["collectives"] else "-"
        sent = words.size(each["bytes"]) if each["bytes"] else "-"
        shown = f"{name} (beside)" if each["beside"] else name
        rows.append([shown, texts[number], slowest, waiting, sent, html.bar(times[number] / most)])
    rows.append(["the model and its optimizer", texts[count], "-", "-", "-", html.bar(rest / most)])
    if loading is not None:
        rows.append(["reading data, logging", texts[count + 1], "-", "-", "-", html.bar(loading / most)])
    about = (
        f"Mean of the ranks over {words.plural(profile['steps'], 'step')} up to {step:,}; a step took "
        f"{words.duration(profile['seconds'])}. The stages are those of the sharded tables, in the order in which a batch comes "
        "by; what the model does between them, gradients of the dense part included, is one line. Waiting is how much longer than "
        "the fastest rank a rank stood in exchanges between ranks."
    )
    names = ["stage", "a step", "slowest rank", "of it waiting", "sent by a rank", ""]
    return html.section("Where a step's time goes", about, html.table(names, rows, "onnnnw"))


def ranks(run: Recorded) -> html.Markup:
    """What each rank holds and does, and how even that is."""
    held = run.start.get("held", [])
    worked = run.look["profile"]["ranks"] if run.look is not None else []
    if len(worked) != len(held):  # the last look was on another number of ranks
        worked = []
    if not held:
        return html.NOTHING
    columns: dict[str, list[float]] = {
        "rows held": [one["rows"] for one in held],
        "weights and state": [one["weights"] + one["state"] for one in held],
    }
    if worked:
        columns |= {"rows read a step": [one["rows"] for one in worked], "sent a step": [one["bytes"] for one in worked]}
    busy = list(columns.values())[2 if worked else 1]
    order = range(len(held))
    if len(held) > MAX_RANKS:
        order = sorted(order, key=lambda rank: -busy[rank])[:MAX_RANKS]
    rows = [
        [f"{rank:,}", *(_cell(name, values[rank]) for name, values in columns.items()), html.bar(busy[rank] / max([*busy, 1e-12]))]
        for rank in order
    ]
    most = max(len(held) - MAX_RANKS, 0)
    said = f"; the {MAX_RANKS} busiest are shown, of {len(held):,}" if most else ""
    drawn = "rows read a step" if worked else "weights and state"
    uneven = ", ".join(f"{name} {_imbalance(values)}" for name, values in columns.items())
    about = f"Largest in relation to the mean: {uneven}. The bars show {drawn}{said}."
    if worked:
        about += " Rows read are those that a rank looked up in its shards for all ranks."
    table = html.table(["rank", *columns, ""], rows, "n" + "n" * len(columns) + "w")
    return html.section("Balance of the ranks", about, table)


def _cell(name: str, value: float) -> str:
    return f"{value:,.0f}" if name.startswith("rows") else words.size(value)


def _imbalance(values: Sequence[float]) -> str:
    mean = sum(values) / len(values)
    return f"{max(values) / mean:.2f}" if mean else "-"


def memory(found: Mapping[str, Any]) -> html.Markup:
    """Planned and actual."""
    about = html.filled(
        "<p>Bytes on the rank that has most of it. Weights and state are planned exactly; what travels and waits is planned for "
        "{} samples a rank, with the traffic that <code>plan: auto</code> assumes. Buffers are the largest "
        "message so far; gradients that wait are gone after a step. The process is all that the "
        "system counts for a rank, libraries included. A dash: nobody planned it, or nobody can tell.</p>",
        f"{found['samples']:,}",
    )
    names = ["", "planned", "actual", "on rank"]
    lines = _memory_rows(found["categories"])
    tables = _memory_rows(found["tables"], html.code)
    shown = [html.table(["kind", *names[1:]], lines, "lnnn"), folded(["table: weights and state", *names[1:]], tables, "lnnn")]
    return html.section("Memory, planned and actual", about, *shown)


def _memory_rows(lines: Mapping[str, Mapping[str, Any]], form: Callable[[str], str] = str) -> list[list[str]]:
    def text(size: float | None) -> str:
        return "-" if size is None else words.size(size)

    return [
        [form(name), text(each["largest_planned"]), text(each["largest_actual"]), _rank(each["largest_rank"])]
        for name, each in lines.items()
    ]


def _rank(rank: int | None) -> str:
    return "-" if rank is None else f"{rank:,}"


def ids(run: Recorded) -> html.Markup:
    """Statistics of each feature's ids."""
    assert run.look is not None
    found, start = run.look["ids"], run.start
    if not found:
        return html.NOTHING
    rows_of = {table.name: table.num_embeddings for table in run.plan.tables} if run.plan is not None else {}
    table_of, reserved = start.get("features", {}), start.get("reserved", "")
    places = max(len(one["ids_by_hits"]) for one in found.values())  # one scale for all
    rows = []
    for name, one in found.items():
        table = table_of.get(name, name)
        size = None if table in start.get("rows", {}) else rows_of.get(table)
        of = f"{words.number(one['distinct'])}{f' of {words.number(size)}' if size else ''}"
        hits = [(place, count) for place, count in enumerate(one["ids_by_hits"]) if count]
        title = ", ".join(f"{2**place:,} to {2 ** (place + 1) - 1:,} times: {count:,} ids" for place, count in hits)
        rows.append(
            [
                html.code(name) if table == name else html.joined([html.code(name), html.code(table)], " in "),
                f"{one['lookups']:,}",
                of,
                *(_share(one["top"][most]) for most in TOP),
                *([_share(one["reserved"])] if reserved else []),
                bars(one["ids_by_hits"], places, title),
                bars(one["lookups_by_hits"], places, "the lookups of these ids"),
            ]
        )
    about = html.filled(
        "Of a sample of the ids that rank 0 looked up in training. Top 1, 10, 100, 1,000: the share of the lookups that goes to as "
        "many rows, the most frequent ones; the steeper, the more a copy, a cache or <code>packing: unique</code> saves. The small "
        "pictures count ids by how often they occur in the sample: once, 2 to 3 times, 4 to 7, and so on to the right; first how "
        "many ids do, then how many lookups are theirs.{}",
        f" Row 0 of a table is for ids that are {reserved}." if reserved else "",
    )
    names = ["feature", "sampled", "distinct", "top 1", "10", "100", "1,000", *(["row 0"] if reserved else [])]
    kinds = "l" + "n" * (len(names) - 1) + "oo"
    shown = folded([*names, "ids by hits", "lookups by hits"], rows, kinds)
    return html.section("Ids", html.filled("<p>{}</p>", about), shown)


def _share(value: float) -> str:
    return "100 %" if value == 1 else words.percent(value) if value else "0"


def environment(run: Recorded) -> html.Markup:
    start = run.start
    parts: list[html.Markup] = []
    if start:
        cores = "an unknown number of cores" if start["cores"] is None else words.plural(start["cores"], "core")
        threads = f"{cores}, {words.plural(start['threads'], 'thread')} a rank"
        facts = [
            ["machine of rank 0", f"{start['host']}: {start['processor']}, {threads}"],
            ["system", start["system"]],
            ["device", start["device"]],
            ["ranks", f"{start['ranks']:,}, {start['ranks_per_node']:,} to a node"],
            ["kernels", ", ".join(start["kernels"])],
            ["versions", ", ".join(f"{name} {version}" for name, version in start["versions"].items())],
            ["data", html.joined(start["data"], "<br>")],
        ]
        parts.append(html.table(["", "at the last start"], facts, "op"))
        rows = [[one["time"], f"{one['step']:,}", f"{one['ranks']:,}", one["host"]] for one in run.starts]
        parts.append(html.table(["started", "at step", "ranks", "host of rank 0"], rows, "onno"))
    if run.config:
        parts.append(html.folded("all settings", html.filled("<pre>{}</pre>", run.config)))
    path = str(run.path.absolute())
    made = '<p class="dim">Made by shardembed {} from the files in {}; {} makes it again.</p>'
    parts.append(html.filled(made, __version__, html.code(path), html.code(f"shardembed inspect {path}")))
    return html.section("Environment and settings", *parts)


def folded(names: Sequence[str], rows: Sequence[Sequence[str]], kinds: str) -> html.Markup:
    """A table of which the rows beyond the first `OPEN` unfold."""
    shown = html.table(names, rows[:OPEN], kinds)
    if len(rows) > OPEN:
        more = html.table(names, rows[OPEN:], kinds)
        return html.joined([shown, html.folded(f"{len(rows) - OPEN:,} more", more)])
    return shown
