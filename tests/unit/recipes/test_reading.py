"""Parts of batches made in worker processes: the same, in the same order, with the same errors, and no worker is left."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

from shardembed.cli import failures, main
from shardembed.comm.comm import Comm
from shardembed.errors import DataError, WorkerError
from shardembed.recipes import config
from shardembed.recipes.build import CtrJob
from shardembed.recipes.ctr_config import CtrConfig
from shardembed.recipes.data import reading
from shardembed.recipes.data.clicks.encode import ClickBatch
from shardembed.recipes.data.clicks.rows import Clicks
from shardembed.recipes.data.clicks.sources import open_files
from shardembed.recipes.data.criteo.planted import PlantedClicks, write
from shardembed.recipes.data.criteo.schema import Schema
from shardembed.recipes.data.part import Part
from shardembed.recipes.data.reading import Stream
from shardembed.recipes.tasks import prepare
from tests.amount import exhaustive

CPU = torch.device("cpu")
JOB = """
data:
  path: PATH
  integers: [I1]
  categories: [C1, C2, C3]
  ids: {kind: vocabulary}
  split: {fraction: 0.2, validation: true}
  generator: {rows: 700, max_cardinality: 20}
  shuffle_buffer: 90
model: {kind: dlrm, embedding_dim: 4, bottom: [4], top: [4]}
train: {global_batch_size: 32, epochs: 3}
checkpoint: {every_steps: 5}
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job on a text file, a compressed one and a Parquet file."""
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", failures.ERROR_FILE, failures.QUIET):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "job.yaml"
    path.write_text(JOB.replace("PATH", str(tmp_path / "day_*")) + f"run_dir: {tmp_path / 'runs'}\n")
    made, schema = clicks_of(path)
    for day, name in enumerate(("day_0", "day_1.gz", "day_2.parquet")):
        write(tmp_path / name, [made[day * 250 : day * 250 + 250]], schema)
    return path


def clicks_of(job: Path) -> tuple[Clicks, Schema]:
    settings = config.load(job)
    assert isinstance(settings, CtrConfig)
    schema = Schema.of(settings.data)
    return next(PlantedClicks(settings.data.generator, schema).chunks(0)), schema


def contents(part: Part) -> list[Any]:
    found = [getattr(part, field.name) for field in fields(part)]
    return [one.tolist() if isinstance(one, torch.Tensor | np.ndarray) else one for one in found]


def taken(stream: Stream, steps: range, workers: int) -> tuple[list[Any], str]:
    """What is in each part, and the error at the end."""
    found, told = [], ""
    with closing(reading.read(stream, steps, workers, CPU)) as parts:
        try:
            for part in parts:
                found.append(contents(part))  # one by one: what came before an error counts
        except DataError as error:
            told = str(error)
    return found, told


def two_epochs(first: Callable[[int], Iterator[Any]], second: Callable[[int], Iterator[Any]], epoch: int) -> Iterator[Any]:
    return (first, second)[epoch](epoch)


def test_workers_make_the_same_parts_and_raise_the_same_error(job: Path) -> None:
    """Two of them, from the middle of an epoch on, until a bad row in the next one."""
    settings = config.load(job)
    assert isinstance(settings, CtrConfig)
    task = prepare(settings, Comm.of())
    stream = replace(task.stream(), rank=1, world_size=3)
    made, schema = clicks_of(job)
    bad = job.parent / "bad.tsv"
    write(bad, [made[:400]], schema)
    lines = bad.read_text().splitlines()
    bad.write_text("\n".join([*lines[:333], "1\t2", *lines[333:]]))
    spoiled = replace(task.data, source=open_files(settings.data, (str(bad),)))
    stream = replace(stream, epoch=partial(two_epochs, stream.epoch, partial(spoiled.batches, 32, 90, 0)))
    alone, told = taken(stream, range(40), 0)
    before, random = multiprocessing.active_children(), torch.get_rng_state()
    found, said = taken(stream, range(7, 40), 2)
    assert len(alone) == stream.steps_per_epoch
    assert found == alone[7:]
    assert said == told
    assert said.startswith(f"{bad}:334: 2 field(s), but a row has 5")
    assert set(multiprocessing.active_children()) <= set(before)
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("workers", [0, exhaustive(1)])
def test_a_file_that_has_changed_since_the_scan_is_told(job: Path, workers: int) -> None:
    task = prepare(config.load(job), Comm.of())
    day = job.parent / "day_0"
    day.write_bytes(day.read_bytes()[:-1000])
    found, said = taken(task.stream(), range(40), workers)
    assert not found
    assert said.startswith(f"{day}:")
    assert "the data have changed under the run. Bring them back" in said


class Watched:
    """Stands in for the step of a job: keeps the last job, and calls `at` before one step."""

    def __init__(self, step: int, at: Callable[[], None]) -> None:
        self._step, self._at, self._made = step, at, CtrJob._batch
        self.job: CtrJob | None = None

    def batch(self) -> Callable[[CtrJob, ClickBatch, int], ClickBatch]:
        def batch(job: CtrJob, part: ClickBatch, step: int) -> ClickBatch:
            self.job = job
            if step == self._step:
                self._at()
            return self._made(job, part, step)

        return batch

    def tables(self) -> list[list[float]]:
        assert self.job is not None
        tables = self.job.model.tables
        return [tables.rows(name, torch.arange(3)).tolist() for name in ("C1", "C2", "C3")]


def printed(job: Path, watched: Watched, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    with mock.patch.object(CtrJob, "_batch", watched.batch()):
        code = main(["train", str(job), "--json", *words])
    return code, *capsys.readouterr()


@pytest.mark.exhaustive
def test_a_run_whose_worker_was_killed_says_so_and_goes_on_where_it_was_saved(
    job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, handler = multiprocessing.active_children(), signal.getsignal(signal.SIGCHLD)
    workers: list[int | None] = []

    def kill() -> None:
        workers.extend(one.pid for one in multiprocessing.active_children() if one not in before)
        os.kill(workers[0] or 0, signal.SIGKILL)

    code, _, said = printed(job, Watched(7, kill), capsys, "--set", "data.workers=1")
    told = said[said.index("shardembed: error") :]
    assert (code, len(workers), len(told.splitlines())) == (1, 1, 1)
    assert told.startswith(
        "shardembed: error: rank 0: a worker that reads data was killed by SIGKILL; if memory ran out, use fewer"
    )
    assert "read by 1 worker process of each rank" in said
    assert set(multiprocessing.active_children()) <= set(before)
    assert signal.getsignal(signal.SIGCHLD) == handler

    resumed, whole = Watched(0, list), Watched(0, list)
    code, out, said = printed(job, resumed, capsys)  # the number of workers may change
    assert code == 0
    assert " at step 5 of 42 " in said  # and not where the worker was
    found, wanted = json.loads(out), json.loads(printed(job, whole, capsys)[1])
    assert found["run_dir"] != wanted["run_dir"]
    for name in ("losses", "auc", "log_loss"):
        assert found[name] == wanted[name], name
    assert resumed.tables() == whole.tables()


@dataclass(frozen=True)
class Sent(Part):
    values: torch.Tensor
    more: Any


def unlimited(epoch: int) -> Iterator[Any]:
    yield from range(6)


def no_room_left(epoch: int) -> Iterator[Any]:
    """As on a full /dev/shm: no file may grow beyond a page, from the fourth batch on."""
    for number in range(6):
        if number == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        yield number


def sent(number: int, rank: int, world_size: int, spoiled: int) -> Part:
    return Sent(torch.full((5000,), number), (lambda: number) if number == spoiled else None, global_size=1)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory is shared in other ways")
@pytest.mark.parametrize(
    ("epoch", "spoiled", "expected"),
    [
        exhaustive(
            no_room_left, -1, r"rank 2: a worker that reads data cannot hand over a batch of 40,000 bytes: .*Give shared memory"
        ),
        (unlimited, 3, r"rank 2: a worker that reads data ended with exit code 1; look above"),
    ],
    ids=["no shared memory left", "what cannot be sent"],
)
def test_a_part_that_a_worker_cannot_hand_over_ends_the_job_and_not_in_silence(
    epoch: Callable[[int], Iterator[Any]], spoiled: int, expected: str
) -> None:
    stream = Stream(epoch, partial(sent, spoiled=spoiled), 6, 2, 3)
    came = []
    with closing(reading.read(stream, range(6), 1, CPU)) as parts, pytest.raises(WorkerError, match=expected):
        came.extend(contents(part)[1][0] for part in parts)
    assert came == [0, 1, 2][: len(came)]  # a worker that dies may take with it what was on its way
    assert epoch is unlimited or len(came) == 3


def test_a_worker_that_is_still_dying_when_its_connection_breaks_is_waited_for() -> None:
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    process.start()
    killer = threading.Timer(0.2, process.kill)
    killer.start()
    with pytest.raises(WorkerError, match="rank 3: a worker that reads data was killed by SIGKILL"):
        reading._explain(3, [process], ConnectionResetError())


@pytest.mark.parametrize("suffix", ["csv", "tsv.gz", "parquet", None])
def test_streams_of_interactions_go_to_workers_whole(tmp_path: Path, suffix: str | None) -> None:
    from pyarrow import Table, csv, output_stream, parquet

    words = ["data.generator={users: 30, items: 20, interactions: 300, tastes: 3}", "train.global_batch_size=50"]
    if suffix is not None:
        path = tmp_path / f"taken.{suffix}"
        table = Table.from_pydict({"user_id": [row % 30 for row in range(300)], "item_id": [row % 7 for row in range(300)]})
        if suffix == "parquet":
            parquet.write_table(table, path)
        else:
            options = csv.WriteOptions(delimiter="," if suffix == "csv" else "\t")
            with output_stream(str(path), compression="gzip" if suffix.endswith("gz") else None) as file:
                csv.write_csv(table, file, options)
        words.append(f"data.path={path}")
    stream = prepare(config.load(Path("configs/train/quickstart.yaml"), words), Comm.of()).stream()
    sent = pickle.loads(pickle.dumps(stream))
    parts, expected = ([contents(part) for part in one.parts(range(9))] for one in (sent, stream))
    assert len(expected) == 9
    assert parts == expected


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model: {kind: dlrm}\ndata: {workers: -1}\n", ":2:8: data.workers should be greater than or equal to 0, not -1"),
        ("model: {kind: dlrm}\ndata: {workers: 65}\n", ":2:8: data.workers should be less than or equal to 64, not 65"),
        ("data: {wrokers: 1}\n", ":1:8: unknown key 'wrokers' in data; did you mean 'workers'?"),
        ("model: {kind: sasrec}\ndata:\n  workers: 1\n", ":3:3: unknown key 'workers' in data"),
    ],
)
def test_a_wrong_number_of_workers_is_told_with_its_place(
    job: Path, text: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    job.write_text(text)
    assert main(["train", str(job)]) == 2
    assert f"{job}{told}" in capsys.readouterr().err


def test_a_dry_run_and_the_settings_say_how_many_workers_read(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(job), "--print-config", "--set", "data.workers=2"]) == 0
    assert "  workers: 2\n" in capsys.readouterr().out
    assert main(["train", str(job), "--dry-run", "--json", "--set", "data.workers=2"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["workers"] == 2
    assert "read by 2 worker processes of each rank" in printed.err


def test_parts_are_pinned_and_moved_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []
    moved: list[bool] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    def to(tensor: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        moved.append(non_blocking)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", to)
    lists = torch.ones(3, dtype=torch.int64), torch.tensor([[0, 1, 3]])
    part = ClickBatch(torch.ones(2), torch.ones(2, 3), torch.ones(4, 2), *lists, ("a", "b", "c", "d"), ("e",), (3,), global_size=5)
    held = pin_memory(part)  # as a loader does
    assert isinstance(held, ClickBatch)
    made = [held.labels, held.dense, held.rows, held.values, held.offsets]
    assert all(one is other for one, other in zip(made, pinned, strict=True))
    assert held.to(CPU).global_size == 5
    assert moved == [True] * 5


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")  # where there is no GPU, torch does not pin
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_loader_is_asked_to_pin_where_a_gpu_trains(job: Path, device: str) -> None:
    stream = prepare(config.load(job), Comm.of()).stream()
    with mock.patch.object(reading, "DataLoader", wraps=reading.DataLoader) as loader:
        parts = reading.read(stream, range(1), 0, torch.device(device))
        assert contents(next(parts)) == contents(next(stream.parts(range(1))))
    assert loader.call_args.kwargs["pin_memory"] == (device == "cuda")
