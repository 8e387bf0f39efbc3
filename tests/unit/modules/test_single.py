"""The drop-ins on one rank: torch's signatures, attributes, starts and refusals."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import shardembed as se
from shardembed.errors import ConfigError, FeatureError, InputError, PickleError, StepError, UnsupportedError

OURS = se.optim.SGD(lr=0.1)
ALL = torch.arange(6)
KINDS = pytest.mark.parametrize("kind", ["Embedding", "EmbeddingBag"])
ATTRIBUTES = ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")


def positional(function: Any) -> list[tuple[str, Any]]:
    """Names and defaults of what may be passed by position."""
    parameters = inspect.signature(function).parameters.values()
    return [(one.name, one.default) for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]


@KINDS
@pytest.mark.parametrize("method", ["__init__", "from_pretrained", "forward"])
def test_signatures_are_torchs(kind: str, method: str) -> None:
    assert positional(getattr(getattr(se, kind), method)) == positional(getattr(getattr(nn, kind), method))


@KINDS
@pytest.mark.parametrize(
    "settings",
    [{}, {"padding_idx": 2}, {"padding_idx": -1, "sparse": True}, {"max_norm": 2.0, "norm_type": 1.0, "scale_grad_by_freq": True}],
    ids=str,
)
def test_attributes_are_torchs(kind: str, settings: dict[str, Any]) -> None:
    names = ATTRIBUTES if kind == "Embedding" else (*ATTRIBUTES, "mode", "include_last_offset")
    bag: dict[str, Any] = {} if kind == "Embedding" else {"mode": "sum", "include_last_offset": True}
    for given in (settings, {**settings, **bag}):
        ours, torchs = getattr(se, kind)(6, 3, **given), getattr(nn, kind)(6, 3, **given)
        assert {name: getattr(ours, name) for name in names} == {name: getattr(torchs, name) for name in names}


def test_the_representation_reads_like_torchs() -> None:
    assert repr(se.Embedding(6, 3)) == "Embedding(6, 3, table_wise over 1 rank(s))"
    module = se.EmbeddingBag(6, 3, max_norm=2.0, norm_type=1.0, scale_grad_by_freq=True, mode="sum", sparse=True, padding_idx=-1)
    assert repr(module) == (
        "EmbeddingBag(6, 3, padding_idx=5, max_norm=2.0, norm_type=1.0, scale_grad_by_freq=True, sparse=True, mode='sum', "
        "table_wise over 1 rank(s))"
    )


def test_the_representation_says_that_ids_come_and_go() -> None:
    growing = se.Embedding(None, 3, dynamic=se.Dynamic(unknown="zeros"), optimizer=OURS)
    settings = "Dynamic(eviction=None, admission=None, unknown='zeros')"
    assert repr(growing) == f"Embedding(None, 3, dynamic={settings}, table_wise over 1 rank(s))"
    tables = [se.TableConfig("fixed", 6, 3), se.TableConfig("item", 600, 3, dynamic=se.Dynamic(se.LRU()))]
    lines = repr(se.EmbeddingCollection(tables, optimizer=OURS)).splitlines()
    assert lines[1:3] == [
        "  fixed: 6 x 3, table_wise over 1 rank(s)",
        "  item: 600 x 3, table_wise over 1 rank(s), Dynamic(eviction=LRU(), admission=None, unknown='start')",
    ]


@KINDS
@pytest.mark.parametrize(
    "settings",
    [
        {"padding_idx": np.int64(-2), "max_norm": np.float32(1.5), "norm_type": np.float64(1)},
        {"padding_idx": torch.tensor(2), "max_norm": True, "norm_type": np.int8(3)},
        {"max_norm": torch.tensor(0.5)},
    ],
    ids=str,
)
def test_numbers_of_numpy_and_torch_are_taken_as_torch_does(kind: str, settings: dict[str, Any]) -> None:
    torchs = getattr(nn, kind)(np.int32(6), np.uint8(3), **settings)
    own, ours = copy.deepcopy(torchs), getattr(se, kind)(np.int32(6), np.uint8(3), **settings, optimizer=OURS)
    ours.load_rows("embedding", torchs.weight.detach())
    converted = se.shard(nn.Sequential(own), optimizer=OURS, verbose=False)[0]
    expected = torchs(ALL.view(2, 3))
    for module in (ours, converted):
        torch.testing.assert_close(module(ALL.view(2, 3)), expected)
        assert json.dumps([getattr(module, name) for name in ATTRIBUTES]), "kept as Python's"
        assert {name: getattr(module, name) for name in ATTRIBUTES} == {name: getattr(torchs, name) for name in ATTRIBUTES}


@KINDS
@pytest.mark.parametrize(
    "settings",
    [{"padding_idx": True}, {"padding_idx": 1.0}, {"max_norm": "1"}, {"num_embeddings": 6.0}, {"num_embeddings": True}],
    ids=str,
)
def test_what_is_no_number_to_torch_is_refused(kind: str, settings: dict[str, Any]) -> None:
    with pytest.raises((TypeError, IndexError)):  # in torch some not before the lookup
        getattr(nn, kind)(**{"num_embeddings": 6, "embedding_dim": 3, **settings})(ALL.view(2, 3))
    with pytest.raises(ConfigError, match=f"table 'embedding': {next(iter(settings))} must be"):
        getattr(se, kind)(**{"num_embeddings": 6, "embedding_dim": 3, **settings})


@KINDS
def test_the_padding_row_starts_at_zero_and_can_be_written(kind: str) -> None:
    module = getattr(se, kind)(6, 3, padding_idx=-2, optimizer=OURS)
    rows = module.rows("embedding", ALL)
    assert not rows[4].any()
    assert rows[[0, 1, 2, 3, 5]].abs().min() > 0
    rows[4] = 7.0
    module.load_rows("embedding", rows)
    assert torch.equal(module.rows("embedding", torch.tensor([4])), torch.full((1, 3), 7.0))


@KINDS
def test_rows_start_from_a_standard_normal_distribution(kind: str) -> None:
    rows = getattr(se, kind)(20_000, 4, optimizer=OURS).rows("embedding", torch.arange(20_000))
    assert abs(float(rows.mean())) < 0.02
    assert abs(float(rows.std()) - 1) < 0.02


@KINDS
def test_reset_parameters_draws_rows_again(kind: str) -> None:
    fresh = getattr(se, kind)(6, 3, padding_idx=1, optimizer=OURS)
    start = fresh.rows("embedding", ALL)
    given = getattr(se, kind).from_pretrained(torch.ones(6, 3), freeze=False, padding_idx=1, optimizer=OURS)
    assert torch.equal(given.rows("embedding", ALL), torch.ones(6, 3))
    for module in (fresh, given):
        module.load_rows("embedding", torch.full((6, 3), 5.0))
        module.reset_parameters()
        assert torch.equal(module.rows("embedding", ALL), start)
        module.reset_parameters(seed=1)
        other = module.rows("embedding", ALL)
        assert not other[1].any()
        assert (other != start)[[0, 2, 3, 4, 5]].all()


def test_reset_parameters_goes_back_to_init() -> None:
    module = se.Embedding(6, 3, _weight=torch.ones(6, 3), init=se.Constant(0.25), optimizer=OURS)
    module.reset_parameters()
    assert torch.equal(module.rows("embedding", ALL), torch.full((6, 3), 0.25))


@KINDS
def test_given_rows_are_frozen_only_where_asked(kind: str) -> None:
    """`from_pretrained` freezes by default; a row of padding is not set to zero there."""
    make = getattr(se, kind)
    given = torch.randn(6, 3)
    for module, frozen in (
        (make.from_pretrained(given, padding_idx=2, optimizer=OURS), True),
        (make.from_pretrained(given, freeze=False, padding_idx=2, optimizer=OURS), False),
        (make(6, 3, _weight=given, optimizer=OURS), False),
        (make(6, 3, _weight=given, _freeze=True), True),
    ):
        assert torch.equal(module.rows("embedding", ALL), given)
        output = module(ALL.view(2, 3))
        assert output.requires_grad is not frozen
        if not frozen:
            output.sum().backward()
            se.Optimizer(module).step()
        assert torch.equal(module.rows("embedding", ALL), given) is frozen


@KINDS
@pytest.mark.filterwarnings("error")
def test_rows_are_read_from_mapped_files(kind: str, tmp_path: Path) -> None:
    given = torch.randn(6, 3)
    given.numpy().tofile(tmp_path / "rows")
    mapped = torch.from_file(str(tmp_path / "rows"), shared=False, size=18).view(6, 3)
    array = np.memmap(tmp_path / "rows", dtype=np.float32, mode="c", shape=(6, 3))
    for source in (mapped, torch.from_numpy(array)):
        module = getattr(se, kind).from_pretrained(source, freeze=False, optimizer=OURS)
        assert torch.equal(module.rows("embedding", ALL), given)
    module.load_rows("embedding", np.zeros((6, 3), dtype=np.float32))
    assert torch.equal(mapped, given), "the file is not what is trained"
    module.load_rows("embedding", np.memmap(tmp_path / "rows", dtype=np.float32, mode="r", shape=(6, 3)))
    assert torch.equal(module.rows("embedding", ALL), given)


def test_the_dtype_is_the_given_one() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert se.Embedding(6, 3, dtype=dtype, optimizer=OURS)(ALL).dtype == dtype
        assert se.EmbeddingBag(6, 3, _weight=torch.ones(6, 3, dtype=dtype))(ALL.view(2, 3)).dtype == dtype
    torch.set_default_dtype(torch.float64)
    try:
        assert se.Embedding(6, 3, optimizer=OURS)(ALL).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_weight_is_the_table_or_says_where_it_is() -> None:
    ours, exposed = se.Embedding(6, 3, optimizer=OURS, feature="item"), se.Embedding(6, 3)
    assert (ours.weight.shape, ours.weight.dtype) == ((6, 3), torch.float32)
    with pytest.raises(UnsupportedError, match=r"table 'item' lies cut over the ranks.*rows\(table, ids\).*load_rows.*unshard"):
        _ = ours.weight + 1
    with pytest.raises(AttributeError, match="has no attribute 'wieght'"):
        _ = ours.wieght
    assert isinstance(exposed.weight, nn.Parameter)
    assert torch.equal(exposed.weight.detach(), exposed.rows("embedding", ALL))


@pytest.mark.parametrize("sparse", [False, True])
def test_without_an_optimizer_gradients_are_torchs(sparse: bool) -> None:
    ids = torch.tensor([[1, 2, 1], [5, 2, 5]])
    for kind in ("Embedding", "EmbeddingBag"):
        ours = getattr(se, kind)(6, 3, sparse=sparse, padding_idx=2)
        torchs = getattr(nn, kind).from_pretrained(ours.weight.detach().clone(), freeze=False, sparse=sparse, padding_idx=2)
        for module in (ours, torchs):
            module(ids).square().sum().backward()
            module(ids[:1]).sum().backward()  # gradients add up
        assert ours.weight.grad is not None
        assert ours.weight.grad.is_sparse is sparse
        torch.testing.assert_close(ours.weight.grad.to_dense(), torchs.weight.grad.to_dense())
        if sparse:
            assert ours.weight.grad.coalesce().indices().tolist() == [[1, 5]]


@pytest.mark.parametrize("no_gradients", [torch.no_grad, torch.inference_mode])
def test_evaluation_gives_the_same_numbers_without_gradients(no_gradients: Any) -> None:
    for kind in ("Embedding", "EmbeddingBag"):
        module = getattr(se, kind)(6, 3, max_norm=1.0, optimizer=OURS)
        with no_gradients():
            first = module.eval()(ALL.view(2, 3))
        assert not first.requires_grad
        output = module.train()(ALL.view(2, 3))
        assert torch.equal(output, first)
        output.sum().backward()  # what inference_mode renormalised can be trained
        se.Optimizer(module).step()


@KINDS
@pytest.mark.parametrize("frozen", [False, True], ids=["learns", "frozen"])
@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize(
    "cut", [se.table_wise(0), se.row_wise(), se.column_wise([0, 0]), se.replicated()], ids=lambda cut: cut.kind
)
def test_answers_may_be_written_into_as_torchs(kind: str, frozen: bool, deterministic: bool, cut: se.Placement) -> None:
    given, factor = torch.randn(6, 4), nn.Parameter(torch.tensor(0.5))
    torchs = getattr(nn, kind).from_pretrained(given, freeze=frozen)
    ours = getattr(se, kind).from_pretrained(given, freeze=frozen, plan=cut, deterministic=deterministic)
    batches = [ALL.view(2, 3), torch.empty(0, 3, dtype=torch.int64)]
    if kind == "Embedding":
        batches += [ALL, torch.tensor(3), torch.nested.nested_tensor([ALL[:2], ALL[2:]], layout=torch.jagged)]
    for ids in batches:
        for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            seen = []
            for module in (torchs, ours):
                with context():
                    answer = module(ids)
                    answer *= 3.0
                if context is not torch.inference_mode:
                    answer += factor  # after no_grad too
                flat = answer.values() if answer.is_nested else answer
                seen.append(flat.detach())
                if context is torch.enable_grad:
                    (flat * torch.arange(flat.numel()).view_as(flat)).sum().backward()
            assert torch.equal(*seen), (tuple(ids.shape), context)
    assert factor.grad is not None
    if not frozen:
        torch.testing.assert_close(torch.cat([part.grad for part in ours.parameters()], 1), torchs.weight.grad)


@pytest.mark.parametrize("deterministic", [False, True])
def test_weights_written_into_before_the_backward_are_noticed(deterministic: bool) -> None:
    weights = torch.ones(2, 3)
    output = se.EmbeddingBag(6, 3, mode="sum", deterministic=deterministic)(ALL.view(2, 3), None, weights)
    weights *= 2.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_answers_of_one_call_are_not_written_into_below_a_checkpoint() -> None:
    """Run again it would meet what it has written; by calls of their own modules look their rows up again."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e = nn.Embedding(6, 3)

        def part(self, ids: torch.Tensor) -> torch.Tensor:
            answer = self.e(ids)
            answer *= 3.0
            return answer.tanh()

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.part, ids, use_reentrant=False)

    torch.manual_seed(0)
    plain, own = Model(), Model()
    own.load_state_dict(plain.state_dict())
    for model in (plain, se.shard(own, verbose=False)):
        model(ALL).sum().backward()
    torch.testing.assert_close(next(own.parameters()).grad, plain.e.weight.grad)
    shared = se.shard(plain, inputs=lambda ids: {"e": ids}, verbose=False)
    with pytest.raises(StepError, match=r"what e answered was written into in place.*before a checkpoint ran"):
        shared(ALL).sum().backward()


