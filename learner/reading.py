"""What one pass of the reference says of replies: how far the policy is from it, what a value by least squares sees there, and, where the
reference is the bare base, what reward heads on it score by. So the base reads a batch once.

Owns which of these a pass is made for. Does not own log-probabilities and states (`learner/rollout.py`), features of states
(`learner/value.py`), scores (`learner/reward.py`) or what is made of any of them (`learner/ppo.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.features import feature_count
from engine.model import CausalModel
from learner import rollout
from learner.config import PPOConfig
from learner.reward import RewardModel
from learner.rollout import Trajectories
from learner.value import FittedValue, prefix_features


@dataclass(frozen=True)
class Compared:
    """The policy's replies, perhaps with `features` now, and at each of their tokens, (B, R), what `rollout.Divergence` has. seen: as `Reading.of`."""

    batch: Trajectories
    logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    kl: Tensor
    nucleus: Tensor  # (B, R, W)
    seen: Tensor | None


class Reading:
    """Passes of the reference, adapter `reference` or for None the bare base. fitted: the value by least squares, if there is one; heads: who scores."""

    def __init__(self, model: CausalModel, reference: str | None, config: PPOConfig, fitted: FittedValue | None, *heads: RewardModel) -> None:
        self.model, self.reference, self.config, self.fitted = model, reference, config, fitted
        self.limit = min(reward.limit for reward in heads)
        self.shared = reference is None and any(reward.reads_base for reward in heads)

    @torch.no_grad()
    def of(self, batch: Trajectories, *, value: bool = True) -> tuple[Trajectories, Tensor | None]:
        """Any replies, with `features` where heads read the base as this does, and what `fitted` sees of them, (B, R, 12); `value` says whether that is wanted."""
        features, fitted = self._blank(batch), self.fitted if value else None
        if features is None and fitted is None:
            return batch, None
        seen = rollout.over(self.model, batch, self.config.chunk_tokens, lambda rows: self._look(
            batch, rows, rollout.reply_hidden(self.model, batch, rows, self.reference, whole=True), features, fitted))  # fmt: skip
        return replace(batch, features=features), seen[0] if fitted else None

    def against(self, batch: Trajectories, policy: str) -> Compared:
        """The same of replies that adapter `policy` sampled, and how it differs from the reference there."""
        features, config = self._blank(batch), self.config

        def compute(rows: Tensor) -> tuple[Tensor, ...]:
            found = rollout.reply_divergence(self.model, batch, rows, policy, self.reference, config.temperature, config.nucleus)
            seen = self._look(batch, rows, found.ref_hidden, features, self.fitted)
            return (found.logprobs, found.ref_logprobs, found.entropy, found.kl, found.nucleus, *seen)

        logprobs, ref, entropy, kl, nucleus, *seen = rollout.over(self.model, batch, config.chunk_tokens, compute)
        return Compared(replace(batch, features=features), logprobs, ref, entropy, kl, nucleus, seen[0] if seen else None)

    def _blank(self, batch: Trajectories) -> Tensor | None:
        """(B, F) for the features of whole replies; None where no head reads the base, or would not read all of a reply and its prompt."""
        if not self.shared or int(batch.valid.sum(1).max()) > self.limit:
            return None
        return torch.zeros(len(batch), feature_count(self.model.hidden_size), device=batch.mask.device)

    def _look(self, batch: Trajectories, rows: Tensor, hidden: Tensor, features: Tensor | None, fitted: FittedValue | None) -> tuple[Tensor, ...]:
        """What `fitted` sees before each token, if there is one; fills in the rows' part of `features`. hidden: (n, R' + 1, D)."""
        if features is None and fitted is None:
            return ()
        found = prefix_features(self.model, batch, rows, hidden.float())
        if features is not None:
            features[rows] = found[torch.arange(len(rows), device=rows.device), batch.lengths[rows]]
        return () if fitted is None else (fitted.inputs(found[:, :-1]),)
