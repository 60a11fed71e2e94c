"""`/v1/adapters`: the versions, promotion, rollback and upload. For operators.

Owns the wire form of a version. Decides nothing: `deployment.py` does what is asked, or says why not.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import re
import secrets
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from engine.engine import Engine, probe
from engine.lora import Adapter, AdapterError
from server.access import Operator, runtime_of
from server.deployment import NotPossible, UnknownModel
from server.errors import ApiError
from server.runtime import UPLOAD, Runtime
from server.schema import UploadRequest
from store.records import AdapterRow

router = APIRouter()
PROBE = [{"role": "user", "content": "Hello! Who are you, and what can you do?"}]


@router.get("/v1/adapters")
async def list_adapters(request: Request, who: Operator) -> dict[str, Any]:
    """Every version, newest first, and what is deployed."""
    runtime = runtime_of(request)
    rows = await runtime.db(runtime.store.adapters)
    deployment = runtime.deployment
    return {
        "live": deployment.live,
        "live_since": deployment.live_since,
        "previous": deployment.previous,
        "candidate": deployment.candidate,
        "data": [wire(runtime, row) for row in sorted(rows, key=lambda row: row.version, reverse=True)],
        "refused": deployment.refused,
    }


@router.get("/v1/adapters/{version}")
async def get_adapter(version: str, request: Request, who: Operator) -> dict[str, Any]:
    """One version: manifest, gate verdict, lineage, and its win rate against each version it was mixed with."""
    runtime = runtime_of(request)
    row = await _known(runtime, version)
    board, odds = runtime.deployment.scoreboard, runtime.settings.abtest_odds
    lineage, parent = [version], row.manifest.get("parent")
    while parent and parent not in lineage:
        lineage.append(parent)
        older = await runtime.db(runtime.store.adapter, parent)
        parent = older.manifest.get("parent") if older else None
    return {
        **wire(runtime, row),
        "manifest": row.manifest,
        "lineage": lineage,
        "probe_gap_nats": runtime.deployment.gaps.get(version),
        "against": {other: asdict(board.test(version, other, odds=odds)) for other in board.opponents(version)},
    }


@router.post("/v1/adapters/rollback")
async def rollback(request: Request, who: Operator) -> dict[str, Any]:
    """Make the version before the live one live again; done when this answers."""
    runtime = runtime_of(request)
    try:
        await runtime.deployment.rollback(who.actor)
    except NotPossible as why:
        raise ApiError(409, str(why)) from why
    return _deployed(runtime)


@router.post("/v1/adapters/{version}/promote")
async def promote(version: str, request: Request, who: Operator) -> dict[str, Any]:
    """Make this version (or `base`) live; done when this answers."""
    runtime = runtime_of(request)
    try:
        await runtime.deployment.promote(version, who.actor)
    except UnknownModel as unknown:
        raise ApiError(404, str(unknown)) from unknown
    except NotPossible as why:
        raise ApiError(409, str(why)) from why
    return _deployed(runtime)


@router.post("/v1/adapters", status_code=201)
async def upload(body: UploadRequest, request: Request, who: Operator) -> JSONResponse:
    """Take in a PEFT LoRA adapter. It becomes a candidate: promote it to make it live."""
    runtime = runtime_of(request)
    try:
        tensors = await asyncio.to_thread(base64.b64decode, body.adapter_model, validate=True)  # megabytes: replies are being written
    except (binascii.Error, ValueError):
        raise ApiError(400, "adapter_model is not base64", param="adapter_model") from None
    try:
        config = json.dumps(body.adapter_config, indent=1)
    except RecursionError:
        raise ApiError(400, "adapter_config is nested too deeply", param="adapter_config") from None
    prompt_ids = runtime.tokenizer.render(PROBE)
    name = "upload-" + secrets.token_hex(6)

    def write(directory: Path) -> None:
        (directory / "adapter_config.json").write_text(config)
        (directory / "adapter_model.safetensors").write_bytes(tensors)

    def try_out(engine: Engine, adapter: Adapter) -> dict[str, Any]:
        engine.load_version(name, adapter)
        try:
            return probe(engine.model, name, prompt_ids)
        finally:
            engine.unload_version(name)

    with tempfile.TemporaryDirectory(dir=runtime.settings.data_dir, prefix=UPLOAD) as temporary:
        await asyncio.to_thread(write, Path(temporary))
        try:
            adapter = await asyncio.to_thread(runtime.bridge.read_adapter, Path(temporary))
            tried = await runtime.bridge.call(lambda engine: try_out(engine, adapter))
        except (AdapterError, ValueError, TypeError, KeyError, RuntimeError, AttributeError, re.error) as refused:
            text = str(refused).replace(f"{temporary}/", "").replace(temporary, "the upload")
            raise ApiError(400, f"the adapter does not fit: {text}", param="adapter_model") from refused
    if not all(map(_finite, tried["top_logprobs"])):
        raise ApiError(400, "the adapter makes the model's logits infinite", param="adapter_model")
    fields = {
        "parent": "base", "round": None, "kind": "upload", "base_digest": runtime.model.digest,
        "base_model": runtime.settings.model, "data_digest": None, "seed": None, "gate": None, "probe": tried,
        "comment": body.comment,
    }
    manifest = await asyncio.to_thread(runtime.registry.publish, write, fields)
    await runtime.deployment.take_in()
    await runtime.db(runtime.store.audit, who.actor, "upload", {"version": manifest.version, "sha256": manifest.sha256})
    return JSONResponse(wire(runtime, await _known(runtime, manifest.version)), 201)


def wire(runtime: Runtime, row: AdapterRow) -> dict[str, Any]:
    """A version as clients see it."""
    deployment = runtime.deployment
    manifest, opponents = row.manifest, deployment.scoreboard.opponents(row.version)
    # the version it replaced says most; else the one it met most often
    against = manifest.get("parent") if manifest.get("parent") in opponents else next(iter(opponents), None)
    outcomes = deployment.scoreboard.outcomes(row.version, against) if against else []
    return {
        "version": row.version,
        "status": row.status,
        "parent": manifest.get("parent"),
        "created": manifest.get("created"),
        "round": manifest.get("round"),
        "kind": manifest.get("kind"),
        "sha256": manifest.get("sha256"),
        "gate": manifest.get("gate"),
        "win_rate": sum(outcomes) / len(outcomes) if outcomes else None,
        "win_votes": len(outcomes),
        "against": against,
        "reason": deployment.refused.get(row.version),
    }


def _finite(x: float) -> bool:
    return x == x and abs(x) != float("inf")


def _deployed(runtime: Runtime) -> dict[str, Any]:
    d = runtime.deployment
    return {"live": d.live, "live_since": d.live_since, "previous": d.previous, "candidate": d.candidate}


async def _known(runtime: Runtime, version: str) -> AdapterRow:
    row = await runtime.db(runtime.store.adapter, version)
    if row is None:
        raise ApiError(404, f"there is no version {version[:64]!r}")
    return row
