"""The GPU benchmark's logic on tiny tables: cases, turns and the page. No speed is looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from shardembed.kernels.triton import order
from tests.unit.kernels.triton_cases import DEVICE


def test_the_page_has_a_row_a_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--rows", "50", "--bags", "4", "--rounds", "1", "--flush", "1000", "--copy", "10000"]
    cases = ["--widths", "4", "6", "--ids", "2", "--skews", "0", "1.05"]
    gpu.main([*sizes, *cases, "--device", DEVICE.type, "--markdown", str(tmp_path / "page.md")])
    page = (tmp_path / "page.md").read_text()
    assert page in capsys.readouterr().out
    rows = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| ")]
    assert rows == ["| width, ids, skew", "| ---", "| 4, 2, 0", "| 4, 2, 1.05", "| 6, 2, 0", "| 6, 2, 1.05"]
    assert "plain torch, geometric mean: forward " in page


def test_rows_are_ordered_as_slabs_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where long runs are cut depends on the width, and how long an update takes on that."""
    order_as_it_is, asked = order.order, list[int]()

    def noted(*given: Any) -> order.Order:
        asked.append(given[3])
        return order_as_it_is(*given)

    monkeypatch.setattr(order, "order", noted)
    gpu.measure(gpu.Size(50, 4, 4, 2, 0.0), DEVICE, gpu.Clock(DEVICE, 1000), 1)
    assert set(asked) == {order.direct_of(4)} != {order.DIRECT}


@pytest.mark.parametrize("skew", [0.0, 0.9, 1.0, 1.15])
def test_ids_follow_zipfs_law(skew: float) -> None:
    rows = 1000
    ids = gpu.draw(gpu.Size(rows, 500_000, 8, 1, skew), torch.device("cpu"))
    counts = ids.bincount(minlength=rows).sort(descending=True).values.double()
    assert len(counts) == rows
    shares = torch.arange(1, rows + 1, dtype=torch.float64) ** -skew
    for part in (slice(0, 10), slice(10, 100)):  # drawn from the law's continuous form, which is a little flatter at its head
        wanted = float(shares[part].sum() / shares.sum())
        assert float(counts[part].sum() / counts.sum()) == pytest.approx(wanted, rel=0.35)


def test_bandwidth_counts_rows_ids_and_sums() -> None:
    times = gpu.Times(gpu.Size(100, 10, 4, 3, 0.0), 1.0, 2.0, 3.0, {"other": (4.0, 10.0)})
    assert times.bandwidth() == 10 * 3 * (16 + 8) + 10 * 16 + 10 * 8
    assert times.ratios("other") == (4.0, 2.0)


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "there is no CUDA device here; --device cpu tries the logic" in capsys.readouterr().err
