"""Curves for TensorBoard, in the run's folder: loss, learning rates, samples a second, and what evaluations find."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from shardembed.config.optional import needed
from shardembed.optimizer import Optimizer
from shardembed.recipes.run_folder import SCALARS

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter


def check() -> None:
    """Before a job starts.

    Raises:
        UnsupportedError: TensorBoard is not installed, or cannot be imported.
    """
    with needed("tensorboard", "tensorboard", "log.tensorboard: true"):
        import tensorboard  # noqa: F401
        import torch.utils.tensorboard  # noqa: F401


class Scalars:
    """Writes the scalars of one start of a run; nothing where there is no folder. Use it as a context.

    Args:
        note: tells the user something.
        begun: steps that were taken before. TensorBoard leaves out what an earlier start has written beyond them.
    """

    def __init__(self, folder: Path | None, begun: int, note: Callable[[str], None]) -> None:
        self._writer: SummaryWriter | None = None
        self._note = note
        if folder is not None:
            check()
            from torch.utils.tensorboard.writer import SummaryWriter

            with self._expendable():
                self._writer = SummaryWriter(str(folder / SCALARS), purge_step=begun + 1)

    def __enter__(self) -> Scalars:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._writer is not None:
            with self._expendable():
                self._writer.close()

    @contextmanager
    def _expendable(self) -> Iterator[None]:
        """A file that cannot be written, as on a full disk, ends the curves and not the training."""
        try:
            yield
        except OSError as error:
            self._writer = None
            self._note(f"{SCALARS}: no more scalars are written for TensorBoard: {error.strerror or error}")

    def add(self, lines: Iterable[Mapping[str, Any]], optimizer: Optimizer, rate: float) -> None:
        """Lines of metrics.jsonl, and where training stands after them."""
        if self._writer is not None:
            with self._expendable():
                _add(self._writer, lines, optimizer, rate)


def _add(writer: SummaryWriter, lines: Iterable[Mapping[str, Any]], optimizer: Optimizer, rate: float) -> None:
    step = 0
    for line in lines:
        step = line["step"]
        if line.get("loss") is not None:
            writer.add_scalar("train/loss", line["loss"], step)
        for name, value in line.get("evaluation", {}).items():
            if isinstance(value, float):
                writer.add_scalar(f"eval/{name}", value, step)
    groups = optimizer.param_groups
    writer.add_scalar("learning rate/tables", groups[-1]["lr"], step)
    if optimizer.dense is not None:
        writer.add_scalar("learning rate/dense", groups[0]["lr"], step)
    writer.add_scalar("train/samples a second", rate, step)
