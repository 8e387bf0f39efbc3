"""Settings of the tables' optimizers: what they default to, what they refuse, and how they read."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from dataclasses import replace
from typing import Any

import pytest
import torch

import shardembed as se
from shardembed import optim
from shardembed.errors import ConfigError, UnsupportedError
from shardembed.kernels import cpu, fbgemm, formulas
from shardembed.kernels.choose import ENTRIES
from shardembed.kernels.triton import formulas as triton_formulas
from shardembed.planner.cost import estimate
from shardembed.planner.cost_phases import UPDATE
from shardembed.planner.topology import Op, Topology
from shardembed.planner.topology import load as load_topology
from shardembed.planner.topology_sections import OPTIONAL_OPS, optimizer_name
from shardembed.planner.workload import TableLoad, Workload
from shardembed.tables.optimizer_section import OptimizerSection
from shardembed.tables.placement import Cluster
from shardembed.tables.plan import Plan, TablePlan
from shardembed.tables.table_config import TableConfig
from tests.oracle import EXAMPLES, LEARNERS

ALL = optim.KINDS
COMPILED: dict[str, dict[type[optim.TableOptimizer], Any]] = {"numba": cpu.FORMULAS, "triton": triton_formulas.FORMULAS}
COMPILED["fbgemm"] = {kind: fused for kind, fused in fbgemm.FORMULAS.items() if fused.on_cpu}
# By kernel, the optimizers that it leaves to the reference on purpose; one that is forgotten would only be slow.
LEFT: dict[str, set[type[optim.TableOptimizer]]] = {"numba": set(), "triton": set()}
LEFT["fbgemm"] = {optim.Adam, optim.AdamW, optim.RowwiseAdam, optim.FTRL, optim.Lion}  # on CPUs
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


@pytest.mark.parametrize("kernel", ["auto", *ENTRIES])
@pytest.mark.parametrize("parent", [optim.TableOptimizer, *ALL])
def test_a_class_made_from_one_of_ours_is_refused(parent: type[optim.TableOptimizer], kernel: Any) -> None:
    """It would learn as its parent, or fail in the first step, by kernel."""
    mine = dataclasses.make_dataclass("Mine", [("lr", float, 0.1)], bases=(parent,), frozen=True)()
    says = rf"table 'embedding': the optimizer must be one of se.optim.*not Mine, which is made from {parent.__name__}: kernels"
    with pytest.raises(ConfigError, match=says):
        se.Embedding(6, 3, optimizer=mine, kernel=kernel)
    with pytest.raises(ConfigError, match=r"table 't': the optimizer must be one of se.optim"):
        TableLoad(TableConfig("t", 6, 3), (1.0,), optimizer=mine)


# What each optimizer must have, and where; a failure names the optimizer and the place.

EACH = pytest.mark.parametrize("name", optim.NAMES)


def test_every_class_of_the_module_is_in_its_list() -> None:
    made = {value for value in vars(optim).values() if isinstance(value, type) and issubclass(value, optim.TableOptimizer)}
    assert made - {optim.TableOptimizer, optim.NoOptimizer} == set(optim.KINDS), "optim.KINDS lacks, or has twice, a class"
    assert len(optim.KINDS) == len(set(optim.KINDS)) == len(optim.NAMES)


@EACH
def test_it_says_its_formula_and_what_happens_to_other_rows(name: str) -> None:
    text = " ".join((optim.NAMES[name].__doc__ or "").split())
    assert "w <- " in text, f"the docstring of optim.{name} has no formula"
    assert "ntouched rows " in text, f"the docstring of optim.{name} does not say what happens to untouched rows"


@EACH
def test_it_has_a_formula_that_keeps_the_state_it_declares(name: str) -> None:
    settings = EXAMPLES[name]
    assert type(settings) in formulas.FORMULAS, f"kernels/formulas.py has no formula for {name}"
    numbers = torch.Generator().manual_seed(0)
    w, g = torch.randn(5, 3, generator=numbers), torch.randn(5, 3, generator=numbers)
    shapes = {"row": (5,), "element": (5, 3)}
    state = {key: torch.zeros(shapes[shape]) for key, shape in settings.state.items()}
    step = formulas.Step(settings.lr, 1, g.square().mean(1) if settings.rowwise else None)
    new = formulas.FORMULAS[type(settings)](w.clone(), state, g, settings, step)
    assert new.shape == w.shape
    assert new.ne(w).any(), f"the formula of {name} moves nothing"
    declared = {key: shapes[shape] for key, shape in settings.state.items()}
    assert {key: tuple(held.shape) for key, held in state.items()} == declared, f"state of {name}: what it keeps, what it declares"
    assert all(held.ne(0).all() for held in state.values()), f"{name} declares state that it does not keep"


@EACH
def test_its_formula_looks_at_one_column_alone(name: str) -> None:
    """Columns are cut over ranks, and all that a strip knows of the others is `Step.mean_square`."""
    settings = EXAMPLES[name]
    numbers = torch.Generator().manual_seed(0)
    w, g = torch.randn(2, 5, 4, generator=numbers, dtype=torch.float64)
    step = formulas.Step(settings.lr, 1, g.square().mean(1) if settings.rowwise else None)

    def stepped(columns: slice) -> dict[str, torch.Tensor]:
        part = w[:, columns]
        shapes = {"row": part.shape[:1], "element": part.shape}
        state = {key: torch.zeros(shapes[shape], dtype=torch.float64) for key, shape in settings.state.items()}
        new = formulas.FORMULAS[type(settings)](part.clone(), state, g[:, columns].clone(), settings, step)
        return {**state, "weights": new}

    whole = stepped(slice(0, 4))
    for columns in (slice(0, 1), slice(1, 4)):
        for key, part in stepped(columns).items():
            wanted = whole[key] if part.dim() == 1 else whole[key][:, columns]
            says = f"{name}: {key} of a column depend on other columns of the row; a formula knows no more of them than mean_square"
            torch.testing.assert_close(part, wanted, rtol=1e-12, atol=1e-12, msg=says)


@EACH
def test_the_oracle_has_it_with_the_same_state(name: str) -> None:
    kind = optim.NAMES[name]
    assert kind in LEARNERS, f"LEARNERS of tests/oracle.py has no counterpart of {name}"
    learner = LEARNERS[kind](torch.nn.Parameter(torch.ones(4, 2, dtype=torch.float64)), EXAMPLES[name])
    learner.step(torch.ones(4, 2, dtype=torch.float64), torch.ones(4, dtype=torch.bool))
    shapes = {"row": (4,), "element": (4, 2)}
    found = {key: tuple(held.shape) for key, held in learner.state().items()}
    assert found == {key: shapes[shape] for key, shape in kind.state.items()}, f"state of {name} in the oracle, and as declared"


@EACH
def test_a_section_of_yaml_builds_it_with_every_setting(name: str) -> None:
    settings = EXAMPLES[name]
    given = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    assert OptimizerSection.model_validate({"name": name, **given}).build() == settings
    others = {field.name for kind in optim.KINDS for field in dataclasses.fields(kind)} - set(given)
    for other in sorted(others):
        value = (0.5, 0.5) if other == "betas" else 0.5
        with pytest.raises(ValueError, match=rf"{name} takes no '{other}'; it takes lr"):
            OptimizerSection.model_validate({"name": name, other: value})


@EACH
@pytest.mark.parametrize("fused", [False, True])
def test_the_planner_prices_it(name: str, fused: bool) -> None:
    """By the op of its own where that has been measured, else by the plain one."""
    load = TableLoad(TableConfig("t", 1000, 16), (3.0,), optimizer=EXAMPLES[name])
    layout = se.column_wise().layout(1000, 16, Cluster(2, 2))
    plan = Plan((TablePlan("t", layout),), 2)
    here = load_topology("cpu", 2)
    if fused:
        here = replace(here, ops={**here.ops, "fused": here.ops["update"], "fused_merge": here.ops["merge"]})

    def seconds(topology: Topology) -> float:
        return float(estimate(plan, Workload("one", 64, (load,)), topology).seconds[UPDATE].max())

    own = f"update_{optimizer_name(type(load.optimizer))}"
    assert own in OPTIONAL_OPS
    slow = Op(1.0, 1.0, 1e-6)
    plain = seconds(here)
    assert 0 < plain < 1
    assert seconds(replace(here, ops={**here.ops, own: slow, own.replace("update", "fused"): slow})) > 1


@EACH
@pytest.mark.parametrize("kernel", [name for name in ENTRIES if name != "reference"])
def test_a_compiled_kernel_has_it_or_refuses_it_by_name(name: str, kernel: str, caplog: pytest.LogCaptureFixture) -> None:
    settings = EXAMPLES[name]
    if kernel == "fbgemm" and (missing := fbgemm.missing("cpu")):
        pytest.skip(missing)
    with caplog.at_level(logging.INFO, logger="shardembed"):
        assert se.Embedding(6, 3, optimizer=settings).journey.slabs[0].kernel.name in ENTRIES
    if type(settings) in COMPILED[kernel]:
        module = se.Embedding(6, 4, optimizer=settings, kernel=kernel)  # pyright: ignore[reportArgumentType]
        assert module.journey.slabs[0].kernel.name == kernel
        return
    lacks = f"it has no update for {name}"
    with pytest.raises(ConfigError, match=rf"kernel='{kernel}' cannot serve 6 x 4 .* with {name}\(.*: {lacks}"):
        se.Embedding(6, 4, optimizer=settings, kernel=kernel)  # pyright: ignore[reportArgumentType]
    if kernel == "numba":
        assert f"kernel reference (numba: {lacks})" in caplog.text


@EACH
@pytest.mark.parametrize("kernel", COMPILED)
def test_no_compiled_kernel_forgets_it(name: str, kernel: str) -> None:
    kind = optim.NAMES[name]
    assert (kind in COMPILED[kernel]) != (kind in LEFT[kernel]), (
        f"the formulas of kernel {kernel!r} and LEFT, what it lacks on purpose: {name} must be in one of them"
    )


def test_kernels_have_none_that_tables_cannot_have() -> None:
    for where, found in {**COMPILED, "reference": formulas.FORMULAS, "oracle": LEARNERS}.items():
        assert set(found) <= set(optim.KINDS), f"{where} has more than optim.KINDS"


def test_what_nobody_has_is_refused_when_the_slab_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in (formulas.FORMULAS, *COMPILED.values()):
        monkeypatch.delitem(found, optim.FTRL, raising=False)
    with pytest.raises(UnsupportedError, match=r"no kernel can serve 6 x 3 .* with FTRL\(.*it has no update for FTRL"):
        se.Embedding(6, 3, optimizer=optim.FTRL())