@KINDS
def test_the_only_table_needs_no_name(kind: str) -> None:
    module, given = getattr(se, kind)(6, 3, optimizer=OURS), torch.randn(6, 3)
    for load in (
        lambda: module.load_rows(given),
        lambda: module.load_rows(source=given),
        lambda: module.load_rows("embedding", given),
    ):
        module.reset_parameters()
        load()
        for rows in (
            module.rows(ALL),
            module.rows(ids=ALL),
            module.rows("embedding", ALL),
            module.rows(table="embedding", ids=ALL),
        ):
            assert torch.equal(rows, given)
    for found, named in zip(module.topk(given, 2), module.topk(given, 2, "embedding"), strict=True):
        assert torch.equal(found, named)
    several = se.EmbeddingCollection([se.TableConfig("a", 6, 3), se.TableConfig("b", 6, 3)], optimizer=OURS)
    for call in (lambda: several.rows(ALL), lambda: several.load_rows(given), lambda: several.topk(given, 2)):
        with pytest.raises(FeatureError, match=r"there are 2 tables, so name one of them: \['a', 'b'\]"):
            call()


def test_writers_of_whole_tensors_are_told_what_saves_a_table(tmp_path: Path) -> None:
    """safetensors' too, by which transformers' save_pretrained saves."""
    weight = se.Embedding(6, 3, optimizer=OURS, feature="item").weight
    says = r"table 'item' lies cut over the ranks, so .* cannot write it.*se.save_checkpoint\(folder, model\)"
    writers: list[Any] = [lambda: weight.untyped_storage().data_ptr(), lambda: weight.storage()]
    writers.append(lambda: safetensors.torch.save_file({"weight": weight}, tmp_path / "model"))
    for write in (*writers, lambda: torch.save(weight, tmp_path / "model")):
        with pytest.raises(PickleError, match=says):
            write()
    for read in (lambda: weight.numpy(), lambda: weight.tolist(), lambda: np.asarray(weight), lambda: weight.sum()):
        with pytest.raises(UnsupportedError, match=r"table 'item' lies cut over the ranks.*rows\(table, ids\)"):
            read()


