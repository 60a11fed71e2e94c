"""Votes as training examples: what was seen, how it was ranked, how to split it, and the digest of it all.

Owns the step from standing votes to token ids and folds. Does not open the database (it is given
`VotedComparison`s), train, or judge.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from learner.metrics import strict_pairs, tied_pairs


class Renderer(Protocol):
    """What of `engine.tokenizer.ChatTokenizer` is needed here."""

    @property
    def end_id(self) -> int: ...
    def render(self, messages: list[dict], *, generation_prompt: bool = True) -> list[int]: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...


@dataclass(frozen=True)
class RankedExample:
    """One vote: a prompt, the K different completions shown, and what the voter said of them.

    prompt_ids: the rendered conversation, generation prompt included. completions_ids: K replies as sampled (with
    their end token where they had one), of those that read the same the first, and, where the voter wrote a better one, that
    as one more at the end. groups: the ranking of the shown ones, best first, ties grouped, indices into completions_ids; ()
    when it ranks nothing.
    """

    prompt_ids: tuple[int, ...]
    completions_ids: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[int, ...], ...]
    voter: str
    prompt_key: str  # equal for equal conversations
    conversation: str  # a conversation's later turns repeat its earlier ones: on one side of a split, where there are enough (`prompt_groups`)
    vote_id: str
    comparison_id: str
    seq: int = 0
    ties: bool = True  # whether a group of several states a tie; in a favourite vote the others are merely not chosen
    weight: float = 1.0  # the voter's, see `learner/reliability.py`; 1 on average
    edit_beats: tuple[int, ...] = ()  # replies that the voter's own, the last completion, is better than; () without one
    accepted: tuple[int, ...] = ()  # the replies picked where "none is good" could have been said instead
    refused: tuple[int, ...] = ()  # all that were shown, where none was good
    chosen: bool = False  # shown because their vote teaches most: fitted to, but no fair sample to be tested on

    @property
    def strict(self) -> list[tuple[int, int]]:
        """(winner, loser) pairs that the vote states among the replies shown: what a reward model is tested on."""
        return strict_pairs(self.groups)

    @property
    def stated(self) -> list[tuple[int, int]]:
        """All (winner, loser) pairs that the vote states, the edit's included: what a reward model is fitted to.

        Telling a person's words from a model's is easy and no help in choosing among samples, so it is not tested on.
        """
        return self.strict + [(len(self.completions_ids) - 1, loser) for loser in self.edit_beats]

    @property
    def shown(self) -> int:
        """K, the number of different replies that were shown."""
        return len(self.completions_ids) - bool(self.edit_beats)

    @property
    def tied(self) -> list[tuple[int, int]]:
        """Pairs that the vote says are equally good."""
        return tied_pairs(self.groups) if self.ties else []


@dataclass(frozen=True)
class Fold:
    """Indices of one train / test split. No prompt is on both sides, and no conversation or voter where `Split` says so."""

    train: tuple[int, ...]
    test: tuple[int, ...]


@dataclass(frozen=True)
class Split:
    """The folds of a cross-validation, and in plain words what they keep apart."""

    folds: tuple[Fold, ...]
    by: str  # "prompt and voter" or "prompt"
    note: str

    def where_learned(self, examples: Sequence[RankedExample]) -> Split:
        """Without the folds whose training votes prefer nothing."""
        return replace(self, folds=tuple(fold for fold in self.folds if any(examples[i].strict for i in fold.train)))


def examples_from_votes(voted: Iterable[Any], tokenizer: Renderer) -> list[RankedExample]:
    """RankedExamples of standing votes (`store.records.VotedComparison`), oldest first.

    Replies that read the same are one (`distinct`): choosing between them says nothing.
    An edit beats what it edited: the favourite (the first group) it was based on, or all replies shown where none was
    good. It counts unless it repeats a reply. "None good" refuses all; a favourite accepts itself, unless the choice
    was made elsewhere (imports), where nobody could refuse. Votes that state nothing at all (a ranking of one) are left
    out; so is a conversation that the chat template refuses (it cannot have been shown).
    """
    examples = []
    for item in sorted(voted, key=lambda item: item.vote.seq):
        comparison, vote = item.comparison, item.vote
        replies = by_index(comparison.completions)
        first: dict[str, Any] = {}  # of the replies that read the same
        for c in replies:
            first.setdefault(c.text.strip(), c)
        texts = list(first)
        groups = distinct(vote.groups, [texts.index(c.text.strip()) for c in replies])
        shown = tuple(range(len(texts)))
        strict = bool(strict_pairs(groups))
        own = vote.edit if vote.edit and vote.edit.strip() not in texts else None
        refused = shown if vote.kind == "none" else ()
        if not (strict or tied_pairs(groups) or own or refused):
            continue
        messages = [{"role": m["role"], "content": m["content"]} for m in comparison.messages]
        try:
            prompt = tokenizer.render(messages)
        except ValueError:
            continue
        ids = [completion_ids(c, tokenizer) for c in first.values()]
        examples.append(
            RankedExample(
                prompt_ids=tuple(prompt),
                completions_ids=tuple(ids if own is None else [*ids, encoded(own, tokenizer)]),
                groups=groups,
                voter=str(vote.voter),
                prompt_key=prompt_key(messages),
                conversation=str(comparison.conversation_id),
                vote_id=str(vote.id),
                comparison_id=str(comparison.id),
                seq=int(vote.seq),
                ties=vote.kind != "favourite",
                edit_beats=() if own is None else groups[0] if groups else shown,
                accepted=groups[0] if strict and "imported" not in comparison.settings else (),
                refused=refused,
                chosen=(comparison.settings.get("choice") or {}).get("drawn") == "active",
            )
        )
    return examples


def distinct(groups: Iterable[Iterable[int]], stands_for: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """A ranking, best first, of what the indices in `groups` stand for: each once, where it ranks best."""
    seen: set[int] = set()
    out = []
    for group in groups:
        new = {stands_for[i] for i in group} - seen
        seen |= new
        out.append(tuple(sorted(new)))
    return tuple(group for group in out if group)


def newest(examples: Sequence[RankedExample], count: int) -> list[RankedExample]:
    """At most `count` of the examples, oldest first: every voter's newest, then every voter's second newest, and so on.

    Taking the newest of all would let one voter push everybody else out.
    """
    seen: Counter[str] = Counter()
    turn = []
    for i in reversed(range(len(examples))):
        turn.append((seen[examples[i].voter], -i))
        seen[examples[i].voter] += 1
    return [examples[i] for i in sorted(-back for _, back in sorted(turn)[:count])]


def by_index(completions: Sequence[Any]) -> list[Any]:
    """Completions in the order that a vote's indices mean."""
    return sorted(completions, key=lambda c: c.index)


