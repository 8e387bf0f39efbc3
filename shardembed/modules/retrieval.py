"""Exact top-k retrieval over a sharded table.

Every rank scores all ranks' queries against its even share of the rows, a chunk at a time, and keeps the best k; then each
query's owner picks the best of all. Rows come through the journey, so any layout works (columns that lie apart are put together
on the way), and the memory needed is a chunk of rows and of scores, never the table.

Legend: Q this rank's queries, A the queries of all ranks, R ranks.
"""

from __future__ import annotations

import torch

from shardembed.errors import ConfigError
from shardembed.ids import IdBatch
from shardembed.journey import Journey
from shardembed.tables import Feature

CHUNK_ROWS = 65_536
CHUNK_SCORES = 2**25  # elements of a block of scores; 128 MiB in float32


def topk(journey: Journey, table: int, queries_QD: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores `[Q, k]`, ids `[Q, k]`) of the rows with the largest dot product with each query; ties by the lower id."""
    config, comm = journey.tables[table], journey.comm
    if queries_QD.dim() != 2 or queries_QD.shape[1] != config.embedding_dim:
        raise ConfigError(f"queries must be [Q, {config.embedding_dim}] for table {config.name!r}, not {list(queries_QD.shape)}")
    if not 1 <= k <= config.num_embeddings:
        raise ConfigError(f"k must be between 1 and {config.num_embeddings}, the rows of table {config.name!r}, not {k}")
    # The table's own compute dtype: the collection's other tables must not make its scores coarser.
    dtype = torch.float64 if config.dtype == torch.float64 else torch.float32
    all_AD, counts = _gather(journey, queries_QD.to(journey.device, dtype))
    scores_AK, ids_AK = _best_of_share(journey, table, all_AD, k)
    sizes = [count * k for count in counts]
    mine = [queries_QD.shape[0] * k] * comm.world_size
    scores = comm.all_to_all("forward", "topk: scores", scores_AK.reshape(-1), sizes, mine)
    ids = comm.all_to_all("forward", "topk: ids", ids_AK.reshape(-1), sizes, mine)
    shape = (comm.world_size, queries_QD.shape[0], k)
    scores_QC, ids_QC = (part.view(shape).transpose(0, 1).reshape(shape[1], comm.world_size * k) for part in (scores, ids))
    return _first(scores_QC, ids_QC, k)


def _gather(journey: Journey, queries_QD: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """All ranks' queries, and how many each has."""
    comm = journey.comm
    ones = [1] * comm.world_size
    own = torch.full((comm.world_size,), queries_QD.shape[0], dtype=torch.int64, device=journey.device)
    counts: list[int] = comm.all_to_all("forward", "topk: counts", own, ones, ones).tolist()
    columns = queries_QD.shape[1]
    send = queries_QD.reshape(-1).repeat(comm.world_size)
    received = comm.all_to_all(
        "forward", "topk: queries", send, [queries_QD.numel()] * comm.world_size, [count * columns for count in counts]
    )
    return received.view(sum(counts), columns), counts


def _best_of_share(journey: Journey, table: int, all_AD: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best k of this rank's share of the rows for every query; -inf and the id one past the last where the share is
    smaller.
    """
    rows, comm = journey.tables[table].num_embeddings, journey.comm
    share = -(-rows // comm.world_size)
    first, last = min(comm.rank * share, rows), min((comm.rank + 1) * share, rows)
    # Every rank makes the same number of calls: the fetch is collective.
    step = max(1, min(CHUNK_ROWS, CHUNK_SCORES // max(1, all_AD.shape[0])))
    scores = all_AD.new_full((all_AD.shape[0], k), -torch.inf)
    ids = torch.full((all_AD.shape[0], k), rows, dtype=torch.int64, device=all_AD.device)
    feature = Feature("topk", table, None)
    for begin in range(0, share, step):
        chunk = torch.arange(min(first + begin, last), min(first + begin + step, last), device=all_AD.device)
        batch = IdBatch.of({"topk": chunk}, [feature], journey.device)
        vectors = journey.forward(lambda batch=batch: batch, [feature], as_they_are=True)[0].to(all_AD.dtype)
        found = all_AD @ vectors.t()
        scores, ids = _first(torch.cat([scores, found], 1), torch.cat([ids, chunk.expand(found.shape)], 1), k)
    return scores, ids


def _first(scores: torch.Tensor, ids: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of each row, best first; ties by the lower id, however the candidates came."""
    # torch.topk breaks ties as it likes: sort the few that can matter by (score, id). Ties at the k-th place need all.
    top, at = scores.topk(k, 1)
    tied = (scores == top[:, -1:]).sum(1) > (top == top[:, -1:]).sum(1)
    if tied.any():
        order = torch.argsort(ids, dim=1, stable=True)
        at = order.gather(1, torch.argsort(scores.gather(1, order), dim=1, descending=True, stable=True))[:, :k]
        return scores.gather(1, at), ids.gather(1, at)
    chosen = ids.gather(1, at)
    order = torch.argsort(chosen, dim=1, stable=True)
    order = order.gather(1, torch.argsort(top.gather(1, order), dim=1, descending=True, stable=True))
    return top.gather(1, order), chosen.gather(1, order)
