"""The process group, and all that a table never sees of it.

One rank is the same code: every call returns what was given. With more ranks, groups of our own carry the traffic, so that ranks
that go different ways (one evaluates alone, one skips a backward) never feed one message into another. What happens otherwise is
Gloo's: two calls of one kind on one group are taken for the same call, whatever they are about. A longer message than expected
ends the process, an equally long one is used; only calls of different kinds wait for each other until they time out. Hence:

    forward    opens with a row of counts that says which call is made; only then sizes may differ (see `exchange`)
    backward   sizes follow from the forward call that it belongs to: calls that stand near each other have different groups
    step       sizes follow from the collection: those made one after the other have different groups; all-reduces carry a tag
    control    everything that user code separates: all-reduces padded to one length with a tag, and texts sent after their sizes

A tag is a checksum of all calls so far, and of the optimizer step. The row of counts has it too.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from shardembed.errors import CollectiveError, DisagreementError, ShardEmbedError
from shardembed.meeting import meet

Group = Literal["forward", "backward", "step", "control"]
LANES: dict[Group, int] = {"forward": 1, "backward": 4, "step": 4, "control": 1}  # process groups of each kind
TAG_DIGITS = 4  # base 64: their squares, summed over 4,096 ranks, are exact in float32
TAG = 2 * TAG_DIGITS  # elements of a tag
ROW = 32  # values of a control message are padded to a multiple of this
REPORT_SECONDS = 3.0  # how long ranks in trouble wait for each other's reports
DEFAULT_TIMEOUT = 300.0
SAME_CALLS = "Every rank must make the same calls in the same order, also in evaluation and with an empty batch"
SAME_OUTPUTS = (
    "The losses of the ranks do not use the same outputs: let every loss use all of them (add 0 * output.sum() where one does not "
    "matter), or look them up together (a collection, or shard(..., inputs=...))"
)

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
        forwards: forward calls so far. history: checksum of all calls so far. The counts message carries both, so that ranks
            notice when they differ.
        collections: names of the collections made on this group so far. slots: slabs of the largest, the length of a counts
            message.
    """

    def __init__(self, group: dist.ProcessGroup | None, timeout: float, lanes: Mapping[Group, int] = LANES) -> None:
        self.rank = dist.get_rank(group) if group is not None else 0
        self.world_size = dist.get_world_size(group) if group is not None else 1
        self.timeout = timeout
        self.tally = Tally()
        self.step = 0
        self.forwards = 0
        self.history = 0
        self._about = ""
        self.collections: list[str] = []
        self.slots = 0
        self._failure: ShardEmbedError | None = None
        self._group = group
        self._side: Comm | None = None
        self._groups: dict[tuple[Group, int], dist.ProcessGroup] = {}
        if self.world_size > 1:
            ranks = dist.get_process_group_ranks(group)
            # The job may have been started with NCCL alone, which cannot carry what lies in host memory.
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else None
            for name, count in lanes.items():
                for lane in range(count):
                    made = dist.new_group(ranks, timedelta(seconds=timeout), backend, use_local_synchronization=True)
                    assert isinstance(made, dist.ProcessGroup)
                    self._groups[name, lane] = made

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

    def side(self) -> Comm:
        """A second Comm over the same ranks, with the group "control" alone, for a thread that talks while training goes on: the
        two share nothing, so neither hears the other's calls, and an error of one is none of the other. Its `step` counts only if
        its user sets it.

        Collective when it is called for the first time; the same one ever after.
        """
        if self._side is None:
            self._side = Comm(self._group, self.timeout, {"control": 1})
        return self._side

    def close(self) -> None:
        """Leave the groups made for this Comm."""
        if self._side is not None:
            self._side.close()
        for group in self._groups.values():
            if group in dist.distributed_c10d._world.pg_map:  # else the job's groups were destroyed altogether
                dist.destroy_process_group(group)
        self._groups = {}

    def all_to_all(
        self,
        group: Group,
        stage: str,
        send: torch.Tensor,
        send_sizes: Sequence[int],
        receive_sizes: Sequence[int],
        number: int = 0,
    ) -> torch.Tensor:
        """Exchange slices of a one-dimensional tensor: `send_sizes[r]` elements go to rank r, `receive_sizes[r]` come back.

        `number` keeps apart what ranks could confuse: of a backward the forward call, of a step the collection.
        """
        if self.world_size == 1:
            return send
        received = send.new_empty(sum(receive_sizes))
        sent = (sum(send_sizes) - send_sizes[self.rank]) * send.element_size()
        self._note(stage, self._whose(group, number))
        chosen = self._groups[group, number % LANES[group]]
        self._run(
            ("all_to_all", stage),
            sent,
            lambda: dist.all_to_all_single(received, send, list(receive_sizes), list(send_sizes), group=chosen),
        )
        return received

    def all_reduce(self, stage: str, tensor: torch.Tensor, maximum: bool = False) -> torch.Tensor:
        """Sum (or take the maximum of) a few numbers over the ranks, in place; every rank gets the same bits.

        Raises:
            DisagreementError: on every rank, when they are not making the same call.
        """
        if self.world_size > 1:
            padded = -(-tensor.numel() // ROW) * ROW
            row = torch.zeros(padded + TAG, dtype=torch.float64, device=tensor.device)
            row[: tensor.numel()] = tensor.reshape(-1)
            self._reduce("control", stage, row, maximum)
            tensor.copy_(row[: tensor.numel()].view(tensor.shape))
        return tensor

    def all_reduce_tables(self, stage: str, buffer: torch.Tensor, collection: int) -> None:
        """Sum `buffer` over the ranks, in place. Its last `TAG` elements are left for the tag.

        Raises:
            DisagreementError: on every rank, when they are not making the same call.
        """
        if self.world_size > 1:
            self._reduce("step", stage, buffer, number=collection)

    def _reduce(self, group: Group, stage: str, buffer: torch.Tensor, maximum: bool = False, number: int = 0) -> None:
        self._note(stage, self._whose(group, number))
        chosen = self._groups[group, number % LANES[group]]
        digits = [(self.history >> 6 * i) % 64 + 1 for i in range(TAG_DIGITS)]
        # Numbers are all d exactly when their sum is R d and that of their squares R d^2; or, the largest d and the smallest too.
        mine = digits + ([-digit for digit in digits] if maximum else [digit**2 for digit in digits])
        buffer[-TAG:] = torch.tensor(mine, dtype=buffer.dtype)
        operation = dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM
        sent = buffer.numel() * buffer.element_size()
        self._run(("all_reduce", stage), sent, lambda: dist.all_reduce(buffer, operation, group=chosen))
        expected = mine if maximum else [self.world_size * part for part in mine]
        if buffer[-TAG:].tolist() != expected:  # host sync on a GPU
            self._failure = DisagreementError(self._explain_mismatch(self._here("all_reduce", stage)))
            raise self._failure

    def broadcast(self, stage: str, tensor: torch.Tensor) -> torch.Tensor:
        """Overwrite `tensor` with rank 0's, in place."""
        if self.world_size > 1:
            sent = tensor.numel() * tensor.element_size() if self.rank == 0 else 0
            group = self._groups["control", 0]
            source = dist.get_global_rank(group, 0)
            self._note(stage, "")
            self._run(("broadcast", stage), sent, lambda: dist.broadcast(tensor, source, group=group))
        return tensor

    def gather_texts(self, group: Group, stage: str, text: str, device: torch.device, to: int | None = None) -> list[str]:
        """Every rank's text, in rank order. With `to`, that rank alone gets them, and the others an empty list."""
        if self.world_size == 1:
            return [text]
        data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
        ones = [1] * self.world_size
        sizes = torch.full((self.world_size,), data.numel(), dtype=torch.int64, device=device)
        received_sizes: list[int] = self.all_to_all(group, stage, sizes, ones, ones).tolist()
        send_sizes = [data.numel() if to in (None, rank) else 0 for rank in range(self.world_size)]
        if to not in (None, self.rank):
            received_sizes = [0] * self.world_size
        send = data.to(device).repeat(self.world_size if to is None else 1)
        received = self.all_to_all(group, stage, send, send_sizes, received_sizes)
        if to not in (None, self.rank):
            return []
        return [bytes(part.cpu().numpy()).decode() for part in received.split(received_sizes)]

    def agree(self, what: str, lines: Sequence[str], device: torch.device) -> None:
        """Check that all ranks hold the same lines of text. Collective.

        Raises:
            DisagreementError: on every rank, naming the first line that differs and who holds what.
        """
        texts = [text.split("\n") for text in self.gather_texts("control", f"agree on {what}", "\n".join(lines), device)]
        for number in range(max(len(text) for text in texts)):
            held = [text[number] if number < len(text) else "(nothing)" for text in texts]
            if len(set(held)) > 1:
                other = next(rank for rank, line in enumerate(held) if line != held[0])
                raise DisagreementError(
                    f"ranks disagree on {what}: rank 0 has {held[0]}; rank {other} has {held[other]}. "
                    "Build the same collection, with the same plan and optimizer, on every rank"
                )

    @contextmanager
    def preparing(self, what: str, device: torch.device) -> Iterator[None]:
        """What comes before an `agree` on `what`: the other ranks wait there, so an error in here is told them there."""
        try:
            yield
        except ShardEmbedError as error:
            self.agree(what, [f"{type(error).__name__}: {error}"], device)
            raise

    def _whose(self, group: Group, number: int) -> str:
        if not number:
            return ""
        return f"of forward call {number}" if group == "backward" else f"of collection {number}: {self.collections[number - 1]}"

    def _note(self, stage: str, about: str) -> None:
        self._about = about
        self.history = zlib.crc32(f"{stage} {about} {self.step}".encode(), self.history)

    def _run(self, what: tuple[str, str], sent: int, collective: Callable[[], object]) -> None:
        if self._failure is not None:
            raise self._failure
        self.tally.calls[what] += 1
        self.tally.bytes[what] += sent
        began = time.monotonic()
        try:
            collective()
        except RuntimeError as error:
            self._failure = CollectiveError(self._explain(self._here(*what), time.monotonic() - began, error))
            raise self._failure from error

    def _here(self, operation: str, stage: str) -> str:
        about = f", {self._about}" if self._about else ""
        call = f"forward call {self.forwards}, " if ("forward", 0) in self._groups else ""  # a side Comm makes none
        return f"stage {stage!r} ({operation}{about}), {call}optimizer step {self.step}"

    def _explain(self, here: str, waited: float, error: RuntimeError) -> str:
        """Where this rank stood, and what the others say. Nothing is written to the store until something has gone wrong."""
        elsewhere, missing = self._reports(here)
        text = f"rank {self.rank} waited {waited:.1f} s in {here}, and the call did not complete."
        if missing is None:
            text += " The store where ranks meet is gone: rank 0, which hosts it unless torchrun does, has ended."
        elif missing:
            text += f" Missing: rank(s) {missing} did not take part: they crashed, hang, or have left the loop."
        for rank, place in elsewhere.items():
            text += f" Rank {rank} stood in {place}." if place != here else f" Rank {rank} stood there too."
        cause = re.sub(r"^\[\S*\] ", "", str(error).splitlines()[0])  # without the place in torch's own sources
        if any(place != here and "'backward: " in place and "'backward: " in here for place in elsewhere.values()):
            text += f" {SAME_OUTPUTS}."
        return f"{text} {SAME_CALLS}. Cause: {cause}"

    def _explain_mismatch(self, here: str) -> str:
        elsewhere, _ = self._reports(here)
        places = {self.rank: here, **elsewhere}
        if len(set(places.values())) == 1:
            return f"all ranks came to {here}, but not by the same calls. {SAME_CALLS}"
        said = [f"rank {rank} is in {place}" for rank, place in sorted(places.items())]
        return f"ranks are not making the same call: {'; '.join(said)}. {SAME_CALLS}"

    def _reports(self, here: str) -> tuple[dict[int, str], list[int] | None]:
        """Where the other ranks say that they stand, and those that do not say it; None when nobody could."""
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        try:
            default = dist.distributed_c10d._get_default_store()
            store = dist.PrefixStore(f"shardembed/trouble/{self._groups['control', 0].group_name}", default)
            store.set(str(self.rank), json.dumps(here))
            until = time.monotonic() + REPORT_SECONDS
            while time.monotonic() < until and not store.check([str(rank) for rank in others]):
                time.sleep(0.05)
            said = {rank: json.loads(store.get(str(rank))) for rank in others if store.check([str(rank)])}
        except RuntimeError:  # the store died with the rank that hosts it
            return {}, None
        return said, [rank for rank in others if rank not in said]


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
        store, rank, world_size = meet(timeout)
        limit = timedelta(seconds=timeout)
        dist.init_process_group(backend, timeout=limit, store=store, rank=rank, world_size=world_size)
        _joined.append(True)
    return Comm.of(timeout=timeout)


def default_device() -> torch.device:
    """This rank's GPU where there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def ranks_per_node(world_size: int) -> int:
    """How many ranks share a node, as torchrun says; all of them without it."""
    return min(int(os.environ.get("LOCAL_WORLD_SIZE", world_size)), world_size)
