"""Taking in preferences that were collected elsewhere, as comparisons of two replies with a vote each."""

from __future__ import annotations

import gzip
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from store.errors import BadImport
from store.records import Completion, Message, NewComparison
from store.store import Store, new_id

VERSION = "imported"  # the version of replies that no model of ours wrote
ROLES = ("system", "user", "assistant")


def import_preferences(store: Store, file: str | Path, *, progress: Callable[[int, int], None] | None = None) -> int:
    """Read JSONL or JSONL.gz rows `{"prompt", "chosen", "rejected", "voter"?}`; the number of votes taken in.

    Prompt and replies are conversations (TRL's format) or plain strings. The chosen reply takes slot 0 or 1 by a digest of
    the row, so that position says nothing. All or nothing. Raises BadImport naming the line; `progress(done, total)`.
    """
    path = Path(file)
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as lines:
            rows = [parse_row(line, f"{path.name}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    except FileNotFoundError:
        raise BadImport(f"there is no file {path}") from None
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise BadImport(f"{path.name} is not UTF-8 JSON lines, plain or gzipped ({type(error).__name__})") from None
    now = time.time()
    with store._write() as db:
        for done, (prompt, chosen, rejected, voter) in enumerate(rows, 1):
            comparison_id = new_id("cmp")
            first = hashlib.sha256(json.dumps([prompt, chosen, rejected]).encode()).digest()[0] % 2
            texts = (chosen, rejected) if first == 0 else (rejected, chosen)
            completions = tuple(Completion(i, text, (), (), VERSION, "stop", 0) for i, text in enumerate(texts))
            new = NewComparison(comparison_id, new_id("conv"), voter, prompt, {"imported": path.name}, completions)
            store._insert_comparison(db, new, now)
            store._insert_vote(db, comparison_id, voter, [[first], [1 - first]], "favourite", None, None, now)
            if progress is not None and (done % 50 == 0 or done == len(rows)):
                progress(done, len(rows))
    return len(rows)


def parse_row(line: str, where: str) -> tuple[tuple[Message, ...], str, str, str]:
    """(prompt, chosen, rejected, voter) of one line. Raises BadImport; the message quotes nothing of the line."""
    try:
        row = json.loads(line)
    except ValueError:
        raise BadImport(f"{where} is not JSON") from None
    if not isinstance(row, dict):
        raise BadImport(f"{where} is not a JSON object")
    for name in ("prompt", "chosen", "rejected"):
        if name not in row:
            raise BadImport(f"{where} has no {name!r}; a row needs prompt, chosen and rejected")
    prompt = messages(row["prompt"], "user", where, "prompt")
    if not prompt or prompt[-1]["role"] != "user":
        raise BadImport(f"{where}: prompt must end with a message of the user's")
    replies = []
    for name in ("chosen", "rejected"):
        reply = messages(row[name], "assistant", where, name)
        if len(reply) != 1 or reply[0]["role"] != "assistant":
            raise BadImport(f"{where}: {name} must be one reply of the assistant's")
        replies.append(reply[0]["content"])
    if replies[0] == replies[1]:
        raise BadImport(f"{where}: chosen and rejected are the same text")
    voter = row.get("voter", "imported")
    if not isinstance(voter, str):
        raise BadImport(f"{where}: voter must be a string")
    return prompt, replies[0], replies[1], f"import:{hashlib.sha256(voter.encode()).hexdigest()[:16]}"


def messages(value: Any, role: str, where: str, name: str) -> tuple[Message, ...]:
    """A conversation from TRL's list of messages or a plain string."""
    if isinstance(value, str):
        return ({"role": role, "content": value},)
    good = isinstance(value, list) and all(
        isinstance(m, dict) and m.get("role") in ROLES and isinstance(m.get("content"), str) for m in value
    )
    if not good:
        raise BadImport(f"{where}: {name} must be a string or a list of {{role, content}} with role {', '.join(ROLES)}")
    return tuple({"role": m["role"], "content": m["content"]} for m in value)
