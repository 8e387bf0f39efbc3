"""How fast one rank trains by how many threads it has and how these wait for each other, on an idle machine and on a busy one.

    python -m benchmarks.threads --rounds 3 --markdown docs/benchmarks/DATE-threads.md

Contenders are fresh processes of `shardembed train quickstart`, which take turns round after round, first with nothing beside them
and then with as many processes that count for ever as there are cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from shardembed.config import cores

CORES = cores.usable()
OURS = "as the command chooses"
CONTENDERS: dict[str, dict[str, str]] = {
    OURS: {},
    "one thread": {"OMP_NUM_THREADS": "1"},
    "all cores, waiting as libgomp does by itself": {"GOMP_SPINCOUNT": "300000"},
    "all cores, OMP_WAIT_POLICY=ACTIVE": {"OMP_WAIT_POLICY": "ACTIVE"},
    "all cores, OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
}
SETTLED = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "MKL_NUM_THREADS")


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender, idle and busy")
    parser.add_argument("--steps", type=int, default=150, help="of a turn")
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), choices=CONTENDERS, metavar="NAME")
    parser.add_argument("--busy", type=int, default=CORES, help="processes that count for ever beside the busy turns")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="of the job")
    parser.add_argument("--markdown", type=Path, metavar="PAGE")
    arguments = parser.parse_args(words)
    contenders = {name: CONTENDERS[name] for name in arguments.only}
    idle = measured(contenders, arguments.rounds, arguments.steps, arguments.overrides)
    with counting(arguments.busy):
        busy = measured(contenders, arguments.rounds, arguments.steps, arguments.overrides)
    text = page(idle, busy, arguments.steps)
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text)


def measured(
    contenders: Mapping[str, Mapping[str, str]], rounds: int, steps: int, overrides: Sequence[str]
) -> dict[str, list[float]]:
    """Samples a second of each contender, by round."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        names = list(contenders)
        for name in reversed(names) if number % 2 else names:
            found[name].append(samples_a_second(contenders[name], steps, overrides))
            print(f"{number} {name}: {found[name][-1]:,.0f} samples/s, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    return found


def samples_a_second(settings: Mapping[str, str], steps: int, overrides: Sequence[str]) -> float:
    environment = {name: value for name, value in os.environ.items() if name not in SETTLED} | dict(settings)
    with tempfile.TemporaryDirectory() as folder:
        words = ["train", "quickstart", f"--max-steps={steps}", "--json", "--set=checkpoint.every_steps=null"]
        words += ["--set=log.page=false", "--set=eval.users=100", f"--set=run_dir={folder}", *(f"--set={one}" for one in overrides)]
        done = subprocess.run(
            [sys.executable, "-m", "shardembed", *words],
            env=environment,
            check=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    return float(json.loads(done.stdout)["samples_per_second"])


@contextmanager
def counting(processes: int) -> Iterator[None]:
    """Beside it, so many processes that want a core each."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for one in running:
            one.kill()
            one.wait()


def page(idle: Mapping[str, Sequence[float]], busy: Mapping[str, Sequence[float]], steps: int) -> str:
    lines = [
        "# Threads of one rank",
        "",
        f"{time.strftime('%Y-%m-%d')}, {CORES} cores, `python -m benchmarks.threads`: `shardembed train quickstart` on one rank, "
        f"{steps} steps a turn, contenders in turn. Samples a second, median (least to most); in brackets the median of the ratios "
        "to one thread's turn of the same round.",
        "",
        "| contender | idle | busy: a process that counts for ever a core |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {_cell(idle, name)} | {_cell(busy, name)} |" for name in idle]
    return "\n".join(lines) + "\n"


def _cell(found: Mapping[str, Sequence[float]], name: str) -> str:
    mine, single = found[name], found.get("one thread")
    text = f"{median(mine):,.0f} ({min(mine):,.0f} to {max(mine):,.0f})"
    if single is None:
        return text
    return f"{text} [{median(one / other for one, other in zip(mine, single, strict=True)):.2f}]"


if __name__ == "__main__":
    main()
