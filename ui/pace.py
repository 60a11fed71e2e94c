"""Coalescing: many small pieces in, at most so many batches a second out, none lost and none late.

Owns the timing of page updates only.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TypeVar

T = TypeVar("T")
UPDATES_PER_SECOND = 20


async def paced(source: AsyncIterator[T], interval_s: float = 1 / UPDATES_PER_SECOND) -> AsyncIterator[list[T]]:
    """Batches of what `source` gives, one batch per `interval_s` seconds at most.

    Closing this iterator closes `source`. An exception of `source` is raised after what came before it.
    """
    waiting: list[T] = []
    news = asyncio.Event()

    async def read() -> None:
        try:
            async for item in source:
                waiting.append(item)
                news.set()
        finally:
            close = getattr(source, "aclose", None)
            if close:
                await close()

    reader = asyncio.create_task(read())
    reader.add_done_callback(lambda _: news.set())
    try:
        while waiting or not reader.done():
            await news.wait()
            news.clear()
            if waiting:
                batch, waiting[:] = list(waiting), []
                yield batch
                await asyncio.sleep(interval_s)
            if reader.done():
                news.set()
        await reader
    finally:
        reader.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await reader
