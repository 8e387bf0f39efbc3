"""The drop-ins on one rank: torch's signatures, attributes, starts and refusals."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import shardembed as se
from shardembed.errors import ConfigError, InputError, PickleError, UnsupportedError

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
        ("mean", (ALL, torch.tensor([1, 2])), "offsets run from 1 to 6"),
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
    for one, other in ((torch.int32, torch.int64), (torch.int64, torch.int32), (torch.int32, torch.int32)):
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
