"""Which of the sampled candidates are worth a person's look: those whose vote is expected to teach most.

Pure: the reward members' scores of the candidates in, the indices to show out. Does not sample, score
(`server/heads.py`) or serve, and knows nothing of what comparisons were drawn at random instead.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

Value = Callable[[Tensor], Tensor]


def disagreement(scores: Tensor) -> Tensor:
    """Variance over the members of each pair's score difference, squared logits. scores: (m, members) -> (m, m).

    Query by committee as in preference learning (Christiano et al. 2017, section 2.2.4). It also likes pairs whose
    winner every member knows, as long as they differ about by how much.
    """
    return (scores[:, None] - scores[None]).var(dim=-1, unbiased=False)


def information(scores: Tensor) -> Tensor:
    """Mutual information between a pair's vote and which member is right, nats. scores: (m, members) -> (m, m).

    H(mean_k p_k) - mean_k H(p_k), p_k = sigma(s_ik - s_jk): BALD for preferences (Houlsby et al. 2011, Eq. 2 and
    section 3), the infomax of Dwaracherla et al. 2024 with a vote in place of its variance.
    """
    d = scores[:, None] - scores[None]  # (m, m, members)
    p = d.sigmoid()
    each = (F.softplus(d) - p * d).mean(-1)  # H(sigma(d)) = log(1 + e^d) - d sigma(d)
    mean = p.mean(-1)
    return (-torch.xlogy(mean, mean) - torch.xlogy(1 - mean, 1 - mean) - each).clamp(min=0)


def prediction(scores: Tensor) -> Tensor:
    """Mutual information between a pair's vote and the vote on a random pair, nats. scores: (m, members) -> (m, m).

    EPIG (Bickford Smith et al. 2023): what a vote tells of the preferences the model will be asked for, not of
    its parameters, so that odd pairs, like a very long reply beside an empty one, do not win by being odd. The random
    pairs are those of the candidates themselves, which are the policy's own draws.
    """
    first, second = torch.triu_indices(len(scores), len(scores), 1)
    p = (scores[first] - scores[second]).sigmoid()  # (P, members)
    sides = torch.stack([p, 1 - p])  # (2, P, members): the first wins, the second does
    joint = torch.einsum("apk,bqk->abpq", sides, sides) / p.shape[1]  # (2, 2, P, P)
    apart = sides.mean(-1)[:, None, :, None] * sides.mean(-1)[None, :, None, :]
    told = (torch.xlogy(joint, joint) - torch.xlogy(joint, apart)).sum((0, 1)).mean(1).clamp(min=0)  # (P,)
    value = torch.zeros(len(scores), len(scores), dtype=scores.dtype)
    value[first, second] = value[second, first] = told
    return value


def contrast(scores: Tensor) -> Tensor:
    """How far the members' mean holds each pair apart, logits. scores: (m, members) -> (m, m).

    Shows the best and the worst by today's model. Pairs of which one is hardly better than the other are ties or noise.
    """
    mean = scores.mean(-1)
    return (mean[:, None] - mean[None]).abs()


POLICIES: dict[str, Value] = {"disagreement": disagreement, "information": information, "prediction": prediction, "contrast": contrast}


def choose(scores: Tensor, n: int, policy: str, seed: int) -> tuple[int, ...]:
    """Indices of the `n` candidates to show, in shuffled order: the pair of highest value, then what adds most to them.

    scores: (m, members), finite, m >= n >= 2. Equal values are told apart by chance, which like the order follows
    `seed`. Raises ValueError for scores that are not finite.
    """
    if not bool(scores.isfinite().all()):
        raise ValueError("the reward members' scores are not finite")
    draw, value = random.Random(f"choice/{seed}"), POLICIES[policy](scores.double())
    order = draw.sample(range(len(scores)), len(scores))
    first, second = max(combinations(order, 2), key=lambda pair: float(value[pair]))
    chosen = [first, second]
    while len(chosen) < n:
        left = [i for i in order if i not in chosen]
        chosen.append(max(left, key=lambda i: float(value[i, chosen].sum())))
    draw.shuffle(chosen)
    return tuple(chosen)
