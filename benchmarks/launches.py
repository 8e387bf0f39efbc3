"""What a training step asks of a GPU, counted without one: operators, compiled calls, and waits of the host.

    python -m benchmarks.launches [--slabs 1 10] [--tables 26] [--ranks 2] [--sites]

    with as_on_a_device(), Launches() as counted:
        step()
    counted.operators, counted.host_syncs

It is counted on the CPU, with tables that are served by the Triton kernels in Triton's interpreter (`TRITON_INTERPRET=1` before
Triton is imported, `Settings(kernel="triton")`), and `as_on_a_device` switches the compiled kernels of the CPU off: what is left is
the way that tensors on a CUDA device go. What would be a launch there is one here:

    operators   ATen operators as the dispatcher sees them, and each tensor that is made from numbers of the host, which has to be
                copied to the device; compiled calls too. Views, allocations and what only asks for metadata launch nothing
                (`FREE`); a fill does.
    compiled    calls of Triton kernels; what the interpreter does inside of one is not counted.
    host_syncs  where the host would wait for the device: numbers that Python wants to see, sizes that only the device knows
                (`WAITS`), copies to the host, and copies from host memory that is not pinned. `kernels.host` is where pinned and
                asynchronous copies are made, so what it copies is an operator and no wait.

An operator may be several launches (a sort is some ten), and one that has nothing to do launches none; neither is looked at.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from benchmarks import pages
from benchmarks.own_work import Case, Rank
from shardembed.kernels import grouping, triton
from shardembed.tables.settings import Settings

PACKAGE = str(Path(grouping.__file__).parents[1])
PINNED = str(Path(grouping.__file__).with_name("host.py"))
PASSED = (PINNED, "triton/tiles.py")  # whoever calls these is who asks
OUTSIDE = "between the stages"

# No launch: memory is handed out, or a tensor is described anew. `unsafe_split` and `_unsafe_view` are views that autograd is not
# told of. What is_view says of an operator is asked first.
FREE = frozenset(
    {
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "resize_",
        "set_",
        "_unsafe_view",
        "_reshape_alias",
        "unsafe_split",
        "unsafe_split_with_sizes",
        "lift_fresh",
        "scalar_tensor",  # a number of Python's beside a tensor: it goes as an argument of the kernel
        "is_pinned",
        "sym_size",
        "sym_stride",
        "sym_numel",
        "record_stream",
    }
)
# The host waits: how often, by operator. bincount asks for the least and the largest number.
WAITS = {
    "_local_scalar_dense": 1,
    "nonzero": 1,
    "masked_select": 1,
    "equal": 1,
    "bincount": 2,
    "_unique": 1,
    "_unique2": 1,
    "unique_dim": 1,
    "unique_consecutive": 1,
    "unique_dim_consecutive": 1,
}
FROM_HOST = (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)
UNSEEN_FROM_HOST = ("from_numpy", "frombuffer")  # of the module torch, where no mode sees them
TO_HOST = (torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__)


@dataclass(frozen=True)
class Site:
    """Where something was asked for.

    Attributes:
        stage: of the journey.
        place: the line of the package.
        name: of the operator, kernel or function.
    """

    stage: str
    place: str
    name: str


@dataclass
class Launches:
    """Counts while it is entered, on this thread; see above.

    Attributes:
        plain: operators.
        compiled: calls of Triton kernels.
        waits: host syncs.
    """

    plain: Counter[Site] = field(default_factory=Counter)
    compiled: Counter[Site] = field(default_factory=Counter)
    waits: Counter[Site] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._stage = OUTSIDE
        self._modes: tuple[Any, ...] = ()
        self._undo: list[Callable[[], None]] = []

    @property
    def operators(self) -> int:
        """Operators and compiled calls together."""
        return self.plain.total() + self.compiled.total()

    @property
    def host_syncs(self) -> int:
        return self.waits.total()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """For `Journey.watch`: what comes in here belongs to this stage, or to one inside of it."""
        before, self._stage = self._stage, name
        yield
        self._stage = before

    def __enter__(self) -> Launches:
        self._undo = [_around_triton(self._launched), *(_around(name, self._from_host) for name in UNSEEN_FROM_HOST)]
        self._modes = (_Functions(self), _Operators(self))
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)
        for undo in self._undo:
            undo()

    def _from_host(self, name: str) -> None:
        site = self._site(name)
        self.plain[site] += 1
        if not _is_pinned():
            self.waits[site] += 1

    def _launched(self, kernel: Any) -> None:
        self.compiled[self._site(kernel.fn.__name__)] += 1

    def _site(self, name: str) -> Site:
        return Site(self._stage, _place(), name)

    def operator(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = func._schema.name.split("::")[1]
        if func.is_view or name in FREE:
            return
        site = self._site(name)
        self.plain[site] += 1
        if waits := _waits(name, args, kwargs):
            self.waits[site] += waits

    def function(self, func: Any, fetched: bool) -> None:
        """fetched: what is read has been copied to the host already."""
        name = getattr(func, "__name__", str(func))
        if func in FROM_HOST:
            self._from_host(name)
        elif func in TO_HOST and not fetched:
            site = self._site(name)
            self.plain[site] += 1
            self.waits[site] += 1


def _waits(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    if name == "repeat_interleave":  # how long the result is
        return 0 if kwargs.get("output_size") is not None else 1
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):  # which entries a mask takes
        masks = [one for one in args[1] if one is not None and one.dtype in (torch.bool, torch.uint8)]
        fills = name != "index" and args[2].numel() == 1
        return 0 if fills else len(masks)
    return WAITS.get(name, 0)


class _Operators(TorchDispatchMode):
    """Sees what reaches the dispatcher, backward and all."""

    def __init__(self, counted: Launches) -> None:
        super().__init__()
        self._counted = counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._counted.operator(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    """Sees the crossings between host and device, which on a CPU are no operators."""

    def __init__(self, counted: Launches) -> None:
        super().__init__()
        self._counted = counted
        self._fetched: Any = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cpu:  # on a CPU the same tensor, which is then read
            self._counted.function(torch.Tensor.numpy, False)
            self._fetched = args[0]
        else:
            self._counted.function(func, fetched=bool(args) and args[0] is self._fetched)
        return func(*args, **(kwargs or {}))


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            yield frame
        frame = frame.f_back


def _place() -> str:
    for frame in _frames():
        if not frame.f_code.co_filename.endswith(PASSED):
            return f"{Path(frame.f_code.co_filename).relative_to(PACKAGE)}:{frame.f_lineno} {frame.f_code.co_name}"
    return "torch"


def _is_pinned() -> bool:
    frame = next(_frames(), None)
    return frame is not None and frame.f_code.co_filename == PINNED


def _around(name: str, told: Callable[[str], None]) -> Callable[[], None]:
    """Tell of each call of this function of the module torch. Returns how to undo it."""
    function = getattr(torch, name)

    def telling(*args: Any, **kwargs: Any) -> Any:
        told(name)
        return function(*args, **kwargs)

    setattr(torch, name, telling)
    return lambda: setattr(torch, name, function)


def _around_triton(launched: Callable[[Any], None]) -> Callable[[], None]:
    """Tell of each kernel that is launched in Triton's interpreter, and let nobody see what that does. Returns how to undo it."""
    try:
        from triton.runtime.interpreter import GridExecutor
    except ImportError:
        return lambda: None
    run = GridExecutor.__call__

    def told(kernel: Any, *args: Any, **constants: Any) -> Any:
        launched(kernel)
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            return run(kernel, *args, **constants)

    setattr(GridExecutor, "__call__", told)  # noqa: B010 - an assignment is no type of it

    def undo() -> None:
        setattr(GridExecutor, "__call__", run)  # noqa: B010

    return undo


