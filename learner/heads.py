"""Heads on fixed features: ridge-penalised Bradley-Terry, solved to its one optimum, and the penalty that suits the votes.

Every vote is a few rows of one logistic regression, the winner's features less the loser's. A round fits some ninety of
these (folds, penalties, voters weighed anew, members), so the votes of a fold are prepared once (`Regression`) and Newton's
method goes on from the last fit: fewer rows than features are solved in as many coordinates as there are replies.

Owns fitting heads, choosing their penalty, and their accuracy against votes. Does not read the model (`learner/reward.py` makes the features) or weigh
voters (`learner/reliability.py`).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.features import COUNTS
from learner.data import RankedExample, Split
from learner.losses import preference_loss
from learner.metrics import pair_accuracy

COUNT_FAVOUR = 8.0  # a few numbers among hundreds would hardly be heard
STEPS = 100  # of Newton's method; five to ten do
CLOSE = 1e-8  # nats: where Newton's next step promises less, its square is below rounding


class Probe(NamedTuple):
    """A head: weights (F,) over the features, the bias, and the outside option's score, in the same units."""

    weight: Tensor
    bias: Tensor
    level: Tensor


class Regression:
    """Votes as a logistic regression on features of their replies; `fit` as often as weights or penalties change.

    features: (K, F) an example. They are standardised and the penalty is `ridge` / 2 |w|^2 with them scaled by
    1 / sqrt(F), so that `ridge` means the same for every model. The last `counts` features are pairs x, x^2: of the square only
    what a line through x leaves of it is used, and both are scaled up by COUNT_FAVOUR, which makes them that much cheaper.
    A tie is half a win each way. At least one of the examples must state a preference or a tie.
    """

    def __init__(self, examples: Sequence[RankedExample], features: Sequence[Tensor], counts: int = 0) -> None:
        shown = torch.cat([own[: e.shown] for e, own in zip(examples, features, strict=True)]).double()
        self.mean = shown.mean(0)
        z, shown = torch.cat(list(features)).double() - self.mean, shown - self.mean
        self.slopes: list[tuple[int, Tensor]] = []
        for x in range(z.shape[1] - counts, z.shape[1], 2):
            slope = (shown[:, x] @ shown[:, x + 1]) / (shown[:, x] @ shown[:, x]).clamp(min=1e-12)
            self.slopes.append((x, slope))
            z[:, x + 1] -= slope * z[:, x]
            shown[:, x + 1] -= slope * shown[:, x]
        # By all rows where those spread wider: what the replies shown hardly differ in, one edit would else be thousands of deviations off in
        self.scale = torch.maximum(shown.std(0), z.std(0)).clamp(min=1e-6) * z.shape[1] ** 0.5
        self.scale[z.shape[1] - counts :] /= COUNT_FAVOUR
        z /= self.scale
        # The optimum lies in the span of the replies, and a turn of the axes leaves |w| as it is.
        self.basis = torch.linalg.qr(z.T).Q if len(z) < z.shape[1] else None  # (F, replies)
        if self.basis is not None:
            z = z @ self.basis

        z = F.pad(z, (0, 1, 0, 1))
        z[-1, -1] = 1.0  # the outside option comes last: no features, but a score of its own
        outside, start, self.levelled = len(z) - 1, 0, knows_level(examples)
        pairs: list[tuple[int, int, int, float]] = []  # rows of winner and loser, the example, and its share that this pair is
        for i, example in enumerate(examples):
            wins = [(w, x, 1.0) for w, x in example.stated] + [(a, b, 0.5) for x, y in example.tied for a, b in ((x, y), (y, x))]
            total = sum(share for _, _, share in wins)
            pairs += [(start + winner, start + loser, i, share / total) for winner, loser, share in wins]
            if self.levelled:
                pairs += [(start + reply, outside, i, 1 / example.shown / len(example.accepted)) for reply in example.accepted]
                pairs += [(outside, start + reply, i, 1 / example.shown) for reply in example.refused]
            start += len(features[i])
        winners, losers, of, shares = zip(*pairs, strict=True)
        self.rows = z[list(winners)] - z[list(losers)]  # (P, coordinates + 1)
        if not self.levelled:
            self.rows = self.rows[:, :-1]
        self.of, self.shares = torch.tensor(of), torch.tensor(shares, dtype=torch.float64)
        self.w = torch.zeros(self.rows.shape[1], dtype=torch.float64)

    def fit(self, weights: Tensor, ridge: float) -> Probe:
        """The optimum for examples that weigh `weights` (N,). Convex: the last fit is where it starts, not what it finds.

        The bias puts the mean score of the replies shown at 0 (Ouyang et al. 2022). The level (`losses.outside_option`) has no
        penalty; see `knows_level` for when it is there.
        """
        share = self.shares * weights.double()[self.of]  # (P,)
        penalty = torch.full_like(self.w, ridge)
        if self.levelled:
            penalty[-1] = 0.0

        def loss(w: Tensor) -> Tensor:
            return share @ F.softplus(-(self.rows @ w)) + penalty @ (w * w) / 2

        for _ in range(STEPS):
            wrong = torch.sigmoid(-(self.rows @ self.w))  # (P,) the chance given to the loser
            gradient = penalty * self.w - self.rows.T @ (share * wrong)
            hessian = self.rows.T @ ((share * wrong * (1 - wrong))[:, None] * self.rows)
            hessian.diagonal().add_(penalty + 1e-12)
            step = torch.cholesky_solve(gradient[:, None], torch.linalg.cholesky(hessian))[:, 0]
            promised, size, now = float(gradient @ step), 1.0, loss(self.w)
            while promised > CLOSE and loss(self.w - size * step) > now - 0.1 * size * promised:
                size /= 2
            self.w = self.w - size * step
            if promised <= CLOSE:
                break
        w = self.w[:-1] if self.levelled else self.w
        head = (w if self.basis is None else self.basis @ w) / self.scale
        for x, slope in self.slopes:
            head[x] -= slope * head[x + 1]
        level = self.w[-1] if self.levelled else self.w.new_zeros(())
        return Probe(head.float(), -(head @ self.mean).float(), level.float())


