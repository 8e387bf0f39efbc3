"""What a model takes of a number is the same in clicks, in towers and in a folder that serves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import shardembed as se
from shardembed.recipes.data.feature_values import bucket_of, edges_of, signed_log
from shardembed.recipes.features_config import FeatureConfig
from shardembed.recipes.models.side_features import scaled, table_ids

EDGES = (0.1, 0.7, 16777217.0)  # as float32 above, below, and below
AGES = FeatureConfig(name="age", kind="number", buckets=EDGES)
TABLE = se.TableConfig("age", 4, 4)


@pytest.mark.parametrize(("value", "bucket"), [(0.1, 1), (0.7, 2), (16777217.0, 3), (0.0, 0), (-1.0, 0), (0.69, 1), (np.nan, 0)])
def test_a_number_is_not_below_the_edge_that_it_is(value: float, bucket: int) -> None:
    read = np.array([value], np.float32)
    assert bucket_of(read, edges_of(EDGES)).tolist() == [bucket]
    towers = table_ids(AGES, read, TABLE)
    assert isinstance(towers, np.ndarray)
    assert towers.tolist() == [bucket]


@given(st.lists(st.floats(width=32, allow_nan=True, allow_infinity=False), max_size=20))
def test_logarithms_keep_signs_and_order(values: list[float]) -> None:
    read = np.array(values, np.float32)
    found = signed_log(read)
    assert found.dtype == np.float32
    assert np.array_equal(found, -signed_log(-read))
    order = np.argsort(np.nan_to_num(read))
    assert (np.diff(found[order]) >= 0).all()
    assert (
        np.allclose(found, np.sign(read) * np.log1p(np.abs(read.astype(np.float64))), rtol=1e-6, equal_nan=False)
        or np.isnan(read).any()
    )
    assert np.array_equal(scaled(FeatureConfig(name="price", kind="number", scale="log"), read), found)
