"""The poolings: how the vectors of ids become outputs. One entry each; whoever tells poolings apart asks the entry, never the name.

Legend: B bags, W columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from shardembed.errors import ConfigError

Pooling = Literal["sum", "mean", "sqrtn", "max"] | None
OverIds = Literal["sum", "mean", "max"] | None


@dataclass(frozen=True)
class PoolingKind:
    """One pooling.

    Attributes:
        name: what users write.
        over_ids: what is done to vectors that came one an id: a mode of `F.embedding_bag`; None where each vector is an output.
        partial_sums: whether an output is the sum of its bag's vectors over `divisor`, so that an owner may send the sum of those
            it has. Their adjoint is known too: every id of the bag gets the bag's gradient over `divisor`.
        divisor: by what a bag's sum is divided, `[B]`, from the numbers of ids without padding, int64 `[B]`; above 0 for an
            empty bag. None where nothing is divided.
        takes_weights: whether ids may have per-sample weights.
        takes_frequencies: whether gradients may be divided by how often an id occurs (`scale_grad_by_freq`).
    """

    name: Pooling
    over_ids: OverIds
    partial_sums: bool
    divisor: Callable[[torch.Tensor], torch.Tensor] | None
    takes_weights: bool
    takes_frequencies: bool

    @property
    def divides_ids(self) -> bool:
        """Whether what `over_ids` made still has to be divided: torch's "mean" has done it."""
        return self.divisor is not None and self.over_ids != "mean"

    def divided(self, values_BW: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """Sums of bags, or gradients of outputs on their way to the ids, over `divisor`."""
        if self.divisor is None:
            return values_BW
        # A quotient, not a product with a reciprocal: torch's bits of a mean depend on it.
        return values_BW / self.divisor(lengths_B).unsqueeze(1).to(values_BW.dtype)


def _number(lengths_B: torch.Tensor) -> torch.Tensor:
    return lengths_B.clamp(min=1)


def _root(lengths_B: torch.Tensor) -> torch.Tensor:
    """In float64. By numpy where it can be, whose roots are correctly rounded: torch's (2.13, on the CPU) are off by a bit here and
    there, and deterministic mode would depend on its build.
    """
    lengths_B = lengths_B.clamp(min=1)
    return torch.from_numpy(np.sqrt(lengths_B.numpy())) if lengths_B.is_cpu else lengths_B.to(torch.float64).sqrt()


_KINDS = (
    PoolingKind("sum", "sum", partial_sums=True, divisor=None, takes_weights=True, takes_frequencies=True),
    PoolingKind("mean", "mean", partial_sums=True, divisor=_number, takes_weights=False, takes_frequencies=True),
    # tf.nn.embedding_lookup_sparse(combiner="sqrtn") without weights.
    PoolingKind("sqrtn", "sum", partial_sums=True, divisor=_root, takes_weights=False, takes_frequencies=True),
    PoolingKind("max", "max", partial_sums=False, divisor=None, takes_weights=False, takes_frequencies=False),
    PoolingKind(None, None, partial_sums=False, divisor=None, takes_weights=False, takes_frequencies=True),
)
POOLINGS: Mapping[Pooling, PoolingKind] = {kind.name: kind for kind in _KINDS}
WEIGHTED = " or ".join(repr(kind.name) for kind in _KINDS if kind.takes_weights)  # for messages


def kind_of(pooling: Any) -> PoolingKind:
    """The entry of a pooling by the name that a user gave.

    Raises:
        ConfigError: there is none; lists those there are.
    """
    found = next((kind for kind in _KINDS if kind.name == pooling), None)
    if found is None:
        raise ConfigError(f"pooling {pooling!r} is not one of {', '.join(map(repr, POOLINGS))}")
    return found


class FrozenPooling(dict[str, Pooling]):
    """Pooling by feature; hashable, since a TableConfig is."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted((name, str(pooling)) for name, pooling in self.items())))
