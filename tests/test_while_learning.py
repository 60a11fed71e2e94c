"""The benchmarks of a server: the sums over what was measured, and the load they make."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from benchmarks.http_votes import echoing, load
from benchmarks.serving import cpu_seconds, machine_cpu_seconds
from benchmarks.while_learning import Stage, gap_figures, ppo_speed, shares, within


def test_the_learners_share_is_of_what_the_chat_leaves() -> None:
    # One core used alone, two cores, the chat takes 1.5: half a core is left, so half the speed was possible.
    assert shares(40.0, 100.0, 1.5, 1.0, 2) == {"left_cores": 0.5, "possible_tokens_per_s": 50.0, "learner_share": 0.8}
    assert shares(80.0, 100.0, 0.5, 1.0, 2)["learner_share"] == 0.8  # more is left than it can use
    assert shares(50.0, 100.0, 1.0, 2.0, 2)["learner_share"] == 1.0


def test_gaps_count_in_the_stage_in_which_they_ended() -> None:
    stages = [Stage("idle", 0.0, 10.0, 1.0, 0.0, 0.0), Stage("ppo", 10.0, 20.0, 1.0, 5.0, 0.0), Stage("idle", 20.0, 30.0, 1.0, 0.0, 0.0)]
    gaps = [(5.0, 0.1), (10.0, 0.2), (19.9, 0.3), (25.0, 0.4), (31.0, 0.5)]
    assert within(gaps, [stages[0], stages[2]]) == [0.1, 0.4]
    assert within(gaps, [stages[1]]) == [0.2, 0.3]
    figures = gap_figures([0.001] * 98 + [0.1] * 2)
    assert figures["median_ms"] == 1.0 and figures["p99_ms"] == pytest.approx(100.0)
    with pytest.raises(RuntimeError, match="only 3 tokens"):
        gap_figures([0.1] * 3)


def test_ppo_speed_leaves_out_the_turn_that_only_measures() -> None:
    history = [{"tokens_per_second": 100.0, "seconds": 1.0}, {"tokens_per_second": 200.0, "seconds": 3.0}, {"seconds": 9.0}]
    assert ppo_speed({"ppo": {"history": history}}) == 175.0
    with pytest.raises(RuntimeError, match="not_ready: too few"):
        ppo_speed({"state": "not_ready", "reason": "too few", "ppo": None})


def test_cpu_seconds_are_those_of_the_process_asked_about() -> None:
    before, mine = cpu_seconds(os.getpid()), time.process_time()
    while time.process_time() - mine < 0.2:
        sum(range(1000))
    assert cpu_seconds(os.getpid()) - before == pytest.approx(0.2, abs=0.05)
    assert machine_cpu_seconds() >= cpu_seconds(os.getpid()) > 0
    with pytest.raises(RuntimeError, match="has ended"):
        cpu_seconds(2**22 + 1)


def test_the_load_is_answered_whole_or_it_is_an_error(tmp_path: Path) -> None:
    with echoing() as url:
        seconds, latencies = load(url, [f"/echo/{i}" for i in range(50)], ["ann", "bob", "cid"])
        assert len(latencies) == 50 and max(latencies) <= seconds
        with pytest.raises(RuntimeError, match="404"):
            load(url, ["/echo/1", "/nothing"], ["ann", "bob"])
