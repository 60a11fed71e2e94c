"""Votes that come while the disk is busy with others are judged and committed together: one wait for the disk serves all.

A durable commit takes milliseconds of waiting, whatever it holds; without this, votes a second would be bounded by it
(group commit: DeWitt et al. 1984). Owns who waits for which commit; `store/` owns the commit, `votes.py` the request.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from store.errors import NotFound
from store.records import Ballot, Shown, Vote
from store.store import Store

MOST = 256  # votes of one commit, so that other calls of the database do not wait long
Judge = Callable[[Shown], Ballot]


@dataclass(frozen=True)
class Cast:
    """A vote that is durable."""

    vote: Vote
    first: bool  # the voter had none on this comparison
    shown: Shown


class Ballots:
    """Takes votes on the event loop and writes them through `db`, which runs calls of the database in order."""

    def __init__(self, store: Store, db: Callable[..., Awaitable[Any]]) -> None:
        self._store, self._db = store, db
        self._waiting: deque[tuple[str, Judge, asyncio.Future[Cast]]] = deque()
        self._writing: asyncio.Task[None] | None = None

    async def cast(self, comparison_id: str, judge: Judge) -> Cast:
        """Record the ballot that `judge` makes of what was shown; durable when this returns.

        Raises NotFound, StoreError, and what `judge` does (on the database's thread: it only computes).
        """
        cast: asyncio.Future[Cast] = asyncio.get_running_loop().create_future()
        self._waiting.append((comparison_id, judge, cast))
        if self._writing is None:
            self._writing = asyncio.create_task(self._write(), name="ballots")
        return await cast

    async def _write(self) -> None:
        """Commit what waits, until nothing does."""
        while self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(MOST, len(self._waiting)))]
            try:
                outcomes = await self._db(self._commit, [(comparison_id, judge) for comparison_id, judge, _ in batch])
            except Exception as error:
                outcomes = [error] * len(batch)
            for (_, _, cast), outcome in zip(batch, outcomes, strict=True):
                if cast.done():  # the client left; the vote counts
                    continue
                if isinstance(outcome, Exception):
                    cast.set_exception(outcome)
                else:
                    cast.set_result(outcome)
        self._writing = None

    def _commit(self, wanted: list[tuple[str, Judge]]) -> list[Cast | Exception]:
        """What came of each, in order. Raises StoreError when the commit fails: then none was kept."""
        shown = self._store.shown([comparison_id for comparison_id, _ in wanted])
        outcomes: list[Cast | Exception] = []
        ballots: list[tuple[int, Ballot]] = []
        for place, (comparison_id, judge) in enumerate(wanted):
            outcomes.append(NotFound("there is no such comparison"))
            if comparison_id in shown:
                try:
                    ballots.append((place, judge(shown[comparison_id])))
                except Exception as refused:  # this one's, not the others'
                    outcomes[place] = refused
        for (place, ballot), made in zip(ballots, self._store.record_votes([b for _, b in ballots]) if ballots else [], strict=True):
            outcomes[place] = made if isinstance(made, NotFound) else Cast(*made, shown[ballot.comparison_id])
        return outcomes
