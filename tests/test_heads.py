"""Heads on fixed features: the optimum that scipy finds, what ties, refusals and penalties do to it."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from engine.features import COUNTS
from engine.model import CausalModel
from learner.data import RankedExample, split_folds
from learner.heads import HeldOut, learning_curve, linear_probe, ridges
from learner.metrics import pair_accuracy
from learner.reward import RewardModel
from learner.reward_fit import base_features
from tests.ranked import SMALL, example, repeating_wins, shortest_wins


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> CausalModel:
    return CausalModel.load(tiny_llama)


def test_the_probe_is_the_optimum_that_scipy_finds() -> None:
    rng = np.random.default_rng(0)
    features = [torch.tensor(rng.normal(size=(3, 4)), dtype=torch.float32) for _ in range(12)]
    examples = [example((5,), [(6,), (7,), (8,)], [[int(rng.integers(3))]], n) for n in range(12)]
    examples = [
        example((5,), [(6,), (7,), (8,)], [[e.groups[0][0]], [i for i in range(3) if i != e.groups[0][0]]], n)
        for n, e in enumerate(examples)
    ]
    weights, ridge = torch.tensor(rng.uniform(0.5, 1.5, 12), dtype=torch.float32), 0.3
    flat = np.concatenate([f.numpy() for f in features]).astype(float)
    mean, scale = flat.mean(0), flat.std(0, ddof=1) * 2.0  # sqrt(D) = 2

    def objective(w: np.ndarray) -> float:
        total = ridge / 2 * w @ w
        for own, e, weight in zip(features, examples, weights.tolist(), strict=True):
            scores = (own.numpy() - mean) / scale @ w
            winner = e.groups[0][0]
            total += weight * np.mean([np.log1p(np.exp(scores[loser] - scores[winner])) for loser in e.groups[1]])
        return float(total)

    best = minimize(objective, np.zeros(4), method="BFGS", options={"gtol": 1e-9}).x
    head, bias, _ = linear_probe(examples, features, weights, ridge)
    assert head.numpy() == pytest.approx(best / scale, abs=1e-4)
    scores = torch.cat(features) @ head + bias
    assert float(scores.mean()) == pytest.approx(0.0, abs=1e-5)


def test_counts_are_cheaper_and_bend_only_where_a_line_does_not_do(model: CausalModel) -> None:
    """The optimum that scipy finds where x^2 has lost what a line through x explains, and both count eight times their deviation."""
    rng = np.random.default_rng(3)
    x = rng.uniform(1, 4, size=(30, 3))
    flat = np.stack([rng.normal(size=(30, 3)), x, x**2], 2)
    best = [int(np.argmin(abs(row - 2.5))) for row in x]  # the one in the middle is liked
    examples = [example((5,), [(6,), (7,), (8,)], [[b], [i for i in range(3) if i != b]], n) for n, b in enumerate(best)]
    rows = flat.reshape(-1, 3)
    line = np.polyfit(rows[:, 1], rows[:, 2], 1)
    parts = np.stack([rows[:, 0], rows[:, 1], rows[:, 2] - np.polyval(line, rows[:, 1])], 1)
    z = ((parts - parts.mean(0)) / parts.std(0, ddof=1) * [1, 8, 8] / np.sqrt(3)).reshape(30, 3, 3)

    def objective(w: np.ndarray) -> float:
        return float(0.3 / 2 * w @ w + sum(np.mean([np.log1p(np.exp((own[i] - own[b]) @ w)) for i in range(3) if i != b]) for own, b in zip(z, best, strict=True)))

    expected = z @ minimize(objective, np.zeros(3), method="BFGS", options={"gtol": 1e-9}).x
    head, bias, _ = linear_probe(examples, [torch.tensor(own, dtype=torch.float32) for own in flat], torch.ones(30), 0.3, counts=2)
    found = torch.tensor(flat, dtype=torch.float32) @ head + bias
    assert found.numpy() == pytest.approx(expected, abs=2e-3)
    assert np.mean(found.argmax(1).numpy() == best) > 0.9


def test_the_probe_recovers_a_planted_bradley_terry_scale() -> None:
    """Picks drawn from known scores, whose scale the fit must find: within 15%, 3 standard errors at 3000 votes."""
    rng = np.random.default_rng(1)
    truth = np.array([1.2, -0.7, 0.4])
    features, examples = [], []
    for n in range(3000):
        x = rng.normal(size=(2, 3))
        first = rng.random() < 1 / (1 + math.exp(-(x[0] - x[1]) @ truth))
        features.append(torch.tensor(x, dtype=torch.float32))
        examples.append(example((5,), [(6,), (7,)], [[0], [1]] if first else [[1], [0]], n))
    head, _, _ = linear_probe(examples, features, torch.ones(3000), 1e-3)
    assert head.numpy() == pytest.approx(truth, rel=0.15)


def test_ties_pull_scores_together() -> None:
    features = [torch.tensor([[1.0, 0.3], [0.0, -0.2]]), torch.tensor([[2.0, 0.1], [0.5, 0.4]])]
    strict = [example((5,), [(6,), (7,)], [[0], [1]], n) for n in range(2)]
    mixed = [strict[0], example((5,), [(6,), (7,)], [[0, 1]], 1, ties=True)]
    apart, _, _ = linear_probe(strict, features, torch.ones(2), 0.1)
    closer, _, _ = linear_probe(mixed, features, torch.ones(2), 0.1)
    assert float((features[1] @ closer).diff()) > float((features[1] @ apart).diff())  # 0 - 1, negative: nearer to 0


def luce_with_none(count: int, seed: int, level: float) -> tuple[list[RankedExample], list[torch.Tensor], np.ndarray, np.ndarray]:
    """Choices among three replies and "none of them" by Luce: examples, features, and (features, choice) for an oracle."""
    rng = np.random.default_rng(seed)
    truth, rows, picks = np.array([1.0, -0.6, 0.4]), rng.normal(size=(count, 3, 3)), []
    rows -= rows.mean((0, 1))  # scores are about the mean reply's, and so is the level
    for x in rows:
        picks.append(int((np.append(x @ truth, level) + rng.gumbel(size=4)).argmax()))
    blank = [example((5,), [(6,), (7,), (8,)], [], n) for n in range(count)]
    examples = [
        replace(e, refused=(0, 1, 2)) if c == 3 else replace(e, groups=((c,), tuple(i for i in range(3) if i != c)), accepted=(c,))
        for e, c in zip(blank, picks, strict=True)
    ]
    return examples, [torch.tensor(x, dtype=torch.float32) for x in rows], rows, np.array(picks)


def test_the_probe_with_an_outside_option_is_the_optimum_that_scipy_finds() -> None:
    examples, features, rows, picks = luce_with_none(30, 0, 0.5)
    assert 5 < sum(bool(e.refused) for e in examples) < 25
    scale = rows.reshape(-1, 3).std(0, ddof=1) * math.sqrt(3)

    def objective(p: np.ndarray) -> float:
        total = 0.2 / 2 * p[:3] @ p[:3]
        for x, c in zip(rows, picks, strict=True):
            s = x / scale @ p[:3]
            if c == 3:
                total += np.log1p(np.exp(s - p[3])).mean()
            else:
                total += np.mean([np.log1p(np.exp(s[j] - s[c])) for j in range(3) if j != c]) + np.log1p(np.exp(p[3] - s[c])) / 3
        return float(total)

    best = minimize(objective, np.zeros(4), method="BFGS", options={"gtol": 1e-9}).x
    probe = linear_probe(examples, features, torch.ones(30), 0.2)
    assert probe.weight.numpy() == pytest.approx(best[:3] / scale, abs=1e-4)
    assert float(probe.level) == pytest.approx(best[3], abs=1e-4)


@pytest.mark.parametrize("level", [0.0, 1.5])
def test_the_level_of_simulated_voters_is_found(level: float) -> None:
    """3000 choices: within 0.2, and as near as scipy's maximum likelihood of the whole choice (multinomial logit) comes."""
    examples, features, rows, picks = luce_with_none(3000, 1, level)

    def nll(p: np.ndarray) -> float:
        utility = np.concatenate([rows @ p[:3], np.full((len(rows), 1), p[3])], axis=1)
        return float((np.log(np.exp(utility).sum(1)) - utility[np.arange(len(rows)), picks]).mean())

    oracle = minimize(nll, np.zeros(4), method="BFGS").x
    probe = linear_probe(examples, features, torch.ones(3000), 1e-3)
    found = [*probe.weight.tolist(), float(probe.level)]
    assert found == pytest.approx([1.0, -0.6, 0.4, level], abs=0.2)
    assert found == pytest.approx(oracle, abs=0.12)  # pairs waste a little of what the choice says


