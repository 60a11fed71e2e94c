"""Quota: what it allows equals the `limits` library's sliding window, its waits are right, and it forgets who left."""

from __future__ import annotations

import random

import pytest
from limits import parse
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from server import quota
from server.errors import ApiError
from server.quota import Quota


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1_700_000_003.25]
    monkeypatch.setattr("server.quota.time.time", lambda: now[0])  # the module is shared: `limits` sees it too
    return now


def allowed(given: Quota, who: str) -> int | None:
    """None when it was allowed, else the seconds to wait."""
    try:
        given.spend("request", who)
    except ApiError as refused:
        assert refused.status_code == 429
        return int((refused.headers or {})["Retry-After"])
    return None


@pytest.mark.parametrize("rate", ["5/second", "7/minute", "1/minute", "20/hour"])
def test_it_allows_what_the_library_allows(rate: str, clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("limits.storage.memory.threading.Timer.start", lambda _: None)
    library, ours, draw = SlidingWindowCounterRateLimiter(MemoryStorage()), Quota(rate, rate), random.Random(3)
    item, refusals = parse(rate), 0
    for _ in range(2_000):
        clock[0] += draw.expovariate(item.amount / item.get_expiry() * draw.choice([1, 6, 12]))
        who = draw.choice("ab")
        ok = library.hit(item, "request", who)
        assert (allowed(ours, who) is None) == ok
        refusals += not ok
    assert 100 < refusals < 1_900


@pytest.mark.parametrize("rate", ["7/minute", "1/minute", "20/hour"])
def test_one_who_waits_as_told_is_let_in_and_one_who_comes_earlier_is_not(rate: str, clock: list[float]) -> None:
    given, draw, span = Quota(rate, rate), random.Random(5), parse(rate).get_expiry()
    waits = 0
    for _ in range(300):
        clock[0] += draw.uniform(0, span / 10)
        if (wait_s := allowed(given, "a")) is None:
            continue
        waits += 1
        told = clock[0]
        clock[0] = told + max(0.0, wait_s - 1.001)
        early = allowed(given, "a")
        if wait_s > 1:
            assert early is not None
        clock[0] = told + wait_s + 1e-3
        assert early is None or allowed(given, "a") is None
    assert waits > 20


def test_who_left_is_forgotten_and_who_stayed_is_not(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quota, "SWEEP", 50)
    given = Quota("2/minute", "2/minute")
    for n in range(50):
        assert allowed(given, f"early-{n}") is None
    clock[0] += 120
    assert allowed(given, "now") is None and allowed(given, "now") is None
    assert allowed(given, "late") is None
    assert {who for _, who in given._windows} == {"now", "late"}
    assert allowed(given, "now") is not None
