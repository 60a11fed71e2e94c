"""ROUGE-L of a text against references (Lin 2004): how much of the longest common run of words, in order, both share.

Pure. Words are runs of letters and digits in lower case, as in Google's `rouge_score`, but of any script; no stemming.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

WORD = re.compile(r"[^\W_]+")


def words(text: str) -> list[str]:
    """The words that are compared."""
    return WORD.findall(text.lower())


def common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, in O(len a * len b) time and O(len b) space."""
    row = [0] * (len(b) + 1)
    for x in a:
        before = 0  # the row above, one to the left
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], before + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def rouge_l(text: str, reference: str) -> float:
    """F1 of precision and recall of the longest common subsequence of words (Lin 2004, Eq. 2-4, beta = 1), in [0, 1].

    0 where either has no words.
    """
    ours, theirs = words(text), words(reference)
    shared = common(ours, theirs)
    return 2 * shared / (len(ours) + len(theirs)) if shared else 0.0


def best_rouge_l(text: str, references: Sequence[str]) -> float:
    """The best over several references, as Super-NaturalInstructions is scored (Wang et al. 2022)."""
    return max(rouge_l(text, reference) for reference in references)
