"""Names that a terminal, a browser or matplotlib would obey, through every command, page and picture; and files that are traps."""

from __future__ import annotations

import ast
import io
import json
import os
import re
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from rich.text import Text

from shardembed.cli import failures, main
from shardembed.config import plain_json, shown
from shardembed.config.console import CleanConsole, console_for
from shardembed.embeddings.of_run import CHECKPOINTS
from shardembed.errors import PlanError
from shardembed.planner import builtin, html
from shardembed.recipes import curves, recorded, run_page, series
from shardembed.recipes.run_folder import CONFIG, DATA, METRICS, OBSERVED, PAGE, PLAN, SUMMARY, publish
from shardembed.tables.layout import MAX_RANKS, Layout, Shard
from shardembed.tables.plan import MAX_ELEMENTS, Plan, TablePlan
from tests.amount import exhaustive
from tests.unit.checkpoint.altered import limits
from tests.unit.checkpoint.saved import Writer, numbered
from tests.unit.pages import stands_alone

PRINTABLE = {  # those that may be a key of a checkpoint
    "tag": "<script>alert(1)</script>",
    "attribute": "\"' onload='x",
    "formula": r"$\frac{$",
    "formulas": r"$x$ \$y\$ $\input{/etc/passwd}$",
    "markup": "[/red][bold]x[/]",
    "emoji": ":bomb:",
    "braces": "{{ x }} {0} %s",
    "line below": "_hidden",
    "long": "x" * 500,
}
OBEYED = {
    "colour": "\x1b[31mred",
    "link": "\x1b]8;;x://evil\x1b\\text\x1b]8;;\x1b\\",
    "title": "\x1b]0;owned\x07",
    "one byte": "\x9b31m",
    "nul": "a\0b",
    "line": "a\nshardembed: error: forged\r",
    "bidi": "\u202egnp.exe\u2066",
    "unseen": "a\u200bb\u00adc",
}
NAMES = {**PRINTABLE, **OBEYED}


def clean(text: str) -> None:
    wrong = sorted({each for each in text if not each.isprintable() and each != "\n"})
    assert not wrong, f"{wrong} in {text[:300]!r}"


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    """All that a command prints, which is clean, ends with this code, and is no traceback."""
    capsys.readouterr()
    try:
        ended = main(list(words))
    except SystemExit as exit:
        ended = exit.code
    printed = capsys.readouterr()
    assert ended == code, printed.err
    assert "Traceback" not in printed.err
    clean(printed.out)
    clean(printed.err)
    return printed.out + printed.err


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", failures.ERROR_FILE, failures.QUIET):
        monkeypatch.delenv(name, raising=False)


