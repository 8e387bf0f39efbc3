"""The process group, and all that a table never sees of it.

One rank is the same code: every call returns what was given. With more ranks, three groups of our own carry the traffic:
"forward", "backward" and "step". Calls on one group follow from one another without user code in between, so ranks that go
different ways (one evaluates alone, one skips a backward) can never feed one kind of message into another: they wait on
different groups, time out, and each says where it stood.
"""

from __future__ import annotations

import atexit
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from shardembed.errors import CollectiveError, DisagreementError

Group = Literal["forward", "backward", "step"]
GROUPS: tuple[Group, ...] = ("forward", "backward", "step")
REPORT_SECONDS = 3.0  # how long ranks in trouble wait for each other's reports
DEFAULT_TIMEOUT = 300.0

_known: dict[Any, Comm] = {}


@dataclass
class Tally:
    """What ran, by (operation, stage): calls, and bytes sent to other ranks."""

    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    bytes: Counter[tuple[str, str]] = field(default_factory=Counter)

    def operations(self) -> dict[str, int]:
        """Calls by operation."""
        total: Counter[str] = Counter()
        for (operation, _), count in self.calls.items():
            total[operation] += count
        return dict(total)

    def clear(self) -> None:
        self.calls.clear()
        self.bytes.clear()


class Comm:
    """The ranks that share a collection. Get one from `Comm.of`; all collections on a process group use the same.

    Attributes:
        rank, world_size: of the process group.
        tally: counts of collectives and bytes.
        step: optimizer steps so far, for messages.
        forwards, backwards: forward calls so far, and which of them had a backward since the last one, as a digest; the counts
            message carries them, so that ranks notice when they differ.
        collections: collections made on this group so far. slots: slabs of the largest, the length of a counts message.
    """

    def __init__(self, group: dist.ProcessGroup | None, timeout: float) -> None:
        self.rank = dist.get_rank(group) if group is not None else 0
        self.world_size = dist.get_world_size(group) if group is not None else 1
        self.timeout = timeout
        self.tally = Tally()
        self.step = 0
        self.forwards = 0
        self.backwards = 0
        self.collections = 0
        self.slots = 0
        self._failure: CollectiveError | None = None
        self._groups: dict[Group, dist.ProcessGroup] = {}
        if self.world_size > 1:
            ranks = dist.get_process_group_ranks(group)
            for name in GROUPS:
                made = dist.new_group(ranks, timeout=timedelta(seconds=timeout), use_local_synchronization=True)
                assert isinstance(made, dist.ProcessGroup)
                self._groups[name] = made

    @staticmethod
    def of(group: dist.ProcessGroup | None = None, timeout: float | None = None) -> Comm:
        """The Comm of a process group; by default of the job's, or of this process alone when there is none.

        Collective over the group when it is called for the first time.
        """
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        comm = _known.get(group)
        if comm is None:
            comm = _known[group] = Comm(group, timeout or DEFAULT_TIMEOUT)
        return comm

    def close(self) -> None:
        """Leave the groups made for this Comm."""
        for group in self._groups.values():
            if group in dist.distributed_c10d._world.pg_map:  # else the job's groups were destroyed altogether
                dist.destroy_process_group(group)
        self._groups = {}

    def all_to_all(
        self, group: Group, stage: str, send: torch.Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int]
    ) -> torch.Tensor:
        """Exchange slices of a one-dimensional tensor: `send_sizes[r]` elements go to rank r, `receive_sizes[r]` come back."""
        if self.world_size == 1:
            return send
        received = send.new_empty(sum(receive_sizes))
        sent = (sum(send_sizes) - send_sizes[self.rank]) * send.element_size()
        self._run(
            ("all_to_all", stage),
            sent,
            lambda: dist.all_to_all_single(received, send, list(receive_sizes), list(send_sizes), group=self._groups[group]),
        )
        return received

    def all_reduce(self, stage: str, tensor: torch.Tensor, maximum: bool = False) -> torch.Tensor:
        """Sum (or take the maximum of) `tensor` over the ranks, in place; every rank gets the same bits."""
        if self.world_size > 1:
            operation = dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM
            sent = tensor.numel() * tensor.element_size()
            self._run(("all_reduce", stage), sent, lambda: dist.all_reduce(tensor, operation, group=self._groups["step"]))
        return tensor

    def broadcast(self, stage: str, tensor: torch.Tensor) -> torch.Tensor:
        """Overwrite `tensor` with rank 0's, in place."""
        if self.world_size > 1:
            sent = tensor.numel() * tensor.element_size() if self.rank == 0 else 0
            group = self._groups["step"]
            source = dist.get_global_rank(group, 0)
            self._run(("broadcast", stage), sent, lambda: dist.broadcast(tensor, source, group=group))
        return tensor

    def gather_texts(self, group: Group, stage: str, text: str, device: torch.device) -> list[str]:
        """Every rank's text, in rank order."""
        if self.world_size == 1:
            return [text]
        data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
        ones = [1] * self.world_size
        sizes = torch.full((self.world_size,), data.numel(), dtype=torch.int64, device=device)
        received_sizes: list[int] = self.all_to_all(group, stage, sizes, ones, ones).tolist()
        send = data.to(device).repeat(self.world_size)
        received = self.all_to_all(group, stage, send, [data.numel()] * self.world_size, received_sizes)
        return [bytes(part.cpu().numpy()).decode() for part in received.split(received_sizes)]

    def agree(self, what: str, lines: Sequence[str], device: torch.device) -> None:
        """Check that all ranks hold the same lines of text. Collective.

        Raises:
            DisagreementError: on every rank, naming the first line that differs and who holds what.
        """
        texts = [text.split("\n") for text in self.gather_texts("step", f"agree on {what}", "\n".join(lines), device)]
        for number in range(max(len(text) for text in texts)):
            held = [text[number] if number < len(text) else "(nothing)" for text in texts]
            if len(set(held)) > 1:
                other = next(rank for rank, line in enumerate(held) if line != held[0])
                raise DisagreementError(
                    f"ranks disagree on {what}: rank 0 has {held[0]}; rank {other} has {held[other]}. "
                    "Build the same collection, with the same plan and optimizer, on every rank"
                )

    def _run(self, what: tuple[str, str], sent: int, collective: Callable[[], object]) -> None:
        if self._failure is not None:
            raise self._failure
        self.tally.calls[what] += 1
        self.tally.bytes[what] += sent
        began = time.monotonic()
        try:
            collective()
        except RuntimeError as error:
            self._failure = CollectiveError(self._explain(what, time.monotonic() - began, error))
            raise self._failure from error

    def _explain(self, what: tuple[str, str], waited: float, error: RuntimeError) -> str:
        """Where this rank stood, and what the others say. Nothing is written to the store until something has gone wrong."""
        operation, stage = what
        here = f"stage {stage!r} ({operation}), forward call {self.forwards}, step {self.step}"
        elsewhere, missing = self._reports(here)
        text = f"rank {self.rank} waited {waited:.1f} s in {here}, and the call did not complete."
        if missing:
            text += f" Missing: rank(s) {missing} did not take part: they crashed, hang, or never made this call."
        for rank, place in elsewhere.items():
            text += f" Rank {rank} stood in {place}."
        text += " Every rank must make the same calls in the same order (also in evaluation, and with an empty batch)."
        return f"{text} Cause: {str(error).splitlines()[0]}"

    def _reports(self, here: str) -> tuple[dict[int, str], list[int]]:
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        try:
            default = dist.distributed_c10d._get_default_store()
            store = dist.PrefixStore(f"shardembed/trouble/{self._groups['forward'].group_name}", default)
            store.set(str(self.rank), json.dumps(here))
            until = time.monotonic() + REPORT_SECONDS
            while time.monotonic() < until and not store.check([str(rank) for rank in others]):
                time.sleep(0.05)
            said = {rank: json.loads(store.get(str(rank))) for rank in others if store.check([str(rank)])}
        except RuntimeError:  # the store died with the rank that hosts it
            return {}, []
        return {rank: place for rank, place in said.items() if place != here}, [rank for rank in others if rank not in said]


@atexit.register
def _leave() -> None:
    """Close what is still open: a Gloo group that outlives the interpreter aborts the process."""
    for comm in _known.values():
        comm.close()
    _known.clear()
    if _joined and dist.is_initialized():
        dist.destroy_process_group()


_joined: list[bool] = []  # not empty once `init` has made the job's group


def init(timeout: float = DEFAULT_TIMEOUT) -> Comm:
    """Join the job that torchrun (or a scheduler that sets RANK and WORLD_SIZE) started, or the process group that exists
    already.

    Alone, there is one rank and no group. Collective over the job.

    Args:
        timeout: seconds after which a collective that some ranks miss ends in a CollectiveError.
    """
    if not dist.is_initialized() and "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
        _joined.append(True)
    return Comm.of(timeout=timeout)


def default_device() -> torch.device:
    """This rank's GPU where there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def ranks_per_node(world_size: int) -> int:
    """How many ranks share a node, as torchrun says; all of them without it."""
    return min(int(os.environ.get("LOCAL_WORLD_SIZE", world_size)), world_size)
