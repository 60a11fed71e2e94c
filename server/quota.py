"""How much one voter may ask for, and how large a body may be.

Owns the counters and the ASGI layer that bounds request bodies and refuses what is not JSON.
Does not know who is asking: it is given a voter.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable

from limits import parse
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ApiError, StartupError, as_api_error, error_response

SWEEP = 10_000  # voters counted before the first look for those who left
FAILED_KEYS = "30/minute"  # wrong secrets per address and key: each costs an argon2 verification


class Quota:
    """Requests per voter in a sliding window: what the window before allowed counts by how much of it still overlaps.

    The counts live on the event loop. `limits` reads the rates; its own memory storage starts a thread each time it
    is asked, which cost a vote more than everything else together.
    """

    def __init__(self, rate_requests: str, rate_chat: str) -> None:
        self._rates = {"request": parse(rate_requests), "chat": parse(rate_chat), "failed key": parse(FAILED_KEYS)}
        self._windows: dict[tuple[str, str], tuple[int, int, int]] = {}  # number of the window, its count, that before's
        self._sweep = SWEEP

    def spend(self, kind: str, who: str) -> None:
        """Count one `kind` (request, chat, failed key) of `who`. Raises 429 with the seconds to wait."""
        rate = self._rates[kind]
        now, span = time.time(), rate.get_expiry()
        number, into = int(now // span), now % span / span
        count, before = self._counts(kind, who, number)
        if before * (1 - into) + count >= rate.amount:
            wait_s = max(1, math.ceil(span * wait(before, count, rate.amount, into)))
            raise ApiError(429, f"over quota ({rate} for a {kind}); try again in {wait_s} s",
                           code="rate_limit_exceeded", retry_after_s=wait_s)
        self._windows[kind, who] = number, count + 1, before
        if len(self._windows) > self._sweep:
            self._forget_old(now)

    def refund(self, kind: str, who: str) -> None:
        """Take back one `spend` of this window."""
        number, count, before = self._windows.get((kind, who), (0, 0, 0))
        if count:
            self._windows[kind, who] = number, count - 1, before

    def _counts(self, kind: str, who: str, number: int) -> tuple[int, int]:
        """What was spent in window `number` and in the one before it."""
        last, count, before = self._windows.get((kind, who), (number, 0, 0))
        return (count, before) if last == number else (0, count) if last == number - 1 else (0, 0)

    def _forget_old(self, now: float) -> None:
        """Drop who has been away for two windows; look again when there are twice as many as are left."""
        self._windows = {
            (kind, who): window for (kind, who), window in self._windows.items()
            if window[0] >= now // self._rates[kind].get_expiry() - 1
        }
        self._sweep = max(SWEEP, 2 * len(self._windows))


def wait(before: int, count: int, amount: int, into: float) -> float:
    """Windows until one more is allowed, `into` of the way through this one, if nothing more is spent."""
    if count < amount:  # then it is what is left of the window before that is in the way
        return 1 - into - (amount - count) / before
    return 1 - into + 1 - amount / count


class BodyLimit:
    """ASGI layer: reads the body, stops reading at the limit (413), and under `/v1/` refuses other types than JSON (415).

    Of who may not upload, which `admit` raises for, it reads no upload.
    """

    def __init__(
        self, app: ASGIApp, max_body_bytes: int, max_upload_bytes: int, upload_path: str, admit: Callable[[Request], Awaitable[object]],
    ) -> None:  # fmt: skip
        self.app, self.admit = app, admit
        self.max_body_bytes, self.max_upload_bytes, self.upload_path = max_body_bytes, max_upload_bytes, upload_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        upload = scope["path"] == self.upload_path and scope["method"] == "POST"
        limit = self.max_upload_bytes if upload else self.max_body_bytes
        headers = dict(scope["headers"])
        try:
            if upload:
                await self.admit(Request(scope))
            body = await self._read(headers, receive, limit)
            if body and scope["path"].startswith("/v1/") and not _is_json(headers.get(b"content-type", b"")):
                raise ApiError(415, "send JSON with Content-Type: application/json")
        except (ApiError, StartupError) as error:
            await error_response(as_api_error(error))(scope, receive, send)
            return
        if body is None:  # the client left
            return
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        await self.app(scope, replay, send)

    async def _read(self, headers: dict[bytes, bytes], receive: Receive, limit: int) -> bytes | None:
        too_large = ApiError(413, f"the body is larger than {limit} bytes")
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length[:20]) > limit:
            raise too_large
        chunks, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > limit:
                raise too_large
            chunks.append(chunk)
            if not message.get("more_body", False):
                return b"".join(chunks)


def _is_json(content_type: bytes) -> bool:
    media = content_type.split(b";")[0].strip().lower()
    return media == b"application/json" or (media.startswith(b"application/") and media.endswith(b"+json"))
