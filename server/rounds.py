"""`GET /v1/rounds` and `/v1/rounds/{n}`: every figure of every round, as the learner wrote it."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request

from server.access import Operator, runtime_of
from server.cores import BUSY, alive
from server.errors import ApiError
from server.runtime import Runtime

router = APIRouter()


@router.get("/v1/rounds")
async def list_rounds(request: Request, who: Operator) -> dict[str, Any]:
    """All rounds, newest first, the running one included."""
    runtime = runtime_of(request)
    finished = await runtime.db(runtime.store.rounds)
    running = await running_round(runtime, {row["round"] for row in finished})
    return {"data": sorted([*running, *finished], key=lambda row: -row["round"])}


async def running_round(runtime: Runtime, finished: set[int]) -> list[dict[str, Any]]:
    """The round the learner is in, with what it has so far, unless it is among the finished ones."""
    beat = await asyncio.to_thread(runtime.rounds.read_heartbeat) or {}
    number = beat.get("round")
    if not isinstance(number, int) or number in finished or beat.get("state") not in BUSY or not alive(beat):
        return []
    unknown = dict.fromkeys(("ended", "votes", "reward", "ppo", "gate", "version"))  # until it is finished
    return [{"round": number, "state": beat["state"], "started": beat.get("started"), "progress": beat.get("progress"), **unknown}]


@router.get("/v1/rounds/{number}")
async def get_round(number: Annotated[int, Path(ge=1, le=2**53)], request: Request, who: Operator) -> dict[str, Any]:
    """One round."""
    runtime = runtime_of(request)
    found = await runtime.db(runtime.store.round, number)
    if found is None:
        running = await running_round(runtime, set())
        found = next((row for row in running if row["round"] == number), None)
    if found is None:
        raise ApiError(404, f"there is no round {number}")
    return found
