"""Expected ids, distinct and touched rows, held to brute force and to drawn batches; blocks add up to the whole."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from shardembed.planner.popularity import class_means
from shardembed.planner.traffic import Asked, Traffic, hashed_places
from shardembed.planner.workload import Counts, Order, Reuse, Skew, TableLoad, Uniform, Zipf
from shardembed.tables.table_config import TableConfig
from tests.amount import examples

REUSE = Reuse(
    "small", 1000, 8000.0, 2000.0, (1.0, 2.0, 4.0, 8.0, float("inf")), (0.5, 0.2, 0.15, 0.1, 0.05), (0.125, 0.1, 0.125, 0.15, 0.5)
)


def traffic(rows: int, ids: float, skew: Skew, order: Order = "sorted", *, batch: float = 100.0, ranks: int = 4) -> Traffic:
    return Traffic.of(TableLoad(TableConfig("t", rows, 8), (ids / batch,), skew, order), batch, ranks)


def zipf_shares(rows: int, exponent: float) -> NDArray[np.float64]:
    shares = np.arange(1, rows + 1) ** -exponent
    return shares / shares.sum()


def among(shares: NDArray[np.float64], ids: float) -> NDArray[np.float64]:
    return 1.0 - (1.0 - shares) ** ids


def even(rows: int, parts: int) -> list[range]:
    edges = np.linspace(0, rows, parts + 1).astype(int).tolist()
    return [range(a, b) for a, b in itertools.pairwise(edges)]


def strided(rows: int, step: int) -> list[range]:
    return [range(r, rows, step) for r in range(min(rows, step))]


def lines(asked: Asked) -> NDArray[np.float64]:
    return np.stack([asked.ids, asked.distinct, asked.touched])


SKEWS: list[Skew] = [Uniform(), Zipf(0.0), Zipf(0.5), Zipf(1.0), Zipf(1.05), Zipf(2.0), REUSE]


@pytest.mark.parametrize("rows", [1, 2, 1000, 50_000])
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 1.05, 2.0])
def test_zipf_is_the_sum_over_all_rows(rows: int, exponent: float) -> None:
    found, shares = traffic(rows, 3000, Zipf(exponent)), zipf_shares(rows, exponent)
    assert found.ids == pytest.approx(3000)
    assert found.distinct == pytest.approx(among(shares, 3000).sum(), rel=1e-7)
    assert found.touched == pytest.approx(among(shares, 12_000).sum(), rel=1e-7)


def test_zipf_of_ten_billion_rows_agrees_with_a_plain_sum_over_its_head() -> None:
    rows, exponent, ids = 10**10, 1.05, 163_840.0
    found = traffic(rows, ids, Zipf(exponent))
    # Euler and Maclaurin's sum of n^-s, from 10^6 on.
    start = 10.0**6
    head = np.arange(1, 10**6) ** -exponent
    tail = (rows ** (1 - exponent) - start ** (1 - exponent)) / (1 - exponent) + (start**-exponent + rows**-exponent) / 2
    scale = 1.0 / (head.sum() + tail)
    asked = found.blocks([range(10**6 - 1), range(10**6 - 1, rows)])
    np.testing.assert_allclose(asked.ids, ids * scale * np.array([head.sum(), tail]), rtol=1e-7)
    np.testing.assert_allclose(asked.distinct[0], among(scale * head, ids).sum(), rtol=1e-7)
    # Rows as cold as the last ones are hardly ever asked for twice.
    cold = found.blocks([range(rows - 10**9, rows)])
    assert cold.distinct[0] == pytest.approx(cold.ids[0], rel=1e-4)


def test_uniform_has_a_closed_form() -> None:
    found = traffic(1000, 500, Uniform())
    assert found.distinct == pytest.approx(1000 * (1 - 0.999**500))
    assert found.touched == pytest.approx(1000 * (1 - 0.999**2000))
    np.testing.assert_allclose(found.blocks([range(10), range(10, 1000)]).ids, [5, 495])


@pytest.mark.parametrize("skew", [Uniform(), Zipf(0.8), Zipf(1.3)])
def test_drawn_batches_look_like_that(skew: Skew) -> None:
    rows, ids, ranks, draws = 600, 400, 3, 400
    shares = zipf_shares(rows, skew.exponent) if isinstance(skew, Zipf) else np.full(rows, 1 / rows)
    cuts = [range(5), range(5, 100), range(100, rows), *strided(rows, 3)]
    rng = np.random.default_rng(1)
    drawn = np.zeros((draws, 3, len(cuts)))
    for draw in drawn:
        counts = rng.multinomial(ids, shares, size=ranks)
        for number, cut in enumerate(cuts):
            inside = counts[:, cut.start : cut.stop : cut.step]
            draw[:, number] = inside.sum() / ranks, (inside > 0).sum() / ranks, (inside.sum(0) > 0).sum()
    expected = lines(traffic(rows, ids, skew, ranks=ranks).blocks(cuts))
    error = drawn.std(0) / draws**0.5
    assert (np.abs(drawn.mean(0) - expected) <= 4.5 * error + 3 / draws).all()  # a rare event may never be drawn


@examples(60)
@given(
    st.sampled_from(SKEWS),
    st.sampled_from(["sorted", "hashed", "unknown"]),
    st.integers(1, 20_000),
    st.integers(1, 64),
    st.floats(0.5, 1e5),
)
def test_blocks_add_up_to_the_whole(skew: Skew, order: Order, rows: int, parts: int, ids: float) -> None:
    found = traffic(rows, ids, skew, order)
    whole = [found.ids, found.distinct, found.touched]
    for cuts in ([range(rows)], even(rows, parts), strided(rows, parts)):
        asked = lines(found.blocks(cuts))
        np.testing.assert_allclose(asked.sum(1), whole, rtol=1e-6)
        held = np.array([len(cut) for cut in cuts])
        assert (asked >= 0).all()
        assert (asked[1] <= np.minimum(asked[0], held) * (1 + 1e-6) + 1e-6).all()
        assert (asked[2] >= asked[1] * (1 - 1e-6) - 1e-6).all()
        assert (asked[2] <= np.minimum(4 * asked[0], held) * (1 + 1e-6) + 1e-6).all()


@pytest.mark.parametrize("skew", SKEWS)
def test_ten_billion_rows_add_up_too(skew: Skew) -> None:
    for order in ("sorted", "hashed"):
        found = traffic(10**10, 163_840, skew, order, batch=8192, ranks=128)
        for cuts in (even(10**10, 1024), strided(10**10, 1024)):
            whole = [found.ids, found.distinct, found.touched]
            np.testing.assert_allclose(lines(found.blocks(cuts)).sum(1), whole, rtol=1e-6)


def test_strides_deal_out_the_rows_one_by_one() -> None:
    rows, step = 100_000, 64
    found, shares = traffic(rows, 3000, Zipf(1.05)), among(zipf_shares(rows, 1.05), 3000)
    expected = [shares[r::step].sum() for r in range(step)]
    np.testing.assert_allclose(found.blocks(strided(rows, step)).distinct, expected, rtol=3e-3)


def test_a_hot_row_makes_its_block_busy() -> None:
    rows, parts = 10**8, 64
    share = float(1 / (np.arange(1, 10**6) ** -1.3).sum())
    cuts = even(rows, parts)
    first = traffic(rows, 3000, Zipf(1.3)).blocks(cuts)
    assert first.ids.argmax() == 0
    hottest = int(hashed_places(rows, 2048)[0])
    hashed = traffic(rows, 3000, Zipf(1.3), "hashed").blocks(cuts)
    busy = next(number for number, cut in enumerate(cuts) if hottest in cut)
    assert hashed.ids.argmax() == busy
    assert hashed.ids[busy] >= 0.98 * share * 3000
    dealt = traffic(rows, 3000, Zipf(1.3), "hashed").blocks(strided(rows, parts))
    assert dealt.ids[hottest % parts] >= 0.98 * share * 3000


@pytest.mark.parametrize("rows", [1, 7, 2048, 2049, 10**10])
def test_hashed_places_are_different_rows(rows: int) -> None:
    hot = min(rows, 2048)
    places = hashed_places(rows, hot)
    assert len(np.unique(places)) == hot
    assert places.min() >= 0
    assert places.max() < rows
    if rows > 10**6:  # spread over all the table
        assert np.histogram(places, 8, (0, rows))[0].min() > 200


def test_a_reuse_histogram_gives_back_its_own_batch() -> None:
    found = traffic(10**6, 8000.0, REUSE, batch=1000.0, ranks=1)
    assert found.distinct == pytest.approx(2000, rel=0.02)
    np.testing.assert_allclose(class_means(REUSE)[[0, 4]], [1.0, 40.0])
    # A part of that batch holds each occurrence of a row with its share.
    part = traffic(10**6, 2000.0, REUSE, batch=250.0, ranks=4)
    means, held = class_means(REUSE), 8000 * np.array(REUSE.accesses) / class_means(REUSE)
    assert part.distinct == pytest.approx((held * (1 - 0.75**means)).sum(), rel=0.01)
    assert part.touched == pytest.approx(found.distinct)


def test_rounded_shares_of_hot_rows_do_not_stop_a_histogram() -> None:
    rounded = Reuse("r", 1000, 8000.0, 2000.0, (1.0, 2048.0, 4096.0, float("inf")), (1.0, 0.0, 0.0, 0.0), (0.25, 0.25, 0.25, 0.25))
    means = class_means(rounded)
    assert means[0] == 1
    assert 1 < means[1] <= 2048 < means[2] <= 4096 < means[3]


@pytest.mark.parametrize("order", ["sorted", "hashed"])
def test_a_small_table_cannot_touch_more_rows_than_it_has(order: Order) -> None:
    for rows in (1, 10, 500, 1999):
        found = traffic(rows, 8000.0, REUSE, order, batch=1000.0)
        assert found.ids == pytest.approx(8000)
        assert found.distinct <= rows * (1 + 1e-9)
        assert found.touched == pytest.approx(rows)


def test_more_ranks_go_on_finding_rows_until_there_are_none() -> None:
    wide = [traffic(10**7, 8000.0, REUSE, batch=1000.0, ranks=ranks).touched for ranks in (1, 2, 3)]
    # A batch has 8000 x 0.125 rows that were asked for once; so each further batch finds about as many.
    np.testing.assert_allclose(np.diff(wide), 1000, rtol=1e-3)
    narrow = [traffic(4000, 8000.0, REUSE, batch=1000.0, ranks=ranks).touched for ranks in (1, 2, 1000)]
    assert narrow[0] < narrow[1] < narrow[2] <= 4000.0001
    assert narrow[2] == pytest.approx(4000)


def test_counts_are_taken_at_their_word() -> None:
    counts = np.random.default_rng(0).zipf(1.5, 3000) % 700
    counts = np.bincount(counts, minlength=1000).astype(np.int64)
    found = traffic(1000, 300.0, Counts(counts), "hashed", ranks=2)
    cuts = [range(3), range(3, 400), range(400, 1000)]
    asked = found.blocks(cuts)
    np.testing.assert_allclose(asked.ids, [counts[cut.start : cut.stop].sum() / 10 for cut in cuts])
    np.testing.assert_allclose(asked.distinct, [(1 - 0.9 ** counts[cut.start : cut.stop]).sum() for cut in cuts])
    np.testing.assert_allclose(asked.touched, [(1 - 0.8 ** counts[cut.start : cut.stop]).sum() for cut in cuts])
    residues = found.blocks(strided(1000, 7))
    np.testing.assert_allclose(residues.touched, [(1 - 0.8 ** counts[r::7]).sum() for r in range(7)])


def test_counts_predict_a_fresh_part_of_the_same_data() -> None:
    rng, shares = np.random.default_rng(2), zipf_shares(5000, 1.1)
    counts = rng.multinomial(20_000, shares)
    drawn = [(rng.multinomial(10_000, shares) > 0).sum() for _ in range(200)]
    found = traffic(5000, 10_000, Counts(counts), ranks=1)
    # The counts are one draw themselves: their own spread is that of a batch twice as large.
    assert found.distinct == pytest.approx(np.mean(drawn), abs=4 * np.std(drawn))


def test_counts_of_a_large_table_are_summed_in_blocks() -> None:
    rows = 300_000
    counts = np.random.default_rng(3).zipf(1.2, 400_000) % rows
    counts = np.bincount(counts, minlength=rows).astype(np.int64)
    found = traffic(rows, 40_000.0, Counts(counts), ranks=2)
    cuts = [range(1), range(1, 100_000), range(100_000, rows)]
    expected = [(1 - 0.9 ** counts[cut.start : cut.stop]).sum() for cut in cuts]
    np.testing.assert_allclose(found.blocks(cuts).distinct, expected, rtol=1e-3)
    assert found.ids == pytest.approx(40_000)
    np.testing.assert_allclose(lines(found.blocks(strided(rows, 16))).sum(1), [found.ids, found.distinct, found.touched])


def test_more_ids_than_were_counted_reach_rows_that_were_not() -> None:
    counts = np.array([6, 1, 1, 0, 0, 0], np.int64)
    found = traffic(6, 8.0, Counts(counts), ranks=4)
    asked = found.blocks([range(3), range(3, 6)])
    assert asked.distinct[1] == pytest.approx(0)
    # Three batches more; a quarter of their 24 ids goes to three new rows.
    assert asked.touched[1] == pytest.approx(3 * (1 - np.exp(-2.0)))
    assert asked.touched[0] == pytest.approx(3)


def test_several_features_ask_together() -> None:
    table = TableConfig("t", 1000, 8, ["a", "b"])
    both = Traffic.of(TableLoad(table, (1.0, 4.0), Zipf(1.05)), 100, 4)
    one = traffic(1000, 500, Zipf(1.05))
    assert (both.distinct, both.touched) == pytest.approx((one.distinct, one.touched))
    assert (both.bags, both.lengths) == ((100.0, 100.0), (1.0, 4.0))


@pytest.mark.parametrize("bad", [range(-1, 4), range(0, 1001), range(3, 1000, 3), range(0, 900, 3), range(9, 0, -1)])
def test_what_is_no_block_is_refused(bad: range) -> None:
    with pytest.raises(ValueError, match="is neither contiguous nor all rows of one residue"):
        traffic(1000, 10, Uniform()).blocks([range(5), bad])


def test_a_block_may_be_empty() -> None:
    found = traffic(1000, 10, Zipf(1.0))
    assert lines(found.blocks([range(5, 5), range(7, 3)])).tolist() == [[0, 0]] * 3
    assert lines(found.blocks([])).shape == (3, 0)
