"""How good a reward model is, and what to tell a person about it. Pure: numbers in, numbers and words out.

Owns accuracy, its interval, calibration, the length-only baseline, the agreement ceiling and the verdict. Does not
fit reward models, split data or read votes.

The unit throughout is the *strict pair*: two completions of one comparison, one ranked above the other by the voter.
The pairs of a comparison are not independent (they share completions and a voter), so every figure weights a
comparison 1, and intervals are robust to that clustering (`clustered_accuracy`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Z95 = 1.959963984540054  # two-sided 95%
Groups = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Interval:
    """A share with its 95% interval; `n` is the effective number of independent decisions behind it."""

    value: float
    low: float
    high: float
    n: float


@dataclass(frozen=True)
class Verdict:
    """Whether PPO may start (`may_train`), a code (works, only_length, not_yet) and the sentence for people."""

    code: str
    may_train: bool
    words: str


def strict_pairs(groups: Groups) -> list[tuple[int, int]]:
    """All (winner, loser) index pairs that a ranking (best first, ties grouped) states."""
    return [(w, x) for i, better in enumerate(groups) for worse in groups[i + 1 :] for w in better for x in worse]


def tied_pairs(groups: Groups) -> list[tuple[int, int]]:
    """All pairs within a group that is the voter's own tie, each once with the smaller index first."""
    return [(a, b) for group in groups for a in sorted(group) for b in sorted(group) if a < b]


def pair_accuracy(scores: Sequence[float], groups: Groups) -> float | None:
    """Share of one comparison's strict pairs that `scores` orders the voter's way (equal scores count half)."""
    pairs = strict_pairs(groups)
    if not pairs:
        return None
    right = sum(1.0 if scores[w] > scores[x] else 0.5 if scores[w] == scores[x] else 0.0 for w, x in pairs)
    return right / len(pairs)


def wilson(p: float, n: float, z: float = Z95) -> Interval:
    """Wilson score interval (1927) of a share `p` over `n` decisions; n may be fractional. n = 0 gives [0, 1]."""
    if n <= 0:
        return Interval(p, 0.0, 1.0, 0.0)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Interval(p, max(0.0, centre - half), min(1.0, centre + half), n)


def student(p: float, freedom: float) -> float:
    """Quantile `p` of Student's distribution with so many degrees of freedom."""
    from scipy.special import stdtrit  # 28 MB, and half a second: only where it is asked for

    return float(stdtrit(freedom, p))


def clustered_accuracy(shares: Sequence[float], clusters: Sequence[object] | None = None, decisions: int | None = None) -> Interval:
    """Mean of per-comparison accuracies with a cluster-robust Wilson interval.

    shares: one accuracy in [0, 1] a comparison. clusters: a label for each (a prompt, say); by default every
    comparison is its own. The effective n is p(1-p) over the cluster-robust variance of the mean, and the quantile Student's with
    as many degrees of freedom as there are clusters less one (Korn & Graubard 1998). n is never above `decisions`, by default the number of
    comparisons; with several pairs a comparison their number, as shares that are means of pairs vary less than single decisions do.
    """
    count = len(shares)
    if not count:
        return Interval(float("nan"), 0.0, 1.0, 0.0)
    p = math.fsum(shares) / count
    residual: dict[object, float] = defaultdict(float)
    for i, share in enumerate(shares):
        residual[clusters[i] if clusters is not None else i] += share - p
    g = len(residual)
    if g < 2:
        return wilson(p, g)
    variance = g / (g - 1) * math.fsum(r * r for r in residual.values()) / count**2
    n = p * (1 - p) / variance if variance > 0 else g
    return wilson(p, min(n, decisions or count), student(0.975, g - 1))


def ece(probabilities: Sequence[float], weights: Sequence[float], bins: int = 10) -> float:
    """Expected calibration error of pairwise predictions (Naeini et al. 2015), in [0, 1].

    probabilities: model's probability that the voter's winner wins. Each is read as a decision with confidence
    max(p, 1-p) in [0.5, 1], right when p > 0.5 (half right at 0.5), in equal-width bins.
    """
    total = math.fsum(weights)
    if total <= 0:
        return float("nan")
    return math.fsum(abs(confidence - right) for confidence, right, _ in binned(probabilities, weights, bins)) / total


def reliability(probabilities: Sequence[float], weights: Sequence[float], bins: int = 5) -> list[dict[str, float]]:
    """The points of a reliability diagram: in each bin that holds any, mean confidence, share right, and the bin's share of
    all weight. Read as in `ece`; on the diagonal, confidence is worth what it says."""
    total = math.fsum(weights)
    return [
        {"confidence": round(confidence / weight, 4), "right": round(right / weight, 4), "share": round(weight / total, 4)}
        for confidence, right, weight in binned(probabilities, weights, bins) if weight
    ]  # fmt: skip


