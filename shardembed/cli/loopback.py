"""A rendezvous for ranks of one machine, at a store that listens on the loopback interface alone.

torch's own handlers let their TCPStore listen on all interfaces, where anybody on the network could join the job. It takes a socket
that is bound already, though.
"""

from __future__ import annotations

import os
import socket
import sys

from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

BACKEND = "loopback"
ADDRESS = "127.0.0.1"
INTERFACES = {"linux": "lo", "darwin": "lo0"}


class LoopbackRendezvous(RendezvousHandler):
    """Of one node: it has nobody to wait for. The ranks use the agent's store, so they need not listen for one another."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._store: TCPStore | None = None  # kept: the server ends with it

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        # A new one each time, so that ranks which start again find no keys of those before them.
        listener = socket.create_server((ADDRESS, 0), backlog=512)
        port = listener.getsockname()[1]
        self._store = TCPStore(ADDRESS, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
        return RendezvousInfo(PrefixStore(self._run_id, self._store), 0, 1, RendezvousStoreInfo(ADDRESS, port))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass  # nobody else could come

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


def register() -> None:
    """Make the backend known to torch's launcher, and the ranks' Gloo groups listen on the loopback interface."""
    rendezvous_handler_registry.register(BACKEND, _make)
    interface = INTERFACES.get(sys.platform)
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def _make(parameters: RendezvousParameters) -> RendezvousHandler:
    return LoopbackRendezvous(parameters.run_id)
