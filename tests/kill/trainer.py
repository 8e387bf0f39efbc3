"""A training job that saves as it goes and resumes by itself, and what it ends with, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import shardembed as se
from shardembed.checkpoint.save import finish_pending
from shardembed.comm import diagnosis
from tests.held import Piece, pieces, whole
from tests.kill.trap import Point, Trap
from tests.ranks.living import Held, living
from tests.ranks.living import whole as together

SAMPLES, IDS, WIDTH = 12, 3, 8  # of a global batch; ids a bag
BATCHES, EVERY, KEEP = 8, 2, 2
FINE = 2.0**24  # gradients in whole numbers of this have the same sum in every order
TABLES = {"user": 40, "item": 30, "shop": 20, "tag": 10}
SEEN, STEP = 60, 0x9E3779B97F4A7C1  # different ids of the dynamic table, and from one to the next

Mode = Literal["full", "async", "incremental", "twice"]  # how checkpoints are saved; twice: each is saved again at once


@dataclass(frozen=True)
class Run:
    """folder: of checkpoints. exact: the same bits on any number of ranks; else DistributedDataParallel, dropout and clipping,
    which are the same on the same number. batches: where it ends. timeout: of collectives. keep: of how many steps checkpoints
    stay. back: it goes on from the checkpoint of that many batches, and not from the newest.
    """

    folder: Path
    mode: Mode = "full"
    exact: bool = False
    batches: int = BATCHES
    timeout: float = 20.0
    keep: int = KEEP
    back: int | None = None


@dataclass
class Finished:
    """What a rank ends with. tables: what lies here of them and their state. living: likewise of dynamic ones. small: the rest, by
    name. events: see `Trap`.
    """

    resumed: int | None
    trained: list[int]
    tables: list[Piece]
    living: Held
    small: dict[str, Any]
    events: list[tuple[int, int, str]] = field(default_factory=list)


class Net(nn.Module):
    """A table under every kind of layout, a dynamic one that is full after the first batches, and a dense head."""

    def __init__(self, exact: bool) -> None:
        super().__init__()
        adagrad, adam = se.optim.RowwiseAdagrad(lr=0.1), se.optim.Adam(lr=0.05)
        self.tables = se.EmbeddingCollection(
            [
                *(se.TableConfig(name, rows, WIDTH) for name, rows in TABLES.items()),
                se.TableConfig("seen", 20, WIDTH, dynamic=se.Dynamic(se.LRU(), se.MinCount(2))),
            ],
            optimizer={"user": adagrad, "item": adam, "shop": adagrad, "tag": adam, "seen": adam},
            plan={
                "user": se.row_wise(strided=False),
                "item": se.row_wise(),
                "shop": se.column_wise(),
                "tag": se.replicated(),
                "seen": se.column_wise(),
            },
            deterministic=exact,
            gradient_reduction="sum" if exact else "mean",
            seed=3,
        )
        torch.manual_seed(5)
        dropout = nn.Identity() if exact else nn.Dropout(0.2)
        self.head = nn.Sequential(nn.Linear(WIDTH * (len(TABLES) + 1), 6), nn.ReLU(), dropout, nn.Linear(6, 1))

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return losses(self.head(torch.cat(list(self.tables(batch).values()), dim=1))).mean()


def losses(outputs: torch.Tensor) -> torch.Tensor:
    return (outputs - 1).square().sum(1)


def batch_of(number: int, rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """This rank's part of a global batch."""
    seed = torch.Generator().manual_seed(1000 + number)
    whole = {name: torch.randint(0, rows, (SAMPLES, IDS), generator=seed) for name, rows in TABLES.items()}
    whole["seen"] = torch.randint(0, SEEN, (SAMPLES, IDS), generator=seed) * STEP
    return {name: ids[rank * SAMPLES // world_size : (rank + 1) * SAMPLES // world_size] for name, ids in whole.items()}


def train_exactly(model: Net, batch: dict[str, torch.Tensor]) -> None:
    """Gradients of one global batch, with the same bits however it is spread: sample by sample, summed in whole numbers."""
    outputs = model.tables(batch)
    parameters = list(model.head.parameters())
    sums = [torch.zeros(parameter.shape, dtype=torch.int64) for parameter in parameters]
    slopes = []
    for sample in range(len(next(iter(batch.values())))):
        inputs = torch.cat([output[sample : sample + 1].detach() for output in outputs.values()], dim=1).requires_grad_()
        slope, *grads = torch.autograd.grad(losses(model.head(inputs)).sum() / SAMPLES, [inputs, *parameters])
        slopes.append(slope)
        for total, grad in zip(sums, grads, strict=True):
            total += (grad * FINE).round().long()
    for parameter, total in zip(parameters, sums, strict=True):
        if dist.is_initialized():
            dist.all_reduce(total)
        parameter.grad = total.to(torch.float32) / FINE
    torch.autograd.backward(list(outputs.values()), list(torch.cat(slopes).split(WIDTH, dim=1)))


def train(rank: int, world_size: int, run: Run, point: Point | None) -> Finished:
    """Train to the end from wherever the newest checkpoint is, unless the point is met before."""
    diagnosis.REPORT_SECONDS, diagnosis.STORE_SECONDS = 0.3, 0.7  # the rank that is killed will not report
    with Trap(rank, run.folder, point).set() as trap:
        return _train(rank, world_size, run, trap)


def _train(rank: int, world_size: int, run: Run, trap: Trap) -> Finished:
    comm = se.init(timeout=run.timeout)
    model = Net(run.exact)
    dense = torch.optim.AdamW(model.parameters(), lr=0.05)
    optimizer = se.Optimizer(model, dense, on_nonfinite="raise")
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
    wrapped: nn.Module = model
    if world_size > 1 and not run.exact:
        # Without it the buckets are rearranged after the first batch, be it the first of all or of a resumed run, and with them the
        # order in which three ranks' gradients are summed.
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    model.head[0].weight.register_hook(lambda _: trap.pass_by("dense backward"))
    dense.register_step_pre_hook(lambda *_: trap.pass_by("dense step"))
    torch.manual_seed(rank)  # dropout differs between ranks, and goes on as it was when a run is resumed
    first, resumed, trained = 0, None, []
    if se.newest_checkpoint(run.folder) is not None:
        # Steps are those of the optimizer, of which each batch takes one.
        restored = se.load_checkpoint(run.folder, model, optimizer=optimizer, scheduler=scheduler, step=run.back)
        first = resumed = restored.progress["batches"]
    for number in se.synced(range(first, run.batches), comm):
        trap.batch = number
        batch = batch_of(number, rank, world_size)
        if run.exact:
            train_exactly(model, batch)
        else:
            wrapped(batch).backward()
            se.clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        trained.append(number)
        if (number + 1) % EVERY == 0:
            save(run, model, optimizer, scheduler, number + 1, trap)
    finish_pending()
    return Finished(resumed, trained, *state_of(model, optimizer, scheduler), trap.events)


def save(run: Run, model: Net, optimizer: se.Optimizer, scheduler: Any, batches: int, trap: Trap) -> None:
    keywords: dict[str, Any] = {"optimizer": optimizer, "scheduler": scheduler, "progress": {"batches": batches}, "keep": run.keep}
    finish_pending()  # so that the events of two saves are told apart
    trap.save = batches
    if run.mode == "twice":
        se.save_checkpoint(run.folder, model, **keywords)
    if run.mode == "async":
        se.async_save_checkpoint(run.folder, model, **keywords)
    else:
        se.save_checkpoint(run.folder, model, **keywords, incremental=run.mode == "incremental")


def state_of(model: Net, optimizer: se.Optimizer, scheduler: Any) -> tuple[list[Piece], Held, dict[str, Any]]:
    """Everything that training goes on from."""
    assert optimizer.dense is not None
    small: dict[str, Any] = {name: value.detach().numpy().tobytes() for name, value in model.head.named_parameters()}
    for number, state in enumerate(optimizer.dense.state.values()):
        small.update({f"{number}.{name}": value.numpy().tobytes() for name, value in state.items()})
    small["scheduler"] = scheduler.state_dict()
    small["rates"] = [group["lr"] for group in optimizer.param_groups]
    small["steps"] = model.tables.journey.steps
    small["random"] = torch.get_rng_state().numpy().tobytes()
    return pieces(model.tables), living(model.tables), small


def state_of_all(ended: list[Finished], random: bool) -> dict[str, Any]:
    """The state of all ranks together, the same for every number of ranks and plan; `random`: with each rank's random state."""
    tables = whole(finished.tables for finished in ended)
    found: dict[str, Any] = {name: table.numpy().tobytes() for name, table in tables.items()}
    for what, values in together([finished.living for finished in ended])["seen"].items():
        found[f"seen: {what}"] = {id_: torch.as_tensor(values[id_]).numpy().tobytes() for id_ in sorted(values)}
    for rank, finished in enumerate(ended):
        small = dict(finished.small)
        mine = small.pop("random")
        if random:
            found[f"random state of rank {rank}"] = mine
        for name, value in small.items():
            assert found.setdefault(name, value) == value, f"{name} differs between ranks"
    return found


def warm_up() -> None:
    """Let this process load what a run needs."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for mode in ("full", "incremental"):
            train(0, 1, Run(Path(folder), mode, exact=mode == "full", batches=4), None)
    from shardembed.comm import comm

    comm._known.clear()
