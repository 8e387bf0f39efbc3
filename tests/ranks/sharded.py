"""A case of the oracle, run on rank processes; their answers put together to whole tables, and compared with the truth.

How close is close, with u the unit of a dtype (its `eps`):

* float64: 1e-10, absolute and relative.
* A gradient of a narrower table is a sum of n contributions in float32, each rounded once to the wire dtype before it travels.
  Any order of summation errs by at most n u times the sum of magnitudes, whatever cancels, so the bound is
  `((n + 4) u32 + u_wire) * magnitudes`; an output of a bag is bounded alike.
* Weights of a narrower table, after adaptive steps: an optimizer may divide a gradient by its own size, which blows up the
  rounding error of one that cancelled. These cases therefore have positive contributions only: then magnitude and gradient are the
  same, and their relative error c = (n + 4) u32 + u_wire is all there is. Squares double it, roots halve it, so an update errs by
  4 c relatively at most, a weight by 4 c of the path it went, plus one rounding to the table's dtype a step.

Legend: N rows, D columns, U distinct rows.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

import shardembed as se
from shardembed.tables.layout import Shard
from tests.harness import run_ranks
from tests.oracle import Case, Truth, loss_of, truth


@dataclass(frozen=True)
class Piece:
    """A cut-out of a table as a rank holds it."""

    table: str
    shard: Shard
    weights: torch.Tensor
    state: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Owned:
    """Gradients that wait at an owner: rows of the table `[U]`, the columns it holds, the gradients."""

    table: str
    rows: torch.Tensor
    columns: range
    grads: torch.Tensor


@dataclass(frozen=True)
class RankRun:
    """What one rank saw: weights before and after, outputs by step and micro-batch, gradients at the first step, and of each slab
    (kernel, whether its rows are cut).
    """

    before: list[Piece]
    after: list[Piece]
    outputs: list[list[dict[str, np.ndarray]]]
    owned: list[Owned]
    kernels: list[tuple[str, bool]]


def build(rank: int, world_size: int, case: Case) -> se.EmbeddingCollection:
    """The collection of a case, on ranks that believe there are `ranks_per_node` to a machine."""
    before = os.environ.get("LOCAL_WORLD_SIZE")
    os.environ["LOCAL_WORLD_SIZE"] = str(min(case.ranks_per_node, world_size))
    try:
        return se.EmbeddingCollection(
            case.tables,
            optimizer=case.optimizers,
            plan=case.plan,
            wire_dtype=case.wire_dtype,
            gradient_reduction=case.reduction,
            update=case.update,
            kernel=case.kernel,
            seed=case.seed,
        )
    finally:
        if before is None:
            del os.environ["LOCAL_WORLD_SIZE"]
        else:
            os.environ["LOCAL_WORLD_SIZE"] = before


def pieces(emb: se.EmbeddingCollection) -> list[Piece]:
    """Copies of all this rank holds."""
    return [
        Piece(local.table, local.shard, local.weights.clone(), {name: tensor.clone() for name, tensor in local.state.items()})
        for local in emb.local_shards()
    ]


def train(rank: int, world_size: int, cases: list[bytes]) -> RankRun:
    """Train on this rank's batches: `cases[rank]` is a pickled case that has no others."""
    case: Case = pickle.loads(cases[rank])
    emb = build(rank, world_size, case)
    before = pieces(emb)
    optimizer = se.Optimizer(emb, micro_batches=len(case.batches[0]))
    outputs: list[list[dict[str, np.ndarray]]] = []
    owned: list[Owned] = []
    for number, micro_batches in enumerate(case.batches):
        outputs.append([])
        for (batch,) in micro_batches:
            found = emb({name: bags.given for name, bags in batch.items()})
            for feature in case.features:
                assert found[feature.name].dtype == case.tables[feature.table].dtype, f"dtype of {feature.name}"
            outputs[-1].append({name: output.detach().to(torch.float64, copy=True).numpy() for name, output in found.items()})
            loss_of(written(found, number), batch, case.curved).backward()
        if case.update == "step":
            if number == 0:  # looking merges what waits, so the other steps go without
                owned = waiting(emb, rank)
            optimizer.step()
            optimizer.zero_grad()
    kernels = [(slab.kernel.name, slab.spec.split_rows) for slab in emb.journey.slabs]
    return RankRun(before, pieces(emb), outputs, owned, kernels)


