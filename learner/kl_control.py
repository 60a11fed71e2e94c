"""What leaving the reference costs: the price beta of a nat, how it is found, and how many nats so many votes are worth. Pure numbers."""

from __future__ import annotations

import math

from learner.config import PPOConfig

RAMP = 0.25  # share of a run over which the KL target moves from where the run began to its place


class KLController:
    """Moves beta so that the KL a reply stays near a target (Ziegler et al. 2019, section 2.2).

    Here the target moves from where the run begins to its place over the first quarter of it, and beta stays above a third of where it
    began. Most runs begin at 0 nats, under any fixed target: by the time the policy came near, the price would have been given away.
    What moves slowly comes too late for a policy that moves fast, so over the target `price` also grows at once.
    """

    def __init__(self, beta: float, target: float, horizon: float) -> None:
        self.beta, self.least, self.target, self.horizon = beta, beta / 3, target, horizon
        self.begun: float | None = None  # nats at the first update

    def update(self, kl: float, replies: int, done: float = 1.0) -> None:
        """kl: nats a reply, mean over `replies` of them, when the share `done` of the run is. The error is clipped to 20%."""
        self.begun = kl if self.begun is None else self.begun
        target = max(self.begun + min(1.0, done / RAMP) * (self.target - self.begun), 0.1 * self.target)
        error = min(max(kl / target - 1, -0.2), 0.2)
        self.beta = max(self.least, self.beta * (1 + error * replies / self.horizon))

    def price(self, kl: float) -> float:
        """What a nat costs replies that are `kl` nats away: beta, and over the target with the square of how far."""
        return self.beta * max(1.0, kl / self.target) ** 2


def kl_price(target: float) -> float:
    """beta at which the best policy for a normal score of deviation 1 is `target` nats from the reference: 1 / sqrt(2 target).

    That policy is pi_ref exp(score / beta) / Z (Ziegler et al. 2019, section 2; Korbak et al. 2022): it moves the score's mean by
    1 / beta and leaves its deviation, so KL = 1 / (2 beta^2).
    """
    return 1 / math.sqrt(2 * target)


def kl_warranted(config: PPOConfig, votes: int) -> float:
    """Nats a reply to aim at with a reward model of so many votes.

    The distance at which gold reward turns grows with the votes the proxy saw (Gao et al. 2023, section 3.3): what sixteen votes
    say is not worth the way that a hundred are, and a first version that went too far is in the way of all that follow.
    """
    return config.kl_target * min(1.0, math.sqrt(votes / config.kl_votes))
