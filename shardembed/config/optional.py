"""Parts that an installation may lack: the error says what they are for, and what to install."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from shardembed.errors import UnsupportedError


@contextmanager
def needed(package: str, extra: str, purpose: str) -> Iterator[None]:
    """Import `package` in this `with`.

    Raises:
        UnsupportedError: it cannot be imported; says for what `purpose` it is needed, and which extra has it.
    """
    try:
        yield
    except ImportError as error:
        raise UnsupportedError(missing(package, extra, purpose, error)) from error


def missing(package: str, extra: str, purpose: str, error: ImportError) -> str:
    """The message: a package that is there and fails to import is another matter than one that is not there."""
    absent = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == package.partition(".")[0]
    why = "" if absent else f", which cannot be imported here ({error})"
    return f"{purpose} needs {package}{why}: pip install 'shardembed[{extra}]'; `shardembed doctor` shows what is installed"
