"""The tour in README.md: the six files to read are those that a training step passes, in the order in which it does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.unit.journey.traced import Step, traced_step

README = Path(__file__).parents[3] / "README.md"
HEADING = "## To understand it, read these six files in this order"
WAY = ("journey", "store", "kernels")  # the rooms that a batch passes once its ids are read


@pytest.fixture(scope="module")
def step() -> Step:
    return traced_step()


@pytest.fixture(scope="module")
def tour() -> list[str]:
    section = README.read_text(encoding="utf-8").partition(f"{HEADING}\n")[2].partition("\n## ")[0]
    files = re.findall(r"^\d\. \[`[\w./]+`\]\(shardembed/([\w./]+)\): \S", section, re.MULTILINE)
    assert len(files) == 6, f"README.md should list six files, each with a link and a sentence, under {HEADING!r}"
    return files


def on_the_way(step: Step) -> dict[str, int]:
    """How many functions a step enters in each file of the rooms on its way."""
    return {file: len(functions) for file, functions in step.all.items() if file.partition("/")[0] in WAY}


def test_a_step_enters_the_files_in_the_order_of_the_tour(step: Step, tour: list[str]) -> None:
    missed = [file for file in tour if file not in step.all]
    assert not missed, f"a training step does not enter {missed}"
    assert tour == [file for file in step.all if file in tour], "the tour has another order than the batch"


def test_who_has_read_the_tour_has_met_most_of_the_way(step: Step, tour: list[str]) -> None:
    counts = on_the_way(step)
    read = sum(counts[file] for file in tour)
    assert read > sum(counts.values()) / 2, f"the tour has {read} of {sum(counts.values())} functions: {counts}"


def test_no_file_that_the_batch_dwells_in_is_missing(step: Step, tour: list[str]) -> None:
    """Whoever is entered with an eighth of the functions is part of the story."""
    counts = on_the_way(step)
    missing = [file for file, count in counts.items() if count > sum(counts.values()) / 8 and file not in tour]
    assert not missing, f"a step enters many functions of {missing}, which README.md leaves out: {counts}"


def test_the_architecture_page_counts_what_is_entered(step: Step) -> None:
    page = (README.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    sentence = r"a forward enters (\d+) functions in (\d+) files and a whole training step (\d+) in (\d+)"
    found = re.search(sentence, " ".join(page.split()))
    assert found, "docs/architecture.md should say how many functions and files a forward and a step enter"
    said = [int(number) for number in found.groups()]
    counted = [number for files in (step.forward, step.all) for number in (sum(map(len, files.values())), len(files))]
    # A fifth more or less, so that not every new helper is a change of the page.
    assert said == [pytest.approx(number, rel=0.2) for number in counted], f"the page says {said}, a step has {counted}"
