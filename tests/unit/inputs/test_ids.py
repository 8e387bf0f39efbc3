"""Every accepted form of a batch reads alike, and every malformed one says which feature is wrong and what to do."""

from __future__ import annotations

import pickle
from types import MappingProxyType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardembed.errors import DtypeError, FeatureError, InputError, OffsetsError
from shardembed.inputs.dense import DenseParts
from shardembed.inputs.features import FeatureIds
from shardembed.inputs.ids import IdBatch
from shardembed.tables.pooling import Pooling
from shardembed.tables.table_config import Feature

CPU = torch.device("cpu")
POOLED = [Feature("item", 0, "sum")]
SINGLE = [Feature("item", 0, None)]
IDS = torch.tensor([3, 1, 4, 1, 5])
OFFSETS = torch.tensor([0, 2, 2, 5])


def read(value: Any, features: list[Feature] = POOLED) -> FeatureIds:
    return IdBatch.of({"item": value}, features, CPU).parts[0]


def check(part: FeatureIds, ids: torch.Tensor, lengths: list[int], shape: tuple[int, ...]) -> None:
    assert torch.equal(part.ids, ids)
    assert part.bag_lengths().tolist() == lengths
    assert part.bags == len(lengths)
    assert part.shape == shape


def test_a_matrix_is_a_bag_a_row() -> None:
    check(read(torch.tensor([[1, 2], [3, 4], [5, 6]])), torch.arange(1, 7), [2, 2, 2], (3,))


def test_a_vector_is_a_bag_an_id() -> None:
    check(read(IDS), IDS, [1] * 5, (5,))


def test_bags_may_have_no_ids() -> None:
    check(read(torch.empty(3, 0, dtype=torch.int64)), IDS[:0], [0, 0, 0], (3,))
    check(read(torch.empty(0, dtype=torch.int64)), IDS[:0], [], (0,))
    check(read((IDS[:0], torch.tensor([0]))), IDS[:0], [], (0,))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ragged_forms_read_alike(dtype: torch.dtype) -> None:
    ids, offsets = IDS.to(dtype), OFFSETS.to(dtype)
    nested = torch.nested.nested_tensor_from_jagged(ids, OFFSETS)
    for value in [(ids, offsets), [ids, offsets], (ids, offsets, None), nested]:
        check(read(value), ids, [2, 0, 3], (3,))
    batch = IdBatch.of({"item": (ids, offsets)}, POOLED, CPU)
    assert batch.ids.dtype == torch.int64  # whatever came in


def test_weights_travel_with_their_ids() -> None:
    weights = torch.rand(5)
    assert read((IDS, OFFSETS, weights)).weights is not None
    part = read((IDS.view(5, 1), None, weights.view(5, 1)))
    check(part, IDS, [1] * 5, (5,))
    assert part.weights is not None
    assert torch.equal(part.weights, weights)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 0, 3), (2, 1, 2, 2)])
def test_without_pooling_any_shape_is_kept(shape: tuple[int, ...]) -> None:
    part = read(torch.ones(shape, dtype=torch.int64), SINGLE)
    assert part.shape == shape
    assert part.ids.dim() == 1
    assert read((IDS, OFFSETS), SINGLE).shape == (5,)


def test_features_are_taken_by_name_in_the_collections_order() -> None:
    features = [Feature("b", 0, "sum"), Feature("a", 1, "sum")]
    batch = IdBatch.of({"a": torch.tensor([1]), "b": torch.tensor([2, 3])}, features, CPU)
    assert batch.ids.tolist() == [2, 3, 1]
    assert batch.sizes == [2, 1]


def test_a_keyed_jagged_tensor_reads_like_a_dict() -> None:
    torchrec = pytest.importorskip("torchrec")
    features = [Feature("b", 0, "sum"), Feature("a", 1, "sum")]
    lengths = torch.tensor([2, 1, 0, 1])
    values, weights = torch.tensor([7, 8, 9, 5]), torch.rand(4)
    for weight in (None, weights):
        jagged = torchrec.KeyedJaggedTensor.from_lengths_sync(["a", "b"], values, lengths, weight)
        batch = IdBatch.of(jagged, features, CPU)
        check(batch.parts[0], torch.tensor([5]), [0, 1], (2,))
        check(batch.parts[1], torch.tensor([7, 8, 9]), [2, 1], (2,))
        got = batch.parts[1].weights
        assert (got is None) if weight is None else torch.equal(got, weights[:3])  # type: ignore[arg-type]


