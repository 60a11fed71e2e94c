"""Files by which the learner tells of its rounds: `rounds/000001/round.json` and `rounds/learner.json`.

A round directory without `round.json` is running or was abandoned. Knows no database; the server takes finished rounds in.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from store.database import fsync_dir
from store.files import read_json, write_json

NAME = re.compile(r"\d{6,}")
RECORD, PROGRESS, HEARTBEAT = "round.json", "progress.json", "learner.json"


class RoundFiles:
    """The rounds under one directory. One learner writes; anyone reads."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def directory(self, n: int) -> Path:
        """Where round `n` keeps its files."""
        return self.root / f"{n:06d}"

    def all(self) -> list[int]:
        """Every round begun, oldest first."""
        try:
            return sorted(int(entry.name) for entry in os.scandir(self.root) if NAME.fullmatch(entry.name))
        except FileNotFoundError:
            return []

    def begin(self) -> int:
        """Make the next round's directory and return its number."""
        self.root.mkdir(parents=True, exist_ok=True)
        n = max(self.all(), default=0) + 1
        self.directory(n).mkdir()
        fsync_dir(self.root)
        return n

    def progress(self, n: int, **fields: Any) -> None:
        """Replace what round `n` says of its progress."""
        write_json(self.directory(n) / PROGRESS, {"round": n, "time": time.time(), **fields}, durable=False)

    def read_progress(self, n: int) -> dict[str, Any] | None:
        """What round `n` last said of its progress."""
        return read_or_none(self.directory(n) / PROGRESS)

    def finish(self, n: int, record: Mapping[str, Any]) -> None:
        """Write the round's final record, whole and durable. Raises ValueError for NaN and infinity."""
        write_json(self.directory(n) / RECORD, {"round": n, **record})

    def finished(self) -> list[int]:
        """Rounds with a final record, oldest first."""
        return [n for n in self.all() if (self.directory(n) / RECORD).is_file()]

    def unfinished(self) -> list[int]:
        """Rounds without one: running, or abandoned by a learner that was killed."""
        return [n for n in self.all() if not (self.directory(n) / RECORD).is_file()]

    def read(self, n: int) -> dict[str, Any]:
        """The final record. Raises FileNotFoundError, ValueError."""
        return read_json(self.directory(n) / RECORD)

    def records(self) -> list[dict[str, Any]]:
        """Final records, oldest first; a damaged one is left out: it must not keep a learner from learning."""
        return [record for n in self.finished() if (record := read_or_none(self.directory(n) / RECORD)) is not None]

    def heartbeat(self, **fields: Any) -> None:
        """Replace what the learner says of itself now."""
        self.root.mkdir(parents=True, exist_ok=True)
        write_json(self.root / HEARTBEAT, {"time": time.time(), **fields}, durable=False)

    def read_heartbeat(self) -> dict[str, Any] | None:
        """What the learner last said of itself; None when it never has."""
        return read_or_none(self.root / HEARTBEAT)


def read_or_none(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None when the file is missing or unreadable."""
    try:
        return read_json(path)
    except (FileNotFoundError, ValueError):
        return None
