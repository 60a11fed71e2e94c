"""Which version answers: live, previous, candidate; taking in what the learner publishes; promotion and rollback.

A version is verified and loaded before anything refers to it, and unloaded when nothing does. The database learns of
a change before any request does. Does not sample, judge votes (`abtest.py`) or talk HTTP. Lives on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog

from engine.engine import Engine
from server.abtest import AbTest
from server.bridge import EngineBridge
from server.logs import places
from server.metrics import Metrics
from server.scoreboard import Scoreboard
from server.settings import Settings
from server.verification import Unfit, load_verified
from store.adapters import AdapterRegistry, Manifest
from store.errors import CorruptAdapter, StoreError
from store.records import AdapterRow, Shown
from store.rounds import RoundFiles
from store.store import Store

log = structlog.get_logger("plaudit")
BASE = "base"
AUTO = "auto"  # the audit log's name for what the server decides by itself
GATE_FAILED = "its gate failed"
POLL_S = 1.0
IDLE_UNLOAD_S = 60.0  # how long a version asked for by name stays loaded after its last request


class UnknownModel(Exception):
    """No such model here; the message lists what there is."""


class NotPossible(Exception):
    """An operator's wish that cannot be met now; the message says why."""


@dataclass(frozen=True)
class Slots:
    """The version of each reply of one comparison, and the seed it was shuffled with."""

    versions: tuple[str, ...]
    seed: int
    mixed: bool


def assign(n: int, live: str, other: str | None, share: float, seed: int) -> Slots:
    """Versions of `n` slots: all live, or for `share` of the comparisons half live and half `other`, shuffled.

    For an odd n the extra slot is live's or the other's with equal chance, so that neither is favoured by number.
    """
    draw = random.Random(seed)
    if n < 2 or other is None or other == live or draw.random() >= share:
        return Slots((live,) * n, seed, False)
    of_live = n // 2 + (n % 2 and draw.random() < 0.5)
    versions = [live] * of_live + [other] * (n - of_live)
    draw.shuffle(versions)
    return Slots(tuple(versions), seed, True)


