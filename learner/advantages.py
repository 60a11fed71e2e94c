"""Rewards to advantages: pure, tensors in and tensors out.

Owns where the score lands, generalised advantage estimation, the leave-one-out baseline and whitening. Does not own
the losses (`learner/losses.py`) or where rewards come from. Masks (B, T) are True on a reply's own tokens, its end token
included; they may be padded on either side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from learner.losses import masked_mean, masked_var


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """(B, T): -kl_coef * kl on every reply token, plus the score on the last *valid* token, not on column -1.

    scores: (B,). kl: (B, T), log pi - log pi_ref of each sampled token (Stiennon et al. 2020; Ouyang et al. 2022).
    """
    rewards = torch.where(mask, -kl_coef * kl, 0.0)
    rewards[torch.arange(len(scores), device=scores.device), last_valid(mask)] += scores
    return rewards


def last_valid(mask: Tensor) -> Tensor:
    """(B, T) -> (B,): column of each row's last True. Raises ValueError when a row has none."""
    if not bool(mask.any(1).all()):
        raise ValueError("a reply has no token: it cannot be rewarded")
    return mask.shape[1] - 1 - mask.flip(1).int().argmax(1)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns, (B, T) each, 0 outside the mask (Schulman et al. 2016, Eq. 16).

    delta_t = r_t + gamma V_(t+1) - V_t; A_t = delta_t + gamma lam A_(t+1); after the last valid token both are 0: a
    reply that was cut counts as ended there. values: (B, T), V before token t is chosen. Returns are A + V.
    """
    advantages, running = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    following = torch.zeros_like(rewards[:, 0])  # V_(t+1)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = torch.where(mask[:, t], delta + gamma * lam * running, 0.0)
        following = torch.where(mask[:, t], values[:, t], 0.0)
        advantages[:, t] = running
    return advantages, torch.where(mask, advantages + values, 0.0)


def leave_one_out(returns: Tensor, group: int) -> Tensor:
    """(B,) -> (B,): each return minus the mean of the other replies to the same prompt (Kool et al. 2019, RLOO).

    Replies to one prompt are consecutive, `group` of them. Raises ValueError when group < 2 or does not divide B.
    """
    if group < 2 or len(returns) % group:
        raise ValueError("leave-one-out needs at least two replies to every prompt, as many to each")
    grouped = returns.view(-1, group)
    others = (grouped.sum(1, keepdim=True) - grouped) / (group - 1)
    return (grouped - others).view(-1)


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Scale x to variance 1 over the masked entries, and to mean 0 unless shift_mean is False; 0 outside the mask.

    Rewards keep their mean (their sign means something), advantages lose it (Ziegler et al. 2019's code).
    """
    mean = masked_mean(x, mask)
    white = (x - mean) * torch.rsqrt(masked_var(x, mask) + 1e-8)
    return torch.where(mask, white if shift_mean else white + mean, 0.0)
