"""The best items for users, exact: every item is scored, for several requests at once.

Legend: q requests, N items, D columns, L items of a history.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .files import Texts, mapped
from .ids import Refused, Rows, Table, id_of

BLOCK_ITEMS = 1 << 16  # scored at a time, which bounds memory
MOST_K, MOST_NAMES, MOST_ROWS = 1000, 10_000, 10_000  # of one request


@dataclass
class Asked:
    """One request.

    Attributes:
        k: items that are asked for.
        exclude: rows of items that are left out.
        user: row of the user; of two towers.
        history: ids of items, oldest first; of sequences.
    """

    k: int
    exclude: list[int] = field(default_factory=list)
    user: int = -1
    history: list[int] = field(default_factory=list)


class Retrieval:
    """Of two towers and of sequences.

    Attributes:
        items: vectors float32 `[N, D]`.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self._settings = settings
        self.items = mapped(folder / "item.npy")
        self._rows = Rows(folder, "item", len(self.items))
        self._names = Texts(folder, "item") if settings["item_texts"] else None
        self._ids = mapped(folder / "item.ids.npy") if (folder / "item.ids.npy").exists() else None
        if settings["kind"] == "two_tower":
            self._users: torch.Tensor | None = mapped(folder / "user.npy")
            self._user_rows = Rows(folder, "user", len(self._users))
            return
        self._users = None
        self._table = Table(folder, "item", settings)
        self._layers = torch.export.load(folder / "layers.pt2").module()

    def about(self) -> dict[str, Any]:
        return {"items": len(self.items), **({} if self._users is None else {"users": len(self._users)})}

    def read(self, asked: Any) -> Asked:
        """A request, checked.

        Raises:
            Refused: it cannot be answered.
        """
        if not isinstance(asked, dict):
            raise Refused("a request is a JSON object")
        keys = {"k", "exclude", "user" if self._users is not None else "history"}
        for name in asked:
            if name not in keys:
                raise Refused(f"there is no field {name!r}; the fields are {', '.join(sorted(keys))}")
        k = asked.get("k", 10)
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= MOST_K:
            raise Refused(f"k must be a whole number from 1 to {MOST_K}")
        exclude = [self._rows.find(number) for number in self._item_ids(asked.get("exclude", []), "exclude")]
        found = Asked(k, sorted({row for row in exclude if row >= 0}))
        if self._users is not None:
            if "user" not in asked:
                raise Refused('which user? Say it as in {"user": "u131", "k": 10}')
            found.user = self._user(asked["user"])
            if found.user < 0:
                raise Refused(f"user {str(asked['user'])[:100]!r} is unknown", 404)
            return found
        found.history = self._item_ids(asked.get("history", []), "history")
        if not any(self._rows.find(number) >= 0 for number in found.history):
            raise Refused("history must have an item that the model knows", 404)
        return found

    def answer(self, asked: Sequence[Asked]) -> list[list[dict[str, Any]]]:
        """Of each request its items, best first."""
        if not len(self.items):
            return [[] for _ in asked]
        k = min(max(one.k for one in asked), len(self.items))
        scores, rows = best(self._queries(asked), self.items, k, [one.exclude for one in asked])
        lists = zip(scores.tolist(), rows.tolist(), asked, strict=True)
        return [
            [
                {"item": self._name(row), "score": score}
                for score, row in list(zip(found_scores, found, strict=True))[: one.k]
                if score != -torch.inf
            ]
            for found_scores, found, one in lists
        ]

    def score(self, rows: Any) -> dict[str, Any]:
        """Of two towers, the scores of rows of users and items; null where one of them is unknown.

        Raises:
            Refused: the rows cannot be scored.
        """
        if self._users is None:
            raise Refused("a model of sequences ranks items after a history: ask /recommend")
        pairs = checked_rows(rows)
        user, item = self._settings["user"], self._settings["item"]
        for place, row in enumerate(pairs):
            for name in (user, item):
                if name not in row:
                    raise Refused(f"row {place}: there is no {name!r}")
        users = torch.tensor([self._user(row[user]) for row in pairs], dtype=torch.int64)
        items = torch.tensor(
            [self._rows.find(id_of(row[item], self._settings["item_texts"], item)) for row in pairs], dtype=torch.int64
        )
        known = (users >= 0) & (items >= 0)
        scores = torch.full((len(pairs),), torch.nan)
        scores[known] = (self._users[users[known]] * self.items[items[known]]).sum(1)
        return {"scores": [score if there else None for score, there in zip(scores.tolist(), known.tolist(), strict=True)]}

    def _user(self, name: Any) -> int:
        return self._user_rows.find(id_of(name, self._settings["user_texts"], "user"))

    def _item_ids(self, names: Any, what: str) -> list[int]:
        if not isinstance(names, list) or len(names) > MOST_NAMES:
            raise Refused(f"{what} must be a list of at most {MOST_NAMES:,} items")
        return [id_of(name, self._settings["item_texts"], what) for name in names]

    def _name(self, row: int) -> Any:
        if self._names is not None:
            return self._names[row]
        return row if self._ids is None else int(self._ids[row])

    @torch.inference_mode()
    def _queries(self, asked: Sequence[Asked]) -> torch.Tensor:
        if self._users is not None:
            return self._users[torch.tensor([one.user for one in asked])]
        longest = self._settings["max_length"]
        histories = [self._of_history(one.history)[-longest:] for one in asked]
        lengths = torch.tensor([len(one) for one in histories])
        rows = torch.zeros(len(histories), int(lengths.max()), self.items.shape[1])
        for place, history in enumerate(histories):
            rows[place, : len(history)] = self._table.of(history)
        return self._layers(rows, lengths)

    def _of_history(self, history: list[int]) -> list[int]:
        """Where ids are row numbers, those without a row cannot be read."""
        return history if self._ids is not None else [number for number in history if self._rows.find(number) >= 0]


