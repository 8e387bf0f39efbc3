"""The registry of poolings: what an entry needs elsewhere is there, and what it says is so.

All parts of a pooling meet here: its output by id and by bag and its gradient are those of `tests.oracle`; the adjoint of
deterministic mode is autograd's; planner, doctor and docs know it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

import shardembed as se
from shardembed.doctor import parity
from shardembed.errors import ConfigError, InputError
from shardembed.inputs.ids import IdBatch
from shardembed.journey import deterministic
from shardembed.journey.route import Route, RoutingTable, combine, make_route
from shardembed.modules.single import Mode
from shardembed.planner import cost_combine, cost_model
from shardembed.planner.cost_phases import COMBINE
from shardembed.planner.workload import TableLoad, Uniform, Workload
from shardembed.planner.workload_sections import POOLING_NAMES
from shardembed.store.slab_spec import SlabSpec, build_slabs
from shardembed.tables.placement import PACKINGS, Cluster, Packing
from shardembed.tables.plan import Plan, TablePlan
from shardembed.tables.pooling import POOLINGS, WEIGHTED, OverIds, Pooling, PoolingKind
from shardembed.tables.table_config import features_of
from tests import oracle
from tests.unit.journey.test_route import lay_out
from tests.unit.planner.test_planner_cost import topology

CPU, RANKS, ROWS, COLUMNS, PADDING = torch.device("cpu"), 2, 12, 6, 4
KINDS = pytest.mark.parametrize("kind", POOLINGS.values(), ids=lambda kind: str(kind.name))
# Repeated ids, an empty bag, one of padding alone, padding among others.
IDS = torch.tensor([3, 3, 11, 4, 4, 0, 4, 7, 7, 8, 1])
OFFSETS = torch.tensor([0, 3, 3, 4, 7, 11])
PAGE = Path(__file__).parents[2] / "docs" / "how-sharding-works.md"


def named(union: object) -> set[str | None]:
    """The names of a union of a Literal with None."""
    return {name for part in get_args(union) for name in (get_args(part) or [None])}


@dataclass(frozen=True)
class Asked:
    """One rank's batch for a table on two ranks, answered from `weights` as their owners would."""

    specs: tuple[SlabSpec, ...]
    route: Route
    answers: list[torch.Tensor]
    outputs: torch.Tensor


def ask(kind: PoolingKind, packing: Packing, padding: int | None, scale: torch.Tensor | None, weights: torch.Tensor) -> Asked:
    table = se.TableConfig("t", ROWS, COLUMNS, pooling=kind.name, dtype=torch.float64, padding_idx=padding)
    layout = se.row_wise().layout(ROWS, COLUMNS, Cluster(RANKS, RANKS))
    specs = build_slabs((table,), Plan((TablePlan("t", layout, packing),), RANKS), (se.optim.SGD(),))
    features = features_of((table,))
    routing = RoutingTable.of((table,), (packing,), specs, 0, RANKS, CPU)
    given = (IDS, OFFSETS) if scale is None else (IDS, OFFSETS, scale)
    route = make_route(IdBatch.of({"t": given}, features, CPU), features, routing)
    slab = route.slabs[0]
    numbers = lay_out(specs, [np.repeat(np.arange(ROWS, dtype=float)[:, None], COLUMNS, 1)], RANKS)
    owners = torch.repeat_interleave(torch.from_numpy(slab.counts[1])).tolist()
    rows_E = torch.tensor([int(numbers[owner][0][key, 0]) for owner, key in zip(owners, slab.keys_E.tolist(), strict=True)])
    lengths_S = torch.ones_like(slab.keys_E) if slab.lengths_S is None else slab.lengths_S
    answers = torch.zeros(len(lengths_S), COLUMNS, dtype=torch.float64)
    answers = answers.index_add(0, torch.repeat_interleave(lengths_S), weights[rows_E])
    return Asked(specs, route, [answers], combine([answers], route).each[0])


def truth(kind: PoolingKind, padding: int | None, scale: torch.Tensor | None, weights: torch.Tensor) -> torch.Tensor:
    """Of the bags without padding."""
    kept = torch.ones_like(IDS, dtype=torch.bool) if padding is None or kind.name is None else IDS.ne(padding)
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), kept.cumsum(0)])
    return oracle.lookup(weights, kind.name, IDS[kept], ends[OFFSETS], None if scale is None else scale[kept])


