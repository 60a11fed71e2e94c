"""The pages people use: chat and vote at `/`, operator at `/operator`. They talk to the server over HTTP only.

`mount` is all that others need.
"""

from __future__ import annotations

import asyncio

from fastapi import FastAPI

__all__ = ["mount"]


def mount(app: FastAPI, api_url: str) -> FastAPI:
    """Put the pages on `app`, last: the page at `/` answers every path that `app` itself does not.

    `api_url` is where this server can be reached from itself, such as `http://127.0.0.1:7860`.
    """
    from ui.pages import mount_pages  # Gradio takes seconds to import

    async def inside_a_loop() -> FastAPI:
        return mount_pages(app, api_url)

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        # Without a running loop Gradio makes one for each page and never closes it.
        return asyncio.run(inside_a_loop())
    return mount_pages(app, api_url)
