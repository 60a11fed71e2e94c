"""`GET /v1/export`: votes as JSON lines, streamed, for training elsewhere."""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator
from typing import Literal

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from server.access import Operator, runtime_of

router = APIRouter()
ROWS = 200  # read per turn on the database thread, so that chats and votes get theirs in between


@router.get("/v1/export", response_class=StreamingResponse)
async def export(
    request: Request, who: Operator, format: Literal["preference", "preference-implicit", "ranking", "demonstration"] = "preference"
) -> StreamingResponse:
    """JSONL. `preference` is TRL's conversational prompt/chosen/rejected, `preference-implicit` its variant without prompt."""
    runtime = runtime_of(request)
    rows = await runtime.db(lambda: iter(runtime.store.export(format)))
    await runtime.db(runtime.store.audit, who.actor, "export", {"format": format})

    async def lines() -> AsyncIterator[bytes]:
        while batch := await runtime.db(lambda: list(itertools.islice(rows, ROWS))):
            yield b"".join(json.dumps(row).encode() + b"\n" for row in batch)

    name = f'attachment; filename="plaudit-{format}.jsonl"'
    return StreamingResponse(lines(), media_type="application/x-ndjson", headers={"Content-Disposition": name})