def test_a_feature_of_two_tables_is_read_for_both() -> None:
    features = [Feature("a@t", 0, "sum", "a"), Feature("a@u", 1, None, "a")]
    batch = IdBatch.of({"a": (IDS, OFFSETS)}, features, CPU)
    assert batch.ids.tolist() == IDS.tolist() * 2
    assert [part.shape for part in batch.parts] == [(3,), (5,)]
    with pytest.raises(FeatureError, match=r"lacks feature\(s\) \['a'\]"):
        IdBatch.of({}, features, CPU)


@pytest.mark.parametrize(
    ("lengths", "says"),
    [
        ([2, -1, 1, 1], "has the length -1"),
        ([2, 1, 0, 2], "add up to 5, but it has 4 values"),
    ],
)
def test_a_keyed_jagged_tensor_whose_lengths_lie_is_refused(lengths: list[int], says: str) -> None:
    torchrec = pytest.importorskip("torchrec")
    jagged = torchrec.KeyedJaggedTensor.from_lengths_sync(["a", "b"], torch.arange(4), torch.tensor(lengths))
    with pytest.raises(OffsetsError, match=says):
        IdBatch.of(jagged, [Feature("a", 0, "sum"), Feature("b", 1, "sum")], CPU)


def test_to_moves_every_tensor() -> None:
    batch = IdBatch.of({"item": (IDS, OFFSETS, torch.rand(5))}, POOLED, CPU)
    moved = batch.to("meta")
    part = moved.parts[0]
    assert isinstance(part.lengths, torch.Tensor)
    assert part.weights is not None
    assert {t.device.type for t in (moved.ids, part.ids, part.lengths, part.weights)} == {"meta"}
    assert batch.to("cpu").parts[0].shape == (3,)
    assert IdBatch.of({"item": IDS}, POOLED, CPU).to("meta").parts[0].lengths == 1


# Differences of these wrap around: all are above 0, and add up to the number of ids.
WRAPPED = torch.tensor([0, 2**63 - 1, -(2**63), -1, 5])
HOLES = torch.nested.nested_tensor_from_jagged(torch.arange(6), torch.tensor([0, 3, 6]), torch.tensor([2, 2]))
STRIDED = torch.nested.nested_tensor([torch.arange(2), torch.arange(3)], layout=torch.strided)
WRONG = [
    ("a list of numbers", [1, 2, 3, 4], InputError, r"\(ids, offsets\)"),
    ("a number", 7, DtypeError, "not int"),
    ("a tuple of one", (IDS,), InputError, r"\(ids, offsets\) or"),
    ("float ids", IDS.float(), DtypeError, r"int32 or int64, not torch.float32; use ids.long\(\)"),
    ("bool ids", IDS.bool(), DtypeError, "torch.bool"),
    ("small ids", IDS.to(torch.int16), DtypeError, "torch.int16"),
    ("ids that are no tensor", ([1], OFFSETS), DtypeError, "must be a tensor, not list"),
    ("ids of no dimension", torch.tensor(3), InputError, r"\[B\] or \[B, ids a bag\]"),
    ("ids of three dimensions", torch.ones(2, 2, 2, dtype=torch.int64), InputError, r"not \[2, 2, 2\]; pass \(ids, offsets\)"),
    ("a matrix beside offsets", (IDS.view(1, 5), OFFSETS), InputError, "one dimension"),
    ("offsets from 1", (IDS, torch.tensor([1, 5])), OffsetsError, "run from 1 to 5, but must run from 0 to 5"),
    ("offsets below 0", (IDS, torch.tensor([-1, 5])), OffsetsError, "run from -1 to 5"),
    ("torch's offsets", (IDS, OFFSETS[:-1]), OffsetsError, "need the number of ids appended"),
    ("offsets past the end", (IDS, torch.tensor([0, 6])), OffsetsError, "from 0 to 6"),
    ("offsets that fall", (IDS, torch.tensor([0, 4, 2, 5])), OffsetsError, "fall from 4 to 2 at position 2"),
    ("offsets beyond all numbers", (IDS, WRAPPED), OffsetsError, "fall from 9223372036854775807 to -9223372036854775808"),
    ("no offsets at all", (IDS, OFFSETS[:0]), OffsetsError, "offsets are empty"),
    ("no offsets and no ids", (IDS[:0], OFFSETS[:0]), OffsetsError, "offsets are empty"),
    ("float offsets", (IDS, OFFSETS.float()), DtypeError, "offsets must be a one-dimensional tensor of integers"),
    ("two-dimensional offsets", (IDS, OFFSETS.view(2, 2)), DtypeError, "one-dimensional"),
    ("a list of offsets", (IDS, [0, 5]), DtypeError, "offsets must be"),
    ("integer weights", (IDS, OFFSETS, IDS), DtypeError, "floating-point"),
    ("weights that are no tensor", (IDS, OFFSETS, [1.0] * 5), DtypeError, "floating-point"),
    ("too few weights", (IDS, OFFSETS, torch.rand(4)), InputError, "4 weights for 5 ids"),
    ("weights of another shape", (IDS, None, torch.rand(1, 5)), InputError, r"\(1, 5\) must have the ids' shape \(5,\)"),
    ("a nested tensor with holes", HOLES, InputError, "holes"),
    ("a strided nested tensor", STRIDED, InputError, "torch.jagged"),
]


