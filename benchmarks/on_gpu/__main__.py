"""What GPU code does on this machine's GPUs, with the torch and Triton that it has.

    make gpu                                     # or python -m benchmarks.on_gpu
    make gpu ARGS="rowwise over-gloo"            # some of the checks

Checks come in order of risk, each in a process of its own, and all of them in less than twelve minutes; what there was no time for
is named. They end in a page with a verdict each, whose date is in its name: under docs/benchmarks where there is a GPU. Without
one, Triton's kernels run in its interpreter on tables of a few rows, and what cannot be seen so is named too; its page is in runs/.
The exit status is 1 where something fails, or was stopped. No verdict depends on how fast the machine is.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import pages
from benchmarks.on_gpu.check import Verdict
from benchmarks.on_gpu.checks import CHECKS

ROOT = Path(__file__).parents[2]
SECONDS = 690.0  # for all
STOPPED = "not seen to its end: it was stopped"
LEAST = 15.0  # with less left, no check is begun
PACKAGES = ("triton", "numba", "numpy", "fbgemm-gpu", "fbgemm-gpu-cpu")


def gpus() -> list[str]:
    """The names of the GPUs here."""
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


def commit(folder: Path = ROOT) -> str:
    """What is checked out in `folder`, and whether files differ from it; "unknown" where that is no checkout."""
    try:
        if _git(folder, "rev-parse", "--show-toplevel") != str(folder.resolve()):  # a folder inside of someone else's checkout
            return "unknown"
        return _git(folder, "rev-parse", "HEAD") + (" and changes to it" if _git(folder, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):  # there is no git, or no checkout
        return "unknown"


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def look(name: str, seconds: float, environment: dict[str, str]) -> Verdict:
    """Run one check, for so long at most."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "verdict.json"
        began = time.monotonic()
        command = [sys.executable, "-m", "benchmarks.on_gpu.child", name, str(file)]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # its ranks too
            process.wait()
            code = None
        spent = time.monotonic() - began
        _, status, lines, _ = json.loads(file.read_text()) if file.exists() else (name, "FAILS", [], 0.0)
    if code is None:
        return Verdict(name, "not seen", (*lines, f"{STOPPED} after {spent:.0f} s: it hangs, or has too little time here"), spent)
    if code:
        return Verdict(name, "FAILS", (*lines, f"the process ended with exit code {code}"), spent)
    return Verdict(name, status, tuple(lines), spent)


def page(found: Sequence[Verdict], names: Sequence[str], arguments: Sequence[str]) -> str:
    """All verdicts as Markdown."""
    on = f"{len(names)} x {names[0]}" if names else "no GPU"
    lines = pages.heading(f"GPU code on {on}", "benchmarks.on_gpu", arguments)
    versions = [f"torch {torch.__version__}", f"CUDA {torch.version.cuda or 'none'}", *map(_version, PACKAGES)]
    lines += pages.paragraph(f"Commit {commit()}; {', '.join(filter(None, versions))}; {platform.platform()}.")
    if not names:
        lines += pages.paragraph("There is no GPU here: kernels ran in Triton's interpreter, on tables of a few rows.")
    rows = [[f"[{each.name}](#{each.name})", CHECKS[each.name].title, each.status, f"{each.seconds:.0f} s"] for each in found]
    lines += [*pages.table(["check", "of what", "verdict", "took"], rows), ""]
    failing = [each.name for each in found if each.status == "FAILS"]
    unseen = [each.name for each in found if each.status == "not seen"] + [name for name in CHECKS if name not in _names(found)]
    lines += pages.paragraph(f"Fails: {', '.join(failing) or 'nothing'}. Not seen: {', '.join(unseen) or 'nothing'}.")
    if not names:
        lines += ["Not seen without a GPU, by check:", ""]
        lines += [*(f"- {name}: {check.hidden}" for name, check in CHECKS.items()), ""]
    for each in found:
        lines += [f"## {each.name}", ""]
        # Tables stand as they are, all else as a list.
        lines += [line if line.startswith("|") or not line else f"- {line}" for line in each.lines] + [""]
    return "\n".join(lines).rstrip() + "\n"


def _names(found: Sequence[Verdict]) -> set[str]:
    return {each.name for each in found}


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return ""


def default_page(names: Sequence[str]) -> Path:
    today = datetime.date.today()
    return ROOT / (f"docs/benchmarks/{today}-gpu.md" if names else f"runs/{today}-without-a-gpu.md")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.on_gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checks", nargs="*", default=[], help=f"some of: {', '.join(CHECKS)}; by default all")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all checks together")
    parser.add_argument("--markdown", type=Path, help="the page; by default under docs/benchmarks, or runs without a GPU")
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.checks) - set(CHECKS):
        parser.error(f"there is no check {', '.join(sorted(unknown))}; there are {', '.join(CHECKS)}")
    names, began = gpus(), time.monotonic()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if not names:
        environment["TRITON_INTERPRET"] = "1"  # Triton decides at its import
    found: list[Verdict] = []
    for name in chosen.checks or CHECKS:
        left = chosen.seconds - (time.monotonic() - began)
        print(f"{name}: {CHECKS[name].title}", flush=True)
        if left < LEAST:
            found.append(Verdict(name, "not seen", ("not seen: there was no time left",), 0.0))
        else:
            found.append(look(name, min(left, CHECKS[name].seconds), environment))
        print(f"  {found[-1].status}, {found[-1].seconds:.0f} s{': ' + found[-1].lines[-1] if found[-1].lines else ''}", flush=True)
    file = chosen.markdown or default_page(names)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page(found, names, list(sys.argv[1:] if arguments is None else arguments)))
    if not names:
        print("not seen without a GPU:", *(f"  {name}: {check.hidden}" for name, check in CHECKS.items()), sep="\n")
    print(f"the page: {file}")
    return int(any(each.status == "FAILS" or (each.lines and each.lines[-1].startswith(STOPPED)) for each in found))


if __name__ == "__main__":
    sys.exit(main())
