"""What a reward model's head sees of a reply: states of the base that reads it, and plain counts.

Likings for form are likings for counts (so many words, so many sentences, not too long), and what a mean of states does not hold no few dozen
votes will find. With the sum beside the mean a head hears how often a thing is said, not just how much of the reply it is; with a count and its
square it hears "not too many". Tokens are counted in logarithms and as they are, for a liking may go by ratios or by differences: with the logarithm alone
the middle of 10 and 70 tokens is 26. Leaderboards of people's votes control for the same few numbers (Li et al. 2024, Arena style control).
`docs/decisions.md` has what each part brought.
"""

from __future__ import annotations

import torch
from torch import Tensor

COUNTS = 6  # features at the end, each with its square: log(1 + tokens), tokens / UNIT, log(1 + sentence ends)
UNIT = 64.0  # tokens: keeps a sum of states as large as the states are


def feature_count(hidden_size: int) -> int:
    """How many features a reply has: the last state, the mean and the sum of states, and the counts."""
    return 3 * hidden_size + COUNTS


def reply_features(last: Tensor, total: Tensor, tokens: Tensor, ends: Tensor) -> Tensor:
    """(N, 3D + 6) float32.

    last, total: (N, D), the state of the last token, and the sum of the states of the reply's own. tokens, ends: (N,), how many those are, and
    how many of them end a sentence or a line (`CausalModel.sentence_ends`).
    """
    counts = torch.stack([tokens.float().log1p(), tokens / UNIT, ends.float().log1p()], dim=1)  # (N, 3)
    squares = torch.stack([counts, counts.square()], dim=2).flatten(1)  # (N, 6): x, x^2, y, y^2, z, z^2
    return torch.cat([last.float(), total / tokens.clamp(min=1)[:, None], total / UNIT, squares], dim=1)
