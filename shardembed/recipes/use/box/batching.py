"""Requests that come while others are answered wait, and are answered together: a batch is as large as the load makes it, and
nobody waits for one to fill.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .ids import Refused

MOST_AT_ONCE = 64
MOST_WAITING = 1024


class Batches:
    """One thread answers; torch spreads its work over the cores.

    answer: of some requests, in their order.
    """

    def __init__(self, answer: Callable[[Sequence[Any]], Sequence[Any]]) -> None:
        self._answer = answer
        self._waiting: asyncio.Queue[tuple[Any, asyncio.Future[Any]]] = asyncio.Queue(MOST_WAITING)
        self._thread = ThreadPoolExecutor(1)

    async def ask(self, request: Any) -> Any:
        """
        Raises:
            Refused: too many wait already.
        """
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        try:
            self._waiting.put_nowait((request, answer))
        except asyncio.QueueFull:
            raise Refused(f"{MOST_WAITING} requests wait already; ask again later", 503) from None
        return await answer

    async def run(self) -> None:
        """For ever."""
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < MOST_AT_ONCE and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            await self._work(batch)

    async def _work(self, batch: list[tuple[Any, asyncio.Future[Any]]]) -> None:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(self._thread, self._answer, [request for request, _ in batch])
        except Exception as error:
            for _, answer in batch:
                if not answer.done():
                    answer.set_exception(error)
            return
        for one, (_, answer) in zip(found, batch, strict=True):
            if not answer.done():  # whoever asked may have gone
                answer.set_result(one)