class Resizable(nn.Module):
    """Resizes as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(6, 3)

    def resize_token_embeddings(self, size: int) -> nn.Module:
        if self.e.weight.shape[0] == size:
            return self.e
        if not isinstance(self.e, nn.Embedding):
            raise TypeError(f"Old embeddings are of type {type(self.e)}")
        self.e = nn.Embedding(size, 3)
        return self.e


def test_resizing_a_sharded_model_says_what_to_do() -> None:
    model = nn.Sequential(Resizable())
    se.shard(model, optimizer=OURS, verbose=False)
    assert model[0].resize_token_embeddings(6) is model[0].e
    with pytest.raises(UnsupportedError, match=r"Resizable.resize_token_embeddings: a sharded table keeps its size.*\['0.e'\]"):
        model[0].resize_token_embeddings(7)
    se.unshard(model)
    assert model[0].resize_token_embeddings(7).num_embeddings == 7


def test_a_module_is_neither_pickled_nor_copied(tmp_path: Path) -> None:
    for optimizer in (OURS, None):
        model = nn.Sequential(se.Embedding(6, 3, optimizer=optimizer, feature="item"))
        for write in (pickle.dumps, copy.copy, copy.deepcopy, lambda model: torch.save(model, tmp_path / "model")):
            with pytest.raises(PickleError, match=r"cannot be pickled or deep-copied: its table\(s\) \['item'\].*unshard"):
                write(model[0])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"padding_idx": 6}, "padding_idx must be a row from -6 to 5, not 6"),
        ({"padding_idx": -7}, "padding_idx must be a row from -6 to 5, not -7"),
        ({"padding_idx": 1.0}, "padding_idx"),
        ({"max_norm": -1.0}, "max_norm must be a number that is not negative, not -1.0"),
        ({"max_norm": float("nan")}, "max_norm"),
        ({"max_norm": "1"}, "max_norm"),
        ({"norm_type": 0}, "norm_type must be above 0"),
        ({"norm_type": "2"}, "norm_type"),
        ({"_weight": torch.ones(6, 4)}, r"is \(6, 3\), the source has shape \(6, 4\)"),
        ({"dtype": torch.int8}, "torch.int8 is not one of"),
        ({"_weight": torch.ones(6, 3, dtype=torch.int64)}, "torch.int64 is not one of"),
        ({"rounding": "up"}, "rounding must be"),
        ({"num_embeddings": 0}, "num_embeddings must be a positive integer"),
        ({"embedding_dim": 0}, "embedding_dim must be a positive integer"),
    ],
)
@KINDS
def test_arguments_that_mean_nothing_are_refused(kind: str, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        getattr(se, kind)(**{"num_embeddings": 6, "embedding_dim": 3, "feature": "item", **settings})
    assert "table 'item'" in str(caught.value)


def test_modes_are_torchs_and_max_does_not_scale() -> None:
    for mode in ("median", None):
        with pytest.raises(ConfigError, match=r"table 'item': mode must be 'sum', 'mean' or 'max'"):
            se.EmbeddingBag(6, 3, mode=mode, feature="item")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="scale_grad_by_freq cannot be combined with pooling 'max'"):
        se.EmbeddingBag(6, 3, mode="max", scale_grad_by_freq=True)


def test_unknown_keywords_are_refused() -> None:
    with pytest.raises(TypeError, match=r"Embedding got unexpected keyword argument\(s\) \['optimiser'\]"):
        se.Embedding(6, 3, optimiser=OURS)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"embeddings must be \[num_embeddings, embedding_dim\], not \[6\]"):
        se.Embedding.from_pretrained(torch.ones(6))


@pytest.mark.parametrize(
    ("mode", "arguments", "says"),
    [
        ("mean", (ALL,), "one-dimensional ids need offsets"),
        ("mean", (ALL.view(2, 3), torch.tensor([0])), "offsets must be None"),
        ("mean", (ALL.view(1, 2, 3),), "ids must be"),
        ("mean", (torch.tensor(0),), "ids must be"),
        ("mean", (ALL, torch.tensor([1, 2])), "offsets begin at 1, but the first bag must begin at 0"),
        ("mean", (ALL.float().view(2, 3),), "int32 or int64"),
        ("mean", (ALL.view(2, 3), None, torch.ones(2, 3)), "weights need pooling 'sum'"),
        ("max", (ALL.view(2, 3), None, torch.ones(2, 3)), "weights need pooling 'sum'"),
        ("sum", (ALL.view(2, 3), None, torch.ones(6)), "must have the ids' shape"),
        ("sum", (ALL, torch.tensor([0, 3]), torch.ones(5)), "5 weights for 6 ids"),
        ("sum", (ALL.view(2, 3) + 1,), "id 6 at position 5 is outside the allowed range 0 to 5"),
        ("sum", (ALL.view(2, 3) - 1,), "id -1 at position 0 is outside"),
    ],
)
def test_what_torch_refuses_to_look_up_is_refused(mode: Any, arguments: tuple[Any, ...], says: str) -> None:
    torchs = nn.EmbeddingBag(6, 3, mode=mode)
    with pytest.raises((ValueError, RuntimeError, IndexError)):  # RuntimeError includes NotImplementedError
        torchs(*arguments)
    with pytest.raises(InputError, match=says):
        se.EmbeddingBag(6, 3, mode=mode, optimizer=OURS)(*arguments)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_without_ids_and_bags_of_padding_are_zero(mode: Any) -> None:
    given = torch.randn(6, 3)
    module = se.EmbeddingBag.from_pretrained(given, mode=mode, padding_idx=0, include_last_offset=True)
    output = module(torch.tensor([0, 0, 4, 0]), torch.tensor([0, 0, 2, 4]))
    assert torch.equal(output, torch.stack([torch.zeros(3), torch.zeros(3), given[4]]))
    assert module(torch.empty(2, 0, dtype=torch.int64)).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("optimizer", [None, OURS], ids=["own", "ours"])
@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({"mode": "max"}, torch.float32),
        ({"mode": "mean", "padding_idx": 2}, torch.float32),
        ({"mode": "sum", "padding_idx": 5}, torch.float32),
        ({"mode": "sum"}, torch.float64),
        ({"mode": "mean"}, torch.float64),
    ],
    ids=str,
)
def test_ids_behind_the_last_offset_are_where_torch_has_them(settings: dict[str, Any], dtype: Any, optimizer: Any) -> None:
    given = torch.randn(6, 3, dtype=dtype)
    torchs = nn.EmbeddingBag.from_pretrained(given.clone(), freeze=False, include_last_offset=True, **settings)
    ours = se.EmbeddingBag.from_pretrained(given, freeze=False, include_last_offset=True, optimizer=optimizer, **settings)
    learner = se.Optimizer(ours, micro_batches=4) if optimizer else None
    for offsets in ([0, 2, 3], [0, 2, 3, 3], [0, 0], [0, 4, 6]):
        weights = (torch.rand(6, dtype=dtype),) if settings["mode"] == "sum" else ()
        expected, output = (module(ALL, torch.tensor(offsets), *weights) for module in (torchs, ours))
        torch.testing.assert_close(output, expected)
        factor = torch.rand_like(expected)
        for answer in (expected, output):
            (answer * factor).sum().backward()
    assert torchs.weight.grad is not None
    if learner is None:
        torch.testing.assert_close(next(ours.parameters()).grad, torchs.weight.grad)
        return
    learner.step()
    torch.testing.assert_close(ours.rows("embedding", ALL), given - OURS.lr * torchs.weight.grad)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_ids_behind_the_last_offset_are_refused_where_torch_contradicts_itself(mode: Any) -> None:
    """In its fast sums of float32 rows on the CPU; there the gradients of such ids come from memory that nobody wrote."""
    given = torch.randn(6, 3)
    torchs = nn.EmbeddingBag.from_pretrained(given, mode=mode, include_last_offset=True)
    whole = nn.EmbeddingBag.from_pretrained(given, mode=mode)
    offsets = torch.tensor([0, 2, 3])
    assert not torch.allclose(torchs(ALL, offsets), whole(ALL, offsets[:-1]))  # else it has been mended, and so can we be
    module = se.EmbeddingBag.from_pretrained(given, mode=mode, include_last_offset=True)
    with pytest.raises(InputError, match=r"3 id\(s\) stand behind the last offset 3\. torch on the CPU"):
        module(ALL, offsets)
    assert torch.equal(module(ALL[:3], offsets), whole(ALL[:3], offsets[:-1]))


def test_bags_are_lookups_that_are_pooled() -> None:
    """What torch's page says of bags of one length."""
    given, ids = torch.randn(6, 3), ALL.view(2, 3)
    rows = se.Embedding.from_pretrained(given)(ids)
    for mode, pooled in (("sum", rows.sum(1)), ("mean", rows.mean(1)), ("max", rows.amax(1))):
        torch.testing.assert_close(se.EmbeddingBag.from_pretrained(given, mode=mode)(ids), pooled)  # type: ignore[arg-type]


