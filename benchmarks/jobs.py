"""What a benchmark gives back, how it ends when it cannot, and what it says meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

Result = dict[str, Any]


class BenchFailedError(Exception):
    """Ranks of a benchmark failed, and have said why. code: what this process is to exit with."""

    def __init__(self, code: int) -> None:
        super().__init__(f"a benchmark's ranks ended with exit code {code}")
        self.code = code


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def in_a_process(module: str, asked: Any, keep_errors: bool = False) -> Any:
    """What `python -m module FILE` leaves in FILE, where it finds what is asked of it; both as JSON.

    Args:
        keep_errors: what it says goes into the error, and not to the screen.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "asked.json"
        file.write_text(json.dumps(asked))
        stderr = subprocess.PIPE if keep_errors else None
        words = [sys.executable, "-m", module, str(file)]
        subprocess.run(words, env={**os.environ, "PYTHONPATH": path}, stderr=stderr, text=True, check=True)
        return json.loads(file.read_text())
