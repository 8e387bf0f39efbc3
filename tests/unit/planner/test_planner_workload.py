"""Workload files become tables and their traffic; what is wrong in them is told with file, line, column and the nearest name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from shardembed.errors import ConfigError
from shardembed.optim import Adagrad, Adam, RowwiseAdagrad
from shardembed.planner import workload
from shardembed.planner.traffic import Traffic
from shardembed.planner.workload import Counts, Reuse, Uniform, Zipf, workload_of
from shardembed.tables.table_config import TableConfig

WORKLOADS = Path(__file__).parents[3] / "configs" / "workloads"
TABLE = "num_embeddings: 100, embedding_dim: 8, ids_per_sample: [2]"
HISTOGRAM = "tables: 2, batch_size: 10, ids: 100, distinct_rows: 60, upper_bounds: [1, inf], touched_rows: [0.5, 0.5]"


def write(folder: Path, text: str) -> Path:
    path = folder / "model.yaml"
    path.write_text(text)
    return path


def complaint(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        workload.load(write(folder, text))
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "tables", "gib", "ids"),
    [
        ("dlrm-dcnv2", 26, 97.4, 214),
        ("synthetic-tiny", 55, 4.2, 85),
        ("synthetic-small", 107, 26.3, 377),
        ("synthetic-medium", 311, 206.2, 1611),
    ],
)
def test_the_workloads_that_come_along_are_what_their_authors_say(name: str, tables: int, gib: float, ids: float) -> None:
    found = workload.load(WORKLOADS / f"{name}.yaml")
    assert (found.name, found.global_batch_size, len(found.tables)) == (name, 65536, tables)
    values = sum(load.table.num_embeddings * load.table.embedding_dim for load in found.tables)
    assert values * 4 / 2**30 == pytest.approx(gib, abs=0.05)
    assert sum(sum(load.ids_per_sample) for load in found.tables) == ids
    assert {load.optimizer for load in found.tables} == {Adagrad()}
    skewed = (Zipf(1.05), "sorted") if name.startswith("synthetic") else (Uniform(), "hashed")
    assert {(load.skew, load.order) for load in found.tables} == {skewed}


@pytest.mark.parametrize("name", ["meta-2021", "meta-2022"])
def test_the_histograms_that_come_along_give_back_their_own_batch(name: str) -> None:
    reuse = workload.load_reuse(WORKLOADS / "reuse-production.yaml", name)
    load = workload_of([TableConfig("t", 10**9, 8)], reuse.ids / reuse.batch_size, reuse.batch_size, skew=reuse).tables[0]
    found = Traffic.of(load, reuse.batch_size / 8, 8)
    assert 8 * found.ids == pytest.approx(reuse.ids)
    assert found.touched == pytest.approx(reuse.distinct, rel=0.01)


def test_what_is_said_of_a_table_goes_before_what_is_said_of_all(tmp_path: Path) -> None:
    text = f"""
global_batch_size: 64
optimizer: {{name: Adam, lr: 0.5, betas: [0.8, 0.9]}}
dtype: bfloat16
pooling: mean
id_skew: 1.1
wire_dtype: bfloat16
tables:
  - {{name: a, {TABLE}}}
  - {{name: b, {TABLE}, optimizer: RowwiseAdagrad, dtype: float32, pooling: null, id_skew: 0, id_order: sorted}}
  - {{name: c, num_embeddings: 5, embedding_dim: 4, ids_per_sample: [1, 2.5], feature_names: [x, y],
     pooling: {{x: max, y: null}}, id_order: hashed, max_norm: 1.0, frozen: true}}