@KINDS
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("padding", [None, PADDING])
@pytest.mark.parametrize("weighted", [False, True])
def test_it_is_what_the_oracle_answers_with_one_adjoint(
    kind: PoolingKind, packing: Packing, padding: int | None, weighted: bool
) -> None:
    seed = torch.Generator().manual_seed(0)
    weights = torch.randn(ROWS, COLUMNS, dtype=torch.float64, generator=seed).requires_grad_()
    scale = torch.rand(len(IDS), dtype=torch.float64, generator=seed) if weighted else None
    if weighted and not kind.takes_weights:
        with pytest.raises(InputError, match=f"weights need pooling {WEIGHTED}.*; this table has {kind.name!r}"):
            ask(kind, packing, padding, scale, weights)
        return
    found = ask(kind, packing, padding, scale, weights)
    wanted = truth(kind, padding, scale, weights)
    torch.testing.assert_close(found.outputs, wanted, rtol=0, atol=1e-14)
    assert bool(found.route.slabs[0].bagged) == (packing == "bag" and kind.partial_sums and not weighted)
    slopes = torch.randn(wanted.shape, dtype=torch.float64, generator=seed)
    (mine,) = torch.autograd.grad((found.outputs * slopes).sum(), weights, retain_graph=True)
    (theirs,) = torch.autograd.grad((wanted * slopes).sum(), weights)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-14)
    (grads_SW,) = torch.autograd.grad((found.outputs * slopes).sum(), found.answers)
    sums_SW = torch.zeros_like(grads_SW)
    (parts,) = deterministic.contributions(found.route, found.specs, [slopes], [part.detach() for part in found.answers], 1.0)
    for part in parts:
        sums_SW.index_add_(0, part.segments_N, part.values_NW)
    torch.testing.assert_close(sums_SW, grads_SW, rtol=0, atol=1e-14, msg=lambda text: f"deterministic mode: {text}")


@pytest.mark.parametrize(
    ("place", "found"),
    [
        ("tables.pooling.Pooling, the type", named(Pooling)),
        ("tests.oracle.POOLED", set(oracle.POOLED)),
        ("doctor.parity.PLAIN", set(parity.PLAIN)),
    ],
)
def test_whoever_names_poolings_names_all(place: str, found: set[str | None]) -> None:
    assert found == set(POOLINGS), f"{place}: lacks {set(POOLINGS) - found}, has too many {found - set(POOLINGS)}"


def test_what_is_done_over_ids_is_priced_and_has_an_adjoint_in_deterministic_mode() -> None:
    assert set(cost_combine.BY_ID) == named(OverIds), "planner.cost_combine.BY_ID, and the type OverIds"
    unknown = {kind.over_ids for kind in POOLINGS.values()} - named(OverIds)
    assert not unknown, f"no mode of F.embedding_bag, which `over_ids` must be: {unknown}"
    chosen = {name for name, kind in POOLINGS.items() if kind.over_ids is not None and not kind.partial_sums}
    assert set(deterministic.CHOSEN) == chosen, "journey.deterministic.CHOSEN: adjoints of poolings that choose among ids"


def test_what_deterministic_mode_has_no_adjoint_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deterministic, "CHOSEN", {})
    with pytest.raises(ConfigError, match="feature 't': deterministic=True cannot be combined with pooling 'max'"):
        se.EmbeddingCollection([se.TableConfig("t", 5, 3, pooling="max")], deterministic=True)


def test_a_pooling_that_torch_has_not_needs_a_collection() -> None:
    others = set(POOLINGS) - {*get_args(Mode), None}
    assert others, "nothing is tried: every pooling is a mode of nn.EmbeddingBag"
    for name in others:
        with pytest.raises(ConfigError, match=f"mode must be 'sum', 'mean' or 'max', not {name!r}"):
            se.EmbeddingBag(5, 3, mode=name)  # type: ignore[arg-type]


@KINDS
def test_frequencies_are_taken_or_refused_by_name(kind: PoolingKind) -> None:
    if kind.takes_frequencies:
        table = se.TableConfig("t", ROWS, COLUMNS, pooling=kind.name, scale_grad_by_freq=True)
        assert table.why_by_id(kind.name) == "scale_grad_by_freq counts each id of a batch"
        return
    with pytest.raises(ConfigError, match=f"'t': scale_grad_by_freq cannot be combined with pooling {kind.name!r}"):
        se.TableConfig("t", ROWS, COLUMNS, pooling=kind.name, scale_grad_by_freq=True)


@KINDS
def test_the_planner_counts_its_work_and_reads_it_from_a_file(kind: PoolingKind) -> None:
    seconds = {}
    for name in ("sum", kind.name):
        table = se.TableConfig("t", 1000, 16, pooling=name)
        model = cost_model.CostModel(Workload("w", 64, (TableLoad(table, (5.0,), Uniform()),)), topology())
        seconds[name] = [float(model.common_in_detail(0, [(16.0, 1)], packing)[0][COMBINE]) for packing in PACKINGS]
    for mine, plain in zip(seconds[kind.name], seconds["sum"], strict=True):
        assert mine > 0
        assert kind.divisor is None or mine > plain
    assert ("null" if kind.name is None else kind.name) in POOLING_NAMES


def test_the_page_says_of_each_what_the_registry_says() -> None:
    lines = PAGE.read_text().partition("## Poolings")[2].partition("\n## ")[0].splitlines()
    _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    told = {name: (sums, weights) for name, _, sums, weights in rows}
    words = {True: "yes", False: "no"}
    for name, kind in POOLINGS.items():
        row = "`None`" if name is None else f'`"{name}"`'
        assert told.pop(row, None) == (words[kind.partial_sums], words[kind.takes_weights]), f"{row} in {PAGE.name}"
    assert not told
