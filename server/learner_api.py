"""`GET /v1/learner`, its run/pause/resume, and `GET /v1/status`, the part of it that everyone may see.

Merges what the learner says of itself (heartbeat and progress files), what operators told it (control) and what the
supervisor knows of its process. Does not start or stop anything: the learner reads the control row.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request

from server.access import Operator, User, runtime_of
from server.cores import BUSY, alive
from server.errors import ApiError
from server.runtime import Runtime

router = APIRouter()
STATES = ("idle", *BUSY, "paused", "degraded")


async def learner_view(runtime: Runtime) -> dict[str, Any]:
    """What `GET /v1/learner` answers."""
    beat = await asyncio.to_thread(runtime.rounds.read_heartbeat) or {}
    control = await runtime.db(runtime.store.control)
    counts = await runtime.db(runtime.store.vote_counts)
    state, reason = _state(runtime, beat, control.paused)
    last = runtime.deployment.last_round or {}
    verdict = (last.get("gate") or {}).get("verdict") or last.get("state")
    busy = state in BUSY
    return {
        "state": state,
        "reason": reason,
        "progress": beat.get("progress") if busy else None,
        "round": beat.get("round"),
        "votes": counts.standing,
        "votes_pending": counts.pending,
        "votes_until_next_round": max(0, runtime.settings.round_votes - counts.pending),
        "last_verdict": verdict,
        "paused": control.paused,
        "off": off(runtime, beat),
        "restarts": runtime.supervisor.restarts if runtime.supervisor else 0,
    }


def _state(runtime: Runtime, beat: dict[str, Any], paused: bool) -> tuple[str, str | None]:
    said = beat.get("state") if beat.get("state") in STATES else "idle"
    fresh = alive(beat)
    supervisor = runtime.supervisor
    if supervisor is not None and supervisor.degraded:
        return "degraded", supervisor.reason
    if off(runtime, beat):
        return "paused", "no learner runs here (--no-learner); start one with `plaudit learn`"
    if supervisor is not None and not supervisor.running and supervisor.crashes:
        return "degraded", f"the learner stopped (exit {supervisor.last_exit}) and is about to be started again"
    if not fresh:
        return ("paused", "paused by an operator") if paused else ("idle", None)
    if paused and said == "idle":
        return "paused", "paused by an operator"
    return str(said), beat.get("reason")


def off(runtime: Runtime, beat: dict[str, Any]) -> bool:
    """Whether no learner runs, and none is going to: nobody here starts one."""
    return runtime.supervisor is None and not alive(beat)


@router.get("/v1/learner")
async def get_learner(request: Request, who: Operator) -> dict[str, Any]:
    """What the learner does, and how many votes until its next round."""
    return await learner_view(runtime_of(request))


@router.post("/v1/learner/{action}")
async def steer(action: str, request: Request, who: Operator) -> dict[str, Any]:
    """`run` one round now (also while paused), `pause`, or `resume`."""
    runtime = runtime_of(request)
    if action not in ("run", "pause", "resume"):
        raise ApiError(404, "the learner can be told run, pause and resume")
    await runtime.db(runtime.store.steer, action, who.actor)
    return await learner_view(runtime)


@router.get("/v1/status")
async def get_status(request: Request, who: User) -> dict[str, Any]:
    """What the chat page tells people: the live version, since when, and how many votes until the next."""
    runtime = runtime_of(request)
    view = await learner_view(runtime)
    return {
        "live": runtime.deployment.live,
        "live_since": runtime.deployment.live_since,
        "votes": view["votes"],
        "votes_pending": view["votes_pending"],
        "votes_until_next_round": view["votes_until_next_round"],
        "learner_state": "off" if view["off"] else view["state"],
        "progress": view["progress"],
    }
