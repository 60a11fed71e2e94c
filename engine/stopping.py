"""A reply's text as it may be shown: stop strings found across token boundaries, and held back while in doubt.

Owns one reply's text. Tokens become characters in `engine/tokenizer.py`; why a reply ended is the engine's to say.
"""

from __future__ import annotations

from engine.tokenizer import ChatTokenizer, IncrementalText


class StreamingText:
    """Text that grows token by token and ends before the first stop string."""

    def __init__(self, tokenizer: ChatTokenizer, stop: tuple[str, ...]) -> None:
        self.incremental = IncrementalText(tokenizer)
        self.stop = stop
        self.held = ""  # may be the beginning of a stop string
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that is now safe to show; sets `stopped` when a stop string is complete."""
        return self._add(self.incremental.push(token_id))

    def flush(self) -> str:
        """What is left to show at the end of the reply."""
        if self.stopped:
            return ""
        text = self._add(self.incremental.flush())
        held, self.held = self.held, ""
        return text if self.stopped else text + held

    def _add(self, new: str) -> str:
        if not self.stop or not new:
            return new
        text = self.held + new
        found = [at for s in self.stop if (at := text.find(s)) >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        keep = max((n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]
