"""Which functions of the package one training step enters, in order. `python -m tests.unit.journey.traced` prints them by file.

The step is one of an `EmbeddingCollection` on one rank, in this process, with the kernels that are the truth. On several ranks it
enters `wire` and the collectives of `comm` besides.
"""

from __future__ import annotations

import gc
import sys
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

import shardembed as se

PACKAGE = Path(se.__file__).parent


@dataclass(frozen=True)
class Step:
    """What a step entered.

    Attributes:
        forward: by file below the package, its functions in the order in which the forward entered them.
        all: as `forward`, of the whole step; a file stands where its first function was entered.
    """

    forward: dict[str, list[str]]
    all: dict[str, list[str]]


def by_file(entered: list[CodeType]) -> dict[str, list[str]]:
    """Functions by file, each once. Comprehensions and lambdas are none: later Pythons do not enter them all."""
    found: dict[str, list[str]] = {}
    for code in dict.fromkeys(entered):
        if not code.co_name.startswith("<"):
            found.setdefault(str(Path(code.co_filename).relative_to(PACKAGE)), []).append(code.co_name)
    return found


def traced_step() -> Step:
    """One training step: features that are pooled and one that is not, then backward and the optimizer."""
    tables = [
        se.TableConfig("user", 100, 8, pooling="mean"),
        se.TableConfig("item", 50, 8, feature_names=["item", "history"], pooling={"item": "sum", "history": None}),
    ]
    emb = se.EmbeddingCollection(tables, optimizer=se.optim.Adam(lr=1e-3), plan=se.row_wise(), kernel="reference")
    optimizer = se.Optimizer(emb)
    history = torch.tensor([3, 1, 4]), torch.tensor([0, 2, 3])
    batch = {"user": torch.tensor([7, 8]), "item": torch.tensor([[1, 2], [3, 3]]), "history": history}
    entered: list[CodeType] = []

    def lose() -> torch.Tensor:
        return torch.stack([output.sum() for output in emb(batch).values()]).sum()

    lose().backward()
    optimizer.step()  # the first one works out what all others find

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
            entered.append(frame.f_code)

    before = sys.getprofile()
    gc.disable()  # what others left behind would be finalised in the middle of the step
    sys.setprofile(note)
    try:
        loss = lose()
        forward = len(entered)
        loss.backward()  # on the CPU autograd runs in this thread
        optimizer.step()
    finally:
        sys.setprofile(before)
        gc.enable()
    return Step(by_file(entered[:forward]), by_file(entered))


def main() -> None:
    step = traced_step()
    for what, files in (("forward", step.forward), ("step", step.all)):
        print(f"a {what} enters {sum(map(len, files.values()))} functions in {len(files)} files")
    for file, functions in step.all.items():
        print(f"{file:32} {len(functions):3}  {', '.join(functions)}")


if __name__ == "__main__":
    main()
