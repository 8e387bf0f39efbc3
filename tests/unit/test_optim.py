"""Settings of the tables' optimizers: what they default to, what they refuse, and how they read."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
import torch

import shardembed as se
from shardembed import optim
from shardembed.errors import ConfigError
from shardembed.planner.workload import TableLoad
from shardembed.tables.table_config import TableConfig

ALL = [optim.SGD, optim.Adagrad, optim.RowwiseAdagrad, optim.Adam, optim.AdamW, optim.FTRL]
COUNTERPARTS = {
    optim.SGD: torch.optim.SGD,
    optim.Adagrad: torch.optim.Adagrad,
    optim.Adam: torch.optim.SparseAdam,
}


@pytest.mark.parametrize("ours", COUNTERPARTS)
def test_defaults_are_the_counterparts(ours: type[optim.TableOptimizer]) -> None:
    theirs = inspect.signature(COUNTERPARTS[ours]).parameters
    for field in dataclasses.fields(ours):
        assert field.default == theirs[field.name].default, field.name


def test_adamw_decays_as_torchs() -> None:
    assert optim.AdamW().weight_decay == inspect.signature(torch.optim.AdamW).parameters["weight_decay"].default
    assert issubclass(optim.AdamW, optim.Adam)


@pytest.mark.parametrize("cls", ALL)
def test_every_number_must_be_finite_and_not_negative(cls: type[optim.TableOptimizer]) -> None:
    for field in dataclasses.fields(cls):
        wrong: list[Any] = [-0.1, float("nan"), float("inf"), True, None, "0.1", [0.9, 0.9], torch.tensor(0.1)]
        wrong += [(0.9,), (0.9, 1.0), (0.9, -0.1), (0.9, "0.9")] if field.name == "betas" else [(0.1,), (0.1, 0.2)]
        for value in wrong:
            with pytest.raises(ConfigError, match=f"{cls.__name__}: {field.name} must be"):
                cls(**{field.name: value})


def test_ftrl_divides_by_its_rate() -> None:
    with pytest.raises(ConfigError, match="lr divides"):
        optim.FTRL(lr=0)
    assert optim.SGD(lr=0).lr == 0


@pytest.mark.parametrize("cls", ALL)
def test_settings_are_frozen_values(cls: type[optim.TableOptimizer]) -> None:
    one, same, other = cls(lr=0.5), cls(lr=0.5), cls(lr=0.25)
    assert one == same != other
    assert len({one, same, other}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.lr = 0.1  # type: ignore[misc]
    assert all(one != another(lr=0.5) for another in ALL if another is not cls)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (optim.SGD(lr=0.1), "SGD(lr=0.1)"),
        (optim.Adagrad(), "Adagrad(lr=0.01, eps=1e-10)"),
        (optim.AdamW(lr=1), "AdamW(lr=1, eps=1e-08, weight_decay=0.01, betas=(0.9, 0.999))"),
        (optim.FTRL(l1=0.5), "FTRL(lr=0.1, beta=1, l1=0.5, l2=0)"),
    ],
)
def test_they_describe_themselves(settings: optim.TableOptimizer, text: str) -> None:
    assert settings.describe() == text


def test_settings_that_differ_describe_themselves_differently() -> None:
    """Ranks compare these texts to find out whether they were given the same."""
    near = [optim.SGD(lr=0.1), optim.SGD(lr=0.1 + 1e-9), optim.Adam(betas=(0.9, 0.999)), optim.Adam(betas=(0.9, 0.9990001))]
    assert len({settings.describe() for settings in near}) == len(near)


@pytest.mark.parametrize("kernel", ["auto", "reference", "numba", "triton"])
@pytest.mark.parametrize("parent", [optim.TableOptimizer, *ALL])
def test_a_class_made_from_one_of_ours_is_refused(parent: type[optim.TableOptimizer], kernel: Any) -> None:
    """It would learn as its parent, or fail in the first step, by kernel."""
    mine = dataclasses.make_dataclass("Mine", [("lr", float, 0.1)], bases=(parent,), frozen=True)()
    says = rf"table 'embedding': the optimizer must be one of se.optim.*not Mine, which is made from {parent.__name__}: kernels"
    with pytest.raises(ConfigError, match=says):
        se.Embedding(6, 3, optimizer=mine, kernel=kernel)
    with pytest.raises(ConfigError, match=r"table 't': the optimizer must be one of se.optim"):
        TableLoad(TableConfig("t", 6, 3), (1.0,), optimizer=mine)


def test_the_classes_that_are_known_are_those_of_the_page() -> None:
    assert set(optim.KINDS) == set(ALL)
