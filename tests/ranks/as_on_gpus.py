"""A group of CPU ranks whose tensors go over two shared communicators, as over NCCL on GPUs; here Gloo carries these too.

What the library says on the host (counts, texts) goes by the channels. On a CPU the device does not tell it from the rest: the
method does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from shardembed.comm.channels import Group
from shardembed.comm.comm import Comm

CPU = torch.device("cpu")


@contextmanager
def two_communicators(world_size: int, timeout: float = 60.0) -> Iterator[tuple[dist.ProcessGroup, list[str]]]:
    """The group to make collections on, and what its communicators have carried since: thread, kind, what for. Collective."""
    group = dist.new_group(list(range(world_size)))
    assert isinstance(group, dist.ProcessGroup)
    comm = Comm.of(group, timeout)
    comm.connect(CPU, "gloo")
    carried: list[str] = []
    on_host = threading.local()

    def saying(method: Callable[..., Any]) -> Callable[..., Any]:
        def said(*args: Any, **named: Any) -> Any:
            before, on_host.now = getattr(on_host, "now", False), True
            try:
                return method(*args, **named)
            finally:
                on_host.now = before

        return said

    def carrier(self: Comm, kind: Group, number: int, device: torch.device) -> dist.ProcessGroup:
        if getattr(on_host, "now", False):
            return self._channel(kind, number)
        assert self._communicators is not None, f"a Comm beside the main thread's carries tensors of devices: {kind}"
        carried.append(f"{threading.current_thread().name}: {kind} of {self.history.about or 'a forward'}")
        return self._communicators.of(kind)

    with (
        mock.patch.object(Comm, "tell", saying(Comm.tell)),
        mock.patch.object(Comm, "gather_texts", saying(Comm.gather_texts)),
        mock.patch.object(Comm, "_carrier", carrier),
    ):
        yield group, carried
