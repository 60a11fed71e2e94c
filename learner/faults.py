"""What is broken in a reply, as PPO charges for it: which tokens it came about in, and what they answer for.

Owns where a fault's cost lands. Does not own what counts as a fault (`learner/text_checks.py`) or how rewards become advantages
(`learner/advantages.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.tokenizer import ChatTokenizer
from learner import rollout
from learner.rollout import Trajectories
from learner.text_checks import faults


def fault_tokens(batch: Trajectories, tokenizer: ChatTokenizer) -> list[tuple[int, int, int]]:
    """(row, first, last) of every fault of `learner/text_checks.py`: the reply tokens in which it came about."""
    found = []
    for i, (text, reason) in enumerate(zip(batch.texts, batch.finish_reasons, strict=True)):
        if wrong := faults(text, reason):
            starts = rollout.at_characters(tokenizer, batch.completions[i], [fault.start + 1 for fault in wrong])
            ends = rollout.at_characters(tokenizer, batch.completions[i], [fault.end for fault in wrong])
            found += [(i, first, last) for first, last in zip(starts, ends, strict=True)]
    return found


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
