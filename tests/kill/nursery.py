"""Rank processes that may be killed, at a few hundredths of a second each.

One process imports torch and trains once, so that everything is loaded; ranks are forks of it. That is sound because it has no
threads: none were started before the fork, and each rank makes its own groups. Rank 0 hosts the store, as it does in a job without
a launcher, so killing or stopping it takes the store away too.
"""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from tests import harness

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Ended:
    """What became of a rank: how its process ended (minus the signal, as Popen says it), its answer or its error, and when, in
    seconds from the start of all. `by_test` where it was ended because it no longer mattered.
    """

    code: int
    seconds: float
    value: Any = None
    error: BaseException | None = None
    traceback: str = ""
    stderr: str = ""
    by_test: bool = False

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL and not self.by_test


@dataclass(frozen=True)
class Request:
    """A call of `function(rank, world_size, *args)` on forked ranks. grace: how long the others may still run once one has ended
    without an answer. stopped: ranks that will be stopped, and are not waited for.
    """

    world_size: int
    function: Callable[..., Any]
    args: tuple[Any, ...]
    timeout: float
    grace: float
    stopped: tuple[int, ...]
    group_timeout: float


def run_forked(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = harness.SECONDS,
    grace: float = 10.0,
    stopped: Sequence[int] = (),
    group_timeout: float = 30.0,
) -> list[Ended]:
    """Call `function` on that many forked ranks, joined in a Gloo group whose time limit is `group_timeout`."""
    nursery = _nursery()
    nursery.send_bytes(pickle.dumps(Request(world_size, function, args, timeout, grace, tuple(stopped), group_timeout)))
    answer = pickle.loads(nursery.recv_bytes())
    if isinstance(answer, BaseException):
        raise answer
    return answer


def values(ended: Sequence[Ended]) -> list[Any]:
    """The answers, where every rank gave one."""
    for rank, end in enumerate(ended):
        assert end.code == 0, f"rank {rank} of {len(ended)}: exit code {end.code}\n{end.traceback}{end.stderr}"
    return [end.value for end in ended]


_started: list[Any] = []  # of Connection


def _nursery() -> Any:
    if not _started:
        context = harness.forks()
        ours, theirs = context.Pipe()
        context.Process(target=_serve, args=(theirs,), daemon=True, name="nursery").start()
        theirs.close()
        assert ours.poll(harness.SECONDS), "the process that forks ranks did not start"
        assert ours.recv_bytes() == b"ready"
        _started.append(ours)
        atexit.register(ours.close)
    return _started[0]


def _serve(pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    from tests.kill.trainer import warm_up

    warm_up()
    threads = os.listdir("/proc/self/task") if sys.platform == "linux" else [""]
    assert len(threads) == 1, f"forking a process of {len(threads)} threads is not sound"
    pipe.send_bytes(b"ready")
    while True:
        try:
            request = pickle.loads(pipe.recv_bytes())
        except EOFError:
            os._exit(0)
        try:
            answer: Any = _run(request, pipe)
        except Exception as error:
            answer = error
        pipe.send_bytes(pickle.dumps(answer))


def _run(request: Request, pipe: Connection) -> list[Ended]:
    began = time.monotonic()
    port = os.pipe()  # rank 0 chooses one that is free, and tells the others
    pipes: list[Connection] = []
    pids: list[int] = []
    logs = [os.memfd_create(f"stderr of rank {rank}") for rank in range(request.world_size)]
    for rank in range(request.world_size):
        ours, theirs = multiprocessing.Pipe(duplex=False)
        pid = os.fork()
        if pid == 0:
            _be_rank(request, rank, pids[0] if pids else 0, port, theirs, logs[rank], [pipe, ours, *pipes])
        theirs.close()
        os.setpgid(pid, pids[0] if pids else pid)  # so that one of them can kill all
        pipes.append(ours)
        pids.append(pid)
    os.close(port[0])
    os.close(port[1])
    outcomes, seconds = _collect(request, pipes, began)
    by_test = [rank for rank in range(request.world_size) if rank not in outcomes]
    for rank in by_test:
        os.kill(pids[rank], signal.SIGKILL)
    ended = []
    for rank, pid in enumerate(pids):
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        found = outcomes.get(rank) or harness.Outcome()
        text = os.pread(logs[rank], 1 << 20, 0).decode(errors="replace")
        os.close(logs[rank])
        pipes[rank].close()
        end = seconds.get(rank, time.monotonic() - began)
        ended.append(Ended(code, end, found.value, found.error, found.traceback, text, rank in by_test))
    return ended


def _collect(
    request: Request, pipes: Sequence[Connection], began: float
) -> tuple[dict[int, harness.Outcome | None], dict[int, float]]:
    """The answers of those ranks whose process has ended, None where it ended without one."""
    outcomes: dict[int, harness.Outcome | None] = {}
    seconds: dict[int, float] = {}
    heard: dict[int, harness.Outcome] = {}
    until = began + request.timeout
    awaited = {pipes[rank]: rank for rank in range(request.world_size) if rank not in request.stopped}
    while awaited:
        ready = wait(list(awaited), max(0.0, until - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = awaited[pipe]
            try:
                heard[rank] = pickle.loads(pipe.recv_bytes())
            except (EOFError, ConnectionResetError):  # the end of the pipe is the end of the process
                outcomes[rank], seconds[rank] = heard.get(rank), time.monotonic() - began
                del awaited[pipe]
                if rank not in heard:
                    until = min(until, time.monotonic() + request.grace)
    return outcomes, seconds


def _be_rank(
    request: Request, rank: int, leader: int, port: tuple[int, int], pipe: Connection, log: int, others: Sequence[Connection]
) -> None:
    """A forked rank's life; it never returns."""
    code = 1
    try:
        os.setpgid(0, leader)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.dup2(log, 2)
        for other in others:
            other.close()
        if request.world_size > 1:
            _join(request, rank, port)
        outcome = harness._call(request.function, request.args, rank, request.world_size)
        pipe.send_bytes(pickle.dumps(outcome if outcome.error is None else harness._portable(outcome)))
        code = 0 if outcome.error is None else 1
    finally:
        # Not sys.exit: this is a fork in the middle of its parent's stack. What an ordinary process does at its end is done by
        # the tests that are about it.
        os._exit(code)


def _join(request: Request, rank: int, port: tuple[int, int]) -> None:
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": request.world_size, "LOCAL_WORLD_SIZE": request.world_size}
    os.environ.update({name: str(value) for name, value in environment.items()})
    limit = timedelta(seconds=request.group_timeout)
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(port[1], store.port.to_bytes(4, "big") * (request.world_size - 1))
    else:
        store = dist.TCPStore("127.0.0.1", int.from_bytes(os.read(port[0], 4), "big"), is_master=False, timeout=limit)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=request.world_size, timeout=limit)