def linear_probe(
    examples: Sequence[RankedExample], features: Sequence[Tensor], weights: Tensor, ridge: float, counts: int = 0
) -> Probe:
    """One `Regression.fit`. weights: (N,) of the examples."""
    return Regression(examples, features, counts).fit(weights, ridge)


def knows_level(examples: Sequence[RankedExample]) -> bool:
    """Whether the votes say both that some replies are good enough and that some are not: one alone has no finite level."""
    return any(e.accepted for e in examples) and any(e.refused for e in examples)


def ridges(least: float) -> list[float]:
    """The penalties to choose from: `least` and 4, 16, 64, 256 times that, the largest first."""
    return [least * 4**i for i in reversed(range(5))]


class HeldOut:
    """Heads that have not seen what they score: a regression on every fold's training votes, prepared once."""

    def __init__(self, examples: Sequence[RankedExample], features: Sequence[Tensor], split: Split, counts: int = 0) -> None:
        self.features, self.folds = features, split.folds
        self.regressions = [
            Regression([examples[j] for j in fold.train], [features[j] for j in fold.train], counts) for fold in split.folds
        ]

    def scores(self, examples: Sequence[RankedExample], ridge: float) -> dict[int, list[float]]:
        """Scores (K,) of every tested example, by its index. examples: those it was made of, their weights perhaps new."""
        scores: dict[int, list[float]] = {}
        for fold, regression in zip(self.folds, self.regressions, strict=True):
            head, bias, _ = regression.fit(torch.tensor([examples[j].weight for j in fold.train]), ridge)
            scores |= {j: (self.features[j] @ head + bias).tolist() for j in fold.test}
        return scores

    def choose_ridge(self, examples: Sequence[RankedExample], penalties: Sequence[float]) -> float:
        """The penalty with the lowest pooled held-out loss.

        Clear tastes want a small one, noisy votes a large one that keeps the scores from boasting.
        """
        if len(penalties) == 1:
            return penalties[0]
        losses = []
        for ridge in penalties:
            rows = [(examples[j], torch.tensor(own)) for j, own in self.scores(examples, ridge).items()]
            losses.append((sum(e.weight * preference_loss(own, e.strict, []).item() for e, own in rows), ridge))
        return min(losses)[1]


def learning_curve(
    examples: Sequence[RankedExample], features: Sequence[Tensor], split: Split, learned: Sequence[Mapping[int, float]], ridge: float, seed: int,
    parts: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
) -> list[dict[str, float]]:  # fmt: skip
    """Held-out accuracy against votes: heads fitted to a part of every fold's training votes, tested on the same votes.

    Each smaller part lies within the larger. What more votes brought so far says what more would bring. learned: the weights of each fold's
    training votes, {index of the example: weight}. Votes on replies that were shown for what they teach are learned from, and not tested.
    """
    rng = random.Random(f"curve/{seed}")
    orders = [rng.sample(fold.train, len(fold.train)) for fold in split.folds]
    curve = []
    for part in parts:
        right, used = [], []
        for order, fold, weights in zip(orders, split.folds, learned, strict=True):
            train = order[: max(1, round(part * len(order)))]
            if not any(examples[j].strict or examples[j].tied for j in train):
                continue
            head, bias, _ = linear_probe([examples[j] for j in train], [features[j] for j in train], torch.tensor([weights[j] for j in train]), ridge, COUNTS)
            tested = [pair_accuracy((features[j] @ head + bias).tolist(), examples[j].groups) for j in fold.test if not examples[j].chosen]
            right += [found for found in tested if found is not None]
            used.append(len(train))
        if right:
            votes = sum(used) / len(used)
            curve.append({"votes": round(votes), "accuracy": round(sum(right) / len(right), 4)})
    return curve
