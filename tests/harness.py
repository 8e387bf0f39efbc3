"""Rank processes for tests: `run_ranks(2, function, ...)` returns what the function answered on each rank.

Starting two Gloo ranks takes longer than a call, so the processes of a world size are started once and serve
the whole session. They keep state between calls, as the ranks of a long job do; a test that leaves a process
group broken, or that ends a process, asks for `fresh_ranks=True`.

On Linux ranks are forks of one process that has imported `tests.warm`, which saves each of them seconds. Forks
hash strings alike, so an order of sets would be the same on all ranks, as it is not in a job: in the pool of two
ranks, which most tests use, one is therefore a fork of another such process.

The function must be at the top of a module (processes find it by name), and its arguments and results must
pickle. Every call starts from seed 0. pytest does not rewrite assertions in a rank: give them a message, or
compare with torch.testing.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# One thread a process, here and (by inheritance) in the ranks: more would only fight over the cores.
os.environ["OMP_NUM_THREADS"] = "1"

from tests import where  # before torch, which looks for GPUs once

# isort: split
import numpy as np
import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
SECONDS = 300.0  # ranks that have not started or answered by then hang, however loaded the machine is
GRACE = 2.0  # after a rank has failed, how long its peers may still answer: they are probably waiting for it
WARM = "tests.warm"  # what ranks are forks of
COLD = f"something else started the process that ranks are forks of, without {WARM}: call `harness.forks` before it"
GROUP_TIMEOUT = timedelta(minutes=10)  # the pool's own time limits are shorter, and tell more


@dataclass(frozen=True)
class Outcome:
    """What became of one rank's call: a value, or an error and its traceback as text."""

    value: Any = None
    error: BaseException | None = None
    traceback: str = ""


class RankError(RuntimeError):
    """A rank raised. The original error is `error`, and the cause of this one."""

    def __init__(self, rank: int, world_size: int, error: BaseException, remote: str, peers: str = "") -> None:
        super().__init__(f"rank {rank} of {world_size}: {type(error).__name__}: {error}{peers}\n{remote}")
        self.rank, self.error, self.traceback = rank, error, remote


class RankDiedError(RuntimeError):
    """A rank's process ended before it answered."""


class RankTimeoutError(RuntimeError):
    """Some ranks did not answer in time; the message shows where each of them stood."""


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = SECONDS,
    expect_errors: bool = False,
    fresh_ranks: bool = False,
) -> list[Any]:
    """Call `function(rank, world_size, *args)` on every rank at once; returns each rank's result, by rank.

    A rank's exception is raised here as `RankError`. With `expect_errors` the list holds an `Outcome` a rank
    instead, and that of a rank that died has a `RankDiedError`. If some rank does not answer within `timeout`
    seconds, all are ended and `RankTimeoutError` is raised, in either case. One rank alone runs in this
    process, without a process group and without a time limit, unless `fresh_ranks` are asked for.
    """
    request = _pack(function, args)
    if world_size == 1 and not fresh_ranks:
        outcomes = [_call(function, args, 0, 1)]
    elif fresh_ranks:
        pool = _Pool(world_size, fresh=True)
        try:
            outcomes = pool.run(request, timeout, wait_for_all=expect_errors)
        finally:
            pool.kill()
    else:
        outcomes = _run_in_pool(world_size, request, timeout, wait_for_all=expect_errors)
    return outcomes if expect_errors else _values(outcomes)


def close_pools() -> None:
    """End every pool; the next call starts a new one."""
    while _pools:
        _pools.popitem()[1].kill()


_pools: dict[int, _Pool] = {}
atexit.register(close_pools)


def _run_in_pool(world_size: int, request: bytes, timeout: float, wait_for_all: bool) -> list[Outcome]:
    pool = _pools.pop(world_size, None) or _Pool(world_size)
    keep = False  # until proved otherwise, also when this process is interrupted
    try:
        outcomes = pool.run(request, timeout, wait_for_all)
        keep = _still_in_step(pool, outcomes)
    finally:
        if keep:
            _pools[world_size] = pool
        else:
            pool.kill()
    return outcomes


