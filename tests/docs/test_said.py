"""What pages say without running it: commands, make targets, links, error messages, public names, pictures, tutorials."""

from __future__ import annotations

import ast
import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import shardembed as se
from docs import extension
from docs.extension import api, links, percent, settings, tables
from docs.pictures import draw
from shardembed import cli
from tests.docs import pages

INLINE = re.compile(r"`(shardembed [a-z]+ [^`]+)`")
MODULES = {"__version__", "errors", "optim", "testing"}


@pytest.mark.parametrize("page", pages.PAGES)
def test_commands_are_ones_that_the_command_line_takes(page: str) -> None:
    text = pages.read(page)
    found = [command for block in pages.blocks_of(text) for command in pages.commands_of(block.text)]
    found += [" ".join(command.split()) for command in INLINE.findall(text) if "..." not in command]
    for command in found:
        words = pages.words_of(command)
        words = ["step" if word == "SET" else word for word in words]  # which is one of several words
        with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()) as complaint:
            cli._parser(words).parse_args(words)
        assert not complaint.getvalue(), f"{page}: the command line does not take: {command}\n{complaint.getvalue()}"


@pytest.mark.parametrize("page", [*pages.PAGES, "CONTRIBUTING.md", "SECURITY.md"])
def test_make_targets_and_links_lead_somewhere(page: str) -> None:
    text, makefile = pages.read(page), (pages.ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^    |`)make ([a-z-]+)(?=`|  |\n| ARGS)", text, re.MULTILINE):
        if target == "route":
            continue  # a stage of a step: "make route"
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page}: there is no `make {target}`"
    links.to_files(text, pages.ROOT / page, pages.ROOT / "docs")


