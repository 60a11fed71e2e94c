"""How far each voter can be relied on, as a weight for their votes.

Owns the annotator model and the influence cap. Does not fit reward models: it is given scores of votes by a model that
saw neither their prompts nor (where they can be told apart) their voters.

One model covers agreement with the reward model, agreement with others on the same replies, and a voter's agreement
with themselves. Each pair of replies to one prompt has a truth, i over j with a prior probability sigma(s_i - s_j) from
the held-out scores; voter k reports it with probability eta_k and its opposite otherwise. For a pair that one person
judged that is the annotator model of Chen et al. 2013 (Crowd-BT, Eq. 5), P(i > j | k) = eta_k sigma(s_i - s_j) +
(1 - eta_k) sigma(s_j - s_i); for a pair that several judged, that of Dawid & Skene 1979.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from learner.data import RankedExample

STRENGTH = 8.0  # votes' worth of belief that a voter is like the average one
SURE = 0.98  # no reward model is surer than this of a pair: a slip must not condemn anybody
FREE = 16.0  # votes that one voter may always count for, however few the others gave
HALF, EQUAL_SHARES = 0.5, 3.0  # beyond those: at most half of all weight, and at most three equal shares of it
LISTED = 100  # voters in a round's record
GRID = (np.arange(50) + 0.5) / 50  # values of eta
CLOSE = 1e-3  # of eta: an iteration that moves nobody by more is the last


@dataclass(frozen=True)
class Voter:
    """What one voter's votes count for."""

    votes: int
    reliability: float | None  # posterior mean of eta; None with fewer than three voters, of whom nobody can say who errs
    weight: float  # of each vote; 1 on average over all votes
    share: float  # of all weight


@dataclass(frozen=True)
class Judged:
    """One voter's view of one pair of replies, repeats together."""

    item: int
    voter: str
    first: float  # share of the times that they put the first reply of the pair above the second
    weight: float  # 1 / pairs of the comparison: a comparison is one decision
    logit: float  # the held-out model's s_first - s_second


def weigh_voters(examples: Sequence[RankedExample], held_out: Mapping[int, Sequence[float]]) -> dict[str, Voter]:
    """The weight of each voter's votes, by voter.

    held_out: {index of the example: scores of its completions by a model that did not see it}. The weight is
    2 eta - 1 at the posterior mean, and 0 below: for pairs that are hard to tell apart, P(i > j | k) - 1/2 is
    (2 eta_k - 1) (s_i - s_j) / 4, so that is what a vote tells about the scores. Then the influence cap (`capped`).
    A voter alone has weight 1.
    """
    votes = Counter(e.voter for e in examples)
    names = sorted(votes)
    judged = judgements(examples, held_out)
    reliability = reliabilities(judged, names) if len(names) > 2 and judged else {}
    raw = [votes[name] * max(0.0, 2 * reliability.get(name, 1.0) - 1) for name in names]
    if not sum(raw):
        raw = [float(votes[name]) for name in names]
    total = capped(raw)
    scale = len(examples) / sum(total)
    return {
        name: Voter(votes[name], reliability.get(name), own * scale / votes[name], own / sum(total))
        for name, own in zip(names, total, strict=True)
    }


def weighted(examples: Sequence[RankedExample], voters: Mapping[str, Voter]) -> list[RankedExample]:
    """The examples with their voters' weights."""
    return [replace(e, weight=voters[e.voter].weight) for e in examples]


def judgements(examples: Sequence[RankedExample], held_out: Mapping[int, Sequence[float]]) -> list[Judged]:
    """Every (pair of replies, voter) that a strict vote states.

    A pair is the same where prompt and both replies are. What a voter said of it on several occasions becomes one
    judgement, their mean: who contradicts themselves says one half, and saying it again adds nothing.
    """
    items: dict[tuple, int] = {}
    said: dict[tuple[int, str], list[tuple[float, float, float]]] = defaultdict(list)
    for i, scores in sorted(held_out.items()):
        e = examples[i]
        for winner, loser in e.strict:
            a, b = e.completions_ids[winner], e.completions_ids[loser]
            if a == b:
                continue
            item = items.setdefault((e.prompt_key, min(a, b), max(a, b)), len(items))
            logit = scores[winner] - scores[loser]
            said[item, e.voter].append((float(a < b), 1 / len(e.strict), logit if a < b else -logit))
    return [Judged(item, voter, *np.mean(rows, axis=0).tolist()) for (item, voter), rows in said.items()]


