"""Which kernel serves a slab: chosen once, from facts alone, and logged."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from shardembed.errors import ConfigError, UnsupportedError
from shardembed.kernels import cpu, fbgemm, reference, triton
from shardembed.kernels.kernel import Kernel, SlabData, SlabFacts

log = logging.getLogger("shardembed")


@dataclass(frozen=True)
class Entry:
    """A kernel that there is.

    Attributes:
        cannot: why the kernel does not serve such a slab, or None when it does.
        make: the kernel, for a slab that it serves.
    """

    cannot: Callable[[SlabFacts], str | None]
    make: Callable[[SlabData], Kernel]


ENTRIES: dict[str, Entry] = {
    "reference": Entry(reference.cannot, reference.ReferenceKernel),
    "numba": Entry(cpu.cannot, cpu.NumbaKernel),
    "triton": Entry(triton.cannot, triton.make),
    "fbgemm": Entry(fbgemm.cannot, fbgemm.make),
}
KERNELS: tuple[str, ...] = ("auto", *ENTRIES)


def choose(wanted: str, facts: SlabFacts) -> str:
    """The name of our compiled kernel of the device where it serves, else "reference"; `wanted` pins one.

    Raises:
        ConfigError: the pinned kernel cannot serve this slab; the message says why.
        UnsupportedError: no kernel can.
    """
    if wanted not in KERNELS:
        raise ConfigError(f"kernel must be one of {', '.join(KERNELS)}, not {wanted!r}")
    best = wanted if wanted != "auto" else "triton" if facts.device.type == "cuda" else "numba"
    if not facts.optimizer.stepped and best != "triton":
        return "reference"  # for lookup and merge: others make the update
    why_not = ENTRIES[best].cannot(facts)
    described = facts.optimizer.describe()
    if why_not and wanted == best != "reference":
        raise ConfigError(f"kernel={best!r} cannot serve {facts} with {described}: {why_not}")
    name = "reference" if why_not else best
    if name == "reference" and (nobody := ENTRIES[name].cannot(facts)):
        raise UnsupportedError(f"no kernel can serve {facts} with {described} (reference: {nobody})")
    log.info("slab of %s, %s: kernel %s%s", facts, described, name, f" ({best}: {why_not})" if why_not else "")
    return name