# The doors


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("terminal", [False, True])
def test_a_console_prints_names_as_they_are_and_styles_of_its_own(name: str, terminal: bool) -> None:
    file = io.StringIO()
    console = CleanConsole(file=file, width=2000, force_terminal=terminal, color_system="standard" if terminal else None)
    console.print(NAMES[name], style="bold")
    console.print(Text.assemble((NAMES[name], "bold")))
    console.rule(NAMES[name])
    styled = file.getvalue()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", styled)
    assert (styled != plain) is terminal
    clean(plain)
    assert plain.startswith(shown.printable(NAMES[name]).split("\n")[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_page_shows_names_and_has_no_part_that_is_text(name: str) -> None:
    value = NAMES[name]
    parts = [html.section(value, value, html.code(value)), html.table([value], [[value]], "l"), html.cards([(value,) * 3])]
    parts += [html.folded(value, html.joined([value, value], "<br>")), curves.chart([curves.Line(value, POINTS)] * 2, value)]
    page = html.document(value, [*parts, curves.bars([1, 2], 2, value)])
    stands_alone(page)
    clean(page)
    assert escape(shown.printable(value)) in page
    with pytest.raises(TypeError, match="must be Markup"):
        html.document("x", [*parts, value])  # pyright: ignore[reportArgumentType] -- that is the point


POINTS = [series.Point(1, 1, 0.5, 0.5, 0.5), series.Point(2, 1, 0.25, 0.25, 0.25)]


def test_joining_markup_to_text_gives_text() -> None:
    assert not isinstance(html.code("x") + "<b>", html.Markup)
    assert html.text(html.code("x") + "<b>") == "&lt;code&gt;x&lt;/code&gt;&lt;b&gt;"


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_shows_names_and_no_formula(name: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots()
    axes.plot([1, 2], label=shown.drawable(NAMES[name]))
    axes.set_title(shown.drawable(NAMES[name]))
    assert len(axes.legend().get_texts()) == 1
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    ElementTree.fromstring(buffer.getvalue())


def test_a_traceback_is_clean(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise ValueError(OBEYED["link"])
    except ValueError as error:
        failures.unexpected(type(error), error, error.__traceback__)
    told = capsys.readouterr().err
    clean(told)
    assert "ValueError: ?]8;;x://evil" in told


def test_no_code_goes_past_the_doors() -> None:
    """What is printed is JSON or has been cleaned, consoles are clean ones, and only `planner.html` makes HTML of text."""
    package = Path(shown.__file__).parent
    found = []
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if name.startswith("bench/") or name == "cli/bench.py":  # measures, and names of its own
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            first = ast.unparse(node.args[0]) if node.args else ""
            if called == "print" and not first.startswith(("printable(", "json.dumps(")):
                found.append(f"{name}:{node.lineno}: print({first})")
            if called == "Console" and name != "console.py" and ast.unparse(node) != "Console(quiet=True)":
                found.append(f"{name}:{node.lineno}: {ast.unparse(node)}")
            if called == "escape" and name != "planner/html.py":
                found.append(f"{name}:{node.lineno}: {ast.unparse(node)}")
    assert not found, "\n".join(found)


# The planner


def workload(folder: Path, name: str = "shop") -> Path:
    path = folder / "shop.yaml"
    tables = [
        f"- {{name: {json.dumps(each)}, num_embeddings: {50 + place}, embedding_dim: 8, ids_per_sample: [1]}}"
        for place, each in enumerate(NAMES.values())
    ]
    path.write_text(f"name: {json.dumps(name)}\nglobal_batch_size: 64\ntables:\n" + "\n".join(tables) + "\n")
    return path


def test_every_output_of_the_planner_has_hostile_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, page, saved = workload(tmp_path, NAMES["link"] + NAMES["tag"]), tmp_path / "p.html", tmp_path / "plan.json"
    asked = ["plan", str(model), "--topology", "h100x8", "--seconds", "0.2"]
    said(capsys, *asked, "--ranks", "2", "--report", str(page), "--out", str(saved))
    stands_alone(page.read_text())
    clean(page.read_text())
    assert escape(NAMES["formula"]) in page.read_text()
    assert {table.name for table in Plan.load(saved).tables} == set(NAMES.values())
    for name in ("formula", "colour", "line"):
        said(capsys, *asked, "--ranks", "2", "--explain", NAMES[name])
    said(capsys, *asked, "--ranks", "2", "--explain", "\x1b[31m", code=2)
    picture = tmp_path / "sweep.svg"
    said(capsys, *asked, "--sweep", "ranks=1,2", "--plot", str(picture))
    ElementTree.parse(picture)
    said(capsys, *asked, "--pin", "\x1b[31m=row_wise", code=2)
    other = tmp_path / "other.json"
    said(capsys, *asked, "--ranks", "2", "--forbid", "replicated", "--out", str(other))
    assert "tables" in said(capsys, "plan", "--diff", str(saved), str(other))


def test_hostile_names_of_settings_files_and_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    topology = tmp_path / "t.yaml"
    for name in OBEYED.values():
        if "\0" not in name:
            said(capsys, name, code=2)
            said(capsys, "plan", "--topology", name, "x", code=2)
            said(capsys, "inspect", str(tmp_path / name), code=2)
            said(capsys, "inspect", str(tmp_path), name, code=2)
            said(capsys, "train", str(tmp_path / name), code=2)
        topology.write_text(json.dumps({name: 1, "name": name}))
        said(capsys, "plan", str(workload(tmp_path)), "--topology", str(topology), code=2)
        said(capsys, "train", str(topology), code=2)
        said(capsys, "train", str(topology), "--set", f"{name}=1", code=2)


@pytest.mark.parametrize("name", OBEYED)
def test_hostile_columns_of_data(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    data, job = tmp_path / "data.csv", tmp_path / "job.yaml"
    job.write_text(json.dumps({"data": {"path": str(data)}, "model": {"embedding_dim": 4}, "run_dir": str(tmp_path / "runs")}))
    quoted = '"' + OBEYED[name] + '"'
    data.write_bytes(f"{quoted},b\n1,2\n3,4\n".encode())
    assert "data.csv" in said(capsys, "train", str(job), code=2)
    data.write_bytes(f"user,item\n{quoted},1\n".encode())
    assert "data.csv" in said(capsys, "train", str(job), code=2)


# Checkpoints


def test_hostile_names_of_tables_and_rows_of_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / OBEYED["colour"] / "run"
    writer = Writer(root / "step-0000000001")
    for name in PRINTABLE.values():
        writer.add(f"{name}.weight", numbered(len(NAMES), 4) + torch.eye(len(NAMES), 4))
    writer.write()
    rows = tmp_path / "names.txt"
    rows.write_text("".join(f"{' '.join(name.split())}\n" for name in NAMES.values()))
    said(capsys, "inspect", str(root), "--verify")
    said(capsys, "export", str(root), "--out", str(tmp_path / "out"), "--table", NAMES["formula"])
    for number, name in enumerate(PRINTABLE.values()):
        said(capsys, "neighbors", str(root), "--table", name, "--id", "1", "3", "--names", str(rows))
        if number % 3 == 0:  # a picture takes a while
            picture = tmp_path / f"{number}.svg"
            said(capsys, "map", str(root), "--table", name, "--out", str(picture), "--names", str(rows))
            ElementTree.parse(picture)
    assert "is not in" in said(capsys, "neighbors", str(root), "--table", OBEYED["link"], "--id", "1", code=2)


# Run folders


def stage(**more: Any) -> dict[str, Any]:
    return {"seconds": 0.1, "slowest": 0.2, "slowest_rank": 0, "waiting": 0.0, "bytes": 1, "collectives": 1, "beside": True, **more}


def observation(name: str) -> dict[str, Any]:
    """An observed.json with this name wherever a text stands."""
    line = {"largest_planned": 1, "largest_actual": None, "largest_rank": 0}
    counted = {"lookups": 3, "distinct": 2, "reserved": 0.5, "ids_by_hits": [1, 1], "lookups_by_hits": [1, 2]}
    start = dict.fromkeys(("time", "model", "host", "system", "processor", "device", "reserved"), name)
    start |= {"step": 0, "steps": 4, "ranks": 1, "ranks_per_node": 1, "cores": 2, "threads": 1, "batch": 8}
    start |= {"kernels": [name], "versions": {name: name}, "data": [name, name], "features": {name: name}}
    start["held"] = [{"rows": 3, "weights": 24, "state": 0}]
    profile = {"steps": 2, "seconds": 0.5, "elsewhere": 0.1, "loading": 0.0, "ranks": [{"bytes": 4, "rows": 2}]}
    profile["stages"] = {name: stage()}
    ids = {name: {**counted, "top": {"1": 0.5, "10": 1.0, "100": 1.0, "1000": 1.0}}}
    look = {"step": 4, "profile": profile, "ids": ids}
    look["memory"] = {"samples": 4, "categories": {name: line}, "tables": {name: line}}
    return {"format": 1, "starts": [start], "look": look}


def run_of(folder: Path, name: str = "x") -> Path:
    folder.mkdir(parents=True)
    (folder / CHECKPOINTS).mkdir()
    table = TablePlan(name, Layout(4, 2, (Shard(range(4), range(2), (0,)),)))
    Plan((table,), 1).save(folder / PLAN)
    for file, data in ((DATA, {"counted": name}), (OBSERVED, observation(name)), (SUMMARY, {"steps": 4, name: 0.5})):
        (folder / file).write_text(json.dumps(data))
    lines = [{"step": step, "loss": 1 / step, "evaluation": {name: step / 4, "AUC": 0.5 + step / 9}} for step in range(1, 5)]
    (folder / METRICS).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (folder / CONFIG).write_text(f"name: {json.dumps(name)}\n" + name, encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_run_whose_every_text_is_hostile(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    folder = run_of(tmp_path / "r", NAMES[name])
    text = said(capsys, "inspect", str(folder))
    assert "not read" not in text, text
    page = (folder / PAGE).read_text()
    stands_alone(page)
    clean(page)
    assert page.count(escape(shown.printable(NAMES[name]))) > 15


def everywhere(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path, *(found for key, value in inner for found in everywhere(value, (*path, key)))]


WRONG: tuple[Any, ...] = (None, "x", -1, 1.5, True, [], {}, [[]], {"a": 1}, 2**63 - 1, [1], float("nan"), 1e308)


def test_no_type_in_observed_json_is_a_traceback(tmp_path: Path) -> None:
    """Each value of it replaced by each of `WRONG`, or taken out: a page, and where the file was not believed, a word of it."""
    folder = run_of(tmp_path / "r")
    whole = json.dumps(observation("x"))
    ends = {"read": 0, "not read": 0}
    for path in everywhere(json.loads(whole))[1:]:
        for wrong in (*WRONG, everywhere):
            data = json.loads(whole)
            inside = data
            for key in path[:-1]:
                inside = inside[key]
            if wrong is everywhere:
                del inside[path[-1]]
            else:
                inside[path[-1]] = wrong
            (folder / OBSERVED).write_text(json.dumps(data))
            run = recorded.read(folder)
            html_text = run_page.render(run)
            ends["not read" if run.unread else "read"] += 1
            assert bool(run.unread) == ("<h2>Not read</h2>" in html_text)
    assert ends["not read"] > 500, ends
    assert ends["read"] > 50, ends


TRAPS: dict[str, str | bytes] = {
    "deep": "[" * 100_000,
    "digits": '{"steps": ' + "9" * 5000 + "}",
    "twice": '{"steps": 1, "steps": 2}',
    "infinite": '{"steps": 1e999}',
    "number": "3",
    "nothing": "",
    "not text": b"\xff\xfe",
    "values": "[" + "[]," * (9 << 20) + "0]",
}


@pytest.mark.parametrize("trap", TRAPS)
def test_files_of_a_run_that_are_traps(tmp_path: Path, capsys: pytest.CaptureFixture[str], trap: str) -> None:
    folder = run_of(tmp_path / "r")
    content = TRAPS[trap]
    for name in (OBSERVED, SUMMARY, PLAN, METRICS):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with limits(2 << 30):
        text = said(capsys, "inspect", str(folder))
    assert text.count("not read: ") == 3
    assert all(f"not read: {name}: " in text for name in (OBSERVED, SUMMARY, PLAN))
    stands_alone((folder / PAGE).read_text())


@pytest.mark.parametrize("name", [OBSERVED, SUMMARY, PLAN, METRICS, CONFIG])
def test_a_run_s_files_are_not_links_or_pipes(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    folder, secret = run_of(tmp_path / "r"), tmp_path / "secret"
    secret.write_text("secret: 1\n")
    (folder / name).unlink()
    (folder / name).symlink_to(secret)
    assert f"not read: {name}: " in said(capsys, "inspect", str(folder))
    assert "secret: 1" not in (folder / PAGE).read_text()
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert f"not read: {name}: it is not a regular file" in said(capsys, "inspect", str(folder))


def test_a_page_is_never_written_through_a_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (tmp_path / ".run.html.new").symlink_to(outside)
    publish(tmp_path / PAGE, "page")
    assert outside.read_text() == "mine"
    assert (tmp_path / PAGE).read_text() == "page\n"


def test_numbers_next_to_infinity_and_next_to_each_other_are_drawn(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "r")
    for values in ([1e308, -1e308, 1.0], [5e-324, 1e-323], [0.1, 0.1 + 1e-17, 0.1], [1e99, -1e99], [2**62, -(2**62)]):
        lines = [{"step": step, "loss": value, "evaluation": {"x": float(value)}} for step, value in enumerate(values, 1)]
        (folder / METRICS).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        page = run_page.render(recorded.read(folder))
        stands_alone(page)
        assert ">nan<" not in page
        assert ">inf<" not in page


def test_names_of_metrics_without_end_are_not_all_kept(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    path.write_text("".join(f'{{"step": {step}, "evaluation": {{"m{step}": 0.5}}}}\n' for step in range(5000)))
    assert len(series.read(path).metrics) == series.METRICS


# Plans


def plan_json(**more: Any) -> dict[str, Any]:
    shard = {"rows": [0, 4, 1], "columns": [0, 2], "ranks": [0]}
    tables = {"t": {"num_embeddings": 4, "embedding_dim": 2, "packing": "bag", "shards": [shard]}}
    return {"format": 1, "world_size": 2, "tables": tables, **more}


def altered_plans() -> dict[str, Callable[[dict[str, Any], dict[str, Any], dict[str, Any]], object]]:
    """Each takes the plan, its table and its shard."""
    return {
        "a billion ranks": lambda plan, table, shard: plan.update(world_size=10**9),
        "more ranks": lambda plan, table, shard: plan.update(world_size=MAX_RANKS + 1),
        "no rank": lambda plan, table, shard: plan.update(world_size=0),
        "not a number": lambda plan, table, shard: plan.update(world_size=float("nan")),
        "a fraction": lambda plan, table, shard: plan.update(world_size=2.0),
        "a truth": lambda plan, table, shard: plan.update(world_size=True),
        "rows": lambda plan, table, shard: table.update(num_embeddings=4.0),
        "columns": lambda plan, table, shard: table.update(embedding_dim=True),
        "rank": lambda plan, table, shard: shard.update(ranks=[0.0]),
        "ranks": lambda plan, table, shard: shard.update(ranks="0"),
        "step": lambda plan, table, shard: shard.update(rows=[0, 4]),
        "strides": lambda plan, table, shard: (table.update(num_embeddings=10**9), shard.update(rows=[0, 10**9, 10**8])),
        "huge": lambda plan, table, shard: (
            table.update(num_embeddings=MAX_ELEMENTS),
            shard.update(rows=[0, MAX_ELEMENTS, 1]),
        ),
        "tables": lambda plan, table, shard: plan.update(tables=[1]),
    }


@pytest.mark.parametrize("name", altered_plans())
def test_a_plan_is_plausible_before_it_takes_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    path, good = tmp_path / "plan.json", tmp_path / "good.json"
    good.write_text(json.dumps(plan_json()))
    plan = plan_json()
    (table,) = plan["tables"].values()
    altered_plans()[name](plan, table, table["shards"][0])
    path.write_text(json.dumps(plan))
    with limits():
        with pytest.raises(PlanError, match=re.escape(str(path))):
            Plan.load(path)
        said(capsys, "plan", "--diff", str(good), str(path), code=2)
        said(capsys, "plan", "--diff", str(path), str(good), code=2)


@pytest.mark.parametrize("trap", TRAPS)
def test_a_plan_that_is_a_trap(tmp_path: Path, capsys: pytest.CaptureFixture[str], trap: str) -> None:
    path, content = tmp_path / "plan.json", TRAPS[trap]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with limits(2 << 30):
        assert str(path) in said(capsys, "plan", "--diff", str(path), str(path), code=2)


def test_the_most_ranks_of_a_plan_are_compared_in_little_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = tmp_path / "1.json", tmp_path / "2.json"
    one.write_text(json.dumps(plan_json()))
    plan = plan_json(world_size=MAX_RANKS)
    plan["tables"]["t"]["shards"][0]["ranks"] = [MAX_RANKS - 1]
    other.write_text(json.dumps(plan))
    with limits():
        assert f"those 16 of {MAX_RANKS:,}" in said(capsys, "plan", "--diff", str(one), str(other))


def test_a_number_of_many_digits_is_no_number_of_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(workload(tmp_path))
    asked = ["plan", model, "--topology", "h100x8"]
    said(capsys, *asked, "--sweep", f"ranks={'9' * 5000}", code=2)
    said(capsys, *asked, "--ranks", str(10**9), code=2)
    said(capsys, *asked, "--pin", f"x=table_wise:{'9' * 5000}", code=2)


TABLE = (
    "global_batch_size: {batch}\ntables:\n- {{name: a, num_embeddings: {rows}, embedding_dim: 8, ids_per_sample: {ids}, {more}}}\n"
)
SET = "s: {{tables: 1, batch_size: {count}, ids: {count}, distinct_rows: 1, upper_bounds: [1, {bound}, .inf], "
SET += "touched_rows: [0.3, 0.3, 0.4], accesses: [0.3, 0.3, 0.4]}}\n"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"batch": 2**63 - 1}, 2),
        ({"rows": 2**63 - 1}, 2),
        ({"rows": 2**50, "more": "id_skew: 5e-324"}, 2),
        ({"rows": 2**50, "more": "id_skew: 1e308"}, 2),
        ({"more": "id_skew: 1e308"}, 0),
        ({"ids": "1e308"}, 2),
        ({"ids": "5e-324"}, 0),
        ({"more": "reuse: {file: reuse.yaml, set: s}"}, 0),
        ({"more": "reuse: {file: reuse.yaml, set: s}", "count": 2**63 - 1}, 2),
        ({"more": "reuse: {file: reuse.yaml, set: s}", "bound": 1e308}, 2),
        ({"more": "counts: counts.npy"}, 0),
        ({"more": "counts: counts.npy", "counted": 2**62}, 2),
        ({"more": "counts: counts.npy", "rows": 2**40}, 2),
    ],
)
def test_extreme_numbers_of_a_workload(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], code: int
) -> None:
    values: dict[str, Any] = {"batch": 64, "rows": 100, "ids": 2, "more": "dtype: float32", "count": 50, "bound": 9, "counted": 7}
    values |= change
    path = tmp_path / "w.yaml"
    path.write_text(TABLE.format(**values))
    (tmp_path / "reuse.yaml").write_text(SET.format(**values))
    np.save(tmp_path / "counts.npy", np.full(100, values["counted"]))
    if values["rows"] == 2**40:  # its header says so, and the file is small
        head = repr({"descr": "<i8", "fortran_order": False, "shape": (2**40,)}).ljust(117) + "\n"
        (tmp_path / "counts.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head.encode())
    with limits():
        said(capsys, "plan", str(path), "--topology", "h100x8", "--ranks", "2", "--seconds", "0.1", code=code)


@pytest.mark.parametrize("value", ["1e308", exhaustive("5e-324"), exhaustive("0"), "9223372036854775807", exhaustive(".nan")])
def test_extreme_numbers_of_a_topology(tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str) -> None:
    model, path = workload(tmp_path), tmp_path / "t.yaml"
    text = builtin.locate("topologies", "h100x8").read_text()
    numbers = list(re.finditer(r"(?<=: )[0-9.]+(?=[,}\n])", text))
    assert len(numbers) > 20
    for match in numbers[:: len(numbers) // 12]:
        path.write_text(text[: match.start()] + value + text[match.end() :])
        capsys.readouterr()
        assert main(["plan", str(model), "--topology", str(path), "--ranks", "2", "--seconds", "0.1"]) in (0, 2), match
        assert " nan" not in capsys.readouterr().out


def test_a_reader_of_json_has_one_rule(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": [1, 2.5, "x"]}')
    assert plain_json.read(path) == {"a": [1, 2.5, "x"]}
    link = tmp_path / "link"
    link.symlink_to(path)
    assert plain_json.read(link, named=True) == {"a": [1, 2.5, "x"]}
    with pytest.raises(OSError, match=r"symbolic link|symlink"):
        plain_json.read(link)
    with pytest.raises(ValueError, match="more than 10 bytes"):
        plain_json.read(path, most=10)
    with pytest.raises(ValueError, match=r"2\.5 is not a whole number"):
        plain_json.loads(path.read_bytes(), floats=False)
    with pytest.raises(ValueError, match="key 'a' occurs twice"):
        plain_json.loads('{"a": 1, "a": 1}')


def test_a_console_keeps_to_its_width_where_there_is_no_terminal() -> None:
    file = io.StringIO()
    console_for(file).print("word " * 100)
    assert max(map(len, file.getvalue().splitlines())) <= 100
