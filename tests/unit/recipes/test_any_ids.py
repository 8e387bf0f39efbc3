"""Ids of any kind: what their settings may say, and how files with texts and hashes are read."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

import shardembed as se
from shardembed.errors import ConfigError, DataError
from shardembed.inputs.hash64 import hash64
from shardembed.recipes import config
from shardembed.recipes.config import DataConfig
from shardembed.recipes.ctr_config import CtrDataConfig, IdsConfig
from shardembed.recipes.data import kept, text
from shardembed.recipes.data.any_ids import integers
from shardembed.recipes.data.choose import check_data, open_numbered, open_source, rows_of_side
from shardembed.recipes.data.clicks.sources import open_sources
from shardembed.recipes.data.describe import with_features
from shardembed.recipes.data.feature_kinds import lists
from shardembed.recipes.data.interactions import scan
from shardembed.recipes.data.lists import Lists
from shardembed.recipes.data.naming import id_columns, keep_names
from shardembed.recipes.data.source import all_chunks
from shardembed.recipes.data.wanted import MISSING
from shardembed.recipes.features_config import FeatureConfig
from shardembed.recipes.ids_config import InteractionIdsConfig
from shardembed.recipes.resolved import resolved_yaml

ANY = InteractionIdsConfig(kind="dynamic")
TEXTS = ["ab", "7", "ü x", "ab"]
HASHES = [2**63 - 1, -(2**63), 0, 17]


def loaded(tmp_path: Path, text: str) -> config.AnyConfig:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    found = config.load(path)
    path.write_text(resolved_yaml(found))
    assert config.load(path) == found
    return found


def test_settings_become_those_of_the_tables(tmp_path: Path) -> None:
    found = loaded(tmp_path, "data: {ids: {kind: dynamic, capacity: 9, tables: {item: 5}, eviction: {kind: lfu, halve_every: 3}}}")
    assert found.data.ids is not None
    assert found.data.ids.dynamic == se.Dynamic(se.LFU(3))
    assert [found.data.ids.rows(name) for name in ("user", "item")] == [9, 5]
    ids = "{kind: dynamic, eviction: {kind: ttl, steps: 4}, admission: {kind: probability, p: 0.5}, unknown: zeros}"
    for kind in ("sasrec", "dlrm"):
        found = loaded(tmp_path, f"model: {{kind: {kind}}}\ndata: {{ids: {ids}}}")
        assert found.data.ids is not None
        assert found.data.ids.dynamic == se.Dynamic(se.TTL(4), se.Probability(0.5), "zeros")
        assert found.data.ids.rows("item") is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data: {ids: {kind: dynamic, eviction: lru}}", "1:29: data.ids.eviction: lru makes room where there is a limit"),
        ("data: {ids: {kind: dynamic, eviction: {kind: lfu, steps: 3}}}", "lfu takes no 'steps'; it takes halve_every"),
        ("data: {ids: {kind: dynamic, eviction: {kind: ttl}}}", "ttl needs 'steps'"),
        ("data: {ids: {kind: dynamic, eviction: {kind: lur}}}", "did you mean 'lru'"),
        ("data: {ids: {kind: dynamic, admission: {kind: min_count, p: 0.5}}}", "min_count takes no 'p'; it takes count"),
        ("data: {ids: {kind: dynamic, admission: {kind: probability}}}", "probability needs 'p'"),
        ("data: {ids: {kind: dynamic, tables: {usre: 3}}}", "there is no table 'usre'; did you mean 'user'"),
        ("data: {ids: {kind: dynamic, capacity: 0}}", "1:29: data.ids.capacity"),
        ("data: {ids: {kind: hash}}", "1:14: data.ids.kind"),
        ("model: {kind: sasrec}\ndata: {ids: {kind: dynamic, tables: {user: 3}}}", "there is no table 'user'"),
        ("data: {time: at, split: {kind: time, share: 0.1}}", "what the generator makes has no times: set data.path"),
        ("data: {texts: [itm_id]}", "texts: 'itm_id' is no column of ids; did you mean 'item_id'"),
        ("model: {kind: sasrec}\ndata: {texts: [tag]}", "texts: 'tag' is no column of ids; those are user_id, item_id"),
        ("model: {kind: dlrm}\ndata: {ids: {kind: hash, capacity: 3}}", "2:26: data.ids.capacity: hash takes no 'capacity'"),
        ("model: {kind: dlrm}\ndata: {ids: {kind: dynamic, min_count: 3}}", "dynamic takes no 'min_count'"),
    ],
)
def test_mistakes_are_told_with_their_place(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=r"job\.yaml:") as caught:
        loaded(tmp_path, text)
    assert said in str(caught.value)


def table_of(tmp_path: Path, name: str, users: list, items: list) -> DataConfig:
    path = tmp_path / name
    if name.endswith(".parquet"):
        parquet.write_table(pa.table({"user_id": users, "item_id": items}), path)
    else:
        path.write_text("".join(f"{user},{item}\n" for user, item in [("user_id", "item_id"), *zip(users, items, strict=True)]))
    return DataConfig(path=(str(path),), ids=ANY)


@pytest.mark.parametrize("name", ["views.parquet", "views.csv"])
def test_texts_are_hashed_and_integers_stay(tmp_path: Path, name: str) -> None:
    data = table_of(tmp_path, name, TEXTS, HASHES)
    (chunk,) = all_chunks(open_source(data))
    assert chunk.users.tolist() == hash64(TEXTS).tolist()
    assert chunk.items.tolist() == HASHES
    source, ids = open_numbered(data)
    assert ids is not None
    (numbers,) = all_chunks(source)
    assert ids.users[numbers.users].tolist() == hash64(TEXTS).tolist()
    assert ids.items[numbers.items].tolist() == HASHES
    assert sorted(set(numbers.items.tolist())) == [0, 1, 2, 3]
    found = scan(source, 0, ids)
    assert (found.users, found.items) == (3, 4)
    assert pickle.loads(pickle.dumps(found.to_read())).ids is None, "workers have them in the source"


def test_unsigned_hashes_are_the_same_64_bits(tmp_path: Path) -> None:
    large = [2**64 - 1, 2**63, 5]
    for name in ("views.parquet", "views.csv"):
        users = pa.array(large, pa.uint64()) if name == "views.parquet" else large
        (chunk,) = all_chunks(open_source(table_of(tmp_path, name, users, [1, 2, 3])))
        assert chunk.users.tolist() == [-1, -(2**63), 5]


def test_a_column_of_a_text_file_holds_texts_where_any_of_its_first_values_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for users in ([7, "ab"], ["ab", 7], ["007", 8], [7, 1 << 64], [7, "1e3"], ["", "ab"]):
        source = open_source(table_of(tmp_path, "views.csv", users, [1, 2]).model_copy(update={"on_bad_row": "skip"}))
        (chunk,) = all_chunks(source)
        assert chunk.users.tolist() == hash64([str(user) for user in users if user != ""]).tolist()
    with pytest.raises(DataError, match=r"views.csv:3: column 'user_id': the value is missing"):
        list(all_chunks(open_source(table_of(tmp_path, "views.csv", ["ab", ""], [1, 2]))))
    skipping = table_of(tmp_path, "views.csv", ["ab", "", "c\ufffd", "d"], [1, 2, 3, 4]).model_copy(update={"on_bad_row": "skip"})
    chunks = list(all_chunks(open_source(skipping)))
    assert np.concatenate([chunk.users for chunk in chunks]).tolist() == hash64(["ab", "d"]).tolist()
    assert chunks[0].dropped.kinds == {"missing": 1, "not UTF-8": 1}
    # What comes later than anybody looks.
    monkeypatch.setattr(text, "SAMPLE_BYTES", 30)
    for later, said in (("ab", "'ab' is not an integer"), ("07", "'07' begins with a zero")):
        data = table_of(tmp_path, "views.csv", [7] * 20 + [later], [1] * 21)
        with pytest.raises(DataError, match=rf"views.csv:22: column 'user_id': {said}: .* say data.texts: \[user_id\]"):
            list(all_chunks(open_source(data)))
        read = list(all_chunks(open_source(data.model_copy(update={"texts": ("user_id",)}))))
        assert np.concatenate([chunk.users for chunk in read]).tolist() == hash64(["7"] * 20 + [later]).tolist()


def test_numbers_are_read_as_texts_where_that_is_said(tmp_path: Path) -> None:
    for name, users in (("views.parquet", [7, 8]), ("views.parquet", [7.0, 8.0]), ("views.csv", [7, 8])):
        data = table_of(tmp_path, name, users, [1, 2]).model_copy(update={"texts": ("user_id",)})
        (chunk,) = all_chunks(open_source(data))
        assert chunk.users.tolist() == hash64(["7", "8"]).tolist()


def test_files_that_differ_in_kind_are_read_alike_or_refused(tmp_path: Path) -> None:
    one, other, third = (
        table_of(tmp_path, name, users, [1]) for name, users in (("a.csv", ["x"]), ("b.csv", [7]), ("c.parquet", [7]))
    )
    assert one.path is not None
    assert other.path is not None
    assert third.path is not None
    chunks = all_chunks(open_source(one.model_copy(update={"path": (*other.path, *one.path)})))
    assert np.concatenate([chunk.users for chunk in chunks]).tolist() == hash64(["7", "x"]).tolist()
    mixed = one.model_copy(update={"path": (*third.path, *one.path)})
    with pytest.raises(
        DataError, match=r"data.user: .*a.csv has texts, but .*c.parquet has whole numbers.* data.texts: \[user_id\]"
    ):
        open_source(mixed)
    chunks = all_chunks(open_source(mixed.model_copy(update={"texts": ("user_id",)})))
    assert np.concatenate([chunk.users for chunk in chunks]).tolist() == hash64(["7", "x"]).tolist()


def test_data_that_change_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "KEPT_BYTES", 0)
    source, _ = open_numbered(table_of(tmp_path, "views.csv", TEXTS, HASHES))
    table_of(tmp_path, "views.csv", ["new", *TEXTS], [1, *HASHES])
    with pytest.raises(DataError, match="other ids in it than when it was first read"):
        list(source.chunks(0))


@pytest.mark.parametrize("text", ["-007", "-00", "-07.0", "007", "00", "-0", "0", "-7", "70", "-", "0.0"])
def test_a_number_alone_is_read_as_among_others(text: str) -> None:
    """Whether all of a block are read at once or one by one, as where something else in it is wrong."""
    kind = integers("item_id", optional=False)
    found = kind.fast(pa.array([text, "5"]))
    assert (found is None) == (kind.problem(text) is not None)
    assert found is None or found.tolist() == kind.slow([text, "5"]).tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize("column", [["1|nan|3", "NA", "", "4"], [["1", "nan", "3"], ["NA"], None, ["4"]]])
def test_what_is_missing_in_a_list_of_numbers_is_left_out(column: list) -> None:
    kind = lists(integers("tags", optional=True), "|")
    for found in (kind.of(pa.array(column)), kind.slow(column)):
        assert isinstance(found, Lists)
        assert (found.values.tolist(), found.lengths.tolist()) == ([1, 3, 4], [2, 0, 0, 1])


def test_interactions_are_opened_once_beside_files_of_users_and_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = text.TextFile.open
    monkeypatch.setattr(text.TextFile, "open", lambda place, layout: (opened.append(Path(str(place)).name), real(place, layout))[1])
    path = table_of(tmp_path, "views.csv", ["a", "b"], [1, 2]).path
    (tmp_path / "users.csv").write_text("user_id,age\na,30\n")
    (tmp_path / "items.csv").write_text("item_id,price\n1,2.5\n")
    features = tuple(FeatureConfig(name=name, kind="number", of=side) for name, side in (("age", "user"), ("price", "item")))  # type: ignore[arg-type]
    sides = {f"{side}s": (str(tmp_path / f"{side}s.csv"),) for side in ("user", "item")}
    data = DataConfig(path=path, features=features, **sides)

    def looked_at() -> None:
        check_data(config.Config(data=data))

    def scanned() -> None:
        source, ids = open_numbered(data)
        with_features(scan(source, 0, ids), data)

    for use in (looked_at, scanned, lambda: id_columns(data), lambda: keep_names(data, tmp_path / "names", 0, 1)):
        opened.clear()
        use()
        assert opened.count("views.csv") == 1
        assert {"users.csv", "items.csv"} <= set(opened)


def clicks_of(tmp_path: Path, name: str) -> CtrDataConfig:
    columns = {"label": [0, 1, 1], "I1": [3, None, -2], "C1": ["0x 1", "+", "68301234"], "C2": ["b", None, ""]}
    path = tmp_path / name
    if name.endswith(".parquet"):
        parquet.write_table(pa.table({**columns, "C3": [17, 0, -5]}), path)
    else:
        rows = zip(*columns.values(), ["17", "0", "-5"], strict=True)
        path.write_text("".join("\t".join("" if one is None else str(one) for one in row) + "\n" for row in rows))
    names = ("C1", "C2", "C3")
    return CtrDataConfig(path=(str(path),), integers=("I1",), categories=names, ids=IdsConfig(kind="dynamic"))


@pytest.mark.parametrize("name", ["clicks.parquet", "clicks.txt"])
def test_categories_may_be_anything(tmp_path: Path, name: str) -> None:
    data = clicks_of(tmp_path, name)
    (clicks,) = open_sources(data)[0].chunks(0)
    assert clicks.ids[:, 0].tolist() == hash64(["0x 1", "+", "68301234"]).tolist()
    assert clicks.ids[:, 1].tolist() == [int(hash64(["b"])[0]), MISSING, MISSING]
    numbers = [17, 0, -5] if name == "clicks.parquet" else hash64(["17", "0", "-5"]).tolist()  # all of a text file are texts
    assert clicks.ids[:, 2].tolist() == numbers
    np.testing.assert_array_equal(clicks.numbers[:, 0], np.array([3, np.nan, -2], np.float32))
    keep_names(data, tmp_path / "names", 0, 1)
    assert set(se.Names(tmp_path / "names" / "C1").texts().values()) == {"0x 1", "+", "68301234"}


def test_a_bad_integer_beside_such_categories_is_told(tmp_path: Path) -> None:
    data = clicks_of(tmp_path, "clicks.txt")
    assert data.path is not None
    path = Path(data.path[0])
    path.write_text(path.read_text().replace("1\t-2\t", "1\t0x2\t"))
    with pytest.raises(DataError, match=r"clicks.txt:3: column 'I1' \(field 2\): '0x2' is no number"):
        list(open_sources(data)[0].chunks(0))
    skipped = list(open_sources(data.model_copy(update={"on_bad_row": "skip"}))[0].chunks(0))
    assert np.concatenate([one.ids[:, 0] for one in skipped]).tolist() == hash64(["0x 1", "+"]).tolist()


def test_all_files_of_a_job_read_a_column_alike(tmp_path: Path) -> None:
    """Also those of which one has digits alone: of users beside interactions, of validation beside training."""
    base = table_of(tmp_path, "views.csv", [7, "ab"], [1, 2])
    (tmp_path / "users.csv").write_text("user_id,age\n7,30\n")
    settings = {"path": base.path, "users": (str(tmp_path / "users.csv"),)}
    data = DataConfig(**settings, features=(FeatureConfig(name="age", kind="number", of="user"),))
    assert [ids.tolist() for ids, _ in rows_of_side(data, "user", open_source(data))] == [hash64(["7"]).tolist()]
    table_of(tmp_path, "views.csv", [7, 8], [1, 2])
    (tmp_path / "users.csv").write_text("user_id,age\nab,30\n")
    with pytest.raises(DataError, match=r"data.user: .*users.csv has texts in 'user_id', but .*views.csv has whole numbers"):
        list(rows_of_side(data, "user", open_source(data)))
    (tmp_path / "train.csv").write_text("label,site\n1,a\n0,7\n")
    (tmp_path / "valid.csv").write_text("label,site\n1,7\n")
    paths = {"path": (str(tmp_path / "train.csv"),), "validation_path": (str(tmp_path / "valid.csv"),)}
    clicks = CtrDataConfig.model_validate({**paths, "features": (FeatureConfig(name="site", kind="id"),)})
    _, other = open_sources(clicks)
    assert other is not None
    assert [chunk.ids.tolist() for chunk in other.chunks(0)] == [[[int(hash64(["7"])[0])]]]
