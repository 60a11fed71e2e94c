"""One visitor's conversation as the chat page holds it: settled turns, and the exchange that is open now.

    empty -> streaming -> choosing -> voted -> (next message settles it) -> streaming ...
                      or stopped, or failed

Owns what the next request's history is. Knows nothing of HTML, HTTP or Gradio.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass, field
from typing import Any, Literal

Phase = Literal["empty", "streaming", "choosing", "voted", "stopped", "failed"]


@dataclass
class Reply:
    """One of the replies of the open exchange, as far as it has come."""

    text: str = ""
    finish_reason: str | None = None
    version: str | None = None  # known after the vote


@dataclass(frozen=True)
class Turn:
    """A message and the reply that the conversation went on with; `reply` is None where none was good."""

    message: str
    reply: str | None
    version: str | None = None
    note: str = ""


def ballot(choice: int | str, edit: str | None = None) -> dict[str, Any]:
    """The vote for a choice, as the API takes it."""
    body: dict[str, Any] = {"favourite": choice} if isinstance(choice, int) else {"verdict": choice}
    return body | ({"edit": edit} if edit else {})


@dataclass
class Chat:
    """The state of one browser tab."""

    voter: str = ""  # see `speaker`
    conversation_id: str | None = None
    instructions: list[dict[str, str]] = field(default_factory=list)  # system messages that a conversation of another client's begins with
    turns: list[Turn] = field(default_factory=list)
    phase: Phase = "empty"
    message: str = ""
    replies: list[Reply] = field(default_factory=list)
    comparison_id: str | None = None
    choice: int | Literal["tie", "none"] | None = None
    edit: str | None = None
    editing: int | None = None  # the reply in the edit box; -1 is a reply written from nothing
    drafts: dict[int, str] = field(default_factory=dict)  # what was written for other replies and not saved
    cast_at: float = 0.0  # when the newest vote was clicked, milliseconds of the browser's clock
    voting: asyncio.Lock = field(default_factory=asyncio.Lock, repr=False, compare=False)  # votes go out one after the other, as they were cast
    problem: str = ""
    too_long: bool = False  # the problem is that the conversation no longer fits the model
    unseen: int = 0  # the oldest turns, which are no longer sent
    saved: str = ""  # what happened to the last vote, as a sentence
    live_when_opened: str | None = None
    number: int = 0  # of the open exchange, counted up
    listed: int = 50  # past conversations that the page lists, at most

    @property
    def untouched(self) -> bool:
        """Whether nothing was said or opened yet."""
        return self.phase == "empty" and not self.turns

    def speaker(self) -> str:
        """A voter id of this tab's own: who speaks until the browser has told who it is. (Made late: Gradio copies one Chat for all tabs.)"""
        self.voter = self.voter or secrets.token_urlsafe(18)
        return self.voter

    def history(self) -> list[dict[str, str]]:
        """The settled turns as chat messages; turns without a reply stay out, so that roles alternate."""
        messages = []
        for turn in self.turns[self.unseen :]:
            if turn.reply is not None:
                messages += [{"role": "user", "content": turn.message}, {"role": "assistant", "content": turn.reply}]
        return messages

    def begin(self, message: str, n: int) -> list[dict[str, str]]:
        """Settle what is open, open an exchange of `n` replies to `message`, and return the messages to send."""
        self.settle()
        self.message, self.replies, self.phase = message, [Reply() for _ in range(n)], "streaming"
        self.number += 1
        return [*self.instructions, *self.history(), {"role": "user", "content": message}]

    def forget(self) -> None:
        """Stop sending the older half of what is still sent. The page says so; nothing is cut silently."""
        seen = len(self.turns) - self.unseen
        self.unseen += (seen + 1) // 2

    def settle(self) -> None:
        """Make the open exchange a turn: with the favourite, with its edit, or with reply 1 if nobody said otherwise."""
        if self.phase in ("choosing", "voted"):
            self.turns.append(self._settled())
        self.phase, self.message, self.replies, self.comparison_id = "empty", "", [], None
        self.choice = self.edit = self.editing = None
        self.problem, self.saved, self.too_long, self.drafts = "", "", False, {}

    def after(self, other: Chat) -> Chat:
        """Itself, as what this tab shows after `other`."""
        self.voter, self.live_when_opened, self.number, self.listed = other.speaker(), other.live_when_opened, other.number + 1, other.listed
        return self

    def _settled(self) -> Turn:
        if self.choice == "none":
            note = "You wrote this reply" if self.edit else "None of the replies was good, so this is not part of the conversation"
            return Turn(self.message, self.edit, None, note)
        reply = self.replies[self.choice if isinstance(self.choice, int) else 0]
        if self.edit:
            return Turn(self.message, self.edit, reply.version, "Edited by you")
        notes = {"tie": "A tie; the conversation went on with reply 1", None: "Not picked; the conversation went on with reply 1"}
        note = "" if isinstance(self.choice, int) else notes[self.choice]
        return Turn(self.message, reply.text, reply.version, note)

    def add(self, index: int | None, text: str, finish_reason: str | None) -> None:
        """Append what one streamed piece brought; indices that were not asked for are ignored."""
        if index is not None and 0 <= index < len(self.replies):
            reply = self.replies[index]
            reply.text += text
            reply.finish_reason = finish_reason or reply.finish_reason

    def twin(self, index: int) -> int | None:
        """The first reply before this one that reads the same, if any."""
        text = self.replies[index].text.strip()
        return next((i for i in range(index) if text and self.replies[i].text.strip() == text), None)

    @classmethod
    def reopened(cls, conversation: dict[str, Any]) -> Chat:
        """A stored conversation: the history of its newest comparison, and that comparison as the open exchange."""
        chat = cls(conversation_id=conversation.get("conversation_id"))
        comparisons = [c for c in conversation.get("comparisons") or [] if isinstance(c, dict)]
        if not comparisons:
            return chat
        wrote = {
            choice.get("text"): choice.get("version") for c in comparisons for choice in c.get("choices") or [] if choice.get("version")
        }
        newest = comparisons[-1]
        question: str | None = None
        for message in newest.get("messages") or []:
            content = str(message.get("content") or "")
            if message.get("role") == "system" and question is None and not chat.turns:
                chat.instructions.append({"role": "system", "content": content})
            elif message.get("role") == "user":
                question = content
            elif message.get("role") == "assistant" and question is not None:
                chat.turns.append(Turn(question, content, wrote.get(content)))
                question = None
        choices = sorted(newest.get("choices") or [], key=lambda c: c.get("index", 0))
        chat.message, chat.comparison_id, chat.phase = question or "", newest.get("comparison_id"), "choosing"
        chat.replies = [Reply(str(c.get("text") or ""), c.get("finish_reason") or "stop", c.get("version")) for c in choices]
        vote = newest.get("vote")
        if isinstance(vote, dict):
            first = (vote.get("groups") or [[]])[0]
            kinds: dict[Any, Any] = {"tie": "tie", "none": "none"}
            chat.choice = kinds.get(vote.get("kind"), first[0] if first else None)
            chat.edit, chat.phase = vote.get("edit"), "voted"
        return chat

    def reveal(self, choices: Any) -> None:
        """Take in which version wrote each reply, from the answer to a vote."""
        for row in choices if isinstance(choices, list) else []:
            if isinstance(row, dict) and isinstance(row.get("index"), int) and 0 <= row["index"] < len(self.replies):
                self.replies[row["index"]].version = row.get("version")
