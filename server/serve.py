"""Runs the application under uvicorn with a shutdown that lets running requests finish.

At the first signal the server drains: `/readyz` and new chats answer 503 while the socket still listens, running
requests finish up to the grace period, then uvicorn stops. A second Ctrl-C (SIGINT) stops at once.
"""

from __future__ import annotations

import logging
import math
import socket
import time

import uvicorn
from fastapi import FastAPI

from server.logs import Wordless
from server.runtime import Runtime
from server.settings import Settings

WORDLESS = Wordless()  # one, so that a second server adds no second


class PlauditServer(uvicorn.Server):
    """uvicorn, draining first."""

    def __init__(self, config: uvicorn.Config, runtime: Runtime) -> None:
        super().__init__(config)
        self.runtime = runtime

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain with the socket still open, then shut down as uvicorn does."""
        began = time.monotonic()
        if not self.force_exit:
            await self.runtime.drain(lambda: self.force_exit)
        left_s = self.runtime.settings.grace_s - (time.monotonic() - began)
        self.config.timeout_graceful_shutdown = max(1, math.ceil(left_s))  # for what is not a chat; uvicorn would begin a whole grace anew
        await super().shutdown(sockets)


def make_server(app: FastAPI, settings: Settings) -> PlauditServer:
    """A server for `app`; `.run()`, or `.run(sockets=[bound])` with a socket bound beforehand."""
    config = uvicorn.Config(
        app, host=settings.host, port=settings.port, log_level="warning", access_log=False, lifespan="on",
        timeout_keep_alive=30, ws="none", server_header=False,
        loop="asyncio",  # not uvloop where somebody has it: it starts no child in a process group of its own
    )
    logging.getLogger("uvicorn.error").addFilter(WORDLESS)
    return PlauditServer(config, app.state.runtime)
