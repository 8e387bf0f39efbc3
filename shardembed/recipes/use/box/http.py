"""The server: JSON over HTTP on one machine.

    GET  /health     what is served
    POST /recommend  {"user": "u131", "k": 10, "exclude": ["sku-42"]}, of sequences {"history": ["sku-1", "sku-7"], "k": 10}
    POST /score      {"rows": [{"column": "value", ...}]}

What is wrong with a request is told as {"error": "..."} with a status of 4xx; 503 where too many wait.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch

from .batching import Batches
from .clicks import Clicks
from .files import settings_of
from .ids import Refused
from .retrieval import Retrieval

try:
    import uvicorn  # pyright: ignore[reportMissingImports]
    from starlette.applications import Starlette  # pyright: ignore[reportMissingImports]
    from starlette.exceptions import HTTPException  # pyright: ignore[reportMissingImports]
    from starlette.requests import Request  # pyright: ignore[reportMissingImports]
    from starlette.responses import JSONResponse  # pyright: ignore[reportMissingImports]
    from starlette.routing import Route  # pyright: ignore[reportMissingImports]
except ImportError as error:  # also where there is no shardembed to say it
    raise SystemExit(f"the server needs starlette and uvicorn ({error}): pip install starlette uvicorn") from error

MOST_BYTES = 4 << 20  # of a request


def app_of(folder: Path) -> Starlette:
    """The application that serves a folder."""
    settings = settings_of(folder)
    served = Clicks(folder, settings) if settings["kind"] == "clicks" else Retrieval(folder, settings)
    batches = Batches(served.answer) if isinstance(served, Retrieval) else None
    scores = Batches(lambda requests: [_kept(served.score, rows) for rows in requests])

    async def health(request: Request) -> JSONResponse:
        return JSONResponse(
            {"status": "ok", **{name: settings[name] for name in ("kind", "model", "run", "step")}, **served.about()}
        )

    async def recommend(request: Request) -> JSONResponse:
        asked = await _json(request)
        if batches is None:
            raise Refused("this model predicts clicks and ranks no items: ask /score", 404)
        assert isinstance(served, Retrieval)
        return JSONResponse({"items": await batches.ask(served.read(asked))})

    async def score(request: Request) -> JSONResponse:
        asked = await _json(request)
        if not isinstance(asked, dict) or set(asked) != {"rows"}:
            raise Refused('a request is {"rows": [...]}')
        found = await scores.ask(asked["rows"])
        if isinstance(found, Exception):
            raise found
        return JSONResponse(found)

    @asynccontextmanager
    async def working(app: Starlette) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(one.run()) for one in (batches, scores) if one is not None]
        yield
        for task in tasks:
            task.cancel()

    routes = [
        Route("/health", health),
        Route("/recommend", recommend, methods=["POST"]),
        Route("/score", score, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {Refused: _refused, HTTPException: _http_error, Exception: _failed}
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=working)


def _kept(score: Any, rows: Any) -> Any:
    """A request that is refused, or fails, is no reason to fail those that it waits with."""
    try:
        return score(rows)
    except Exception as error:
        return error


async def _json(request: Request) -> Any:
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MOST_BYTES:
            raise Refused(f"a request has at most {MOST_BYTES:,} bytes", 413)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Refused(f"this is no JSON: {error}") from None


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refused)
    return JSONResponse({"error": str(error)}, error.status)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    status: int = error.status_code  # type: ignore[attr-defined]
    there = "GET /health, POST /recommend and POST /score"
    said = {
        404: f"there is no {request.url.path}; there are {there}",
        405: f"{request.method} is not for {request.url.path}; there are {there}",
    }
    return JSONResponse({"error": said.get(status, str(error))}, status)


async def _failed(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": f"{type(error).__name__}: the request could not be answered; the server's log says more"}, 500)


def main(folder: Path, words: list[str] | None = None) -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Serve what lies beside this file, over HTTP.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="default 8000")
    parser.add_argument("--threads", type=int, default=0, help="threads that compute (default: the cores)")
    arguments = parser.parse_args(words)
    serve(folder, arguments.host, arguments.port, arguments.threads)


def serve(folder: Path, host: str, port: int, threads: int = 0) -> None:
    """Until Ctrl-C. threads: that torch computes with; 0: as many as it likes, which are the cores."""
    if threads:
        torch.set_num_threads(threads)
    app = app_of(folder)
    print(f"serving {folder} on http://{host}:{port} with {torch.get_num_threads()} thread(s)", file=sys.stderr, flush=True)
    uvicorn.run(app, host=host, port=port, log_level="warning", access_log=False)
