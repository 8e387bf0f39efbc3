"""`shardembed bench ranks`: from the command line to its JSON and its page; what it times is not looked at."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ranks
from benchmarks.own_work import PARTS
from shardembed import cli

ASKED = {"ranks", "packing", "ids", "slabs", "tables", "milliseconds", "operators", "host_syncs"}


def run(folder: Path, only: str) -> dict[str, Any]:
    words = ["bench", "ranks", "--ranks", "2", "3", "--rounds", "1", "--steps", "1", "--samples", "2", f"--only={only}"]
    assert cli.main([*words, "--json", str(folder / "ranks.json"), "--markdown", str(folder / "ranks.md")]) == 0
    return json.loads((folder / "ranks.json").read_text())


def test_a_run_has_a_point_for_each_number_of_ranks_and_counts_the_same_for_all(tmp_path: Path) -> None:
    found = run(tmp_path, "8 tables in 4 slabs, 1 id, unique")
    assert {"date", "command", "machine", "versions"} <= set(found)
    assert [point["ranks"] for point in found["points"]] == [2, 3]
    for point in found["points"]:
        assert set(point) >= ASKED
        assert (point["tables"], point["slabs"], point["ids"], point["packing"]) == (8, 4, 1, "unique")
        assert 0 < point["milliseconds"] <= point["median"]
        assert set(point["parts"]) == set(PARTS)
        assert sum(point["parts"].values()) == pytest.approx(point["milliseconds"])
        assert isinstance(point["operators"], int)
        assert isinstance(point["host_syncs"], int)
        assert point["operators"] > 0
    assert len({(point["operators"], point["host_syncs"]) for point in found["points"]}) == 1
    assert "![a rank's own work against the number of ranks](ranks.svg)" in (tmp_path / "ranks.md").read_text()
    assert "<svg" in (tmp_path / "ranks.svg").read_text()


@pytest.mark.exhaustive
@pytest.mark.skipif(importlib.util.find_spec("torchrec") is None, reason="needs TorchRec")
def test_torchrec_runs_on_ranks_that_are_not_there(tmp_path: Path) -> None:
    found = run(tmp_path, "TorchRec, 10 ids")
    assert found["points"] == []
    assert [(peer["who"], peer["ranks"], peer["ids"]) for peer in found["peers"]] == [("TorchRec", 2, 10), ("TorchRec", 3, 10)]
    assert all(min(peer["parts"].values()) > 0 for peer in found["peers"])


def test_the_page_compares_many_ranks_with_few_and_torchrec_with_us() -> None:
    case = {"tables": 26, "slabs": 4, "ids": 1, "samples": 256}
    parts = dict.fromkeys(PARTS, 0.1)
    ours = [
        {"who": ranks.OURS, "ranks": number, "packing": packing, **case, "milliseconds": ms, "median": ms, "parts": parts}
        | {"operators": operators, "host_syncs": 2}
        for packing, slower in (("unique", 1.0), ("bag", 0.5))
        for number, ms, operators in ((8, 2.0 * slower, 50), (1024, 2.2 * slower, 54))
    ]
    theirs = {"who": ranks.TORCHREC, "ranks": 1024, "packing": "bag", **case, "slabs": 1, "milliseconds": 11.0, "median": 12.0}
    theirs["parts"] = dict.fromkeys(ranks.peer_ranks.PARTS, 1.0)
    refused = {"who": ranks.TORCHREC, "ranks": 8, "ids": 1, "left_out": "no memory"}
    text = "\n".join(ranks.page([*ours, theirs, refused], None))
    assert "| 26 tables in 4 slabs, 1 id, unique | 2.00 | 2.20 | **1.10** |" in text
    assert "| 26 tables in 4 slabs, 1 id, bag | 50 to 54 | 2 |" in text
    assert "| 1,024 | 1.00 | 1.00 | 1.00 | 1.00 | 11.00 | 12.00 | **5.0** |" in text
    assert "- Left out: TorchRec on 8 ranks: no memory" in text
