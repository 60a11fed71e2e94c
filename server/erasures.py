"""Erased conversations leave the engine's memory too: what it has read of them is kept for what may follow.

A request of such a conversation that is under way may read its words once more after they were erased; when it is over, they go
again. Owns which those are. Does not own the database's part (`store/store.py`).
"""

from __future__ import annotations

import asyncio

from server.bridge import EngineBridge


class Erasures:
    """On the event loop."""

    def __init__(self, bridge: EngineBridge) -> None:
        self._bridge = bridge
        self._open: dict[str, int] = {}  # conversation -> its chats that run
        self._erased: set[str] = set()  # of those
        self._tasks: set[asyncio.Task[None]] = set()

    def chat_begins(self, conversation_id: str) -> None:
        """A chat of this conversation is about to be read."""
        self._open[conversation_id] = self._open.get(conversation_id, 0) + 1

    def chat_over(self, conversation_id: str) -> None:
        """It is over, and its sequences are cancelled."""
        left = self._open.pop(conversation_id) - 1
        if left:
            self._open[conversation_id] = left
        if conversation_id in self._erased:
            if not left:
                self._erased.discard(conversation_id)
            task = asyncio.get_running_loop().create_task(self._forget(), name="erase")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def erased(self, conversation_id: str) -> None:
        """The database has erased it; returns when the engine has forgotten what it kept."""
        if conversation_id in self._open:
            self._erased.add(conversation_id)
        await self._forget()

    async def _forget(self) -> None:
        await self._bridge.call(lambda engine: engine.forget())
