"""Prompts from files: what simulated people ask, what operators add to the practice of a round, what versions are compared on.

Owns the layouts. Does not choose among prompts (`learner/practice.py`).
"""

from __future__ import annotations

import json
from pathlib import Path

from store.errors import BadImport
from store.records import Message
from store.rows import messages, read_text

HERE = Path(__file__).parent / "starter"
POOL = HERE / "prompts_pool.txt"  # what rounds practise on beside people's own
Conversation = tuple[Message, ...]  # so far: the user's turn is last


class PromptsError(ValueError):
    """The file cannot be used; the message says why and quotes nothing of it."""


def conversations_from(path: Path | None = None, *, held_out: bool = False) -> list[Conversation]:
    """Prompts from a text file (one a line), JSONL or JSONL.gz (`prompt`: string or conversation); default the starter's. Raises PromptsError."""
    path = path or HERE / ("prompts_heldout.txt" if held_out else "prompts_train.txt")
    try:
        text = read_text(path)
    except BadImport as wrong:
        raise PromptsError(str(wrong)) from None
    lines = [(n, line.strip()) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    try:
        prompts = [(n, json.loads(line)["prompt"] if ".jsonl" in path.name else line) for n, line in lines]
        found = [(n, messages(prompt, "user", f"line {n}", "prompt")) for n, prompt in prompts]
    except BadImport as wrong:
        raise PromptsError(f"{path.name}, {wrong}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise PromptsError(f"{path.name} is not a prompt a line, nor JSONL with a prompt ({type(error).__name__})") from None
    if not found:
        raise PromptsError(f"{path} has no prompts")
    if line := next((n for n, prompt in found if not prompt or prompt[-1]["role"] != "user"), None):
        raise PromptsError(f"{path.name}, line {line}: a prompt ends with a turn of the user's")
    return [prompt for _, prompt in found]


def prompts_from(path: Path | None = None, *, held_out: bool = False) -> list[str]:
    """The same for who asks one thing at a time: the last message of each."""
    return [conversation[-1]["content"] for conversation in conversations_from(path, held_out=held_out)]
