"""`GET /v1/stats`: what the operator's page draws."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request

from server.access import Operator, runtime_of
from server.learner_api import learner_view

router = APIRouter()


@router.get("/v1/stats")
async def get_stats(request: Request, who: Operator) -> dict[str, Any]:
    """Counts, load, deployment and the A/B test in force."""
    runtime = runtime_of(request)
    deployment, engine = runtime.deployment, runtime.bridge.stats
    test = deployment.test()
    return {
        "counts": await runtime.db(runtime.store.counts),
        "deployment": {
            "live": deployment.live, "live_since": deployment.live_since, "previous": deployment.previous,
            "candidate": deployment.candidate, "promotion": runtime.settings.promotion,
            "mix_share": runtime.settings.mix_share, "mixed_with": deployment.other, "refused": deployment.refused,
        },
        "abtest": asdict(test) if test else None,
        "learner": await learner_view(runtime),
        "engine": {
            "running": engine.running, "queued": engine.queued, "steps": engine.steps, "tokens": engine.tokens,
            "prefill_tokens": engine.prefill_tokens, "finished": engine.finished, "cancelled": engine.cancelled,
            "reused_tokens": engine.reused_tokens, "kv_bytes": engine.kv_bytes, "kept_bytes": engine.kept_bytes,
            "max_sequences": runtime.settings.max_sequences,
            "max_context": runtime.max_context,
        },
        "uptime_s": round(time.time() - (runtime.started or time.time()), 1),
        "model": {"source": runtime.settings.model, "dtype": str(runtime.model.dtype).removeprefix("torch."),
                  "device": str(runtime.model.device), "digest": runtime.model.digest},
    }
