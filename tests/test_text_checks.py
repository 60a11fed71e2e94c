"""The text checks on replies that are right, replies that are broken in one known way, and counts done by hand."""

from __future__ import annotations

import pytest

from learner.starter import corpus
from learner.text_checks import (
    broken,
    broken_rate,
    distinct_n,
    faults,
    loop,
    refusal,
    refusal_rate,
    repetition,
)

GOOD = [
    "The Moon is a ball of rock that travels around the Earth.",
    "Yes, of course! It takes about 27 days, i.e. four weeks, to go around the Earth.",
    "Hello. Here are some things I can talk about:\n- space\n- animals\n- food",
    "Here is how to boil an egg:\n1. Put it into hot water.\n2. Wait for eight minutes.\n3. Enjoy!",
    "It has the tallest volcano that we know of, Olympus Mons. It has two small moons.",
    "Bees make honey; cats like to sleep. Dr. Smith said: \"They do, indeed.\"",
    "I can do that. What is it made of? Wait... I know what I am good at: \U0001F642",
    "In 1969, people (two of them) walked on the Moon for the first time.",
    "They tell us where a sound comes from, since there are two. The text that I learned from was written for this.",
    "Most throws that go in are worth two points. Come in, your coat is wet. Fold the sides in, please. He gave an in-depth talk.",
    "The letters a, e, i, o and u are the main ones. It is spelled z-e-b-r-a. A box of nails and of screws.",
    "Two ways:\n1. By bus.\n2. By train.\n\nWhat to take:\n1. A map.\n2. A coat.",
    "1. A\n   1. a\n   2. b\n   3. c\n2. B\n   1. d\n   2. e\n3. C\n4. D",
    "1. One.\nIt is the first.\n\n2. Two.\n3. Three.\n\n1. One again.",
    "3. Three.\n2. Two.\n1. One.",
    "1. Bees\n1. ants\n1. cats",
    "In 1969 they walked on it:\n1.5 kilometres in all.",
    "Use `pip`.\n```\n1. a\n3. b\n2. c\n```\nThat is all.",
    "Use `pip`.\n```\nx = f(a, b) .. y\n```\nThat is all.",
]  # fmt: skip
BROKEN = {
    "They live in, They help flowers grow.": "sentence after a comma",
    "Bees live in hives. they make honey.": "small letter after a full stop",
    "Bees make honey.. They live in hives.": "doubled punctuation",
    "Bees make honey,, and wax.": "doubled punctuation",
    "Bees make honey . They live in hives.": "space before punctuation",
    "Bees make honey.They live in hives.": "no space after a full stop",
    "Bees live in the. They make honey.": "nothing after a determiner",
    "Bees live in, and make honey.": "nothing after a preposition",
    "Bees live in, and that is that.": "nothing after a preposition",
    "They make it from, since they like it.": "nothing after a preposition",
    "Honey is kept by, so they like it.": "nothing after a preposition",
    "It is made by can open.": "verb after a preposition",
    "You like it. A hole on the wall of is round.": "verb after a preposition",
    "They served a king on a. Then they left.": "nothing after a determiner",
    "They sell a, and more.": "nothing after a determiner",
    "Bees live in the the hive.": "word twice",
    "Bees live in the of hives.": "words that cannot meet",
    "The Moon is has no air.": "words that cannot meet",
    "It are a ball of rock.": "words that cannot meet",
    "Some facts:\n- It is round.\n-\n- It is far.": "empty bullet",
    "The Moon is \ufffd round.": "damaged character",
    "...": "no words",
    "": "no words",
    "The Moon is a ball of": "cut end",
    "Some facts:\n- It is round.\n- It is far.\n- It has no": "cut end",
    "It is round. It has no air. It is round.": "repeated sentence",
    "- It has no air.\n- It is far.\n- it has no air": "repeated sentence",
    "It is round and round and round and round and round.": "loop",
    "Facts:\n1. It is round.\n2. It is far.\n2. It has no air.": "numbers out of order",
    "Facts:\n4. It is round.\n5. It is far.\n6. It has no air.\n5. It is cold.": "numbers out of order",
    "1. It is round.\n2. It is far.\n1. It has no air.": "numbers out of order",
    "1. A\n   1. a\n   2. b\n   4. c\n2. B": "numbers out of order",
    "1) It is round.\n2) It is far.\n5)It has no air.": "numbers out of order",
    "Bees make honey (and wax.": "bracket or quote left open",
}


