"""What a model needs where its tables take any id: batches have numbers from 0, by which losses and samplers count."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shardembed.recipes.data.numbering import Ids
from shardembed.recipes.ids_config import DynamicIdsConfig


@dataclass(frozen=True)
class AnyIds:
    """Of a job.

    Attributes:
        settings: of the tables.
        ids: behind the numbers.
    """

    settings: DynamicIdsConfig
    ids: Ids

    def of(self, table: str) -> torch.Tensor:
        """Of each number the id, int64."""
        return torch.from_numpy(self.ids.users if table == "user" else self.ids.items)


def ids_of(ids: torch.Tensor | None, numbers: torch.Tensor) -> torch.Tensor:
    """The ids behind these numbers; None: they are ids."""
    return numbers if ids is None else ids[numbers]
