"""Votes committed together: each has its own answer, and all are durable when they are answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from server.ballots import Ballots
from store import DiskFull, NotFound, Store
from store.records import Ballot, Completion, NewComparison, Shown


@pytest.fixture
def store(tmp_path: Path):
    with Store.open(tmp_path / "data") as opened:
        for i in range(20):
            replies = tuple(Completion(k, f"reply {k}", (1,), (-1.0,), version, "stop", 0) for k, version in enumerate(["base", "v000001"]))
            opened.record_comparison(NewComparison(f"cmp_{i}", f"conv_{i}", "ann", ({"role": "user", "content": "hi"},), {}, replies))
        yield opened


def ballot(number: int, voter: str = "ann") -> Ballot:
    return Ballot(f"cmp_{number}", voter, [[0], [1]], "favourite")


def judge(given: Ballot) -> Callable[[Shown], Ballot]:
    def as_shown(shown: Shown) -> Ballot:
        assert shown.id == given.comparison_id and shown.versions == ("base", "v000001")
        if shown.voter != given.voter:
            raise ValueError("not yours")
        return given

    return as_shown


def cast_all(store: Store, ballots: list[Ballot]) -> tuple[list[Any], int]:
    """Cast all at once; what came of each, and how many commits it took."""
    commits: list[str] = []
    store.db.conn.set_trace_callback(lambda sql: commits.append(sql) if sql == "commit" else None)

    async def run() -> list[Any]:
        with ThreadPoolExecutor(1) as thread:

            async def db(function: Callable[..., Any], *args: Any) -> Any:
                return await asyncio.get_running_loop().run_in_executor(thread, lambda: function(*args))

            slow = asyncio.create_task(db(time.sleep, 0.05))  # the disk is busy
            await asyncio.sleep(0)
            box = Ballots(store, db)
            outcomes = await asyncio.gather(*(box.cast(b.comparison_id, judge(b)) for b in ballots), return_exceptions=True)
            await slow
            return outcomes

    outcomes = asyncio.run(run())
    store.db.conn.set_trace_callback(None)
    return outcomes, len(commits)


def test_votes_that_wait_for_the_disk_share_one_commit(store: Store) -> None:
    outcomes, commits = cast_all(store, [ballot(i) for i in range(20)])
    assert commits == 1
    assert [cast.vote.comparison_id for cast in outcomes] == [cast.shown.id for cast in outcomes] == [f"cmp_{i}" for i in range(20)]
    assert all(cast.first for cast in outcomes)
    assert [v.vote.id for v in store.voted_comparisons()] == [cast.vote.id for cast in outcomes]


def test_the_later_of_two_votes_in_one_commit_stands(store: Store) -> None:
    (first, second), commits = cast_all(store, [ballot(3), Ballot("cmp_3", "ann", [[1], [0]], "favourite")])
    assert commits == 1 and first.first and not second.first
    assert [item.vote.groups for item in store.voted_comparisons()] == [((1,), (0,))]
    assert len(store.vote_history("cmp_3")) == 2


def test_a_vote_on_nothing_fails_alone(store: Store) -> None:
    outcomes, _ = cast_all(store, [ballot(1), Ballot("cmp_none", "ann", [[0], [1]], "favourite"), ballot(2)])
    assert isinstance(outcomes[1], NotFound)
    assert [item.comparison.id for item in store.voted_comparisons()] == ["cmp_1", "cmp_2"]


def test_a_vote_that_its_judge_refuses_fails_alone(store: Store) -> None:
    outcomes, commits = cast_all(store, [ballot(1), ballot(2, "eve"), ballot(3)])
    assert commits == 1 and isinstance(outcomes[1], ValueError)
    assert [item.comparison.id for item in store.voted_comparisons()] == ["cmp_1", "cmp_3"]


def test_a_client_that_leaves_does_not_hold_up_the_others(store: Store) -> None:
    async def run() -> Any:
        async def db(function: Callable[..., Any], *args: Any) -> Any:
            return await asyncio.to_thread(function, *args)

        box = Ballots(store, db)
        casts = [asyncio.create_task(box.cast(f"cmp_{i}", judge(ballot(i)))) for i in range(3)]
        await asyncio.sleep(0)
        casts[1].cancel()
        return await asyncio.gather(*casts, return_exceptions=True)

    first, left, last = asyncio.run(run())
    assert first.first and last.first and isinstance(left, asyncio.CancelledError)
    assert store.standing_votes() == 3


def test_a_commit_that_fails_fails_every_vote_in_it_and_keeps_none(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = store._insert_vote

    def full(db: Any, given: Ballot, now: float) -> Any:
        if given.comparison_id == "cmp_2":
            raise DiskFull("no room")
        return whole(db, given, now)

    monkeypatch.setattr(store, "_insert_vote", full)
    outcomes, _ = cast_all(store, [ballot(i) for i in range(4)])
    assert [type(outcome) for outcome in outcomes] == [DiskFull] * 4
    assert store.standing_votes() == 0 and store.voted_comparisons() == []


def test_more_votes_than_a_commit_holds_are_all_answered(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.ballots.MOST", 8)
    outcomes, commits = cast_all(store, [ballot(i) for i in range(20)])
    assert commits == 3 and len({cast.vote.id for cast in outcomes}) == 20
