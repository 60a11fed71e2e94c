"""The two Gradio applications as one, closed where Gradio is more open than we need.

Gradio would take file uploads, proxy to other hosts and offer its own API to anyone; none of the pages uses these, so they
are answered 404 before Gradio sees them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import gradio as gr
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ui.chat import build_chat
from ui.client import ApiClient
from ui.operator import build_operator
from ui.theme import head, theme

CLOSED = re.compile(
    r"(/gradio_api)?/(upload|upload_progress|process_recording|info|openapi\.json|proxy=.*|file=.*|file/.*|stream/.*|component_server|call/.*|run/.*|api/.*"
    r"|monitoring.*|vibe.*|deep_link|runs?(/.*)?)/?"
)
HEADERS = {
    b"content-security-policy": (
        b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        b"img-src 'self' data:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
        b"object-src 'none'; base-uri 'self'; frame-ancestors 'none'; form-action 'self'"
    ),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
}


class Closed:
    """A Gradio application without the doors that our pages do not use, and allowed to load from this server only."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            inside = scope["path"].removeprefix(scope.get("root_path", ""))
            if not inside.isprintable() or CLOSED.fullmatch(inside):  # a line break at the end would slip by here and not by Gradio
                await PlainTextResponse("Not found", 404)(scope, receive, send)
                return
        await self.app(scope, receive, _with_headers(send))


def _with_headers(send: Send) -> Send:
    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            kept = [(name, value) for name, value in message.get("headers", []) if name.lower() not in HEADERS]
            message = {**message, "headers": [*kept, *HEADERS.items()]}
        await send(message)

    return wrapped


async def _with_slash(request: Request) -> RedirectResponse:
    return RedirectResponse(f"{request.scope.get('root_path', '')}/operator/", 307)


def build_pages(api_url: str) -> FastAPI:
    """The two pages as one application. Its lifespan starts and ends what they hold; `state.hang_up()` ends every open page's stream."""
    client = ApiClient(api_url)
    pages: list[Any] = []

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await client.close()

    def hang_up() -> None:
        for page in pages:
            page.stop_event.set()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.hang_up = hang_up
    app.add_route("/operator", _with_slash, methods=["GET", "HEAD"], include_in_schema=False)
    for path, page in (("/operator", build_operator(api_url, client)), ("/", build_chat(api_url, client))):
        gr.mount_gradio_app(
            app, page, path=path, theme=theme(), head=head(), footer_links=[],
            run_history=False, ssr_mode=False, mcp_server=False, show_error=False, max_file_size=1, pwa=False,
            enable_monitoring=False, app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
        )
        route = app.router.routes[-1]
        # Gradio would sum up all its past events with pandas after each event: wasted work, two seconds apart, on every page
        page._queue.ANAYLTICS_CACHE_FREQUENCY = sys.maxsize
        page._queue.ANALYTICS_MAX_EVENTS = 100
        page._queue.sleep_when_free = 0.04  # seconds; Gradio looks for new events a thousand times a second otherwise: 4% of a core, for nothing
        pages.append(route.app)  # type: ignore[attr-defined]
        route.app = Closed(route.app)  # type: ignore[attr-defined]
    return app
