"""`profile(model)`: where the time of a step goes, stage by stage, and which rank is the slowest of each."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from shardembed.comm.stages import STAGES, unwatched
from shardembed.errors import StepError
from shardembed.journey.journey import Journey
from shardembed.observe.spans import Recorder, Stretch
from shardembed.observe.tables import bytes_text, journeys_of, rendered


class Profile:
    """What `profile` found, alike on all ranks. Empty until its block has ended."""

    def __init__(self) -> None:
        self._found: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """What a script would read; times in seconds, everything a step.

        steps, seconds (of the slowest rank), elsewhere (of them, outside of the stages), world_size; ranks: for each, seconds,
        bytes (sent to others) and rows (of its shards, read for lookups of all ranks); and stages: by name, with
        seconds (mean of the ranks), slowest and fastest (seconds), slowest_rank, waiting (seconds that a rank was in collectives
        longer than the fastest one, mean of the ranks), bytes (sent to others, mean of the ranks), most_bytes (by the rank that
        sends most), collectives, calls, and
        beside (it ran beside the main thread, so its time is not part of the step's).

        Raises:
            StepError: the block has not ended, or ended in an error.
        """
        if self._found is None:
            raise StepError("the profile is not complete: its `with` block has not ended, or ended in an error")
        return self._found

    def table(self) -> str:
        """The same for a terminal."""
        found = self.as_dict()
        columns = ["stage", "ms a step", "slowest", "rank", "fastest", "waiting", "sent", "collectives", "calls"]
        rows = []
        for name, stage in found["stages"].items():
            times = [f"{1e3 * stage[key]:.3f}" for key in ("seconds", "slowest")]
            more = [f"{1e3 * stage[key]:.3f}" for key in ("fastest", "waiting")]
            counts = [bytes_text(stage["bytes"]), f"{stage['collectives']:g}", f"{stage['calls']:g}"]
            rows.append([f"{name} (beside)" if stage["beside"] else name, *times, str(stage["slowest_rank"]), *more, *counts])
        rows.append(["elsewhere", f"{1e3 * found['elsewhere']:.3f}", *[""] * 7])
        size = f"{found['steps']} step(s) on {found['world_size']} rank(s), {1e3 * found['seconds']:.3f} ms a step"
        title = f"{size}. waiting: longer in collectives than the fastest rank"
        return f"{rendered(title, columns, rows)}\n{balance(found['ranks'])}"


def balance(ranks: Sequence[Mapping[str, float]]) -> str:
    """How evenly the work is spread, in words."""
    read = [rank["rows"] for rank in ranks]
    mean, most = sum(read) / len(read), max(read)
    return f"rows read a step: {mean:,.0f} by a rank on average, most by rank {read.index(most)} ({most:,.0f})"


@contextmanager
def profile(model: nn.Module) -> Iterator[Profile]:
    """Watch the stages of the model's tables while the block runs. Collective at its end (a gather of texts); not where it ends in
    an error.

        with se.profile(model) as p:
            for batch in loader: ...
        print(p.table())

    Stages are named as in `shardembed/journey/journey.py`, and are also ranges of `torch.profiler` ("shardembed: lookup"). What
    autograd does between "combine" and "send grads" is part of "elsewhere", as are the dense part, the loader, and all that is
    the user's. "wait for ids" is what `se.prefetched` could not hide. In deterministic mode "send grads" includes rounding and
    "accumulate". On a GPU times are those of its stream, by events.

    Raises:
        ConfigError: the model has no sharded tables, or they lie on several process groups.
        StepError: they are being watched already.
    """
    journeys, comm, device = journeys_of(model)
    if any(journey.stage is not unwatched for journey in journeys):
        raise StepError("the model is being profiled already; end that block first")
    recorder, found = Recorder(device), Profile()
    before, read_before, began = [journey.steps for journey in journeys], _read(journeys), time.perf_counter()
    for journey in journeys:
        journey.watch(recorder.stage_of(journey.comm))
    try:
        yield found
    finally:
        for journey in journeys:
            journey.watch(unwatched)
    recorder.finish()
    seconds = time.perf_counter() - began
    steps = max(journey.steps - past for journey, past in zip(journeys, before, strict=True))
    stages = {name: _told(each) for name, each in recorder.stretches.items()}
    mine = {"seconds": seconds, "steps": steps, "rows": _read(journeys) - read_before, "stages": stages}
    told = comm.gather_texts("control", "profile: gather what ranks took", json.dumps(mine))
    found._found = summary([json.loads(text) for text in told])


def _read(journeys: Sequence[Journey]) -> int:
    """Rows that this rank has read for lookups so far."""
    return sum(slab.looked_up for journey in journeys for slab in journey.slabs)


def _told(stretch: Stretch) -> dict[str, Any]:
    found = {key: getattr(stretch, key) for key in ("calls", "seconds", "bytes", "collectives", "beside")}
    return {**found, "latest": [round(each, 7) for each in stretch.latest] if stretch.collectives else []}


def summary(ranks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all ranks say, a step. Without optimizer steps, a lookup counts as one."""
    lookups = max(rank["stages"].get("lookup", {"calls": 0})["calls"] for rank in ranks)
    steps = max(rank["steps"] for rank in ranks) or lookups or 1
    stages = {
        name: _stage([rank["stages"].get(name, _told(Stretch())) for rank in ranks], steps)
        for name in STAGES
        if any(name in rank["stages"] for rank in ranks)
    }
    seconds = max(rank["seconds"] for rank in ranks) / steps
    inside = sum(stage["seconds"] for stage in stages.values() if not stage["beside"])
    elsewhere = sum(rank["seconds"] for rank in ranks) / len(ranks) / steps - inside
    each = [
        {
            "seconds": rank["seconds"] / steps,
            "bytes": sum(stage["bytes"] for stage in rank["stages"].values()) / steps,
            "rows": rank["rows"] / steps,
        }
        for rank in ranks
    ]
    shared = {"world_size": len(ranks), "steps": steps, "seconds": seconds, "elsewhere": elsewhere}
    return {**shared, "ranks": each, "stages": stages}


def _stage(ranks: Sequence[Mapping[str, Any]], steps: int) -> dict[str, Any]:
    seconds = [rank["seconds"] / steps for rank in ranks]
    return {
        "seconds": sum(seconds) / len(ranks),
        "slowest": max(seconds),
        "slowest_rank": seconds.index(max(seconds)),
        "fastest": min(seconds),
        "waiting": _waiting([rank["latest"] for rank in ranks]) * max(rank["calls"] for rank in ranks) / steps,
        "bytes": sum(rank["bytes"] for rank in ranks) / len(ranks) / steps,
        "most_bytes": max(rank["bytes"] for rank in ranks) / steps,
        "collectives": max(rank["collectives"] for rank in ranks) / steps,
        "calls": max(rank["calls"] for rank in ranks) / steps,
        "beside": any(rank["beside"] for rank in ranks),
    }


def _waiting(latest: Sequence[Sequence[float]]) -> float:
    """Seconds a call that a rank took longer than the fastest one, mean of ranks and of the latest calls."""
    count = min(len(each) for each in latest)
    if not count:
        return 0.0
    # The same calls of all ranks, counted from the end: of the first ones some may have been dropped.
    calls = list(zip(*(each[-count:] for each in latest), strict=True))
    return sum(sum(call) / len(call) - min(call) for call in calls) / count
