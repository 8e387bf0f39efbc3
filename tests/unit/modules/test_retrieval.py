"""Exact retrieval in small pieces: chunks of rows and blocks of scores leave no trace in what is found."""

from __future__ import annotations

import pytest
import torch

import shardembed as se
from shardembed.modules import retrieval

ROWS, COLUMNS = 50, 3


def brute_force(scores_QN: torch.Tensor, k: int) -> torch.Tensor:
    """Ids by falling score, of equals the lower one first."""
    return scores_QN.sort(dim=1, descending=True, stable=True).indices[:, :k]


@pytest.mark.parametrize(("chunk", "block"), [(1, 1), (7, 20), (16, 1 << 22), (50, 60), (1 << 16, 1 << 22)])
@pytest.mark.parametrize("k", [1, 6, 16, 50])
@pytest.mark.parametrize("values", [1, 2, 5])  # how many different numbers there are: of 1 all rows are alike
def test_any_chunks_and_blocks_find_the_same_ties_included(
    monkeypatch: pytest.MonkeyPatch, chunk: int, block: int, k: int, values: int
) -> None:
    monkeypatch.setattr(retrieval, "CHUNK_ROWS", chunk)
    monkeypatch.setattr(retrieval, "BLOCK_SCORES", {"cpu": block})
    emb = se.EmbeddingCollection([se.TableConfig("item", ROWS, COLUMNS)], optimizer=se.optim.SGD())
    weight_ND = torch.randint(values, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(values)).float()
    emb.load_rows("item", weight_ND)
    queries_QD = torch.randint(-2, 3, (9, COLUMNS), generator=torch.Generator().manual_seed(k)).float()
    scores_QK, ids_QK = emb.topk(queries_QD, k, "item")
    expected = brute_force(queries_QD @ weight_ND.t(), k)
    assert torch.equal(ids_QK, expected)
    assert torch.equal(scores_QK, (queries_QD @ weight_ND.t()).gather(1, expected))


def test_nan_counts_as_the_best_score_as_in_torch() -> None:
    nan = torch.nan
    scores, columns = retrieval._best(torch.tensor([[5.0, nan, 5.0, 5.0, nan], [nan, 1.0, 1.0, 0.0, 0.0]]), 3)
    assert torch.equal(columns, torch.tensor([[1, 4, 0], [0, 1, 2]]))
    assert scores.isnan().tolist() == [[True, True, False], [True, False, False]]
