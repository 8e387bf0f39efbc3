"""Labels of clicks, however files write them."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from shardembed.errors import DataError
from shardembed.recipes.data.opened import open_files
from shardembed.recipes.data.wanted import Wanted

LABELS = {
    "booleans": (pa.array([True, False]), [1, 0]),
    "texts": (pa.array(["True", "false"]), [1, 0]),
    "floats": (pa.array([1.0, 0.0]), [1, 0]),
    "texts of floats": (pa.array(["1.0", "0.0"]), [1, 0]),
    "decimals": (pa.array([Decimal("1"), Decimal("0")]), [1, 0]),
    "small integers": (pa.array([1, 0], pa.uint8()), [1, 0]),
    "twos": (pa.array([1, 2]), r"row 1 \(from 0\), column 'clicked': 2 is no label, which is 0 or 1"),
    "probabilities": (pa.array([1.0, 0.3]), r"row 1 \(from 0\), column 'clicked': 0.3 is no label"),
    "yes and no": (pa.array(["yes", "no"]), r"row 0 \(from 0\), column 'clicked': 'yes' is no label"),
    "nulls": (pa.array([1, None]), r"row 1 \(from 0\), column 'clicked': a missing value is no label"),
    "dates": (pa.array([1, 0], pa.timestamp("s")), r"column 'clicked' \(data.label\) holds timestamp.*; labels must be 0 or 1"),
}


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_labels_are_0_and_1_however_they_are_written(tmp_path: Path, name: str, suffix: str) -> None:
    values, expected = LABELS[name]
    path = tmp_path / f"clicks{suffix}"
    if suffix == ".parquet":
        parquet.write_table(pa.table({"clicked": values, "x": [1, 2]}), path)
    else:
        if name == "dates":
            return
        path.write_text("clicked,x\n" + "".join(f"{'' if one is None else one},1\n" for one in values.to_pylist()))
        expected = (
            expected.replace(r"row 0 \(from 0\),", ":2:")
            .replace(r"row 1 \(from 0\),", ":3:")
            .replace(": 2 is", ": '2' is")
            .replace("0.3", "'0.3'")
            if isinstance(expected, str)
            else expected
        )
    wanted = [Wanted("clicked", "label", "data.label"), Wanted("x", "id", "data.features")]

    def labels() -> list[int]:
        read = list(open_files([str(path)], wanted, False, "data.path").chunks(0))
        return [int(one) for each in read for one in each.columns[0]]  # type: ignore[attr-defined]

    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected.replace(",:", ":")):
            labels()
    else:
        assert labels() == expected
