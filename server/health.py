"""`/healthz`, `/readyz` and `/metrics`: for machines that watch."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from server.access import runtime_of, scraper

router = APIRouter()


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/readyz")
async def readyz(request: Request) -> JSONResponse:
    """New requests are welcome; 503 while starting, draining, or without an engine."""
    reason = runtime_of(request).not_ready
    return JSONResponse({"status": reason or "ready"}, 503 if reason else 200)


@router.get("/metrics", response_class=Response)
async def prometheus(request: Request, _: Annotated[None, Depends(scraper)]) -> Response:
    """Prometheus' text format."""
    runtime = runtime_of(request)
    metrics, stats = runtime.metrics, runtime.bridge.stats
    metrics.running.set(stats.running)
    metrics.queued.set(stats.queued)
    metrics.learner_up.set(bool(runtime.supervisor and runtime.supervisor.running))
    metrics.votes_pending.set((await runtime.db(runtime.store.vote_counts)).pending)
    return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
