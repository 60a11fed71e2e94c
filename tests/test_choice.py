"""Choosing what to show: the values by naive loops, the choice by search over all sets."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from benchmarks.active_choice import ratio, votes_for
from server.choice import POLICIES, choose, contrast, disagreement, information, prediction

SCORES = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2


def test_disagreement_is_the_variance_of_the_difference_over_members() -> None:
    rows = SCORES.numpy()
    expected = [[np.var(a - b) for b in rows] for a in rows]
    np.testing.assert_allclose(disagreement(SCORES).numpy(), expected, atol=1e-12)


def test_information_is_the_entropy_of_the_mixture_less_the_mean_entropy() -> None:
    for i, j in combinations(range(6), 2):
        p = [1 / (1 + math.exp(b - a)) for a, b in zip(SCORES[i].tolist(), SCORES[j].tolist(), strict=True)]
        expected = entropy([np.mean(p), 1 - np.mean(p)]) - np.mean([entropy([x, 1 - x]) for x in p])
        assert information(SCORES)[i, j].item() == pytest.approx(expected, abs=1e-12)
        assert information(SCORES)[j, i].item() == pytest.approx(expected, abs=1e-12)


def test_information_is_at_most_one_bit_where_members_are_certain_and_opposed_and_none_where_they_agree() -> None:
    opposed = torch.tensor([[1e4, -1e4], [0.0, 0.0]], dtype=torch.float64)
    assert information(opposed)[0, 1].item() == pytest.approx(math.log(2))
    agreed = torch.tensor([[3.0, 3.0], [-1.0, -1.0]], dtype=torch.float64)
    assert information(agreed)[0, 1].item() == pytest.approx(0, abs=1e-12) and disagreement(agreed)[0, 1].item() == 0


def test_prediction_is_the_mean_information_about_the_other_pairs_votes() -> None:
    pairs = list(combinations(range(6), 2))
    p = {(i, j): 1 / (1 + np.exp((SCORES[j] - SCORES[i]).numpy())) for i, j in pairs}

    def mutual(a: np.ndarray, b: np.ndarray) -> float:
        joint = [np.mean(x * y) for x in (a, 1 - a) for y in (b, 1 - b)]
        return entropy([a.mean(), 1 - a.mean()]) + entropy([b.mean(), 1 - b.mean()]) - entropy(joint)

    for i, j in pairs:
        expected = np.mean([mutual(p[i, j], p[other]) for other in pairs])
        assert prediction(SCORES)[i, j].item() == prediction(SCORES)[j, i].item() == pytest.approx(expected, abs=1e-12)


def test_contrast_shows_the_best_and_the_worst() -> None:
    means = SCORES.mean(1)
    assert set(choose(SCORES, 2, "contrast", 0)) == {int(means.argmax()), int(means.argmin())}
    assert contrast(SCORES).max().item() == pytest.approx(float(means.max() - means.min()))


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_the_pair_of_highest_value_is_shown(policy: str) -> None:
    value = POLICIES[policy](SCORES)
    best = max(combinations(range(6), 2), key=lambda pair: value[pair].item())
    for seed in range(5):
        assert tuple(sorted(choose(SCORES, 2, policy, seed))) == best


def test_three_are_the_best_pair_and_what_adds_most_to_it() -> None:
    value = information(SCORES)
    first, second = max(combinations(range(6), 2), key=lambda pair: value[pair].item())
    third = max(set(range(6)) - {first, second}, key=lambda i: (value[i, first] + value[i, second]).item())
    assert set(choose(SCORES, 3, "information", 7)) == {first, second, third}
    assert sorted(choose(SCORES, 6, "information", 7)) == list(range(6))


def test_equal_values_and_the_order_shown_are_left_to_chance() -> None:
    """2000 seeds; each count is within 5 standard deviations of its mean (odds of a false alarm under 1 in 10,000)."""
    shown = Counter(choose(torch.zeros(4, 3), 2, "information", seed) for seed in range(2000))
    assert len(shown) == 12  # every ordered pair
    assert all(abs(count - 2000 / 12) < 5 * (2000 / 12 * 11 / 12) ** 0.5 for count in shown.values())
    assert choose(torch.zeros(4, 3), 2, "information", 3) == choose(torch.zeros(4, 3), 2, "information", 3)


def test_scores_that_are_not_finite_choose_nothing() -> None:
    with pytest.raises(ValueError, match="not finite"):
        choose(torch.tensor([[0.0], [math.nan], [1.0]]), 2, "information", 0)


def test_votes_saved_are_read_off_the_curves() -> None:
    at = [10, 20, 30, 40]
    slow, fast = np.array([0.5, 0.6, 0.7, 0.8]), np.array([0.5, 0.7, 0.8, 0.8])
    assert votes_for(0.65, at, slow) == pytest.approx(25) and votes_for(0.65, at, fast) == pytest.approx(17.5)
    assert votes_for(0.5, at, slow) == 10
    assert ratio(at, slow, slow) == 1.0
    levels = np.linspace(0.65, 0.8, 16)
    expected = np.exp(np.mean([np.log(np.interp(x, slow, at) / np.interp(x, fast[:3], at[:3])) for x in levels]))
    assert ratio(at, slow, fast) == pytest.approx(expected)
    assert ratio(at, fast, slow) == pytest.approx(1 / expected)