@pytest.mark.parametrize(("value", "error", "says"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_a_malformed_feature_is_refused_by_name(value: Any, error: type[InputError], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        read(value)
    assert type(caught.value) is error
    assert "feature 'item'" in str(caught.value)


def test_offsets_of_many_features_are_checked_as_those_of_one() -> None:
    features = [Feature("item", 0, "sum"), Feature("history", 0, "sum")]
    with pytest.raises(OffsetsError, match="feature 'history': offsets fall from 9223372036854775807"):
        IdBatch.of({"item": (IDS, torch.tensor([0, 1, 2, 3, 5])), "history": (IDS, WRAPPED)}, features, CPU)


@pytest.mark.parametrize("pooling", ["mean", "max", None])
def test_weights_need_sums(pooling: Any) -> None:
    with pytest.raises(InputError, match=f"feature 'item': weights need pooling 'sum'.*{pooling!r}"):
        read((IDS, OFFSETS, torch.rand(5)), [Feature("item", 0, pooling)])


def test_an_unknown_feature_gets_a_suggestion() -> None:
    features = [Feature("item", 0, "sum"), Feature("history", 0, "sum")]
    with pytest.raises(FeatureError, match=r"unknown feature 'histroy'; did you mean 'history'\?.*\['item', 'history'\]"):
        IdBatch.of({"item": IDS, "histroy": IDS}, features, CPU)
    with pytest.raises(FeatureError, match="unknown feature 'xyz'") as caught:
        IdBatch.of({"item": IDS, "history": IDS, "xyz": IDS}, features, CPU)
    assert "did you mean" not in str(caught.value)


def test_a_missing_feature_is_named() -> None:
    with pytest.raises(FeatureError, match=r"lacks feature\(s\) \['item'\]; pass an empty tensor"):
        IdBatch.of({}, POOLED, CPU)


@pytest.mark.parametrize("batch", [IDS, [IDS], None])
def test_a_batch_is_a_dict(batch: Any) -> None:
    with pytest.raises(DtypeError, match=r"dict of tensors by feature.*the features are \['item'\]"):
        IdBatch.of(batch, POOLED, CPU)


def bags(ids: Any, offsets: Any = None, weights: Any = None, last: bool = False) -> FeatureIds:
    return IdBatch.of_bags(ids, offsets, weights, last, POOLED[0], CPU).parts[0]


def test_embedding_bags_arguments() -> None:
    check(bags(IDS.view(1, 5)), IDS, [5], (1,))
    check(bags(IDS, OFFSETS[:-1]), IDS, [2, 0, 3], (3,))
    check(bags(IDS, OFFSETS, last=True), IDS, [2, 0, 3], (3,))
    check(bags(IDS[:0], OFFSETS[:0]), IDS[:0], [], (0,))
    assert bags(IDS, OFFSETS[:-1], torch.rand(5)).weights is not None
    assert bags(IDS.view(1, 5), None, torch.rand(1, 5)).weights is not None


def test_ids_behind_the_last_offset_belong_to_the_last_bag() -> None:
    weights = torch.arange(5.0)
    part = bags(IDS, torch.tensor([0, 1, 3]), weights, last=True)
    check(part, IDS, [1, 4], (2,))
    assert torch.equal(_weights(part), weights)
    with pytest.raises(InputError, match="3 weights for 5 ids"):
        bags(IDS, torch.tensor([0, 1, 3]), weights[:3], last=True)


def _nested(*lengths: int) -> torch.Tensor:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return torch.nested.nested_tensor_from_jagged(torch.arange(5.0)[: int(offsets[-1])], offsets)


def test_nested_ids_take_nested_weights() -> None:
    ids = torch.nested.nested_tensor_from_jagged(IDS, torch.tensor([0, 2, 2, 5]))
    part = bags(ids, None, _nested(2, 0, 3))
    check(part, IDS, [2, 0, 3], (3,))
    assert torch.equal(_weights(part), torch.arange(5.0))
    for arguments, says in (
        ((ids, None, torch.rand(5)), "nested ids need nested weights"),
        ((ids, None, _nested(3, 0, 2)), "the lengths of the nested ids"),
        ((ids, torch.tensor([0, 2])), "nested ids are bags already; offsets must be None"),
    ):
        with pytest.raises(InputError, match=says):
            bags(*arguments)


def _weights(part: FeatureIds) -> torch.Tensor:
    assert part.weights is not None
    return part.weights


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((IDS,), InputError, "one-dimensional ids need offsets"),
        ((IDS.view(1, 5), OFFSETS), InputError, "bags already; offsets must be None"),
        ((IDS, OFFSETS.view(2, 2)), DtypeError, "one-dimensional"),
        ((IDS, torch.tensor(0)), DtypeError, "one-dimensional"),
        ((IDS, torch.tensor([1, 3])), OffsetsError, "offsets begin at 1, but the first bag must begin at 0"),
        ((IDS, OFFSETS[:0]), OffsetsError, r"offsets \[\] make no bag, but there are 5 id\(s\)"),
        ((IDS, OFFSETS[:1], None, True), OffsetsError, r"offsets \[0\] make no bag, but there are 5 id\(s\)"),
        ((IDS, torch.tensor([0, 6]), None, True), OffsetsError, r"offsets end at 6, but there are 5 id\(s\); with include_last"),
        ((IDS, torch.tensor([0, 3, 2]), None, True), OffsetsError, "offsets fall from 3 to 2"),
        ((IDS, torch.tensor([0, 6])), OffsetsError, "offsets fall from 6 to 5"),
        ((IDS.float(), OFFSETS[:-1]), DtypeError, "int32 or int64"),
        (([1, 2], OFFSETS), DtypeError, "must be a tensor"),
    ],
)
def test_embedding_bags_wrong_arguments(arguments: tuple[Any, ...], error: type[InputError], says: str) -> None:
    with pytest.raises(error, match=says):
        bags(*arguments)


def parts_of(batch: IdBatch) -> list[tuple[list[int], list[int], tuple[int, ...]]]:
    return [(part.ids.tolist(), part.bag_lengths().tolist(), part.shape) for part in batch.parts]


@given(st.lists(st.tuples(st.sampled_from(["sum", "mean", None]), st.integers(0, 3), st.none() | st.integers(0, 3)), max_size=5))
def test_tensors_are_read_alike_the_short_way_and_the_long_one(shapes: list[tuple[Pooling, int, int | None]]) -> None:
    """Plain tensors of int64 in a dict take the short way; a Mapping that is no dict takes the long one."""
    shapes = [("sum", 2, None), *shapes]
    features = [Feature(f"f{i}", i, pooling) for i, (pooling, _, _) in enumerate(shapes)]
    sizes = [(rows,) if columns is None else (rows, columns) for _, rows, columns in shapes]
    given_ids = {f"f{i}": torch.randint(0, 100, size) for i, size in enumerate(sizes)}
    short, long = (IdBatch.of(batch, features, CPU) for batch in (given_ids, MappingProxyType(given_ids)))
    assert parts_of(short) == parts_of(long)
    assert short.ids.tolist() == long.ids.tolist()
    assert short.features == long.features == tuple(features)
    some = [i for i in range(len(features)) if i % 2 == 0]
    for batch in (short, pickle.loads(pickle.dumps(short)), short.to("cpu")):
        assert (batch.sizes, batch.bags, batch.weighted) == (long.sizes, long.bags, long.weighted)
        assert list(batch.shapes) == list(long.shapes) == [part.shape for part in long.parts]
        assert batch.lengths_B.tolist() == long.lengths_B.tolist()
        assert batch.bag_lengths(some).tolist() == long.bag_lengths(some).tolist()


def test_what_routing_wants_to_know_of_tensors_is_known_without_their_parts() -> None:
    batch = IdBatch.of({"item": IDS, "user": IDS.view(5, 1)}, [*POOLED, Feature("user", 1, "mean")], CPU)
    assert isinstance(batch.parts, DenseParts)
    asked = (batch.sizes_F, batch.bags_F, batch.lengths_B, batch.weighted, batch.shapes, batch.to("meta").sizes, len(batch.parts))
    assert len(asked) == 7
    assert "_cut" not in vars(batch.parts)
    assert [part.ids.tolist() for part in batch.parts] == [IDS.tolist()] * 2
    assert "_cut" in vars(batch.parts)


@given(st.data(), st.integers(0, 3), st.sampled_from([(None,), ("sum",), ("sum", None, "mean")]))
def test_bags_are_read_alike_together_and_one_by_one(data: st.DataObject, bags: int, poolings: tuple[Pooling, ...]) -> None:
    features = tuple(Feature(f"f{i}", i, pooling) for i, pooling in enumerate(poolings))
    batch, cuts = {}, st.lists(st.integers(-1, 4), min_size=bags + 1, max_size=bags + 1)  # at fault as often as not
    for feature in features:
        offsets = data.draw(st.one_of(cuts, cuts.map(lambda cut: [0, *sorted(map(abs, cut))[1:]])))
        count = data.draw(st.sampled_from([max(0, offsets[-1]), 3]))
        batch[feature.name] = torch.arange(count), torch.tensor(offsets)
    results = []
    for given_batch in (batch, MappingProxyType(batch)):  # the latter takes the long way
        try:
            results.append(IdBatch.of(given_batch, features))
        except OffsetsError as error:
            results.append(str(error))
    short, long = results
    if isinstance(long, str):
        assert short == long
        return
    assert isinstance(short, IdBatch)
    assert torch.equal(short.ids, long.ids)
    for ours, theirs in zip(short.parts, long.parts, strict=True):
        assert ours.shape == theirs.shape
        assert torch.equal(ours.ids, theirs.ids)
        assert torch.equal(ours.bag_lengths(), theirs.bag_lengths())


def test_a_batch_that_has_been_read_is_taken_as_it_is() -> None:
    batch = IdBatch.of({"item": (IDS, OFFSETS)}, POOLED)
    again = pickle.loads(pickle.dumps(batch))  # as from a worker of a DataLoader
    assert IdBatch.of(batch, tuple(POOLED), CPU) is batch
    assert parts_of(IdBatch.of(again, tuple(POOLED), CPU)) == parts_of(batch)
    with pytest.raises(
        FeatureError, match=r"read for the features \['item'\], but is looked up for \['user'\]; make it with IdBatch.of"
    ):
        IdBatch.of(batch, (Feature("user", 0, "sum"),), CPU)
