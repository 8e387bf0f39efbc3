"""The states of the random generators that training code draws from: Python's, NumPy's, torch's, and each GPU's."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch

from shardembed.checkpoint.codec import decode, encode
from shardembed.errors import CheckpointError


def capture() -> Any:
    """This rank's random states, as JSON."""
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=True),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return encode(states, "random state")


def restore(saved: Any) -> None:
    """Set this rank's generators to what `capture` found.

    Raises:
        CheckpointError: it is no random state.
    """
    states = decode(saved, "random state")
    try:
        random.setstate(states["python"])
        np.random.set_state(states["numpy"])
        torch.set_rng_state(states["torch"])
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"the random state is malformed ({type(error).__name__}: {error})") from None


def reseed(saved: Any, rank: int) -> None:
    """Seed this rank's generators from rank 0's saved state: for another number of ranks, where each needs a state of its own."""
    digest = hashlib.sha256(f"{rank} {saved}".encode()).digest()
    seed = int.from_bytes(digest[:4], "little")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(int.from_bytes(digest[:7], "little"))
