"""The server's own way from names to rows, and its ranking, held to the library's."""

from __future__ import annotations

import ast
import asyncio
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shardembed as se
from shardembed.kernels import quantiles, starting
from shardembed.recipes.use.box import batching, clicks, files, ids, retrieval
from shardembed.tables.initial import table_hash

BOX = Path(files.__file__).parent
INT64 = st.integers(-(1 << 63), (1 << 63) - 1)


@pytest.mark.parametrize("path", sorted(BOX.glob("*.py")), ids=lambda path: path.name)
def test_imports_nothing_of_shardembed(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        assert not any(name.partition(".")[0] in ("shardembed", "numpy", "pyarrow") for name in names), names


@given(st.text(max_size=80))
def test_hashes_texts_as_the_library_does(text: str) -> None:
    assert ids.xxh64(text.encode()) == int(se.hash64([text])[0])


@given(INT64, st.integers(2, 1 << 40), st.integers(0, (1 << 63) - 1))
def test_hashes_ids_as_the_library_does(number: int, rows: int, seed: int) -> None:
    assert ids.hashed(number, rows, seed, 1) == int(se.Hashing(rows, seed, reserved=1)(np.array([number]))[0])


@pytest.mark.parametrize("normal", [True, False])
@given(some=st.lists(INT64, min_size=1, max_size=8), seed=st.integers(0, 1 << 32))
def test_rows_begin_as_those_of_the_library_do(
    normal: bool, some: list[int], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    numbers = starting.Distribution(table_hash(seed, "item"), normal, float(np.float32(0.05)), float(np.float32(-0.01)))
    settings = {"kind": "normal" if normal else "uniform", "base": numbers.base, "scale": numbers.scale, "offset": numbers.offset}
    settings |= {"dtype": "float32", "first": quantiles.FIRST, "inside": quantiles.IN_SEGMENT}
    settings |= {"cubics": quantiles.quantile_table().tolist()}
    wanted = starting.plain(torch.tensor(some), range(6), numbers)
    assert torch.equal(ids.Start(Path(), 6, settings).of(some), wanted)


@pytest.mark.parametrize(
    ("value", "texts", "found"),
    [("37", False, 37), ("37.0", False, 37), (37, False, 37), ((1 << 64) - 1, False, -1), (42, True, int(se.hash64(["42"])[0]))],
)
def test_names_become_ids(value: object, texts: bool, found: int) -> None:
    assert ids.id_of(value, texts, "item") == found


@pytest.mark.parametrize("value", [1.5, True, None, ["a"], "x", 1 << 64, "1e3"])
def test_what_is_no_name_is_refused(value: object) -> None:
    with pytest.raises(ids.Refused):
        ids.id_of(value, False, "item")


def test_half_a_character_is_refused() -> None:
    with pytest.raises(ids.Refused, match="half of a character"):
        ids.id_of("\ud800", True, "item")


@pytest.mark.parametrize("value", [None, "", "nan", float("nan")])
def test_what_is_missing_is_missing_however_it_is_said(value: object) -> None:
    assert math.isnan(clicks.number("price", value))
    assert clicks._absent(value, False)


@pytest.mark.parametrize("value", [float("inf"), "1e39", 10**400])
def test_what_32_bits_cannot_hold_is_refused(value: object) -> None:
    with pytest.raises(ids.Refused, match="infinite in 32 bits"):
        clicks.number("price", value)


@given(st.integers(0, 1 << 30), st.integers(1, 40), st.integers(1, 30), st.integers(1, 5))
def test_ranks_as_a_full_sort_does(seed: int, count: int, k: int, requests: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    items = torch.randint(-2, 3, (count, 3), generator=generator).float()  # so that many scores are equal
    queries = torch.randint(-2, 3, (requests, 3), generator=generator).float()
    exclude = [torch.randperm(count, generator=generator)[: count // 3].tolist() for _ in range(requests)]
    before, retrieval.BLOCK_ITEMS = retrieval.BLOCK_ITEMS, 7
    try:
        scores, rows = retrieval.best(queries, items, min(k, count), exclude)
    finally:
        retrieval.BLOCK_ITEMS = before
    for place, left_out in enumerate(exclude):
        wanted = items @ queries[place]
        order = [row for row in wanted.sort(descending=True, stable=True).indices.tolist() if row not in left_out][: min(k, count)]
        assert rows[place, : len(order)].tolist() == order
        assert scores[place, : len(order)].tolist() == wanted[order].tolist()
        assert torch.isneginf(scores[place, len(order) :]).all()


def test_requests_that_wait_are_answered_together_and_an_error_is_theirs_alone() -> None:
    sizes = []

    def answer(requests: Sequence[int]) -> list[int]:
        sizes.append(len(requests))
        if -1 in requests:
            raise ValueError("no")
        return [request * 2 for request in requests]

    async def ask() -> list[object]:
        batches = batching.Batches(answer)
        working = asyncio.create_task(batches.run())
        found = await asyncio.gather(*(batches.ask(request) for request in range(100)))
        failed = await asyncio.gather(batches.ask(-1), return_exceptions=True)
        again = await batches.ask(5)
        working.cancel()
        return [found, failed, again]

    found, failed, again = asyncio.run(ask())
    assert found == [request * 2 for request in range(100)]
    assert isinstance(failed[0], ValueError)  # type: ignore[index]
    assert again == 10
    assert max(sizes) == batching.MOST_AT_ONCE


def test_a_queue_that_is_full_says_so() -> None:
    async def ask() -> BaseException:
        batches = batching.Batches(lambda requests: requests)
        waiting = [asyncio.create_task(batches.ask(0)) for _ in range(batching.MOST_WAITING)]
        await asyncio.sleep(0)
        found = await asyncio.gather(batches.ask(0), return_exceptions=True)
        for one in waiting:
            one.cancel()
        return found[0]

    error = asyncio.run(ask())
    assert isinstance(error, ids.Refused)
    assert error.status == 503
