"""Names of users and items, as files and callers give them, are the ids that the data are read as."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from shardembed.errors import ConfigError, DataError
from shardembed.recipes.use.catalog import NO_ID, Catalog
from shardembed.recipes.use.files import names_in
from shardembed.recipes.use.row_names import RowNames

LARGE = [-(2**63) + 1, -(10**18), -37, 0, 10**17, 10**18, 6_917_529_027_641_081_856, 2**63 - 1]
NUMBERS = Catalog("user", np.array(LARGE), None)


@pytest.mark.parametrize("suffix", [".csv", ".txt"])
def test_integers_of_64_bits_are_found_by_their_digits(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"users{suffix}"
    path.write_text("viewer\n" * (suffix == ".csv") + "".join(f"{number}\n" for number in LARGE))
    found = NUMBERS.ids_of(names_in(str(path), "viewer")[0])
    assert found.tolist() == LARGE
    assert NUMBERS.numbers_of(found).tolist() == [*range(len(LARGE))]


def test_what_is_no_integer_is_nobody_and_the_others_are_found() -> None:
    texts = ["x", "1e3", " 37", "-37.0", str(2**63 - 1), str(2**64 - 37), str(2**64), "9" * 30, "9" * 300, "-37"]
    assert NUMBERS.ids_of(texts).tolist() == [NO_ID, NO_ID, NO_ID, -37, 2**63 - 1, -37, NO_ID, NO_ID, NO_ID, -37]
    assert NUMBERS.ids_of(pa.array([2**64 - 37], pa.uint64())).tolist() == [-37]


def test_rows_are_named_by_integers_of_64_bits_with_a_sign_or_without() -> None:
    names = RowNames(NUMBERS, None, "item")
    known = np.array([-37, 5, -(2**63)])
    assert names.rows_of([str(2**64 - 37), "-37", "5.0", "7"], known) == [-37, -37, 5, 7]
    for word in ("9" * 19, "9" * 30, "x"):  # of which none is the row of what is missing
        with pytest.raises(ConfigError, match="nothing of that name"):
            names.rows_of([word], known)
    assert names.rows_of([str(-(2**63))], known) == [-(2**63)], "unless it is meant"


def test_a_name_a_line_ends_where_lines_of_a_csv_file_end(tmp_path: Path) -> None:
    names = ["a\u2028b", "c\x0bd", "e\x85f", " g"]
    path = tmp_path / "users.txt"
    path.write_bytes("\r\n".join(names).encode())
    assert names_in(path, "viewer")[0].to_pylist() == names


def test_names_that_are_no_utf8_are_told(tmp_path: Path) -> None:
    path = tmp_path / "users.csv"
    path.write_bytes(b"viewer\nJos\xe9\n")
    with pytest.raises(DataError, match=r"users.csv: column 'viewer' is no UTF-8"):
        names_in(path, "viewer")


def test_bad_rows_and_missing_names_of_a_file_of_users_are_left_out_where_the_run_leaves_them_out(tmp_path: Path) -> None:
    path = tmp_path / "users.csv"
    path.write_text("viewer,note\nu1,a\nu2\n,b\nu3,c\nu1,d\n")
    found, left_out = names_in(str(path), "viewer", skip=True)
    assert (found.to_pylist(), left_out) == (["u1", "u3"], 2)
    with pytest.raises(DataError, match=r"users.csv:3: 1 field"):
        names_in(str(path), "viewer")