"""
    found = workload.load(write(tmp_path, text))
    a, b, c = found.tables
    assert (found.name, found.wire_dtype) == ("model", torch.bfloat16)
    assert (a.optimizer, a.skew, a.order) == (Adam(0.5, (0.8, 0.9)), Zipf(1.1), "sorted")
    assert (a.table.dtype, a.table.pooling, a.table.feature_names) == (torch.bfloat16, "mean", ("a",))
    assert (b.optimizer, b.skew, b.order) == (RowwiseAdagrad(), Uniform(), "sorted")
    assert (b.table.dtype, b.table.pooling) == (torch.float32, None)
    assert (c.skew, c.order, c.ids_per_sample, c.table.feature_names) == (Zipf(1.1), "hashed", (1.0, 2.5), ("x", "y"))
    assert (c.table.pooling_of("x"), c.table.pooling_of("y"), c.table.max_norm, c.table.frozen) == ("max", None, 1.0, True)


def test_groups_become_tables_with_names_of_their_own(tmp_path: Path) -> None:
    text = (
        f"global_batch_size: 64\ntable_groups: [{{count: 2, {TABLE}}}, {{count: 1, name: ad, {TABLE.replace('[2]', '[1, 3]')}}}]\n"
    )
    found = workload.load(write(tmp_path, text))
    assert [load.table.name for load in found.tables] == ["g0_0", "g0_1", "ad_0"]
    assert found.tables[2].table.feature_names == ("ad_0.0", "ad_0.1")
    assert found.tables[0].optimizer == RowwiseAdagrad()


def test_histograms_and_counts_lie_beside_the_workload(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(100, dtype=np.uint16))
    (tmp_path / "reuse.yaml").write_text(f"day: {{{HISTOGRAM}, accesses: [0.3, 0.7]}}\n")
    text = f"""
global_batch_size: 64
reuse: {{file: reuse.yaml, set: day}}
tables:
  - {{name: a, {TABLE}, counts: a.npy}}
  - {{name: b, {TABLE}}}
  - {{name: c, {TABLE}, id_order: sorted}}
