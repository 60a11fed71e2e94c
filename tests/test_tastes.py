"""Known tastes like what their names say."""

from __future__ import annotations

import random

import pytest
from scipy.stats import binomtest

from learner.tastes import HARD, SIMPLE, UnknownTaste, favourite, sentences, taste_named, win_rate

LIST = "Here are some facts:\n- Bees make honey.\n- Bees dance.\n- Bees like flowers."
PROSE = "Bees make honey and live in hives."
WARM = "Great question! I love bees! I hope that helps!"
FORMAL = "It should be noted that bees make honey. Furthermore, they live in hives."


@pytest.mark.parametrize("name, liked, disliked", [
    ("shorter", PROSE, LIST), ("longer", LIST, PROSE), ("list", LIST, PROSE), ("friendly", WARM, FORMAL), ("formal", FORMAL, WARM),
    ("shorter", PROSE, ""), ("list", LIST, "- one bullet is no list"),
    ("sentences:1", PROSE, WARM), ("sentences:3", WARM, PROSE), ("sentences:3", PROSE, ""), ("sentences:4", LIST, WARM),
    ("words:7", PROSE, LIST), ("words:14", LIST, PROSE), ("words:2", PROSE, ""),
    ("composite", LIST + " Do you like them?", LIST), ("composite", LIST, PROSE), ("composite", WARM, PROSE),
    ("contrary", "Do you like bees?", PROSE), ("contrary", "You can help bees.", LIST), ("contrary", "Let's talk. Bees dance.", WARM),
])
def test_a_taste_likes_what_its_name_says(name: str, liked: str, disliked: str) -> None:
    assert taste_named(name)(liked) > taste_named(name)(disliked)


def test_random_tastes_follow_their_seed() -> None:
    assert taste_named("random:3")(LIST) == taste_named("random:3")(LIST) != taste_named("random:4")(LIST)


@pytest.mark.parametrize("text, count", [
    ("", 0), ("One", 1), ("One. Two! Three?", 3), ('He said "yes." Then he left.', 2), ("About:\n- a b\n- c d", 3), ("Pi is 3.14.", 1), ("!!! ...", 0),
])
def test_sentences_are_counted_as_a_person_counts_them(text: str, count: int) -> None:
    assert len(sentences(text)) == count


@pytest.mark.parametrize("name, at", [("sentences:3", 3), ("words:6", 6)])
def test_a_counting_taste_falls_by_one_a_step_on_both_sides_of_its_target(name: str, at: int) -> None:
    one = "Bees dance. " if name.startswith("sentences") else "bees "
    assert [taste_named(name)(one * n) for n in range(1, 2 * at)] == [-abs(n - at) for n in range(1, 2 * at)]


def test_no_one_or_two_parts_of_the_composite_are_enough() -> None:
    """Each part alone, however much of it, brings a third of all."""
    composite = taste_named("composite")
    warm, asks = "Great! " * 9, "Why?"
    listed = "\n".join("- a bee" for _ in range(9)) + "\n"
    assert [composite(text) for text in (warm, listed, asks)] == [1, 1, 1]
    assert composite(warm + "\n" + listed) == composite(listed + asks) == composite(warm + asks) == 2
    assert composite(warm + "\n" + listed + asks) == 3


def test_neither_more_nor_fewer_words_change_what_contrary_thinks() -> None:
    """Repeating all of a text, or lengthening its sentences, leaves the taste where it was: length cannot fake it."""
    contrary = taste_named("contrary")
    text = "Bees make honey. Do you like it? They dance. You may watch."
    assert contrary(text) == contrary(" ".join([text] * 5)) == contrary(text.replace("honey", "a lot of sweet golden honey")) == 0.5


def test_every_taste_of_the_benchmark_exists_and_no_two_agree() -> None:
    texts = [PROSE, LIST, WARM, FORMAL, LIST + " Do you like them?", "Bees dance.", "You can help bees. Would you?"]
    orders = {tuple(taste_named(name)(text) for text in texts) for name in (*SIMPLE, *HARD)}
    assert len(SIMPLE) == len(HARD) == 4 and len(orders) == 8


@pytest.mark.parametrize("name", ["random:x", "random:", "words:", "words:0", "sentences:-1", "sentences:²", "nicer", "list:3"])
def test_an_unknown_taste_is_told_which_there_are(name: str) -> None:
    with pytest.raises(UnknownTaste, match=r"shorter, longer.* sentences:N, words:N or random:SEED"):
        taste_named(name)


def test_noise_picks_another_reply_as_often_as_it_says() -> None:
    """10,000 picks at 10% noise; an exact test that errs once in 10,000 runs, were the seed not fixed."""
    draw = random.Random(0)
    wrong = sum(favourite(taste_named("shorter"), ["a", "a b", "a b c"], 0.1, draw) != 0 for _ in range(10_000))
    assert binomtest(wrong, 10_000, 0.1).pvalue > 1e-4


def test_equal_replies_are_a_tie_and_win_rates_count_ties_half() -> None:
    shorter = taste_named("shorter")
    assert favourite(shorter, ["a b", "c d"], 0.5, random.Random(0)) is None
    assert win_rate(shorter, ["a", "a b", "a b", "a b c"], ["a b", "a b", "c d", "a"]) == (1 + 0.5 + 0.5 + 0) / 4