def test_one_edit_unlike_all_replies_shown_does_not_run_away_with_the_head() -> None:
    """Replies shown have one or two sentence ends, so that the count's square is a line in it; one edit has four."""
    rng = np.random.default_rng(0)
    examples, features = [], []
    for n in range(40):
        ends = [*rng.integers(1, 3, 4), *([4] if n == 0 else [])]
        count = np.log1p(ends)[:, None]
        features.append(torch.tensor(np.concatenate([rng.normal(size=(len(ends), 12)), count, count**2], 1), dtype=torch.float32))
        made = example((5,), [(6,)] * len(ends), [[0], [1, 2, 3]], n)
        examples.append(replace(made, edit_beats=(0,)) if n == 0 else made)
    head = linear_probe(examples, features, torch.ones(40), 0.4, 2).weight
    per_end = [float(math.log1p(ends) * head[-2] + math.log1p(ends) ** 2 * head[-1]) for ends in (2, 4)]
    assert 0 < per_end[1] - per_end[0] < 6.0  # logits; 18 when scaled by the replies shown alone


def test_none_good_votes_make_better_scores() -> None:
    """40 choices of which about half are refusals, 12 draws: more pairs right than without them, by 2 standard errors."""
    gains = []
    for seed in range(12):
        examples, features, _, _ = luce_with_none(40, 100 + seed, 1.5)
        kept = [i for i, e in enumerate(examples) if not e.refused]
        fresh = np.random.default_rng(seed).normal(size=(4000, 3))
        right = []
        for rows in (range(40), kept):
            head = linear_probe([examples[i] for i in rows], [features[i] for i in rows], torch.ones(len(rows)), 0.3).weight.numpy()
            right.append(np.mean((fresh @ head > 0) == (fresh @ [1.0, -0.6, 0.4] > 0)))
        gains.append(right[0] - right[1])
    assert np.mean(gains) > 2 * np.std(gains, ddof=1) / math.sqrt(12)


