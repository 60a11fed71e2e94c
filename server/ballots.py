"""Votes that come while the disk is busy with others are committed together: one wait for the disk serves all of them.

A durable commit takes milliseconds of waiting, whatever it holds; without this, votes a second would be bounded by it
(group commit: DeWitt et al. 1984). Owns who waits for which commit; `store/` owns the commit, `votes.py` the request.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any

from store.errors import NotFound
from store.records import Ballot, Vote
from store.store import Store

MOST = 256  # votes of one commit, so that other calls of the database do not wait long


class Ballots:
    """Takes votes on the event loop and writes them on the database's one thread, which `db` runs calls on in order."""

    def __init__(self, store: Store, db: Callable[..., Awaitable[Any]]) -> None:
        self._store, self._db = store, db
        self._waiting: deque[tuple[Ballot, Future[tuple[Vote, bool]]]] = deque()

    async def cast(self, ballot: Ballot) -> tuple[Vote, bool]:
        """As `Store.record_vote`: the vote is durable when this returns. Raises NotFound, StoreError."""
        cast: Future[tuple[Vote, bool]] = Future()
        self._waiting.append((ballot, cast))
        while not cast.done():
            await self._db(self._write)
        return cast.result()

    def _write(self) -> None:
        """Commit what waits by now; nothing, where an earlier call has taken it along."""
        batch = [self._waiting.popleft() for _ in range(min(MOST, len(self._waiting)))]
        if not batch:
            return
        try:
            made = self._store.record_votes([ballot for ballot, _ in batch])
        except Exception as error:
            for _, cast in batch:
                cast.set_exception(error)
            return
        for (_, cast), outcome in zip(batch, made, strict=True):
            if isinstance(outcome, NotFound):
                cast.set_exception(outcome)
            else:
                cast.set_result(outcome)
