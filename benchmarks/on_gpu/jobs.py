"""Whole training steps: ahead of the compute on one rank, of ranks that share a GPU over Gloo, and of ranks over NCCL."""

from __future__ import annotations

import multiprocessing
import os
import queue
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

import shardembed as se
from benchmarks.on_gpu.check import Here, NotSeenError

CPU = torch.device("cpu")
TABLES = [
    se.TableConfig("bags", 3000, 32, feature_names=["bags", "list"], pooling={"bags": "sum", "list": None}),
    se.TableConfig("columns", 2000, 64, pooling="mean"),
    se.TableConfig("copies", 6000, 24),
]
ROWS = {"bags": 3000, "list": 3000, "columns": 2000, "copies": 6000}
PLAN = {"bags": se.row_wise(packing="bag"), "columns": se.column_wise(), "copies": se.replicated()}
STEPS = 4
GLOO, NCCL = "gloo", "cpu:gloo,cuda:nccl"  # backends
SECONDS = 120.0
Loop = Callable[[Iterable[Any], se.EmbeddingCollection], Iterable[Any]]
Weights = list[torch.Tensor]
Work = Callable[[int, Here], dict[str, float]]  # of a rank


def plainly(loader: Iterable[Any], emb: se.EmbeddingCollection) -> Iterable[Any]:
    return loader


def ahead(loader: Iterable[Any], emb: se.EmbeddingCollection) -> Iterable[Any]:
    return se.prefetched(loader, emb)


def train(device: torch.device, loop: Loop, rank: int, kernel: str, samples: int, sent_from: torch.device = CPU) -> Weights:
    """Whole tables after some steps with clipping. The GPU is kept busy, so that its streams are far apart."""
    emb = se.EmbeddingCollection(TABLES, optimizer=se.optim.RowwiseAdagrad(0.1), plan=PLAN, device=device, kernel=kernel)  # pyright: ignore[reportArgumentType]
    optimizer = se.Optimizer(emb)
    busy = torch.ones(2000, 2000, device=device) if device.type == "cuda" else torch.ones(2, 2)

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        for step in range(STEPS):
            seed = torch.Generator().manual_seed(10 * step + rank)
            yield {name: torch.randint(rows, (samples, 4), generator=seed).to(sent_from) for name, rows in ROWS.items()}

    for batch in loop(batches(), emb):
        for _ in range(10):
            busy = (busy @ busy).clamp_(max=1.0)
        torch.stack([output.square().sum() for output in emb(batch).values()]).sum().backward()
        se.clip_grad_norm_(emb, 100.0)
        optimizer.step()
    return [emb.rows(table.name, torch.arange(table.num_embeddings)).cpu() for table in TABLES]


def far(found: Weights, wanted: Weights) -> float:
    """The largest difference between two runs; nan where there is one in any table, which Python's own maximum would pass over."""
    return float(torch.stack([(one - other).abs().max() for one, other in zip(found, wanted, strict=True)]).max())


def run(device: torch.device, rank: int, small: bool) -> dict[str, float]:
    """How far each way to train on the device ends from the CPU's plain torch."""
    samples, kernel = (8, "triton") if small else (256, "auto")
    wanted = train(CPU, plainly, rank, "reference", samples)
    found = {"plain": far(train(device, plainly, rank, kernel, samples), wanted)}
    found["ids on the device"] = far(train(device, plainly, rank, kernel, samples, device), wanted)
    if not small:  # a thread of its own, in which the interpreter is not at home
        found["prefetched"] = far(train(device, ahead, rank, kernel, samples), wanted)
        found["prefetched, ids on the device"] = far(train(device, ahead, rank, kernel, samples, device), wanted)
    return found


def said(found: dict[str, float]) -> Iterator[str]:
    """Lines; an error where a run ended elsewhere. Sums have another order there, and rowwise Adagrad divides by small ones."""
    for name, largest in found.items():
        yield f"{name}: weights differ from the CPU's by {largest:.2g} at most"
        assert largest < 1e-3, f"{name}: weights differ by {largest:.3g}"


def one_rank(here: Here) -> Iterator[str]:
    yield from said(run(here.device, 0, here.small))


def over_gloo(here: Here) -> Iterator[str]:
    """Two ranks on the first GPU. NCCL would refuse them."""
    for rank, found in enumerate(ranks(2, _shared, here, GLOO)):
        yield from (f"rank {rank}, {line}" for line in said(found))


def over_nccl(here: Here) -> Iterator[str]:
    """Its calls with nothing in them, of every dtype that travels; and where there are GPUs for it, whole jobs."""
    if here.gpus < 2:
        ranks(1, _calls, here, NCCL)
        yield "all-to-all of nothing and of something, of every dtype, and an all-reduce, on one rank"
        raise NotSeenError("ranks over NCCL: it takes one rank a GPU, and there is one GPU")
    for rank, found in enumerate(ranks(min(4, here.gpus), _apart, here, NCCL)):
        yield from (f"rank {rank}, {line}" for line in said(found))


def _shared(rank: int, here: Here) -> dict[str, float]:
    return run(here.device, rank, here.small)


def _apart(rank: int, here: Here) -> dict[str, float]:
    _calls(rank, here)
    return run(torch.device("cuda", rank), rank, False)


def _calls(rank: int, here: Here) -> dict[str, float]:
    make_calls(rank, torch.device("cuda", rank), "nccl")
    return {}


def make_calls(rank: int, device: torch.device, backend: str) -> None:
    """The collectives that tensors on a device go through. Collective."""
    group, options = dist.new_group(backend=backend), dist.AllToAllOptions()
    assert isinstance(group, dist.ProcessGroup)
    for dtype in (torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for count in (0, 5):
            sent = torch.arange(count * group.size(), device=device).to(dtype)
            found, sizes = torch.empty_like(sent), [count] * group.size()
            group.alltoall_base(found, sent, sizes, sizes, options).wait()
            wanted = torch.arange(count * rank, count * (rank + 1), device=device).to(dtype).repeat(group.size())
            assert torch.equal(found, wanted), f"an all-to-all of {count} {dtype}"
    ones = torch.ones(40, device=device, dtype=torch.float64)
    dist.all_reduce(ones, group=group)
    assert (ones == group.size()).all(), "an all-reduce"


def ranks(count: int, work: Work, here: Here, backend: str) -> list[dict[str, float]]:
    """What each of so many new processes answers."""
    context = multiprocessing.get_context("spawn")
    answers, store = context.Queue(), dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    arguments = (count, store.port, backend, work, here, answers)
    processes = [context.Process(target=_rank, args=(rank, *arguments), daemon=True) for rank in range(count)]
    for process in processes:
        process.start()
    found: dict[int, dict[str, float]] = {}
    try:
        while len(found) < count:
            rank, answer = answers.get(timeout=SECONDS)
            assert isinstance(answer, dict), f"rank {rank} of {count}: {answer}"
            found[rank] = answer
    except queue.Empty as error:
        raise AssertionError(f"rank(s) {sorted(set(range(count)) - set(found))} of {count} have not answered") from error
    finally:
        for process in processes:
            process.kill()
    return [found[rank] for rank in range(count)]


def _rank(rank: int, count: int, port: int, backend: str, work: Work, here: Here, answers: Any) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        if backend == NCCL:
            torch.cuda.set_device(rank)
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        dist.init_process_group(backend, store=store, rank=rank, world_size=count)
        answer: dict[str, float] | str = work(rank, here)
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"
    answers.put((rank, answer))
    answers.close()
    answers.join_thread()
    os._exit(0)  # without leaving the groups: others may still need what this rank holds open