def texts_of(source: Path) -> Iterator[str]:
    """Every text in a module, with `...` for what is filled in."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
            yield f"...{node.value}"  # what stands before it may be put there elsewhere
        elif isinstance(node, ast.JoinedStr):
            parts = (str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
            yield re.sub(r"(\.\.\.){2,}", "...", "".join(parts))


def test_messages_that_are_explained_begin_as_the_code_has_them() -> None:
    page = pages.read("docs/troubleshooting.md")
    messages = re.findall(r"^- `([^`]+)`\\?$", page, re.MULTILINE)
    assert len(messages) == len(re.findall(r"^- ", page, re.MULTILINE)) > 40
    # Spaces at the begin are those between sentences.
    texts = {text.lstrip() for source in (pages.ROOT / "shardembed").rglob("*.py") for text in texts_of(source)}
    for message in messages:
        assert any(text.startswith(message) for text in texts), f"no message of the code begins with: {message}"


def test_every_public_name_is_on_one_page_of_the_reference() -> None:
    named = [name for names in api.PAGES.values() for name in names]
    assert len(named) == len(set(named))
    assert set(se.__all__) - MODULES <= set(named)
    for page, names in api.PAGES.items():
        assert f"api {page}" in pages.read(f"docs/reference/{page}.md")
        for name, members in names.items():
            value = api.value_of(name)
            assert value.__doc__, f"{name} has no docstring"
            for member in members.split():
                assert hasattr(value, member) or member in value.__dataclass_fields__, f"{name} has no {member}"


@pytest.mark.parametrize("name", se.optim.NAMES)
def test_every_optimizer_is_on_the_pages_that_list_them(name: str) -> None:
    assert f"optim.{name}" in api.PAGES["optimizers"]
    assert f"\n| `{name}` | `lr=" in pages.read("docs/reference/optimizers.md")
    (listed,) = re.findall(r"^Optimizers: (.*?), in `se.optim`", pages.read("README.md"), re.MULTILINE | re.DOTALL)
    assert name in re.findall(r"`(\w+)`", listed), f"README.md names the optimizers, and not {name}"


def test_tables_of_the_repository_are_current() -> None:
    assert not tables.stale(), "run make docs-tables (python -m docs.extension.tables)"
    written = [pages.read(f"docs/reference/{name}.md") for name in ("configuration", "optimizers")]
    assert sum(len(tables.TABLE.findall(text)) for text in written) == len(settings.ROOTS) + 1


def test_a_table_is_written_again_where_the_code_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "PAGES", tmp_path / "docs")
    page, other = tmp_path / "docs" / "a.md", tmp_path / "docs" / "b.md"
    page.parent.mkdir()
    page.write_text("before\n\n<!-- settings reuse, by make docs-tables -->\n<!-- end -->\n\nafter\n<!-- end -->\n")
    other.write_text("nothing\n")
    assert tables.main(["--check"]) == 1
    assert "| `batch_size` |" not in page.read_text()
    assert tables.main([]) == 0
    text = page.read_text()
    assert text.startswith("before\n\n<!-- settings reuse, by make docs-tables -->\n\n### ")
    assert text.endswith("\n\n<!-- end -->\n\nafter\n<!-- end -->\n")
    assert "| `batch_size` | whole number" in text
    assert tables.main(["--check"]) == 0
    page.write_text(text.replace("whole number", "number"))
    assert tables.stale() == [page]
    assert tables.main([]) == 0
    assert page.read_text() == text
    page.write_text("<!-- nobody, by make docs-tables -->\n<!-- end -->\n")
    with pytest.raises(KeyError, match="nobody"):
        tables.stale()


def test_the_reference_of_settings_has_every_section_and_default() -> None:
    text = pages.read("docs/reference/configuration.md")
    for root in settings.ROOTS.values():
        for _, model in settings._walk(root, ""):
            for name, field in model.model_fields.items():
                assert name == "root" or f"| `{field.alias or name}` |" in text, f"{model.__name__}.{name} is missing"
    assert "| `global_batch_size` | whole number ≥ 1 | `2048` |" in text
    assert "### `train.schedule`" in text


def test_the_reference_of_commands_has_every_option() -> None:
    text = extension.fill(pages.read("docs/reference/command-line.md"))
    for name in cli.COMMANDS:
        assert f"\n## {name}\n" in text
    assert "| `--max-restarts N` |" in text


def test_the_pictures_are_what_the_layouts_are() -> None:
    for name, make in draw.PICTURES.items():
        file = draw.HERE / name
        assert file.read_text(encoding="utf-8") == make(), f"{file} is not up to date: run python docs/pictures/draw.py"


TUTORIALS = {
    "first_model": ["step 200: loss 0.0", "person 7 likes films 17 and 18: [True, False]", "left to a dense optimizer: ['bias']"],
    "planning": ["no plan fits into memory: 1 rank(s)", "a step takes ", "64 ranks", "hash True"],
    "from_logs": ["115 rows are malformed", "popularity", "recommendations for 5,000 users", "kept"],
    "looking": ["comedy 14 is near to ['comedy", "600 of 600 rows", "film.npy"],
}


LONG = {"from_logs": pytest.mark.exhaustive}


@pytest.mark.parametrize("name", [pytest.param(name, marks=LONG.get(name, ())) for name in TUTORIALS])
def test_a_tutorial_runs_and_becomes_a_page(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(pages.ROOT))  # as the build of the site has it: a page runs examples
    path = pages.ROOT / "docs" / "tutorials" / f"{name}.py"
    outputs = percent.run(path)
    said = "".join(output.printed for output in outputs)
    for wanted in TUTORIALS[name]:
        assert wanted in said, f"{wanted} is not in\n{said}"
    pictures = [picture for output in outputs for picture in output.pictures]
    assert pictures == {"planning": ["memory.svg", "time.svg"], "looking": ["films.svg"]}.get(name, [])
    page = percent.page(path, outputs, "/made")
    assert page.startswith("# ")
    assert "# %%" not in page
    assert all(f"](/made/{picture})" in page for picture in pictures)
    assert page.count("```python\n") == len(outputs)


def test_all_tutorials_are_known() -> None:
    assert sorted(path.stem for path in (pages.ROOT / "docs" / "tutorials").glob("*.py")) == sorted(TUTORIALS)
