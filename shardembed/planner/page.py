"""A plan as one HTML page that stands alone: pictures inside, no script, nothing fetched from anywhere."""

from __future__ import annotations

from collections.abc import Iterable

from shardembed._version import __version__
from shardembed.planner import charts, html, report, sweep, whole, words
from shardembed.planner.result import Planned
from shardembed.planner.topology import Link, Topology
from shardembed.planner.workload import Counts, Reuse, TableLoad, Zipf

TABLES = "lnnponon"  # columns of the table of tables
OPEN = 50  # rows of the table of tables that show at once; the others unfold

EPOCH = {"whole step": "dense_seconds", "an epoch": "epoch_hours", "its cost": "epoch_cost"}  # columns, shown where they are known

GAP = html.Markup(
    "The planner does not only look for a fast plan, it also proves how fast any plan can be. The lower bound is a step time "
    "that no plan of its space beats: every kind of cut, both ways to send ids, and copies on all ranks, by the same cost model "
    "and within the same memory. The gap is how far this plan lies above that bound, so no other plan could be faster by more "
    "than that. What the gap does not cover is how well the cost model fits your machines: <code>shardembed calibrate</code> "
    "measures them."
)


def render(planned: Planned, swept: sweep.Sweep | None = None, command: str = "", price: float | None = None) -> str:
    """The whole page. swept: more rank counts, for the picture of step time against ranks. price: of an hour of one rank."""
    title = f"{planned.workload.name} on {words.plural(planned.plan.world_size, 'rank')}"
    parts = [
        html.filled("<h1>{}</h1>", title),
        html.filled('<p class="dim">{}</p>', report.heading(planned)),
        _cards(planned, price),
        _whole(planned, price),
        html.section("What the gap means", html.filled("<p>{}</p>", GAP)),
        _phases(planned),
        _memory(planned),
        _time(planned),
        html.NOTHING if swept is None else _scaling(planned, swept),
        _tables(planned),
        _inputs(planned, command),
    ]
    return html.document(title, parts)


def _cards(planned: Planned, price: float | None) -> html.Markup:
    estimate, step = planned.estimate, planned.estimate.step_seconds
    full, most = float(estimate.memory_bytes.max()), report.limit(planned)
    samples = words.number(planned.workload.global_batch_size / step)
    cards = [
        ("predicted step of the tables", words.duration(step), f"{samples} samples a second"),
        *_predicted(whole.of(planned, price)),
        ("certified gap", words.gap(planned.gap), report.meaning(planned)),
        ("on the fullest rank", words.size(full), f"{words.percent(full / most)} of {words.size(most)} for tables"),
        ("to plan", words.duration(planned.plan_seconds), f"plan {planned.plan.hash}"),
    ]
    return html.cards(cards)


def _predicted(found: whole.Whole) -> list[tuple[str, str, str]]:
    cards = []
    if found.step > found.tables:
        cards.append(("predicted whole step", words.duration(found.step), "dense part included, if nothing overlaps"))
    if found.hours is not None and found.steps is not None:
        cards.append(("predicted for an epoch", whole.duration(found.hours), words.plural(found.steps, "step")))
    if found.cost is not None:
        cards.append(("predicted cost of an epoch", whole.money(found.cost), "all ranks, in the currency of the price"))
    return cards


def _whole(planned: Planned, price: float | None) -> html.Markup:
    lines = whole.lines(planned, price)
    if not lines:
        return html.section("The whole step, and an epoch", whole.ASK)
    said = "What is predicted follows from the plan and from what was told of the dense part; the tables' own step is added to it."
    found = [("tables", words.duration(planned.estimate.step_seconds), "predicted, by this plan"), *lines]
    return html.section("The whole step, and an epoch", said, html.table(["", "", ""], found, "onp"))


def _picture(svg: html.Markup) -> html.Markup:
    """Where a screen is narrow it is moved sideways: its letters would be too small to read."""
    return html.filled('<div class="wrap"><div class="picture">{}</div></div>', svg)


