"""The comparison of reward models on real votes: parts of folds, accuracies, which side is ahead."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from benchmarks.reward_peers import accuracies, compared, example_of, parts_of
from learner.data import Fold, RankedExample


def example(*groups: tuple[int, ...]) -> RankedExample:
    return RankedExample((1, 2), ((3,), (4, 5)), groups, "ann", "p", "k", "v", "c", accepted=(0,))


def test_smaller_parts_lie_within_larger_and_tests_stay_whole() -> None:
    folds = [Fold(tuple(range(20, 100)), tuple(range(20))), Fold(tuple(range(80)), tuple(range(80, 100)))]
    quarter, half, whole = (parts_of(folds, part, 3) for part in (0.25, 0.5, 1.0))
    for fold, small, middle, large in zip(folds, quarter, half, whole, strict=True):
        assert (len(small.train), len(middle.train)) == (20, 40)
        assert set(small.train) < set(middle.train) < set(large.train) == set(fold.train)
        assert small.test == middle.test == large.test == fold.test


def test_an_example_survives_the_way_to_another_process() -> None:
    own = example((1,), (0,))
    assert example_of(json.loads(json.dumps(asdict(own)))) == own


def test_a_vote_is_right_where_the_held_out_scores_order_it_as_the_voter_did() -> None:
    votes = [example((0,), (1,)), example((1,), (0,)), example((0,), (1,))]
    assert accuracies({2: [0.0, 0.0], 0: [2.0, 1.0], 1: [2.0, 1.0]}, votes) == {0: 1.0, 1: 0.0, 2: 0.5}


def test_ours_is_compared_with_the_better_of_the_peers_rates_on_all_votes() -> None:
    def row(who: str, rate: str, part: float, right: tuple[float, ...], seconds: float) -> dict:
        return {"who": who, "rate": rate, "part": part, "votes": int(8 * part), "right": dict(enumerate(right)), "seconds": seconds, "peak_bytes": 4}

    rows = [
        row("ours", "", 0.5, (0, 1, 0, 1), 1.0), row("trl", "low", 0.5, (1, 1, 1, 1), 5.0), row("trl", "high", 0.5, (0, 0, 0, 0), 5.0),
        row("ours", "", 1.0, (1, 1, 0, 1), 2.0), row("trl", "low", 1.0, (0, 0, 0, 1), 3.0), row("trl", "high", 1.0, (1, 0, 0, 1), 6.0),
    ]  # fmt: skip
    found = compared(rows, dict.fromkeys(range(4), 0.5), range(4))
    assert (found["accuracy"]["value"], found["peer_accuracy"]["value"], found["peer_rate"]) == (0.75, 0.5, "high")
    assert (found["ahead_by"], found["speed"], found["length_only"]["value"]) == (0.25, 3.0, 0.5)
    assert found["half_width"] == pytest.approx(1.96 * 0.25, abs=1e-3)  # differences 0, 1, 0, 0: deviation 0.5 of four
    assert found["met"] == {"accuracy": True, "speed": True}
    assert [(point["who"], point["votes"], point["value"]) for point in found["learning_curve"]] == [
        ("ours", 4, 0.5), ("ours", 8, 0.75), ("trl", 4, 1.0), ("trl", 8, 0.5),
    ]  # fmt: skip
    slow = compared([row("ours", "", 1.0, (0, 0), 4.0), row("trl", "low", 1.0, (1, 0), 5.0)], {0: 0.5, 1: 0.5}, range(2))
    assert slow["met"] == {"accuracy": False, "speed": False}
