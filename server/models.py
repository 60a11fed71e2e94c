"""`GET /v1/models`: what may be asked for, as OpenAI lists it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from server.access import User, runtime_of
from server.errors import ApiError

router = APIRouter()


def _model(name: str, created: float) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(created), "owned_by": "plaudit"}


@router.get("/v1/models")
async def list_models(request: Request, who: User) -> dict[str, Any]:
    """The live assistant, the base, and every version that may be asked for by name."""
    runtime = runtime_of(request)
    began = runtime.started or 0.0
    names = ["plaudit", *(f"plaudit@{version}" for version in runtime.deployment.servable())]
    return {"object": "list", "data": [_model(name, began) for name in names]}


@router.get("/v1/models/{name}")
async def get_model(name: str, request: Request, who: User) -> dict[str, Any]:
    """One of them."""
    runtime = runtime_of(request)
    if name != "plaudit" and name.removeprefix("plaudit@") not in runtime.deployment.servable():
        raise ApiError(404, f"there is no model {name[:64]!r}", code="model_not_found")
    if name != "plaudit" and not name.startswith("plaudit@"):
        raise ApiError(404, f"there is no model {name[:64]!r}", code="model_not_found")
    return _model(name, runtime.started or 0.0)
