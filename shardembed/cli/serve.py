"""`shardembed serve RUN`: a folder that answers requests where there is no shardembed, and the server of such a folder."""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from pathlib import Path

from shardembed.cli.given import check_new, run_in
from shardembed.config.optional import missing
from shardembed.errors import ConfigError, UnsupportedError

PORT = 8000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="the folder of a run of `shardembed train`, or one that --out has made"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="the folder to make; then nothing is served unless --port is given"
    )
    parser.add_argument(
        "--port", type=int, metavar="N", help=f"serve over HTTP on this port (default {PORT}, where --out is not given)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine alone)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="threads that compute (default: the cores)")


def run(arguments: argparse.Namespace) -> int:
    """Build, serve, or both; returns the exit code."""
    from shardembed.recipes.use.box.files import SETTINGS

    built = (arguments.run / SETTINGS).is_file()
    port = arguments.port if arguments.port is not None or arguments.out is not None else PORT
    if port is not None and not 0 < port < 1 << 16:
        raise ConfigError(f"--port {port}: ports are numbers from 1 to 65535")
    if arguments.threads < 0:
        raise ConfigError(f"--threads {arguments.threads}: there must be one at least")
    if built and arguments.out is not None:
        raise ConfigError(f"--out: {arguments.run} is a folder to be served already; leave --out out")
    if arguments.out is not None:
        check_new(arguments.out)
    if port is not None:
        _check()
    with tempfile.TemporaryDirectory() as beside:
        folder = arguments.run if built else _built(arguments.run, arguments.out or Path(beside) / "served")
        if port is not None:
            from shardembed.recipes.use.box.http import serve

            serve(folder, arguments.host, port, arguments.threads)
    return 0


def _check() -> None:
    """
    Raises:
        UnsupportedError: there is no server.
    """
    for package in ("starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            absent = ModuleNotFoundError(f"No module named {package!r}", name=package)
            raise UnsupportedError(missing(package, "serve", "answering over HTTP", absent))


def _built(run: Path, out: Path) -> Path:
    from shardembed.config.console import CleanConsole
    from shardembed.recipes.use.opened import open_checkpoint
    from shardembed.recipes.use.serve import build

    run_in(run)
    build(open_checkpoint(run), out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    told = f"made {out}, {size:,} bytes; on a box with torch, starlette and uvicorn: python {out.name}/serve.py --port {PORT}"
    CleanConsole(stderr=True).print(told, highlight=False, markup=False, soft_wrap=True)
    return out
