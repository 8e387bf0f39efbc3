"""What a benchmark trains: workloads cut to size, and ids that repeat as the workload says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import tasks
from benchmarks.tasks import Flat
from shardembed.errors import ConfigError
from shardembed.optim import RowwiseAdagrad
from shardembed.planner import traffic
from shardembed.planner import workload as workloads
from shardembed.planner.calibrate import stages
from shardembed.planner.workload import Counts, TableLoad, Zipf
from shardembed.tables.table_config import TableConfig


def test_a_file_is_cut_to_size_and_keeps_its_shape() -> None:
    task = tasks.task_of("dlrm-dcnv2", 1000, 16)
    assert len(task.tables) == 26
    assert max(table.num_embeddings for table in task.tables) == 1000
    assert min(table.num_embeddings for table in task.tables) == 3
    assert task.samples == 16
    assert all(isinstance(load.optimizer, RowwiseAdagrad) for load in task.workload.tables)
    batch = task.batches(0, 1)[0]
    assert batch["cat_20"][1].tolist() == list(range(0, 1601, 100))
    assert all(int(batch[table.name][0].max()) < table.num_embeddings for table in task.tables)


def test_an_unknown_workload_is_an_error_that_names_what_there_is() -> None:
    with pytest.raises(ConfigError, match="dlrm-dcnv2"):
        tasks.task_of("dlrm", 1000, None)


def test_ranks_draw_different_batches_and_each_the_same_again() -> None:
    task = tasks.alike("small", 2, 100, 4, 8, 3)
    first, again, other = task.batches(0, 1)[0], task.batches(0, 1)[0], task.batches(1, 1)[0]
    assert torch.equal(first["t0"][0], again["t0"][0])
    assert not torch.equal(first["t0"][0], other["t0"][0])


def test_reuse_histograms_are_drawn_as_they_were_counted() -> None:
    reuse = workloads.load_reuse("configs/workloads/reuse-production.yaml", "meta-2021")
    load = TableLoad(TableConfig("t", 1_000_000, 4), (2.0,), reuse, "sorted")
    ids = stages.by_skew(load, 2 * reuse.batch_size, np.random.default_rng(0))
    _, counts = np.unique(ids, return_counts=True)
    expected = traffic.Traffic.of(load, reuse.batch_size, 1)
    # Ids drawn anew from the counts of a batch miss more of the rows that it had once.
    assert expected.distinct * 0.6 < len(counts) < expected.distinct
    # Rows that are asked for more than 64 times get 41 % of all ids in the histogram.
    hot = float(counts[counts > 64].sum() / counts.sum())
    assert hot == pytest.approx(sum(reuse.accesses[7:]), abs=0.03)


def test_hashed_ids_are_popular_where_the_planner_takes_them_to_be() -> None:
    numbers = np.random.default_rng(0)
    load = TableLoad(TableConfig("t", 5000, 4), (1.0,), Zipf(1.2), "hashed")
    counts = np.bincount(stages.by_skew(load, 20_000, numbers), minlength=5000)
    assert counts.argmax() == traffic.hashed_places(5000, traffic.HOT)[0]
    assert stages.by_skew(load, 20_000, numbers).max() < 5000


def test_counts_are_cut_with_their_table() -> None:
    load = TableLoad(TableConfig("t", 6, 4), (1.0,), Counts(np.array([1, 5, 0, 2, 9, 9])))
    small = tasks.cut(load, 4)
    assert isinstance(small.skew, Counts)
    assert small.skew.counts.tolist() == [1, 5, 0, 2]
    assert small.table.num_embeddings == 4


def test_a_flat_batch_has_bags_by_feature_and_sample() -> None:
    batch = {"a": (torch.tensor([1, 2, 3, 4]), torch.tensor([0, 2, 4])), "b": (torch.tensor([5, 6, 7]), torch.tensor([0, 1, 3]))}
    flat = Flat.of(batch, ["a", "b"])
    assert flat.ids.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert flat.lengths.tolist() == [2, 2, 1, 2]
    assert flat.offsets.tolist() == [0, 2, 4, 5, 7]
    assert Flat.of(batch, ["b"], one_an_id=True).offsets.tolist() == [0, 1, 2, 3]
