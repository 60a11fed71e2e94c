"""Which state of a policy is kept, and when held-out reward members say that going on would not make it better.

Owns the copy that can be gone back to and the two rules. Does not own the members' scores (`learner/scorer.py`) or the run (`learner/ppo.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

import torch

from engine.model import CausalModel

WINDOW = 4  # updates whose batches say together what a state is worth
FINALISTS = 3  # states that are then set side by side on the same prompts


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


class Finalists:
    """The states that may be the best of a run: those at which what its replies are worth, over the last `window` batches, was highest.

    A run that has what there is to get goes on moving, by the noise of its batches, and its last state may be far from its best. One
    batch tells little: 48 replies to 12 prompts are liked more or less by half a deviation for their prompts alone. So the best few
    are found by several batches, and the best of them on prompts that all answer. Of two less than `window` updates apart the better
    stands for both.
    """

    def __init__(self, count: int = FINALISTS, window: int = WINDOW) -> None:
        self.worth: list[float] = []
        self.count, self.window = count, window
        self.found: list[tuple[float, Kept]] = []  # mean worth, state; the best first

    def look(self, worth: float, state: Kept) -> None:
        """worth: of a batch that `state` wrote, in the units of the score and at prices that stay the same for the whole run."""
        self.worth.append(worth)
        recent = self.worth[-self.window :]
        if len(recent) < self.window:
            return
        near = [one for one in self.found if state.update - one[1].update < self.window]
        if all(fmean(recent) > mean for mean, _ in near):
            others = [one for one in self.found if one not in near]
            self.found = sorted([*others, (fmean(recent), state)], key=lambda one: -one[0])[: self.count]

    def best(self, worth_of: Callable[[Kept], float]) -> Kept | None:
        """The one with the highest `worth_of(state)`, asked while it is the policy; None where no state had batches enough."""
        if len(self.found) < 2:
            return self.found[0][1] if self.found else None
        worths = []
        for _, state in self.found:
            state.restore()
            worths.append(worth_of(state))
        return self.found[worths.index(max(worths))][1]
