"""What is broken in a reply, as PPO charges for it: which tokens it came about in, what they answer for, how much, what ending too soon would cost, and what the reference
would never have said.

Owns what a fault costs and where that lands. Does not own what counts as a fault (`learner/text_checks.py`) or how rewards become advantages
(`learner/advantages.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.tokenizer import ChatTokenizer
from learner import rollout
from learner.rollout import Trajectories
from learner.text_checks import faults, unfinished

STEP, MOST = 0.2, 8.0  # of a price: its largest change an update, and how dear it may get, in prices at the start
FEW = 0.02  # share of replies: a reference that breaks less is as good as one that breaks so many
SPARE = 0.7  # of the reference's share is aimed at: a price that follows what broke comes late, and the share is an estimate


class FaultPrice:
    """What a fault costs: as little as keeps the policy's replies as whole as the reference's.

    Dual ascent on a Lagrange multiplier (Tessler et al. 2019, "Reward Constrained Policy Optimization"), in steps of at most `STEP` of it and
    never below where it began. Faults are few, so at a fixed price that is dear enough for every liking they drown what replies are liked for.
    """

    def __init__(self, price: float, reference: float) -> None:
        """reference: share of the reference's replies with a fault."""
        self.price, self.least, self.allowed = price, price, SPARE * reference

    def update(self, rate: float) -> None:
        """rate: share of the policy's replies with a fault."""
        error = (rate - self.allowed) / max(self.allowed, FEW)
        self.price = min(max(self.price * (1 + STEP * min(max(error, -1.0), 1.0)), self.least), MOST * self.least)


def broken_share(spans: Sequence[tuple[int, int, int]], replies: int) -> float:
    """Share of `replies` replies that have one of `fault_tokens`."""
    return len({row for row, _, _ in spans}) / replies


def fault_tokens(batch: Trajectories, tokenizer: ChatTokenizer) -> list[tuple[int, int, int]]:
    """(row, first, last) of every fault of `learner/text_checks.py`: the reply tokens in which it came about.

    Not what only its end makes a fault of a reply that `max_new_tokens` cut: that has a price of its own (`missing_eos_penalty`), and with room
    to go on it may have ended well.
    """
    found = []
    for i, (text, cut) in enumerate(zip(batch.texts, batch.cut.tolist(), strict=True)):
        if wrong := [fault for fault in faults(text) if not cut or fault.end <= len(text)]:
            starts = rollout.at_characters(tokenizer, batch.completions[i], [fault.start + 1 for fault in wrong])
            ends = rollout.at_characters(tokenizer, batch.completions[i], [fault.end for fault in wrong])
            found += [(i, first, last) for first, last in zip(starts, ends, strict=True)]
    return found


@dataclass(frozen=True)
class Endings:
    """What it would cost to end the reply in the place of each of its tokens, whether or not that was drawn.

    The policy's probability of ending there is known, so what is expected to be paid is its product with `costs`: the policy gradient of this one
    action summed over all tokens instead of sampled (Allen et al. 2017, "Mean Actor Critic"). Replies that stop in the middle of a sentence are
    one in a hundred, and most batches, having none, would say nothing against them while they say for shorter ones what people voted for. Where
    one is drawn it is charged like any other fault too: its score alone, which is that of a short reply, would pull the other way.
    """

    costs: Tensor  # (B, R), in the units of the advantages
    ids: tuple[int, ...]  # the end tokens

    @classmethod
    def of(cls, batch: Trajectories, tokenizer: ChatTokenizer, ids: tuple[int, ...], price: float) -> Endings:
        """`price` where `text_checks.unfinished` finds the reply so far no whole one, 0 elsewhere."""
        costs = torch.zeros(batch.mask.shape)
        for i, tokens in enumerate(batch.completions):
            costs[i, : len(tokens)] = torch.tensor([price * (unfinished(tokenizer.decode(tokens[:k])) is not None) for k in range(len(tokens))])
        return cls(costs.to(batch.mask.device), ids)


@dataclass(frozen=True)
class Outside:
    """What it costs to say what the reference, as people are served, would not have said there: a price, times the policy's probability of that.

    Every noisy step of the weights lifts what was unlikely, and a slip ("Itbe almost all") is a token that the reference gives next to nothing. It is
    drawn too seldom to be learned from, and its share of the KL is small beside what it spoils; but the probability of all such tokens together is
    known at each place without drawing, as it is for `Endings`. The reference's own nucleus is free, so a liking may move any of what it does say.
    """

    nucleus: Tensor  # (B, R, W), as `rollout.Divergence.nucleus`
    price: float  # in the units of the advantages


def fault_rewards(spans: Sequence[tuple[int, int, int]], mask: Tensor, penalty: float) -> Tensor:
    """(B, R): -penalty at the token with which a fault was complete, 0 elsewhere."""
    rewards = torch.zeros(mask.shape)
    for row, _, last in spans:
        rewards[row, last] = -penalty
    return rewards.to(mask.device)


def fault_advantages(spans: Sequence[tuple[int, int, int]], mask: Tensor, penalty: float, decay: float) -> Tensor:
    """(B, R): -penalty on the tokens in which a fault came about, and before them less by `decay` a token."""
    advantages = torch.zeros(mask.shape)
    for row, first, last in spans:
        own = torch.zeros(mask.shape[1])
        own[: first + 1] = decay ** torch.arange(first, -1, -1)
        own[first : last + 1] = 1.0
        advantages[row] = torch.minimum(advantages[row], -penalty * own)
    return advantages.to(mask.device)
