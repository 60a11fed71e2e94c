"""FastAPI dependencies: the runtime of this application, and who is asking with which role."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Request

from server.auth import Identity, Key, foreign_page
from server.errors import ApiError

if TYPE_CHECKING:
    from server.runtime import Runtime

MAX_VOTER = 128  # characters of a Plaudit-Voter header


def runtime_of(request: Request) -> Runtime:
    """The runtime that `create_app` made."""
    return request.app.state.runtime


async def user(request: Request) -> Identity:
    """Who is asking, told and counted once a request. Raises 401 without a good key, 403 for a foreign web page, 429 over quota."""
    if (known := getattr(request.state, "who", None)) is not None:  # an upload is asked before its body is read
        return known
    runtime: Runtime = request.app.state.runtime
    if len(runtime.keyring):
        identity = await _by_key(request, runtime)
    elif not runtime.settings.loopback:
        raise ApiError(401, "this server needs a key and has none left; its operator makes one with `plaudit keys add`")
    else:
        if foreign_page(request.headers.get("host"), request.headers.get("origin")):
            raise ApiError(403, "without keys only this machine's own pages and programs may ask; make keys to open it")
        voter = request.headers.get("plaudit-voter", "").strip() or "local"
        if len(voter) > MAX_VOTER:
            raise ApiError(400, f"Plaudit-Voter is longer than {MAX_VOTER} characters", param="Plaudit-Voter")
        identity = Identity(runtime.voter_hash(voter), "operator", "local")
    runtime.quota.spend("request", identity.voter)
    request.state.who = identity
    return identity


async def operator(who: Annotated[Identity, Depends(user)]) -> Identity:
    """Who is asking, an operator. Raises 403 for others."""
    if not who.operator:
        raise ApiError(403, "this needs an operator's key")
    return who


async def may_operate(request: Request) -> None:
    """Let operators in, also where there is no route yet. Raises what `user` and `operator` do."""
    await operator(await user(request))


async def scraper(request: Request) -> None:
    """Let anyone in on a loopback bind, operators elsewhere."""
    runtime: Runtime = request.app.state.runtime
    if not runtime.settings.loopback:
        await may_operate(request)


async def _by_key(request: Request, runtime: Runtime) -> Identity:
    scheme, _, presented = request.headers.get("authorization", "").partition(" ")
    presented = presented.strip()
    if scheme.lower() != "bearer" or not presented:
        raise ApiError(401, "send your key as `Authorization: Bearer plaudit-...`")
    address = request.client.host if request.client else "unknown"
    if runtime.keyring.is_cached(presented):
        key = runtime.keyring.find(presented)
    elif (key_id := runtime.keyring.named(presented)) is None:
        key = None  # told from a good one without hashing, so nobody pays for it: browsers share the pages' address
    else:
        key = await _verified(runtime, presented, f"{address} {key_id}")
    if key is None:
        raise ApiError(401, "this key is not known here")
    return Identity(runtime.voter_hash(key.voter), key.role, key.id)


async def _verified(runtime: Runtime, presented: str, who: str) -> Key | None:
    """The key that `presented` is, by an argon2 verification: one for all who ask at once, and only a wrong secret is paid for. Raises 429."""
    running = runtime.verifying.get(presented)
    if running is None:
        runtime.quota.spend("failed key", who)  # before it is known: else any number could be tried at once
        running = runtime.verifying[presented] = asyncio.create_task(asyncio.to_thread(runtime.keyring.find, presented), name="key")

        def ended(verification: asyncio.Task[Key | None]) -> None:
            del runtime.verifying[presented]
            if not verification.cancelled() and verification.exception() is None and verification.result() is not None:
                runtime.quota.refund("failed key", who)

        running.add_done_callback(ended)
    return await asyncio.shield(running)  # who leaves does not take the others' answer along


User = Annotated[Identity, Depends(user)]
Operator = Annotated[Identity, Depends(operator)]
