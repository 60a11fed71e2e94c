"""Preferences in files: a prompt, a chosen and a rejected reply. Owns the layouts, in and out; knows no database.

In: TRL's conversational layout with an explicit prompt (`prompt`, `chosen`, `rejected`) or an implicit one (`chosen` and
`rejected` are whole conversations that part at the last reply), and the same fields as plain strings. Out: TRL's two.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from store.errors import BadImport
from store.records import Message
from store.rows import messages, read_rows

UNNAMED = "imported"  # the voter of a row that names none


@dataclass(frozen=True)
class Preference:
    """One voter preferred `chosen` to `rejected` as the reply to `prompt`, which ends with a message of the user's."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    voter: str = UNNAMED

    def row(self, *, implicit: bool = False) -> dict[str, Any]:
        """TRL's conversational row; `implicit`: the prompt is what both conversations begin with."""
        prompt = [dict(m) for m in self.prompt]
        replies = {
            name: ([dict(m) for m in prompt] if implicit else []) + [{"role": "assistant", "content": text}]
            for name, text in (("chosen", self.chosen), ("rejected", self.rejected))
        }
        return ({} if implicit else {"prompt": prompt}) | replies | {"voter": self.voter}


def read_preferences(file: str | Path) -> list[Preference]:
    """Every preference of a file. Raises BadImport naming file and line; the message quotes nothing of it."""
    return [preference(row, where) for where, row in read_rows(file)]


def preference(row: dict[str, Any], where: str) -> Preference:
    """The preference that a row of any of the layouts states. Raises BadImport."""
    for name in ("chosen", "rejected"):
        if name not in row:
            raise BadImport(f"{where} has no {name!r}; a row needs prompt, chosen and rejected")
    replies = {name: messages(row[name], "assistant", where, name) for name in ("chosen", "rejected")}
    if "prompt" in row:
        prompt = messages(row["prompt"], "user", where, "prompt")
    elif isinstance(row["chosen"], str) or isinstance(row["rejected"], str):
        raise BadImport(f"{where} has no 'prompt'; without one, chosen and rejected must be whole conversations")
    else:
        prompt, replies = split_off_prompt(replies["chosen"], replies["rejected"])
    if not prompt or prompt[-1]["role"] != "user":
        raise BadImport(f"{where}: prompt must end with a message of the user's")
    for name, reply in replies.items():
        if len(reply) != 1 or reply[0]["role"] != "assistant":
            raise BadImport(f"{where}: {name} must be one reply of the assistant's")
    chosen, rejected = (replies[name][0]["content"] for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise BadImport(f"{where}: chosen and rejected are the same text")
    voter = row.get("voter", UNNAMED)
    if not isinstance(voter, str) or any("\ud800" <= c <= "\udfff" for c in voter):
        raise BadImport(f"{where}: voter must be a string, and of whole characters")
    return Preference(prompt, chosen, rejected, voter)


def split_off_prompt(
    chosen: tuple[Message, ...], rejected: tuple[Message, ...]
) -> tuple[tuple[Message, ...], dict[str, tuple[Message, ...]]]:
    """The messages that both conversations begin with, and the rest of each (TRL's `extract_prompt`). Equal ones part
    at the last message."""
    shorter = min(len(chosen), len(rejected))
    same = next((i for i in range(shorter) if chosen[i] != rejected[i]), max(0, shorter - 1))
    return chosen[:same], {"chosen": chosen[same:], "rejected": rejected[same:]}
