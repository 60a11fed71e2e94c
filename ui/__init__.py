"""The pages people use: chat and vote at `/`, operator at `/operator`. They talk to the server over HTTP only.

`mount` is all that others need.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext
from typing import Any

from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

__all__ = ["mount"]


class Pages:
    """Both pages as one ASGI application that is built beside the running server: Gradio takes seconds to import, and the
    API need not wait for it. A request that comes before they are there waits.
    """

    def __init__(self, api_url: str, building: Callable[[], AbstractContextManager]) -> None:
        self.api_url, self.building = api_url, building
        self.built: Future[FastAPI] | None = None
        self.live: asyncio.Event | None = None  # set when they are served for good; none without a lifespan, as in a test client

    def build(self) -> Future[FastAPI]:
        """The pages, once they are there. The first call starts a thread that makes them."""
        if self.built is None:
            self.built = Future()
            threading.Thread(target=self._build, args=(self.built,), name="pages", daemon=True).start()
        return self.built

    def _build(self, built: Future[FastAPI]) -> None:
        async def inside_a_loop() -> FastAPI:  # without a running loop Gradio makes one for each page and never closes it
            return build_pages(self.api_url)

        try:
            with self.building():
                with without_type_stubs():
                    from ui.pages import build_pages

                built.set_result(asyncio.run(inside_a_loop()))
        except BaseException as error:
            built.set_exception(error)  # whoever waits is told
            raise

    async def serve(self, live: asyncio.Event, draining: Callable[[], bool]) -> None:
        """Build the pages and keep them served until cancelled. When the server drains, hang up on open pages: each holds
        a connection for good, which would keep the server waiting for its whole grace period.
        """
        app = await asyncio.wrap_future(self.build())
        async with app.router.lifespan_context(app):
            live.set()
            while not draining():
                await asyncio.sleep(0.25)
            app.state.hang_up()
            await asyncio.Event().wait()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = await asyncio.wrap_future(self.build())
        if self.live is not None:
            await self.live.wait()
        await app(scope, receive, send)


@contextmanager
def without_type_stubs() -> Iterator[None]:
    """Keep Gradio from writing stubs for editors beside its own files, as each import of it does: half of the seconds it takes.

    It passes over a class whose file cannot be told, so none of its own can while this lasts.
    """
    file_of = inspect.getfile

    def getfile(thing: Any) -> str:
        if isinstance(thing, type) and thing.__module__.startswith("gradio."):
            raise OSError("not told while Gradio is imported")
        return file_of(thing)

    inspect.getfile = getfile  # type: ignore[assignment]
    try:
        yield
    finally:
        inspect.getfile = file_of


def mount(app: FastAPI, api_url: str, building: Callable[[], AbstractContextManager] = nullcontext) -> FastAPI:
    """Put the pages on `app`, last: they answer every path that `app` itself does not. They are built after `app` has started.

    `api_url` is where this server can be reached from itself, such as `http://127.0.0.1:7860`; `building()` is entered while
    the pages are made.
    """
    pages = Pages(api_url, building)
    before = app.router.lifespan_context

    def draining() -> bool:
        return bool(getattr(getattr(app.state, "runtime", None), "draining", False))

    @asynccontextmanager
    async def lifespan(application: FastAPI) -> AsyncIterator[Any]:
        async with before(application) as state:
            pages.live = asyncio.Event()
            serving = asyncio.create_task(pages.serve(pages.live, draining))
            try:
                yield state
            finally:
                serving.cancel()
                await asyncio.gather(serving, return_exceptions=True)

    app.router.lifespan_context = lifespan
    app.mount("/", pages)
    return app