def written(outputs: Mapping[str, torch.Tensor], turn: int = 0) -> dict[str, torch.Tensor]:
    """The same numbers and gradients, with every other output doubled in place, as `x = emb(ids); x *= 2` does: whoever shares its
    memory would see it.
    """
    return {name: output.mul_(2.0) * 0.5 if (place + turn) % 2 else output for place, (name, output) in enumerate(outputs.items())}


def waiting(emb: se.EmbeddingCollection, rank: int) -> list[Owned]:
    """What waits for the step on this rank, as rows of tables."""
    found = []
    for slab in emb.journey.slabs:
        keys_U, grads_UW = slab.merged()
        for lane in slab.spec.lanes:
            for block in lane.blocks:
                if rank in block.shard.ranks:
                    rows = block.shard.rows
                    inside = (keys_U >= block.first_key) & (keys_U < block.first_key + len(rows))
                    numbers = rows.start + (keys_U[inside] - block.first_key) * rows.step
                    found.append(Owned(emb.tables[lane.table].name, numbers, lane.columns, grads_UW[inside].clone()))
    return found


def whole(case: Case, runs: list[list[Piece]]) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    """Weights and state of whole tables. Every element must be held, and what several hold must be the same bits."""
    weights: dict[str, torch.Tensor] = {}
    state: dict[str, dict[str, torch.Tensor]] = {}
    for table in case.tables:
        mine = [piece for run in runs for piece in run if piece.table == table.name]
        shape = (table.num_embeddings, table.embedding_dim)
        weights[table.name] = _assemble([(piece.shard, piece.weights) for piece in mine], shape, table.name)
        state[table.name] = {
            name: _assemble([(piece.shard, piece.state[name]) for piece in mine], shape, f"{name} of {table.name}")
            for name in case.optimizers[table.name].state
        }
    return weights, state


def _assemble(parts: list[tuple[Shard, torch.Tensor]], shape: tuple[int, int], what: str) -> torch.Tensor:
    held = parts[0][1]
    result = held.new_zeros(shape if held.dim() == 2 else shape[:1])
    seen = torch.zeros(result.shape, dtype=torch.bool)
    for shard, values in parts:
        rows = slice(shard.rows.start, shard.rows.stop, shard.rows.step)
        where = (rows, slice(shard.columns.start, shard.columns.stop)) if values.dim() == 2 else (rows,)
        known = seen[where]
        assert torch.equal(result[where][known], values[known]), f"{what}: two holders of one element differ"
        result[where], seen[where] = values, True
    assert seen.all(), f"{what}: some elements are held by nobody"
    return result


