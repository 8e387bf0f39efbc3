"""Exact top-k retrieval over a sharded table.

Every rank scores all ranks' queries against its even share of the rows, a chunk at a time, and keeps the best k; then each
query's owner picks the best of all. Rows come through the journey, so any layout works (columns that lie apart are put together
on the way), and the memory needed is a chunk of rows and a block of scores, never the table and never all scores.

Legend: Q this rank's queries, A the queries of all ranks, R ranks.
"""

from __future__ import annotations

import operator
import sys

import torch

from shardembed.comm.comm import Comm
from shardembed.config.scalars import within
from shardembed.errors import ConfigError, ShardEmbedError
from shardembed.inputs.ids import IdBatch
from shardembed.journey.journey import Journey
from shardembed.modules.by_id import gathered, speaker
from shardembed.tables.table_config import Feature, TableConfig
from shardembed.wire.header import Mode

CHUNK_ROWS = 65_536
# Elements of a block of scores. On the CPU 16 MiB in float32: larger blocks are given back to the system after each use, and their
# pages, cleared and mapped again for the next one, take longer than the scoring.
BLOCK_SCORES = {"cpu": 2**22, "cuda": 2**26}


def topk(
    journey: Journey, table: int, queries_QD: torch.Tensor, k: int, problem: ShardEmbedError | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores `[Q, k]`, ids `[Q, k]`) of the rows with the largest dot product with each query; ties by the lower id."""
    config, comm = journey.tables[table], journey.comm
    problem = problem or _problem(config, queries_QD, k)
    k = 0 if problem else operator.index(k)
    queries = 0 if problem else queries_QD.shape[0]
    keys = speaker(journey, table)
    slots = keys.census.living(keys.steps) if keys else None
    counts, living = journey.open_table_call(Mode.TOPK, table, problem, (queries, 0 if slots is None else slots.numel()), k)
    ids = None
    if keys is not None and slots is not None:
        if k > sum(living):
            raise ConfigError(f"k must be between 1 and {sum(living)}, the ids that live in table {config.name!r}, not {k}")
        ids = gathered(keys, slots, living, comm, only_ids=True).ids
    # The table's own compute dtype: the collection's other tables must not make its scores coarser.
    dtype = torch.float64 if config.dtype == torch.float64 else torch.float32
    all_AD = _gather(queries_QD.to(journey.device, dtype), counts, comm)
    scores_AK, ids_AK = _best_of_share(journey, table, all_AD, k, ids)
    sizes = [count * k for count in counts]
    mine = [queries * k] * comm.world_size
    scores = comm.all_to_all("forward", "topk: scores", scores_AK.reshape(-1), sizes, mine)
    ids = comm.all_to_all("forward", "topk: ids", ids_AK.reshape(-1), sizes, mine)
    shape = (comm.world_size, queries, k)
    scores_QC, ids_QC = (part.view(shape).transpose(0, 1).reshape(shape[1], comm.world_size * k) for part in (scores, ids))
    return _first(scores_QC, ids_QC, k)


def _problem(config: TableConfig, queries_QD: torch.Tensor, k: int) -> ShardEmbedError | None:
    if not isinstance(queries_QD, torch.Tensor):
        return ConfigError(f"queries must be a tensor [Q, {config.embedding_dim}], not {type(queries_QD).__name__}")
    if queries_QD.dim() != 2 or queries_QD.shape[1] != config.embedding_dim:
        return ConfigError(f"queries must be [Q, {config.embedding_dim}] for table {config.name!r}, not {list(queries_QD.shape)}")
    most = config.num_embeddings if config.dynamic is None else sys.maxsize  # how many live is known when all have told
    if within(k, 1, most) is None:
        return ConfigError(f"k must be between 1 and {most}, the rows of table {config.name!r}, not {k!r}")
    return None


def _gather(queries_QD: torch.Tensor, counts: list[int], comm: Comm) -> torch.Tensor:
    """All ranks' queries."""
    columns = queries_QD.shape[1]
    send = queries_QD.reshape(-1).repeat(comm.world_size)
    sizes = [count * columns for count in counts]
    received = comm.all_to_all("forward", "topk: queries", send, [queries_QD.numel()] * comm.world_size, sizes)
    return received.view(sum(counts), columns)


def _best_of_share(
    journey: Journey, table: int, all_AD: torch.Tensor, k: int, living: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best k of this rank's share of the rows for every query; -inf and an id that none is above where the share is smaller.

    Args:
        living: the ids that have a row, ascending; None where these are row numbers.
    """
    comm = journey.comm
    rows = journey.tables[table].num_embeddings if living is None else living.numel()
    share = -(-rows // comm.world_size)
    first, last = min(comm.rank * share, rows), min((comm.rank + 1) * share, rows)
    scores = all_AD.new_full((all_AD.shape[0], k), -torch.inf)
    ids = torch.full((all_AD.shape[0], k), rows if living is None else sys.maxsize, dtype=torch.int64, device=all_AD.device)
    feature = Feature("topk", table, None)
    for begin in range(0, share, CHUNK_ROWS):  # as often on every rank: the fetch is collective
        chunk = torch.arange(min(first + begin, last), min(first + begin + CHUNK_ROWS, last), device=all_AD.device)
        chunk = chunk if living is None else living[chunk]
        batch = IdBatch.of({"topk": chunk}, [feature], journey.device)
        vectors = journey.forward(lambda batch=batch: batch, [feature], as_they_are=True).each[0].to(all_AD.dtype)
        step = max(1, BLOCK_SCORES.get(all_AD.device.type, 2**22) // max(1, len(chunk)))
        for start in range(0, len(all_AD), step):
            part = slice(start, start + step)
            found, at = _best(all_AD[part] @ vectors.t(), min(k, len(chunk)))
            merged = torch.cat([scores[part], found], 1), torch.cat([ids[part], chunk[at]], 1)
            scores[part], ids[part] = _first(*merged, k)
    return scores, ids


def _first(scores: torch.Tensor, ids: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of each row and their ids, best first; ties by the lower id, however the candidates came."""
    order = ids.argsort(1)
    top, at = _best(scores.gather(1, order), k)
    return top, ids.gather(1, order.gather(1, at))


def _best(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of each row and their columns, best first; ties by the lower column."""
    # torch.topk breaks ties as it likes. One place more tells where that matters: in few rows, most of the time.
    top, at = scores.topk(min(k + 1, scores.shape[1]), 1)
    chosen = at[:, :k]
    if k < scores.shape[1]:
        tied = (top[:, k - 1] == top[:, k]).nonzero().squeeze(1)
        if len(tied):
            chosen[tied] = _lowest(scores[tied], top[tied, k - 1 : k], k)
    chosen = chosen.sort(1).values
    top, order = scores.gather(1, chosen).sort(dim=1, descending=True, stable=True)
    return top, chosen.gather(1, order)


def _lowest(scores: torch.Tensor, last: torch.Tensor, k: int) -> torch.Tensor:
    """Columns of what is better than the k-th best score `last` `[rows, 1]`, and as many of the lowest that equal it as make k."""
    better, equal = ~(scores <= last), scores == last  # nan counts as better, as in torch.topk
    chosen = better | (equal & (equal.cumsum(1) <= k - better.sum(1, keepdim=True)))
    return chosen.nonzero()[:, 1].view(len(scores), k)
