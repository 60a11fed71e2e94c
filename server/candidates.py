"""When a comparison is worth more candidates than it shows, and which of them it shows.

Owns the decision and the scoring's turn on the engine thread: one comparison at a time, in stretches that take about
half as long as a decode step. The heads are `heads.py`'s, the value of a pair `choice.py`'s. A share of comparisons is
left to chance and sampled as ever, and every doubt ends there too: choosing is never a reason to refuse a reply.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog

from engine.engine import Engine
from engine.model import CausalModel
from server.bridge import EngineBridge
from server.choice import choose
from server.deployment import Deployment
from server.heads import Heads, Reading, Unusable, newest_heads
from server.settings import Settings
from store.rounds import RoundFiles

log = structlog.get_logger("plaudit")
POLICY = "information"  # of `choice.POLICIES`; see docs/decisions.md
STRETCH = 256  # tokens read at once while nobody else is being answered
PART_OF_STEP = 0.5  # how long a stretch may take while others are, in decode steps


@dataclass(frozen=True)
class Plan:
    """How many replies one comparison samples. `heads`: what will choose among them; None: all are shown.

    note: what the comparison keeps of it, None where no choice was asked for.
    """

    sampled: int
    heads: Heads | None = None
    note: dict[str, Any] | None = None


class Candidates:
    """The choice of what is shown, for one server. Lives on the event loop."""

    def __init__(self, settings: Settings, model: CausalModel, rounds: RoundFiles, bridge: EngineBridge, deployment: Deployment) -> None:
        self.settings, self.model, self.rounds = settings, model, rounds
        self.bridge, self.deployment = bridge, deployment
        self._heads: Heads | None = None
        self._as_of = 0  # the newest round when the heads were last looked for
        self._turn = asyncio.Lock()
        self._token_s = 1e-3  # what a token of the last stretch took, in seconds; the engine thread's

    async def plan(self, asked: bool, n: int, seed: int) -> Plan:
        """Whether to sample more than the `n` to be shown, for a request that asked for it. The draw follows `seed`."""
        more = self.settings.candidates
        if not asked or n < 2 or more <= n:
            return Plan(n)
        by_chance = random.Random(f"share/{seed}").random() < self.settings.random_share
        heads = await self.heads()
        stats = self.bridge.stats
        busy = stats.queued > 0 or stats.running + more > self.settings.max_sequences
        why = "share" if by_chance else "no reward model" if heads is None else "busy" if busy else None
        if why is not None:
            return Plan(n, None, {"drawn": "random", "because": why})
        return Plan(more, heads, {"drawn": "active", "policy": POLICY, "round": heads.round if heads else None})

    async def heads(self) -> Heads | None:
        """The newest round's reward heads, read again when there is a newer round."""
        newest = (self.deployment.last_round or {}).get("round", 0)
        if newest != self._as_of:
            try:
                self._heads = await asyncio.to_thread(newest_heads, self.rounds, self.model.digest)
            except Unusable as why:
                self._heads = None
                log.warning("candidates_not_chosen", reason=str(why))
            self._as_of = newest
        return self._heads

    async def choose(self, heads: Heads, prompt_ids: Sequence[int], replies: Sequence[Sequence[int]], n: int, seed: int) -> tuple[int, ...]:
        """Which `n` of the replies (token ids) to show, in that order. Raises ValueError for scores that are not finite."""
        async with self._turn:
            reading = await self.bridge.call(lambda _: Reading(self.model, prompt_ids, replies, heads.max_tokens))
            while reading.left:
                await self.bridge.call(partial(self._advance, reading))
        return choose(heads.scores(reading.features), n, POLICY, seed)

    def _advance(self, reading: Reading, engine: Engine) -> None:
        """One stretch, on the engine thread between two decode steps."""
        alone = not engine.has_work()
        count = STRETCH if alone else int(PART_OF_STEP * self.bridge.step_s / self._token_s)
        began = time.perf_counter()
        read = reading.advance(max(1, min(count, STRETCH)))
        self._token_s = (time.perf_counter() - began) / read
