"""Quoted line breaks in a text file that several threads read."""

from __future__ import annotations

import csv
from pathlib import Path

from shardembed.recipes.data import text
from shardembed.recipes.use.files import names_in


def test_rows_of_several_lines_are_read_whole_wherever_threads_meet(tmp_path: Path) -> None:
    names = [f'visitor {number}\nof shop, "{number}"' for number in range(5 * text.THREAD_BYTES // 40)]
    path = tmp_path / "users.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerows([("day", "visitor"), *(("1", name) for name in names)])
    assert path.stat().st_size > 3 * text.THREAD_BYTES
    assert names_in(path, "visitor")[0].to_pylist() == names
