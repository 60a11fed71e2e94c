"""Made-up votes for the tests of the reward model: random prompts and replies, and who of them wins."""

from __future__ import annotations

import random

from learner.config import RewardConfig
from learner.data import RankedExample

SMALL = RewardConfig(members=2, folds=3, epochs=1, lora_r=4, lora_alpha=8, batch=4)


def quiet(fraction: float, message: str) -> None:
    """Progress that nobody looks at."""


def replies(count: int, seed: int, k: int = 3, end: int = 1) -> list[tuple[tuple[int, ...], list[tuple[int, ...]]]]:
    """Random prompts with k random replies each."""
    rng = random.Random(seed)

    def draw(least: int, most: int) -> tuple[int, ...]:
        return tuple(rng.randrange(5, 400) for _ in range(rng.randrange(least, most)))

    return [(draw(4, 9), [(*draw(3, 20), end) for _ in range(k)]) for _ in range(count)]


def example(prompt: tuple, completions: list, groups: list, n: int, ties: bool = False) -> RankedExample:
    ranked = tuple(tuple(g) for g in groups)
    return RankedExample(prompt, tuple(completions), ranked, "ann", f"p{n}", f"c{n}", str(n), str(n), n, ties)


def shortest_wins(count: int, seed: int) -> list[RankedExample]:
    out = []
    for n, (prompt, completions) in enumerate(replies(count, seed)):
        best = min(range(len(completions)), key=lambda i: len(completions[i]))
        out.append(example(prompt, completions, [[best], [i for i in range(3) if i != best]], n))
    return out


def repeating_wins(count: int, seed: int) -> list[RankedExample]:
    """The best of three replies says one word over and over; which place it has is random."""
    rng, out = random.Random(seed), []
    for n, (prompt, completions) in enumerate(replies(count, seed)):
        best = rng.randrange(3)
        completions[best] = (*completions[best][:2], *[7] * 6, 1)
        out.append(example(prompt, completions, [[best], [i for i in range(3) if i != best]], n))
    return out
