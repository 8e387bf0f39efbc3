"""The process group, and all that a table never sees of it.

One rank is the same code: every call returns what was given. With more ranks, groups of our own carry the traffic, so that ranks
that go different ways (one evaluates alone, one skips a backward) never feed one message into another. What happens otherwise is
Gloo's: two calls of one kind on one group are taken for the same call, whatever they are about. A longer message than expected
ends the process, an equally long one is used; only calls of different kinds wait for each other until they time out. Hence:

    forward    opens with a row of counts that says which call is made; only then sizes may differ (see `journey.messages`)
    backward   sizes follow from the forward call that it belongs to: calls that stand near each other have different channels
    step       sizes follow from the collection: those made one after the other have different channels; all-reduces carry a tag
    control    everything that user code separates: all-reduces padded to one length with a tag, and texts sent after their sizes

Of each kind there are one or more process groups, the channels (`channels`). A tag is a checksum of all calls so far, and of the
optimizer step (`history`, `tag`). The row of counts has it too.

Tensors on a GPU go over NCCL, whose communicators are too large to have one a channel: there are two, for forwards and for the
rest, and their calls keep the order of the program (`communicators`). Counts and texts lie on the host: they go by channels.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from shardembed.comm.channels import CHANNELS, CONTROL, SPEECH, Group, close_channels, open_channels
from shardembed.comm.communicators import Communicators, device_of, identity, nccl_carries, open_communicators, shared
from shardembed.comm.diagnosis import Place, Reports, explain, explain_lines, explain_mismatch, gather_reports, of_torch
from shardembed.comm.heartbeat import Heartbeat, Watch, device_is_through
from shardembed.comm.history import History
from shardembed.comm.patience import listed, together
from shardembed.comm.rendezvous import refuse_unjoined
from shardembed.comm.stages import Tally
from shardembed.comm.tag import TAG, reduced, tag_of, with_room
from shardembed.comm.threads import at_home
from shardembed.errors import CollectiveError, DisagreementError, ShardEmbedError

DEFAULT_TIMEOUT = 300.0
PATIENCE = timedelta(days=365)

_known: dict[Any, Comm] = {}


class Comm:
    """The ranks that share a collection. Get one from `Comm.of`; all collections on a process group use the same.

    Nobody else writes to it: what happens elsewhere and counts here is told to its history.

    Attributes:
        rank: this process's, in the process group.
        world_size: ranks of the process group.
        timeout: seconds that a collective may take.
        tally: counts of collectives and bytes.
        history: what has been done so far. The counts message carries its checksum, so that ranks notice when they differ.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        timeout: float,
        watched: Sequence[str] = (),
        channels: Mapping[Group, int] = CHANNELS,
        label: str = "",
        device: torch.device | None = None,
    ) -> None:
        """watched: types of device whose collectives a heartbeat watches. device: this rank's GPU, where it asks that."""
        self.rank = dist.get_rank(group) if group is not None else 0
        self.world_size = dist.get_world_size(group) if group is not None else 1
        self.timeout = timeout
        self.tally = Tally()
        self.history = History(label)
        self._options, self._patient = dist.AllToAllOptions(), dist.AllToAllOptions()
        self._patient.timeout = PATIENCE
        self._failure: ShardEmbedError | None = None
        self._group = group
        self._side: Comm | None = None
        self._beside: list[Comm] = []
        self._lent: list[Comm] = []
        self._watch, self._watched = Watch(), watched  # calls on these types of device
        self._device = device
        alone = self.world_size == 1
        self._channels = {} if alone else open_channels(group, self.rank, channels, watched, timeout)
        self._communicators: Communicators | None = None
        self._heartbeat = self._beating() if watched and not alone else None

    def _beating(self) -> Heartbeat:
        return Heartbeat(self.rank, self.world_size, self._name, self.timeout, self._watch, partial(at_home, self._device))

    @property
    def _name(self) -> str:
        return self._channels["control", 0].group_name

    @staticmethod
    def of(group: dist.ProcessGroup | None = None, timeout: float | None = None, heartbeat: bool | None = None) -> Comm:
        """The Comm of a process group; by default of the job's, or of this process alone when there is none.

        Collective over the group when it is called for the first time, which is when the other arguments count; see `init`.

        Raises:
            CollectiveError: this process was started as a rank of a job, and has not joined it.
        """
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        comm = _known.get(group)
        if comm is None:
            if group is None:
                refuse_unjoined()
            over_nccl = nccl_carries(group)
            device = device_of(group) if torch.cuda.is_available() else None
            on_gpu = ["cuda"] if over_nccl and heartbeat is not False else []
            watched = [*on_gpu, "cpu"] if heartbeat else on_gpu
            # Tables on GPUs speak of counts and texts on the host, and of nothing else. See `carry`.
            channels = SPEECH if over_nccl else CHANNELS
            comm = Comm(group, timeout or DEFAULT_TIMEOUT, watched, channels, device=device)
            if over_nccl and device is not None:
                comm.connect(device, "nccl")
            _known[group] = comm
        return comm

    def connect(self, device: torch.device, backend: str) -> None:
        """Have communicators of their own carry the tensors on devices of this type. Collective.

        Raises:
            CollectiveError: on every rank, when it does not work on any, or two ranks have one GPU; this Comm is closed then.
        """
        mine = f"{identity(device)} {device} of {socket.gethostname()}"
        if same := shared(self.gather_texts("control", "init: tell devices", mine)):  # NCCL would hang, or fail in words of its own
            self.close()
            raise CollectiveError(same)
        began, problem = time.monotonic(), ""
        try:
            ranks = dist.get_process_group_ranks(self._group)
            self._communicators = open_communicators(ranks, device, backend, self._watched, self.timeout)
        except RuntimeError as error:
            problem = f"after {time.monotonic() - began:.1f} s: {str(error).splitlines()[0]}"
        told = self.gather_texts("control", "init: connect devices", problem)
        if any(told):
            self.close()
            raise CollectiveError(f"the {backend.upper()} communicators of {len(told)} ranks could not be made: {listed(told)}")

    def carry(self, device: torch.device) -> None:
        """There are to be tables on devices of this type: make the channels that their tensors go by where there are none yet, as
        for tables in the host memory of a job of GPUs. Collective.
        """
        over_nccl = self._communicators is not None and self._communicators.device.type == device.type
        if self._channels and not over_nccl and len(self._channels) < sum(CHANNELS.values()):
            missing: dict[Group, int] = {kind: count for kind, count in CHANNELS.items() if (kind, 0) not in self._channels}
            self._channels |= open_channels(self._group, self.rank, missing, self._watched, self.timeout)

    def in_turn(self, device: torch.device) -> bool:
        """Whether collectives of tensors there must keep the order of the program, so that nothing beside the main thread may
        make any (see `communicators`).
        """
        return self._communicators is not None and self._communicators.device.type == device.type

    @property
    def communicator_bytes(self) -> int | None:
        """What the communicators took of this rank's device when they were made; 0 without any, None where that cannot be seen."""
        return 0 if self._communicators is None else self._communicators.bytes

    def side(self) -> Comm:
        """A second Comm over the same ranks, with the group "control" alone, for a thread that talks while training goes on: the
        two share nothing, so neither hears the other's calls, and an error of one is none of the other. It hears of no optimizer
        step, so its user says where it stands (`History.stand_at`).

        Collective when it is called for the first time; the same one ever after.
        """
        if self._side is None:
            self._side = Comm(self._group, self.timeout, channels=CONTROL)
        return self._side

    @contextmanager
    def beside(self) -> Iterator[Comm]:
        """A Comm over the same ranks for calls that run beside those of this one, nobody else's until the end: with the group
        "forward", and numbers of calls of its own. It has no communicators. Collective where all that there are have been lent.
        """
        comm = next((comm for comm in self._beside if comm not in self._lent), None)
        if comm is None:
            on_host = [kind for kind in self._watched if kind == "cpu"]
            comm = Comm(self._group, self.timeout, on_host, SPEECH, label="beside the loop", device=self._device)
            self._beside.append(comm)
        comm.history.lent(self.history)
        self._lent.append(comm)
        try:
            yield comm
        finally:
            self._lent.remove(comm)

    @property
    def tallies(self) -> list[Tally]:
        """This one's, and those of the calls beside it."""
        return [self.tally, *(comm.tally for comm in self._beside)]

    def close(self) -> None:
        """Leave the groups made for this Comm."""
        for comm in [self._side, *self._beside]:
            if comm is not None:
                comm.close()
        if self._heartbeat is not None:
            self._heartbeat.stop()
        if self._communicators is not None:
            self._communicators.close()
            self._communicators = None
        close_channels(self._channels)

    def all_to_all(
        self,
        group: Group,
        stage: str,
        send: torch.Tensor,
        send_sizes: Sequence[int],
        receive_sizes: Sequence[int],
        number: int = 0,
        patient: bool = False,
    ) -> torch.Tensor:
        """Exchange slices of a one-dimensional tensor: `send_sizes[r]` elements go to rank r, `receive_sizes[r]` come back.

        `number` keeps apart what ranks could confuse: of a backward the forward call, of a step the collection. `patient`: there is
        no time limit.
        """
        if self.world_size == 1:
            return send
        received = send.new_empty(sum(receive_sizes))  # Gloo ends the process where more arrives, so sizes are agreed on before
        sent = (sum(send_sizes) - send_sizes[self.rank]) * send.element_size()
        self.tally.largest = max(self.tally.largest, (send.numel() + received.numel()) * send.element_size())
        self.history.note(group, stage, number)
        carrier, options = self._carrier(group, number, send.device), self._patient if patient else self._options
        self._run(
            ("all_to_all", stage),
            sent,
            # What dist.all_to_all_single calls, without the time it takes to get there: a third of a small exchange.
            lambda: carrier.alltoall_base(received, send, list(receive_sizes), list(send_sizes), options).wait(),
            send.device,
            patient,
        )
        return received

    def tell(self, group: Group, stage: str, rows: NDArray[np.int64], patient: bool = False) -> NDArray[np.int64]:
        """Each rank a row of numbers, `rows[r]` for rank r, and from each one, int64 `[R, n]` both. On the host, whatever the
        device: who waits for numbers of other ranks then waits for no device, and any thread may.
        """
        equal = [rows.shape[1]] * self.world_size
        sent = torch.from_numpy(rows).view(-1)
        return self.all_to_all(group, stage, sent, equal, equal, patient=patient).view(rows.shape).numpy()

    def all_reduce(self, stage: str, tensor: torch.Tensor, maximum: bool = False) -> torch.Tensor:
        """Sum (or take the maximum of) a few numbers over the ranks, in place; every rank gets the same bits.

        Raises:
            DisagreementError: on every rank, when they are not making the same call.
        """
        if self.world_size > 1:
            row = with_room(tensor)
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
        self.history.note(group, stage, number)
        chosen = self._carrier(group, number, buffer.device)
        mine = tag_of(self.history.checksum, maximum)
        buffer[-TAG:] = torch.tensor(mine, dtype=buffer.dtype)
        operation = dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM
        sent = buffer.numel() * buffer.element_size()
        self._run(("all_reduce", stage), sent, lambda: dist.all_reduce(buffer, operation, group=chosen), buffer.device)
        if buffer[-TAG:].tolist() != reduced(mine, self.world_size, maximum):  # host sync on a GPU
            here = str(self._here("all_reduce", stage))
            self._failure = DisagreementError(explain_mismatch(self.rank, here, self._reports(here)))
            raise self._failure

    def broadcast(self, stage: str, tensor: torch.Tensor) -> torch.Tensor:
        """Overwrite `tensor` with rank 0's, in place."""
        if self.world_size > 1:
            sent = tensor.numel() * tensor.element_size() if self.rank == 0 else 0
            group = self._carrier("control", 0, tensor.device)
            source = dist.get_global_rank(group, 0)
            self.history.note("control", stage, 0)
            self._run(("broadcast", stage), sent, lambda: dist.broadcast(tensor, source, group=group), tensor.device)
        return tensor

    def gather_texts(self, group: Group, stage: str, text: str, to: int | None = None) -> list[str]:
        """Every rank's text, in rank order. With `to`, that rank alone gets them, and the others an empty list. On the host."""
        if self.world_size == 1:
            return [text]
        data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
        received_sizes: list[int] = self.tell(group, stage, np.full((self.world_size, 1), data.numel())).ravel().tolist()
        send_sizes = [data.numel() if to in (None, rank) else 0 for rank in range(self.world_size)]
        if to not in (None, self.rank):
            received_sizes = [0] * self.world_size
        send = data.repeat(self.world_size if to is None else 1)
        received = self.all_to_all(group, stage, send, send_sizes, received_sizes)
        if to not in (None, self.rank):
            return []
        return [bytes(part.numpy()).decode() for part in received.split(received_sizes)]

    def agree(self, what: str, lines: Sequence[str]) -> None:
        """Check that all ranks hold the same lines of text. Collective.

        Raises:
            DisagreementError: on every rank, naming the first line that differs and who holds what.
        """
        texts = [text.split("\n") for text in self.gather_texts("control", f"agree on {what}", "\n".join(lines))]
        if said := explain_lines(what, texts):
            raise DisagreementError(said)

    @contextmanager
    def preparing(self, what: str) -> Iterator[None]:
        """What comes before an `agree` on `what`: the other ranks wait there, so an error in here is told them there."""
        try:
            yield
        except ShardEmbedError as error:
            self.agree(what, [f"{type(error).__name__}: {error}"])
            raise

    def patiently(self, stage: str) -> AbstractContextManager[None]:
        """For what takes some ranks far longer than others: in the end all wait for all, without a time limit, but for none that is
        dead or gives no sign of life (see `patience`).

        Raises:
            CollectiveError: on all other ranks, when a rank raises an error in here.
        """
        if not self._channels:
            return nullcontext()
        return together(self, stage, None if self._heartbeat is not None else self._beating())

    def _channel(self, group: Group, number: int) -> dist.ProcessGroup:
        return self._channels[group, number % CHANNELS[group]]

    def _carrier(self, group: Group, number: int, device: torch.device) -> dist.ProcessGroup:
        """What a collective of tensors on this device goes by."""
        if self._communicators is not None and self._communicators.device.type == device.type:
            return self._communicators.of(group)
        return self._channel(group, number)

    def _run(
        self, what: tuple[str, str], sent: int, collective: Callable[[], object], device: torch.device, patient: bool = False
    ) -> None:
        if self._failure is not None:
            raise self._failure
        self.tally.calls[what] += 1
        self.tally.bytes[what] += sent
        place = self._here(*what)
        waiting = partial(self._watch.during, place, partial(device_is_through, device), patient)
        with self._guarded(place), waiting() if patient or device.type in self._watched else nullcontext():
            collective()

    @contextmanager
    def guarding(self, stage: str) -> Iterator[None]:
        """In here, torch's own collectives (DistributedDataParallel's, say) fail with a CollectiveError too, which names ranks."""
        with self._guarded(self._here("torch's own collectives", stage), torch_only=True):
            yield

    @contextmanager
    def _guarded(self, place: Place, torch_only: bool = False) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            if self.world_size == 1 or isinstance(error, ShardEmbedError) or (torch_only and not of_torch(error)):
                raise
            here = str(place)
            text = explain(self.rank, here, time.monotonic() - began, error, self._reports(here))
            self._failure = CollectiveError(text)
            raise self._failure from error

    def _reports(self, here: str) -> Reports:
        return gather_reports(self._name, self.rank, self.world_size, here)

    def _here(self, operation: str, stage: str) -> Place:
        forwards = self.history.forwards if ("forward", 0) in self._channels else None  # a side Comm makes none
        return Place(operation, stage, self.history.about, forwards, self.history.step)


def close_all() -> None:
    """Leave the groups of all Comms."""
    for comm in _known.values():
        comm.close()
    _known.clear()