class Deployment:
    """What is deployed, in memory and in the database, and the versions loaded for it."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        registry: AdapterRegistry,
        rounds: RoundFiles,
        bridge: EngineBridge,
        metrics: Metrics,
        db: Callable[..., Awaitable[Any]],
        *,
        base_digest: str,
        dtype: str,
    ) -> None:
        self.settings, self.store, self.registry, self.rounds = settings, store, registry, rounds
        self.bridge, self.metrics, self.scoreboard = bridge, metrics, Scoreboard()
        self.live, self.previous, self.candidate = BASE, None, None  # type: str, str | None, str | None
        self.live_since = time.time()
        self.by_operator = False  # the live version is an operator's choice: votes do not undo it
        self.waiting: str | None = None  # canary mode: the newest version that nobody has been asked about, while they are about another
        self.refused: dict[str, str] = {}  # version -> why it is not served
        self.gaps: dict[str, float] = {}  # version -> largest probe difference at its last load, nats
        self.idle_unload_s = IDLE_UNLOAD_S
        self._db, self._base_digest, self._dtype = db, base_digest, dtype
        self._known: set[str] = set()  # versions the database has
        self._known_rounds: set[int] = set()
        self.last_round: dict[str, Any] | None = None  # the newest finished one
        self._lock = asyncio.Lock()  # one change of what is loaded or deployed at a time
        self._loaded: set[str] = {BASE}
        self._leases: Counter[str] = Counter()
        self._last_used: dict[str, float] = {}
        self._settled: dict[tuple[str, str], str] = {}  # (live, other) -> the votes' decision, once there is one and it is carried out
        self._task: asyncio.Task[None] | None = None

    # --- routing

    @property
    def other(self) -> str | None:
        """The version that comparisons mix with the live one: the candidate, else the one before."""
        other = self.candidate or self.previous
        settled = self.candidate is None and other is not None and (self.live, other) in self._settled
        return None if settled else other

    async def take(self, model: str, n: int, seed: int, *, mix: bool = True) -> Slots:
        """Versions for the `n` replies of a request for `model`, held until `give_back`. Raises `UnknownModel`.

        mix: whether the other version may write some of them.
        """
        name, _, pinned = model.partition("@")
        if name != "plaudit" or (model != "plaudit" and not pinned):
            raise UnknownModel(self._no_such(model))
        if pinned:
            if pinned not in self._loaded:
                await self._load_on_demand(pinned, model)
            slots = Slots((pinned,) * n, seed, False)
        else:
            slots = assign(n, self.live, self.other if mix else None, self.settings.mix_share, seed)
        self._leases.update(slots.versions)  # no await between choosing and holding
        return slots

    def give_back(self, slots: Slots) -> None:
        """The request with these slots has ended."""
        self._leases.subtract(slots.versions)
        now = time.monotonic()
        for version in set(slots.versions):
            self._last_used[version] = now

    def servable(self) -> list[str]:
        """Versions that may be asked for by name, base first."""
        return [BASE, *(v for v in self.registry.versions() if v in self._known and v not in self.refused)]

    def _no_such(self, model: str) -> str:
        there = ["plaudit", *(f"plaudit@{version}" for version in self.servable()[-20:])]
        return f"there is no model {model[:64]!r}; there are {', '.join(there)}"

    async def _load_on_demand(self, version: str, model: str) -> None:
        if version not in self.servable():
            raise UnknownModel(self._no_such(model))
        async with self._lock:
            if version not in self._loaded:
                try:
                    await self._load(version)
                except Unfit as unfit:
                    raise UnknownModel(f"{version} cannot be served: {unfit}") from unfit
            self._last_used[version] = time.monotonic()

    # --- life

    async def start(self) -> None:
        """Load what was deployed, take in what is new, and keep looking once a second."""
        rows = await self._db(self.store.adapters)
        for row in rows:
            self._remember(row)
        for row in await self._db(self.store.rounds):
            self._known_rounds.add(row["round"])
            self.last_round = row
        was = await self._db(self.store.deployment)
        self.live, self.previous, self.candidate = was.live, was.previous, was.candidate
        self.live_since = was.since or time.time()
        self.by_operator = was.actor not in (AUTO, None)
        newest = max((row for row in rows if _gate(row.manifest) not in (None, "rejected")), key=lambda row: row.version, default=None)
        if newest is not None and newest.status == "candidate" and newest.version != self.candidate:
            self.waiting = newest.version
        for shown, voter, groups in await self._db(self.store.mixed_votes):
            self.count(shown, voter, groups)
        async with self._lock:
            await self._load_deployed()
        await self._look()
        self._task = asyncio.create_task(self._poll(), name="take-in")

    def _remember(self, row: AdapterRow) -> None:
        self._known.add(row.version)
        if row.status == "rejected":
            self.refused[row.version] = GATE_FAILED if _gate(row.manifest) == "rejected" else "it failed verification"

    async def stop(self) -> None:
        """Stop looking for new versions."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _load_deployed(self) -> None:
        """Load live, previous and candidate; step back from what is no longer fit to the best that is."""
        fit: dict[str, bool] = {BASE: True}
        for version in {self.live, self.previous, self.candidate} - {None, BASE}:
            assert version is not None
            try:
                await self._load(version)
                fit[version] = True
            except Unfit as unfit:
                fit[version] = False
                self._note_refusal(version, str(unfit))
        if not all(fit.get(v, True) for v in (self.live, self.previous, self.candidate) if v):
            previous = self.previous if self.previous and fit[self.previous] else None
            candidate = self.candidate if self.candidate and fit[self.candidate] else None
            live = self.live if fit[self.live] else previous or BASE
            await self._deploy(live, None if previous == live else previous, candidate, AUTO, "unfit at start")
        self._show_live()

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            await self._look()

    async def _look(self) -> None:
        try:
            await self.take_in()
            await self._unload_idle()
        except Exception as error:  # one bad look must not end the looking, nor the start
            log.error("take_in_failed", kind=type(error).__name__, where=places(error))

    async def take_in(self) -> None:
        """Bring new versions and finished rounds of the learner into the database, and deploy as the mode says."""
        new = [v for v in await asyncio.to_thread(self.registry.versions) if v not in self._known and v not in self.refused]
        for version in new:
            async with self._lock:
                if version not in self._known and version not in self.refused:  # an upload and the poll look at the same time
                    await self._take_in_version(version)
        await self._ask_about_the_next()
        for number in await asyncio.to_thread(self.rounds.finished):
            if number not in self._known_rounds:
                try:
                    record = await asyncio.to_thread(self.rounds.read, number)
                except ValueError as damaged:
                    log.warning("round_record_unreadable", round=number, kind=type(damaged).__name__)
                    self._known_rounds.add(number)
                    continue
                await self._db(self.store.take_in_round, number, record)
                self._known_rounds.add(number)
                self.last_round = record
                log.info("round_taken_in", round=number)

    async def _take_in_version(self, version: str) -> None:
        """One new version: verify, load, prove; then live, candidate or rejected as gate, checks and mode say."""
        try:
            manifest = await asyncio.to_thread(self.registry.manifest, version)
        except CorruptAdapter as damaged:
            self._note_refusal(version, str(damaged))
            return
        if _gate(manifest.to_dict()) == "rejected":
            await self._record(manifest, "rejected")
            self.refused[version] = GATE_FAILED
            return
        try:
            await self._load(version)
        except Unfit as unfit:
            await self._record(manifest, "rejected")
            self._note_refusal(version, str(unfit))
            await self._db(self.store.audit, AUTO, "refuse", {"version": version, "reason": str(unfit)})
            return
        mode = self.settings.promotion
        replaced = manifest.extra.get("live", manifest.parent) != self.live  # while its round ran, by an operator or by votes
        if mode == "auto" and manifest.gate is not None and not replaced:
            await self._deploy(version, self.live, None, AUTO, "publish", new=manifest)
        else:
            await self._record(manifest, "candidate")  # an operator's to promote; without a gate: an upload, `plaudit sft`
            if manifest.gate is not None:
                self.waiting = version  # the newest knows all that those before it do
        log.info("version_taken_in", version=version, gap_nats=self.gaps[version], mode=mode)

    async def _read_again(self, version: str) -> None:
        """A version whose manifest could not be read, now that an operator wants it: it may have been put right. Raises `NotPossible`."""
        try:
            manifest = await asyncio.to_thread(self.registry.manifest, version)
        except CorruptAdapter as damaged:
            raise NotPossible(f"{version} is not fit to serve: {damaged}") from damaged
        rejected = _gate(manifest.to_dict()) == "rejected"
        await self._record(manifest, "rejected" if rejected else "candidate")
        if rejected:
            self.refused[version] = GATE_FAILED
        else:
            del self.refused[version]

    async def _ask_about_the_next(self) -> None:
        """In canary mode: once votes have decided about a candidate, the newest version since is the next."""
        if self.settings.promotion != "canary":
            return
        async with self._lock:  # an upload and the poll may look at the same time
            version = self.waiting
            if self.candidate is not None or version is None:
                return
            if version not in (self.live, self.previous):
                try:
                    await self._load(version)
                    await self._deploy(self.live, self.previous, version, AUTO, "canary")
                except Unfit as unfit:
                    self._note_refusal(version, str(unfit))
            self.waiting = None  # where it could not be recorded it waits on

    async def _record(self, manifest: Manifest, status: str) -> None:
        await self._db(self.store.take_in_adapter, manifest.to_dict(), status)
        self._known.add(manifest.version)

    def _note_refusal(self, version: str, reason: str) -> None:
        self.refused[version] = reason
        self.metrics.refused.inc()
        log.warning("version_refused", version=version, reason=reason)

    # --- operators' and votes' decisions

    def pair(self) -> tuple[str, str]:
        """What votes decide between: the live version, and the candidate or else the version before."""
        return self.live, self.candidate or self.previous or BASE

    async def promote(self, version: str, actor: str, *, judged: tuple[str, str] | None = None) -> None:
        """Make `version` live before returning; nothing where `judged` is not the `pair` any more. Raises `UnknownModel`, `NotPossible`."""
        async with self._lock:
            if judged not in (None, self.pair()):
                return
            if version != BASE and version not in self._known:
                if version not in self.refused:
                    raise UnknownModel(f"there is no version {version[:64]!r}")
                await self._read_again(version)
            if self.refused.get(version) == GATE_FAILED:
                raise NotPossible(f"{version} is not fit to serve: {GATE_FAILED}")
            if version == self.live:
                raise NotPossible(f"{version} is live already")
            try:
                await self._load(version)
            except Unfit as unfit:
                raise NotPossible(f"{version} is not fit to serve: {unfit}") from unfit
            if self.refused.pop(version, None):  # its files were put right since
                await self._db(self.store.set_status, version, "candidate")
            candidate = None if version == self.candidate else self.candidate
            await self._deploy(version, self.live, candidate, actor, "promote")

    async def rollback(self, actor: str, action: str = "rollback", *, judged: tuple[str, str] | None = None) -> None:
        """Make the version before the live one live again, before returning; `judged` as in `promote`. Raises `NotPossible`."""
        async with self._lock:
            if judged not in (None, self.pair()):
                return
            if self.previous is None:
                raise NotPossible("there is no earlier version to go back to; promote one by name")
            try:
                await self._load(self.previous)
            except Unfit as unfit:
                raise NotPossible(f"{self.previous} is not fit to serve: {unfit}") from unfit
            await self._deploy(self.previous, None, self.candidate, actor, action)

    def count(self, shown: Shown, voter: str, groups: Sequence[Sequence[int]]) -> None:
        """Let a standing vote count in the A/B test."""
        self.scoreboard.put(shown.id, voter, shown.created, shown.versions, groups)

    def test(self) -> AbTest | None:
        """What people's votes say about the version under test against the one it was mixed with."""
        first, second = (self.candidate, self.live) if self.candidate else (self.live, self.previous)
        if first is None or second is None:
            return None
        return self.scoreboard.test(first, second, since=self.live_since, odds=self.settings.abtest_odds)

    async def weigh(self) -> None:
        """After a vote: promote or drop the candidate, or roll the live version back, when the votes decide it.

        An operator's choice is not rolled back, whatever they say; then all they decide is that the question is closed. A candidate may
        still take its place, which is what canary means. What cannot be recorded now is tried again after the next vote.
        """
        if self.candidate is None and self.previous is None:
            return
        test = self.test()
        if test is None or test.decision == "hold":
            return
        pair = self.pair()
        if self._settled.get(pair) == test.decision:
            return
        log.info("votes_decided", pair=pair, decision=test.decision, votes=test.votes, win_rate=test.win_rate)
        try:
            if self.candidate is not None and test.decision == "promote":
                await self.promote(self.candidate, AUTO, judged=pair)
            elif self.candidate is not None:
                async with self._lock:
                    if self.pair() == pair:
                        await self._deploy(self.live, self.previous, None, AUTO, "drop candidate")
            elif test.decision == "rollback" and not self.by_operator:
                await self.rollback(AUTO, "automatic rollback", judged=pair)
        except NotPossible as why:
            log.error("decision_not_carried_out", reason=str(why))
        except StoreError as trouble:
            log.error("decision_not_recorded", kind=type(trouble).__name__)
            return
        if self.pair() == pair:
            self._settled[pair] = test.decision

    # --- what is loaded

    async def _deploy(
        self, live: str, previous: str | None, candidate: str | None, actor: str, action: str, *, new: Manifest | None = None
    ) -> None:  # fmt: skip
        """Durable first, then for every request from here on. new: the version that is taken in with it."""
        if new is None:
            await self._db(self.store.deploy, live, previous, candidate, actor=actor, action=action)
        else:
            await self._db(self.store.take_in_adapter, new.to_dict(), "candidate", (live, previous, candidate), actor=actor, action=action)
            self._known.add(new.version)
        if live != self.live:
            self._settled.clear()  # a version that comes back is asked about anew
            self.live_since = time.time()
            self.by_operator = actor != AUTO
            self.metrics.swaps.labels(action).inc()
        self.live, self.previous, self.candidate = live, previous, candidate
        self._show_live()
        log.info("deployed", live=live, previous=previous, candidate=candidate, action=action)

    def _show_live(self) -> None:
        self.metrics.live.clear()
        self.metrics.live.labels(self.live).set(1)

    async def _load(self, version: str) -> None:
        """Verify and load `version` unless it is loaded. Raises `Unfit`."""
        if version in self._loaded:
            return
        _, gap = await load_verified(
            version, self.registry, self.bridge, self._base_digest, self._dtype, asyncio.to_thread
        )
        self.gaps[version] = gap
        self._loaded.add(version)

    async def _unload_idle(self) -> None:
        """Unload what nothing refers to: not deployed, no running request, not asked for lately."""
        async with self._lock:
            long_ago = time.monotonic() - self.idle_unload_s
            for version in self._loaded - {BASE, self.live, self.previous, self.candidate}:
                if not self._leases[version] and self._last_used.get(version, 0.0) < long_ago:
                    self._loaded.discard(version)  # before the await: from here on a request loads it anew
                    await self.bridge.call(partial(_unload, version))


def _unload(version: str, engine: Engine) -> None:
    engine.unload_version(version)


def _gate(manifest: dict[str, Any]) -> str | None:
    gate = manifest.get("gate")
    return gate.get("verdict") if isinstance(gate, dict) else None
