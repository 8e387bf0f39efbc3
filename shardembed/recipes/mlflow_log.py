"""A run for MLflow: settings as its parameters, losses, rates and evaluations as its metrics, in the store that MLflow is told of.

A server that answers slowly, or not at all, must not hold up a step that all ranks are waiting for: a thread tells it.
"""

from __future__ import annotations

import hashlib
import json
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from shardembed._version import __version__
from shardembed.config import plain_json
from shardembed.config.optional import needed
from shardembed.recipes.common import MlflowConfig
from shardembed.recipes.run_folder import publish

if TYPE_CHECKING:
    from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]

NOTED = "mlflow.json"  # in the run's folder: which of MLflow's runs is told of it
PARAMETERS, METRICS, CHARACTERS = 100, 1000, 500  # of one call, and of a parameter, that every version of MLflow takes
PATIENCE = 60.0  # seconds that the end of a job waits for a server that has not been told all
Work = Callable[["MlflowClient", str], object]


def check() -> None:
    """Before a job starts.

    Raises:
        UnsupportedError: MLflow is not installed, or cannot be imported.
    """
    with needed("mlflow", "mlflow", "log.mlflow"):
        import mlflow  # noqa: F401  # pyright: ignore[reportMissingImports]


class MlflowLog:
    """Tells MLflow of one start of a run; a run that is resumed goes on with the one that MLflow has of it. Use it as a context.

    Args:
        begun: steps that were taken before.
        note: tells the user something; called from another thread.
        settings: by their names.
    """

    def __init__(
        self, folder: Path, config: MlflowConfig, begun: int, note: Callable[[str], None], settings: Mapping[str, Any]
    ) -> None:
        check()
        import mlflow  # pyright: ignore[reportMissingImports]

        self._folder, self._config, self._resumes, self._note = folder, config, begun > 0, note
        self._settings = dict(settings)
        # What the caller's thread has chosen, in a notebook say; the thread below would not see it.
        self._uri = config.tracking_uri or mlflow.get_tracking_uri()
        active = mlflow.active_run()
        self._parent = active.info.run_id if active is not None else None
        self._experiment = active.info.experiment_id if active is not None and config.experiment is None else None
        self._waiting: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._lost = threading.Event()
        self._thread = threading.Thread(target=self._tell, name="mlflow", daemon=True)

    def __enter__(self) -> MlflowLog:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        ended = "FINISHED" if kind is None else "KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED"
        self._put(lambda client, run: client.set_terminated(run, ended))
        self._waiting.put(None)
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            self._note(f"mlflow: {_shown(self._uri)} has not taken all in {PATIENCE:.0f} s; what is left is not sent")

    def add(self, points: Sequence[tuple[int, str, float]]) -> None:
        """As `Tracker.add`."""
        self._put(_metrics(points))

    def finish(self, step: int, metrics: Mapping[str, float]) -> None:
        """As `Tracker.finish`."""
        self._put(_metrics([(step, f"final/{name}", value) for name, value in metrics.items()]))

    def _put(self, work: Work) -> None:
        if not self._lost.is_set():
            self._waiting.put(work)

    def _tell(self) -> None:
        try:
            from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]

            client = MlflowClient(self._uri)
            run = self._opened(client)
            while (work := self._waiting.get()) is not None:
                work(client, run)
        except Exception as error:  # of MLflow, of its store, of a server: none is worth a training
            self._lost.set()
            said = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]:.300}"
            self._note(f"mlflow: {_shown(self._uri)} is told no more of this run ({said}); training goes on")

    def _opened(self, client: MlflowClient) -> str:
        if self._resumes and (run := self._noted()) is not None:
            client.update_run(run, status="RUNNING")
            return run
        tags = {"mlflow.runName": self._config.run_name or self._folder.name, "mlflow.source.name": "shardembed train"}
        tags |= {"shardembed.run": str(self._folder.absolute()), "shardembed.version": __version__}
        tags |= {} if self._parent is None else {"mlflow.parentRunId": self._parent}
        run = client.create_run(self._experiment or _experiment(client, self._config.experiment or "shardembed"), tags=tags)
        found = run.info.run_id
        publish(self._folder / NOTED, json.dumps({"store": _digest(self._uri), "run_id": found}))
        _parameters(client, found, self._settings)
        return found

    def _noted(self) -> str | None:
        try:
            noted = plain_json.read(self._folder / NOTED)
            return noted["run_id"] if noted["store"] == _digest(self._uri) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


def _experiment(client: MlflowClient, name: str) -> str:
    found = client.get_experiment_by_name(name)
    return found.experiment_id if found is not None else client.create_experiment(name)


def _parameters(client: MlflowClient, run: str, settings: Mapping[str, Any]) -> None:
    from mlflow.entities import Param  # pyright: ignore[reportMissingImports]

    found = [Param(_name(name), str(value)[:CHARACTERS]) for name, value in settings.items()]
    for first in range(0, len(found), PARAMETERS):
        client.log_batch(run, params=found[first : first + PARAMETERS])


def _metrics(told: Sequence[tuple[int, str, float]]) -> Work:
    now = int(time.time() * 1000)

    def work(client: MlflowClient, run: str) -> None:
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        found = [Metric(_name(name), float(value), now, step) for step, name, value in told]
        for first in range(0, len(found), METRICS):
            client.log_batch(run, metrics=found[first : first + METRICS])

    return work


def _shown(uri: str) -> str:
    """Without whoever logs in there."""
    there = urlsplit(uri).netloc.rpartition("@")
    return uri.replace(f"{there[0]}@", "", 1) if there[1] else uri


def _digest(uri: str) -> str:
    return hashlib.sha256(uri.encode()).hexdigest()[:16]  # the address may hold a password, and the folder be given away


def _name(name: str) -> str:
    """Of recall@20, which MLflow would refuse: recall_at_20."""
    return re.sub(r"[^\w./ -]", "_", name.replace("@", "_at_"), flags=re.ASCII)
