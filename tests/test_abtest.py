"""The sequential test: false-alarm odds under the null, power, and the outcomes it bets on."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from server.abtest import BETS, confidence_sequence, e_value, judge, pair_outcome

HORIZON = 400


def ever_reaches(rng: np.random.Generator, p: float, odds: float, runs: int, draw: str = "coin") -> float:
    """Share of simulated experiments, looked at after every vote, whose evidence ever reaches `odds`."""
    x = (rng.random((runs, HORIZON)) < p) * 1.0 if draw == "coin" else rng.beta(2 * p, 2 * (1 - p), (runs, HORIZON))
    wealth = sum(np.cumprod(1 + 2 * bet * (x - 0.5), axis=1) for bet in BETS) / len(BETS)  # (runs, votes)
    return float((wealth.max(axis=1) >= odds).mean())


def test_evidence_agrees_with_a_naive_loop_of_bettors() -> None:
    outcomes = [1.0, 0.0, 0.5, 1.0, 1.0, 0.25]
    fortunes = []
    for bet in BETS:
        fortune = 1.0
        for x in outcomes:
            fortune *= 1 + bet / 0.5 * (x - 0.5)
        fortunes.append(fortune)
    assert e_value(outcomes) == pytest.approx(sum(fortunes) / len(fortunes), rel=1e-12)


def test_evidence_is_a_martingale_under_the_null() -> None:
    """Exact expectation over all 2^10 coin sequences is 1, for both sides."""
    for side in (1, -1):
        total = sum(e_value([float(i >> k & 1) for k in range(10)], side=side) for i in range(1024))
        assert total / 1024 == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize("draw", ["coin", "beta"])
def test_false_alarms_stay_below_the_stated_odds_though_we_look_after_every_vote(draw: str) -> None:
    """4000 null experiments at odds 20: Ville's bound is 0.05. Were the true rate 0.05, binomial sd is 0.0034,
    so a wrong red at 0.062 has odds under 1 in 4000; a fixed-n z-test looked at every vote errs in over 0.3."""
    rate = ever_reaches(np.random.default_rng(7), 0.5, 20.0, 4000, draw)
    assert rate <= 0.062


def test_the_simulation_would_notice_a_test_that_peeks() -> None:
    rng = np.random.default_rng(7)
    wins = np.cumsum(rng.random((4000, HORIZON)) < 0.5, axis=1)
    n = np.arange(1, HORIZON + 1)
    z = (wins - n / 2) / np.sqrt(n / 4)
    assert ((z[:, 9:] > stats.norm.ppf(0.95)).any(axis=1)).mean() > 0.15


def test_a_clearly_better_version_is_found_within_a_hundred_votes() -> None:
    """Win rate 0.75, 100 votes: power at least 0.9 (measured about 0.99; 600 runs, sd at 0.9 is 0.012)."""
    rng = np.random.default_rng(3)
    hits = sum(judge((rng.random(100) < 0.75).astype(float).tolist()).decision == "promote" for _ in range(600))
    assert hits / 600 >= 0.9


def test_a_clearly_worse_version_is_rolled_back() -> None:
    assert judge([0.0] * 12).decision == "rollback"
    assert judge([1.0] * 12).decision == "promote"
    assert judge([0.5] * 1000).decision == "hold"
    assert judge([]).decision == "hold" and judge([]).win_rate is None


def test_the_order_of_votes_does_not_matter() -> None:
    outcomes = [1.0] * 9 + [0.0] * 4 + [0.5] * 3
    assert e_value(outcomes) == pytest.approx(e_value(outcomes[::-1]), rel=1e-12)


def test_the_confidence_sequence_covers_the_truth_at_all_times() -> None:
    """200 runs, looked at after 10, 20 ... 100 votes, alpha 0.05: misses above 0.10 have odds under 1 in 500."""
    rng, misses = np.random.default_rng(11), 0
    for _ in range(200):
        x = (rng.random(100) < 0.6).astype(float)
        bounds = [confidence_sequence(x[:n], 0.05) for n in range(10, 101, 10)]
        misses += any(not low <= 0.6 <= high for low, high in bounds)
    assert misses / 200 <= 0.10


def test_the_confidence_sequence_narrows() -> None:
    wide, narrow = confidence_sequence([1.0, 0.0] * 5), confidence_sequence([1.0, 0.0] * 200)
    assert narrow[1] - narrow[0] < 0.5 * (wide[1] - wide[0])
    assert narrow[0] < 0.5 < narrow[1]


def test_a_long_one_sided_run_does_not_overflow() -> None:
    assert e_value([1.0] * 5000) > 1e300
    assert e_value([1.0] * 5000, side=-1) < 1e-100
    assert math.isfinite(judge([1.0] * 300).low)


@pytest.mark.parametrize(
    ("versions", "groups", "expected"),
    [
        (["a", "b"], [[0], [1]], 1.0),
        (["a", "b"], [[1], [0]], 0.0),
        (["a", "b"], [[0, 1]], 0.5),
        (["a", "b"], [], None),  # none good: says nothing about which is better
        (["a", "a"], [[0], [1]], None),
        (["a", "b", "a"], [[0], [1, 2]], 0.75),  # 0 beats 1, 2 ties with 1
        (["a", "b", "b", "a"], [[1], [0]], 0.0),  # partial: 2 and 3 were not judged
    ],
)
def test_outcome_counts_cross_pairs_with_ties_half(versions: list[str], groups: list[list[int]], expected: float | None) -> None:
    assert pair_outcome(versions, groups, "a", "b") == expected
