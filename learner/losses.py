"""The learner's loss functions: pure, tensors in and tensors out.

Owns Bradley-Terry, Davidson and the outside option (the reward model), the clipped policy and value losses, the KL estimators and the
masked statistics they are averaged with (PPO). Does not own models, optimisers, or how advantages come about
(`learner/advantages.py`). A mask is True where a token counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Pairs = Sequence[tuple[int, int]]


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x where mask is True, a scalar; 0 when it nowhere is."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Unbiased variance (over n - 1) of x where mask is True, a scalar; 0 for fewer than two."""
    squares = torch.where(mask, (x - masked_mean(x, mask)) ** 2, 0.0).sum()
    return squares / (mask.sum() - 1).clamp(min=1)


# ---------------------------------------------------------------------------------------------- preferences


def bradley_terry(scores: Tensor, strict: Pairs) -> Tensor:
    """Mean over (winner, loser) pairs of -log sigmoid(s_w - s_l), nats (Bradley & Terry 1952).

    scores: (K,), the replies of one comparison. With all C(K, 2) pairs of a full ranking this is Ouyang et al. 2022,
    Eq. 1: the pairs of one comparison together weigh as much as one vote. 0 without pairs.
    """
    if not strict:
        return scores.sum() * 0.0
    winner, loser = _columns(strict, scores)
    return -F.logsigmoid(scores[winner] - scores[loser]).mean()


def davidson(scores: Tensor, strict: Pairs, tied: Pairs, log_nu: Tensor) -> Tensor:
    """Mean negative log-likelihood over strict and tied pairs, nats (Davidson 1970).

    With d = s_i - s_j: P(i wins) = e^(d/2) / Z, P(tie) = nu / Z, Z = e^(d/2) + e^(-d/2) + nu. As nu goes to 0 this is
    Bradley-Terry, and given that a pair is no tie it is Bradley-Terry for any nu. log_nu: scalar. 0 without pairs.
    """
    if not strict and not tied:
        return (scores.sum() + log_nu) * 0.0
    i, j = _columns([*strict, *tied], scores)
    half = (scores[i] - scores[j]) / 2
    outcomes = torch.stack([half, -half, log_nu.expand_as(half)])  # (3, pairs)
    seen = torch.cat([half[: len(strict)], log_nu.expand(len(tied))])
    return (outcomes.logsumexp(0) - seen).mean()


def preference_loss(scores: Tensor, strict: Pairs, tied: Pairs, log_nu: Tensor | None = None) -> Tensor:
    """Loss of one comparison's ranking: Davidson where there is a tie parameter, else Bradley-Terry on strict pairs."""
    return bradley_terry(scores, strict) if log_nu is None else davidson(scores, strict, tied, log_nu)


def outside_option(scores: Tensor, accepted: Sequence[int], refused: Sequence[int], level: Tensor) -> Tensor:
    """What a vote says of "none of them", as one more item with score `level`, nats (Luce 1959; Haaijer et al. 2001).

    scores: (K,), the replies shown. Picking one of `accepted` where none could be said is a win over the outside option,
    refusing all is a win of the outside option over each of `refused`. Every such pair weighs 1/K, the pairs of one pick
    among several 1/K together: with equal weights both ways the level and the scores of Luce's choice among K + 1 are
    what minimises the expectation (Azari Soufiani et al. 2013, on breaking rankings into pairs). 0 without either.
    """
    loss = (scores.sum() + level) * 0.0
    if accepted:
        loss = loss + F.softplus(level - scores[list(accepted)]).mean()
    if refused:
        loss = loss + F.softplus(scores[list(refused)] - level).sum()
    return loss / len(scores)


def _columns(pairs: Pairs, like: Tensor) -> tuple[Tensor, Tensor]:
    left, right = torch.tensor(list(pairs), device=like.device).unbind(1)
    return left, right


# ---------------------------------------------------------------------------------------------- KL estimators


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log p - log q of tokens sampled from p: unbiased for KL(p, q), may be negative (Schulman 2020, k1)."""
    return logprobs - ref_logprobs


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """q/p - 1 - log(q/p): unbiased and never negative (Schulman 2020, k3)."""
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


# ---------------------------------------------------------------------------------------------- PPO


@dataclass(frozen=True)
class Clipped:
    """A clipped loss and what to log beside it. All scalars; only `loss` carries a gradient."""

    loss: Tensor
    clipfrac: Tensor  # share of tokens whose clipped term was the larger, so that their gradient is cut
    mean: Tensor  # mean ratio (policy) or mean prediction (value)
    kl: Tensor  # k3 estimate of KL(old, new) a token, nats (policy); 0 for the value loss


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float) -> Clipped:
    """PPO's clipped surrogate, to be minimised (Schulman et al. 2017, Eq. 7), averaged over masked tokens.

    All (B, T). Each token's term is max(-A r, -A clamp(r, 1 - clip, 1 + clip)), r = exp(logprobs - old_logprobs).
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    plain, cut = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    with torch.no_grad():
        kl = masked_mean(kl_k3(torch.zeros_like(log_ratio), log_ratio), mask)  # tokens came from the old policy
        clipfrac = masked_mean((cut > plain).float(), mask)
        mean = masked_mean(ratio, mask)
    return Clipped(masked_mean(torch.max(plain, cut), mask), clipfrac, mean, kl)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Clipped:
    """Half the mean squared error, with the prediction held within `clip` of the old one where that is worse.

    All (B, T). As in OpenAI's baselines (Schulman et al. 2017's code) and TRL: 0.5 mean max((V - R)^2, (Vc - R)^2).
    """
    held = old_values + (values - old_values).clamp(-clip, clip)
    plain, cut = (values - returns) ** 2, (held - returns) ** 2
    with torch.no_grad():
        clipfrac = masked_mean((cut > plain).float(), mask)
        mean = masked_mean(values, mask)
    return Clipped(0.5 * masked_mean(torch.max(plain, cut), mask), clipfrac, mean, torch.zeros_like(mean))