def reliabilities(judged: Sequence[Judged], voters: Sequence[str]) -> dict[str, float]:
    """Posterior mean of each voter's eta, exact on a grid but for what others say of the same pair.

    That enters as a belief about the pair's truth, sigma(s_i - s_j + sum over the others of +- log(eta / (1 - eta))),
    which leaves the voter's own judgement out (belief propagation: Liu, Peng & Ihler 2012), and is repeated until
    nothing moves. The prior is a Beta of STRENGTH votes around the voters' mean, held within [0.6, 0.95].
    """
    place = {name: k for k, name in enumerate(voters)}
    item, who = np.array([j.item for j in judged], int), np.array([place[j.voter] for j in judged], int)
    first, weight, logit = (np.array([getattr(j, name) for j in judged]) for name in ("first", "weight", "logit"))
    bound = np.log(SURE / (1 - SURE))
    logit = np.clip(logit, -bound, bound)
    own = [np.flatnonzero(who == k) for k in range(len(voters))]
    decisions = np.array([weight[rows].sum() for rows in own])
    mean, eta = 0.8, np.full(len(voters), 0.8)
    for _ in range(50):
        evidence = (2 * first - 1) * np.log(eta / (1 - eta))[who]  # of each judgement, for the first reply of its pair
        others = np.bincount(item, evidence)[item] - evidence
        belief = 1 / (1 + np.exp(-np.clip(logit + others, -30, 30)))[:, None]  # (J, 1)
        says_first = GRID * belief + (1 - GRID) * (1 - belief)  # (J, grid): P(this voter puts the first above | eta)
        fit = weight[:, None] * (first[:, None] * np.log(says_first) + (1 - first[:, None]) * np.log1p(-says_first))
        posterior = np.stack([fit[rows].sum(0) for rows in own])  # (V, grid), log
        posterior += (STRENGTH * mean - 1) * np.log(GRID) + (STRENGTH * (1 - mean) - 1) * np.log1p(-GRID)
        mass = np.exp(posterior - posterior.max(1, keepdims=True))
        new = mass @ GRID / mass.sum(1)
        mean = float(np.clip(decisions @ new / decisions.sum(), 0.6, 0.95))
        moved, eta = np.abs(new - eta).max(initial=0.0), new
        if moved < CLOSE:
            break
    return dict(zip(voters, eta.tolist(), strict=True))


def capped(totals: Sequence[float]) -> list[float]:
    """Each voter's total weight, none above the larger of FREE votes and the smaller of half and three equal shares of all.

    A voter alone is not capped. The limit L is on the capped totals themselves, L = share * sum(min(t, L)); with the m
    heaviest cut to it that is L = share * rest / (1 - share * m).
    """
    if len(totals) < 2:
        return list(totals)
    share = min(HALF, EQUAL_SHARES / len(totals))
    order = sorted(totals, reverse=True)
    limit, rest = order[0], sum(order)
    for m, heaviest in enumerate(order):  # the m heaviest are cut; is the next one within the limit?
        if share * m >= 1:
            break
        limit = share * rest / (1 - share * m)
        if heaviest <= limit:
            break
        rest -= heaviest
    limit = max(limit, FREE)
    return [min(total, limit) for total in totals]


def voters_report(voters: Mapping[str, Voter]) -> dict[str, Any]:
    """For a round's record, the heaviest first: who is told apart by a digest, and named nowhere."""
    heaviest = sorted(voters, key=lambda name: (-voters[name].share, name))
    rows = [
        {
            "voter": hashlib.sha256(f"voter/{name}".encode()).hexdigest()[:12], "votes": voter.votes,
            "reliability": None if voter.reliability is None else round(voter.reliability, 3),
            "weight": round(voter.weight, 3), "share": round(voter.share, 4),
        }
        for name in heaviest[:LISTED]
        for voter in [voters[name]]
    ]  # fmt: skip
    return {"count": len(voters), "listed": rows}