def checked_rows(rows: Any) -> list[dict[str, Any]]:
    """
    Raises:
        Refused: they are no list of objects, or too many.
    """
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise Refused('rows must be a list of objects, as in {"rows": [{"column": "value"}]}')
    if len(rows) > MOST_ROWS:
        raise Refused(f"{len(rows):,} rows in a request, and the most are {MOST_ROWS:,}", 413)
    return rows


@torch.inference_mode()
def best(
    queries_qD: torch.Tensor, items_ND: torch.Tensor, k: int, exclude: Sequence[list[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores, rows) `[q, k]` of the items with the largest dot product, best first, ties by the lower row; -inf at the end where
    so many are excluded.
    """
    count = len(queries_qD)
    scores, rows = torch.full((count, k), -torch.inf), torch.full((count, k), len(items_ND))
    left_out = [(place, row) for place, some in enumerate(exclude) for row in some]
    places, columns = (torch.tensor([one[at] for one in left_out], dtype=torch.int64) for at in (0, 1))
    for first in range(0, len(items_ND), BLOCK_ITEMS):
        block = items_ND[first : first + BLOCK_ITEMS]
        found = queries_qD @ block.t()
        inside = (columns >= first) & (columns < first + len(block))
        found[places[inside], columns[inside] - first] = -torch.inf
        top, at = _top(found, min(k, len(block)))
        scores, order = _top(torch.cat([scores, top], 1), k)
        rows = torch.cat([rows, at + first], 1).gather(1, order)
    return scores, rows


def _top(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of each row and their columns, ties by the lower column: torch.topk breaks these as it likes."""
    top, at = scores.topk(min(k + 1, scores.shape[1]), 1)
    chosen = at[:, :k]
    if k < scores.shape[1]:
        for row in (top[:, k - 1] == top[:, k]).nonzero().squeeze(1).tolist():
            chosen[row] = scores[row].sort(descending=True, stable=True).indices[:k]
    chosen = chosen.sort(1).values
    top, order = scores.gather(1, chosen).sort(dim=1, descending=True, stable=True)
    return top, chosen.gather(1, order)
