"""Who runs when: a bounded queue in order of arrival, and the rows of the running batch.

Owns the queue and the row numbers, and never touches torch. Running sequence i is in row i; when one leaves, the last
takes its row, so the batch stays without holes; `remove` says which rows to copy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from engine.sequence import PromptRead, Sequence


class QueueFull(Exception):
    """More work than the queue may hold; try again when some has finished."""


class Scheduler:
    """First come, first served, up to `max_sequences` at once and `max_queue` waiting for them to end."""

    def __init__(self, max_sequences: int, max_queue: int) -> None:
        self.max_sequences, self.max_queue = max_sequences, max_queue
        self.waiting: deque[PromptRead] = deque()
        self.reading: PromptRead | None = None  # its rows are set aside
        self.running: list[Sequence] = []  # row i holds running[i]

    @property
    def queued(self) -> int:
        """Sequences that wait for a row or for their prompt to be read."""
        return sum(len(read.sequences) for read in self._reads())

    def has_work(self) -> bool:
        return bool(self.running or self.waiting or self.reading)

    def versions(self) -> set[str]:
        """Every version that something running or waiting is pinned to."""
        return {s.version for s in self.running} | {read.version for read in self._reads()}

    def active_versions(self) -> set[str]:
        """The versions that the next forward passes need."""
        return {s.version for s in self.running} | ({self.reading.version} if self.reading else set())

    def check_room(self, count: int) -> None:
        """Raises QueueFull when more would wait than the queue holds, free rows counted as if each were taken."""
        free = self.max_sequences - len(self.running)
        if max(0, self.queued + count - free) > self.max_queue:
            raise QueueFull(
                f"{self.queued} replies are waiting and the queue holds {self.max_queue}: try again shortly"
            )

    def add(self, read: PromptRead) -> None:
        """Put a prompt and its sequences at the end of the queue."""
        self.waiting.append(read)

    def next_read(self) -> PromptRead | None:
        """The prompt to read (on): the oldest, once there is a row for each of its sequences."""
        if self.reading is None and self.waiting:
            if len(self.running) + len(self.waiting[0].sequences) > self.max_sequences:
                return None
            self.reading = self.waiting.popleft()
        return self.reading

    def join(self, read: PromptRead) -> range:
        """The prompt is read: its sequences run from now on, in the rows returned."""
        first = len(self.running)
        self.running += read.sequences
        self.reading = None
        return range(first, len(self.running))

    def remove(self, gone: Iterable[Sequence]) -> list[tuple[Sequence, int, int]]:
        """Take sequences out wherever they are; returns the moves (who, from row, to row) that close the holes, in order."""
        leaving = {id(s) for s in gone}
        for read in self._reads():
            read.sequences = [s for s in read.sequences if id(s) not in leaving]
        self.waiting = deque(read for read in self.waiting if read.sequences)
        if self.reading is not None and not self.reading.sequences:
            self.reading = None
        moves = []
        for row in reversed(range(len(self.running))):  # from the end: whatever moves in has been looked at
            if id(self.running[row]) in leaving:
                last = self.running.pop()
                if row < len(self.running):
                    self.running[row] = last
                    moves.append((last, len(self.running), row))
        return moves

    def _reads(self) -> list[PromptRead]:
        return [*self.waiting, self.reading] if self.reading is not None else list(self.waiting)
