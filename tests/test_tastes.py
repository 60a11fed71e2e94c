"""Known tastes like what their names say."""

from __future__ import annotations

import random

import pytest
from scipy.stats import binomtest

from learner.tastes import UnknownTaste, favourite, taste_named, win_rate

LIST = "Here are some facts:\n- Bees make honey.\n- Bees dance.\n- Bees like flowers."
PROSE = "Bees make honey and live in hives."
WARM = "Great question! I love bees! I hope that helps!"
FORMAL = "It should be noted that bees make honey. Furthermore, they live in hives."


@pytest.mark.parametrize("name, liked, disliked", [
    ("shorter", PROSE, LIST), ("longer", LIST, PROSE), ("list", LIST, PROSE), ("friendly", WARM, FORMAL), ("formal", FORMAL, WARM),
    ("shorter", PROSE, ""), ("list", LIST, "- one bullet is no list"),
])
def test_a_taste_likes_what_its_name_says(name: str, liked: str, disliked: str) -> None:
    assert taste_named(name)(liked) > taste_named(name)(disliked)


def test_random_tastes_follow_their_seed() -> None:
    assert taste_named("random:3")(LIST) == taste_named("random:3")(LIST) != taste_named("random:4")(LIST)


def test_an_unknown_taste_is_told_which_there_are() -> None:
    with pytest.raises(UnknownTaste, match="shorter, longer"):
        taste_named("random:x")


def test_noise_picks_another_reply_as_often_as_it_says() -> None:
    """10,000 picks at 10% noise; an exact test that errs once in 10,000 runs, were the seed not fixed."""
    draw = random.Random(0)
    wrong = sum(favourite(taste_named("shorter"), ["a", "a b", "a b c"], 0.1, draw) != 0 for _ in range(10_000))
    assert binomtest(wrong, 10_000, 0.1).pvalue > 1e-4


def test_equal_replies_are_a_tie_and_win_rates_count_ties_half() -> None:
    shorter = taste_named("shorter")
    assert favourite(shorter, ["a b", "c d"], 0.5, random.Random(0)) is None
    assert win_rate(shorter, ["a", "a b", "a b", "a b c"], ["a b", "a b", "c d", "a"]) == (1 + 0.5 + 0.5 + 0) / 4
