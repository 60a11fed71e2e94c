"""The pages people use: chat and vote at `/`, operator at `/operator`. They talk to the server over HTTP only.

`mount` is all that others need.
"""

from __future__ import annotations

from fastapi import FastAPI

__all__ = ["mount"]


def mount(app: FastAPI, api_url: str) -> FastAPI:
    """Put the pages on `app`, last: the page at `/` answers every path that `app` itself does not.

    `api_url` is where this server can be reached from itself, such as `http://127.0.0.1:7860`.
    """
    from ui.pages import mount_pages

    return mount_pages(app, api_url)
