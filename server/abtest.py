"""A sequential test of two versions on people's votes, which may be looked at after every vote.

Each comparison that showed both versions gives one number in [0, 1]: the share of cross pairs that the first
version won, ties half. Betting on those numbers against a fixed mean m gives an e-process: a nonnegative
martingale under the null that starts at 1, so that it ever reaches 1/alpha with probability at most alpha
(Ville 1939). Bets are averaged over a grid of sizes, which keeps the e-process valid without tuning and makes it
independent of the order of the votes (Waudby-Smith & Ramdas 2024, "Estimating means of bounded random variables
by betting", JRSS-B 86(1), section 4 and appendix on mixtures).

Pure: numbers in, numbers out. Does not read votes and does not deploy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

BETS = np.linspace(0.05, 0.95, 19)  # shares of the largest safe bet


@dataclass(frozen=True)
class AbTest:
    """What the votes say so far about the first version against the second."""

    decision: Literal["promote", "hold", "rollback"]
    votes: int
    win_rate: float | None  # mean outcome; None without votes
    low: float  # anytime-valid confidence sequence of the win rate
    high: float
    e_better: float  # evidence that the win rate is above 1/2
    e_worse: float  # evidence that it is below


def pair_outcome(versions: Sequence[str], groups: Sequence[Sequence[int]], first: str, second: str) -> float | None:
    """Share of pairs (one completion of `first`, one of `second`) that `first` won under the ranking; ties half.

    `groups`: best first, ties grouped; completions left out are not compared. None when no pair was judged.
    """
    rank = {index: place for place, group in enumerate(groups) for index in group}
    scores = [
        1.0 if rank[a] < rank[b] else 0.5 if rank[a] == rank[b] else 0.0
        for a in rank
        for b in rank
        if versions[a] == first and versions[b] == second
    ]
    return sum(scores) / len(scores) if scores else None


def e_value(outcomes: Sequence[float], mean: float = 0.5, *, side: Literal[1, -1] = 1) -> float:
    """Evidence against "the outcomes' mean is at most `mean`" (side 1) or "at least" (side -1).

    `outcomes` in [0, 1]; `mean` in (0, 1). Wealth of the averaged bettor, computed in logs; may be inf.
    """
    if not len(outcomes):
        return 1.0
    with np.errstate(over="ignore"):
        return float(np.exp(_log_wealth(outcomes, np.array([mean]), side)[0]))


def confidence_sequence(outcomes: Sequence[float], alpha: float = 0.05) -> tuple[float, float]:
    """Bounds of the mean that hold at all times together with probability 1 - alpha, on a grid of 0.01."""
    grid, limit = np.linspace(0.01, 0.99, 99), np.log(2 / alpha)
    kept = grid[(_log_wealth(outcomes, grid, 1) < limit) & (_log_wealth(outcomes, grid, -1) < limit)]
    if not len(kept):  # every vote the same way, many times: the mean is at an end of the grid
        return (0.99, 1.0) if np.mean(outcomes) > 0.5 else (0.0, 0.01)
    low, high = float(kept.min()), float(kept.max())
    return (0.0 if low <= 0.01 else low), (1.0 if high >= 0.99 else high)


def _log_wealth(outcomes: Sequence[float], means: np.ndarray, side: int) -> np.ndarray:
    """Log wealth of the averaged bettor against each of `means`: (M,) -> (M,). Outcomes take few values: count them."""
    x, counts = np.unique(np.asarray(outcomes, dtype=np.float64), return_counts=True)  # (U,), (U,)
    m = means[:, None, None]  # (M, 1, 1)
    largest = 1 / m if side == 1 else 1 / (1 - m)  # a bet of this size risks everything on one vote
    steps = np.log1p(side * largest * BETS[:, None] * (x - m))  # (M, bets, U)
    logs = (steps * counts).sum(-1)  # (M, bets)
    peak = logs.max(-1)
    return peak + np.log(np.exp(logs - peak[:, None]).mean(-1))


def judge(outcomes: Sequence[float], *, odds: float = 20.0) -> AbTest:
    """The decision after these votes. Each direction errs with probability at most 1/odds, however often one looks."""
    better, worse = e_value(outcomes, side=1), e_value(outcomes, side=-1)
    low, high = confidence_sequence(outcomes, 1 / odds) if len(outcomes) else (0.0, 1.0)
    decision: Literal["promote", "hold", "rollback"] = "hold"
    if better >= odds:
        decision = "promote"
    elif worse >= odds:
        decision = "rollback"
    rate = float(np.mean(outcomes)) if len(outcomes) else None
    return AbTest(decision, len(outcomes), rate, low, high, better, worse)
