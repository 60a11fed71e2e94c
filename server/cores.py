"""How many threads the engine has: all it may, but for the learner's while the learner trains.

Two programs that each want every core get fewer than half of the work done. Reads what the learner says of itself (its heartbeat),
as the operator page does. Owns the number; the threads are torch's and `engine/native.py`'s.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import structlog
import torch

from server.bridge import EngineBridge
from store.rounds import RoundFiles

BUSY = ("finetuning", "training_reward", "ppo", "gating")  # states of a learner at work
STALE_S = 60.0  # a heartbeat older than this is from a learner that is gone or stuck
POLL_S = 1.0
log = structlog.get_logger("plaudit")


def alive(beat: dict[str, Any]) -> bool:
    """Whether this heartbeat is of a learner that runs."""
    return beat.get("state") != "stopped" and time.time() - float(beat.get("time") or 0.0) < STALE_S


class Cores:
    """Sets the engine thread's number of threads, at the start and when the learner begins or ends a round."""

    def __init__(self, bridge: EngineBridge, rounds: RoundFiles, most: int, learner: int) -> None:
        """most: threads the operator allows the engine, 0 for torch's choice. learner: threads of the learner."""
        self.bridge, self.rounds, self.learner = bridge, rounds, learner
        self.most = most or torch.get_num_threads()
        self.now = 0
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Set the number, and follow the learner from here on."""
        await self._set()
        self._task = asyncio.create_task(self._follow(), name="cores")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            try:
                await self._set()
            except Exception as error:  # one bad look must not end the looking
                log.error("cores_failed", kind=type(error).__name__)

    async def _set(self) -> None:
        beat = await asyncio.to_thread(self.rounds.read_heartbeat) or {}
        trains = alive(beat) and beat.get("state") in BUSY
        wanted = max(1, min(self.most, (os.cpu_count() or 1) - self.learner)) if trains else self.most
        if wanted != self.now:
            await self.bridge.call(lambda _: torch.set_num_threads(wanted))
            self.now = wanted