def test_offsets_may_have_another_type_than_ids() -> None:
    given, offsets = torch.randn(6, 3), torch.tensor([0, 2])
    expected = nn.EmbeddingBag.from_pretrained(given)(ALL, offsets)
    module = se.EmbeddingBag.from_pretrained(given)
    types = [(torch.int32, torch.int64), (torch.int64, torch.int32), (torch.int32, torch.int32), (torch.int64, torch.int16)]
    for one, other in types:
        assert torch.equal(nn.EmbeddingBag.from_pretrained(given)(ALL.to(one), offsets.to(other)), expected)
        assert torch.equal(module(ALL.to(one), offsets.to(other)), expected)


@KINDS
def test_a_module_stays_where_and_what_it_was_made(kind: str) -> None:
    for optimizer in (OURS, None):
        module = getattr(se, kind)(6, 3, device="cpu", dtype=torch.float32, optimizer=optimizer, feature="item")
        assert module.to("cpu").float() is module
        assert module(ALL.view(2, 3)).device == torch.device("cpu")
        with pytest.raises(UnsupportedError, match=r"table 'item' stays torch.float32.*dtype=torch.float64"):
            module.double()


def test_data_parallel_threads_are_refused() -> None:
    """torch makes its copies through this method of every module, on two GPUs or more."""
    module = se.Embedding(6, 3, optimizer=OURS, feature="item")
    with pytest.raises(UnsupportedError, match=r"nn.DataParallel was about to copy table\(s\) \['item'\].*DistributedDataParallel"):
        module._replicate_for_data_parallel()


