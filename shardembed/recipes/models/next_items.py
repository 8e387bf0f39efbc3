"""Exact retrieval for a trained sequential model: the k items that are likeliest to come next for each user."""

from __future__ import annotations

import numpy as np
import torch

from shardembed.recipes.data.numbering import Numbers
from shardembed.recipes.data.sequences import Sequences
from shardembed.recipes.models.index import Found
from shardembed.recipes.models.sasrec import Sasrec

BATCH_POSITIONS = 1 << 18  # of all ranks together, which bounds the memory of the layers


class NextItems:
    """Searches the item table, where it lies, for what comes after a user's training sequence. Collective to build and to search.

    numbers: of items by their ids, where the table takes any: then ids that live are found. met: how many items of each user are
        known by then; None: those of training.

    Attributes:
        most_users: of all ranks together, to be searched for at once.
    """

    def __init__(
        self, model: Sasrec, data: Sequences, max_length: int, numbers: Numbers | None = None, met: np.ndarray | None = None
    ) -> None:
        self._found = Found.of(None if numbers is None else model.tables.ids("item"), numbers)
        self._model, self._data, self._max_length, self._met = model, data, max_length, met
        self.most_users = max(1, BATCH_POSITIONS // max_length)

    @torch.no_grad()
    def topk(self, users: torch.Tensor, k: int) -> torch.Tensor:
        """The k best items of each of this rank's `users` `[Q]`, best first: int64 `[Q, k]`. Collective; Q may differ and be 0."""
        return self._found.topk(self._model.tables, self.query_vectors_of(users), k)

    def query_vectors_of(self, users: torch.Tensor) -> torch.Tensor:
        """What the score of users `[Q]` is made of, after their training sequences: float32 `[Q, D]`. Collective."""
        taken, counts = self._data.last(users.numpy(), self._max_length, self._met)
        return self._model.query_vectors_of(torch.from_numpy(taken), torch.from_numpy(counts))
