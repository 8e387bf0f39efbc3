"""One check in a process of its own: python -m benchmarks.on_gpu.child NAME FILE. Its verdict is written into FILE, as JSON."""

from __future__ import annotations

import json
import sys
import time
import traceback
from pathlib import Path

import torch

from benchmarks.on_gpu.check import Here, NotSeenError, Status
from benchmarks.on_gpu.checks import CHECKS

OURS = ("shardembed", "benchmarks", "tests")


def here() -> Here:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Here(torch.device("cuda", 0) if gpus else torch.device("cpu"), gpus)


def main(name: str, file: str) -> None:
    began, lines, status = time.monotonic(), [], "passes"
    check = CHECKS[name]

    def write(status: Status) -> None:
        Path(file).write_text(json.dumps([name, status, lines, time.monotonic() - began]))

    write("FAILS")  # until something else is known: a fault of the device ends the process
    try:
        where = here()
        if where.small and check.needs_gpu:
            raise NotSeenError(check.hidden)
        for line in check.run(where):
            lines.append(line)
            print(f"    {line}", flush=True)
            write("FAILS")
        status = "measured" if check.measures else "passes"
    except NotSeenError as error:
        lines.append(f"not seen: {error}")
        status = "not seen"
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        ours = package in OURS
        lines.append(f"ModuleNotFoundError: {error}" if ours else f"not seen: it needs {package}, which this Python has not")
        status = "FAILS" if ours else "not seen"
    except torch.OutOfMemoryError as error:
        lines.append(f"not seen: the GPU has too little memory: {str(error).splitlines()[0]}")
        status = "not seen"
    except Exception as error:
        lines.append(f"{type(error).__name__}: {str(error).strip()}"[:2000])
        traceback.print_exc()
        status = "FAILS"
    write(status)


if __name__ == "__main__":
    main(*sys.argv[1:])
