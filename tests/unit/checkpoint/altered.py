"""Altered checkpoints: ways to alter the bytes and the JSON of one, limits on what reading it may take, and how it ends."""

from __future__ import annotations

import json
import random
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from shardembed.checkpoint.format import manifest
from shardembed.checkpoint.format.manifest import read_manifest, resolve
from shardembed.checkpoint.format.pieces import Copy, Files, read_ids, read_state, run_copies
from shardembed.errors import CheckpointError
from tests.unit.checkpoint.saved import STATE

ALLOWANCE = 1 << 30  # bytes of address space that a run of altered inputs may take, whatever they say
SECONDS = 240  # far more than a run needs: only a hang gets there
FULL, CHANGES = "step-0000000001", "step-0000000002"
FILES = ("manifest.json", "state.json", "rank-00000.safetensors", "rank-00001.safetensors")

Case = tuple[Path, dict[str, torch.Tensor]]  # a checkpoint's folder, and what is saved in it


@contextmanager
def limits(allowance: int = ALLOWANCE) -> Iterator[None]:
    def hang(*_: object) -> None:
        raise AssertionError("an altered checkpoint takes for ever")

    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + allowance, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def loaded(folder: Path) -> tuple[dict[str, torch.Tensor], bytes]:
    """Everything in the checkpoint, as `load_checkpoint` would find it: chunks, then updates, and the state."""
    manifests, sources = resolve(read_manifest(folder), folder)
    found: dict[str, torch.Tensor] = {}
    opened = {path: Files(path, each) for path, each in manifests.items()}
    for files in opened.values():
        files.__enter__()
    try:
        for files in opened.values():
            for name in files.manifest.files:
                with files.opened(name):
                    pass
        real = sum(path.stat().st_size for each in manifests for path in each.iterdir())
        for key, source in sources.items():
            entry = source.entry
            assert entry.nbytes <= real, "a tensor is larger than all files together"
            into = torch.zeros(entry.rows, entry.columns, dtype=entry.dtype)
            copies = []
            for chunk in source.chunks:
                view = into[:, chunk.columns.start : chunk.columns.stop]
                target = slice(chunk.rows.start, chunk.rows.stop, chunk.rows.step)
                what = (chunk.block, entry.dtype, len(chunk.columns), range(len(chunk.rows)), slice(None))
                copies.append(Copy(opened[source.chunks_in], *what, view, target, key))
            run_copies(copies, workers=1)
            for update in source.updates:
                view = into[:, update.columns.start : update.columns.stop]
                for first, ids in read_ids(opened[source.updates_in], entry, update):
                    what = (update.values, entry.dtype, len(update.columns), range(first, first + len(ids)), slice(None))
                    run_copies([Copy(opened[source.updates_in], *what, view, ids, key)], workers=1)
            found[key] = into.reshape(entry.shape)
        return found, read_state(opened[folder])
    finally:
        for files in opened.values():
            files.__exit__(None, None, None)


def outcome(case: Case, signed: bool = False) -> str:
    """ "refused" or "right"; raises whatever else happens.

    With `signed`, whoever altered the checkpoint has signed it again, and may have said something else that is consistent.
    """
    folder, saved = case
    try:
        found, state = loaded(folder)
    except CheckpointError:
        return "refused"
    if not signed:
        assert found.keys() == saved.keys()
        assert all(torch.equal(found[key], saved[key]) for key in saved)
        assert state == STATE
    return "right"


def counted(
    case: Case, path: Path, alter: Callable[[random.Random, bytes], bytes], times: int, signed: bool = False
) -> dict[str, int]:
    """How `times` alterations of one file end; a failure says which seed."""
    original = path.read_bytes()
    ends = {"refused": 0, "right": 0}
    for seed in range(times):
        draw = random.Random(seed)
        altered = alter(draw, original)
        path.write_bytes(altered)
        try:
            ends[outcome(case, signed)] += 1
        except BaseException:
            print(f"seed {seed} alters {path.name} to {altered[:2000]!r}")
            raise
    path.write_bytes(original)
    assert outcome(case) == "right"
    return ends


def scramble(draw: random.Random, data: bytes) -> bytes:
    """Bytes flipped, cut out, put in, doubled, or swapped, in a few places."""
    found = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        at = draw.randrange(len(found) + 1)
        length = draw.choice([1, 1, 2, 8, 100])
        kind = draw.randrange(6)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del found[at : at + length]
        elif kind == 2:
            found[at:at] = bytes(draw.randrange(256) for _ in range(length))
        elif kind == 3:
            found[at:at] = found[at : at + length]
        elif kind == 4:
            del found[at:]
        else:
            found[at:at] = draw.choice(
                [b"{", b"[", b'"', b"}", b"]", b",", b"-", b"0", b"e9", b"null", b"\\u0000", b"\xff\xfe", b"1" * 30]
            )
    return bytes(found)


DEEP: list[Any] = []
for _ in range(500):
    DEEP = [DEEP]
HOSTILE: list[Any] = [
    *(-1, 0, 1, 2, 7, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63)),
    *(0.0, 1.5, -0.0, 1e300, True, False, None, [], {}, [[]], [0], [0, 1], [0, 1, 1], [2**63, 1], DEEP, [0] * 5000, {"a": 1}),
    *(
        "",
        ".",
        "..",
        "../rank-00000.safetensors",
        "/etc/passwd",
        "rank-00000.safetensors\0",
        "rank-00000.safetensors\n",
        "state.json",
    ),
    *(
        "rank-0000٣.safetensors",
        "rank-00000.pt",
        "rank-00001.safetensors",
        "manifest.json",
        "step-0000000001",
        "step-0000000001/..",
    ),
    *(
        "x" * 100_000,
        "\ud800",
        "\u202e",
        "é" * 50,
        "__metadata__",
        "float32",
        "bfloat16",
        "complex64",
        "table",
        "dense_state",
        "f" * 32,
    ),
]


def nodes(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything in some JSON."""
    yield path
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for name, value in inner:
        yield from nodes(value, (*path, name))


def altered(draw: random.Random, data: Any) -> Any:
    """Some JSON with one or two things changed, dropped, added or swapped; what it is made of may be shared."""
    for _ in range(draw.choice([1, 1, 2])):
        path = draw.choice(list(nodes(data)))
        if not path:
            continue
        inside = data
        for name in path[:-1]:
            inside = inside[name]
        old, kind = inside[path[-1]], draw.randrange(8)
        if type(old) is int and kind < 4:
            inside[path[-1]] = draw.choice(
                [old + 1, old - 1, old * 2, -old, old + 2**32, old + 64, 2**63 - old, float(old), str(old)]
            )
        elif kind < 5:
            inside[path[-1]] = draw.choice(HOSTILE)
        elif kind == 5:
            del inside[path[-1]]
        elif kind == 6 and isinstance(inside, list):
            inside.insert(draw.randrange(len(inside) + 1), old)
        elif kind == 6:
            inside[draw.choice(["", "x", "a" * 2000, "../x", "\0", "format", "key", "user.weight", "é"])] = old
        else:
            others = list(inside) if isinstance(inside, dict) else range(len(inside))
            other = draw.choice(list(others))
            inside[path[-1]], inside[other] = inside[other], inside[path[-1]]
    return data


def signed_again(data: Any) -> bytes:
    """A manifest's JSON with the checksum that its contents have."""
    if isinstance(data, dict):
        data.pop("checksum", None)
        data["checksum"] = manifest._checksum(data)
    return json.dumps(data).encode()
