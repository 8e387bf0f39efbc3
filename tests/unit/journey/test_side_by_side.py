"""The outputs of a call as parts of one tensor: as many plain tables, whoever uses the parts, the whole, or both."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map

import shardembed as se
from shardembed.errors import StepError
from shardembed.journey.route.side_by_side import gathered
from shardembed.modules.answers import Vectors

ROWS, WIDTHS = 12, (3, 5, 3)
NAMES = ("a", "b", "c")
SAMPLES = 4
Loss = Callable[[Vectors], torch.Tensor]


def batch() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    ragged = torch.randint(ROWS, (9,), generator=draw), torch.tensor([0, 3, 3, 4, 9])
    return {
        "a": torch.randint(ROWS, (SAMPLES, 2), generator=draw),
        "b": torch.randint(ROWS, (SAMPLES, 3), generator=draw),
        "c": ragged,
    }


def collection(dtype: torch.dtype = torch.float64, **options: Any) -> se.EmbeddingCollection:
    tables = [se.TableConfig(name, ROWS, width, pooling="sum", dtype=dtype) for name, width in zip(NAMES, WIDTHS, strict=True)]
    return se.EmbeddingCollection(tables, optimizer=se.optim.SGD(lr=1.0), **options)


def trained(emb: se.EmbeddingCollection, loss: Loss) -> list[torch.Tensor]:
    optimizer = se.Optimizer(emb)
    loss(emb(batch())).backward()
    optimizer.step()
    return [emb.rows(name, torch.arange(ROWS)) for name in NAMES]


def slopes() -> torch.Tensor:
    return torch.randn(SAMPLES, sum(WIDTHS), dtype=torch.float64, generator=torch.Generator().manual_seed(1))


LOSSES: dict[str, Loss] = {
    "parts": lambda out: (torch.cat(list(out.values()), 1) * slopes()).sum(),
    "whole": lambda out: (out.concatenated() * slopes()).sum(),
    "each half": lambda out: (out.concatenated() * slopes()).sum() / 2 + (torch.cat(list(out.values()), 1) * slopes()).sum() / 2,
    "one by one": lambda out: sum(
        ((out[name] * part).sum() for name, part in reversed(list(zip(NAMES, slopes().split(WIDTHS, 1), strict=True)))),
        torch.zeros((), dtype=torch.float64),
    ),
    "written into": lambda out: torch.cat([part.mul_(2) for part in out.values()], 1).mul(slopes()).sum() / 2,
    "whole written into": lambda out: (out.concatenated().mul_(2) * slopes()).sum() / 2,
    "concatenated after writing": lambda out: (_doubled(out).concatenated() * slopes()).sum() / 2,
}


def _doubled(out: Vectors) -> Vectors:
    for part in out.values():
        part *= 2
    return out


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_rows_learn_alike_whoever_is_used(name: str, deterministic: bool) -> None:
    expected = trained(collection(), LOSSES["one by one"])
    found = trained(collection(deterministic=deterministic), LOSSES[name])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_part_that_is_not_used_learns_nothing() -> None:
    emb = collection()
    before = emb.rows("b", torch.arange(ROWS))
    after = trained(emb, lambda out: out["a"].sum() + out["c"].sum())[1]
    assert torch.equal(before, after)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("first", ["part", "whole"])
def test_writing_into_what_shares_memory_is_found_out(first: str, deterministic: bool) -> None:
    out = collection(deterministic=deterministic)(batch())
    whole = out.concatenated()
    loss = whole.sum() + out["a"].sum()
    (out["a"] if first == "part" else whole).mul_(2)
    with pytest.raises(StepError, match="shares its memory" if first == "part" else "share its memory"):
        loss.backward()


def test_the_concatenation_is_no_copy_and_its_gradient_neither() -> None:
    out = collection()(batch())
    whole = out.concatenated()
    assert whole.untyped_storage().data_ptr() == out["a"].untyped_storage().data_ptr()
    grad = torch.randn(SAMPLES, sum(WIDTHS))
    with torch.no_grad():
        check_gathered(grad)


def check_gathered(grad: torch.Tensor) -> None:
    found = gathered(None, grad.split(WIDTHS, 1), WIDTHS, grad)
    assert found is not None
    assert found.data_ptr() == grad.data_ptr()
    assert torch.equal(found, grad)
    apart = [part.clone() for part in grad.split(WIDTHS, 1)]
    assert torch.equal(gathered(None, apart, WIDTHS, grad), grad)  # type: ignore[arg-type]
    swapped = [grad[:, 3:6], grad[:, :5], grad[:, 8:]]  # of one tensor, but not as they lie in it
    assert torch.equal(gathered(None, swapped, WIDTHS, grad), torch.cat(swapped, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize("widths", [(3,), (3, 5), (3, 3)])
@pytest.mark.parametrize("kernel", ["reference", "auto"])
def test_gradients_that_wait_are_not_memory_of_whoever_gave_them(widths: tuple[int, ...], kernel: Any) -> None:
    tables = [se.TableConfig(name, ROWS, width, dtype=torch.float64) for name, width in zip(NAMES, widths, strict=False)]
    emb = se.EmbeddingCollection(tables, optimizer=se.optim.SGD(lr=1.0), plan=se.row_wise(), kernel=kernel)
    before, optimizer = [emb.rows(table.name, torch.arange(3)) for table in tables], se.Optimizer(emb)
    grad = torch.ones(3, sum(widths), dtype=torch.float64)
    emb({table.name: torch.arange(3) for table in tables}).concatenated().backward(grad)
    grad.zero_()  # as an optimizer's zero_grad(set_to_none=False) does with what autograd has made a parameter's gradient
    optimizer.step()
    for table, rows in zip(tables, before, strict=True):
        torch.testing.assert_close(emb.rows(table.name, torch.arange(3)), rows - 1, rtol=0, atol=1e-12)


def test_second_derivatives_through_the_outputs_are_torchs() -> None:
    out = collection()(batch())
    loss = (torch.cat(list(out.values()), 1) ** 3).sum()
    (grad,) = torch.autograd.grad(loss, [out["b"]], create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), [out["b"]])
    torch.testing.assert_close(second, 6 * out["b"].detach())


def test_tables_of_two_dtypes_have_a_concatenation_of_torchs_making() -> None:
    tables = [se.TableConfig("a", ROWS, 3, dtype=torch.float32), se.TableConfig("b", ROWS, 5, dtype=torch.float64)]
    tables = [se.TableConfig(t.name, ROWS, t.embedding_dim, pooling="mean", dtype=t.dtype) for t in tables]
    out = se.EmbeddingCollection(tables)({name: part for name, part in batch().items() if name != "c"})
    assert out["a"].dtype == torch.float32
    assert torch.equal(out.concatenated(), torch.cat([out["a"], out["b"]], 1))


def test_outputs_are_a_dict_to_whoever_rebuilds_them() -> None:
    out = collection()(batch())
    doubled = tree_map(lambda part: part * 2, out)
    assert type(doubled) is Vectors
    assert torch.equal(doubled.concatenated(), out.concatenated() * 2)
    assert type(out)(dict(out.items())).keys() == out.keys()
    with torch.no_grad():
        still = collection()(batch())
    assert copy.deepcopy(still).keys() == still.keys()
    out["d"] = out["a"]
    assert out.concatenated().shape == (SAMPLES, sum(WIDTHS) + 3)