def binned(probabilities: Sequence[float], weights: Sequence[float], bins: int) -> list[list[float]]:
    """[weighted confidence, weighted correctness, weight] of each bin of confidence."""
    sums = [[0.0, 0.0, 0.0] for _ in range(bins)]
    for p, weight in zip(probabilities, weights, strict=True):
        confidence = max(p, 1 - p)
        b = sums[min(bins - 1, int((confidence - 0.5) * 2 * bins))]
        b[0] += weight * confidence
        b[1] += weight * (1.0 if p > 0.5 else 0.5 if p == 0.5 else 0.0)
        b[2] += weight
    return sums


def brier(probabilities: Sequence[float], weights: Sequence[float]) -> float:
    """Mean squared error of the pairwise predictions: weighted mean of (1 - p)^2. A coin scores 0.25."""
    total = math.fsum(weights)
    if total <= 0:
        return float("nan")
    return math.fsum(w * (1 - p) ** 2 for p, w in zip(probabilities, weights, strict=True)) / total


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x) without overflow."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def length_slope(lengths: Sequence[Sequence[int]], groups: Sequence[Groups], ridge: float = 1e-2) -> float:
    """Slope of the logistic regression of the pick on the length difference (Bradley-Terry with length as score).

    Length enters as log(1 + tokens). Pairs of one comparison share weight 1. Newton's method; `ridge` keeps
    separable data finite.
    """
    rows = [
        (math.log1p(own[winner]) - math.log1p(own[loser]), 1 / len(pairs))
        for own, ranking in zip(lengths, groups, strict=True)
        if (pairs := strict_pairs(ranking))
        for winner, loser in pairs
    ]
    slope = 0.0
    for _ in range(50):
        gradient, hessian = -ridge * slope, ridge
        for x, weight in rows:
            p = sigmoid(slope * x)
            gradient += weight * (1 - p) * x
            hessian += weight * p * (1 - p) * x * x
        step = max(-5.0, min(5.0, gradient / hessian))
        slope += step
        if abs(step) < 1e-9:
            break
    return slope


def length_baseline(
    lengths: Sequence[Sequence[int]], groups: Sequence[Groups], folds: Iterable[tuple[Sequence[int], Sequence[int]]]
) -> dict[int, float]:
    """{index of the comparison: accuracy of length alone}, its slope fitted on each fold's training side only.

    folds: (train, test) indices of comparisons.
    """
    found = {}
    for train, test in folds:
        slope = length_slope([lengths[i] for i in train], [groups[i] for i in train])
        for i in test:
            accuracy = pair_accuracy([slope * math.log1p(n) for n in lengths[i]], groups[i])
            if accuracy is not None:
                found[i] = accuracy
    return found