def _phases(planned: Planned) -> html.Markup:
    estimate = planned.estimate
    slowest, step = estimate.phase_seconds, estimate.step_seconds
    texts = words.durations([*slowest, *estimate.seconds.mean(1)])
    rows = []
    for index, phase in enumerate(estimate.phases):
        seconds, sent = float(slowest[index]), float(estimate.bytes[index].max())
        drawn = html.bar(seconds / float(slowest.max()))
        cells = [texts[index], words.percent(seconds / step), texts[len(slowest) + index], words.size(sent) if sent else "-"]
        rows.append([phase, *cells, drawn])
    about = (
        "Phases end together, since each ends with an exchange between all ranks. So a step takes the sum, over the phases, of the "
        "rank that is slowest in that phase. Where slowest and mean lie apart, ranks wait."
    )
    table = html.table(["phase", "slowest rank", "of the step", "mean rank", "most sent by a rank", ""], rows, "lnnnnw")
    return html.section("Where a step's time goes", about, table)


def _memory(planned: Planned) -> html.Markup:
    estimate = planned.estimate
    memory = estimate.memory_bytes
    full = int(memory.argmax())
    parts = ", ".join(
        f"{words.size(float(estimate.memory[index, full]))} {category}" for index, category in enumerate(estimate.categories)
    )
    has, least = words.size(planned.topology.memory), words.size(float(memory.min()))
    about = (
        f"Each column is a rank; tables count with their optimizer state. The fullest is rank {full:,} with "
        f"{words.size(float(memory[full]))}: {parts}. The least full has {least}. A rank has {has}, of which "
        f"{_kept(planned.topology)}."
    )
    return html.section("Memory of each rank", about, _picture(charts.svg(charts.memory(planned), "memory")))


def _kept(topology: Topology) -> str:
    """What of a rank's memory tables must leave alone."""
    kept = f"{words.size(topology.reserve)} are kept for everything that is no table"
    return f"{kept} and {words.size(topology.communicators)} for communicators" if topology.communicators else kept


def _time(planned: Planned) -> html.Markup:
    busy = planned.estimate.seconds.sum(0)
    least, most = words.duration(float(busy.min())), words.duration(float(busy.max()))
    about = (
        f"Each column is the work of a rank, by phase: from {least} to {most}. "
        "The step is longer than the busiest rank where different ranks are the slowest of different phases."
    )
    return html.section("Time of each rank", about, _picture(charts.svg(charts.time(planned), "time")))


def _scaling(planned: Planned, swept: sweep.Sweep) -> html.Markup:
    here = planned.plan.world_size
    about = (
        f"The same model and the same batch of {swept.batch:,} samples on other numbers of ranks; the grey line marks this plan's."
    )
    known = {name: [getattr(point, field) for point in swept.fitting] for name, field in EPOCH.items()}
    more = [name for name, values in known.items() if any(values)]
    rows = []
    for point in swept.points:
        if point.fits:
            cells = [words.duration(point.step_seconds), words.bound(point.lower_bound_seconds), words.gap(point.gap)]
            cells += [words.size(point.memory), f"{1e9 * swept.cost(point):,.0f}", *_epoch(point, more)]
            rows.append([f"{point.ranks:,}", *cells, f"{point.phase}, {words.percent(point.phase_share)}"])
        else:
            rows.append([f"{point.ranks:,}", *["-"] * (5 + len(more)), f"no plan: {point.reason}"])
    names = ["ranks", "step", "lower bound", "gap", "fullest rank", "rank-seconds a billion samples", *more, "limiting phase"]
    picture = _picture(charts.svg(charts.scaling(swept, here), "scaling"))
    said = html.filled("<p>{}</p>", html.joined([about, *sweep.sentences(swept)], "<br>"))
    return html.section("How many ranks", said, picture, html.table(names, rows, "n" * (6 + len(more)) + "l"))


def _epoch(point: sweep.Point, columns: Iterable[str]) -> list[str]:
    """Of the columns of `EPOCH` that are shown."""
    texts = {
        "whole step": words.duration(point.whole_seconds),
        "an epoch": "-" if point.epoch_hours is None else whole.duration(point.epoch_hours),
        "its cost": "-" if point.epoch_cost is None else whole.money(point.epoch_cost),
    }
    return [texts[name] for name in columns]


