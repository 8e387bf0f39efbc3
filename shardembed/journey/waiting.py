"""The gradients that wait in the collections of a model: whether they are finite, and what becomes of them where they are not.

One rank cannot say: it sees what arrived at its own rows. So all that is decided here is decided together.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from shardembed.comm.comm import Comm
from shardembed.journey.journey import Journey
from shardembed.kernels.reference import is_finite


def journeys(model: nn.Module) -> list[Journey]:
    """The collections of a model, each once, in the order of its modules."""
    found = {id(journey): journey for module in model.modules() if isinstance(journey := getattr(module, "journey", None), Journey)}
    return list(found.values())


def comms_of(found: Iterable[Journey]) -> list[Comm]:
    """Those of several journeys, each once."""
    return list({id(journey.comm): journey.comm for journey in found}.values())


def finite_here(found: Iterable[Journey]) -> bool:
    """Nothing that waits on this rank is inf or nan."""
    return all(slab.finite() for journey in found for slab in journey.slabs)


def finite_factors(found: Iterable[Journey]) -> bool:
    """What the gradients are to be multiplied with is not inf or nan."""
    return all(journey.pending.factor is None or is_finite(journey.pending.factor) for journey in found)


def check(journey: Journey) -> None:
    """Find out whether anything that waits on any rank is inf or nan, unless that is known. Collective (one scalar)."""
    if journey.pending.unchecked:
        bad = torch.tensor([float(not finite_here([journey]))], device=journey.device)
        journey.comm.all_reduce("step: agree that gradients are finite", bad, maximum=True)
        journey.pending.checked(bad)


def lost_tables(found: Iterable[Journey]) -> tuple[str, ...]:
    """The tables whose waiting gradients hold inf or nan on any rank, in words. Collective; asked for when something is wrong."""
    names: list[str] = []
    for journey in found:
        flags = torch.zeros(len(journey.tables))
        for slab in journey.slabs:
            flags[slab.lost().cpu()] = 1
        journey.comm.all_reduce("step: agree where gradients are not finite", flags, maximum=True)
        names += [repr(table.name) for table, flag in zip(journey.tables, flags.tolist(), strict=True) if flag]
    return (f"table(s) {', '.join(names)}",)


def zero_nonfinite(journey: Journey) -> None:
    """Replace what is not finite in the gradients as the step would apply them: summed over duplicates, copies and ranks.

    Contributions must not be looked at one by one: how many there are depends on the plan and the number of ranks.
    """
    journey.reduce()
    for slab in journey.slabs:
        slab.merged()
        slab.zero_nonfinite()
    journey.pending.made_finite()
