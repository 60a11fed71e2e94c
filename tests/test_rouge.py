"""ROUGE-L against Lin's own example, hand arithmetic, and a subsequence search that tries everything."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.rouge import best_rouge_l, common, rouge_l, words


@pytest.mark.parametrize("text, reference, score", [
    # Lin 2004, section 3.1: against S1, S2 shares 3 of 4 words in order, S3 two; beta = 1 makes them 3/4 and 1/2.
    ("police kill the gunman", "police killed the gunman", 3 / 4),
    ("the gunman kill police", "police killed the gunman", 2 / 4),
    ("the gunman police killed", "police killed the gunman", 2 / 4),
    ("The cat sat on the mat.", "the cat sat on the mat", 1.0),
    # LCS "the quick fox" = 3, of 4 and 5 words: P = 3/4, R = 3/5, F = 2 * .75 * .6 / 1.35
    ("the quick fox jumps", "the very quick brown fox", 2 * 0.75 * 0.6 / 1.35),
    ("dogs", "a dog", 0.0),  # no stemming
    ("", "a dog", 0.0),
    ("...", "!", 0.0),
    ("Café é", "CAFÉ", 2 / 3),
    ("under_score", "under score", 1.0),
])
def test_rouge_l_by_hand(text: str, reference: str, score: float) -> None:
    assert rouge_l(text, reference) == pytest.approx(score)


def test_the_best_reference_counts() -> None:
    assert best_rouge_l("two", ["one", "two", "two three"]) == 1.0


@given(st.lists(st.sampled_from("abc"), max_size=7), st.lists(st.sampled_from("abc"), max_size=7))
def test_the_common_length_is_what_trying_every_subsequence_finds(a: list[str], b: list[str]) -> None:
    all_of = lambda x: {c for n in range(len(x) + 1) for c in combinations(x, n)}  # noqa: E731
    assert common(a, b) == max(len(c) for c in all_of(a) & all_of(b))


@given(st.text(max_size=30), st.text(max_size=30))
def test_it_is_symmetric_and_1_for_equal_texts(a: str, b: str) -> None:
    assert rouge_l(a, b) == rouge_l(b, a) and 0 <= rouge_l(a, b) <= 1
    assert rouge_l(a, a) == (1.0 if words(a) else 0.0)