def test_weights_may_have_another_dtype() -> None:
    ids, weights = ALL.view(2, 3), torch.rand(2, 3, dtype=torch.float64)
    given = torch.randn(6, 3)
    output = se.EmbeddingBag.from_pretrained(given, mode="sum")(ids, None, weights)
    assert torch.equal(output, nn.EmbeddingBag.from_pretrained(given, mode="sum")(ids, None, weights.float()))


def test_a_rows_gradient_is_divided_by_its_own_frequency() -> None:
    """Counts of 1, 2 and 3 in one call; torch's EmbeddingBag on the CPU mixes them up (pytorch issue 190063)."""
    ids = torch.tensor([4, 1, 1, 0, 0, 0])
    module = se.EmbeddingBag(6, 3, mode="sum", scale_grad_by_freq=True)
    module(ids, torch.tensor([0, 3])).sum().backward()
    assert torch.equal(module.weight.grad, torch.tensor([1.0, 1, 0, 0, 1, 0]).unsqueeze(1).expand(6, 3))


def test_max_norm_works_in_place_on_the_rows_of_the_batch() -> None:
    given = torch.tensor([[3.0, 4.0], [0.3, 0.4], [6.0, 8.0], [0.0, 0.0]])
    for norm_type in (1.0, 2.0, 3.5, float("inf")):
        for kind in ("Embedding", "EmbeddingBag"):
            settings = {"max_norm": 2.0, "norm_type": norm_type, "padding_idx": 0}
            ours = getattr(se, kind).from_pretrained(given, **settings)
            torchs = getattr(nn, kind).from_pretrained(given.clone(), **settings)
            ids = torch.tensor([[0, 1, 3]])
            torch.testing.assert_close(ours(ids), torchs(ids))
            torch.testing.assert_close(ours.rows("embedding", torch.arange(4)), torchs.weight)
            assert torch.equal(ours.rows("embedding", torch.tensor([2])), given[2:3]), "a row of no batch stays"
