"""What a trained model compares: its rows of a table may first go through a tower, or be brought to one length.

A training job writes that into its checkpoints, table by table, so that whoever uses them later compares what the model compared,
and as it did.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from torch import nn
from torch.nn import functional as F

from shardembed.checkpoint.plain import load_plain
from shardembed.config.hints import nearest
from shardembed.errors import CheckpointError, ConfigError

Metric = Literal["cosine", "dot"]
METRICS: tuple[Metric, ...] = get_args(Metric)
Which: TypeAlias = Literal["rows", "model"]
WHICH: tuple[Which, ...] = get_args(Which)
NOTED = "shardembed.vectors"  # in the `progress` of a checkpoint
SHOWN = 8  # names
UNKNOWN = "the checkpoint does not say what its model compares"


def in_words(metric: Metric) -> str:
    """What is compared by a metric, for people."""
    return f"the vectors that the model compares, by metric {metric}"


class Tower(nn.Module):
    """x + MLP(x), which starts as the identity; without hidden sizes it is nothing else."""

    def __init__(self, embedding_dim: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        sizes = (embedding_dim, *hidden)
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.ReLU()]
        if hidden:
            last = nn.Linear(hidden[-1], embedding_dim)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            layers.append(last)
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x) if len(self.layers) else x


class Vectors(BaseModel):
    """How rows of a table become what the model compares, and by what.

    Attributes:
        metric: by which it does.
        tower: the module that they go through, a `Tower`; None where there is none.
        hidden: its sizes.
        temperature: they are then brought to length 1 and divided by this; None where they keep their lengths.
        features: whose vectors are added to the rows first. Which ones is said by data and not by the checkpoint, so that rows
            alone do not make them.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    metric: Metric
    tower: str | None = None
    hidden: tuple[Annotated[int, Field(ge=1, lt=1 << 31)], ...] = Field(default=(), max_length=100)
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    features: tuple[str, ...] = Field(default=(), max_length=100_000)

    @property
    def are_rows(self) -> bool:
        """The rows themselves are compared."""
        return not self.features and not self.hidden and self.temperature is None

    @property
    def made(self) -> str:
        """How, in words."""
        steps = [
            *([f"with the vectors of features ({', '.join(self.features[:SHOWN])})"] * bool(self.features)),
            *(["through a tower"] * bool(self.hidden)),
            *(["brought to one length"] * (self.temperature is not None)),
        ]
        return ", ".join(steps) or "as they are"

    def of(self, rows: torch.Tensor, tower: nn.Module | None) -> torch.Tensor:
        """Rows of the table `[n, D]` -> what is compared, float32 `[n, D]`."""
        found = rows.float() if tower is None else tower(rows.float()).float()
        return found if self.temperature is None else F.normalize(found, dim=1) / self.temperature


_Noted = TypeAdapter(dict[str, Vectors])


def noted(vectors: Mapping[str, Vectors]) -> dict[str, Any]:
    """What a job adds to the `progress` of its checkpoints; `vectors` by the table's name there."""
    return {NOTED: {name: one.model_dump(mode="json", exclude_defaults=True) for name, one in vectors.items()}}


def read_noted(state: Any, where: str) -> dict[str, Vectors]:
    """What the small state of a checkpoint says of its tables, by their names there; empty where it says nothing.

    Raises:
        CheckpointError: it says so in another way than `noted` does.
    """
    progress = state.get("progress") if isinstance(state, dict) else None
    if not isinstance(progress, dict) or NOTED not in progress:
        return {}
    try:
        return _Noted.validate_json(json.dumps(progress[NOTED]))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, (NOTED, *first["loc"])))
        raise CheckpointError(f"{where}: progress.{place}: {first['msg']}") from None


def tower_of(path: Path, vectors: Vectors, columns: int) -> nn.Module | None:
    """The tower of a table of that many columns, with its weights; None where rows go through none.

    Raises:
        CheckpointError: the checkpoint has none that fits.
    """
    if vectors.tower is None or not vectors.hidden:
        return None
    with torch.device("meta"):  # no memory for sizes that the checkpoint does not have
        tower = Tower(columns, vectors.hidden)
    load_plain(path, _Beneath(vectors.tower, tower))
    return tower.requires_grad_(False)


class _Beneath(nn.Module):
    """A module at a path of names."""

    def __init__(self, path: str, module: nn.Module) -> None:
        super().__init__()
        name, _, rest = path.partition(".")
        self.add_module(name, _Beneath(rest, module) if rest else module)


def check_which(vectors: str | None) -> None:
    """
    Raises:
        ConfigError: there is no such choice.
    """
    if vectors is not None and vectors not in WHICH:
        raise ConfigError(f"vectors={vectors!r} is not one of {', '.join(WHICH)}{nearest(str(vectors), WHICH)}")
