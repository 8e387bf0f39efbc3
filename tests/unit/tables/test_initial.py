"""A table starts with the same rows however it is cut."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardembed.config import cores as config_cores
from shardembed.errors import ConfigError
from shardembed.tables import initial
from shardembed.tables.table_config import Constant, Normal, TableConfig, Uniform

ROWS, COLUMNS = 2 * initial.BLOCK_ROWS + 777, 3  # three blocks, the last one short


def of_row_numbers(rows: torch.Tensor) -> torch.Tensor:
    return torch.stack([rows, rows * 2, rows * 3], 1).float()


STARTS = {"normal": Normal(), "uniform": Uniform(-2.0, 3.0), "constant": Constant(0.5), "function": of_row_numbers}


def filled(table: TableConfig, rows: range, columns: range, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    out = torch.full((len(rows), len(columns)), torch.nan, dtype=dtype)
    initial.fill(out, table, seed, rows, columns)
    return out


WHOLE = {name: filled(TableConfig("t", ROWS, COLUMNS, init=start), range(ROWS), range(COLUMNS)) for name, start in STARTS.items()}
EDGES = st.integers(0, ROWS) | st.sampled_from(
    [0, initial.BLOCK_ROWS - 1, initial.BLOCK_ROWS, initial.BLOCK_ROWS + 1, ROWS - 1, ROWS]
)


@given(st.sampled_from(sorted(STARTS)), EDGES, EDGES, st.integers(1, 9000), st.integers(0, COLUMNS), st.integers(0, COLUMNS))
def test_any_cut_of_a_table_is_a_part_of_the_whole(name: str, a: int, b: int, step: int, c: int, d: int) -> None:
    rows, columns = range(min(a, b), max(a, b), step), range(min(c, d), max(c, d))
    got = filled(TableConfig("t", ROWS, COLUMNS, init=STARTS[name]), rows, columns)
    assert torch.equal(got, WHOLE[name][rows.start : rows.stop : rows.step, columns.start : columns.stop])


def by_definition(start: Normal | Uniform, rows: int, columns: int, seed: int) -> np.ndarray:
    """Table "t" as the top of the module says: each block whole, from the stream of its number, then scaled."""
    key = np.frombuffer(hashlib.blake2b(f"{seed}/t".encode(), digest_size=16).digest(), np.uint64)
    blocks = []
    for number, first in enumerate(range(0, rows, initial.BLOCK_ROWS)):
        stream = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, number]))
        shape = (min(initial.BLOCK_ROWS, rows - first), columns)
        if isinstance(start, Normal):
            block = stream.standard_normal(shape, np.float32) * np.float32(start.std) + np.float32(start.mean)
        else:
            block = stream.random(shape, np.float32) * np.float32(start.high - start.low) + np.float32(start.low)
        blocks.append(block)
    return np.concatenate(blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("start", [Normal(0.5, 2.0), Uniform(-2.0, 3.0)], ids=["normal", "uniform"])
@pytest.mark.parametrize("columns", [1, 3, 70])  # of the last a piece has a number of rows that divides no block
def test_rows_have_the_bits_of_their_definition_however_they_are_written(
    columns: int, start: Normal | Uniform, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = TableConfig("t", ROWS, columns, init=start, dtype=dtype)
    expected = torch.from_numpy(by_definition(start, ROWS, columns, 7)).to(dtype)
    monkeypatch.setattr(initial, "WORTH", 1)
    cuts = itertools.product((range(ROWS), range(5, ROWS, 3)), (range(columns), range(columns // 2, columns)), (1, 2, 5))
    for rows, kept, cores in cuts:
        monkeypatch.setattr(initial, "_cores", lambda cores=cores: cores)
        slab = torch.full((len(rows) + 2, len(kept)), torch.nan, dtype=dtype)
        wider = torch.full((len(rows), len(kept) + 1), torch.nan, dtype=dtype)
        for out, around in ((slab[1:-1], slab[[0, -1]]), (wider[:, 1:], wider[:, :1])):  # the latter's rows are apart
            initial.fill(out, table, 7, rows, kept)
            assert torch.equal(out, expected[rows.start :: rows.step, kept.start : kept.stop])
            assert around.isnan().all()


def test_rows_can_be_drawn_in_inference_mode_and_by_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initial, "WORTH", 1)
    monkeypatch.setattr(initial, "_cores", lambda: 3)
    with torch.inference_mode():
        got = filled(TableConfig("t", ROWS, COLUMNS, init=Normal()), range(ROWS), range(COLUMNS))
    assert torch.equal(got, WHOLE["normal"])


@pytest.mark.parametrize(
    ("settings", "cores"),
    [({}, 4), ({"WORLD_SIZE": "2"}, 2), ({"WORLD_SIZE": "64", "LOCAL_WORLD_SIZE": "4"}, 1), ({"WORLD_SIZE": "8"}, 1)],
)
def test_ranks_of_a_machine_share_its_cores(settings: dict[str, str], cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(config_cores, "usable", lambda: 4)
    assert initial._cores() == cores


def test_rows_far_out_are_drawn_without_the_rows_before() -> None:
    table = TableConfig("t", 2**40, 2, init=Normal())
    far = range(2**40 - 3, 2**40)
    assert torch.equal(filled(table, far, range(2)), filled(table, range(2**40 - 10, 2**40), range(2))[7:])


def test_names_seeds_and_blocks_differ() -> None:
    block = initial.BLOCK_ROWS
    table, other = (TableConfig(name, ROWS, COLUMNS, init=Normal()) for name in ("t", "u"))
    whole = filled(table, range(ROWS), range(COLUMNS))
    tables = [
        whole[:block],
        whole[block : 2 * block],
        filled(other, range(block), range(COLUMNS)),
        filled(table, range(block), range(COLUMNS), 1),
    ]
    for i, one in enumerate(tables):
        for two in tables[:i]:
            assert (one == two).float().mean() < 0.01
    # "1" + "2/t" and "1" + "2" + "/t" must not meet: the seed ends where the name begins.
    assert not torch.equal(
        filled(TableConfig("2/t", 9, 3, init=Normal()), range(9), range(3), 1),
        filled(TableConfig("t", 9, 3, init=Normal()), range(9), range(3), 12),
    )


def test_values_follow_the_distribution() -> None:
    normal = filled(TableConfig("t", ROWS, 30, init=Normal(2.0, 3.0)), range(ROWS), range(30))
    assert normal.mean().item() == pytest.approx(2.0, abs=0.03)
    assert normal.std().item() == pytest.approx(3.0, abs=0.03)
    assert ((normal - 2).abs() > 3).float().mean().item() == pytest.approx(0.317, abs=0.01)
    uniform = filled(TableConfig("t", ROWS, 30), range(ROWS), range(30))
    bound = ROWS**-0.5
    assert uniform.abs().max() <= bound
    assert uniform.min().item() == pytest.approx(-bound, rel=1e-3)
    assert uniform.max().item() == pytest.approx(bound, rel=1e-3)
    assert uniform.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)
    assert WHOLE["constant"].unique().tolist() == [0.5]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_get_the_same_numbers_rounded(dtype: torch.dtype) -> None:
    table = TableConfig("t", ROWS, COLUMNS, init=Normal(), dtype=dtype)
    assert torch.equal(filled(table, range(100), range(COLUMNS), dtype=dtype), WHOLE["normal"][:100].to(dtype))


@pytest.mark.parametrize(
    ("init", "shape"),
    [
        (lambda rows: torch.zeros(len(rows)), r"\(5,\)"),
        (lambda rows: torch.zeros(len(rows), 2), r"\(5, 2\)"),
        (lambda rows: torch.zeros(1, 3), r"\(1, 3\)"),
    ],
)
def test_a_function_of_the_wrong_shape_is_refused(init: Any, shape: str) -> None:
    with pytest.raises(ConfigError, match=rf"table 't': init returned shape {shape} for 5 rows; it must return \[5, 3\]"):
        filled(TableConfig("t", 5, 3, init=init), range(5), range(3))
