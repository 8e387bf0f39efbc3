"""The folder of one run: config.yaml, plan.json, metrics.jsonl. Only rank 0 has one."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shardembed.errors import ConfigError


class RunFolder:
    """`<root>/<name>-<time>`, made on construction.

    Raises:
        ConfigError: the folder cannot be made.
    """

    def __init__(self, root: str, name: str) -> None:
        self.path = _make(Path(root), f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")

    def write(self, name: str, text: str) -> None:
        (self.path / name).write_text(text.rstrip() + "\n", encoding="utf-8")

    def log(self, records: Iterable[dict[str, Any]]) -> None:
        """Append a line for each record to metrics.jsonl."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)


def _make(root: Path, name: str) -> Path:
    for attempt in range(1, 1000):  # two runs may start in the same second
        path = root / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            path.mkdir(parents=True)
        except FileExistsError as error:
            if not path.is_dir():  # a file stands where the root, or one of the folders above, should be
                raise ConfigError(f"run_dir: cannot make {path}: {error.strerror}; set run_dir to another folder") from error
        except OSError as error:
            raise ConfigError(f"run_dir: cannot make {path}: {error.strerror}; set run_dir to another folder") from error
        else:
            return path
    raise ConfigError(f"run_dir: no free name like {root / name}; remove old runs")
