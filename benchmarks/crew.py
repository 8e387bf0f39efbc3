"""The ranks of one contender: processes of their own, which wait until the command that started them tells them to do something.

Between its turns a contender is stopped, and so takes nothing from the others: Gloo's threads look around a hundred times a second.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from benchmarks.tasks import Batch, Task
from shardembed.comm import lifeline

BATCHES = 4  # that every contender steps through, again and again
PRELOADED = (
    "benchmarks.tied",
    "benchmarks.roster",
)  # what is imported once, in a process that all ranks are forks of; peers import theirs later
Found = TypeVar("Found")


@dataclass(frozen=True)
class Contender:
    """A training step on this rank, as a user writes it.

    Attributes:
        step: forward, what a model does to the vectors, backward, update, `zero_grad`.
        batches: what `step` takes: raw tensors.
        ahead: gives batches as the model's call takes them, for steps whose ids are sent while the step before computes.
        emb: our collection, where it is ours.
    """

    step: Callable[[Any], object]
    batches: Sequence[Any]
    ahead: Callable[[Sequence[Any]], Any] | None = None
    emb: Any = None


Make = Callable[[Sequence[Batch]], "Contender | str"]  # picklable; the text says why it does not take part


class CrewError(Exception):
    """A contender does not take part, or a rank of it failed. args: the reason in a line, and where it failed."""


@dataclass
class Crew:
    """Started by `start`.

    Attributes:
        store: where the ranks met, and make groups later; one rank needs none.
        processes: of the ranks.
        words: a pipe to each rank.
    """

    store: dist.TCPStore | None
    processes: list[Any] = field(default_factory=list)
    words: list[Any] = field(default_factory=list)

    @staticmethod
    def start(make: Make, task: Task, ranks: int) -> Crew:
        """A process a rank, each with its step built and tried once.

        Raises:
            CrewError: it cannot take part.
        """
        # One rank is started without a job, as a user starts it.
        crew = Crew(dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if ranks > 1 else None)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        try:
            for rank in range(ranks):
                mine, theirs = context.Pipe()
                job = _job(rank, ranks, crew.store.port) if crew.store else {}
                process = context.Process(target=_serve, args=(theirs, job, make, task), daemon=True)
                process.start()
                theirs.close()
                crew.processes.append(process)
                crew.words.append(mine)
            crew._answers()
        except BaseException:
            crew.close()
            raise
        return crew

    def do(self, action: Callable[..., Found], *given: Any) -> list[Found]:
        """What a function of a contender, one that can be found by its name, returns on every rank, which all run it at once.

        Raises:
            CrewError: a rank failed.
        """
        try:
            for process, words in zip(self.processes, self.words, strict=True):
                os.kill(process.pid, signal.SIGCONT)
                words.send((action, given))
        except OSError as error:  # the system was short of memory, for example
            raise CrewError(f"a rank has ended: {error}", "") from error
        return self._answers()

    def _answers(self) -> list[Any]:
        found: dict[int, Any] = {}
        while len(found) < len(self.words):
            # Whoever fails is heard first: the others may wait for it for ever.
            for words in wait([words for i, words in enumerate(self.words) if i not in found]):
                try:
                    answer = cast(Connection, words).recv()
                except EOFError:
                    answer = CrewError("a rank ended without a word", "")
                if isinstance(answer, CrewError):
                    raise answer
                found[self.words.index(words)] = answer
        for process in self.processes:
            os.kill(process.pid, signal.SIGSTOP)
        return [found[rank] for rank in range(len(self.words))]

    def close(self) -> None:
        """Its memory is free when this returns."""
        for process in self.processes:
            process.kill()
        for process, words in zip(self.processes, self.words, strict=False):
            process.join()
            words.close()


def _job(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank."""
    job = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    job |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True", "GLOO_SOCKET_IFNAME": "lo"}
    return {name: str(value) for name, value in job.items()}


def _serve(words: Connection, job: dict[str, str], make: Make, task: Task) -> None:
    """A rank: builds its step, then does what it is told."""
    lifeline.end_with(os.getppid())  # it is stopped most of the time, and then sees nobody leave
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command ends its ranks
    os.dup2(2, 1)  # what libraries print is no part of the page
    os.environ.update(job)
    logging.disable(logging.WARNING)  # what libraries say on their way is not about the figures
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        made = make(task.batches(int(job.get("RANK", 0)), BATCHES))
        if isinstance(made, str):
            raise CrewError(made, "")
        made.step(made.batches[0])
        words.send(None)
        while True:
            action, given = words.recv()
            words.send(action(made, *given))
    except CrewError as error:
        words.send(error)
    except Exception as error:  # whatever another library raises for what it cannot do
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        words.send(CrewError(reason, traceback.format_exc()))
