"""The rows that ids begin with: of seed, table and id alone, by every kind of start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardembed.errors import ConfigError
from shardembed.kernels.starting import Distribution, draw
from shardembed.store.starting import fill_rows
from shardembed.tables.dynamic import Dynamic
from shardembed.tables.initial import table_hash
from shardembed.tables.table_config import Constant, Loaded, Normal, TableConfig, Uniform

COLUMNS = 12
INT64 = st.sampled_from([0, 1, 3, -1, -2, 2**63 - 1, -(2**63)]) | st.integers(-(2**63), 2**63 - 1)


def of_ids(ids: torch.Tensor) -> torch.Tensor:
    return (ids % 1000).double().unsqueeze(1) + torch.arange(COLUMNS) / 7


STARTS: dict[str, Any] = {
    "uniform": Uniform(-2.0, 3.0),
    "normal": Normal(0.5, 0.1),
    "constant": Constant(0.3),
    "function": of_ids,
    "loaded": Loaded(lambda: Normal(0.5, 0.1)),
    "default": None,
}


def table(init: Any = None, name: str = "t", padding_idx: int | None = None) -> TableConfig:
    return TableConfig(name, 100, COLUMNS, init=init, padding_idx=padding_idx)


def rows(
    config: TableConfig, ids: torch.Tensor, seed: int = 0, columns: range = range(COLUMNS), dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    out = torch.full((ids.numel(), len(columns)), torch.nan, dtype=dtype)
    fill_rows(out, config, seed, ids, columns)
    return out


@given(
    st.sampled_from(sorted(STARTS)),
    st.lists(INT64, max_size=9),
    st.integers(0, COLUMNS),
    st.integers(0, COLUMNS),
    st.sampled_from([None, 3]),
)
def test_an_element_depends_on_its_id_and_column_alone(name: str, ids: list[int], a: int, b: int, padding_idx: int | None) -> None:
    config, columns, ids_N = table(STARTS[name], padding_idx=padding_idx), range(min(a, b), max(a, b)), torch.tensor(ids).long()
    alone = [rows(config, ids_N[i : i + 1]) for i in range(len(ids))]
    whole = torch.cat([torch.empty(0, COLUMNS), *alone])
    assert torch.equal(rows(config, ids_N, columns=columns), whole[:, columns.start : columns.stop])
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        if name != "constant" and name != "function":  # those of float64 are not rounded to float32 first
            assert torch.equal(rows(config, ids_N, columns=columns, dtype=dtype), whole[:, columns.start : columns.stop].to(dtype))
    for i, one in enumerate(ids):
        assert (not whole[i].any()) == (one == padding_idx)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_constants_and_functions_are_rounded_once(dtype: torch.dtype) -> None:
    ids = torch.tensor([-1, 2**63 - 1, 5])
    assert torch.equal(rows(table(Constant(0.3)), ids, dtype=dtype), torch.full((3, COLUMNS), 0.3, dtype=dtype))
    assert torch.equal(rows(table(of_ids), ids, dtype=dtype), of_ids(ids).to(dtype))


@pytest.mark.parametrize("padding_idx", [-1, -(2**63), 2**63 - 1, 0])
@pytest.mark.parametrize("start", [Normal(), Constant(0.3), of_ids], ids=["normal", "constant", "function"])
def test_any_id_may_stand_for_nothing(padding_idx: int, start: Any) -> None:
    ids = torch.tensor([-(2**63), -2, -1, 0, 99, 2**63 - 1])
    config = TableConfig("t", 100, COLUMNS, init=start, padding_idx=padding_idx, dynamic=Dynamic())
    found, expected = rows(config, ids), rows(table(start), ids)
    expected[ids == padding_idx] = 0
    assert torch.equal(found, expected)


def test_settings_reach_the_numbers() -> None:
    ids, expected = torch.tensor([-1, 2**63 - 1, 5]), torch.empty(3, COLUMNS)
    draw(expected, ids, 0, Distribution(table_hash(7, "t"), False, 5.0, -2.0))
    assert torch.equal(rows(table(Uniform(-2.0, 3.0)), ids, seed=7), expected)
    draw(expected, ids, 0, Distribution(table_hash(7, "t"), True, 0.125, 0.5))
    assert torch.equal(rows(table(Normal(0.5, 0.125)), ids, seed=7), expected)
    draw(expected, ids, 0, Distribution(table_hash(7, "t"), False, 0.2, -0.1))
    assert torch.equal(rows(table(), ids, seed=7), expected)  # +-1/sqrt(100)


@pytest.mark.parametrize("name", ["uniform", "normal"])
def test_seeds_and_tables_differ(name: str) -> None:
    ids = torch.arange(50)
    one = rows(table(STARTS[name]), ids)
    for other in (rows(table(STARTS[name]), ids, seed=1), rows(table(STARTS[name], name="u"), ids)):
        assert (one == other).double().mean() < 0.01


def test_a_part_of_a_matrix_is_written_and_nothing_beside_it() -> None:
    ids, matrix = torch.tensor([9, -9]), torch.full((2, 5), 7.0)
    fill_rows(matrix[:, 1:4], table(Normal()), 0, ids, range(2, 5))
    assert torch.equal(matrix[:, 1:4], rows(table(Normal()), ids, columns=range(2, 5)))
    assert (matrix[:, [0, 4]] == 7).all()


@pytest.mark.parametrize(
    "wrong", [lambda ids: torch.zeros(len(ids), COLUMNS - 1), lambda ids: torch.zeros(COLUMNS), lambda ids: torch.zeros(1, COLUMNS)]
)
def test_a_function_that_gives_another_shape_is_named(wrong: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with pytest.raises(ConfigError, match=r"table 't': init returned shape .* for 2 ids; it must return \[2, 12\]"):
        rows(table(wrong), torch.tensor([1, 2]))
    assert rows(table(wrong), torch.tensor([], dtype=torch.int64)).shape == (0, COLUMNS), "no ids, nothing to ask"
