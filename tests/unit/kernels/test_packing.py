"""Messages: what is packed comes out at the other end, from the compiled kernels and from plain torch alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardembed.kernels import grouping, triton
from shardembed.kernels.kernel import Rows, Source, gathered
from shardembed.kernels.packing import pack, unpack
from shardembed.wire.message import ALIGNMENT, MessageLayout, Part

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64, torch.uint8]
SHAPES = [(), (1,), (3,), (4,), (2, 5), (12,)]
IMPLIED = 7


@dataclass(frozen=True)
class Job:
    """layouts, tensors: of what each rank sends."""

    layouts: list[MessageLayout]
    tensors: list[list[torch.Tensor]]


@st.composite
def jobs(draw: st.DrawFn, most_ranks: int = 4) -> Job:
    """Messages that ranks send each other; kinds of parts agree between ranks, counts do not."""
    ranks = draw(st.integers(1, most_ranks))
    kinds = st.tuples(st.sampled_from(DTYPES), st.sampled_from(SHAPES), st.booleans())
    parts = [
        Part(dtype, shape, IMPLIED if some_stay else None)
        for dtype, shape, some_stay in draw(st.lists(kinds, min_size=1, max_size=4))
    ]
    numbers = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    most = draw(st.sampled_from([0, 1, 5]))
    layouts, tensors = [], []
    for _ in range(ranks):
        items = numbers.integers(0, most + 1, (len(parts), ranks))
        travels = numbers.random(items.shape) < 0.5
        counts = np.where(travels | np.array([[part.implied is None] for part in parts]), items, 0)
        some_stay = any(part.implied is not None for part in parts)
        layouts.append(MessageLayout.of(parts, items, counts if some_stay else None))
        tensors.append([values(part, size, numbers) for part, size in zip(parts, items.sum(1), strict=True)])
    return Job(layouts, tensors)


def values(part: Part, items: int, numbers: np.random.Generator) -> torch.Tensor:
    """Every pattern of bits may come, nan too."""
    drawn = numbers.integers(0, 256, (items, part.item_bytes), dtype=np.uint8)
    return torch.from_numpy(drawn).view(-1).view(part.dtype).view(items, *part.item_shape)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def arriving(job: Job, to: int) -> tuple[torch.Tensor, MessageLayout]:
    """What a rank gets, and the layout it knows of it."""
    buffers = [pack(tensors, layout) for tensors, layout in zip(job.tensors, job.layouts, strict=True)]
    shares = [buffer.split(layout.rank_bytes.tolist())[to] for buffer, layout in zip(buffers, job.layouts, strict=True)]
    items, counts = (np.stack([getattr(layout, name)[:, to] for layout in job.layouts], 1) for name in ("items", "counts"))
    schema = job.layouts[0].schema
    return torch.cat(shares), MessageLayout.of(schema, items, counts if schema.implying else None)


def wanted(job: Job, part: int, to: int) -> bytes:
    """By plain slicing: what travels as it was sent, the rest as it is implied."""
    found = b""
    for layout, tensors in zip(job.layouts, job.tensors, strict=True):
        share = tensors[part].split(layout.items[part].tolist())[to]
        found += bits(share if layout.counts[part, to] else torch.full_like(share, IMPLIED))
    return found


def in_plain_torch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(grouping, "missing", lambda: "numba is not installed")


def in_triton(patch: pytest.MonkeyPatch) -> None:
    in_plain_torch(patch)
    patch.setattr(triton, "serves", lambda device: True)


OTHERS = [in_plain_torch, in_triton]


@given(jobs())
def test_what_is_packed_is_unpacked(job: Job) -> None:
    for to in range(len(job.layouts)):
        buffer, layout = arriving(job, to)
        assert buffer.numel() == layout.rank_bytes.sum()
        found = [unpack(buffer, layout)]
        for other in OTHERS:
            with pytest.MonkeyPatch.context() as patch:
                other(patch)
                found.append(unpack(buffer, layout))
        for tensors in found:
            for part, (kind, one) in enumerate(zip(layout.schema.parts, tensors, strict=True)):
                assert one.dtype == kind.dtype
                assert one.shape == (layout.items[part].sum(), *kind.item_shape)
                assert bits(one) == wanted(job, part, to)


@given(jobs(most_ranks=9))
def test_a_message_has_the_same_bytes_from_the_kernel_and_from_plain_torch(job: Job) -> None:
    for layout, tensors in zip(job.layouts, job.tensors, strict=True):
        one, twins = pack(tensors, layout), []
        for other in OTHERS:
            with pytest.MonkeyPatch.context() as patch:
                other(patch)
                twins.append(pack(tensors, layout))
        assert all(twin.dtype == torch.uint8 for twin in (one, *twins))
        at = 0
        assert all(size % ALIGNMENT == 0 for size in layout.rank_bytes)
        for sizes, share in zip(layout.sizes.T.tolist(), layout.rank_bytes.tolist(), strict=True):
            end = at + share
            for size in sizes:  # but not the padding, which holds anything
                assert all(bits(one[at : at + size]) == bits(twin[at : at + size]) for twin in twins)
                at += -(-size // ALIGNMENT) * ALIGNMENT
            assert at == end
        assert all(at == twin.numel() for twin in (one, *twins))


def scattered(tensor: torch.Tensor, numbers: np.random.Generator) -> Rows:
    """Rows that are this tensor when they are gathered, of a matrix that has others too; each equal pair lies in one place."""
    rows_U, inverse = np.unique(tensor.view(torch.uint8).numpy(), axis=0, return_inverse=True)
    places = numbers.permutation(len(rows_U) + 3)[: len(rows_U)]
    matrix = torch.zeros(len(rows_U) + 3, tensor.shape[1] * tensor.dtype.itemsize, dtype=torch.uint8)
    matrix[torch.from_numpy(places)] = torch.from_numpy(rows_U)
    return Rows(matrix.view(tensor.dtype), torch.from_numpy(places[inverse.reshape(-1)].astype(np.int64)))


@given(jobs(most_ranks=9), st.integers(0, 2**32 - 1))
def test_rows_are_packed_as_if_they_had_been_gathered_before(job: Job, seed: int) -> None:
    numbers = np.random.default_rng(seed)
    for layout, tensors in zip(job.layouts, job.tensors, strict=True):
        sources: list[Source] = [
            scattered(tensor, numbers) if tensor.ndim == 2 and tensor.numel() and numbers.random() < 0.7 else tensor
            for tensor in tensors
        ]
        for source, tensor in zip(sources, tensors, strict=True):
            assert bits(gathered(source)) == bits(tensor)
        messages = [pack(sources, layout)]
        for other in OTHERS:
            with pytest.MonkeyPatch.context() as patch:
                other(patch)
                messages.append(pack(sources, layout))
        chunks = [_chunks(message, layout) for message in (pack(tensors, layout), *messages)]
        assert all(found == chunks[0] for found in chunks[1:])


def _chunks(message: torch.Tensor, layout: MessageLayout) -> list[bytes]:
    """What is in it, without the padding, which holds anything."""
    padded = -(-layout.sizes.T // ALIGNMENT) * ALIGNMENT
    shares = message.split(padded.reshape(-1).tolist())
    return [bits(share[:size]) for share, size in zip(shares, layout.sizes.T.reshape(-1).tolist(), strict=True)]


@pytest.mark.parametrize("ranks", [1, 2, 40])
@pytest.mark.parametrize("left", [[0], [1], [0, 2], [0, 1, 2]])
def test_rows_and_tensors_lie_in_one_message(left: list[int], ranks: int) -> None:
    """left: the parts that are yet to be gathered. On 40 ranks more rows are asked for ahead than one of them gets."""
    numbers = np.random.default_rng(ranks)
    parts = [Part(torch.float32, (64,)), Part(torch.bfloat16, (5,)), Part(torch.uint8, (3,))]
    layout = MessageLayout.of(parts, numbers.integers(0, 4, (3, ranks)))
    tensors = [values(part, size, numbers) for part, size in zip(parts, layout.totals, strict=True)]
    rows = {part: scattered(tensors[part], numbers) for part in left}
    message = pack([rows.get(part, tensor) for part, tensor in enumerate(tensors)], layout)
    assert _chunks(message, layout) == _chunks(pack(tensors, layout), layout)


@pytest.mark.parametrize("row", [-1, 5])
@pytest.mark.parametrize("how", [lambda patch: None, *OTHERS])
def test_rows_that_the_matrix_does_not_have_are_refused(row: int, how: Callable[[pytest.MonkeyPatch], None]) -> None:
    layout = MessageLayout.of([Part(torch.float32, (4,)), Part(torch.int64)], np.array([[2, 0], [0, 0]]))
    sources = [Rows(torch.zeros(5, 4), torch.tensor([1, row])), torch.zeros(0, dtype=torch.int64)]
    with pytest.MonkeyPatch.context() as patch:
        how(patch)
        with pytest.raises(IndexError):
            pack(sources, layout)


def test_a_lone_part_of_rows_is_gathered_by_torch() -> None:
    layout = MessageLayout.of([Part(torch.float32, (4,))], np.array([[2, 0, 1]]))
    rows = Rows(torch.randn(5, 4), torch.tensor([4, 0, 4]))
    assert bits(pack([rows], layout)) == bits(rows.weights[[4, 0, 4]])


def test_tensors_that_are_not_contiguous_are_packed_as_they_read() -> None:
    layout = MessageLayout.of([Part(torch.float32, (3,)), Part(torch.int64)], np.array([[1, 1], [2, 0]]))
    tensors = [torch.arange(6.0).view(3, 2).T, torch.arange(4)[::2]]
    found = unpack(pack(tensors, layout), layout)
    assert all(torch.equal(one, other) for one, other in zip(found, tensors, strict=True))


def test_a_lone_part_without_padding_is_not_copied() -> None:
    layout = MessageLayout.of([Part(torch.float32, (4,))], np.array([[2, 0, 1]]))
    tensor = torch.randn(3, 4)
    buffer = pack([tensor], layout)
    assert buffer.data_ptr() == tensor.data_ptr()
    assert unpack(buffer, layout)[0].data_ptr() == tensor.data_ptr()
