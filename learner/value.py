"""Value functions: what reward a reply will still get, as far as one can tell before each of its tokens.

Both start from what the reward model says of the reply so far. `FittedValue` is a handful of numbers found by least squares, and costs next
to nothing; `TrainedValue` is a network of its own, trained beside the policy. Does not own the returns they learn from or the advantages made
with them (`learner/advantages.py`, `learner/ppo.py`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from engine.features import COUNTS, reply_features
from engine.model import CausalModel
from learner import rollout
from learner.advantages import leave_one_out
from learner.reward import RewardModel
from learner.rollout import Trajectories
from learner.scorer import Scorer

VALUE = "value"  # the adapter of a trained value function; it lives as long as a run
RIDGE = 1e-3  # of each input's own square
KEEP = 0.8  # what a batch counts when the next one is fitted with it: the policy moves on


def prefix_features(model: CausalModel, batch: Trajectories, rows: Tensor, hidden: Tensor) -> Tensor:
    """(n, T, F) `engine.features.reply_features` of the first 0, 1, ... T - 1 tokens of the replies to `rows`.

    hidden: (n, T, D), the states after so many of them, the prompt's last one first: `rollout.reply_hidden`'s.
    """
    n, length, _ = hidden.shape
    total = torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, 1:].cumsum(1)], 1)
    ended = model.sentence_ends[batch.tokens[rows, : length - 1]].cumsum(1)
    ends = torch.cat([ended.new_zeros(n, 1), ended], 1)
    said = torch.arange(length, device=hidden.device).repeat(n)
    return reply_features(hidden.flatten(0, 1), total.flatten(0, 1), said, ends.flatten()).view(n, length, -1)


class FittedValue:
    """V linear in thirteen numbers, by ridge regression of the return on them at every token of the batches so far.

    The numbers are what the members' mean head makes of the last state, of the mean and of the sum of states so far, the counts, the products
    of mean and sum with the logarithm of tokens, 1, and what came of the other replies to the prompt. The states are the reference's, which the
    KL takes anyway. A reply's own rewards are not in the V that it is compared with, so with lam = 1 the policy gradient keeps its mean
    (Williams 1992; Kool et al. 2019) and loses what V foresees of its noise (Greensmith et al. 2004).
    """

    def __init__(self, reward: RewardModel) -> None:
        self.weight = torch.stack([m.head.weight[0].detach() for m in reward.members]).mean(0)  # (F,)
        size = 3 + COUNTS + 2 + 1 + 1
        self.products = torch.zeros(size, size, dtype=torch.float64, device=self.weight.device)  # of the inputs with each other
        self.returned = torch.zeros(size, dtype=torch.float64, device=self.weight.device)  # of the inputs with the returns

    @torch.no_grad()
    def inputs(self, features: Tensor) -> Tensor:
        """(n, R', 12) float32. features: (n, R', F), what the reference makes of the replies before each token (`prefix_features`)."""
        states, counts = features[..., :-COUNTS] * self.weight[:-COUNTS], features[..., -COUNTS:]
        said = states.unflatten(-1, (3, -1)).sum(-1)  # (n, R', 3): of the last state, the mean, the sum
        return torch.cat([said, counts, said[..., 1:] * counts[..., :1], torch.ones_like(counts[..., :1])], -1)

    @staticmethod
    def beside(inputs: Tensor, came: Tensor, group: int) -> Tensor:
        """(B, R, 13): `inputs` (B, R, 12), and of `came` (B,), the replies' returns, the mean over the `group - 1` others to the prompt; 0 without others."""
        others = came - leave_one_out(came, group) if group > 1 else torch.zeros_like(came)
        return torch.cat([inputs, others[:, None, None].expand(*inputs.shape[:2], 1)], -1)

    def fit(self, inputs: Tensor, returns: Tensor, mask: Tensor) -> None:
        """Take in a batch. inputs: (B, R, 13); returns: (B, R), the rewards from each token on; mask: (B, R)."""
        x, y = inputs[mask].double(), returns[mask].double()
        self.products = KEEP * self.products + x.T @ x
        self.returned = KEEP * self.returned + x.T @ y

    def __call__(self, inputs: Tensor) -> Tensor:
        """(B, R): the value before each token, by the batches taken in."""
        ridge = torch.diag(RIDGE * self.products.diagonal() + 1e-9)
        return (inputs.double() @ torch.linalg.solve(self.products + ridge, self.returned)).float()


class TrainedValue(nn.Module):
    """V of every reply position, in the scorer's units: starts as what one reward member says of the reply up to there.

    The scorer's log sigmoid is taken to first order there, x / 2 - log 2, so that V is linear in the head.
    """

    def __init__(self, model: CausalModel, reward: RewardModel, scorer: Scorer) -> None:
        super().__init__()
        member = reward.members[0]
        if member.adapter:
            model.lora.copy(member.adapter, VALUE, trainable=True)
        else:
            model.lora.create(VALUE, r=reward.config.lora_r, alpha=reward.config.lora_alpha)
        self.model = [model]  # in a list, so that its parameters are not this module's
        self.head = nn.Linear(member.head.in_features, 1).to(model.device)
        with torch.no_grad():
            self.head.weight.copy_(member.head.weight / 2 / scorer.std[0])
            self.head.bias.copy_(((member.head.bias - scorer.good[0]) / 2 - math.log(2) - scorer.mean[0]) / scorer.std[0])

    def forward(self, batch: Trajectories, rows: Tensor) -> Tensor:
        """(n, R'): the value before each reply token is chosen."""
        model = self.model[0]
        hidden = rollout.reply_hidden(model, batch, rows, VALUE).float()  # (n, R', D), the prompt's last state first
        return self.head(prefix_features(model, batch, rows, hidden)).squeeze(-1)

    def trained(self) -> list[nn.Parameter]:
        """Adapter and head."""
        return [*self.model[0].lora.parameters(VALUE).values(), *self.head.parameters()]