def agreement(judged: Sequence[tuple[object, object, Sequence[object], Groups]]) -> dict[str, float] | None:
    """How often two voters who judged the same pair agree, and the accuracy that allows at best.

    judged: (item, voter, completion identities, ranking). Two votes meet on a pair when item and both completion
    identities are equal and the voters differ. With raters who each side with the common opinion with probability q,
    two of them agree with q^2 + (1-q)^2; the ceiling is the q that the agreement implies. None without such pairs.
    """
    seen: dict[tuple, dict[object, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for item, voter, identities, ranking in judged:
        for winner, loser in strict_pairs(ranking):
            first, second = identities[winner], identities[loser]
            if first != second:
                low, high = sorted((first, second), key=repr)
                seen[item, low, high][voter].append(first == low)
    agree, pairs = 0.0, 0
    for by_voter in seen.values():
        picks = [sum(picked) / len(picked) for picked in by_voter.values()]
        for i, a in enumerate(picks):
            for b in picks[i + 1 :]:
                agree += a * b + (1 - a) * (1 - b)
                pairs += 1
    if not pairs:
        return None
    rate = agree / pairs
    return {"agreement": rate, "ceiling": (1 + math.sqrt(max(0.0, 2 * rate - 1))) / 2, "pairs": pairs}


def votes_needed(p: float, n: float, count: int, z: float = Z95) -> int | None:
    """How many more comparisons until the Wilson lower bound of accuracy `p` passes one half; None: unknown.

    n: effective decisions in the `count` comparisons so far. The bound passes when (p - 1/2)^2 > z^2 / (4n). An accuracy at or
    under 0.52 gives no honest figure.
    """
    if not p > 0.52:
        return None
    return max(1, math.ceil((z * z / (4 * (p - 0.5) ** 2) - n) * count / n + 1e-9))


def judge(model: Sequence[float], length: Sequence[float], clusters: Sequence[object], min_votes: int, pairs: int | None = None) -> Verdict:
    """The verdict on a reward model from its held-out per-comparison accuracies and the length-only baseline's; `pairs`: of all comparisons.

    PPO may start when the lower bound of held-out accuracy beats one half, and length does not explain the picks away:
    it is stopped where length alone is better beyond noise (paired difference, cluster-robust 95% interval) and the
    model has less than half of length's edge over chance. A model that is no better than a length baseline which itself
    beats chance goes ahead as `only_length`: people may well prefer short replies, and then length *is* the taste, which
    one number fits sooner than a language model does. The sentence says so, and the gate watches length.
    """
    count = len(model)
    if count < min_votes:
        more = min_votes - count
        return Verdict("not_yet", False, f"not yet: about {more} more votes ({count} so far, too few to test)")
    own, alone = clustered_accuracy(model, clusters, pairs), clustered_accuracy(length, clusters, pairs)
    if own.low <= 0.5:
        needed = votes_needed(own.value, own.n, count)
        if needed is None:
            words = f"not yet: about {count} more votes, and perhaps more: {own.value:.0%} right on held-out votes shows no taste"
        else:
            words = f"not yet: about {needed} more votes ({own.value:.0%} right on held-out votes, could be chance)"
        return Verdict("not_yet", False, words)
    gain, half = paired_difference(model, length, clusters)
    if gain + half < 0 and own.value - 0.5 < (alone.value - 0.5) / 2:
        return Verdict(
            "not_yet", False,
            f"not yet: about {count} more votes ({own.value:.0%} right on held-out votes, but length alone gets {alone.value:.0%})",
        )
    if gain - half <= 0 and alone.low > 0.5:
        return Verdict(
            "only_length", True,
            f"only measures length, as far as can be told: {own.value:.0%} right on held-out votes, length alone {alone.value:.0%}",
        )
    return Verdict("works", True, f"works: {own.value:.0%} right on held-out votes (95%: {own.low:.0%} to {own.high:.0%})")


def paired_difference(a: Sequence[float], b: Sequence[float], clusters: Sequence[object]) -> tuple[float, float]:
    """Mean of a - b over comparisons and the half width of its cluster-robust 95% interval (normal)."""
    count = len(a)
    mean = math.fsum(x - y for x, y in zip(a, b, strict=True)) / count
    residual: dict[object, float] = defaultdict(float)
    for x, y, cluster in zip(a, b, clusters, strict=True):
        residual[cluster] += x - y - mean
    g = len(residual)
    if g < 2:
        return mean, float("inf")
    return mean, Z95 * math.sqrt(g / (g - 1) * math.fsum(r * r for r in residual.values())) / count


def reward_report(
    held_out: Mapping[int, Sequence[float]],
    length_only: Mapping[int, float],
    groups: Sequence[Groups],
    clusters: Sequence[object],
    min_votes: int,
) -> tuple[dict[str, Any], Verdict]:
    """The figures of a cross-validation, ready for JSON, and the verdict on them.

    held_out: {index of the comparison: its scores by a model that never saw it}. length_only: {index: accuracy of the
    cross-validated length baseline}. groups, clusters: of every comparison. Only strict pairs count.
    """
    tested = [i for i in sorted(held_out) if strict_pairs(groups[i])]
    model = [accuracy for i in tested if (accuracy := pair_accuracy(held_out[i], groups[i])) is not None]
    length = [length_only[i] for i in tested]
    labels = [clusters[i] for i in tested]
    pairs = sum(len(strict_pairs(groups[i])) for i in tested)
    verdict = judge(model, length, labels, min_votes, pairs)
    report: dict[str, Any] = {"verdict": verdict.code, "words": verdict.words, "comparisons": len(tested)}
    if tested:
        predicted = [
            (sigmoid(held_out[i][w] - held_out[i][x]), 1 / len(own))
            for i in tested
            for own in [strict_pairs(groups[i])]
            for w, x in own
        ]
        probabilities, weights = zip(*predicted, strict=True)
        gain, half = paired_difference(model, length, labels)
        report |= {
            "pairs": pairs,
            "accuracy": interval_dict(clustered_accuracy(model, labels, pairs)),
            "interval": "Wilson, 95%, Student's quantile, effective n from the variance between prompts; a comparison counts once",
            "ece": round(ece(probabilities, weights), 4),
            "brier": round(brier(probabilities, weights), 4),
            "reliability": reliability(probabilities, weights),
            "length_only": interval_dict(clustered_accuracy(length, labels, pairs)),
            "gain_over_length": {"value": round(gain, 4), "half_width": round(half, 4) if math.isfinite(half) else None},
        }
    return report, verdict


def interval_dict(interval: Interval) -> dict[str, float]:
    """The interval as rounded JSON fields."""
    return {name: round(value, 4) for name, value in asdict(interval).items()}