@contextmanager
def as_on_a_device() -> Iterator[None]:
    """Without the compiled kernels of the CPU, so that tensors take the way of those on a device."""
    missing, serves = grouping.missing, triton.serves
    grouping.missing = lambda: "left out, as on a device"
    triton.serves = lambda device: True  # type: ignore[assignment]
    try:
        yield
    finally:
        grouping.missing, triton.serves = missing, serves


def count(case: Case, ranks: int) -> Launches:
    """Of one step of a rank among so many, after one that is not counted."""
    with as_on_a_device():
        rank, counted = Rank(case, ranks, Settings(kernel="triton")), Launches()
        rank.walk(0, counted.stage, counted.stage)
        with counted:
            rank.walk(1, counted.stage, counted.stage)
    return counted


def by_stage(counted: Launches) -> dict[str, tuple[int, int, int]]:
    """Operators, compiled calls and host syncs of each stage of the journey."""
    stages = dict.fromkeys(site.stage for site in (*counted.plain, *counted.compiled, *counted.waits))

    def of(found: Counter[Site], stage: str) -> int:
        return sum(times for site, times in found.items() if site.stage == stage)

    return {stage: (of(counted.plain, stage), of(counted.compiled, stage), of(counted.waits, stage)) for stage in stages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slabs", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--tables", type=int, default=26)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--ids", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--packing", nargs="+", default=["unique", "bag"])
    parser.add_argument("--sites", action="store_true", help="each line that asks for something")
    args = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    for packing in args.packing:
        for ids in args.ids:
            for slabs in args.slabs:
                case = Case(args.tables, slabs, 1_000, 40, ids, packing)
                counted = count(case, args.ranks)
                print(f"{case.name}, {args.ranks} ranks: {counted.operators} operators, {counted.host_syncs} host syncs\n")
                rows = [[stage, *map(str, found)] for stage, found in by_stage(counted).items()]
                print("\n".join(pages.table(["stage", "operators", "compiled", "host syncs"], rows)), "\n")
                for site in args.sites * [*counted.plain, *counted.compiled]:
                    times = counted.plain[site] + counted.compiled[site], counted.waits[site]
                    print(f"{times[0]:4d} {times[1] or '':2} {site.stage:16} {site.name:28} {site.place}")


if __name__ == "__main__":
    main()
