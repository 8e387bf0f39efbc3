"""Curves for TensorBoard, in the run's folder: loss, learning rates, samples a second, and what evaluations find; the settings as a
text and as hyperparameters, beside the metrics at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from shardembed.config.optional import needed
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
    """Writes what one start of a run is told. Use it as a context.

    Args:
        note: tells the user something.
        begun: steps that were taken before. TensorBoard leaves out what an earlier start has written beyond them.
        settings: by their names.
    """

    def __init__(self, folder: Path, begun: int, note: Callable[[str], None], settings: Mapping[str, Any]) -> None:
        self._writer: SummaryWriter | None = None
        self._note, self._settings = note, dict(settings)
        check()
        from torch.utils.tensorboard.writer import SummaryWriter

        with self._expendable():
            self._writer = SummaryWriter(str(folder / SCALARS), purge_step=begun + 1)
            rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in self._settings.items())
            self._writer.add_text("settings", f"| | |\n|---|---|\n{rows}", begun)

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

    def add(self, points: Sequence[tuple[int, str, float]]) -> None:
        """As `Tracker.add`."""
        if self._writer is None:
            return
        with self._expendable():
            for step, name, value in points:
                self._writer.add_scalar(name, value, step)

    def finish(self, step: int, metrics: Mapping[str, float]) -> None:
        """As `Tracker.finish`."""
        if self._writer is None:
            return
        from torch.utils.tensorboard.summary import hparams

        final = {f"final/{name}": value for name, value in metrics.items()}
        with self._expendable():
            for name, value in final.items():
                self._writer.add_scalar(name, value, step)
            # Not the writer's own `add_hparams`, which makes a run of its own of them, without the curves.
            for summary in hparams(self._settings, final):
                self._writer._get_file_writer().add_summary(summary)


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
