"""A run's vectors handed over to faiss or hnswlib, by the metric of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa

from shardembed.config.hints import nearest
from shardembed.config.optional import needed
from shardembed.config.scalars import within
from shardembed.errors import ConfigError
from shardembed.recipes.use.vectors import NamedVectors

IndexKind = Literal["faiss", "hnswlib"]
KINDS: tuple[IndexKind, ...] = get_args(IndexKind)
LINKS, WHILE_BUILDING, WHILE_SEARCHING = 32, 200, 200  # of hnswlib: M, ef_construction, ef


@dataclass(frozen=True)
class VectorIndex:
    """An index that `OpenedRun.index` has built.

    Attributes:
        index: the library's own, for its own calls and files: a `faiss.Index` or an `hnswlib.Index`, which numbers places in `ids`.
        kind: "faiss" or "hnswlib".
        ids: of each place the id, int64 `[n]`.
        names: of each place the name, an Arrow array `[n]`.
    """

    index: Any
    kind: IndexKind
    ids: np.ndarray
    names: pa.Array

    def search(self, queries: np.ndarray, k: int = 10) -> tuple[np.ndarray, list[list[Any]]]:
        """(scores float32 `[q, k]`, names, a list for each query) of what the index finds, best first; fewer where it has fewer.

        Args:
            queries: float32 `[q, D]`, as `OpenedRun.queries` and `vectors("user").values` are.

        Raises:
            ConfigError: `k` is no number from 1 up.
        """
        if within(k, 1, 1 << 31) is None:
            raise ConfigError(f"k={k!r}: it must be a whole number from 1 up")
        k = min(k, len(self.ids))
        queries = np.ascontiguousarray(queries, np.float32)
        if self.kind == "faiss":
            scores, places = self.index.search(queries, k)
        else:
            self.index.set_ef(max(WHILE_SEARCHING, 2 * k))
            places, distances = self.index.knn_query(queries, k)
            scores = 1 - distances  # its inner product is told as a distance
        places = places.astype(np.int64)
        # A graph may reach fewer: faiss says -1 then.
        return scores, [self.names.take(pa.array(row[row >= 0])).to_pylist() for row in places]


def index_of(vectors: NamedVectors, kind: IndexKind, factory: str) -> VectorIndex:
    """
    Args:
        factory: of faiss, what its `index_factory` takes; "Flat" is exact.

    Raises:
        ConfigError: there is no such kind, or faiss knows no such factory. UnsupportedError: the library is not installed.
    """
    assert vectors.metric == "dot", "what both are built for"
    if kind not in KINDS:
        raise ConfigError(f"kind={kind!r} is not one of {', '.join(KINDS)}{nearest(str(kind), KINDS)}")
    build = _faiss if kind == "faiss" else _hnswlib
    return VectorIndex(build(np.ascontiguousarray(vectors.values), factory), kind, vectors.ids, vectors.names)


def _faiss(values: np.ndarray, factory: str) -> Any:
    with needed("faiss", "faiss", "an index of faiss"):
        import faiss  # pyright: ignore[reportMissingImports]

    try:
        index = faiss.index_factory(values.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            index.train(values)
    except RuntimeError as error:
        raise ConfigError(f"factory={factory!r}: faiss makes no index of {len(values):,} vectors by it: {error}") from None
    index.add(values)
    return index


def _hnswlib(values: np.ndarray, factory: str) -> Any:
    with needed("hnswlib", "hnswlib", "an index of hnswlib"):
        import hnswlib  # pyright: ignore[reportMissingImports, reportMissingModuleSource]

    index = hnswlib.Index(space="ip", dim=values.shape[1])
    index.init_index(max_elements=max(1, len(values)), ef_construction=WHILE_BUILDING, M=LINKS, random_seed=0)
    index.add_items(values, np.arange(len(values)))
    return index