def _tables(planned: Planned) -> html.Markup:
    estimate = planned.estimate
    held, total = estimate.table_memory.sum(1), float(estimate.table_seconds.sum()) or 1.0
    rows = []
    for index in report.dearest(planned):
        table, load = planned.plan.tables[index], planned.workload.tables[index]
        seconds = estimate.table_seconds[index]
        rows.append(
            [
                html.code(table.name),
                f"{words.number(load.rows)} x {table.embedding_dim}",
                words.number(sum(load.ids_per_sample)),
                words.place(table),
                words.travel(table),
                words.percent(float(seconds.sum()) / total),
                estimate.phases[int(seconds.argmax())],
                words.size(float(held[index])),
            ]
        )
    names = ["table", "rows x columns", "ids a sample", "layout", "what travels", "of all work", "mostly", "memory"]
    shown = [html.table(names, rows[:OPEN], TABLES)]
    left = len(rows) - OPEN
    if left > 0:
        shown.append(html.folded(f"{left:,} more", html.table(names, rows[OPEN:], TABLES)))
    return html.section("The tables, the dearest first", _kinds(planned), *shown)


def _kinds(planned: Planned) -> html.Markup:
    held = planned.estimate.table_memory.sum(1)
    rows = [[name, f"{len(numbers):,}", words.size(float(held[numbers].sum()))] for name, numbers in report.groups(planned)]
    more = len(rows) - report.LAYOUTS
    said = html.filled('<p class="dim">and {} other layouts</p>', f"{more:,}") if more > 0 else html.NOTHING
    return html.joined([html.table(["layout", "tables", "memory"], rows[: report.LAYOUTS], "lnn"), said])


def _inputs(planned: Planned, command: str) -> html.Markup:
    topology, workload = planned.topology, planned.workload
    has = words.size(topology.memory)
    model = [
        ["workload", workload.name],
        ["global batch", f"{workload.global_batch_size:,} samples"],
        ["vectors travel as", _dtype(workload.wire_dtype) if workload.wire_dtype else "each table's own dtype"],
        ["optimizers", ", ".join(sorted({type(load.optimizer).__name__ for load in workload.tables}))],
        ["how ids repeat", ", ".join(_distinct(_skew(load) for load in workload.tables))],
    ]
    machines = [
        ["ranks", f"{topology.ranks:,}, {topology.ranks_per_node:,} to a node"],
        ["memory of a rank", f"{has}, of which {_kept(topology)}"],
        ["link within a node", _link(topology.intra)],
        ["link between nodes", _link(topology.inter)],
    ]
    work = [
        [name, words.duration(op.call), words.duration(op.row), f"{1e-9 / op.byte:,.4g} GB/s" if op.byte else "-"]
        for name, op in topology.ops.items()
    ]
    sources = [[name, text] for name, text in topology.source.items()]
    by = html.filled(" with {}", html.code(command)) if command else ""
    folded = [
        html.table(["kind of work", "a call", "a row", "bytes"], work, "lnnn"),
        html.table(["figure", "source"], sources, "ll"),
    ]
    return html.section(
        "Inputs",
        html.table(["model", ""], model, "ll"),
        html.table([f"topology {topology.name}", ""], machines, "ll"),
        html.folded("kinds of work, and where the figures are from", html.joined(folded)),
        html.filled('<p class="dim">Made by shardembed {}{}.</p>', __version__, by),
    )


def _link(link: Link) -> str:
    return f"{link.bandwidth / 1e9:,.4g} GB/s each way, {words.duration(link.latency)} a message"


def _skew(load: TableLoad) -> str:
    skew = load.skew
    if isinstance(skew, Zipf):
        return f"Zipf {skew.exponent:g}, ids in {load.order} order"
    if isinstance(skew, Reuse):
        return f"reuse histogram {skew.name}"
    return "counts of the user's data" if isinstance(skew, Counts) else "all rows alike"


def _distinct(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def _dtype(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
