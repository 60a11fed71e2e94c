"""engine/scheduler.py: the queue and the rows, by hand."""

from __future__ import annotations

import random

import pytest

from engine.scheduler import QueueFull, Scheduler
from engine.sequence import PromptRead, SamplingParams, Sequence


def read(name: str, count: int = 1, version: str = "base") -> PromptRead:
    return PromptRead([1, 2], version, [Sequence(i, [1, 2], SamplingParams(), version, text=name) for i in range(count)])


def admit(scheduler: Scheduler) -> list[str]:
    """Everything that may start now, started; the names."""
    names = []
    while (next_read := scheduler.next_read()) is not None:
        names.append(next_read.sequences[0].text)
        scheduler.join(next_read)
    return names


def test_the_first_to_come_is_the_first_to_run_even_if_a_later_one_would_fit() -> None:
    scheduler = Scheduler(max_sequences=4, max_queue=10)
    for name, count in [("a", 3), ("b", 2), ("c", 1)]:
        scheduler.add(read(name, count))
    assert admit(scheduler) == ["a"]
    scheduler.remove(scheduler.running[:1])
    assert admit(scheduler) == ["b"]
    assert (len(scheduler.running), scheduler.queued) == (4, 1)


def test_the_queue_is_bounded_in_sequences() -> None:
    scheduler = Scheduler(max_sequences=3, max_queue=4)
    scheduler.add(read("x", 3))
    admit(scheduler)
    scheduler.add(read("a", 3))
    scheduler.check_room(1)
    with pytest.raises(QueueFull, match="3 replies are waiting and the queue holds 4"):
        scheduler.check_room(2)


def test_what_finds_free_rows_is_never_refused_by_a_short_queue() -> None:
    scheduler = Scheduler(max_sequences=8, max_queue=1)
    scheduler.check_room(8)
    scheduler.add(read("a", 8))
    scheduler.check_room(1)
    with pytest.raises(QueueFull):
        scheduler.check_room(2)


def test_rows_stay_together_and_the_moves_say_how() -> None:
    scheduler = Scheduler(max_sequences=5, max_queue=10)
    scheduler.add(read("x", 5))
    admit(scheduler)
    a, b, c, d, e = scheduler.running
    assert scheduler.remove([b]) == [(e, 4, 1)]
    assert scheduler.running == [a, e, c, d]
    assert scheduler.remove([d]) == []  # the last leaves no hole
    assert scheduler.remove([a, e]) == [(c, 2, 1), (c, 1, 0)]
    assert scheduler.running == [c]


def test_replaying_the_moves_keeps_every_row_with_its_sequence() -> None:
    rng = random.Random(0)
    for _ in range(200):
        scheduler = Scheduler(max_sequences=12, max_queue=100)
        rows: list[object] = [None] * 12
        for _ in range(20):
            scheduler.add(read("x", rng.randrange(1, 5)))
            while (next_read := scheduler.next_read()) is not None:
                for row in scheduler.join(next_read):
                    rows[row] = scheduler.running[row]
            gone = rng.sample(scheduler.running, rng.randrange(len(scheduler.running) + 1))
            for who, src, dst in scheduler.remove(gone):
                assert rows[src] is who
                rows[dst] = who
            assert rows[: len(scheduler.running)] == scheduler.running
            assert not set(map(id, gone)) & set(map(id, scheduler.running))


def test_what_is_cancelled_leaves_the_queue_and_the_prompt_being_read() -> None:
    scheduler = Scheduler(max_sequences=2, max_queue=10)
    first, second = read("a", 2), read("b", 2)
    scheduler.add(first)
    scheduler.add(second)
    assert scheduler.next_read() is first
    scheduler.remove([first.sequences[0], second.sequences[1]])
    assert (len(first.sequences), len(second.sequences), scheduler.queued) == (1, 1, 2)
    scheduler.remove(list(first.sequences))
    assert scheduler.next_read() is second
    scheduler.remove(list(second.sequences))
    assert not scheduler.has_work()


def test_versions_are_counted_while_anything_is_pinned_to_them() -> None:
    scheduler = Scheduler(max_sequences=1, max_queue=10)
    scheduler.add(read("a", version="v1"))
    scheduler.add(read("b", version="v2"))
    admit(scheduler)
    assert scheduler.versions() == {"v1", "v2"}
    assert scheduler.active_versions() == {"v1"}
    scheduler.remove(list(scheduler.running))
    assert scheduler.versions() == {"v2"}
