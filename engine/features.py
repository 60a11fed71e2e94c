"""What a reward model's head sees of a reply: states of the base that reads it, and plain counts.

Likings for form are likings for counts (so many words, so many sentences, not too long), and what a mean of states does not hold no few dozen
votes will find. With the sum beside the mean a head hears how often a thing is said, not just how much of the reply it is; with a count and its
square it hears "not too many". Leaderboards of people's votes control for the same few numbers (Li et al. 2024, Arena style control).
`docs/decisions.md` has what each part brought.
"""

from __future__ import annotations

import torch
from torch import Tensor

COUNTS = 4  # features at the end: log(1 + tokens) and its square, log(1 + sentence ends) and its square
SUM_UNIT = 64.0  # tokens: keeps a sum of states as large as the states are


def feature_count(hidden_size: int) -> int:
    """How many features a reply has: the last state, the mean and the sum of states, and the counts."""
    return 3 * hidden_size + COUNTS


def reply_features(last: Tensor, total: Tensor, tokens: Tensor, ends: Tensor) -> Tensor:
    """(N, 3D + 4) float32.

    last, total: (N, D), the state of the last token, and the sum of the states of the reply's own. tokens, ends: (N,), how many those are, and
    how many of them end a sentence or a line (`CausalModel.sentence_ends`).
    """
    counts = torch.stack([tokens.float().log1p(), ends.float().log1p()], dim=1)  # (N, 2)
    squares = torch.stack([counts, counts.square()], dim=2).flatten(1)  # (N, 4): x, x^2, y, y^2
    return torch.cat([last.float(), total / tokens.clamp(min=1)[:, None], total / SUM_UNIT, squares], dim=1)
