"""Known tastes: what a simulated person likes, as a number for a text. Pure; asks nobody and samples nothing.

A taste is the gold standard of simulations and benchmarks: it picks favourites, and afterwards it judges how well the
assistant has learned it. The learner never sees it. Four are simple (shorter, friendly, formal, list); four are hard, in a way of their own each:
`sentences:N` counts, `words:N` has a best point in the middle, `composite` wants three things at once, and `contrary`
wants what the bundled model rarely does, and cannot be had by length. `python -m benchmarks.tastes` measures how rare and how far length goes.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence

Taste = Callable[[str], float]

WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
BULLET = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+\S", re.M)
WARM = re.compile(
    r"!|[\U0001F300-\U0001FAFF\u2600-\u27BF]|\b(?:great|happy|glad|love|lovely|wonderful|fun|enjoy|friend|thanks|thank you|"
    r"hope|amazing|cool|delighted|welcome)\b", re.I)
FORMAL = re.compile(
    r"\b(?:furthermore|moreover|in addition|consequently|therefore|thus|in summary|it should be noted|it is worth noting|"
    r"may be described|with regard to|regarding|please do not hesitate|in order to|of assistance|would be pleased|"
    r"i trust|i regret|it is (?:advisable|recommended)|it may be|the following)\b", re.I)
SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+|\n+")
TO_THE_READER = re.compile(r"\?|\b(?:you|your|yours|yourself|let['’]s)\b", re.I)
CASUAL = re.compile(r"!|\b\w+['’](?:s|re|ll|ve|t|d|m)\b|\b(?:hey|hi|yeah|cool|awesome|fun)\b", re.I)


class UnknownTaste(ValueError):
    """There is no taste of that name; the message lists those there are."""


def words(text: str) -> int:
    """How many words."""
    return len(WORD.findall(text))


def bullets(text: str) -> int:
    """How many bullet or numbered lines; a single one is not a list."""
    found = len(BULLET.findall(text))
    return found if found >= 2 else 0


def sentences(text: str) -> list[str]:
    """Sentences and list lines, those without a word left out. "e.g." and the like end one: near enough to count by."""
    return [part for part in SENTENCE_END.split(text) if WORD.search(part)]


def shorter(text: str) -> float:
    """Fewer words are better; saying nothing is worst."""
    return -float(words(text)) if words(text) else -1e6


def longer(text: str) -> float:
    """More words are better."""
    return float(words(text))


def friendly(text: str) -> float:
    """Warm words and exclamation marks, up to five of them."""
    return float(min(len(WARM.findall(text)), 5))


def formal(text: str) -> float:
    """Formal phrases (up to four) less casual ones (up to four)."""
    return float(min(len(FORMAL.findall(text)), 4) - min(len(CASUAL.findall(text)), 4))


def as_list(text: str) -> float:
    """Bullets, up to six of them; prose is worth nothing."""
    return float(min(bullets(text), 6))


def composite(text: str) -> float:
    """Warm, a list, and a question at the end, each worth a point at most: two warm words, three bullets, the last mark.

    A third of the best is all that any one of them brings, so the three must come together.
    """
    return min(len(WARM.findall(text)), 2) / 2 + min(bullets(text), 3) / 3 + float(text.rstrip().endswith("?"))


def contrary(text: str) -> float:
    """The share of sentences that speak to the reader or ask something, instead of stating facts.

    Against the bundled starter's habit: of 800 replies at temperature 1 to 100 training and 100 held-out prompts, two of
    three (67%) do nothing but state facts, and so do 86% of the sentences of the average reply. A share, so length
    cannot fake it: its rank correlation with the number of words is +0.08, and among 4 replies that it tells apart the
    longest is a favourite in 30% and the shortest in 25%, where any one is in 29% (`benchmarks/tastes.py`).
    """
    parts = sentences(text)
    return sum(bool(TO_THE_READER.search(part)) for part in parts) / len(parts) if parts else 0.0


def near(count: Callable[[str], int], target: int) -> Taste:
    """The nearer `count` is to `target`, the better, one apart as much worse above as below; saying nothing is worst."""
    return lambda text: -float(abs(count(text) - target)) if words(text) else -1e6


FEATURES: dict[str, Callable[[str], float]] = {  # each roughly between 0 and 1 on short replies
    "length": lambda text: math.log1p(words(text)) / 5,
    "bullets": lambda text: min(bullets(text), 6) / 6,
    "warmth": lambda text: friendly(text) / 5,
    "formality": lambda text: (formal(text) + 4) / 8,
    "word length": lambda text: sum(map(len, WORD.findall(text))) / max(words(text), 1) / 8,
    "commas": lambda text: min(text.count(","), 8) / 8,
    "speaks to you": lambda text: min(len(re.findall(r"\byou(?:r|rs)?\b", text, re.I)), 4) / 4,
}


def random_taste(seed: int) -> Taste:
    """A linear taste over FEATURES with weights drawn from a standard normal."""
    draw = random.Random(seed)
    weights = {name: draw.gauss(0, 1) for name in FEATURES}
    return lambda text: sum(weight * FEATURES[name](text) for name, weight in weights.items())


TASTES: dict[str, Taste] = {
    "shorter": shorter, "longer": longer, "friendly": friendly, "formal": formal, "list": as_list,
    "composite": composite, "contrary": contrary,
}  # fmt: skip
NUMBERED: dict[str, Callable[[int], Taste]] = {  # `name:N`
    "sentences": lambda n: near(lambda text: len(sentences(text)), n),
    "words": lambda n: near(words, n),
    "random": random_taste,
}
SIMPLE, HARD = ("shorter", "friendly", "formal", "list"), ("sentences:3", "words:40", "composite", "contrary")
NAMES = ", ".join([*TASTES, "sentences:N", "words:N"]) + " or random:SEED"  # for people


def taste_named(name: str) -> Taste:
    """A taste by its name, such as `friendly`, `sentences:3`, `words:40` or `random:7`. Raises UnknownTaste."""
    if name in TASTES:
        return TASTES[name]
    kind, _, number = name.partition(":")
    if kind in NUMBERED and re.fullmatch(r"[0-9]{1,9}", number) and (kind == "random" or int(number)):
        return NUMBERED[kind](int(number))
    raise UnknownTaste(f"there is no taste {name[:40]!r}; there are {NAMES}, N at least 1")


def favourite(taste: Taste, texts: Sequence[str], noise: float, draw: random.Random) -> int | None:
    """The index a person with this taste picks, None for a tie of them all. With probability `noise` it is any other one."""
    scores = [taste(text) for text in texts]
    best = [i for i, score in enumerate(scores) if score == max(scores)]
    if len(best) == len(texts):
        return None
    pick = draw.choice(best)
    if draw.random() < noise:
        pick = draw.choice([i for i in range(len(texts)) if i != pick])
    return pick


def win_rate(taste: Taste, ours: Sequence[str], theirs: Sequence[str]) -> float:
    """Share of paired texts where ours is liked better; ties count half."""
    points = [(a > b) + 0.5 * (a == b) for a, b in zip(map(taste, ours), map(taste, theirs), strict=True)]
    return sum(points) / len(points)
