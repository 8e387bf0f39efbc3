"""Scenarios in which ranks go different ways, each on process groups of its own with a short time limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

import shardembed as se
from shardembed import errors

TIMEOUT = 1.5  # of what is waited for; whether ranks disagree must not hang on how fast they are
PATIENCE = 60.0
TABLES = [se.TableConfig("item", 40, 4), se.TableConfig("user", 30, 6)]
CUT, COPIED = se.row_wise(), se.replicated()
SAME_CALLS = "Every rank must make the same calls in the same order"


@dataclass
class Job:
    """A training job on groups of its own."""

    rank: int
    group: Any
    modules: dict[str, se.EmbeddingCollection] = field(default_factory=dict)
    optimizers: dict[str, se.Optimizer] = field(default_factory=dict)

    def build(self, name: str = "main", plan: Any = CUT, tables: Any = TABLES, **settings: Any) -> se.EmbeddingCollection:
        deterministic = settings.pop("deterministic", False)
        optimizer = se.optim.Adagrad()
        emb = se.EmbeddingCollection(tables, plan=plan, optimizer=optimizer, process_group=self.group, deterministic=deterministic)
        self.modules[name], self.optimizers[name] = emb, se.Optimizer(emb, **settings)
        return emb

    @property
    def comm(self) -> se.Comm:
        return se.Comm.of(self.group)

    def forward(self, name: str = "main") -> torch.Tensor:
        emb = self.modules[name]
        ids = {table.name: torch.arange(6) + self.rank for table in emb.tables}
        return torch.stack([output.sum() for output in emb(ids).values()]).sum()

    def step(self, name: str = "main") -> None:
        self.optimizers[name].step()
        self.optimizers[name].zero_grad()

    def train(self, name: str = "main") -> None:
        self.forward(name).backward()
        self.step(name)

    def evaluate(self) -> None:
        with torch.no_grad():
            self.forward()


@dataclass(frozen=True)
class Scenario:
    """What rank 0 does, what the others do, and what all of them hear of it."""

    odd: Callable[[Job], object]
    others: Callable[[Job], object]
    error: type[errors.ShardEmbedError]
    says: list[str]
    settings: dict[str, Any] = field(default_factory=dict)


def in_turn(*calls: Callable[[Job], object]) -> Callable[[Job], None]:
    def run(job: Job) -> None:
        for call in calls:
            call(job)

    return run


def backward(job: Job) -> None:
    job.forward().backward()


def clip(job: Job) -> None:
    se.clip_grad_norm_(job.modules["main"], 1.0)


def next_batch(job: Job) -> None:
    next(iter(se.synced([0], job.comm)))


def rows(job: Job) -> None:
    job.modules["main"].rows("user", torch.arange(3))


def topk(k: int, table: str = "user", width: int = 6) -> Callable[[Job], object]:
    return lambda job: job.modules["main"].topk(torch.ones(2, width), k, table)


def second(job: Job) -> None:
    job.build("second", tables=TABLES[:1])


def first_of_two(job: Job) -> None:
    one, _ = job.forward(), job.forward()
    one.backward()


def second_of_two(job: Job) -> None:
    _, other = job.forward(), job.forward()
    other.backward()


def uses(number: int) -> Callable[[Job], object]:
    """Five forwards, of which the loss uses one."""
    return lambda job: [job.forward() for _ in range(5)][number].backward()


def two_modules(wanted: str, **settings: Any) -> Callable[[Job], None]:
    """Modules that are looked up alike, where the loss of a rank uses one."""

    def run(job: Job) -> None:
        job.build("second", tables=[se.TableConfig("other", 50, 9)], **settings)
        losses = {name: job.forward(name) for name in ("main", "second")}
        losses[wanted].backward()

    return run


def two_steps(wanted: str, tables: Any) -> Callable[[Job], None]:
    """Modules with copies that wait for their steps, where a rank makes one of them."""

    def run(job: Job) -> None:
        job.build("second", COPIED, tables)
        for name in ("main", "second"):
            job.forward(name).backward()
        job.step(wanted)
        job.forward()

    return run


def skip_norms(job: Job) -> None:
    backward(job)
    job.step()


DISAGREE, TIMED_OUT = errors.DisagreementError, errors.CollectiveError
COPIES = {"plan": COPIED}
SCENARIOS: dict[str, Scenario] = {
    "a forward without gradients": Scenario(
        Job.evaluate,
        Job.train,
        DISAGREE,
        ["rank 0 makes a forward in evaluation mode", "rank 1 makes a forward in training mode", "rank 0 cannot evaluate"],
    ),
    "rows": Scenario(rows, Job.train, DISAGREE, ["rank 0 makes rows()", "rank 1 makes a forward in training mode", SAME_CALLS]),
    "rows beside an evaluation": Scenario(
        rows, Job.evaluate, DISAGREE, ["rank 0 makes rows()", "rank 1 makes a forward in evaluation mode"]
    ),
    "topk": Scenario(topk(3), Job.train, DISAGREE, ["rank 0 makes topk()", "rank 1 makes a forward in training mode"]),
    "topk beside rows": Scenario(topk(3), rows, DISAGREE, ["rank 0 makes topk()", "rank 1 makes rows()"]),
    "topk with another k": Scenario(topk(3), topk(4), DISAGREE, ["k=3", "k=4"]),
    "topk of another table": Scenario(topk(3), topk(3, "item", 4), DISAGREE, ["k=3 and table number 1", "k=3 and table number 0"]),
    "another collection": Scenario(
        in_turn(second, lambda job: job.forward("second")),
        in_turn(second, Job.forward),
        DISAGREE,
        ["of collection 2 (item)", "of collection 1 (item, user)"],
    ),
    "a collection built alone": Scenario(second, Job.train, TIMED_OUT, ["agree on tables", "'forward: counts'"]),
    "one forward more": Scenario(
        in_turn(Job.forward, Job.train), Job.train, TIMED_OUT, ["'forward: counts'", "'backward: send gradients'"]
    ),
    "an evaluation at the end of an epoch": Scenario(
        in_turn(Job.train, Job.evaluate),
        in_turn(Job.train, next_batch),
        TIMED_OUT,
        ["'forward: counts'", "'synced: agree on the end of data'", "step 1"],
    ),
    "no backward": Scenario(
        in_turn(Job.forward, Job.train), in_turn(Job.train, Job.train), TIMED_OUT, ["'backward: send gradients'", "step 0"]
    ),
    "no step, cut tables": Scenario(
        in_turn(Job.train, backward, Job.forward),
        in_turn(Job.train, Job.train, Job.forward),
        DISAGREE,
        ["after 1 optimizer step(s), with gradients waiting", "after 2 optimizer step(s), without", "Optimizer.step()"],
    ),
    "no step, then the next batch": Scenario(
        in_turn(Job.train, backward, next_batch),
        in_turn(Job.train, Job.train, next_batch),
        DISAGREE,
        ["rank 0 is in stage 'synced", "step 1; rank 1 is in stage 'synced", "step 2. Every"],
    ),
    "no step, copied tables": Scenario(
        in_turn(Job.train, backward, Job.forward),
        in_turn(Job.train, Job.train),
        TIMED_OUT,
        ["'forward: counts'", "'step: reduce copies' (all_reduce, of collection 1: item, user)", "step 1"],
        COPIES,
    ),
    "zero_grad instead of a step": Scenario(
        in_turn(backward, lambda job: job.optimizers["main"].zero_grad(), Job.forward),
        in_turn(backward, Job.step, Job.forward),
        DISAGREE,
        ["after 0 optimizer step(s)", "after 1 optimizer step(s)"],
    ),
    "no zero_grad after an accumulation": Scenario(
        in_turn(backward, Job.forward),
        in_turn(backward, lambda job: job.optimizers["main"].zero_grad(), Job.forward),
        DISAGREE,
        ["with gradients waiting", "without gradients waiting"],
    ),
    "no clipping": Scenario(
        in_turn(skip_norms, next_batch),
        in_turn(backward, clip, Job.step),
        DISAGREE,
        ["rank 0 is in stage 'synced", "rank 1 is in stage 'clip_grad_norm_: sum norms'"],
    ),
    "no clipping, then a forward": Scenario(
        in_turn(skip_norms, Job.forward), in_turn(backward, clip), TIMED_OUT, ["'forward: counts'", "'clip_grad_norm_: sum norms'"]
    ),
    "no clipping before a check of gradients": Scenario(
        skip_norms,
        in_turn(backward, clip),
        DISAGREE,
        ["rank 0 is in stage 'step: agree that gradients are finite'", "rank 1 is in stage 'clip_grad_norm_"],
        {"on_nonfinite": "skip"},
    ),
    "no clipping of copies": Scenario(
        skip_norms,
        in_turn(backward, clip),
        TIMED_OUT,
        ["'step: agree that gradients are finite'", "'step: reduce copies'"],
        {"on_nonfinite": "skip", "plan": COPIED},
    ),
    "a loss of the first of two calls": Scenario(
        first_of_two, second_of_two, TIMED_OUT, ["'backward: send gradients' (all_to_all, of forward call 1)", "of forward call 2)"]
    ),
    "a loss of one module, the others' of another": Scenario(
        two_modules("main"), two_modules("second"), TIMED_OUT, ["of forward call 1)", "of forward call 2)"]
    ),
    "the same in deterministic mode": Scenario(
        two_modules("main", deterministic=True),
        two_modules("second", deterministic=True),
        TIMED_OUT,
        ["of forward call 1)", "of forward call 2)"],
        {"deterministic": True},
    ),
    "a loss of a call that lies far from the others'": Scenario(
        in_turn(uses(0), clip), in_turn(uses(4), clip), DISAGREE, ["all ranks came to stage 'clip_grad_norm_", "not by the same"]
    ),
    "the same before a forward": Scenario(
        in_turn(uses(0), Job.forward), in_turn(uses(4), Job.forward), DISAGREE, ["They did not make the same calls before"]
    ),
    "a step of one module, the others' of another": Scenario(
        two_steps("main", [se.TableConfig("other", 50, 9)]),
        two_steps("second", [se.TableConfig("other", 50, 9)]),
        TIMED_OUT,
        ["'step: reduce copies' (all_reduce, of collection 1: item, user)", "(all_reduce, of collection 2: other)"],
        COPIES,
    ),
    "a step of one module, the others' of its twin": Scenario(
        two_steps("main", TABLES),
        two_steps("second", TABLES),
        TIMED_OUT,
        ["of collection 1: item, user)", "of collection 2:"],
        COPIES,
    ),
}


def some() -> list[str]:
    """All scenarios in which ranks disagree, and every third of those that take a time limit to notice."""
    slow = [name for name, scenario in SCENARIOS.items() if scenario.error is TIMED_OUT]
    return [name for name in SCENARIOS if name not in slow or slow.index(name) % 3 == 0]


Heard = dict[str, tuple[str, str]]


def hear(job: Job, scenario: Callable[[Job], object]) -> tuple[str, str]:
    """The error on this rank: class and text."""
    try:
        scenario(job)
    except errors.ShardEmbedError as error:
        return type(error).__name__, str(error)
    return "none", "no error"


def own_job(rank: int, world_size: int, timeout: float = TIMEOUT, **settings: Any) -> Job:
    job = Job(rank, dist.new_group(list(range(world_size))))
    se.Comm.of(job.group, timeout=timeout)
    job.build(**settings)
    return job


def warm_up(rank: int) -> None:
    """What a process does for the first time takes long; not within the time limits."""
    job = Job(rank, None)
    job.build()
    for _ in se.synced([0, 1]):
        backward(job)
        clip(job)
        job.step()
    topk(3)(job)


def play(rank: int, world_size: int, names: list[str]) -> Heard:
    warm_up(rank)
    heard = {}
    for name in names:
        scenario = SCENARIOS[name]
        timeout = TIMEOUT if scenario.error is TIMED_OUT else PATIENCE
        job = own_job(rank, world_size, timeout, **scenario.settings)
        heard[name] = hear(job, scenario.odd if rank == 0 else scenario.others)
    return heard