def test_without_refusals_the_outside_option_is_not_there() -> None:
    examples, features, _, _ = luce_with_none(40, 2, 0.0)
    kept = [(e, x) for e, x in zip(examples, features, strict=True) if not e.refused]
    picks, own = [e for e, _ in kept], [x for _, x in kept]
    silent = [replace(e, accepted=()) for e in picks]
    one, two = (linear_probe(rows, own, torch.ones(len(rows)), 0.1) for rows in (picks, silent))
    assert torch.equal(one.weight, two.weight) and float(one.level) == 0.0
    refusals = [replace(e, accepted=()) for e in examples]  # nor with refusals alone, which have no finite level
    only = linear_probe(refusals, features, torch.ones(40), 0.1)
    assert float(only.level) == 0.0


def test_clear_tastes_get_a_small_penalty_and_noise_a_large_one(model: CausalModel) -> None:
    rng, clear = random.Random(1), repeating_wins(30, 11)
    features = base_features(RewardModel.create(model, SMALL, 1), clear)
    noise = [replace(e, groups=((best := rng.randrange(3),), tuple(i for i in range(3) if i != best))) for e in clear]
    split = split_folds(clear, 3, 0)
    assert HeldOut(clear, features, split, COUNTS).choose_ridge(clear, ridges(0.01)) < HeldOut(noise, features, split, COUNTS).choose_ridge(noise, ridges(0.01))


def test_the_learning_curve_rises_with_votes_and_ends_at_the_heads_own_accuracy(model: CausalModel) -> None:
    examples = shortest_wins(48, seed=5)
    split = split_folds(examples, 3, 0)
    features = base_features(RewardModel.create(model, SMALL, 1), examples)
    curve = learning_curve(examples, features, split, [dict.fromkeys(fold.train, 1.0) for fold in split.folds], 0.01, seed=0)
    assert [point["votes"] for point in curve] == [8, 16, 24, 32]
    heads = HeldOut(examples, features, split, COUNTS).scores(examples, 0.01)
    right = [pair_accuracy(scores, examples[i].groups) for i, scores in heads.items()]
    assert curve[-1]["accuracy"] == pytest.approx(sum(right) / len(right), abs=1e-4)
    assert curve[-1]["accuracy"] >= curve[0]["accuracy"] and curve[-1]["accuracy"] > 0.8
