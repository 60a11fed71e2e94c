"""The contest with peers: the votes both sides read, which policy a budget bought, what is reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.judge import Judged
from benchmarks.peers import Run, against_ppo, beside, best_within, summary
from benchmarks.rival import preference_rows, read_voted, write_votes
from store.records import Comparison, Completion, Vote, VotedComparison


def voted(kind: str, groups: tuple[tuple[int, ...], ...]) -> VotedComparison:
    replies = tuple(Completion(i, text, (5, i), (-1.0, -0.5), "base", "stop", 7) for i, text in enumerate("abc"))
    vote = Vote("v", 1, "c", "ann", kind, groups, None, None, 0.0)
    comparison = Comparison("c", "k", "ann", ({"role": "user", "content": "Hi"},), {"temperature": 1.0}, 0.0, replies, (vote,))
    return VotedComparison(comparison, vote)


def judged(*points: float) -> Judged:
    won = sum(points) / len(points)
    return Judged(won, 0.0, 1.0, 0.8, won / 0.8, 2.0, 0.02, 0.02, 30.0, 0.9, 0.9, 0.0, points)


def run(method: str, rate: str, stop: str, points: tuple[float, ...], seconds: float, rollouts: float, update_s: float | None = 4.0, gb: int = 2) -> Run:
    return Run(method, rate, stop, judged(*points), seconds, rollouts, 1.0, update_s, gb)


def test_both_sides_read_the_same_votes_from_one_file(tmp_path: Path) -> None:
    votes = [voted("favourite", ((1,), (0, 2))), voted("tie", ((0, 1, 2),))]
    path = write_votes(tmp_path / "deep" / "votes.json", votes, [{"prompt": "Hi", "ids": (3, 4)}])
    assert read_voted(path) == votes
    kept = json.loads(path.read_text("utf-8"))
    assert kept["practice"] == [{"prompt": "Hi", "ids": [3, 4]}]
    assert [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in kept["pairs"]] == [("b", "a"), ("b", "c")]


def test_a_vote_becomes_a_row_for_every_pair_it_orders() -> None:
    rows = preference_rows([voted("ranking", ((2,), (0,), (1,)))])
    assert rows[0] == {
        "prompt": [{"role": "user", "content": "Hi"}],
        "chosen": [{"role": "assistant", "content": "c"}],
        "rejected": [{"role": "assistant", "content": "a"}],
    }
    assert {(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows} == {("c", "a"), ("c", "b"), ("a", "b")}


def test_a_budget_buys_what_it_stopped_and_passes_that_took_no_more_of_it() -> None:
    runs = [
        run("dpo", "low", "seconds", (0.6, 0.6), 61.0, 0), run("dpo", "low", "passes", (0.7, 0.7), 50.0, 0),
        run("dpo", "high", "seconds", (0.5, 0.5), 61.0, 0), run("dpo", "high", "passes", (0.9, 0.9), 70.0, 0),
        run("ppo", "low", "seconds", (0.8, 0.8), 61.0, 96), run("ppo", "low", "rollouts", (1.0, 1.0), 400.0, 480),
    ]  # fmt: skip
    assert best_within(runs, "dpo", "seconds", 60.0) == runs[1]  # 0.9 took 70 s
    assert best_within(runs, "dpo", "rollouts", 480) == runs[3]  # it samples nothing
    assert best_within(runs, "ppo", "seconds", 60.0) == runs[4]
    assert best_within(runs, "ppo", "rollouts", 480) == runs[5]
    assert best_within(runs, "rloo", "seconds", 60.0) is None


def test_ours_is_compared_prompt_by_prompt() -> None:
    row = beside(run("ours", "", "both", (1.0, 0.5), 60.0, 480), run("dpo", "low", "passes", (0.5, 0.5), 50.0, 0), "seconds")
    assert (row["ahead_by"], row["win_rate"], row["ours"]) == (0.25, 0.5, 0.75)
    assert row["half_width"] == pytest.approx(1.96 * 0.25, abs=1e-3)  # deviations 0.25 and -0.25: the mean's is 0.25


def test_an_update_and_memory_are_compared_with_the_least_that_ppo_took() -> None:
    mine = run("ours", "", "both", (1.0,), 60.0, 480, update_s=2.0, gb=3)
    peers = [run("ppo", "low", "seconds", (0.5,), 60.0, 9, 8.0, 12), run("ppo", "high", "seconds", (0.5,), 60.0, 9, 5.0, 20)]
    assert against_ppo(mine, [*peers, run("rloo", "low", "seconds", (0.5,), 60.0, 9, 1.0, 1)]) == {"update": 0.4, "memory": 0.25}
    assert against_ppo(mine, []) == {}


def test_the_targets_are_met_only_where_all_are_measured_and_every_peer_is_behind() -> None:
    rows = [{"method": m, "at": at, "ahead_by": gain} for m, gain in (("ppo", 0.2), ("dpo", 0.1)) for at in ("seconds", "rollouts")]
    found = summary([*rows, {"method": "dpo", "at": "seconds", "ahead_by": -0.05}], [{"update": 0.4, "memory": 0.5}], ["ppo", "dpo"])
    assert found["met"] == {"update": True, "memory": True, "ahead_at_equal_time": True}
    assert found["ahead_by"]["dpo"] == {"seconds": 0.025, "rollouts": 0.1}
    behind = summary([*rows, {"method": "dpo", "at": "seconds", "ahead_by": -0.3}], [{"update": 0.4, "memory": 0.6}], ["ppo", "dpo"])
    assert behind["met"] == {"update": True, "memory": False, "ahead_at_equal_time": False}
    assert not summary(rows, [], ["ppo", "dpo", "rloo"])["met"]["ahead_at_equal_time"]  # one that failed is not one that is behind
    assert not any(summary([], [{}], ["ppo"])["met"].values())
