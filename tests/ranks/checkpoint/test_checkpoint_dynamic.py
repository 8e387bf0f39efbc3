"""Checkpoints of dynamic tables: from any ranks and plan to any other, and on as if nobody had saved."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import shardembed as se
from shardembed.checkpoint.format.manifest import read_manifest
from shardembed.checkpoint.format.verify import verify
from shardembed.errors import NoRoomWarning
from tests.amount import exhaustive, sample_of
from tests.dynamic_oracle import bucket_of, buckets_of, mixed
from tests.harness import run_ranks
from tests.ranks.living import COLUMNS, Held, Trained, built, contents, equal, train, whole
from tests.ranks.saved import raised, small_files
from tests.unit.checkpoint.altered import signed_again


def save_and_go_on(rank: int, world_size: int, folder: str, optimizer: str, deterministic: bool) -> tuple[Held, Held]:
    job = built(world_size, 1, optimizer=optimizer, deterministic=deterministic)
    train(job, rank, world_size, range(5))
    job.save(folder)
    saved = contents(job)
    train(job, rank, world_size, range(5, 10))
    return saved, contents(job)


def load_and_go_on(rank: int, world_size: int, folder: str, turn: int, optimizer: str, deterministic: bool) -> tuple[Held, Held]:
    job = built(world_size, turn, optimizer=optimizer, deterministic=deterministic)
    job.load(folder)
    loaded = contents(job)
    train(job, rank, world_size, range(5, 10))
    return loaded, contents(job)


@pytest.mark.parametrize(
    ("savers", "loaders", "optimizer"),
    sample_of(
        [(*ranks, name) for ranks in ((3, 2), (1, 3), (2, 1)) for name in ("Adam", "RowwiseAdagrad")],
        (3, 2, "RowwiseAdagrad"),
        (1, 3, "Adam"),
    ),
)
def test_a_loaded_table_goes_on_as_one_never_saved(tmp_path: Path, savers: int, loaders: int, optimizer: str) -> None:
    one = run_ranks(savers, save_and_go_on, str(tmp_path), optimizer, True)
    other = run_ranks(loaders, load_and_go_on, str(tmp_path), 3, optimizer, True)
    equal([loaded for loaded, _ in other], [saved for saved, _ in one])
    equal([after for _, after in other], [after for _, after in one])


@pytest.mark.exhaustive
def test_without_the_deterministic_mode_the_same_plan_goes_on_alike(tmp_path: Path) -> None:
    one = run_ranks(2, save_and_go_on, str(tmp_path), "Adam", False)
    other = run_ranks(2, load_and_go_on, str(tmp_path), 1, "Adam", False)
    equal([after for _, after in other], [after for _, after in one])


def places(job: Trained, table: str) -> dict[int, int]:
    (slab, *_) = [slab for slab in job.model.tables.journey.slabs if slab.table_of(slab.spec.lanes[0]) == table]
    assert slab.dynamic is not None
    found = slab.dynamic.census.living(slab.dynamic.steps)
    return dict(zip(slab.dynamic.census.ids_S[found].tolist(), found.tolist(), strict=True))


def test_where_an_id_lies_decides_nothing(tmp_path: Path) -> None:
    job, other = built(1), built(1)
    train(job, 0, 1, range(6))
    job.save(tmp_path)
    other.load(tmp_path)
    for table in ("lru", "lfu", "counted", "grows"):
        before, after = places(job, table), places(other, table)
        assert before.keys() == after.keys()
        assert before != after, f"{table}: the same places would show nothing"
    for each in (job, other):
        train(each, 0, 1, range(6, 12))
    equal([contents(other)], [contents(job)])


def save_increments(rank: int, world_size: int, folder: str) -> Any:
    job = built(world_size, 2)
    found = []
    for step in range(5):
        train(job, rank, world_size, range(step, step + 1))
        save = se.async_save_checkpoint if step == 3 else se.save_checkpoint
        saved: Any = save(folder, job.model, optimizer=job.optimizer, incremental=True, keep=1 if step == 4 else None)
        path = saved.wait() if step == 3 else saved
        found.append((path.name, contents(job)))
    return found


def load_step(rank: int, world_size: int, folder: str, step: int | None) -> Held:
    job = built(world_size, 4)
    job.load(folder, step=step)
    return contents(job)


@pytest.mark.parametrize("ranks", [1, exhaustive(3)])
def test_increments_and_what_they_stand_on_are_the_full_table(tmp_path: Path, ranks: int) -> None:
    answers = run_ranks(ranks, save_increments, str(tmp_path))
    assert [path.name for _, path in se.checkpoints(tmp_path)] == ["step-0000000001", "step-0000000005"]
    manifest = read_manifest(tmp_path / "step-0000000005")
    assert manifest.base is not None
    assert sum(block.bytes for block in manifest.entries["tables.lru.weight"].dropped), "nobody has left: nothing was tried"
    entry = manifest.entries["tables.grows.weight"]
    assert 0 < sum(update.rows for update in entry.updates if not update.columns.start) < entry.rows
    assert not verify(tmp_path / "step-0000000005")
    equal(run_ranks(2, load_step, str(tmp_path), None), [answer[4][1] for answer in answers])
    equal(run_ranks(2, load_step, str(tmp_path), 1), [answer[0][1] for answer in answers])


def test_every_increment_is_the_table_of_its_moment(tmp_path: Path) -> None:
    job = built(1)
    for step in range(5):
        train(job, 0, 1, range(step, step + 1))
        se.async_save_checkpoint(tmp_path, job.model, optimizer=job.optimizer, incremental=True).wait()
        equal([load_step(0, 1, str(tmp_path), None)], [contents(job)])


def test_after_a_save_that_failed_increments_hold_what_changed_before_it(tmp_path: Path) -> None:
    job = built(1)
    train(job, 0, 1, range(2))
    job.save(tmp_path, incremental=True)
    train(job, 0, 1, range(2, 4))
    with small_files(True):
        assert "cannot be written" in raised(lambda: job.save(tmp_path))  # a full one, after which all is noted anew
    train(job, 0, 1, range(4, 5))
    assert read_manifest(job.save(tmp_path, incremental=True)).base is not None
    equal([load_step(0, 1, str(tmp_path), None)], [contents(job)])


def test_increments_hold_what_no_step_has_changed(tmp_path: Path) -> None:
    job = of_one(2000, se.Dynamic(se.LRU()), max_norm=0.5)
    train(job, 0, 1, range(2))
    job.save(tmp_path, incremental=True)
    ids = torch.tensor([*sorted(places(job, "item"))[:3], -77])  # three that have a row, and one that gets it

    def saved() -> int:
        manifest = read_manifest(job.save(tmp_path, incremental=True))
        assert manifest.base is not None
        equal([contents_of_loaded(tmp_path)], [contents(job)])
        return sum(update.rows for update in manifest.entries["tables.item.weight"].updates)

    assert saved() == 0
    job.model.tables.load_rows("item", ids, torch.full((4, COLUMNS), 9.0, dtype=torch.float64))
    assert saved() == 4
    with torch.no_grad():  # a lookup, which brings rows to their norm
        assert float(job.model.tables({"item": ids[3:].unsqueeze(1)})["item"].norm()) < 0.51
    assert saved() == 4
    job.model.tables.reset_parameters(seed=8)
    assert saved() == len(places(job, "item"))


def contents_of_loaded(folder: Path) -> Held:
    job = of_one(2000, se.Dynamic(se.LRU()), max_norm=0.5)
    job.load(folder)
    return contents(job)


def test_those_who_have_died_of_age_stay_out(tmp_path: Path) -> None:
    job = built(1, tables={"ttl": (300, se.Dynamic(se.TTL(2)))})
    train(job, 0, 1, range(2))
    first = read_manifest(job.save(tmp_path, incremental=True)).entries["tables.ttl.weight"].rows
    train(job, 0, 1, range(2, 6))
    entry = read_manifest(job.save(tmp_path, incremental=True)).entries["tables.ttl.weight"]
    (slab,) = job.model.tables.journey.slabs
    assert slab.dynamic is not None
    assert int((slab.dynamic.census.lasts_S >= 0).sum()) > entry.rows == len(places(job, "ttl"))  # the dead still have places
    with se.embeddings.stored.StoredTables(tmp_path) as stored:
        ids = stored.find("ttl").ids
    assert ids is not None
    assert ids.tolist() == sorted(places(job, "ttl"))
    assert first


# Tables that are not the same.


def of_one(rows: int | None, dynamic: se.Dynamic | None, **more: Any) -> Trained:
    return built(1, tables={"item": (rows, dynamic)}, **more)


def saved_as(folder: Path, rows: int | None, dynamic: se.Dynamic, steps: int = 6) -> Held:
    job = of_one(rows, dynamic)
    train(job, 0, 1, range(steps))
    job.save(folder)
    return contents(job)


@pytest.mark.parametrize("eviction", [se.LRU(), se.LFU(), se.LFU(halve_every=2)])
@pytest.mark.parametrize("rows", [260, 130, 50])
def test_a_smaller_table_takes_those_whom_its_rule_lets_leave_last(tmp_path: Path, rows: int, eviction: Any) -> None:
    saved = saved_as(tmp_path, 400, se.Dynamic(eviction))["item"]
    job = of_one(rows, se.Dynamic(eviction))
    with pytest.warns(NoRoomWarning, match=r"[0-9]+ ids of 'tables\.item\.weight' found their buckets full"):
        job.load(tmp_path)
    room, buckets, now = math.ceil(rows / buckets_of(rows)), buckets_of(rows), 6
    halves = getattr(eviction, "halve_every", None) or 1 << 40

    def rank(id_: int) -> tuple[int, int, int]:
        last = saved["row last"][id_]
        count = saved["row count"][id_] >> (now // halves - last // halves) if "row count" in saved else 0
        return count, last, mixed(id_)

    expected: set[int] = set()
    for bucket in range(buckets):
        ids = [id_ for id_ in saved["row last"] if bucket_of(id_, buckets) == bucket]
        expected.update(sorted(ids, key=rank, reverse=True)[:room])
    found = contents(job)["item"]
    assert found["row last"].keys() == expected
    for what in found:
        for id_, value in found[what].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(saved[what][id_])), (what, id_)
    train(job, 0, 1, range(6, 8))


def test_where_nobody_leaves_a_smaller_table_is_refused_and_stays_as_it_was(tmp_path: Path) -> None:
    saved_as(tmp_path, None, se.Dynamic())
    job = of_one(200, se.Dynamic())
    train(job, 0, 1, range(1))
    before = contents(job)
    text = raised(lambda: job.load(tmp_path))
    assert "'tables.item.weight': " in text
    assert "of its ids on this rank find no place in the 200 rows of the model, and nobody leaves (eviction=None)" in text
    equal([contents(job)], [before])


@pytest.mark.parametrize(("before", "after"), [(300, 4000), (300, None), (None, 4000)])
def test_a_larger_table_takes_all(tmp_path: Path, before: int | None, after: int | None) -> None:
    saved = saved_as(tmp_path, before, se.Dynamic())
    job = of_one(after, se.Dynamic())
    job.load(tmp_path)
    equal([contents(job)], [saved])


def test_another_rule_needs_what_the_checkpoint_does_not_have(tmp_path: Path) -> None:
    saved_as(tmp_path, 300, se.Dynamic(se.LRU()))
    job = of_one(300, se.Dynamic(se.LFU()))
    assert "'tables.item.weight.ids.count' [300] int32 is not in the checkpoint (new=[...]" in raised(lambda: job.load(tmp_path))
    job.load(tmp_path, new=["tables.item.weight.ids.count"])
    assert set(contents(job)["item"]["row count"].values()) == {0}
    job.save(tmp_path)
    other = of_one(300, se.Dynamic(se.TTL(9)))
    assert "'tables.item.weight.ids.count' [300] int32 is not in the model" in raised(lambda: other.load(tmp_path))
    other.load(tmp_path, dropped=["tables.item.weight.ids.count"])
    assert contents(other)["item"]["row last"] == contents(job)["item"]["row last"]


def test_candidates_of_rows_that_are_no_more_are_forgotten(tmp_path: Path) -> None:
    saved_as(tmp_path, 300, se.Dynamic(se.LFU()))
    job = of_one(300, se.Dynamic(se.LFU(), se.MinCount(3)))
    train(job, 0, 1, range(2))
    assert contents(job)["item"]["candidate last"]
    job.load(tmp_path, new=["tables.item.weight.candidates"])
    assert contents(job)["item"]["candidate last"] == {}


@pytest.mark.parametrize("dynamic_first", [True, False])
def test_a_dynamic_table_is_no_dense_one(tmp_path: Path, dynamic_first: bool) -> None:
    kinds = [se.Dynamic(se.LRU()), None]
    first, second = kinds if dynamic_first else kinds[::-1]
    of_one(300, first).save(tmp_path)
    here, there = ("has a row a number", "is dynamic") if dynamic_first else ("is dynamic", "has a row a number")
    text = raised(lambda: of_one(300, second).load(tmp_path))
    assert f"'tables.item.weight' {here} in the model, and {there} in the checkpoint" in text


def test_weights_alone_keep_their_ages_as_far_as_the_table_has_had_steps(tmp_path: Path) -> None:
    saved = saved_as(tmp_path, 300, se.Dynamic(se.LRU()))["item"]
    job = of_one(300, se.Dynamic(se.LRU()))
    train(job, 0, 1, range(10, 12))
    job.load(tmp_path, weights_only=True)
    assert job.model.tables.journey.steps == 2
    found = contents(job)["item"]
    assert found["row last"] == {id_: max(0, last - 4) for id_, last in saved["row last"].items()}
    assert all(torch.equal(row, saved["row@0"][id_]) for id_, row in found["row@0"].items())
    assert not any(row.any() for row in found["rowexp_avg@0"].values())


def test_strangers_begin_as_where_the_table_was_trained(tmp_path: Path) -> None:
    ids = {"item": torch.tensor([[5], [-7]])}
    job = of_one(300, se.Dynamic(se.LRU()))
    job.model.tables.reset_parameters(seed=11)
    job.save(tmp_path)
    other = of_one(300, se.Dynamic(se.LRU()))
    with torch.no_grad():
        expected = job.model.tables(ids)["item"]
        assert not torch.equal(other.model.tables(ids)["item"], expected)
        other.load(tmp_path)
        assert torch.equal(other.model.tables(ids)["item"], expected)


def test_an_empty_table_is_saved_and_loaded(tmp_path: Path) -> None:
    of_one(300, se.Dynamic(se.LRU(), se.MinCount(2))).save(tmp_path)
    job = of_one(300, se.Dynamic(se.LRU(), se.MinCount(2)))
    train(job, 0, 1, range(2))
    job.load(tmp_path)
    assert whole([contents(job)])["item"]["row last"] == {}
    assert read_manifest(tmp_path / "step-0000000000").entries["tables.item.weight"].shape == (0, COLUMNS)


def test_what_is_said_of_an_id_is_beside_it_and_the_id_is_written_once(tmp_path: Path) -> None:
    saved_as(tmp_path, 300, se.Dynamic(se.LFU(), se.MinCount(2)))
    path = tmp_path / "step-0000000006"
    manifest = read_manifest(path)
    names = {key: [update.shares for update in entry.updates] for key, entry in manifest.entries.items() if entry.by_id}
    weight = "tables.item.weight"
    assert names == {
        weight: [False],
        f"{weight}.exp_avg": [True],
        f"{weight}.exp_avg_sq": [True],
        f"{weight}.ids.last": [True],
        f"{weight}.ids.count": [True],
        f"{weight}.candidates.last": [False],
        f"{weight}.candidates.count": [True],
    }
    data = json.loads((path / "manifest.json").read_bytes())
    data["entries"][f"{weight}.candidates.last"]["updates"][0]["ids"] = None
    (path / "manifest.json").write_bytes(signed_again(data))
    assert "'tables.item.weight.candidates.last' does not have its ids" in raised(lambda: read_manifest(path))


def test_a_plain_model_answers_ids_as_the_sharded_one_does(tmp_path: Path) -> None:
    job = of_one(300, se.Dynamic(se.LRU()))
    job.model.tables.reset_parameters(seed=11)
    train(job, 0, 1, range(4))
    job.save(tmp_path)
    ids = torch.tensor([*sorted(places(job, "item"))[::7], 12345, -(2**60)])
    table = se.TableConfig("item", 300, COLUMNS, pooling=None, dtype=torch.float64, dynamic=se.Dynamic(se.LRU()))
    plain = torch.nn.ModuleDict({"tables": torch.nn.ModuleDict({"item": se.IdEmbedding(table)})})
    assert se.load_plain(tmp_path, plain) == {}
    with torch.no_grad():
        expected = job.model.tables({"item": ids.unsqueeze(1)})["item"]
        assert torch.equal(plain["tables"]["item"](ids), expected)  # type: ignore[index]
        se.load_plain(tmp_path, plain, rows={"tables.item": ids[:3].flip(0)})
        assert plain["tables"]["item"].ids.tolist() == ids[:3].tolist()  # type: ignore[index]
    other = se.IdEmbedding(se.TableConfig("item", 300, 2, pooling=None, dynamic=se.Dynamic(se.LRU())))
    wrong = torch.nn.ModuleDict({"tables": torch.nn.ModuleDict({"item": other, "more": se.IdEmbedding(table)})})
    text = raised(lambda: se.load_plain(tmp_path, wrong))
    assert "'tables.item.weight' has 2 columns in the model and 6 in the checkpoint" in text
    assert "'tables.more.weight' is in the model only" in text
