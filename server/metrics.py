"""Prometheus metrics of one server, and the ASGI layer that counts and logs requests.

Labels are route templates, statuses and versions: nothing that people or the model wrote, and nobody's id.
"""

from __future__ import annotations

import time
from typing import Any

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = structlog.get_logger("plaudit")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The figures of one server; each has its own registry, so that two servers may live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        kept: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("plaudit_requests", "HTTP requests", ["method", "route", "status"], **kept)
        self.latency = Histogram("plaudit_request_seconds", "Time to the end of the answer", ["route"], buckets=SECONDS, **kept)
        self.first_token = Histogram("plaudit_first_token_seconds", "Time from admission to the first text", buckets=SECONDS, **kept)
        self.replies = Counter("plaudit_replies", "Replies by version and finish reason", ["version", "finish_reason"], **kept)
        self.tokens = Counter("plaudit_tokens", "Tokens of finished replies", **kept)
        self.prompt_tokens = Counter("plaudit_prompt_tokens", "Tokens of answered prompts", **kept)
        self.cancelled = Counter("plaudit_cancelled_requests", "Chat requests whose client left", **kept)
        self.broken_streams = Counter("plaudit_broken_streams", "Streams that ended with an error, after their 200", ["code"], **kept)
        self.votes = Counter("plaudit_votes", "Votes by kind", ["kind"], **kept)
        self.swaps = Counter("plaudit_swaps", "Changes of the live version", ["action"], **kept)
        self.refused = Counter("plaudit_refused_adapters", "Adapters that failed verification", **kept)
        self.learner_restarts = Counter("plaudit_learner_restarts", "Times the learner child had to be restarted", **kept)
        self.running = Gauge("plaudit_running_sequences", "Replies being decoded", **kept)
        self.queued = Gauge("plaudit_queued_sequences", "Replies waiting for a slot", **kept)
        self.live = Gauge("plaudit_live_version", "1 for the live version", ["version"], **kept)
        self.learner_up = Gauge("plaudit_learner_up", "1 while the learner child runs", **kept)
        self.votes_pending = Gauge("plaudit_votes_pending", "Votes since the last round", **kept)

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)


class Observe:
    """ASGI layer: one count, one latency and one log line per request."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watch)
        except Exception:  # which becomes a 500 further out
            status = status or 500
            raise
        finally:
            took_s = time.perf_counter() - began
            # Only our own templates become labels: arbitrary paths would let a client grow the registry.
            route = getattr(scope.get("route"), "path", None) or "other"
            method = scope["method"] if scope["method"] in METHODS else "other"  # a client may write anything there
            self.metrics.requests.labels(method, route, status or 499).inc()
            self.metrics.latency.labels(route).observe(took_s)
            if route.startswith("/v1/"):
                read = scope["method"] == "GET" and status < 400  # pages poll: these would drown the rest
                line = log.debug if read else log.info
                line("request", method=scope["method"], route=route, status=status or 499, ms=round(took_s * 1000, 1))
