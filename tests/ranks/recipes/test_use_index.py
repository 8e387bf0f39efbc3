"""Vectors handed over to faiss and hnswlib, the real ones. Each test is skipped where its library is not installed."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest

import shardembed as se
from shardembed.errors import ConfigError, UnsupportedError
from shardembed.recipes.use import index
from tests.ranks.recipes.using import END, SASREC, TWO_TOWER, VIEWS, Small


@pytest.fixture(scope="module", params=["two_tower", "sasrec"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Small:
    folder = tmp_path_factory.mktemp("run")
    if request.param == "sasrec":
        return Small.train(folder, VIEWS + SASREC + END, more=", time: at")
    return Small.train(folder, VIEWS + TWO_TOWER + END, towers="[12]")


def test_faiss_finds_what_is_recommended(small: Small) -> None:
    faiss = pytest.importorskip("faiss")
    run, users = se.open_run(small.path), ["ü-3", "ü-70", "ü-12"]
    built = run.index("item", kind="faiss")
    assert built.index.metric_type == faiss.METRIC_INNER_PRODUCT
    scores, names = built.search(run.queries(users), 8)
    wanted = run.recommend(users, 8)
    assert list(chain(*names)) == wanted.column("item").to_pylist()
    np.testing.assert_allclose(scores.ravel(), wanted.column("score").to_numpy(), rtol=1e-5)
    assert len(built.search(run.queries(users), 1000)[1][0]) == 60
    assert run.index(factory="IVF4,Flat").index.ntotal == 60
    with pytest.raises(ConfigError, match="faiss makes no index"):
        run.index(factory="Flatt")


def test_hnswlib_finds_what_is_recommended(small: Small) -> None:
    pytest.importorskip("hnswlib")
    run, users = se.open_run(small.path), ["ü-3", "ü-70", "ü-12"]
    scores, names = run.index(kind="hnswlib").search(run.queries(users), 8)
    wanted = run.recommend(users, 8)
    assert list(chain(*names)) == wanted.column("item").to_pylist(), "of 60 items it looks at all"
    np.testing.assert_allclose(scores.ravel(), wanted.column("score").to_numpy(), rtol=1e-5)


def test_a_library_that_is_not_there_is_told(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    run = se.open_run(small.path)
    for kind in index.KINDS:
        monkeypatch.setitem(__import__("sys").modules, kind, None)
        with pytest.raises(UnsupportedError, match=rf"pip install 'shardembed\[{kind}\]'"):
            run.index(kind=kind)
    with pytest.raises(ConfigError, match="did you mean 'faiss'"):
        run.index(kind="fais")  # type: ignore[arg-type]
