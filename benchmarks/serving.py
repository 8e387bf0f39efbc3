"""`python -m benchmarks.serving`: a folder of `shardembed serve` under load, on this machine.

Two towers of random vectors are made (or --folder names a folder), its server is started as a process of its own, and clients that
each keep one connection ask one request after the other. Told are seconds until it answers, memory, requests a second, the time of
a request (median, and what 99 of 100 stay below), the server's processor time a request, which a busy machine hardly changes, and
errors, of which there must be none: the exit code is 1 if there is one.

Clients run on the same cores as the server, so it is faster than this on a box of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shardembed.config import cores
from shardembed.recipes.use.box.files import SETTINGS, Texts
from shardembed.recipes.use.serve import copy_server

PATIENCE = 300.0  # seconds until a server must answer


@dataclass
class Told:
    """What clients have seen.

    Attributes:
        seconds: of each request.
        errors: what else was answered than what was asked for, the first few of each kind.
    """

    seconds: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def made(folder: Path, users: int, items: int, columns: int) -> Path:
    """A folder of two towers: users and items are numbered."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for side, count in (("user", users), ("item", items)):
        np.save(folder / f"{side}.npy", rng.standard_normal((count, columns), np.float32))
    settings = {"kind": "two_tower", "model": "two_tower", "run": "made up", "step": 0, "metric": "dot"}
    settings |= {"user": "user", "item": "item", "user_texts": False, "item_texts": False}
    (folder / SETTINGS).write_text(json.dumps(settings))
    copy_server(folder)
    return folder


def asker(folder: Path) -> Callable[[], tuple[str, dict[str, Any]]]:
    """What gives a path and what is asked there, drawn anew each time."""
    settings = json.loads((folder / SETTINGS).read_text())
    if settings["kind"] == "clicks":
        names = [one["name"] for one in settings["columns"]]
        return lambda: ("/score", {"rows": [dict.fromkeys(names) for _ in range(10)]})
    side = "user" if settings["kind"] == "two_tower" else "item"
    count = len(np.load(folder / f"{side}.npy", mmap_mode="r"))
    if side == "user" and settings["user_texts"]:
        raise SystemExit(f"{folder}: users are texts, which the folder knows by their hashes alone; leave --folder out")
    texts = Texts(folder, "item") if side == "item" and settings["item_texts"] else None

    def name() -> Any:
        number = random.randrange(count)
        return number if texts is None else texts[number]

    if side == "user":
        return lambda: ("/recommend", {"user": name(), "k": 10})
    return lambda: ("/recommend", {"history": [name() for _ in range(20)], "k": 10})


async def client(port: int, requests: int, ask: Any, told: Told) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(requests):
        path, body = ask()
        data = json.dumps(body).encode()
        began = time.perf_counter()
        writer.write(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        head = await reader.readuntil(b"\r\n\r\n")
        size = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
        answer = await reader.readexactly(size)
        told.seconds.append(time.perf_counter() - began)
        if not head.startswith(b"HTTP/1.1 200"):
            told.errors.append(answer.decode()[:200])
    writer.close()


async def load(port: int, clients: int, requests: int, ask: Any) -> tuple[Told, float]:
    told = Told()
    began = time.perf_counter()
    await asyncio.gather(*(client(port, requests // clients, ask, told) for _ in range(clients)))
    return told, time.perf_counter() - began


def started(folder: Path, port: int, threads: int) -> tuple[subprocess.Popen[bytes], float]:
    """The server, and the seconds until it answered."""
    began = time.perf_counter()
    command = [sys.executable, str(folder / "serve.py"), "--port", str(port), "--threads", str(threads)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None and time.perf_counter() - began < PATIENCE:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return process, time.perf_counter() - began
        time.sleep(0.02)
    process.kill()
    raise SystemExit(f"{folder}: the server did not start; are starlette and uvicorn installed?")


def memory(process: int) -> tuple[int, int]:
    """(bytes of its own, bytes of mapped files) in memory."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss")}
    return found["RssAnon"], found["RssFile"]


def processor(process: int) -> float:
    """Seconds of processor time that it has taken."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(folder: Path, clients: int, requests: int, threads: int) -> dict[str, Any]:
    ask = asker(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process, start = started(folder, port, threads)
    try:
        asyncio.run(load(port, clients, max(clients, requests // 10), ask))  # pages and caches
        before = processor(process.pid)
        told, seconds = asyncio.run(load(port, clients, requests, ask))
        spent = processor(process.pid) - before
        own, mapped = memory(process.pid)
    finally:
        process.terminate()
        process.wait()
    times = np.sort(told.seconds) * 1000
    return {
        "kind": json.loads((folder / SETTINGS).read_text())["kind"],
        "requests": len(times),
        "requests_per_second": round(len(times) / seconds, 1),
        "p50_ms": round(float(np.quantile(times, 0.5)), 2),
        "p99_ms": round(float(np.quantile(times, 0.99)), 2),
        "processor_ms_a_request": round(spent / len(times) * 1000, 2),
        "errors": len(told.errors),
        "first_errors": told.errors[:3],
        "seconds_to_start": round(start, 2),
        "own_memory_mib": own >> 20,
        "mapped_memory_mib": mapped >> 20,
        "cores": cores.usable(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="a folder of `shardembed serve`; by default one is made up")
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--columns", type=int, default=64)
    parser.add_argument("--clients", type=int, default=32, help="connections at a time")
    parser.add_argument("--requests", type=int, default=5_000)
    parser.add_argument("--threads", type=int, default=0, help="of the server (default: the cores)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as beside:
        folder = arguments.folder or made(Path(beside) / "served", arguments.users, arguments.items, arguments.columns)
        found = measure(folder, arguments.clients, arguments.requests, arguments.threads)
    print(json.dumps(found, indent=1))
    return 1 if found["errors"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
