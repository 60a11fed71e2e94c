"""A reward model's scores as PPO is paid by them: saturating, and in units of the reference's own replies.

Owns the transformation and its units. Does not own the members' scores (`learner/reward.py`) or what is taken off them (`learner/ppo.py`).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from learner.reward import RewardDiverged, RewardModel
from learner.rollout import Trajectories


class Scorer:
    """How sure each member is that people prefer a reply to a good one of the version that the run begins at: log sigmoid(score - good).

    The sigmoid is Bradley-Terry's own, so what is already liked earns little more, and a policy gains by mending its worst replies
    and not by outdoing its best (Wang et al. 2024, "Transforming and Combining Rewards for Aligning Large Language Models"). Good
    is one deviation above the mean of `start`, the replies of the version that the gate will set this one against (None: the
    reference's); there, a high quantile of each prompt's. In deviations of the reference's replies to one prompt, so that members
    count alike. Raises RewardDiverged for a score that is not finite.
    """

    def __init__(self, reward: RewardModel, reference: Trajectories, start: Trajectories | None = None) -> None:
        self.reward = reward
        raw = self._raw(reference)  # (B, members)
        begun = raw if start is None else self._raw(start)
        self.good = begun.mean(0) + begun.std(0)
        liked = F.logsigmoid(raw - self.good)
        self.mean = liked.mean(0)
        grouped = liked.view(-1, reference.group, raw.shape[1])
        inner = grouped - grouped.mean(1, keepdim=True) if reference.group > 1 else grouped - self.mean
        freedom = max(1, len(raw) - (len(grouped) if reference.group > 1 else 1))
        self.std = ((inner**2).sum((0, 1)) / freedom).sqrt().clamp(min=1e-4)
        self.unit = (liked - self.mean) / self.std  # (B, members), of the reference's own replies

    def __call__(self, batch: Trajectories) -> Tensor:
        """(B, members), in deviations of the reference's replies; their mean is 0."""
        return (F.logsigmoid(self._raw(batch) - self.good) - self.mean) / self.std

    def _raw(self, batch: Trajectories) -> Tensor:
        scores = self.reward.score(batch.prompts, batch.completions, features=batch.features)
        if not bool(scores.isfinite().all()):
            raise RewardDiverged("the reward model gave a score that is not a finite number")
        return scores
