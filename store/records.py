"""What the store hands out and takes in: frozen records. Owns no behaviour and knows no SQL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, str]  # {"role", "content"}


@dataclass(frozen=True)
class Completion:
    """One sampled reply."""

    index: int  # its slot, as shown
    text: str
    token_ids: tuple[int, ...]  # with the end token when it ended by it; empty when imported
    logprobs: tuple[float, ...]  # nats, one a token
    version: str  # adapter version that wrote it
    finish_reason: str  # stop | length
    seed: int


@dataclass(frozen=True)
class NewComparison:
    """A comparison as the server records it, its ids drawn before the first token was streamed."""

    id: str
    conversation_id: str  # continued, or made
    voter: str  # salted and hashed
    messages: tuple[Message, ...]  # the conversation so far
    settings: dict[str, Any]  # sampling settings
    completions: tuple[Completion, ...]
    continues: bool = False  # the conversation was there when the reply was asked for: if it is not now, it was erased


@dataclass(frozen=True)
class Shown:
    """What judging a comparison needs of it: whose it is, and which version wrote each reply."""

    id: str
    voter: str  # the one it was shown to
    created: float  # Unix seconds
    versions: tuple[str, ...]


@dataclass(frozen=True)
class Ballot:
    """A vote to be recorded."""

    comparison_id: str
    voter: str
    groups: Sequence[Sequence[int]]  # completion indices, best first, ties grouped
    kind: str  # favourite | ranking | tie | none
    edit: str | None = None
    comment: str | None = None


@dataclass(frozen=True)
class Vote:
    """One voter's latest standing judgement of a comparison."""

    id: str
    seq: int  # grows with every vote and withdrawal in the database
    comparison_id: str
    voter: str
    kind: str  # favourite | ranking | tie | none
    groups: tuple[tuple[int, ...], ...]  # best first, ties grouped; [] for none
    edit: str | None
    comment: str | None
    created: float  # Unix seconds


@dataclass(frozen=True)
class Comparison:
    """One prompt and the completions sampled for it."""

    id: str
    conversation_id: str
    voter: str
    messages: tuple[Message, ...]
    settings: dict[str, Any]
    created: float
    completions: tuple[Completion, ...]
    votes: tuple[Vote, ...] = ()  # standing ones

    @property
    def vote(self) -> Vote | None:
        """The standing vote of the one it was shown to."""
        return next((vote for vote in self.votes if vote.voter == self.voter), None)


@dataclass(frozen=True)
class VotedComparison:
    """What the learner reads: a comparison and one standing vote on it."""

    comparison: Comparison
    vote: Vote


@dataclass(frozen=True)
class MessageNode:
    """One message of a conversation's tree."""

    id: str
    parent_id: str | None
    role: str
    content: str
    completion: tuple[str, int] | None  # (comparison id, index) when it is one of our replies
    created: float


@dataclass(frozen=True)
class ConversationRow:
    """A line of a list of conversations."""

    id: str
    voter: str
    created: float
    updated: float
    title: str  # the beginning of the first message


@dataclass(frozen=True)
class Conversation:
    """A conversation whole: its tree, and its comparisons in order."""

    id: str
    voter: str
    created: float
    messages: tuple[MessageNode, ...]
    comparisons: tuple[Comparison, ...]


@dataclass(frozen=True)
class VoteCounts:
    """How many votes stand, and how many the last finished round has not used."""

    standing: int
    pending: int
    last_seq: int


@dataclass(frozen=True)
class AdapterRow:
    """What the database knows of a version."""

    version: str
    status: str  # candidate | live | retired | rejected
    manifest: dict[str, Any] = field(repr=False)
    taken_in: float


@dataclass(frozen=True)
class Deployment:
    """What is served: the last row of the deployment history."""

    live: str = "base"
    previous: str | None = None
    candidate: str | None = None
    since: float | None = None  # Unix seconds
    actor: str | None = None  # who made `live` live


@dataclass(frozen=True)
class Control:
    """What operators told the learner."""

    paused: bool = False
    run_requested: int = 0  # grows by one with each `POST /v1/learner/run`
