"""The states of the random generators that training code draws from: Python's, NumPy's, torch's, and each GPU's.

NumPy and torch believe what they are given: a position past the end of a generator's words makes the next draw read memory that is
not the generator's. So each field of a state is checked here before any generator sees it, and all states before the first is set.
"""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any

import numpy as np
import torch

from shardembed.checkpoint.codec import decode, encode
from shardembed.errors import CheckpointError

WORDS = 624  # of a Mersenne Twister, which Python, NumPy and torch all have
PYTHON_VERSION = 3  # of the state that `random.getstate` gives
# torch's CPU generator: seed, draws left until new words are made, seeded, and the next word; the 624 words, eight bytes each; a
# normal number kept in float64 (three numbers, and whether it counts), one in float32, and whether it counts.
_TORCH = struct.Struct(f"=QiiQ{8 * WORDS}x3di4xf?3x")
_CUDA = struct.Struct("=Qq")  # seed and offset
_BIT_GENERATORS: dict[str, Callable[[int], Any]] = {
    kind.__name__: kind for kind in (np.random.MT19937, np.random.PCG64, np.random.PCG64DXSM, np.random.Philox, np.random.SFC64)
}
_HIGHEST = {"pos": WORDS, "buffer_pos": 4, "has_uint32": 1, "uinteger": 2**32 - 1, "state": 2**128 - 1, "inc": 2**128 - 1}


def capture() -> Any:
    """This rank's random states, as JSON.

    Raises:
        CheckpointError: NumPy's global generator is of a kind whose state could not be checked when it is loaded.
    """
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    _check(states)
    return encode(states, "random state")


def restore(saved: Any) -> None:
    """Set this rank's generators to what `capture` found: all of them, or none.

    Raises:
        CheckpointError: it is no random state.
    """
    states = checked(saved)
    try:
        np.random.set_state(states["numpy"])  # first: it alone may be of another kind than the process has
        random.setstate(states["python"])
        torch.set_rng_state(states["torch"])
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"])
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"the random state is malformed ({type(error).__name__}: {error})") from None


def checked(saved: Any) -> dict[str, Any]:
    """The states in `saved`, if each is one that its generator may be given.

    Raises:
        CheckpointError: it is no random state; the message says whose and which field.
    """
    states = decode(saved, "random state")
    _check(states)
    return states


def reseed(saved: Any, rank: int) -> None:
    """Seed this rank's generators from rank 0's saved state: for another number of ranks, where each needs a state of its own."""
    digest = hashlib.sha256(f"{rank} {saved}".encode()).digest()
    seed = int.from_bytes(digest[:4], "little")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(int.from_bytes(digest[:7], "little"))


def _check(states: Any) -> None:
    checks = {"python": _check_python, "numpy": _check_numpy, "torch": _check_torch, "cuda": _check_cuda}
    if not isinstance(states, dict) or not {"python", "numpy", "torch"} <= states.keys() <= checks.keys():
        raise CheckpointError("the random state is malformed: it must have those of python, numpy and torch, and may have cuda's")
    for name, state in states.items():
        try:
            checks[name](state)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the random state of {name} is malformed: {error}") from None


def _check_python(state: Any) -> None:
    version, words, kept = state
    if version != PYTHON_VERSION or not isinstance(words, tuple) or len(words) != WORDS + 1:
        raise ValueError(f"it must be of version {PYTHON_VERSION} with {WORDS + 1} numbers")
    for number, word in enumerate(words):
        _within(f"number {number}", word, 2**32 - 1 if number < WORDS else WORDS)
    if kept is not None:
        _normal(kept)


def _check_numpy(state: Any) -> None:
    """The mapping that NumPy gives of any bit generator, or the tuple of a MT19937, which checkpoints had before."""
    if isinstance(state, tuple):
        kind, words, position, has_gauss, gauss = state
        state = {
            "bit_generator": kind,
            "state": {"key": words, "pos": position},
            "has_gauss": has_gauss,
            "gauss": gauss,
        }
    kind = state["bit_generator"]
    if not isinstance(kind, str) or kind not in _BIT_GENERATORS:
        raise ValueError(f"bit generator {kind!r:.80} is none of {', '.join(_BIT_GENERATORS)}, whose states can be checked")
    found = dict(state)
    _normal(found.pop("gauss", 0.0))
    _within("has_gauss", found.pop("has_gauss", 0), 1)
    _alike(found, _BIT_GENERATORS[kind](0).state, "")


def _alike(found: Any, fresh: Any, name: str) -> None:
    """Of the types, shapes and ranges of a fresh generator's state."""
    if isinstance(fresh, Mapping):
        if not isinstance(found, dict) or found.keys() != fresh.keys():
            raise ValueError(f"{name or 'it'} must have {', '.join(map(str, fresh))}")
        for key, value in fresh.items():
            _alike(found[key], value, key)
    elif isinstance(fresh, np.ndarray):
        if not isinstance(found, np.ndarray) or (found.dtype, found.shape) != (fresh.dtype, fresh.shape):
            raise ValueError(f"{name} must be {fresh.dtype} of shape {fresh.shape}")
    elif not isinstance(fresh, str):
        _within(name, found, _HIGHEST[name])


def _check_torch(state: Any) -> None:
    own = torch.get_rng_state()
    _bytes("it", state, len(own))
    if len(own) != _TORCH.size:  # a torch that keeps other things; a test notices, and its own checks are what is left
        return
    raw = state.numpy().tobytes()
    _, left, seeded, following, *normals, _, kept, _ = _TORCH.unpack(raw)
    # The generator draws `left - 1` more words from `following` on; torch checks each of the two alone.
    if seeded != 1 or not 1 <= left <= WORDS or not 0 <= following <= WORDS or left + following > WORDS + 1:
        raise ValueError(f"it says that {left} words are left from word {following} of {WORDS}")
    if raw[-4] > 1:
        raise ValueError("a truth value is neither 0 nor 1")
    for number in (*normals, kept):
        _normal(number)


def _check_cuda(state: Any) -> None:
    _bytes("it", state, _CUDA.size)
    _, offset = _CUDA.unpack(state.numpy().tobytes())
    if offset < 0 or offset % 4:
        raise ValueError(f"offset {offset} is negative or no multiple of 4")


def _bytes(name: str, value: Any, count: int) -> None:
    if not isinstance(value, torch.Tensor) or value.dtype != torch.uint8 or value.shape != (count,):
        raise ValueError(f"{name} must be a tensor of {count} bytes")


def _within(name: str, value: Any, highest: int) -> None:
    if type(value) is not int or not 0 <= value <= highest:
        raise ValueError(f"{name} must be a whole number from 0 to {highest}, not {value!r:.40}")


def _normal(value: Any) -> None:
    if type(value) is not float or not isfinite(value):
        raise ValueError(f"a normal number that is kept must be finite, not {value!r:.40}")
