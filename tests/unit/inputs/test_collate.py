"""Samples with ids of any length become a batch, in worker processes too; what cannot is told with its feature and sample."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils.pin_memory import pin_memory

import shardembed as se
from shardembed.errors import ConfigError, InputError
from shardembed.inputs.ids import IdBatch
from shardembed.tables.table_config import Feature
from tests.amount import examples

FEATURES = (Feature("user", 0, None), Feature("films", 1, "sum"), Feature("history", 1, None))
FORMS = [
    list,
    tuple,
    np.array,
    torch.tensor,
    lambda ids: np.array(ids, np.uint16),
    lambda ids: torch.tensor(ids, dtype=torch.int32),
]


def sample(number: int, **other: Any) -> dict[str, Any]:
    return {"user": number, "films": list(range(number)), "history": [number] * (3 - number), "label": float(number), **other}


@examples(40)
@given(st.lists(st.tuples(st.lists(st.integers(0, 60_000), max_size=5), st.sampled_from(FORMS)), min_size=1, max_size=8))
def test_the_batch_is_what_offsets_would_have_said(rows: list[tuple[list[int], Any]]) -> None:
    samples = [{"films": form(ids) if ids else [], "user": ids[:1] or 7, "history": ids} for ids, form in rows]
    batch = se.Collate(FEATURES)(samples)
    ids = [ids for ids, _ in rows]
    offsets = torch.tensor([0, *np.cumsum([len(one) for one in ids]).tolist()])
    ragged = (torch.tensor([id for one in ids for id in one], dtype=torch.int64), offsets)
    users = torch.tensor([one[0] if one else 7 for one in ids])
    expected = IdBatch.of({"user": users, "films": ragged, "history": ragged}, FEATURES)
    assert torch.equal(batch.ids.ids, expected.ids)
    for found, wanted in zip(batch.ids.parts, expected.parts, strict=True):
        assert torch.equal(found.ids, wanted.ids)
        assert found.bag_lengths().tolist() == wanted.bag_lengths().tolist()
        assert found.shape == wanted.shape
    assert batch.lengths("history").tolist() == offsets.diff().tolist()
    assert len(batch) == len(rows)


def test_what_is_no_feature_goes_through_default_collate() -> None:
    batch = se.Collate(FEATURES)([sample(number, text=f"t{number}", nested={"x": np.ones(2) * number}) for number in range(3)])
    torch.testing.assert_close(batch["label"], torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64))
    assert batch["text"] == ["t0", "t1", "t2"]
    assert batch["nested"]["x"].shape == (3, 2)
    moved = batch.to("meta")
    assert {moved["nested"]["x"].device.type, moved.ids.ids.device.type, moved.ids.parts[1].ids.device.type} == {"meta"}
    with pytest.raises(
        KeyError, match=r"no value 'lable'; did you mean 'label'\? There are 'label', 'text', 'nested'; ids are in .ids"
    ):
        batch["lable"]
    with pytest.raises(KeyError, match="no feature 'hist'"):
        batch.lengths("hist")


def test_weights_stand_beside_their_ids() -> None:
    collate = se.Collate(FEATURES, weights={"films": "stars"})
    batch = collate([sample(0, stars=[]), sample(1, stars=2), sample(2, stars=[0.5, 3])])
    weights = batch.ids.parts[1].weights
    assert weights is not None
    assert weights.tolist() == [2.0, 0.5, 3.0]
    assert [part.weights is None for part in batch.ids.parts] == [True, False, True]
    assert set(batch.values) == {"label"}


def test_a_feature_of_two_tables_is_read_once_for_both() -> None:
    tables = [se.TableConfig(name, 9, 4, ["item"]) for name in ("one", "two")]
    emb = se.EmbeddingCollection(tables, optimizer=se.optim.SGD())
    batch = se.Collate(emb.features)([{"item": [1, 2]}, {"item": 3}])
    found = emb(batch.ids)
    wanted = emb({"item": (torch.tensor([1, 2, 3]), torch.tensor([0, 2, 3]))})
    for name in ("item@one", "item@two"):
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=0)
    assert batch.lengths("item").tolist() == [2, 1]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"films": ["a", "b"]},
            r"feature 'films': sample 1 has list \['a', 'b'\]; .* se.Hashing and se.Vocabulary make ids of texts",
        ),
        ({"films": [1, 2.5]}, r"feature 'films': sample 1 has list \[1, 2.5\]; ids are integers, or a list of them"),
        ({"films": [[1, 2], [3, 4]]}, r"feature 'films': sample 1 has ids of shape \[2, 2\]"),
        ({"films": [[1, 2], [3]]}, "feature 'films': sample 1 has list"),
        ({"films": [True, 4]}, "feature 'films': sample 1 has list"),
        ({"films": torch.tensor([0.5])}, "feature 'films': sample 1 has Tensor"),
        ({"films": np.array([1 << 63], np.uint64)}, "sample 1 has the id 9223372036854775808, which does not fit int64"),
        ({"user": None}, "feature 'user': sample 1 has NoneType None"),
        ({"user": 1 << 63}, "feature 'user': sample 1 has"),
        ({"user": True}, "feature 'user': sample 1 has bool True"),
        ({"label": "good"}, "value 'label': torch's default_collate cannot put the samples together"),
        ({"more": 1}, "sample 1 of the batch has 'more', which sample 0 has not"),
        ({"stars": [1.0, 2.0]}, r"weights of feature 'films': sample 1 has 2 weight\(s\) for 1 id\(s\)"),
        ({"stars": ["x"]}, "weights of feature 'films': sample 1 has list"),
    ],
)
def test_a_sample_that_cannot_be_read_is_named(changed: dict[str, Any], message: str) -> None:
    collate = se.Collate(FEATURES, weights={"films": "stars"})
    samples = [sample(0, stars=[]), {**sample(1, stars=[1.0]), **changed}]
    with pytest.raises(InputError, match=message):
        collate(samples)


def test_a_sample_without_a_feature_is_named_with_what_is_near() -> None:
    broken = sample(1)
    broken["film"] = broken.pop("films")
    with pytest.raises(InputError, match="feature 'films': sample 1 of the batch lacks it; did you mean 'film'"):
        se.Collate(FEATURES)([sample(0), broken])
    with pytest.raises(InputError, match="sample 1 of the batch is tuple; samples must be dicts"):
        se.Collate(FEATURES)([sample(0), (1, 2)])  # type: ignore[list-item]


def test_settings_that_fit_no_feature_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"se.Collate\(emb.features\)"):
        se.Collate([])
    with pytest.raises(ConfigError, match=r"feature 'film' is not there; did you mean 'films'\?"):
        se.Collate(FEATURES, weights={"film": "stars"})
    with pytest.raises(ConfigError, match="feature 'history' is pooled by None; weights need"):
        se.Collate(FEATURES, weights={"history": "stars"})


def test_a_loader_pins_all_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(copy := tensor.clone())
        return copy

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    batch = pin_memory(se.Collate(FEATURES)([sample(1), sample(2)]))
    assert isinstance(batch, se.Collated)
    for tensor in (batch.ids.ids, *(part.lengths for part in batch.ids.parts), batch["label"]):
        assert any(tensor is one for one in pinned)
    assert batch.ids.parts[1].ids.tolist() == [0, 0, 1]


class Samples(Dataset[dict[str, Any]]):
    """Twelve samples, of which the one numbered `broken` has no usable ids."""

    def __init__(self, broken: int = -1) -> None:
        self._broken = broken

    def __len__(self) -> int:
        return 12

    def __getitem__(self, number: int) -> dict[str, Any]:
        return sample(number % 3, user="?" if number == self._broken else number)


def test_batches_come_whole_from_worker_processes() -> None:
    collate = pickle.loads(pickle.dumps(se.Collate(FEATURES)))
    alone, workers = (list(DataLoader(Samples(), 5, collate_fn=collate, num_workers=number)) for number in (0, 2))
    assert [len(batch) for batch in workers] == [5, 5, 2]
    for found, wanted in zip(workers, alone, strict=True):
        assert found.ids.features == wanted.ids.features
        assert torch.equal(found["label"], wanted["label"])
        assert torch.equal(found.ids.ids, wanted.ids.ids)
        for one, other in zip(found.ids.parts, wanted.ids.parts, strict=True):
            assert torch.equal(one.ids, other.ids)
            assert torch.equal(one.bag_lengths(), other.bag_lengths())
            assert one.ids.untyped_storage().data_ptr() == found.ids.ids.untyped_storage().data_ptr()  # sent once
    with pytest.raises(InputError, match="feature 'user': sample 2 has str '\\?'"):
        list(DataLoader(Samples(broken=7), 5, collate_fn=collate, num_workers=1))
