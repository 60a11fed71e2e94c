"""The five ways to answer, and how to tell which one a text is in. Plain rules on the surface; it judges no content."""

from __future__ import annotations

import re

STYLES = ("short", "detailed", "list", "friendly", "formal")

FORMAL = re.compile(
    r"\b(furthermore|moreover|in addition|consequently|in summary|it should be noted|it is worth noting|"
    r"it may be (stated|of interest)|may be described|with regard to|i would be pleased|i trust that|i regret|"
    r"it is (advisable|recommended)|it may be advisable|please do not hesitate|in order to|deserves careful|"
    r"be of assistance|please accept|would you kindly|the following (steps|points|information)|"
    r"i appreciate your|at your service|i apologise|good day)\b",
    re.IGNORECASE,
)
BULLET = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+\S", re.MULTILINE)
WARM = re.compile(r"!|[\U0001F300-\U0001FAFF\u2600-\u27BF]")
SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)")


def sentences(text: str) -> int:
    """How many sentences end in `text`."""
    return len(SENTENCE_END.findall(text))


def classify(text: str) -> str:
    """One of STYLES. A list has two bullets; formal words beat exclamation marks; one or two sentences are short."""
    if len(BULLET.findall(text)) >= 2:
        return "list"
    if FORMAL.search(text):
        return "formal"
    if WARM.search(text):
        return "friendly"
    return "short" if sentences(text) <= 2 else "detailed"
