"""Keys that `plaudit keys` made or revoked, put into the audit log, which only the server may write.

The command line changes `keys.json` beside a running server or before its next start; this looks once a second. Owns what the log has of
keys; the keys are `auth.py`'s.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import structlog

from server.auth import Keyring
from store.store import Store

log = structlog.get_logger("plaudit")
POLL_S = 1.0
ADDED, REVOKED = "key added", "key revoked"


class KeyLog:
    """Follows one keyring. Lives on the event loop."""

    def __init__(self, keyring: Keyring, store: Store, db: Callable[..., Awaitable[Any]]) -> None:
        self._keyring, self._store, self._db = keyring, store, db
        self._noted: dict[str, str] | None = None  # key id -> role, as the log has them
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Look now, and from here on."""
        self._task = asyncio.create_task(self._follow(), name="keys")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def note(self) -> None:
        """Log what has changed, entry by entry, so that nothing is told twice. Raises StartupError for a damaged file, StoreError."""
        if self._noted is None:
            noted: dict[str, str] = {}
            for entry in await self._db(self._store.audit_log):
                detail = json.loads(entry["detail"])
                if entry["action"] == ADDED:
                    noted[detail["key"]] = detail["role"]
                elif entry["action"] == REVOKED:
                    noted.pop(detail["key"], None)
            self._noted = noted
        there: dict[str, str] = {key.id: key.role for key in self._keyring.list()}
        for key_id in sorted(there.keys() - self._noted.keys()):
            await self._tell(ADDED, key_id, there[key_id])
            self._noted[key_id] = there[key_id]
        for key_id in sorted(self._noted.keys() - there.keys()):
            await self._tell(REVOKED, key_id, self._noted[key_id])
            del self._noted[key_id]

    async def _tell(self, action: str, key_id: str, role: str) -> None:
        await self._db(self._store.audit, "plaudit keys", action, {"key": key_id, "role": role})

    async def _follow(self) -> None:
        failed: str | None = None
        while True:
            try:
                await self.note()
                failed = None
            except Exception as error:  # a damaged file, a full disk: the next look may find it mended; told once, not every second
                if failed != type(error).__name__:
                    failed = type(error).__name__
                    log.warning("keys_not_noted", kind=failed)
            await asyncio.sleep(POLL_S)
