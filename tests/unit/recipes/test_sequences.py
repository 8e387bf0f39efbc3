"""Sequences: read by time, cut, made up from a chain whose best ranking is known; and the model that predicts what comes next."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from rich.console import Console

import shardembed as se
from shardembed.cli.model_workload import of_training
from shardembed.errors import DataError
from shardembed.planner.workload import Counts
from shardembed.recipes import train
from shardembed.recipes.build import build_sequence
from shardembed.recipes.data import text
from shardembed.recipes.data.chain import PlantedSequences
from shardembed.recipes.data.choose import open_source
from shardembed.recipes.data.files import FileInteractions
from shardembed.recipes.data.kinds import CLOCK_TIME, WHOLE_TIME, times_like
from shardembed.recipes.data.sequences import Sequences, scan
from shardembed.recipes.data.source import Chunk, all_chunks
from shardembed.recipes.evaluate import evaluate
from shardembed.recipes.metrics import History
from shardembed.recipes.models.masks import Dropout
from shardembed.recipes.models.next_items import NextItems
from shardembed.recipes.models.sasrec import SequenceBatch
from shardembed.recipes.sequence_config import ChainConfig, SequenceConfig, SequenceEvalConfig

CHAIN = ChainConfig(users=200, items=40, length=8, successors=2, noise=0.25)
NOTHING = History(np.empty(0, np.int64), np.empty(0, np.int64))


def config(**sections: Any) -> SequenceConfig:
    values = {
        "data": {"generator": CHAIN.model_dump()},
        "model": {"embedding_dim": 8, "max_length": 6, "feedforward": 12, "negatives": 20},
        "train": {"global_batch_size": 32, "epochs": 2},
        "checkpoint": {"every_steps": None},
        "eval": {"k": 4},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return SequenceConfig.model_validate(values)


class Listed:
    """Interactions in the order given, `size` at a time."""

    name, parts = "listed", ("listed",)

    def __init__(self, rows: list[tuple[int, int, int]], size: int = 3) -> None:
        self._rows, self._size = np.array(rows, np.int64).reshape(-1, 3), size

    def place(self, column: int, value: int) -> str:
        return self.name

    def chunks(self, part: int) -> Iterator[Chunk]:
        for start in range(0, len(self._rows), self._size):
            users, items, times = self._rows[start : start + self._size].T
            yield Chunk(users, items, times=times)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9), st.integers(-3, 3)), max_size=40), st.integers(1, 5))
def test_sequences_are_each_users_items_by_time_and_the_last_is_held_out(rows: list[tuple[int, int, int]], length: int) -> None:
    by_user: dict[int, list[int]] = {}
    for user, item, _ in sorted(rows, key=lambda row: row[2]):  # stable: those of one moment stay in order
        by_user.setdefault(user * 1000, []).append(item)
    listed = Listed([(user * 1000, item, time) for user, item, time in rows])
    if not any(len(items) > 2 for items in by_user.values()):
        with pytest.raises(DataError, match="no user has three interactions" if rows else "there are no interactions in it"):
            scan(listed)
        return
    data = scan(listed)
    whole = [by_user[user] for user in sorted(by_user)]
    trained = [items[:-1] if len(items) > 1 else items for items in whole]
    assert (data.users, data.rows, data.items) == (len(whole), len(rows), max(item for _, item, _ in rows) + 1)
    assert data.held.users.tolist() == [user for user, items in enumerate(whole) if len(items) > 1]
    assert data.held.items.tolist() == [items[-1] for items in whole if len(items) > 1]
    assert data.user_counts.tolist() == list(map(len, trained))
    assert data.item_counts.tolist() == np.bincount(list(chain(*trained)), minlength=data.items).tolist()
    assert data.training_users.tolist() == [user for user, items in enumerate(trained) if len(items) > 1]
    users = np.arange(data.users)[::-1]
    items, counts = data.last(users, length)
    assert [part.tolist() for part in np.split(items, np.cumsum(counts)[:-1])] == [trained[user][-length:] for user in users]
    history = data.histories(users)
    assert [(o, i) for o, i in zip(history.owners.tolist(), history.items.tolist(), strict=True)] == [
        (place, item) for place, user in enumerate(users) for item in trained[user]
    ]
    epochs = [[batch.tolist() for batch in data.batches(2, 0, epoch)] for epoch in (0, 0, 1)]
    assert epochs[0] == epochs[1]
    assert all(sorted(chain(*epoch)) == data.training_users.tolist() for epoch in epochs)


def test_rows_without_times_are_in_order_already(tmp_path: Path) -> None:
    path = tmp_path / "clicks.tsv"
    path.write_text("user\titem\n" + "".join(f"{row % 2}\t{9 - row}\n" for row in range(10)))
    data = scan(FileInteractions(path, "user", "item"))
    assert data.taken.tolist() == [9, 7, 5, 3, 1, 8, 6, 4, 2, 0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2010-10-19T23:55:27Z", (1287532527_000000, 0)),
        ("2010-10-19 23:55:27", (1287532527_000000, 0)),
        ("2010-10-19T23:55:27.25+02:00", (1287525327_250000, 0)),
        ("2010-10-19T23:55:27.123456789+02:00", (1287525327_123456, 789)),
        ("2010-10-19T23:55-0130", (1287537900_000000, 0)),
        ("2010-10-19", (1287446400_000000, 0)),
        ("9999-12-31T23:59:59.12345678000", (253402300799_123456, 780)),
        ("1969-12-31T23:59:59.9999999Z", (-1, 900)),
        ("-17", (-17,)),
        ("978300760", (978300760,)),
        ("978300760.0", (978300760,)),
        ("9223372036854775807", ((1 << 63) - 1,)),
    ],
)
def test_times_are_whole_numbers_or_dates(text: str, expected: tuple[int, ...]) -> None:
    kind = times_like(text)
    assert kind.problem(text) is None
    assert kind.slow([text]).T.tolist() == [[*expected, 0][:2]]
    fast = kind.fast(pa.array([text, text]))
    assert fast is None or fast.T.tolist() == [[*expected, 0][:2]] * 2


def test_columns_of_times_are_read_at_once() -> None:
    for kind, texts in (
        (CLOCK_TIME, ["2010-10-19 23:55:27", "2011-01-01"]),
        (CLOCK_TIME, ["2010-10-19T23:55:27Z"]),
        (CLOCK_TIME, ["2010-10-19T23:55:27.123456789Z", "1900-01-01T00:00:00Z"]),
        (CLOCK_TIME, ["2010-10-19", "2010-10-19T00:00:00Z", "2010-10-19T00:00:00.123456789+01:00"]),
        (WHOLE_TIME, ["-5", "7"]),
    ):
        found = kind.fast(pa.array(texts))
        assert found is not None
        assert found.T.tolist() == kind.slow(texts).T.tolist()
    assert CLOCK_TIME.fast(pa.array(["2010-10-19", "2010-10-19T00:00"])) is not None
    assert CLOCK_TIME.fast(pa.array(["2010-10-19", "2010-10-19T"])) is None
    assert WHOLE_TIME.fast(pa.array(["5", "0x5"])) is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            "1,2,2020-01-01\n1,3,5\n",
            r":3: column 'when': '5' is no time: the first row has a date, so all must, such as 2024-05-31",
        ),
        (
            "1,2,2020-01-01\n1,3,2020-02-30\n",
            r":3: column 'when': '2020-02-30' is no time: it looks like an ISO 8601 date, .* is none",
        ),
        ("1,2,2020-13-01\n", r":2: column 'when': '2020-13-01' is no time: it looks like an ISO 8601 date, .* but is none"),
        ("\n1,2,2020-01-01\n1,2,7", r":4: column 'when': '7' is no time: the first row has a date"),
        ("1,2,17\n1,3,2020-01-01\n", r":3: column 'when': '2020-01-01' is no time: the first row has a whole number, so all must"),
        ("1,2,1709250000.5\n", r":2: column 'when': '1709250000.5' is neither a whole number nor an ISO 8601 date such as 2024-"),
        ("1,2,05.04.2024 21:01\n1,3,5\n", r":2: column 'when': '05.04.2024 21:01' is neither a whole number nor an ISO 8601 date"),
        ("1,2,9223372036854775808\n", r":2: column 'when': 9223372036854775808 does not fit 64 bits with a sign; use a coarser"),
        ("1,2,17\n1,3,\n", r":3: column 'when': the value is missing"),
        ("1,x,17\n", r":2: column 'item': 'x' is not an integer"),
    ],
)
def test_a_bad_time_is_placed(tmp_path: Path, rows: str, message: str) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user,item,when\n" + rows)
    with pytest.raises(DataError, match=message):
        list(FileInteractions(path, "user", "item", time="when").chunks())


def test_after_a_first_time_that_says_nothing_whole_numbers_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user,item,when\n1,2,?\n1,3,5\n1,4,2024-04-05\n")
    (chunk,) = FileInteractions(path, "user", "item", "skip", time="when").chunks()
    assert chunk.times is not None
    assert chunk.times.tolist() == [5]
    first, second = chunk.dropped.places
    assert "'?' is neither a whole number nor" in first
    assert "'2024-04-05' is no time: the first row has no date" in second


@pytest.mark.parametrize("slow", [False, True])  # one bad row has those beside it read one by one
@pytest.mark.parametrize("suffix", [".csv", "text.parquet", "integers.parquet"])
def test_users_of_sequences_may_be_any_int64(tmp_path: Path, suffix: str, slow: bool) -> None:
    users = [5001306463, -(1 << 63), (1 << 63) - 1, -7, 1 << 32] * 3
    bad = [1 << 63] * slow
    items = [row // 5 for row in range(len(users))] + [0] * slow
    path = tmp_path / f"log{suffix}"
    if suffix == ".csv":
        path.write_text("user_id,item_id\n" + "".join(f"{user},{item}\n" for user, item in zip(users + bad, items, strict=True)))
    elif suffix == "text.parquet":
        parquet.write_table(pa.table({"user_id": list(map(str, users + bad)), "item_id": items}), path)
    else:
        nulls = [None] * slow
        parquet.write_table(pa.table({"user_id": pa.array(users + nulls, pa.int64()), "item_id": items}), path)
    settings = config(
        data={"path": str(path), "user": "user_id", "item": "item_id", "time": None, "on_bad_row": "skip", "ids": "numbered"}
    )
    source = open_source(settings.data)
    assert [user for chunk in all_chunks(source) for user in chunk.users.tolist()] == users
    data = scan(source)
    assert (data.users, data.taken.tolist()) == (5, [0, 1, 2] * 5)
    assert len(data.dropped) == slow
    if slow and suffix != "integers.parquet":
        assert f"column 'user_id': {1 << 63} does not fit 64 bits with a sign" in data.dropped.places[0]


def test_users_of_64_bits_without_a_sign_are_judged(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    parquet.write_table(pa.table({"user": pa.array([5, (1 << 64) - 1], pa.uint64()), "item": [1, 2]}), path)
    (chunk,) = FileInteractions(path, "user", "item", "skip", any_user=True).chunks()
    assert chunk.users.tolist() == [5]
    assert chunk.dropped.kinds == {"too large": 1}


@pytest.mark.parametrize("form", ["whole", "clock", "timestamp", "date"])
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_files_give_sequences_by_time(tmp_path: Path, form: str, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "BLOCK_BYTES", 2000)
    source = PlantedSequences(CHAIN)
    (chunk,) = source.chunks()
    assert chunk.times is not None
    days = chunk.times // 1_000_000
    columns: dict[str, Any] = {"user": chunk.users, "item": chunk.items}
    dates = np.datetime64("2020-01-01") + days.astype("timedelta64[D]")
    columns["when"] = {
        "whole": days - 5,
        "clock": [f"{date}T12:00:00+01:00" for date in dates],
        "timestamp": pa.array(dates.astype("datetime64[ns]")),
        "date": pa.array(dates),
    }[form]
    path = tmp_path / f"log{suffix}"
    table = pa.table(columns)
    if suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=300)
    else:
        lines = [",".join(map(str, row)) for row in zip(*(table[name].to_pylist() for name in table.column_names), strict=True)]
        path.write_text("\n".join(["user,item,when", *lines, ""]))
    data, expected = scan(FileInteractions(path, "user", "item", time="when")), scan(source)
    np.testing.assert_array_equal(data.taken, expected.taken)
    np.testing.assert_array_equal(data.starts, expected.starts)


def test_a_row_without_a_time_is_left_out_of_a_parquet_file(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    when = pa.array([True, False, True, True])
    parquet.write_table(pa.table({"user": [1, 1, 1, 1], "item": [1, 2, 3, 4], "when": when}), path)
    with pytest.raises(DataError, match=r"column 'when' \(data.time\) holds bool; times must be timestamps, dates, whole numbers,"):
        FileInteractions(path, "user", "item", time="when")
    parquet.write_table(pa.table({"user": [1, 1, 1, 1], "item": [1, 2, 3, 4], "when": pa.array([5, None, 4, 3])}), path)
    with pytest.raises(DataError, match=r"row 1 \(from 0\), column 'when': the value is missing"):
        scan(FileInteractions(path, "user", "item", time="when"))
    data = scan(FileInteractions(path, "user", "item", "skip", "when"))
    assert (data.taken.tolist(), data.dropped.kinds) == ([4, 3, 1], {"missing": 1})
    with pytest.raises(DataError, match=r"data.item and data.time both name the column 'item'"):
        FileInteractions(path, "user", "item", time="item")


def test_the_chain_goes_as_it_says_and_its_ranking_is_the_best() -> None:
    settings = ChainConfig(users=4000, items=30, length=20, successors=3, noise=0.3)
    source = PlantedSequences(settings)
    data = scan(source)
    ends = np.zeros(data.rows, bool)
    ends[data.starts[1:] - 1] = True
    before, after = data.taken[:-1][~ends[:-1]], data.taken[1:][~ends[:-1]]
    places = source.positions(before, History(np.arange(len(after)), after), NOTHING)
    seen = np.zeros((30, 30))
    np.add.at(seen, (before, after), 1)
    frequent = -np.sort(-seen, axis=1).sum(0) / len(before)  # by place, if one ranked by what was seen
    shares = np.bincount(places, minlength=30) / len(before)
    np.testing.assert_allclose(shares[:3], frequent[:3], atol=0.01)
    weights = 0.7 / np.arange(1, 4) / (1 + 1 / 2 + 1 / 3)
    assert ((shares[:3] > weights - 0.01) & (shares[:3] < weights + 0.05)).all()  # noise hits them too
    left_out = History(np.zeros(29, np.int64), np.arange(1, 30))
    assert source.positions(before[:1], History(np.array([0]), np.array([0])), left_out).tolist() == [0]


@pytest.fixture(scope="module")
def data() -> Sequences:
    return scan(PlantedSequences(CHAIN))


def test_a_prediction_depends_on_what_came_before_alone(data: Sequences) -> None:
    job = build_sequence(config(), data)
    lengths = torch.tensor([2, 6, 4])
    items = torch.randn(12, 8)
    found = job.model.queries(items, lengths)
    for place in (1, 3, 9):  # in the first, second and last sequence
        changed = items.clone()
        changed[place] = torch.randn(8)
        moved = (job.model.queries(changed, lengths) - found).abs().sum(1) > 1e-6
        end = {1: 2, 3: 8, 9: 12}[place]
        assert moved.tolist() == [place <= one < end for one in range(12)]
    torch.testing.assert_close(job.model.queries(items[8:], lengths[2:]), found[8:])  # whatever stands beside it


def test_the_loss_is_the_sampled_softmax_over_all_but_first_items(data: Sequences) -> None:
    job = build_sequence(config(), data)
    items, lengths, negatives = torch.tensor([3, 5, 7, 1, 2]), torch.tensor([3, 2]), torch.tensor([2, 9, 9, 30])
    loss = job.model(SequenceBatch(items, lengths, negatives, global_targets=6))
    table = job.model.tables
    queries = job.model.queries(table.rows("item", items[[0, 1, 3]]), lengths - 1).detach()  # the last of each is only a target
    total = 0.0
    for place, target in enumerate((5, 7, 2)):
        positive = queries[place] @ table.rows("item", torch.tensor([target]))[0]
        others = [negative for negative in negatives if negative != target]
        wrong = [queries[place] @ table.rows("item", one[None])[0] - job.model.log_expected[one] for one in others]
        total += float(torch.stack([positive, *wrong]).logsumexp(0) - positive)
    assert loss.item() == pytest.approx(total / 6, rel=1e-5)
    nobody = torch.empty(0, dtype=torch.int64)
    empty = job.model(SequenceBatch(nobody, nobody, negatives, 6, Dropout(0.5, 0, 0, 0, 6, 8)))
    empty.backward()
    assert empty.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in job.model.parameters())


def test_bfloat16_layers_are_near(data: Sequences) -> None:
    wide, narrow = (build_sequence(config(train={"autocast": kind}), data).model for kind in (None, "bfloat16"))
    items, lengths = torch.randn(12, 8), torch.tensor([6, 6])
    found = narrow.queries(items, lengths)
    assert found.dtype == torch.float32
    assert not torch.equal(found, wide.queries(items, lengths))
    torch.testing.assert_close(found, wide.queries(items, lengths), atol=0.05, rtol=0.05)


def test_dropout_does_not_depend_on_how_a_batch_is_dealt() -> None:
    x = torch.ones(7, 5, 3)
    whole = Dropout(0.3, seed=1, step=4, first=0, length=6, width=3)(2, x)
    parts = [Dropout(0.3, 1, 4, first, 6, 3)(2, x[first:last]) for first, last in ((0, 2), (2, 7))]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(Dropout(0.3, 1, 4, 0, 6, 3)(2, x[:, :2]), whole[:, :2])
    for other in (Dropout(0.3, 2, 4, 0, 6, 3)(2, x), Dropout(0.3, 1, 5, 0, 6, 3)(2, x), Dropout(0.3, 1, 4, 0, 6, 3)(3, x)):
        assert not torch.equal(other, whole)
    large = Dropout(0.3, 1, 4, 0, 100, 100)(0, torch.ones(10, 100, 100))
    assert (large == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert large.mean().item() == pytest.approx(1, abs=0.01)
    assert Dropout(0.0, 1, 4, 0, 6, 3)(0, x) is x
    assert Dropout(1 - 1e-9, 1, 4, 0, 6, 3)(0, x).isfinite().all()


@pytest.mark.parametrize("repeats", [True, False])
def test_evaluation_counts_exact_ranks_with_or_without_items_met_before(data: Sequences, repeats: bool) -> None:
    job = build_sequence(config(), data)
    torch.nn.init.normal_(job.model.positions)
    ranker = NextItems(job.model, data, 6)
    found = evaluate(ranker, data.questions(), SequenceEvalConfig(k=4, repeats=repeats), 0)
    table = job.model.tables.rows("item", torch.arange(data.items))
    asked = hits = 0
    for user, held in zip(data.held.users, data.held.items.tolist(), strict=True):
        items = data.taken[data.starts[user] : data.starts[user + 1] - 1]
        query = job.model.queries(table[items[-6:]], torch.tensor([len(items[-6:])]))[-1]
        order = (table @ query).argsort(descending=True).tolist()
        asked += repeats or held not in items
        hits += held in [item for item in order if repeats or item not in items][:4]
    assert (found.model.users, found.repeats) == (asked, len(data.held.users) - asked)
    assert found.model.found == hits
    assert repeats or 0 < found.repeats < len(data.held.users), "the case has both kinds of users"


def test_the_model_finds_what_popularity_cannot(tmp_path: Path) -> None:
    settings = config(
        name="test",
        checkpoint={"every_steps": 1000},
        data={"generator": {"users": 600, "items": 50, "length": 12, "successors": 3, "noise": 0.1}},
        model={"embedding_dim": 16, "max_length": 10, "layers": 1, "feedforward": 32, "negatives": 64},
        optimizer={"dense": {"lr": 5e-3}},
        train={"global_batch_size": 32, "epochs": 12, "schedule": {"warmup_steps": 20, "decay": "linear"}},
        run_dir=str(tmp_path),
    )
    found = train.run(settings, Console(file=io.StringIO()))
    assert found["generator_recall@4"] > 0.85
    assert found["recall@4"] > found["generator_recall@4"] - 0.1
    assert found["popularity_recall@4"] < 0.25
    by_model = se.neighbors(found["run_dir"], "item", [3])
    assert by_model == se.neighbors(found["run_dir"], "item", [3], metric="dot", vectors="rows")


def test_the_planner_knows_how_often_each_item_is_asked_for(tmp_path: Path, data: Sequences) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(config().model_dump(mode="json", include={"data", "model", "train"})))
    found = of_training(path, ranks=3)
    (load,) = found.tables
    items, lengths = data.last(data.training_users, 7)
    assert load.ids_per_sample == pytest.approx((lengths.mean(), 20 * 3 / 32))
    assert isinstance(load.skew, Counts)
    extra = load.skew.counts - np.bincount(items, minlength=40)
    assert (extra >= 0).all()
    assert extra.sum() == pytest.approx(len(lengths) * 20 * 3 / 32, rel=0.1)
    apart = config(data={"split": {"kind": "last", "validation": True}})
    path.write_text(yaml.safe_dump(apart.model_dump(mode="json", include={"data", "model", "train"})))
    (held,) = of_training(path, ranks=3).tables
    fewer = scan(data.source, split=apart.data.split)
    _, lengths = fewer.last(fewer.training_users, 7)
    assert held.ids_per_sample[0] == pytest.approx(lengths.mean())
    assert held.ids_per_sample[0] < load.ids_per_sample[0], "what is for validation is not trained on"