def _still_in_step(pool: _Pool, outcomes: list[Outcome]) -> bool:
    """Whether the ranks can serve another call: none failed, or all raised alike and can still reduce."""
    errors = {type(outcome.error) for outcome in outcomes}
    if errors == {type(None)}:
        return True
    if len(errors) > 1 or RankDiedError in errors:
        return False
    try:
        answers = pool.run(_pack(_sum_of_ranks, ()), timeout=20.0, wait_for_all=True)
    except RankTimeoutError:
        return False
    return all(answer.value == sum(range(pool.world_size)) for answer in answers)


def _sum_of_ranks(rank: int, world_size: int) -> float:
    total = torch.tensor(float(rank))
    dist.all_reduce(total)
    return total.item()


def _values(outcomes: list[Outcome]) -> list[Any]:
    failed = {rank: outcome for rank, outcome in enumerate(outcomes) if outcome.error is not None}
    if not failed:
        return [outcome.value for outcome in outcomes]
    # A rank that was ended because it waited for the one that failed is not the cause.
    first = min(failed, key=lambda rank: (isinstance(failed[rank].error, RankTimeoutError), rank))
    peers = "".join(f"\n  (rank {r}: {type(o.error).__name__})" for r, o in failed.items() if r != first)
    error = failed[first].error
    assert error is not None
    raise RankError(first, len(outcomes), error, failed[first].traceback, peers) from error


class _Pool:
    """The processes of one world size, a pipe to each, and the store at which they meet.

    The store lives in this process: its port is never chosen before it is bound, and it outlives rank 0.
    """

    def __init__(self, world_size: int, fresh: bool = False) -> None:
        self.world_size = world_size
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._pipes: list[Any] = []  # of Connection; on Windows the class has another name
        self._processes: list[Any] = []
        for rank in range(world_size):
            apart = world_size == 2 and rank == 1 and not fresh
            context = forks()
            ours, theirs = context.Pipe()
            forked = context.get_start_method() == "forkserver"
            arguments = (rank, world_size, self._store.port, theirs, str(self._stack_file(rank)), forked)
            process = context.Process(target=_serve, args=arguments, daemon=True, name=f"rank-{rank}")
            with _hashing_otherwise() if apart and forked else contextlib.nullcontext():
                process.start()
            theirs.close()  # so that the end of the process is the end of the pipe
            self._pipes.append(ours)
            self._processes.append(process)
        try:
            _values(self._collect(SECONDS, wait_for_all=False))
        except BaseException:
            self.kill()
            raise

    def run(self, request: bytes, timeout: float, wait_for_all: bool) -> list[Outcome]:
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):  # died since the last call: collecting its answer says so
                pipe.send_bytes(request)
        return self._collect(timeout, wait_for_all)

    def _collect(self, timeout: float, wait_for_all: bool) -> list[Outcome]:
        outcomes: dict[int, Outcome] = {}
        deadline = time.monotonic() + timeout
        failed = False
        while len(outcomes) < self.world_size:
            pending = {self._pipes[r]: r for r in range(self.world_size) if r not in outcomes}
            ready = wait(list(pending), max(0.0, deadline - time.monotonic()))
            if not ready:
                stuck = RankTimeoutError(self._describe_stuck(sorted(pending.values()), timeout))
                self.kill()
                if not failed or wait_for_all:
                    raise stuck
                outcomes.update({rank: Outcome(error=stuck) for rank in pending.values()})
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                outcome = self._receive(pipe, pending[pipe])
                outcomes[pending[pipe]] = outcome
                if outcome.error is not None and not failed:
                    failed = True
                    if not wait_for_all:
                        deadline = min(deadline, time.monotonic() + GRACE)
        return [outcomes[rank] for rank in range(self.world_size)]

    def _receive(self, pipe: Connection, rank: int) -> Outcome:
        try:
            return pickle.loads(pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            self._processes[rank].join(GRACE)
            code = self._processes[rank].exitcode
            return Outcome(error=RankDiedError(f"the process of rank {rank} ended with exit code {code}"))

    def _describe_stuck(self, ranks: list[int], timeout: float) -> str:
        for rank in ranks:
            os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.3)  # the handlers write the stacks
        lines = [f"no answer from rank(s) {ranks} of {self.world_size} within {timeout:g} s; all were ended"]
        for rank in ranks:
            lines += [f"--- rank {rank} stood at:", self._stack_file(rank).read_text()]
        return "\n".join(lines)

    def _stack_file(self, rank: int) -> Path:
        return Path(self._folder.name) / f"rank-{rank}.txt"

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.join()
            pipe.close()
        self._processes, self._pipes = [], []
        self._folder.cleanup()


