"""What torch's own calls do to a module's weights: on sharded tables each has its effect, or an error of ours and no effect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import shardembed as se
from shardembed.errors import PickleError, UnsupportedError
from shardembed.modules.whole import watch

ROWS, COLUMNS = 7, 3
REPLACED = r"of table\(s\) \['e'\] cannot be replaced: .* Write rows with load_rows"
WAITS = "gradients of tables with an optimizer of ours wait with the rows' owners"
NEW = torch.full((ROWS, COLUMNS), 5.0)


class Middle(nn.Module):
    """A table between dense layers."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(2, COLUMNS)
        self.e = nn.Embedding(ROWS, COLUMNS)
        self.inner = nn.Sequential(nn.EmbeddingBag(ROWS, COLUMNS), nn.Linear(COLUMNS, 1))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner[1](self.e(ids) + self.inner[0](ids.unsqueeze(1)))


def sharded(own: bool) -> Middle:
    return se.shard(Middle(), optimizer=se.optim.SGD(lr=1.0) if own else None, verbose=False)


@pytest.fixture(params=[True, False], ids=["ours", "None"])
def model(request: Any) -> Middle:
    return sharded(request.param)


CONVERSIONS: dict[str, Callable[[nn.Module], object]] = {
    "half": nn.Module.half,
    "double": nn.Module.double,
    "bfloat16": nn.Module.bfloat16,
    "to": lambda model: model.to(torch.float16),
    "type": lambda model: model.type(torch.float64),
    "meta": lambda model: model.to("meta"),
    "to_empty": lambda model: model.to_empty(device="meta"),
    "share_memory": nn.Module.share_memory,
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_refused_conversion_converts_nothing(model: Middle, name: str) -> None:
    outer = nn.ModuleList([nn.Linear(2, 2), model])
    before = {key: (value.dtype, value.device, value.is_shared()) for key, value in outer.named_parameters()}
    with pytest.raises(UnsupportedError, match=r"^table 'e' (stays|lies on|does not move)"):
        CONVERSIONS[name](outer)
    assert {key: (value.dtype, value.device, value.is_shared()) for key, value in outer.named_parameters()} == before
    assert outer.float().cpu() is outer, "what changes nothing is not refused"
    assert nn.Linear(2, 2).half().weight.dtype == torch.float16, "models without tables are torch's affair"


def test_methods_of_torch_are_wrapped_once() -> None:
    sharded(True)
    found = nn.Module.requires_grad_, nn.Module.zero_grad, nn.Module._apply
    watch()
    assert (nn.Module.requires_grad_, nn.Module.zero_grad, nn.Module._apply) == found
    assert all(not hasattr(one.__wrapped__, "__wrapped__") for one in found)


REPLACING: dict[str, Callable[[Middle], object]] = {
    "Parameter": lambda model: setattr(model.e, "weight", nn.Parameter(NEW)),
    "tensor": lambda model: setattr(model.e, "weight", NEW),
    "None": lambda model: setattr(model.e, "weight", None),
    "register": lambda model: model.e.register_parameter("weight", nn.Parameter(NEW)),
    "delete": lambda model: delattr(model.e, "weight"),
    "call": lambda model: torch.func.functional_call(model.e, {"weight": NEW}, (torch.arange(3),)),
    "call of the model": lambda model: torch.func.functional_call(model, {"e.weight": NEW}, (torch.arange(3),)),
    "pruning": lambda model: prune.random_unstructured(model.e, "weight", 0.5),
}


@pytest.mark.parametrize("name", REPLACING)
def test_a_weight_that_would_be_replaced_is_refused(model: Middle, name: str) -> None:
    before, names = model.e.rows("e", torch.arange(ROWS)), [key for key, _ in model.named_parameters()]
    with pytest.raises(UnsupportedError, match=REPLACED):
        REPLACING[name](model)
    assert torch.equal(model.e(torch.arange(ROWS)), before)
    assert [key for key, _ in model.named_parameters()] == names, "something is registered now"
    model.e.note = nn.Parameter(torch.ones(1))  # what is no weight is nobody's business
    assert model.e(torch.arange(3)).shape == (3, COLUMNS)


def test_parametrizations_are_refused(model: Middle) -> None:
    with pytest.raises((UnsupportedError, ValueError), match=r"no lookup reads|does not have a parameter"):
        parametrize.register_parametrization(model.e, "weight", nn.Identity())
    assert not parametrize.is_parametrized(model.e)
    model(torch.arange(3)).sum().backward()


def test_what_is_swapped_behind_the_modules_back_is_noticed_in_the_next_lookup() -> None:
    for wrong in (lambda module: module._parameters.update(weight=nn.Parameter(NEW)), _swapped):
        model = sharded(False)
        wrong(model.e)
        with pytest.raises(UnsupportedError, match=REPLACED):
            model.e(torch.arange(3))


def _swapped(module: Any) -> None:
    torch.utils.swap_tensors(module.weight, nn.Parameter(NEW.clone()))


TOUCHING: dict[str, Callable[[torch.Tensor], object]] = {
    "reading .grad": lambda weight: weight.grad,
    "assigning .grad": lambda weight: setattr(weight, "grad", NEW),
    "hook": lambda weight: weight.register_hook(print),
    "post hook": lambda weight: weight.register_post_accumulate_grad_hook(print),
    "autograd.grad": lambda weight: torch.autograd.grad(torch.ones((), requires_grad=True) * 2, [weight]),
    "autograd.grad by name": lambda weight: torch.autograd.grad(outputs=torch.ones((), requires_grad=True) * 2, inputs=weight),
    "optimizer": lambda weight: torch.optim.SGD([weight], lr=0.1),
}


@pytest.mark.parametrize("name", TOUCHING)
def test_gradients_that_are_with_the_rows_owners_are_not_to_be_had(name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"^table 'e' .*{WAITS}"):
        TOUCHING[name](sharded(True).e.weight)


def test_data_of_a_table_with_our_optimizer_is_not_assigned() -> None:
    with pytest.raises(UnsupportedError, match=r"table 'e': .data cannot be assigned; write its rows with load_rows"):
        sharded(True).e.weight.data = NEW


def test_a_weight_in_a_state_dict_is_detached() -> None:
    model = sharded(True)
    weight = model.state_dict()["e.weight"]
    assert (weight.requires_grad, weight.grad, weight.is_leaf) == (False, None, True)
    weight.requires_grad_(True)
    model.e.requires_grad_(False)
    assert (weight.requires_grad, model.e.weight.requires_grad) == (True, False)
    with pytest.raises(PickleError):
        torch.save(model.e.weight, "/dev/null")


def test_sparse_gradients_of_tables_that_lie_together_are_no_part_of_each_other() -> None:
    """One table has no row in the first of two micro-batches: torch then adds to an empty gradient in place."""
    tables = [se.TableConfig(name, 5, 3, dtype=torch.float64, sparse=True) for name in "ab"]
    ours = se.EmbeddingCollection(tables, optimizer=None)
    parameters = dict(zip("ab", ours.parameters(), strict=True))
    plain = {name: torch.nn.Parameter(parameters[name].detach().clone()) for name in "ab"}
    for ids in ({"a": [], "b": [3]}, {"a": [3], "b": [0, 1, 2, 4]}):
        given = {name: torch.tensor(rows, dtype=torch.int64) for name, rows in ids.items()}
        offsets = {name: torch.arange(len(rows) + 1) for name, rows in ids.items()}
        out = ours({name: (given[name], offsets[name]) for name in "ab"})
        torch.stack([(out[name] ** 3).sum() for name in "ab"]).sum().backward()
        torch.stack([(plain[name][given[name]] ** 3).sum() for name in "ab"]).sum().backward()
    for name in "ab":
        assert parameters[name].grad is not None
        torch.testing.assert_close(parameters[name].grad.to_dense(), plain[name].grad)
