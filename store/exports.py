"""Votes as rows of JSONL, in the layouts that others read: TRL's preferences, rankings whole, demonstrations.

Pure: a vote and what it judges in, rows out. Reading them back is `preferences.py` and `imports.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from store.preferences import Preference
from store.records import Message, VotedComparison


def said(role: str, text: str) -> list[Message]:
    """One message, in a list."""
    return [{"role": role, "content": text}]


def preference_rows(item: VotedComparison, *, implicit: bool = False) -> Iterable[dict[str, Any]]:
    """One row for each strict pair of the ranking; an edit beats what it edited (with no favourite: every reply).

    None where the prompt does not end with a message of the user's, which no reader takes.
    """
    vote = item.vote
    if item.comparison.messages[-1]["role"] != "user":
        return
    text = {c.index: c.text for c in item.comparison.completions}
    pairs = [(text[w], text[loser]) for i, group in enumerate(vote.groups) for w in group for later in vote.groups[i + 1:] for loser in later]
    if vote.edit:
        pairs += [(vote.edit, text[i]) for i in (vote.groups[0] if vote.groups else text)]
    for chosen, rejected in pairs:
        if chosen == rejected:  # the same words twice: nothing to learn, and no reader takes them
            continue
        yield Preference(item.comparison.messages, chosen, rejected, vote.voter).row(implicit=implicit)


def ranking_rows(item: VotedComparison) -> Iterable[dict[str, Any]]:
    """The vote whole."""
    vote = item.vote
    completions = [{"text": c.text, "version": c.version} for c in item.comparison.completions]
    yield {"prompt": list(item.comparison.messages), "completions": completions, "kind": vote.kind,
           "ranking": [list(group) for group in vote.groups], "edit": vote.edit, "comment": vote.comment, "voter": vote.voter}


def demonstration_rows(item: VotedComparison) -> Iterable[dict[str, Any]]:
    """The conversation with the person's own reply at its end."""
    if item.vote.edit:
        yield {"messages": [*item.comparison.messages, *said("assistant", item.vote.edit)], "voter": item.vote.voter}


EXPORTS: dict[str, Callable[[VotedComparison], Iterable[dict[str, Any]]]] = {
    "preference": preference_rows, "preference-implicit": partial(preference_rows, implicit=True),
    "ranking": ranking_rows, "demonstration": demonstration_rows,
}
