"""Making much that stays, without Python's collector of cycles walking through all of it again and again."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """No automatic collection of cycles inside. Half of the time of an import beside torch goes there: each module makes thousands
    of objects, none of them garbage, and a full collection walks torch's half million too.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
