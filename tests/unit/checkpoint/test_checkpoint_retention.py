"""Which checkpoints of a folder stay: the branch that was saved last comes first, and the last finite one is never removed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shardembed.checkpoint.folders import Named, listed
from shardembed.checkpoint.format.pieces import Part, write_file
from shardembed.checkpoint.retention import kept, newest_finite, said, warn_of
from shardembed.errors import NonFiniteWarning
from shardembed.kernels.reference import is_finite
from tests.unit.checkpoint.saved import Writer

LOST = ("a",)


def put(root: Path, name: str, previous: str | None = None, lost: tuple[str, ...] = ()) -> None:
    named = Named.of(name)
    assert named is not None
    writer = Writer(root / name, previous=previous, nonfinite=lost)
    writer.add("a", torch.zeros(2, 1))
    writer.write(named.step)


def names(stay: set[Named]) -> list[str]:
    return sorted(map(str, stay))


def written(root: Path) -> Named:
    return listed(root)[-1]


def test_a_straight_run_keeps_the_newest_steps_as_they_were_saved_last(tmp_path: Path) -> None:
    put(tmp_path, "step-0000000010")
    put(tmp_path, "step-0000000020", "step-0000000010")
    put(tmp_path, "step-0000000020.1", "step-0000000020")
    put(tmp_path, "step-0000000030", "step-0000000020.1")
    assert names(kept(tmp_path, written(tmp_path), 2)) == ["step-0000000020.1", "step-0000000030"]
    assert names(kept(tmp_path, written(tmp_path), 9)) == ["step-0000000010", "step-0000000020.1", "step-0000000030"]
    assert names(kept(tmp_path, written(tmp_path), None)) == ["step-0000000010", "step-0000000020.1", "step-0000000030"]


@pytest.mark.parametrize(
    ("keep", "stays"),
    [
        (1, ["step-0000000025-r1"]),
        (2, ["step-0000000010", "step-0000000025-r1"]),  # not 30 and not 20, which this run has not come by
        (3, ["step-0000000010", "step-0000000025-r1", "step-0000000030"]),
        (4, ["step-0000000010", "step-0000000020", "step-0000000025-r1", "step-0000000030"]),
        (None, ["step-0000000010", "step-0000000020", "step-0000000025-r1", "step-0000000030"]),
    ],
)
def test_after_going_back_what_was_left_behind_goes_first(tmp_path: Path, keep: int | None, stays: list[str]) -> None:
    put(tmp_path, "step-0000000010")
    put(tmp_path, "step-0000000020", "step-0000000010")
    put(tmp_path, "step-0000000030", "step-0000000020")
    put(tmp_path, "step-0000000025-r1", "step-0000000010")
    assert names(kept(tmp_path, written(tmp_path), keep)) == stays


def test_a_way_that_leads_in_a_circle_or_away_ends(tmp_path: Path) -> None:
    put(tmp_path, "step-0000000010", "step-0000000020")
    put(tmp_path, "step-0000000020", "step-0000000010")
    put(tmp_path, "step-0000000030", "step-0000000005")
    assert names(kept(tmp_path, Named(0, 20, 0), 2)) == ["step-0000000010", "step-0000000020"]
    assert names(kept(tmp_path, written(tmp_path), 2)) == ["step-0000000020", "step-0000000030"]


def test_the_newest_finite_one_stays_beside_those_that_are_not(tmp_path: Path) -> None:
    put(tmp_path, "step-0000000010")
    put(tmp_path, "step-0000000020", "step-0000000010")
    put(tmp_path, "step-0000000030", "step-0000000020", LOST)
    put(tmp_path, "step-0000000040", "step-0000000030", LOST)
    assert newest_finite(tmp_path) == "step-0000000020"
    for keep, stays in ((1, (20, 40)), (2, (20, 30, 40)), (3, (20, 30, 40))):
        assert [name.step for name in sorted(kept(tmp_path, written(tmp_path), keep))] == list(stays)
    put(tmp_path, "step-0000000050", "step-0000000040")
    assert names(kept(tmp_path, written(tmp_path), 1)) == ["step-0000000050"]


def test_the_finite_one_of_a_step_that_is_saved_again_stays(tmp_path: Path) -> None:
    put(tmp_path, "step-0000000010")
    put(tmp_path, "step-0000000010.1", "step-0000000010", LOST)
    assert names(kept(tmp_path, written(tmp_path), None)) == ["step-0000000010", "step-0000000010.1"]


def test_where_none_is_finite_the_newest_stay_and_it_is_said(tmp_path: Path) -> None:
    put(tmp_path, "step-0000000010", lost=LOST)
    put(tmp_path, "step-0000000020", "step-0000000010", LOST)
    assert names(kept(tmp_path, written(tmp_path), 1)) == ["step-0000000020"]
    with pytest.warns(NonFiniteWarning, match=r"step-0000000020 holds inf or nan in 'a'; there is none beside it that does not"):
        warn_of(tmp_path / "step-0000000020", LOST)
    assert said([*"abcdefg"]) == "'a', 'b', 'c', 'd', 'e' and 2 more"


def test_a_damaged_one_does_not_count_as_finite(tmp_path: Path) -> None:
    put(tmp_path, "step-0000000010")
    put(tmp_path, "step-0000000020", "step-0000000010")
    (tmp_path / "step-0000000020" / "manifest.json").write_text("{}")
    put(tmp_path, "step-0000000030", "step-0000000020", LOST)
    assert names(kept(tmp_path, written(tmp_path), 2)) == ["step-0000000010", "step-0000000020", "step-0000000030"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_one_value_that_is_not_finite_is_found_and_large_ones_are_not_taken_for_it(tmp_path: Path, dtype: torch.dtype) -> None:
    most = torch.full((1000, 3), torch.finfo(dtype).max, dtype=torch.float64).to(dtype)
    assert is_finite(most)  # their sum is not
    for value in (float("inf"), float("-inf"), float("nan")):
        one = most.clone()
        one[999, 2] = value
        assert not is_finite(one)
        found: set[str] = set()
        parts = [Part("good", most), Part("bad", one), Part("ids", torch.arange(4).unsqueeze(1))]
        write_file(tmp_path / f"{value}.safetensors", parts, {}, nonfinite=found)
        assert found == {"bad"}
    assert is_finite(torch.tensor([2**62]))
    assert is_finite(torch.empty(0, dtype=dtype))