def owned_gradients(case: Case, runs: list[RankRun]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Waiting gradients and touched elements of whole tables, summed over the ranks (copies have not been reduced yet)."""
    sums: dict[str, torch.Tensor] = {}
    touched: dict[str, torch.Tensor] = {}
    for table in case.tables:
        shape = (table.num_embeddings, table.embedding_dim)
        sums[table.name], touched[table.name] = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.bool)
    for run in runs:
        for owned in run.owned:
            columns = slice(owned.columns.start, owned.columns.stop)
            assert len(owned.rows.unique()) == len(owned.rows), "merged rows must be distinct"
            sums[owned.table][owned.rows, columns] += owned.grads.to(torch.float64)
            touched[owned.table][owned.rows, columns] = True
    return sums, touched


def train_all(case: Case) -> list[RankRun]:
    """Train on the ranks."""
    return run_ranks(case.world_size, train, [pickle.dumps(case.of_rank(rank)) for rank in range(case.world_size)])


def check(case: Case) -> list[RankRun]:
    """Run a case on the ranks and on whole tables, and compare all there is."""
    runs = train_all(case)
    start, _ = whole(case, [run.before for run in runs])
    expected = truth(case, start)
    check_outputs(case, runs, expected)
    if case.update == "step":
        check_gradients(case, runs, expected)
    check_weights(case, runs, expected, start)
    return runs


def unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def wire_unit(case: Case, dtype: torch.dtype) -> float:
    """The rounding of the wire; none where the wire holds all that travels."""
    wire = case.wire_dtype or dtype
    return unit(wire) if unit(wire) > unit(_compute(dtype)) else 0.0


def _compute(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def exact(case: Case, dtype: torch.dtype) -> bool:
    """Whether 1e-10 can be asked for."""
    return dtype == torch.float64 and wire_unit(case, dtype) == 0.0


def close(found: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor | None, what: str) -> None:
    """`found` is within `bound` of `expected`; without one, within 1e-10."""
    assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    bound = 1e-10 + 1e-10 * expected.abs() if bound is None else bound + 1e-30
    error = (found.to(torch.float64) - expected).abs()
    wrong = ~(error <= bound)  # so that nan is wrong
    if wrong.any():
        at = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} elements differ; first at {at}: {float(found[at])!r}, expected "
            f"{float(expected[at])!r}, allowed {float(bound[at]):.3g}"
        )


def check_outputs(case: Case, runs: list[RankRun], expected: Truth) -> None:
    """Every output in float64; later on the weights of narrower tables are rounded their own way, so only the first step's."""
    steps = [micro for step in expected.steps for micro in zip(step.outputs, step.output_magnitudes, strict=True)]
    found = [[micro for step in run.outputs for micro in step] for run in runs]
    first = len(case.batches[0]) if case.update == "step" else 1
    for feature in case.features:
        table = case.tables[feature.table]
        for number, (outputs, magnitudes) in enumerate(steps):
            for rank in range(case.world_size):
                output = torch.from_numpy(found[rank][number][feature.name])
                bound = None
                if not exact(case, table.dtype):
                    if number >= first:
                        continue
                    longest = _longest(case, feature.name)
                    # What travels is rounded to the wire's dtype, the result once more to the table's.
                    rounding = (longest + 4) * unit(_compute(table.dtype)) + wire_unit(case, table.dtype) + unit(table.dtype)
                    bound = rounding * magnitudes[rank][feature.name]
                close(output, outputs[rank][feature.name], bound, f"output of {feature.name} on rank {rank}, batch {number}")


def _longest(case: Case, feature: str) -> int:
    lengths = [batch[feature].offsets.diff() for step in case.batches for micro in step for batch in micro]
    return int(max((int(part.max()) for part in lengths if part.numel()), default=0))


def check_gradients(case: Case, runs: list[RankRun], expected: Truth) -> None:
    """What waited at the owners before the first step, and which rows it named."""
    found, touched = owned_gradients(case, runs)
    step = expected.steps[0]
    for table in case.tables:
        rows_N = step.touched[table.name].unsqueeze(1).expand_as(touched[table.name])
        assert torch.equal(touched[table.name], rows_N), f"touched rows of {table.name}"
        bound = None
        if not exact(case, table.dtype):
            bound = relative(case, table.dtype, step.contributions[table.name]) * step.magnitudes[table.name]
        close(found[table.name], step.gradients[table.name], bound, f"gradient of {table.name}")


def relative(case: Case, dtype: torch.dtype, contributions: int) -> float:
    """The relative error of a sum of positive gradients (see above)."""
    return (contributions + 4) * unit(_compute(dtype)) + wire_unit(case, dtype)


def check_weights(case: Case, runs: list[RankRun], expected: Truth, start: dict[str, torch.Tensor]) -> None:
    """Weights and optimizer state after the last step; rows that no batch named keep their very bits."""
    weights, state = whole(case, [run.after for run in runs])
    steps = len(expected.steps)
    for table in case.tables:
        name = table.name
        untouched = ~expected.ever_touched[name]
        assert torch.equal(weights[name][untouched], start[name][untouched]), f"untouched rows of {name} moved"
        bound, most = None, max(step.contributions[name] for step in expected.steps)
        loose = relative(case, table.dtype, most)
        if not exact(case, table.dtype):
            bound = (4 * loose + steps * unit(table.dtype)) * expected.path[name]
        close(weights[name], expected.weights[name], bound, f"weights of {name}")
        for key, values in expected.state[name].items():
            here, there = state[name][key][~untouched], values[~untouched]
            if not exact(case, table.dtype):
                # z of FTRL is fed back the rounded weights, and its steps can cancel: its magnitude is the path it went.
                bound = (4 * loose + steps * unit(table.dtype)) * 2 * expected.state_path[name][key][~untouched]
            close(here, there, bound, f"state {key!r} of {name}")
            assert not state[name][key][untouched].any(), f"state {key!r} of {name}: untouched rows have some"
