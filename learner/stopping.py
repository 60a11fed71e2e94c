"""Which state of a policy is kept, and when held-out reward members say that going on would not make it better.

Owns the copy that can be gone back to and the rule. Does not own the members' scores (`learner/scorer.py`) or the run (`learner/ppo.py`).
"""

from __future__ import annotations

import torch

from engine.model import CausalModel


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