def forks() -> Any:
    """The way to start a process as a fork of a warm one. On other systems than Linux a fork may crash, and none can use a GPU that
    the warm one has looked at: each starts anew there.

    Python has one such server for a process: a test of code that has forks of its own calls this before, or ranks would be those.
    """
    if sys.platform != "linux" or where.ON_GPU:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([WARM])
    with _folder(ROOT):  # where the server finds it
        forkserver.ensure_running()
    return context


_other = forkserver.ForkServer()


@contextlib.contextmanager
def _hashing_otherwise() -> Iterator[None]:
    """Processes that start meanwhile are forks of a second warm process, whose hashes of strings are its own."""
    _other.set_forkserver_preload([WARM])
    with _folder(ROOT):
        _other.ensure_running()
    first = forkserver.connect_to_new_process
    forkserver.connect_to_new_process = _other.connect_to_new_process
    try:
        yield
    finally:
        forkserver.connect_to_new_process = first


@contextlib.contextmanager
def _folder(path: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


def _serve(rank: int, world_size: int, port: int, pipe: Connection, stack_file: str, forked: bool) -> None:
    """A rank's life: join the group, then answer calls until the pipe ends."""
    if forked and WARM not in sys.modules:
        pipe.send_bytes(pickle.dumps(Outcome(error=RuntimeError(COLD))))
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its ranks
    threading.Thread(target=_end_with_parent, daemon=True).start()
    stacks = open(stack_file, "w")  # noqa: SIM115 (stays open for the signal handler)
    faulthandler.register(signal.SIGUSR1, stacks, all_threads=False)
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host name that does not resolve is no reason to fail
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in ranks.items()})  # as torchrun does
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=GROUP_TIMEOUT)
    pipe.send_bytes(pickle.dumps(Outcome()))
    while True:
        try:
            request = pipe.recv_bytes()
        except EOFError:
            os._exit(0)
        pipe.send_bytes(_answer(request, rank, world_size))


def _end_with_parent() -> None:
    """A killed parent cannot end its ranks, and a rank inside a collective does not see its pipe end."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _answer(request: bytes, rank: int, world_size: int) -> bytes:
    try:
        function, args = pickle.loads(request)  # imports the test module
        outcome = _call(function, args, rank, world_size)
        return pickle.dumps(outcome if outcome.error is None else _portable(outcome))
    except Exception as error:
        return pickle.dumps(_portable(Outcome(error=error, traceback=traceback.format_exc())))


def _call(function: Callable[..., Any], args: tuple[Any, ...], rank: int, world_size: int) -> Outcome:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    try:
        return Outcome(value=function(rank, world_size, *args))
    except Exception as error:
        return Outcome(error=error, traceback=traceback.format_exc())


def _portable(outcome: Outcome) -> Outcome:
    """The outcome with an error that pickles: some exceptions cannot be made again from their `args`."""
    try:
        pickle.loads(pickle.dumps(outcome.error))
        return outcome
    except Exception:
        error = RuntimeError(f"{type(outcome.error).__name__}: {outcome.error}")
        return Outcome(error=error, traceback=outcome.traceback)


def _pack(function: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    # Plain pickle, not torch.multiprocessing's: that one shares memory, and both sides would write to it.
    try:
        return pickle.dumps((function, args))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        name = getattr(function, "__qualname__", repr(function))
        raise TypeError(
            f"cannot send {name} to a rank ({error}): the function must stand at the top of a module, and its arguments must pickle"
        ) from error
