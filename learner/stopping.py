"""Which state of a policy is kept, and when held-out reward members say that going on would not make it better.

Owns the copy that can be gone back to and the two rules. Does not own the members' scores (`learner/scorer.py`) or the run (`learner/ppo.py`).
"""

from __future__ import annotations

import math
from statistics import fmean

import torch

from engine.model import CausalModel

WINDOW = 4  # updates whose batches say together what a state is worth


class Kept:
    """A copy of the policy that can be gone back to, with what was measured on it."""

    def __init__(self, model: CausalModel, policy: str, update: int = 0, kl: float = 0.0, sample: str = "") -> None:
        self.update, self.kl, self.sample = update, kl, sample
        self.parameters = model.lora.parameters(policy)
        self.values = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Put the copy back."""
        for name, p in self.parameters.items():
            p.copy_(self.values[name])


class Judged:
    """Notices when the held-out members stop liking what the optimised ones go on liking (Gao et al. 2023's overoptimisation).

    Where the KL price calls the policy back both like it less, and have not parted.
    """

    def __init__(self, patience: int, part: float) -> None:
        self.patience, self.part = patience, part
        self.looks: list[tuple[float, float]] = []  # by the held-out members, by the optimised ones
        self.best: Kept | None = None

    @property
    def newest_is_best(self) -> bool:
        return self.looks[-1][0] == max(judges for judges, _ in self.looks)

    def parted(self, judges: float, score: float) -> bool:
        """Whether in each of the last `patience` looks the judges are more than `part` (deviations) under their best look
        before, and the score is not under it with them."""
        self.looks.append((judges, score))
        recent, before = self.looks[-self.patience :], self.looks[: -self.patience]
        if not before:
            return False
        best_judges, best_score = max(before)
        return all(best_judges - j - max(0.0, best_score - s) > self.part for j, s in recent)


class Best:
    """The state that a run ends with: the one at which what its replies are worth, over the last `window` batches, was highest.

    A run that has what there is to get goes on moving, by the noise of its batches, and its last state may be far from its best. One
    batch tells little: 48 replies to 12 prompts are liked more or less by half a deviation for their prompts alone.
    """

    def __init__(self, window: int = WINDOW) -> None:
        self.worth: list[float] = []
        self.window, self.highest = window, -math.inf
        self.kept: Kept | None = None

    def look(self, worth: float, state: Kept) -> None:
        """worth: of a batch that `state` wrote, in the units of the score and at prices that stay the same for the whole run."""
        self.worth.append(worth)
        recent = self.worth[-self.window :]
        if len(recent) == self.window and fmean(recent) > self.highest:
            self.highest, self.kept = fmean(recent), state
