"""`save_checkpoint` and `async_save_checkpoint`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn

from shardembed.checkpoint import tracking
from shardembed.checkpoint.format.blocks import Base
from shardembed.checkpoint.inventory import Inventory, take
from shardembed.checkpoint.snapshot import Job, Snapshot, step_of
from shardembed.checkpoint.together import together
from shardembed.checkpoint.writing import Terms, write
from shardembed.comm.comm import Comm
from shardembed.comm.streams import handed_over
from shardembed.config.paths import local
from shardembed.config.scalars import integer
from shardembed.errors import CheckpointError, ShardEmbedError

OnNonFinite = Literal["keep", "raise"]


class PendingSave:
    """A checkpoint that a thread of this process is writing. The next save or load waits for it, and so does the end of the
    process.
    """

    def __init__(self, work: Callable[[], Path], undo: Callable[[], None]) -> None:
        self._result: Path | None = None
        self._error: Exception | None = None
        self._work, self._undo = work, undo
        # Not a daemon: the interpreter waits for it, before process groups are closed.
        self._thread = threading.Thread(target=self._run, args=(handed_over(),), name="shardembed-save")
        self._thread.start()

    def _run(self, begin: Callable[[], None]) -> None:
        try:
            begin()
            self._result = self._work()
        except Exception as error:  # whoever waits gets it
            self._error = error

    @property
    def done(self) -> bool:
        """The thread has ended, well or badly. Not collective."""
        return not self._thread.is_alive()

    def wait(self) -> Path:
        """Wait until the checkpoint is complete, and return its folder. Not collective.

        Raises:
            CheckpointError: it failed; nothing older has been touched.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def settle(self) -> None:
        """`wait`, and if it failed take back what it had promised. In the main thread, where rows are noted as changed."""
        self._thread.join()
        if self._error is not None:
            self._undo()
        self.wait()


_pending: list[PendingSave] = []


def finish_pending() -> None:
    """Wait for the background save of an earlier call; raises its error, also where this rank has seen it: others may not have."""
    while _pending:
        _pending.pop().settle()


def save_checkpoint(
    folder: str | Path,
    model: nn.Module,
    *,
    optimizer: Any = None,
    scheduler: Any = None,
    extra: Mapping[str, Any] | None = None,
    progress: Any = None,
    step: int | None = None,
    keep: int | None = None,
    incremental: bool = False,
    on_nonfinite: OnNonFinite = "keep",
) -> Path:
    """Save a checkpoint into `folder/step-NNNNNNNNNN`. It loads on any number of ranks, under any plan. Collective.

    The folder gets its name once everything in it has reached the disk; a crash at any moment leaves the newest complete
    checkpoint as it was. Saved: tables with their optimizer state, dense parameters and buffers, the dense optimizer, param group
    settings, step counters, random states of every rank, and what is passed here. Of dynamic tables: each id that has a row, with
    its count and last step, and the candidates; those that have died of age stay out. Nothing is pickled. Needs no memory beside
    buffers of 16 MiB a rank, and 24 bytes an id of a dynamic table.

    Args:
        folder: where checkpoints go, on a file system that all ranks see; for this job alone.
        model: may be wrapped in DistributedDataParallel; FSDP2's parameters are saved as they are cut.
        optimizer: an `se.Optimizer`, or the torch optimizer of tables made with `optimizer=None`.
        scheduler: a learning rate scheduler, or whatever has `state_dict` and `load_state_dict`.
        extra: by name, more of the kind: loaders, samplers, a GradScaler.
        progress: of the caller's own, made of numbers, strings, lists and dicts: the data position, say. Rank 0's is saved.
        step: names the checkpoint; by default the number of optimizer steps taken. A step saved again gets a folder of its own,
            and the older one is removed when the new one is complete.
        keep: keep the checkpoints of this many newest steps (and those that their increments stand on), and remove older ones
            when the new one is complete. None keeps all. After an older one has been loaded, what was saved beyond it counts as
            older than all that training came by. A checkpoint that holds inf or nan never takes the place of the newest finite
            one, which is kept beside them then.
        incremental: save only the rows of tables that changed since the last full checkpoint. The first such call in a process,
            and after a load, saves all rows. Rows changed through `local_shards()` count as a whole table. Costs a byte a row, and
            8 an id of a dynamic table, whose increments also say which ids are gone.
        on_nonfinite: where a table, a parameter or their optimizer state holds inf or nan: "keep" saves it all the same, says so
            (`NonFiniteWarning` on rank 0) and notes it in the checkpoint; "raise" saves nothing. Buffers may hold what they like.

    Returns:
        The checkpoint's folder.

    Raises:
        NonFiniteError: on every rank, with on_nonfinite="raise".
        CheckpointError: on every rank, where any failed (disk full, no permission, state that cannot be written as JSON, gradients
            that wait for a step). Training can go on. An earlier background save that failed is reported here, too.
    """
    job, held, comm = _begin(model, optimizer, scheduler, extra)
    work, undo = _work(Path(folder), job, held, comm, step, progress, keep, incremental, on_nonfinite, copied=False)
    try:
        return work()
    except ShardEmbedError:
        undo()
        raise


