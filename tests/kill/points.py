"""Where ranks are killed, and from which checkpoint the run goes on.

Runs save after every second batch and are killed around the third save, that of 6 batches: until its folder is renamed, what
loads is the checkpoint of 4, and afterwards that of 6.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tests.kill.trainer import Mode
from tests.kill.trap import Point

FILE = r"rank-\d+\.safetensors"


@dataclass(frozen=True)
class Case:
    """A run on `ranks` that is killed at `point`, perhaps once more at `then` when it goes on, and ends on `ends_on` ranks.

    resumes: batches of the checkpoint from which it may end. begins: batches that a run before, which nobody kills, trains on; with
    `back` that run keeps all its checkpoints, and the one that is killed goes on from that of so many batches. sample: `make test`
    runs it too.
    """

    name: str
    point: Point
    resumes: tuple[int, ...]
    ranks: int = 2
    exact: bool = False
    ends_on: int = 2
    mode: Mode = "full"
    then: Point | None = None
    begins: int = 0
    back: int | None = None
    sample: bool = False

    @property
    def victims(self) -> str:
        return "all" if self.point.everybody else f"rank {self.point.rank}"


def _training() -> list[Case]:
    """A batch is half done."""
    places = [
        ("synced", "collective synced: .*", "before", 1),
        ("counts", "collective forward: counts", "before", 1),
        ("counts sent", "collective forward: counts", "after", 1),
        ("ids", "collective forward: send ids", "before", 1),
        ("ids sent", "collective forward: send ids", "after", 1),
        ("lookup", "slab lookup", "before", 2),
        ("vectors", "collective forward: send back", "before", 1),
        ("vectors sent", "collective forward: send back", "after", 1),
        ("dense backward", "dense backward", "before", 1),
        ("gradients", "collective backward: send gradients", "before", 1),
        ("gradients sent", "collective backward: send gradients", "after", 1),
        ("accumulate", "slab accumulate", "after", 2),
        ("copies", "collective step: reduce copies", "before", 1),
        ("norms", "collective clip_grad_norm_: sum norms", "after", 1),
        ("finite", "collective step: agree that gradients are finite", "before", 1),
        ("dense step", "dense step", "before", 1),
        ("squares", "collective step: share row squares", "before", 1),
        ("squares sent", "collective step: share row squares", "after", 1),
        ("half of the ids are settled", "slab commit", "after", 1),
        ("half a step", "slab step", "after", 2),
        ("a whole step", "slab step", "after", 6),  # each strip of the dynamic table has a slab of its own
    ]
    cases = []
    for number, (name, event, when, nth) in enumerate(places):
        ranks = 2 + number % 2
        # In turn rank 0, which hosts the store, the last rank, and all.
        rank, everybody = (0, ranks - 1, 1)[number % 3], number % 3 == 2
        point = Point(event, when, nth, rank=rank, everybody=everybody, batch=4)  # type: ignore[arg-type]
        cases.append(Case(f"training: {name}", point, (4,), ranks, ends_on=ranks, sample=name == "half a step"))
    for name, event, when, nth in [
        ("exponents", "collective backward: .*", "before", 1),
        ("gradients", "collective backward: send gradients", "after", 1),
        ("half a step", "slab step", "before", 3),
    ]:
        point = Point(event, when, nth, rank=1, batch=5)  # type: ignore[arg-type]
        cases.append(Case(f"exact training: {name}, goes on on other ranks", point, (4,), 3, exact=True, ends_on=2))
    return cases


def _saving() -> list[Case]:
    """Stage by stage, in the order of a save. Whatever rank 0 alone does, it is killed there, or all are."""
    stages = ["look at the model", "add up sizes", "lock the folder", "make a folder", "write", "tell what was written"]
    cases = []
    for number, stage in enumerate(stages):
        point = Point(f"collective checkpoint: {stage}", rank=1, everybody=number % 2 == 1, save=6)
        cases.append(_exact(f"save: {stage}", point, (4,), number))
    places = [
        ("the folder is made", "mkdir .saving", "after", 1, 4),
        ("a file is opened", f"open {FILE}", "after", 1, 4),
        ("before the first bytes", f"pwrite {FILE}", "before", 1, 4),
        ("the middle of a write", f"pwrite {FILE}", "half", 5, 4),
        ("the middle of a file", f"pwrite {FILE}", "after", 7, 4),
        ("before a file's fsync", f"fsync {FILE}", "before", 1, 4),
        ("between the last file and the manifest", "open state.json", "before", 1, 4),
        ("the middle of the small state", "pwrite state.json", "half", 1, 4),
        ("before the small state's fsync", "fsync state.json", "before", 1, 4),
        ("the manifest is opened", "open manifest.json", "after", 1, 4),
        ("the middle of the manifest", "pwrite manifest.json", "half", 1, 4),
        ("before the manifest's fsync", "fsync manifest.json", "before", 1, 4),
        ("after the manifest's fsync", "fsync manifest.json", "after", 1, 4),
        ("before the folder's fsync", "fsync .saving", "before", 1, 4),
        ("before the renaming", "rename .saving", "before", 1, 4),
        ("after the renaming", "rename .saving", "after", 1, 6),
        ("before the name is on the disk", "fsync folder", "before", 1, 6),
        ("before all hear of it", "collective checkpoint: publish", "before", 1, 6),
        ("before an old one is renamed", "rename step", "before", 1, 6),
        ("after an old one is renamed", "rename step", "after", 1, 6),
        ("an old one's first file", "unlink (rank-.*|.*json)", "before", 1, 6),
        ("half of an old one is gone", "unlink (rank-.*|.*json)", "after", 2, 6),
        ("an old one's folder", "rmdir .removed", "before", 1, 6),
        ("an old one is gone", "rmdir .removed", "after", 1, 6),
    ]
    sample = ("before the renaming",)
    for number, (name, event, when, nth, resumes) in enumerate(places):
        point = Point(event, when, nth, everybody=number % 2 == 0, save=6)  # type: ignore[arg-type]
        cases.append(_exact(f"save: {name}", point, (resumes,), number, sample=name in sample))
    for name, event, when, nth in [
        ("the middle of another rank's file", f"pwrite {FILE}", "half", 3),
        ("another rank's file is on the disk", f"fsync {FILE}", "after", 1),
    ]:
        point = Point(event, when, nth, rank=2, save=6)  # type: ignore[arg-type]
        cases.append(Case(f"save: {name}", point, (4,), ranks=3, ends_on=3))
    # A rank that hears late that it is complete.
    cases.append(
        Case("save: published, and rank 1 has not heard", Point("collective checkpoint: publish", rank=1, nth=2, save=6), (6,))
    )
    return cases


def _exact(name: str, point: Point, resumes: tuple[int, ...], number: int, sample: bool = False) -> Case:
    """Runs that may go on on another number of ranks, and in turn do."""
    ranks, ends_on = ((2, 3), (3, 2), (2, 2), (3, 1))[number % 4]
    return Case(name, point, resumes, ranks, exact=True, ends_on=ends_on, sample=sample)


def _cleaning() -> list[Case]:
    """What a first kill left is being removed by the next save when it is killed again."""
    left = Point("fsync manifest.json", "after", everybody=True, save=6)
    removed = Point("unlink .*", "after", 2, everybody=True, save=6)
    return [
        Case("cleaning a leftover: before its first file", left, (4,), then=Point("unlink .*", save=6)),
        Case("cleaning a leftover: half of it is gone", left, (4,), 3, True, 2, then=replace(removed, rank=0)),
        Case("cleaning a leftover: before its folder", left, (4,), 2, True, 1, then=Point("rmdir .saving", everybody=True, save=6)),
        Case("cleaning a leftover: it is gone", left, (4,), then=Point("rmdir .saving", "after", save=6)),
        Case("cleaning what a removal left", removed, (6,), then=Point("unlink .*", everybody=True, save=8)),
    ]


def _loading() -> list[Case]:
    """A load changes nothing on the disk, wherever it ends."""
    places = [
        ("choose", Point("collective checkpoint: choose a checkpoint", "after")),
        ("the manifest", Point("open manifest.json", "after", rank=1)),
        ("the manifest is read", Point("collective checkpoint: read the manifest", everybody=True)),
        ("compare", Point("collective checkpoint: compare with the model", rank=1)),
        ("the first rows", Point(f"preadv {FILE}", everybody=True)),
        ("half of the rows", Point(f"preadv {FILE}", "after", 6, rank=1)),
        ("all rows", Point("collective checkpoint: read", everybody=True)),
        ("before the small state", Point("collective checkpoint: restore")),
        ("restored", Point("collective checkpoint: restore", "after", 2, rank=1)),
    ]
    return [
        replace(_exact(f"load: {name}", point, (4,), number, sample=name == "half of the rows"), begins=4)
        for number, (name, point) in enumerate(places)
    ]


def _background() -> list[Case]:
    """A thread saves while training goes on; in the last ones it stands before the end of the manifest meanwhile."""
    held = r"fsync manifest\.json"
    ids, received = "collective forward: send ids", "slab accumulate"
    cases = [
        Case("the copy is taken", Point("collective checkpoint: look at the model", "after", 2, save=6), (4,)),
        Case("a file", Point(f"pwrite {FILE}", "half", 4, rank=1, save=6), (4,)),
        Case("a file, all", Point(f"fsync {FILE}", everybody=True, save=6), (4,), 3, ends_on=3),
        Case("the manifest", Point("pwrite manifest.json", "half", save=6), (4,), 3, True, 2),
        Case("before the renaming", Point("rename .saving", everybody=True, save=6), (4,)),
        Case("after the renaming", Point("rename .saving", "after", save=6), (6,), 2, True, 3),
        Case("cleaning", Point("unlink .*", "after", 2, save=6), (6,)),
        Case("forward meanwhile", Point(ids, "after", batch=6, save=6, held=held), (4,)),
        Case("backward meanwhile", Point(received, everybody=True, batch=6, save=6, held=held), (4,), 3, ends_on=3),
        Case("step meanwhile", Point("slab step", "after", 2, batch=7, save=6, held=held), (4,), 2, True, 3),
    ]
    return [replace(case, name=f"background: {case.name}", mode="async") for case in cases]


def _increments() -> list[Case]:
    """The checkpoint of 2 batches is full, and those of 4 and 6 stand on it."""
    cases = [
        Case("a file", Point(f"pwrite {FILE}", "half", 4, rank=1, save=6), (4,)),
        Case("the manifest", Point("pwrite manifest.json", "half", save=6), (4,), 3, True, 2),
        Case("before the renaming", Point("rename .saving", everybody=True, save=6), (4,)),
        Case("after the renaming", Point("rename .saving", "after", save=6), (6,), 2, True, 3),
        Case("training", Point("slab step", "after", 1, batch=4), (4,), 3, True, 1),
        Case("cleaning", Point("unlink .*", "after", 1, everybody=True, save=8), (8,)),
    ]
    return [replace(case, name=f"increment: {case.name}", mode="incremental") for case in cases]


def _occupied() -> list[Case]:
    """The same step is saved again, under a name of its own; the first one goes when the second one is complete."""
    cases = [
        Case("a file", Point(f"open {FILE}", "after", 2, everybody=True, save=6), (6,)),
        Case("before the renaming", Point("rename .saving", "before", 2, save=6), (6,)),
        Case("after the renaming", Point("rename .saving", "after", 2, everybody=True, save=6), (6,)),
        Case("the first one goes", Point("unlink .*", "after", 6, save=6), (6,)),
    ]
    return [replace(case, name=f"saved again: {case.name}", mode="twice") for case in cases]


def _back() -> list[Case]:
    """A run that has saved 2, 4, 6 and 8 goes on from 2, and saves 4 again: what loads is 8 until that is complete, and then 4."""
    cases = [
        Case("before the renaming", Point("rename .saving", "before", everybody=True, save=4), (8,)),
        Case("after the renaming", Point("rename .saving", "after", save=4), (4,), 3, True, 2, sample=True),
        Case("one left behind is renamed", Point("rename step", "after", 2, everybody=True, save=4), (4,)),
        Case("one left behind is half gone", Point("unlink .*", "after", 2, save=4), (4,), 2, True, 3),
        Case("in the background", Point("rename .saving", "after", save=4), (4,), mode="async"),
    ]
    return [replace(case, name=f"gone back: {case.name}", begins=8, back=2) for case in cases]


CASES = [*_training(), *_saving(), *_cleaning(), *_loading(), *_background(), *_increments(), *_occupied(), *_back()]