def completion_ids(completion: Any, tokenizer: Renderer) -> tuple[int, ...]:
    """Token ids as sampled, where they are what this tokenizer makes the text of; else its text and the end token.

    So it is with an imported reply, which has none, with one that ended at a stop string, and with replies of another base model: a data
    directory keeps its votes when its model changes, and the same numbers are other words then.
    """
    ids = tuple(completion.token_ids)
    return ids if ids and tokenizer.decode(list(ids)) == completion.text else encoded(completion.text, tokenizer)


def encoded(text: str, tokenizer: Renderer) -> tuple[int, ...]:
    """Token ids of a reply that nobody sampled, with the end token."""
    return (*tokenizer.encode(text), tokenizer.end_id)


def prompt_key(messages: Sequence[dict]) -> str:
    """Digest of a conversation, for telling prompts apart without keeping their words."""
    return hashlib.sha256(json.dumps([[m["role"], m["content"]] for m in messages]).encode()).hexdigest()[:16]


def data_digest(examples: Sequence[RankedExample]) -> str:
    """sha256 over everything that training sees, independent of the order the votes came in."""
    rows = sorted(
        json.dumps([
            e.vote_id, e.voter, e.prompt_ids, e.completions_ids, e.groups, e.ties, e.weight, e.edit_beats, e.accepted, e.refused,
        ])
        for e in examples
    )
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def connected(keys: Sequence[Iterable[Hashable]]) -> list[int]:
    """Component number of each item, where items that share any key are connected (union-find)."""
    parent = list(range(len(keys)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first: dict[Hashable, int] = {}
    for i, own in enumerate(keys):
        for key in own:
            parent[root(i)] = root(first.setdefault(key, i))
    return [root(i) for i in range(len(keys))]


def deal(labels: Sequence[Hashable], k: int, seed: int) -> list[int]:
    """Bin (0..k-1) of each item: items of one label together, bins near equal in size, ties broken by `seed`."""
    sizes = Counter(labels)
    order = sorted(sizes, key=repr)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda label: -sizes[label])
    filled, bin_of = [0] * k, {}
    for label in order:
        bin_of[label] = min(range(k), key=filled.__getitem__)
        filled[bin_of[label]] += sizes[label]
    return [bin_of[label] for label in labels]


def prompt_groups(examples: Sequence[RankedExample]) -> tuple[list[int], bool]:
    """A label for each example, equal where they must be on one side of a split, and whether conversations were kept whole.

    Equal prompts always share a label, and so do equal edits. A conversation's turns do too, unless there are so few
    conversations (under eight, or one with more than half of the votes) that nothing could be split: people who vote
    along one long chat.
    """
    own = [(("p", e.prompt_key), *((("e", e.completions_ids[-1]),) if e.edit_beats else ())) for e in examples]
    whole = connected([(*keys, ("c", e.conversation)) for keys, e in zip(own, examples, strict=True)])
    sizes = Counter(whole)
    if len(sizes) >= 8 and max(sizes.values()) <= len(examples) / 2:
        return whole, True
    return connected(own), len({e.conversation for e in examples}) == len(examples)


def split_folds(examples: Sequence[RankedExample], k: int, seed: int) -> Split:
    """Cross-validation folds with nothing of one prompt or voter on both sides (prompts as in `prompt_groups`).

    - One voter, or one who gave more than half of the votes (who cannot be held out and learned from): by prompt.
    - Votes fall into groups that share neither prompt nor voter: whole groups are dealt to folds, nothing is lost.
    - Otherwise voters judged the same prompts: a grid of prompt folds x 2 voter halves; a cell is scored by a model
      that saw neither its prompts nor its voters (so it learns from about (k-1)/2k of the votes).

    Raises ValueError when there is only one prompt: there is nothing to split.
    """
    prompts, whole = prompt_groups(examples)
    if len(set(prompts)) < 2:
        raise ValueError("all votes are on one prompt: vote on others too, so that learning can be checked")
    said = "" if whole else "; few conversations, so their turns count as prompts of their own"
    voters = Counter(e.voter for e in examples)
    most = max(voters.values())
    k = min(k, len(set(prompts)))
    if len(voters) == 1 or most > len(examples) / 2:
        who = "only one voter" if len(voters) == 1 else f"one voter gave {most} of {len(examples)} votes"
        return Split(whole_folds(deal(prompts, k, seed), k), "prompt", f"{who}: split by prompt alone{said}")
    groups = connected([(("p", prompt), ("v", e.voter)) for prompt, e in zip(prompts, examples, strict=True)])
    if max(Counter(groups).values()) <= len(examples) / 2:
        k = min(k, len(set(groups)))
        note = f"{len(voters)} voters, none on both sides{said}"
        return Split(whole_folds(deal(groups, k, seed), k), "prompt and voter", note)
    prompt_bin, voter_bin = deal(prompts, k, seed), deal([e.voter for e in examples], 2, seed)
    folds = []
    for p in range(k):
        for v in range(2):
            test = tuple(i for i in range(len(examples)) if prompt_bin[i] == p and voter_bin[i] == v)
            train = tuple(i for i in range(len(examples)) if prompt_bin[i] != p and voter_bin[i] != v)
            if test and train:
                folds.append(Fold(train, test))
    return Split(tuple(folds), "prompt and voter", f"{len(voters)} voters on shared prompts: a grid of {k} x 2{said}")


def whole_folds(bins: Sequence[int], k: int) -> tuple[Fold, ...]:
    """Fold b tests bin b and trains on all others."""
    members = defaultdict(list)
    for i, b in enumerate(bins):
        members[b].append(i)
    return tuple(
        Fold(tuple(i for i, b in enumerate(bins) if b != test), tuple(members[test])) for test in range(k) if members[test]
    )