def names(text: str, finish_reason: str = "stop") -> list[str]:
    return [fault.name for fault in faults(text, finish_reason)]


@pytest.mark.parametrize("text", GOOD)
def test_sound_replies_have_no_fault(text: str) -> None:
    assert faults(text) == []


def test_what_the_bundled_model_learned_from_is_hardly_ever_called_broken() -> None:
    said = [m["content"] for chat in corpus.chats(6000, 3) for m in chat.messages if m["role"] == "assistant"]
    assert broken_rate((text, "stop") for text in said) < 1e-3


@pytest.mark.parametrize(("text", "fault"), BROKEN.items())
def test_each_fault_is_named(text: str, fault: str) -> None:
    assert fault in names(text)


def test_a_reply_that_hit_the_length_limit_is_cut_even_after_a_full_stop() -> None:
    assert names("The Moon is round.", "length") == ["cut end"] and not broken("The Moon is round.", "stop")


@pytest.mark.parametrize(("text", "name", "where"), [
    ("They live in, They help flowers grow.", "sentence after a comma", "n, They h"),
    ("Bees make honey. Cats sleep a lot. Bees make honey. Yes.", "repeated sentence", "Bees make honey."),
    ("It goes round and round and round and then stops.", "loop", "round and"),
    ("we go up we go up we go up and down.", "loop", "we go up"),
    ("1. It is round.\n2. It is far.\n3. It is cold.\n2. It has no air.", "numbers out of order", "2."),
    ("It is in the sea and the", "cut end", ""),
])  # fmt: skip
def test_a_fault_is_where_the_reply_became_broken(text: str, name: str, where: str | None) -> None:
    found = {fault.name: text[fault.start : fault.end] for fault in faults(text)}
    assert found.get(name) == where


def test_the_second_time_is_the_fault_not_the_first() -> None:
    text = "Bees make honey. Cats sleep a lot. Bees make honey. Yes."
    [fault] = faults(text)
    assert fault.start == text.rindex("Bees")


def test_sound_prose_of_the_project_itself_raises_no_alarm() -> None:
    from learner.starter.corpus import chats

    texts = [c.messages[-1]["content"] for c in chats(400, seed=11)]
    flagged = [t for t in texts if broken(t)]
    assert len(flagged) <= 4, flagged[:4]  # at most 1%: none in 6000 when this was written


def test_a_word_salad_of_the_same_prose_is_mostly_caught() -> None:
    import random

    from learner.starter.corpus import chats

    rng, salads = random.Random(0), []
    for c in chats(300, seed=12):
        w = c.messages[-1]["content"].split()
        if len(w) >= 12:
            rng.shuffle(w)
            salads.append(" ".join(w))
    assert sum(map(broken, salads)) > 0.9 * len(salads)


def test_the_rate_counts_replies_not_faults() -> None:
    assert broken_rate([("Fine.", "stop"), ("the the the of", "length"), ("Fine.", "length"), ("Fine.", "stop")]) == 0.5
    assert broken_rate([]) == 0.0


def test_loops_of_several_words() -> None:
    assert loop("you know what I mean you know what I mean you know what I mean")
    assert not loop("you know what I mean, and you know what I said")


def test_distinct_bigrams_by_hand() -> None:
    # a b, b a, a b | a b: 4 bigrams, 2 different
    assert distinct_n(["a b a b", "a b"], 2) == 0.5
    assert distinct_n(["a"], 2) == 0.0


def test_repetition_counts_within_a_reply_only() -> None:
    assert repetition(["a b c d", "a b c d"]) == 0.0
    assert repetition(["a b c d a b c d"]) == pytest.approx(1 / 5)


def test_refusals() -> None:
    yes = ["I'm sorry, but I can't help with that.", "I do not know.", "I cannot answer that. Ask me about bees.", "As an AI I have no view."]
    no = ["The Moon has no air, so you cannot breathe there.", "You do not know bees? They make honey.", "I can help!"]
    assert all(map(refusal, yes)) and not any(map(refusal, no))
    assert refusal_rate(yes + no) == pytest.approx(4 / 7)