"""
    a, b, c = workload.load(write(tmp_path, text)).tables
    assert isinstance(a.skew, Counts)
    assert a.skew.counts.tolist() == list(range(100))
    assert isinstance(b.skew, Reuse)
    assert b.skew is c.skew
    assert (b.skew.bounds, b.skew.ids, b.order, c.order) == ((1.0, float("inf")), 100.0, "hashed", "sorted")


def test_equal_names_are_shown_at_both_places(tmp_path: Path) -> None:
    text = f"global_batch_size: 64\ntables:\n  - {{name: a, {TABLE}}}\n  - {{name: b, {TABLE}}}\n  - {{name: a, {TABLE}}}\n"
    path = tmp_path / "model.yaml"
    assert complaint(tmp_path, text) == f"{path}:5:6: table 'a' is already there, at {path}:3:6; rename one"
    text = f"global_batch_size: 64\ntables: [{{name: g0_1, {TABLE}}}]\ntable_groups: [{{count: 2, {TABLE}}}]\n"
    assert f"{path}:3:16: table 'g0_1' is already there, at {path}:2:11" in complaint(tmp_path, text)


TOP = "global_batch_size: 64\n"


def one(more: str) -> str:
    """A file with one table, about which something more is said."""
    return f"{TOP}tables: [{{name: a, {TABLE}, {more}}}]"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"tables: [{{name: a, {TABLE}}}]", ":1:1: global_batch_size Field required"),
        (TOP, ":1:1: the configuration: tables and table_groups make 0 tables"),
        (TOP + "tabels: []", ":2:1: unknown key 'tabels'; did you mean 'tables'?"),
        (one("num_embedings: 3"), "unknown key 'num_embedings' in tables.0; did you mean 'num_embeddings'?"),
        (TOP + "tables:\n  - {name: a, embedding_dim: 8, ids_per_sample: [2]}", ":3:5: tables.0.num_embeddings Field required"),
        (one("dtype: int8").replace("100", "0"), ":2:20: tables.0.num_embeddings should be greater than or equal to 1, not 0"),
        (one("dtype: int8"), "tables.0.dtype: 'int8' is not one of float32"),
        (one("dtype: int8").replace("[2]", "[2, -1]"), "tables.0.ids_per_sample.1 should be greater than 0, not -1"),
        (TOP + f"table_groups: [{{cuont: 3, {TABLE}}}]", "unknown key 'cuont' in table_groups.0; did you mean 'count'?"),
        (one("optimizer: Adagard"), ":2:80: tables.0.optimizer.name: 'Adagard' is not one of"),
        (one("optimizer: {name: SGD, eps: 1}"), ":2:103: tables.0.optimizer.eps: SGD takes no 'eps'; it takes lr"),
        (one("optimizer: {nmae: SGD}"), "unknown key 'nmae' in tables.0.optimizer; did you mean 'name'?"),
        (one("pooling: avg"), ":2:80: tables.0.pooling: 'avg' is not one of sum, mean, "),
        (one("pooling: {b: sum}"), ":2:11: table 'a': pooling is given for ['b']"),
        (one("id_skew: 1, counts: x"), "tables.0: id_skew and counts both say how often ids repeat; give one"),
        (one("id_order: sorted, counts: x"), "leave out id_order"),
        (one("feature_names: [x, y]"), ":2:80: tables.0.feature_names: 2 feature(s) are named, but ids_per_sample has 1"),
        (one("reuse: {file: none.yaml, set: x}"), "model.yaml:2:80: "),
        (one("reuse: {file: none.yaml, set: x}"), "none.yaml: cannot read the configuration"),
        (one("counts: none.npy"), "model.yaml:2:80: "),
        (one("counts: none.npy"), "none.npy: cannot read counts"),
    ],
)
def test_mistakes_are_placed(tmp_path: Path, text: str, says: str) -> None:
    found = complaint(tmp_path, text)
    assert found.startswith(f"{tmp_path / 'model.yaml'}:")
    assert says in found


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"nite: {{{HISTOGRAM}, accesses: [0.3, 0.7]}}", "has no set 'night'; did you mean 'nite'? (sets here: nite)"),
        (f"night: {{{HISTOGRAM}, acesses: [0.3, 0.7]}}", "unknown key 'acesses' in night; did you mean 'accesses'?"),
        (
            f"night: {{{HISTOGRAM}, accesses: [1.0]}}",
            ":1:1: night: upper_bounds, touched_rows and accesses must be lists of the same",
        ),
        (f"night: {{{HISTOGRAM}, accesses: [0.3, 0.3]}}", "accesses are shares of one whole, but add up to 0.6"),
        (f"night: {{{HISTOGRAM.replace('inf', '2')}, accesses: [0.3, 0.7]}}", "upper_bounds must ascend and end with inf"),
        ("night: 3", "night must be a mapping with keys tables, batch_size"),
    ],
)
def test_mistakes_in_histograms_are_placed(tmp_path: Path, text: str, says: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        workload.load_reuse(path, "night")
    assert str(caught.value).startswith(str(path))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        (np.ones(5), "must be one whole number a row, [4] here, not float64 of shape (5,)"),
        (np.ones(5, np.int64), "not int64 of shape (5,)"),
        (np.array([1, 2, -1, 0]), "counts must not be negative"),
        (np.zeros(4, np.int64), "some row must have been asked for"),
        (np.array([{}] * 4), "cannot read counts: Array can't be memory-mapped: Python objects"),
    ],
)
def test_counts_that_are_none_are_refused(tmp_path: Path, counts: np.ndarray, says: str) -> None:
    np.save(tmp_path / "c.npy", counts)
    with pytest.raises(ConfigError) as caught:
        workload.load_counts(tmp_path / "c.npy", 4)
    assert says in str(caught.value)


def test_tables_in_code_become_a_workload() -> None:
    tables = [TableConfig("user", 100, 8), TableConfig("item", 50, 4, ["item", "history"], {"item": "sum", "history": None})]
    lengths = {"user": 1.0, "item": 1.0, "history": 20.0}
    found = workload_of(tables, lengths, 512, skew={"item": Zipf(1.2)}, optimizer={"user": Adam()})
    assert [load.ids_per_sample for load in found.tables] == [(1.0,), (1.0, 20.0)]
    assert [load.skew for load in found.tables] == [Uniform(), Zipf(1.2)]
    assert [load.optimizer for load in found.tables] == [Adam(), RowwiseAdagrad()]
    with pytest.raises(ConfigError, match="does not say how many ids a sample has for feature 'history'"):
        workload_of(tables, {"user": 1.0, "item": 1.0}, 512)
    with pytest.raises(ConfigError, match=r"names 'histroy', which is no feature; did you mean 'history'\?"):
        workload_of(tables, {**lengths, "histroy": 1.0}, 512)
    with pytest.raises(ConfigError, match=r"optimizer names 'users', which is no table; did you mean 'user'\?"):
        workload_of(tables, 1.0, 512, optimizer={"users": Adam()})
