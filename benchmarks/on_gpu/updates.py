"""One slab's kernels against plain torch: what a race, an index of 32 bits or another rounding would change."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.on_gpu.check import Here, NotSeenError
from shardembed import optim
from shardembed.kernels import grouping, reference
from shardembed.kernels.formulas import Step
from shardembed.kernels.gradients import Gradients
from shardembed.kernels.kernel import SlabData
from shardembed.optim import SGD, Lion, RowwiseAdagrad, RowwiseAdam, TableOptimizer

NARROW = (torch.bfloat16, torch.float16)
# Of whole numbers the usual betas make sums that are nothing but rounding, whose sign Lion takes for an update. Of these, none.
SETTINGS = {Lion: Lion(0.1, betas=(0.5, 0.75))}


def data_of(optimizer: TableOptimizer, weights: torch.Tensor) -> SlabData:
    """A slab that has not learned yet, with these weights."""
    compute = torch.float64 if weights.dtype == torch.float64 else torch.float32
    shapes = {"row": weights.shape[:1], "element": weights.shape}
    state = {name: torch.zeros(shapes[shape], dtype=compute, device=weights.device) for name, shape in optimizer.state.items()}
    return SlabData(weights, state, optimizer, compute)


def wrong(found: torch.Tensor, wanted: torch.Tensor, bound: float) -> int:
    """How many numbers are off by more than `bound`, relatively and absolutely; nan is."""
    found, wanted = found.double(), wanted.double()
    return int((~((found - wanted).abs() <= bound * (1 + wanted.abs()))).sum())


def rowwise(here: Here) -> Iterator[str]:
    """A number of the whole row is read and written by many threads: a missing barrier is a wrong row now and then."""
    from shardembed.kernels.triton.order import direct_of, order
    from shardembed.kernels.triton.update import update

    cases: list[tuple[TableOptimizer, tuple[int, ...]]] = [
        (RowwiseAdagrad(0.1), (3, 16) if here.small else (16, 32, 64, 100, 128, 256, 512, 1024)),
        (RowwiseAdam(0.1), (16,) if here.small else (64, 256)),
    ]
    for settings, widths in cases:
        for width in widths:
            rows = 40 if here.small else min(1_000_000, 200_000_000 // width)
            off = total = 0
            for given in (False, True):
                for again in range(1 if here.small else 4):
                    torch.manual_seed(again)
                    waiting = Gradients(
                        torch.randint(rows, (rows,), device=here.device), None, torch.randn(rows, width, device=here.device)
                    )
                    rows_U, sums_UW = grouping.merge(waiting, rows)
                    square = sums_UW.square().mean(1) if given else None
                    start = torch.randn(rows, width, device=here.device)
                    fused, plain = data_of(settings, start.clone()), data_of(settings, start)
                    update(fused, waiting, order(waiting.rows_E, None, rows, direct_of(width)), 0.1, 1, 1.0, square)
                    reference.update(plain, rows_U, sums_UW, Step(0.1, 1, square))
                    off += wrong(fused.weights, plain.weights, 1e-4)
                    off += sum(wrong(fused.state[name], state, 1e-4) for name, state in plain.state.items())
                    total += rows_U.numel()
            yield f"{type(settings).__name__}, {width} columns: {off} wrong numbers in {total:,} rows"
            assert not off, f"{type(settings).__name__}, {width} columns: {off} wrong numbers"


def large(here: Here) -> Iterator[str]:
    """More than 2^31 elements."""
    from shardembed.kernels.triton.lookup import lookup
    from shardembed.kernels.triton.order import direct_of, order
    from shardembed.kernels.triton.update import update

    width, some = 64, 1000
    rows = 2000 if here.small else 2**25 + 2**24
    weights = torch.zeros(rows, width, device=here.device)
    ids = torch.arange(rows - some, rows, device=here.device)
    weights[ids] = ids[:, None].float()
    assert torch.equal(lookup(weights, ids, None, torch.float32), weights[ids]), "rows"
    offsets = torch.arange(0, some + 1, 10, device=here.device)
    torch.testing.assert_close(lookup(weights, ids, offsets, torch.float32), weights[ids].view(-1, 10, width).sum(1))
    before, ones = weights[ids].clone(), torch.ones(some, width, device=here.device)
    update(data_of(SGD(1.0), weights), Gradients(ids, None, ones), order(ids, None, rows, direct_of(width)), 1.0, 1)
    assert torch.equal(weights[ids], before - 1), "the rows that were to be updated"
    assert not weights[:some].any(), "a row was updated in another's place"
    yield f"{weights.numel():,} elements: lookup, sums and update of the last rows"


def optimizers(here: Here) -> Iterator[str]:
    """Every optimizer, few and many columns, bags with some rows many times, every dtype."""
    kinds = [SETTINGS[Lion] if kind is Lion else kind(lr=0.1) for kind in optim.KINDS if kind.stepped]
    cases = [(settings, width, torch.float32) for settings in kinds for width in ((5,) if here.small else (3, 64, 1000))]
    cases += [(SGD(0.1), 64, dtype) for dtype in (*NARROW, torch.float64)] + [(RowwiseAdagrad(0.1), 64, torch.float64)]
    for settings, width, dtype in cases:
        for step, off, total in steps(here, settings, width, dtype):
            assert not off, f"{settings.describe()}, {width} columns of {dtype}, step {step}: {off} wrong numbers of {total:,}"
    yield f"{len(cases)} cases of {len(kinds)} optimizers, two steps each: no number is wrong"


def steps(here: Here, settings: TableOptimizer, width: int, dtype: torch.dtype) -> Iterator[tuple[int, int, int]]:
    """(step, wrong numbers, numbers) of two steps, each beside the reference in float64 from where the kernel begins: weights that
    go far and come back would bring along what they were rounded by on the way.
    """
    from shardembed.kernels.triton.order import direct_of, order
    from shardembed.kernels.triton.update import update

    rows, bags, ids = (60, 30, 4) if here.small else (100_000, 4096, 20)
    torch.manual_seed(0)
    start = torch.randn(rows, width, device=here.device).to(dtype)
    fused, exact = data_of(settings, start), data_of(settings, start.double())
    offsets = torch.arange(0, bags * ids + 1, ids, device=here.device)
    bound = 4 * torch.finfo(dtype).eps if dtype in NARROW else 1e-4
    for step in (1, 2):
        skewed = (rows ** torch.rand(bags * ids, dtype=torch.float64, device=here.device) - 1).long().clamp_(0, rows - 1)
        grads = torch.randint(-9, 10, (bags, width), device=here.device)  # sums are exact, so what differs is the formula
        wide = Gradients(skewed, offsets, grads.double())
        waiting = Gradients(skewed, offsets, grads.to(fused.compute_dtype))
        exact.weights.copy_(fused.weights)
        for name, held in exact.state.items():
            held.copy_(fused.state[name])
        update(fused, waiting, order(skewed, offsets, rows, direct_of(width)), 0.1, step)
        reference.update(exact, *grouping.merge(wide, rows), Step(0.1, step))
        yield step, wrong(fused.weights, exact.weights, bound), fused.weights.numel()


def fbgemm(here: Here) -> Iterator[str]:
    """kernel="fbgemm" against the reference."""
    from shardembed.kernels.fbgemm import FORMULAS, make, missing

    if (why := missing(here.device.type)) is not None:
        raise NotSeenError(why)
    kinds = [kind for kind, fused in FORMULAS.items() if fused.on_cpu or not here.small]
    rows, bags, ids = (60, 30, 4) if here.small else (100_000, 4096, 20)
    for kind in kinds:
        for width in (8, 64):
            torch.manual_seed(0)
            start = torch.randn(rows, width, device=here.device)
            theirs, exact = make(data_of(kind(lr=0.1), start.clone())), data_of(kind(lr=0.1), start.double())
            offsets = torch.arange(0, bags * ids + 1, ids, device=here.device)
            for step in (1, 2):
                rows_E = torch.randint(rows, (bags * ids,), device=here.device)
                looked_up = theirs.lookup(rows_E, offsets)
                assert isinstance(looked_up, torch.Tensor)
                summed = reference.lookup(theirs.data.weights, rows_E, offsets, torch.float32)
                assert not wrong(looked_up, summed, 1e-4), f"{kind.__name__}, {width} columns: sums of bags"
                grads = torch.randint(-9, 10, (bags, width), device=here.device)
                theirs.update(Gradients(rows_E, offsets, grads.float()), None, False, Step(0.1, step), 1.0)
                reference.update(exact, *grouping.merge(Gradients(rows_E, offsets, grads.double()), rows), Step(0.1, step))
                off = wrong(theirs.data.weights, exact.weights, 1e-4)
                assert not off, f"{kind.__name__}, {width} columns, step {step}: {off} wrong numbers"
    yield f"{', '.join(kind.__name__ for kind in kinds)}: lookup and two steps, 8 and 64 columns"
