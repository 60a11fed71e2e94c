"""Figures about reward models, against scipy, hand arithmetic and simulation."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest

from learner.metrics import (
    agreement,
    brier,
    clustered_accuracy,
    ece,
    judge,
    length_slope,
    pair_accuracy,
    paired_difference,
    reliability,
    strict_pairs,
    tied_pairs,
    votes_needed,
    wilson,
)


@pytest.mark.parametrize(("right", "n"), [(0, 7), (7, 7), (13, 20), (61, 100), (1, 1)])
def test_wilson_interval_is_scipys(right: int, n: int) -> None:
    expected = binomtest(right, n).proportion_ci(0.95, method="wilson")
    got = wilson(right / n, n)
    assert got.low == pytest.approx(expected.low, abs=1e-9)
    assert got.high == pytest.approx(expected.high, abs=1e-9)


def test_a_ranking_states_every_pair_between_groups_and_none_within() -> None:
    assert sorted(strict_pairs([[2], [0, 1], [3]])) == [(0, 3), (1, 3), (2, 0), (2, 1), (2, 3)]
    assert tied_pairs([[2], [1, 0], [3]]) == [(0, 1)]
    assert strict_pairs([[0, 1, 2]]) == [] and strict_pairs([]) == []


def test_pair_accuracy_by_hand() -> None:
    # pairs 0>1, 0>2: scores order the first rightly, tie on the second
    assert pair_accuracy([1.0, 0.0, 1.0], [[0], [1, 2]]) == 0.75
    assert pair_accuracy([1.0, 2.0], [[0, 1]]) is None


def test_independent_yes_no_decisions_give_the_plain_wilson_interval() -> None:
    shares = [1.0] * 13 + [0.0] * 7
    expected = binomtest(13, 20).proportion_ci(0.95, method="wilson")
    got = clustered_accuracy(shares)
    assert got.n == pytest.approx(19)  # the unbiased variance costs one decision, and Student's quantile is 2.09: a little wider
    assert got.low < expected.low and got.low == pytest.approx(expected.low, abs=0.02)


def test_repeating_every_decision_within_its_cluster_does_not_narrow_the_interval() -> None:
    shares = [1.0] * 13 + [0.0] * 7
    once = clustered_accuracy(shares)
    thrice = clustered_accuracy(shares * 3, list(range(20)) * 3)
    assert thrice.low == pytest.approx(once.low, abs=1e-9)
    assert clustered_accuracy(shares * 3).low > once.low + 0.05  # what ignoring the clusters would have claimed


def test_a_perfect_score_still_has_an_honest_lower_bound() -> None:
    expected = binomtest(9, 9).proportion_ci(0.979, method="wilson")  # 2.306, Student's quantile of 8 degrees of freedom
    assert clustered_accuracy([1.0] * 9).low == pytest.approx(expected.low, abs=2e-3)


@pytest.mark.parametrize("votes", [16, 60])
def test_scores_that_say_nothing_pass_for_better_than_chance_one_time_in_forty_however_many_pairs_a_vote_has(votes: int) -> None:
    """4,000 draws of favourites among four that no score foresees: the lower bound passes one half in 2.5%, and hardly ever with a vote
    as one decision, which is what it was; a scorer that knows something passes far more often."""
    rng = np.random.default_rng(4)
    pairs = [rng.integers(0, 4, votes) / 3 for _ in range(4000)]  # the share of three rivals that a favourite outranks
    passed = np.mean([clustered_accuracy(shares, None, 3 * votes).low > 0.5 for shares in pairs])
    assert 0.01 < passed < 0.033
    assert np.mean([clustered_accuracy(shares).low > 0.5 for shares in pairs]) < 0.01
    knows = [np.minimum(shares + rng.integers(0, 2, votes) / 3, 1) for shares in pairs[:400]]
    more, less = (np.mean([clustered_accuracy(shares, None, most).low > 0.5 for shares in knows]) for most in (3 * votes, votes))
    assert more > less + (0.1 if votes == 16 else -1e-9)


def test_ece_by_hand() -> None:
    # confidences 0.75 (right), 0.75 (wrong): one bin, mean confidence 0.75, accuracy 0.5
    assert ece([0.75, 0.25], [1, 1]) == pytest.approx(0.25)
    # weights: the right one counts three times -> accuracy 0.75, calibrated
    assert ece([0.75, 0.25], [3, 1]) == pytest.approx(0.0)


def test_a_calibrated_predictor_has_small_ece_and_a_boastful_one_has_not() -> None:
    rng = random.Random(0)
    true = [rng.uniform(0.5, 1.0) for _ in range(20000)]
    seen = [p if rng.random() < p else 1 - p for p in true]  # the winner is the likelier one with its probability
    ones = [1.0] * len(seen)
    assert ece(seen, ones) < 0.02  # standard error of a bin is about 0.01
    assert ece([0.99 if p > 0.5 else 0.01 for p in seen], ones) > 0.2


def test_brier_by_hand() -> None:
    assert brier([1.0, 0.5, 0.0], [1, 1, 2]) == pytest.approx((0 + 0.25 + 2) / 4)


def test_length_slope_is_the_maximum_of_the_penalised_likelihood() -> None:
    rng = np.random.default_rng(1)
    lengths = [[int(n) for n in rng.integers(3, 80, 3)] for _ in range(60)]
    groups = []
    for own in lengths:
        noisy = [math.log1p(n) * -1.5 + rng.gumbel() for n in own]
        best = int(np.argmax(noisy))
        groups.append([[best], [i for i in range(3) if i != best]])

    def negative(slope: float) -> float:
        total = 0.5 * 1e-2 * slope**2
        for own, ranking in zip(lengths, groups, strict=True):
            winner = ranking[0][0]
            for loser in ranking[1]:
                total += 0.5 * math.log1p(math.exp(-slope * (math.log1p(own[winner]) - math.log1p(own[loser]))))
        return total

    assert length_slope(lengths, groups) == pytest.approx(minimize_scalar(negative).x, abs=1e-4)
    assert length_slope(lengths, groups) < -0.5


def test_agreement_counts_only_different_voters_on_the_same_pair() -> None:
    votes = [
        ("p", "ann", ["a", "b"], [[0], [1]]),
        ("p", "bob", ["b", "a"], [[1], [0]]),  # the same pick, shown the other way round: agrees
        ("p", "cat", ["a", "b"], [[1], [0]]),  # disagrees with both
        ("p", "ann", ["a", "b"], [[0], [1]]),  # ann again: no new rater
        ("q", "bob", ["a", "b"], [[0], [1]]),  # another prompt
    ]
    got = agreement(votes)
    assert got is not None
    assert got["pairs"] == 3 and got["agreement"] == pytest.approx(1 / 3)
    assert agreement(votes[:1]) is None


def test_the_ceiling_recovers_the_raters_own_reliability() -> None:
    rng, q = random.Random(3), 0.8
    votes = [
        (item, voter, ["x", "y"], [[0], [1]] if rng.random() < q else [[1], [0]])
        for item in range(4000) for voter in ("ann", "bob")
    ]  # fmt: skip
    got = agreement(votes)
    assert got is not None and got["ceiling"] == pytest.approx(q, abs=0.02)


def test_votes_needed_is_the_first_count_at_which_the_bound_passes_one_half() -> None:
    p, n = 0.6, 40
    more = votes_needed(p, n, 40)
    assert more is not None
    assert wilson(p, n + more).low > 0.5 >= wilson(p, n + more - 1).low
    assert votes_needed(p, n, 20) == math.ceil(more / 2)  # where a vote is worth two decisions
    assert votes_needed(0.5, 40, 40) is None


def run(count: int, accuracy: float, seed: int = 0) -> list[float]:
    right = round(count * accuracy)
    values = [1.0] * right + [0.0] * (count - right)
    random.Random(seed).shuffle(values)
    return values


def test_verdict_not_yet_when_there_are_too_few_votes() -> None:
    verdict = judge([1.0] * 5, [0.5] * 5, list(range(5)), 8)
    assert (verdict.code, verdict.may_train) == ("not_yet", False) and "about 3 more votes" in verdict.words


def test_verdict_not_yet_when_the_lower_bound_does_not_beat_chance() -> None:
    verdict = judge(run(40, 0.6), run(40, 0.5, 1), list(range(40)), 8)
    assert (verdict.code, verdict.may_train) == ("not_yet", False)
    assert verdict.words.startswith("not yet: about 5") or verdict.words.startswith("not yet: about 6")  # 97 - 39


def test_verdict_works_when_it_beats_chance_and_length() -> None:
    verdict = judge(run(60, 0.8), run(60, 0.5, 1), list(range(60)), 8)
    assert (verdict.code, verdict.may_train) == ("works", True)


def test_a_taste_that_is_length_goes_ahead_and_says_so() -> None:
    same = run(60, 0.85)
    verdict = judge(same, same, list(range(60)), 8)
    assert (verdict.code, verdict.may_train) == ("only_length", True) and "length" in verdict.words


def test_a_length_taste_that_one_number_fits_better_still_goes_ahead() -> None:
    verdict = judge(run(96, 0.88), run(96, 0.96, 1), list(range(96)), 8)
    assert (verdict.code, verdict.may_train) == ("only_length", True)


def test_a_model_that_learned_much_less_than_length_is_stopped() -> None:
    verdict = judge(run(60, 0.68), run(60, 0.95, 1), list(range(60)), 8)
    assert (verdict.code, verdict.may_train) == ("not_yet", False) and "length alone gets 95%" in verdict.words


def test_paired_difference_by_hand() -> None:
    # differences 1, 0, 0, 1: mean 0.5, sample sd 0.5774, standard error 0.2887
    mean, half = paired_difference([1, 1, 0, 1], [0, 1, 0, 0], [1, 2, 3, 4])
    assert mean == 0.5 and half == pytest.approx(1.959964 * 0.288675, abs=1e-5)


def test_a_reliability_diagram_has_confidence_and_how_often_it_was_right() -> None:
    found = reliability([0.9, 0.8, 0.05, 0.6], [1, 1, 1, 2], bins=5)  # bins of 0.1 from 0.5
    assert found == [
        {"confidence": 0.6, "right": 1.0, "share": 0.4},
        {"confidence": 0.8, "right": 1.0, "share": 0.2},
        {"confidence": 0.925, "right": 0.5, "share": 0.4},
    ]  # by hand
