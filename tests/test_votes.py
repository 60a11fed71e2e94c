"""The benchmark of votes needed: its people, and the sums over its rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.votes import FAR, NEAR, People, kept, lines, summary, votes_for
from learner.tastes import taste_named
from store.records import Comparison, Completion


def comparison(*texts: str) -> Comparison:
    shown = tuple(Completion(i, text, (1, 2), (-1.0, -1.0), "base", "stop", 0) for i, text in enumerate(texts))
    return Comparison("c", "c", "", ({"role": "user", "content": "Hi"},), {}, 0.0, shown)


def row(votes: int, share: float, taste: str = "list", seed: int = 0, **more: float) -> dict:
    return {
        "taste": taste, "seed": seed, "votes": votes, "share": share, "best_of_8": 1.0, "kl": 2.0, "broken": 0.03, "base_broken": 0.02,
        "base_probe_accuracy": 1.0, "probe_accuracy": 1.0, "round_s": 10.0,
    } | more  # fmt: skip


def test_people_pick_what_they_like_and_the_careless_pick_anything() -> None:
    shown = comparison("one two three", "one", "one two", "one two three four")
    careful = People(taste_named("shorter"), noise=0.0, careless=0.0, seed=0)
    assert {careful.vote(i, shown).vote.groups for i in range(50)} == {((1,), (0, 2, 3))}
    some = People(taste_named("shorter"), noise=0.0, careless=0.2, seed=0)
    picks = [some.vote(i, shown).vote for i in range(500)]
    assert {v.voter for v in picks if v.groups[0] != (1,)} == some.careless and len(some.careless) == 1
    assert sum(v.groups[0] != (1,) for v in picks) == pytest.approx(75, abs=25)  # a fifth of the votes, three in four of them wrong


def test_a_comparison_of_equals_is_a_tie() -> None:
    voted = People(taste_named("list"), noise=0.0, careless=0.0, seed=0).vote(3, comparison("a", "b"))
    assert voted.vote.kind == "tie" and voted.vote.groups == ((0, 1),) and voted.vote.seq == 4


def test_votes_for_a_share_lie_on_the_line_between_two_rounds() -> None:
    assert votes_for([row(30, 0.7), row(60, 1.0)], 0.9) == pytest.approx(50)
    assert votes_for([row(40, 0.9)], 0.7) == pytest.approx(20)  # half way from 0.5, where nothing is known
    assert votes_for([row(30, 0.7), row(60, 0.8)], 0.9) is None


def test_the_summary_takes_medians_and_the_worst() -> None:
    rows = [row(60, 0.8, seed=0), row(60, 0.9, seed=1, kl=5.0), row(60, 1.0, taste="shorter", broken=0.05)]
    found = summary(rows)
    assert found["at"]["60"]["median_share"] == 0.9 and found["at"]["60"]["worst_share"] == 0.8
    assert found["at"]["60"]["largest_kl"] == 5.0 and found["at"]["60"]["largest_broken_rise"] == pytest.approx(0.03)
    assert found["votes_for_0.9"]["list"] == [None, pytest.approx(60)]


def test_the_chart_takes_medians_over_seeds_and_the_best_rate_of_dpo_near_and_far() -> None:
    def both(votes: int, share: float, low: float, high: float, seed: int) -> dict:
        return row(votes, share, seed=seed) | {"dpo": [{"share": low, "kl": 1.0}, {"share": high, "kl": 40.0}]}

    found = lines([both(60, 0.9, 0.6, 0.7, 0), both(30, 0.7, 0.4, 0.2, 0), both(60, 0.7, 0.8, 0.6, 1), both(30, 0.8, 0.4, 0.6, 1), row(60, 0.9, seed=2)])
    assert found["Plaudit"] == [(0, 0.5, 0.0), (30, 0.75, 2.0), (60, 0.9, 2.0)]
    assert found[NEAR] == [(0, 0.5, 0.0), (30, 0.5, 0.0), (60, pytest.approx(0.7), 1.0)]  # at 30 neither rate beats the base, within 6 nats
    assert found[FAR] == [(0, 0.5, 0.0), (30, pytest.approx(0.55), 20.0), (60, 0.75, 20.5)]


def test_a_course_is_taken_from_its_file_only_when_it_is_whole_there(tmp_path: Path) -> None:
    file, asked = tmp_path / "rows.jsonl", {"taste": "list", "seed": 0}
    assert kept(file, asked, [30, 60]) == [] == kept(None, asked, [30])
    rows = [row(30, 0.7), row(30, 0.8), row(60, 0.9, seed=1), row(60, 0.9, taste="formal")]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert kept(file, asked, [30, 60]) == []
    file.write_text(file.read_text() + json.dumps(row(60, 0.95)) + "\n")
    assert [r["share"] for r in kept(file, asked, [30, 60])] == [0.8, 0.95]
