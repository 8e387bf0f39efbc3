"""`se.open_run`: a finished run as an object, for programs and notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa

from shardembed.embeddings.export import Exported
from shardembed.embeddings.formats import Format
from shardembed.embeddings.narrowing import As
from shardembed.recipes.common import JobConfig
from shardembed.recipes.use.export import export_vectors
from shardembed.recipes.use.index import IndexKind, VectorIndex, index_of
from shardembed.recipes.use.opened import Opened, open_checkpoint
from shardembed.recipes.use.recommend import Answered, Unknown, Wish, queries_of, recommended
from shardembed.recipes.use.score import Scored, scored
from shardembed.recipes.use.vectors import SIDES, NamedVectors, vectors_of

BadRow = Literal["raise", "skip"]
Paths: TypeAlias = "str | Path | Sequence[str | Path]"


def open_run(path: str | Path) -> OpenedRun:
    """Open the folder of a run of `shardembed train`, for what it was trained for: recommending, scoring, vectors.

    In one process, or collective over the ranks of a job, whose methods are collective too. The weights are those of the checkpoint
    of the run that counts. The data of the run are not read; methods say where they need them.

    Raises:
        ConfigError: `path` is no folder of a run, or it has no checkpoint.
        CheckpointError: the checkpoint is damaged.
    """
    return OpenedRun(open_checkpoint(path))


class OpenedRun:
    """A run that `open_run` has opened. Names are what the data have: texts or integers.

    Attributes:
        path: the run's folder.
        config: its settings.
        step: of the checkpoint that the weights are from.
    """

    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        self.path: Path = opened.path
        self.config: JobConfig = opened.config
        self.step: int = opened.step

    def recommend(
        self,
        users: Any = "all",
        k: int = 10,
        *,
        exclude_seen: bool = False,
        data: Paths = (),
        history: Paths = (),
        unknown: Unknown = "leave_out",
    ) -> pa.Table:
        """The `k` best of all items for each user: columns `user`, `rank` (from 1), `item` and `score`, in the order of the users.

        Exact: every item is scored, as in the evaluation of the job. On rank 0; tables of other ranks have no rows.

        Args:
            users: names in a list, an array or a column; or "all" that the model knows.
            exclude_seen: leave out what a user has in the run's data, held-out items too; reads them once.
            data: files of interactions to be read for that, and for popularity, in the place of the run's.
            history: files of interactions from which a model of sequences goes on, in the place of the run's.
            unknown: users without a row, or without a known item in their history, get nothing ("leave_out"), or what is
                "popular" in the data, without a score.

        Raises:
            ConfigError: settings that do not fit the run. DataError: data that cannot be read. UnsupportedError: the model ranks
                no items.
        """
        wish = Wish(k, exclude_seen, _texts(data), _texts(history), unknown)
        return pa.concat_tables(list(recommended(self._opened, users, wish, Answered())))

    def score(self, rows: Any, columns: str | Sequence[str] = (), *, on_bad_row: BadRow = "raise") -> pa.Table:
        """Scores of rows without labels: of clicks `prediction`, how likely one is; of users and items `score`, query @ vector,
        null where the model does not know one of them. On rank 0; tables of other ranks have no rows.

        Args:
            rows: a path, a list of paths, an Arrow table, a DataFrame, a dict of columns, or a list of dicts, with the columns that
                the run was trained on.
            columns: to be carried along, beside the score.
            on_bad_row: "skip" leaves out rows that the job would not train on; else the first of them is an error.

        Raises:
            ConfigError: columns that cannot be carried. DataError: a column is missing, or a row is bad; says where.
        """
        return pa.concat_tables(list(scored(self._opened, rows, _texts(columns), on_bad_row == "skip", Scored())))

    def vectors(self, side: str) -> NamedVectors:
        """What the model compares of "user" or "item", in memory: `values` float32 `[n, D]` with their `ids` and `names`, where
        score = user @ item. Of sequences a user's is the query by which the job was evaluated, which the run's data are read for.

        Raises:
            ConfigError: there is no such side. UnsupportedError: the model compares no vectors. DataError: as `recommend`.
        """
        return vectors_of(self._opened, side)

    def queries(self, users: Any, *, history: Paths = ()) -> np.ndarray:
        """What the model multiplies item vectors with for these users, float32 `[q, D]` on rank 0: for an index, or a service of
        your own. Of sequences, from all that they have in the run's data, or in `history`.

        Raises:
            DataError: a user is unknown to the model. And as `recommend`.
        """
        return queries_of(self._opened, users, _texts(history))

    def index(self, side: str = "item", kind: IndexKind = "faiss", *, factory: str = "Flat") -> VectorIndex:
        """An index of these vectors, built by faiss (exact, unless `factory` asks for another of its kinds) or by hnswlib
        (approximate): with the metric of the model, and the names of what it finds. In one process.

        Raises:
            UnsupportedError: the library is not installed (`pip install 'shardembed[faiss]'`, `[hnswlib]`). ConfigError: there is
                no such kind. And as `vectors`.
        """
        return index_of(self.vectors(side), kind, factory)

    def export(
        self,
        out: str | Path,
        sides: str | Sequence[str] = SIDES,
        *,
        format: Format = "safetensors",
        dtype: As = "float32",
    ) -> Exported:
        """Write these vectors as files into the new folder `out`: of each side a file as `se.export_tables` makes them, with ids
        and names beside them; the metric stands in `export.json` and in the files.

        Raises:
            ExportError: `out` exists, or cannot be written. And as `vectors`.
        """
        return export_vectors(self._opened, Path(out), _texts(sides), format=format, dtype=dtype)


def _texts(given: Paths) -> tuple[str, ...]:
    """One, or several; letters of one are not several."""
    return (str(given),) if isinstance(given, str | Path) else tuple(map(str, given))
