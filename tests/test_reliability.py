"""How far voters can be relied on: the annotator model against independent oracles, the cap, and what it brings."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import minimize

from engine.features import COUNTS
from learner.data import RankedExample, split_folds
from learner.heads import HeldOut, linear_probe, ridges
from learner.metrics import pair_accuracy
from learner.reliability import (
    FREE,
    STRENGTH,
    Judged,
    capped,
    judgements,
    reliabilities,
    voters_report,
    weigh_voters,
    weighted,
)
from learner.reward_fit import weigh, weighed_alone


def example(n: int, voter: str, best: int, k: int = 2, prompt: str | None = None) -> RankedExample:
    """A favourite among k replies; `prompt` makes comparisons of the same replies."""
    item = prompt or f"p{n}"
    groups = ((best,), tuple(i for i in range(k) if i != best))
    return RankedExample((5,), tuple((10 + i,) for i in range(k)), groups, voter, item, f"c{n}", str(n), str(n), n, False)


def chance(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


# ------------------------------------------------------------------------------------------------- the model


def test_reliability_is_the_posterior_mean_that_quadrature_finds() -> None:
    """Crowd-BT's likelihood on pairs that one person judged, the prior's mean at its own fixed point."""
    rng = np.random.default_rng(0)
    accuracy = {"a": 0.95, "b": 0.9, "c": 0.5}
    judged = []
    for voter, eta in accuracy.items():
        for _ in range(40):
            logit = rng.normal() * 2
            truth = rng.random() < chance(logit)
            judged.append(Judged(len(judged), voter, float(truth if rng.random() < eta else not truth), 1.0, float(np.clip(logit, -3.8, 3.8))))

    def posterior_mean(voter: str, mean: float) -> float:
        def density(eta: float) -> float:
            total = (STRENGTH * mean - 1) * math.log(eta) + (STRENGTH * (1 - mean) - 1) * math.log(1 - eta)
            for j in judged:
                if j.voter == voter:
                    p = chance(j.logit)
                    total += math.log(eta * p + (1 - eta) * (1 - p) if j.first else eta * (1 - p) + (1 - eta) * p)
            return math.exp(total + 25)

        return quad(lambda e: e * density(e), 0, 1)[0] / quad(density, 0, 1)[0]

    mean = 0.8
    for _ in range(40):
        expected = {voter: posterior_mean(voter, mean) for voter in accuracy}
        mean = min(0.95, max(0.6, sum(expected.values()) / 3))
    got = reliabilities(judged, list(accuracy))
    assert got == pytest.approx(expected, abs=5e-3)
    assert got["c"] < got["b"] - 0.1


def test_without_a_useful_model_agreement_alone_finds_dawid_and_skenes_accuracies() -> None:
    """Scores say nothing; 300 pairs that all judged. Oracle: scipy maximises the exact likelihood of two classes."""
    rng = np.random.default_rng(1)
    true_eta = np.array([0.9, 0.85, 0.8, 0.9, 0.5])
    truth = rng.random(300) < 0.5
    says = np.where(rng.random((300, 5)) < true_eta, truth[:, None], ~truth[:, None])
    judged = [Judged(i, str(k), float(says[i, k]), 1.0, 0.0) for i in range(300) for k in range(5)]

    def loss(logits: np.ndarray) -> float:
        eta = 1 / (1 + np.exp(-logits))
        yes, no = np.where(says, eta, 1 - eta).prod(1), np.where(says, 1 - eta, eta).prod(1)
        return -float(np.log(yes / 2 + no / 2).sum())

    best = 1 / (1 + np.exp(-minimize(loss, np.ones(5), method="BFGS", options={"gtol": 1e-4}).x))
    got = reliabilities(judged, [str(k) for k in range(5)])
    assert [got[str(k)] for k in range(5)] == pytest.approx(best, abs=0.03)  # shrunk by 8 votes of 300


def test_scores_that_say_nothing_leave_all_alike() -> None:
    examples = [example(n, "abc"[n % 3], n % 2) for n in range(60)]
    voters = weigh_voters(examples, {n: [0.0, 0.0] for n in range(60)})
    assert {round(v.weight, 9) for v in voters.values()} == {1.0}


def test_contradicting_oneself_costs_and_repeating_oneself_pays_nothing() -> None:
    def reliability(anns: list[int]) -> dict[str, float]:
        votes = [example(n, voter, 0, prompt=f"{voter}{n}") for n in range(10) for voter in ("bob", "cat")]
        votes += [example(n, "ann", best, prompt=f"ann{n // len(anns)}") for n, best in enumerate(anns * 10)]
        return reliabilities(judgements(votes, {i: [0.5, 0.0] for i in range(len(votes))}), ["ann", "bob", "cat"])

    once, twice, contrary = reliability([0]), reliability([0, 0]), reliability([0, 1])
    assert once["ann"] == pytest.approx(once["bob"], abs=1e-9)
    assert twice == pytest.approx(once, abs=1e-9)
    assert contrary["ann"] < once["ann"] - 0.01 and contrary["ann"] < contrary["bob"]


def test_a_comparison_is_one_decision_however_many_pairs_it_has() -> None:
    full = replace(example(0, "ann", 0, k=4), groups=((0,), (1,), (2,), (3,)))
    judged = judgements([full], {0: [3.0, 2.0, 1.0, 0.0]})
    assert len(judged) == 6 and sum(j.weight for j in judged) == pytest.approx(1.0)
    assert {(round(j.logit), j.first) for j in judged} == {(1, 1.0), (2, 1.0), (3, 1.0)}


# ------------------------------------------------------------------------------------------------- weights and the cap


def luce_votes(rng: np.random.Generator, kinds: list[str], each: int) -> tuple[list[RankedExample], dict[int, list[float]]]:
    """Favourites among three replies with known scores: `good` voters choose by Luce, others at random or contrarily."""
    examples, scores = [], {}
    for n in range(each * len(kinds)):
        kind = kinds[n % len(kinds)]
        s = rng.normal(size=3) * 2
        sign = {"good": 1.0, "random": 0.0, "contrary": -1.0}[kind]
        examples.append(example(n, f"v{n % len(kinds)}", int((sign * s + rng.gumbel(size=3)).argmax()), k=3))
        scores[n] = s.tolist()
    return examples, scores


def test_one_voter_in_five_voting_at_random_counts_clearly_less() -> None:
    """30 votes each. Over 40 draws (one in 200 may fail by the spread seen): below every other voter in 38, half on average."""
    shares, below = [], 0
    for seed in range(40):
        voters = weigh_voters(*luce_votes(np.random.default_rng(seed), ["good"] * 4 + ["random"], 30))
        others = [voters[f"v{k}"].weight for k in range(4)]
        below += voters["v4"].weight < min(others)
        shares.append(voters["v4"].weight / np.mean(others))
    assert below >= 38 and np.mean(shares) < 0.5


def test_a_contrary_voter_counts_for_nothing() -> None:
    voters = weigh_voters(*luce_votes(np.random.default_rng(0), ["good"] * 4 + ["contrary"], 30))
    assert voters["v4"].weight == 0.0 and voters["v4"].reliability < 0.5
    assert sum(v.share for v in voters.values()) == pytest.approx(1.0)


def test_a_voter_alone_has_weight_one_and_two_are_not_judged() -> None:
    examples, scores = luce_votes(np.random.default_rng(0), ["contrary"], 30)
    (alone,) = weigh_voters(examples, scores).values()
    assert (alone.weight, alone.share, alone.reliability) == (1.0, 1.0, None)
    pair = weigh_voters(*luce_votes(np.random.default_rng(0), ["good", "contrary"], 30))
    assert [v.weight for v in pair.values()] == [1.0, 1.0] and [v.reliability for v in pair.values()] == [None, None]


def test_one_voter_of_many_votes_counts_for_half_at_most() -> None:
    examples, scores = luce_votes(np.random.default_rng(0), ["good"] * 5, 8)
    first = [i for i, e in enumerate(examples) if e.voter == "v0"]
    busy = [*examples, *(replace(examples[i], prompt_key=f"more {n} {i}", seq=1000 + n) for n in range(40) for i in first)]
    held_out = {**scores, **{len(examples) + k: scores[first[k % len(first)]] for k in range(40 * len(first))}}
    voters = weigh_voters(busy, held_out)
    assert voters["v0"].votes > 0.8 * len(busy) and voters["v0"].share == pytest.approx(0.5)
    assert voters["v0"].weight < 0.3 * voters["v1"].weight


def test_weights_average_one_over_votes() -> None:
    examples, scores = luce_votes(np.random.default_rng(3), ["good", "good", "random", "contrary", "good"], 20)
    heavy = [replace(e, voter="v0") if n < 40 else e for n, e in enumerate(examples)]
    rows = weighted(heavy, weigh_voters(heavy, scores))
    assert np.mean([e.weight for e in rows]) == pytest.approx(1.0)


def test_the_cap_by_hand() -> None:
    assert capped([300.0, 10.0, 10.0, 10.0, 10.0]) == [40.0, 10.0, 10.0, 10.0, 10.0]  # five voters: half of all
    assert capped([100.0, 3.0]) == [FREE, 3.0]
    assert capped([100.0, 20.0]) == [20.0, 20.0]
    ten = capped([1000.0, *[30.0] * 9])  # ten voters: 3 in 10; L = 0.3 (270 + L)
    assert ten[0] == pytest.approx(81 / 0.7) and ten[1:] == [30.0] * 9
    assert capped([5.0, 500.0, 400.0, *[10.0] * 17]) == [5.0, *[pytest.approx(0.15 * 175 / 0.7)] * 2, *[10.0] * 17]
    assert capped([500.0]) == [500.0]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(0, 1e4), min_size=2, max_size=30), st.floats(1, 100))
def test_nobody_counts_for_more_than_the_cap_and_flooding_gains_nothing(totals: list[float], more: float) -> None:
    kept = capped(totals)
    limit = max(FREE, min(0.5, 3 / len(totals)) * sum(kept))
    assert all(k <= limit * (1 + 1e-9) and k <= t for k, t in zip(kept, totals, strict=True))
    heaviest = int(np.argmax(totals))
    if kept[heaviest] < totals[heaviest]:  # already cut: more votes change nothing for anybody
        flooded = [t * more if i == heaviest else t for i, t in enumerate(totals)]
        assert capped(flooded) == pytest.approx(kept, rel=1e-9)


def test_the_record_names_nobody() -> None:
    examples, scores = luce_votes(np.random.default_rng(0), ["good"] * 3, 10)
    named = [replace(e, voter=f"person-{e.voter}") for e in examples]
    report = voters_report(weigh_voters(named, scores))
    assert "person" not in str(report) and report["count"] == 3
    assert {row["votes"] for row in report["listed"]} == {10} and len({row["voter"] for row in report["listed"]}) == 3


def test_a_thousand_votes_take_less_than_a_second() -> None:
    rng = np.random.default_rng(0)
    examples = [replace(example(n, f"v{n % 20}", 0, k=4, prompt=f"p{n // 5}"), groups=tuple((int(i),) for i in rng.permutation(4))) for n in range(1000)]
    began = time.process_time()
    weigh_voters(examples, {n: [2.0, 1.0, 0.0, -1.0] for n in range(1000)})
    assert time.process_time() - began < 1.0  # 0.14 s on a busy core


# ------------------------------------------------------------------------------------------------- what it brings


def held_out_losses(seed: int, odd: str, each: int = 30) -> tuple[float, float, float]:
    """Loss (nats a fresh pair, over the truth) of heads fitted to all votes alike, weighed, and without the odd voter."""
    rng = np.random.default_rng(seed)
    taste = rng.normal(size=16) * 0.7
    kinds = ["good"] * 4 + [odd]
    examples, features = [], []
    for n in range(5 * each):
        x = rng.normal(size=(3, 16))
        sign = {"good": 1.0, "random": 0.0, "contrary": -1.0}[kinds[n % 5]]
        examples.append(example(n, f"v{n % 5}", int((sign * (x @ taste) + rng.gumbel(size=3)).argmax()), k=3))
        features.append(torch.tensor(x, dtype=torch.float32))
    rows = rng.normal(size=(4000, 16)) - rng.normal(size=(4000, 16))
    truth = 1 / (1 + np.exp(-rows @ taste))

    def loss(votes: list[RankedExample], own: list[torch.Tensor], ridge: float) -> float:
        head = linear_probe(votes, own, torch.tensor([e.weight for e in votes]), ridge).weight.numpy()
        return float((truth * np.logaddexp(0, -rows @ head) + (1 - truth) * np.logaddexp(0, rows @ head)).mean())

    split = split_folds(examples, 4, 0)
    better, _, ridge = weigh(examples, features, split, ridges(0.1))
    good = [i for i, e in enumerate(examples) if e.voter != "v4"]
    few, fewer = [examples[i] for i in good], [features[i] for i in good]
    return (
        loss(examples, features, HeldOut(examples, features, split, COUNTS).choose_ridge(examples, ridges(0.1))),
        loss(better, features, ridge),
        loss(few, fewer, HeldOut(few, fewer, split_folds(few, 4, 0), COUNTS).choose_ridge(few, ridges(0.1))),
    )


@pytest.mark.parametrize("odd", ["random", "contrary"])
def test_weights_lower_the_held_out_loss(odd: str) -> None:
    """Six draws; the mean gain must be above 3 of its own standard errors, and 0.4 of what leaving the voter out gains
    (measured: 0.6 for the random voter, 1.0 for the contrary one)."""
    losses = np.array([held_out_losses(seed, odd) for seed in range(6)])
    gain = losses[:, 0] - losses[:, 1]
    assert gain.mean() > 3 * gain.std(ddof=1) / math.sqrt(len(gain))
    assert gain.mean() > 0.4 * (losses[:, 0] - losses[:, 2]).mean()
    if odd == "contrary":  # cannot do harm: as good as if they had not voted, to within 3 standard errors
        harm = losses[:, 1] - losses[:, 2]
        assert harm.mean() < 0.005 + 3 * harm.std(ddof=1) / math.sqrt(len(harm))


def accuracy_of_random_votes(seed: int) -> tuple[float, float]:
    """Held-out accuracy of heads on votes that prefer nothing: all alike, and weighed as a fold's judge is."""
    rng = np.random.default_rng(seed)
    examples = [example(n, f"v{n % 6}", int(rng.integers(2)), k=2) for n in range(48)]
    features = [torch.tensor(rng.normal(size=(2, 14)), dtype=torch.float32) for _ in examples]
    right: dict[bool, list[float]] = {False: [], True: []}
    for fold in split_folds(examples, 4, seed).folds:
        votes, own = [examples[j] for j in fold.train], [features[j] for j in fold.train]
        for weighing in right:
            learned = weighed_alone(votes, own, 4, 0.4, seed) if weighing else votes
            head = linear_probe(learned, own, torch.tensor([e.weight for e in learned]), 0.4, COUNTS).weight
            right[weighing] += [pair_accuracy((features[j] @ head).tolist(), examples[j].groups) or 0.0 for j in fold.test]
    return float(np.mean(right[False])), float(np.mean(right[True]))


def test_voters_are_not_weighed_by_what_is_tested() -> None:
    """Votes at random: weights that had heard of the votes tested would make the rest foresee them (measured, so weighed: 0.54)."""
    found = np.array([accuracy_of_random_votes(seed) for seed in range(60)])
    error = found[:, 1].std(ddof=1) / math.sqrt(len(found))
    assert error < 0.012 and abs(found[:, 1].mean() - 0.5) < 3 * error
    assert not np.array_equal(found[:, 0], found[:, 1])  # some did weigh otherwise than others


def test_voters_who_are_all_alike_cost_nothing() -> None:
    losses = np.array([held_out_losses(seed, "good") for seed in range(4)])
    assert losses[:, 1] == pytest.approx(losses[:, 0], abs=0.01)
