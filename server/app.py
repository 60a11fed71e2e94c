"""`create_app`: the FastAPI application of one Plaudit server, without its pages (`plaudit.py` mounts those)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from starlette.routing import Match

from server import (
    access,
    adapters,
    chat,
    conversations,
    errors,
    export,
    health,
    learner_api,
    models,
    rounds,
    stats,
    votes,
)
from server.errors import ApiError
from server.logs import configure
from server.metrics import Observe
from server.quota import BodyLimit
from server.runtime import Runtime
from server.settings import Settings
from server.supervisor import Backoff

PARTS = (chat, votes, conversations, models, adapters, learner_api, rounds, export, stats, health)
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"]


def create_app(settings: Settings, *, learner_command: list[str] | None = None, backoff: Backoff | None = None) -> FastAPI:
    """Open the data directory, load the model and return the application; its lifespan starts and stops the parts.

    `learner_command` and `backoff` replace the learner child in tests. Raises what `Runtime.open` does. If the
    application is never started, call `app.state.runtime.store.close()`.
    """
    configure(settings.log_level)
    runtime = Runtime.open(settings, command=learner_command, backoff=backoff)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            await runtime.start()
            yield
        finally:
            await runtime.stop()

    app = FastAPI(title="Plaudit", version=_version(), lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.runtime = runtime
    errors.install(app)
    for part in PARTS:
        app.include_router(part.router)
    for path in ("/v1/{path:path}", "/healthz", "/readyz", "/metrics"):  # what no route above answers must not fall through to the pages
        app.add_api_route(path, _nothing_here, methods=METHODS, include_in_schema=False)
    app.add_middleware(
        BodyLimit, max_body_bytes=settings.max_body_bytes, max_upload_bytes=settings.max_upload_bytes,
        upload_path="/v1/adapters", admit=access.may_operate,
    )
    app.add_middleware(Observe, metrics=runtime.metrics)
    app.openapi = partial(_openapi, app)  # type: ignore[method-assign]
    return app


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The schema with our error shape, in place of the 422 that FastAPI would describe."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes, summary="A chat assistant that learns")
        text = {"type": ["string", "null"]}
        error = {"type": "object", "required": ["error"], "properties": {"error": {
            "type": "object", "required": ["message", "type", "param", "code"],
            "properties": {"message": {"type": "string"}, "type": {"type": "string"}, "param": text, "code": text}}}}
        schemas = schema.setdefault("components", {}).setdefault("schemas", {})
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        schemas["Error"] = error
        content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
        for path, methods in schema["paths"].items():
            for operation in methods.values():
                operation["responses"].pop("422", None)
                if path.startswith("/v1/"):
                    operation["responses"]["default"] = {"description": "refused or failed", "content": content}
        app.openapi_schema = schema
    return app.openapi_schema


async def _nothing_here(request: Request) -> None:
    """404 or 405 in our own shape, whatever is mounted behind the API."""
    allowed: set[str] = set()
    for route in (route for part in PARTS for route in part.router.routes):
        match, _ = route.matches({**request.scope})
        if match == Match.PARTIAL:
            allowed |= set(getattr(route, "methods", None) or ())
    if allowed:
        error = ApiError(405, f"{request.method} is not offered here; {', '.join(sorted(allowed))} is")
        error.headers = {"Allow": ", ".join(sorted(allowed))}
        raise error
    raise ApiError(404, f"there is no {request.url.path}")


def _version() -> str:
    try:
        return version("plaudit")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "0"
