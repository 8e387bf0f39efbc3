"""The part of a model that is no table, as far as somebody says what it is: its time, its memory, and its gradients."""

from __future__ import annotations

from dataclasses import dataclass

from shardembed.planner.cost_ops import all_reduce, op_of
from shardembed.planner.topology import Topology

NUMBER = 4  # bytes of a parameter, its gradient, and a number of its optimizer state: float32


@dataclass(frozen=True)
class Dense:
    """The part of a model that is no table: every rank has all of it, and computes it for its own samples.

    Attributes:
        seconds_per_sample: of one rank, forward, backward and update; 0 where nobody says.
        parameters: how many numbers it learns; 0 where nobody says.
        state: numbers of optimizer state for each of them, of which Adam has two.
    """

    seconds_per_sample: float = 0.0
    parameters: int = 0
    state: int = 2

    @property
    def memory(self) -> int:
        """Bytes that every rank has of it: weights, gradients and optimizer state, without activations."""
        return NUMBER * self.parameters * (2 + self.state)

    def seconds(self, topology: Topology, batch: int) -> float:
        """Of a rank with its even share of a batch's samples."""
        return self.seconds_per_sample * batch / topology.ranks

    def reduced(self, topology: Topology) -> float:
        """Seconds in which the ranks sum their gradients."""
        exchange, sent = all_reduce(topology), NUMBER * self.parameters
        if topology.ranks == 1 or not sent:
            return 0.0
        return exchange.latency + sent * (exchange.byte + op_of(topology, "all_reduce").byte)