def async_save_checkpoint(
    folder: str | Path,
    model: nn.Module,
    *,
    optimizer: Any = None,
    scheduler: Any = None,
    extra: Mapping[str, Any] | None = None,
    progress: Any = None,
    step: int | None = None,
    keep: int | None = None,
    incremental: bool = False,
    on_nonfinite: OnNonFinite = "keep",
) -> PendingSave:
    """As `save_checkpoint`, but training stops only while this rank's share is copied to host memory (which needs as much again); a
    thread does the rest, and talks to the other ranks over a process group of its own. Collective.

    Returns:
        A `PendingSave`: `wait()` gives the folder, or raises what went wrong. Only one save runs at a time: the next call waits.

    Raises:
        CheckpointError: on every rank, where the state of any cannot be saved, or an earlier background save failed.
    """
    job, held, comm = _begin(model, optimizer, scheduler, extra)
    pending = PendingSave(*_work(Path(folder), job, held, comm, step, progress, keep, incremental, on_nonfinite, copied=True))
    _pending.append(pending)
    return pending


def _begin(model: nn.Module, optimizer: Any, scheduler: Any, extra: Any) -> tuple[Job, Inventory, Comm]:
    finish_pending()
    job = Job.of(model, optimizer, scheduler, extra)
    comm = job.comm()
    return job, take(job.model, comm.rank, comm.world_size), comm


def _work(
    root: Path,
    job: Job,
    held: Inventory,
    comm: Comm,
    step: int | None,
    progress: Any,
    keep: int | None,
    incremental: bool,
    on_nonfinite: OnNonFinite,
    copied: bool,
) -> tuple[Callable[[], Path], Callable[[], None]]:
    """Take the snapshot; returns what writes it, and what is to be done where that fails."""
    taken: list[Snapshot] = []
    bases: list[Base | None] = []

    def prepare() -> str:
        local(root, CheckpointError)
        if keep is not None and (integer(keep) or 0) < 1:
            raise CheckpointError(f"keep must be at least 1, not {keep!r}: the newest checkpoint is always kept")
        if on_nonfinite not in ("keep", "raise"):
            raise CheckpointError(f"on_nonfinite must be 'keep' or 'raise', not {on_nonfinite!r}")
        bases.append(tracking.base_of(held, root) if incremental else None)
        number = step_of(held, step)
        snapshot = job.snapshot(held, comm, number, progress, bases[0] is not None)
        taken.append(snapshot.copied() if copied else snapshot)
        return f"step {number}, {'increment of ' + bases[0].folder if bases[0] is not None else 'full'}"

    said = together(comm, "look at the model", prepare)
    if len(set(said)) > 1:
        raise CheckpointError(
            f"ranks want different checkpoints: {'; '.join(f'rank {rank}: {one}' for rank, one in enumerate(said))}"
        )
    snapshot, base = taken[0], bases[0]
    comm.history.stand_at(snapshot.step)
    full = base is None and (incremental or tracking.noting(held))
    # From this moment rows are noted anew: the snapshot is taken, and what changes from now on is not in it.
    before = tracking.start(held) if full else []
    terms = Terms(keep, base, tracking.previous_of(job.model, root), on_nonfinite == "raise")

    def work() -> Path:
        path, written = write(root, snapshot, comm, terms)
        tracking.came_from(job.model, path)
        if full:
            tracking.succeeded(held, root, written)
        return path

    return work, lambda: tracking.failed(before)
