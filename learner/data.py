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
from dataclasses import dataclass
from typing import Any, Protocol

from learner.metrics import strict_pairs, tied_pairs


class Renderer(Protocol):
    """What of `engine.tokenizer.ChatTokenizer` is needed here."""

    eos_ids: tuple[int, ...]

    def render(self, messages: list[dict], *, generation_prompt: bool = True) -> list[int]: ...
    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class RankedExample:
    """One vote: a prompt, its K completions, and the voter's ranking of them.

    prompt_ids: the rendered conversation, generation prompt included. completions_ids: K replies as sampled (with
    their end token where they had one). groups: best first, ties grouped, indices into completions_ids.
    """

    prompt_ids: tuple[int, ...]
    completions_ids: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[int, ...], ...]
    voter: str
    prompt_key: str  # equal for equal conversations
    conversation: str  # a conversation's later turns repeat its earlier ones: never on both sides of a split
    vote_id: str
    comparison_id: str
    seq: int = 0
    ties: bool = True  # whether a group of several states a tie; in a favourite vote the others are merely not chosen
    weight: float = 1.0

    @property
    def strict(self) -> list[tuple[int, int]]:
        """(winner, loser) pairs that the vote states."""
        return strict_pairs(self.groups)

    @property
    def tied(self) -> list[tuple[int, int]]:
        """Pairs that the vote says are equally good."""
        return tied_pairs(self.groups) if self.ties else []


@dataclass(frozen=True)
class Fold:
    """Indices of one train / test split. No prompt, conversation (or voter, see `Split.by`) is on both sides."""

    train: tuple[int, ...]
    test: tuple[int, ...]


@dataclass(frozen=True)
class Split:
    """The folds of a cross-validation, and in plain words what they keep apart."""

    folds: tuple[Fold, ...]
    by: str  # "prompt and voter" or "prompt"
    note: str


def examples_from_votes(voted: Iterable[Any], tokenizer: Renderer) -> list[RankedExample]:
    """RankedExamples of standing votes (`store.records.VotedComparison`), oldest first.

    Votes that state neither a preference nor a tie ("none good", or a ranking of one) are left out: they rank nothing.
    A conversation that the chat template refuses is left out too (it cannot have been shown).
    """
    examples = []
    for item in sorted(voted, key=lambda item: item.vote.seq):
        comparison, vote = item.comparison, item.vote
        groups = tuple(tuple(int(i) for i in group) for group in vote.groups)
        if not strict_pairs(groups) and not tied_pairs(groups):
            continue
        messages = [{"role": m["role"], "content": m["content"]} for m in comparison.messages]
        try:
            prompt = tokenizer.render(messages)
        except ValueError:
            continue
        examples.append(
            RankedExample(
                prompt_ids=tuple(prompt),
                completions_ids=tuple(completion_ids(c, tokenizer) for c in by_index(comparison.completions)),
                groups=groups,
                voter=str(vote.voter),
                prompt_key=prompt_key(messages),
                conversation=str(comparison.conversation_id),
                vote_id=str(vote.id),
                comparison_id=str(comparison.id),
                seq=int(vote.seq),
                ties=vote.kind != "favourite",
            )
        )
    return examples


def by_index(completions: Sequence[Any]) -> list[Any]:
    """Completions in the order that a vote's indices mean."""
    return sorted(completions, key=lambda c: c.index)


def completion_ids(completion: Any, tokenizer: Renderer) -> tuple[int, ...]:
    """Token ids as sampled; for an imported reply, which has none, its text and the end token."""
    if completion.token_ids:
        return tuple(completion.token_ids)
    return (*tokenizer.encode(completion.text), tokenizer.eos_ids[0])


def prompt_key(messages: Sequence[dict]) -> str:
    """Digest of a conversation, for telling prompts apart without keeping their words."""
    return hashlib.sha256(json.dumps([[m["role"], m["content"]] for m in messages]).encode()).hexdigest()[:16]


def data_digest(examples: Sequence[RankedExample]) -> str:
    """sha256 over everything that training sees, independent of the order the votes came in."""
    rows = sorted(
        json.dumps([e.vote_id, e.voter, e.prompt_ids, e.completions_ids, e.groups, e.ties, e.weight]) for e in examples
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

    Equal prompts always share a label. A conversation's turns do too, unless there are so few conversations (under
    eight, or one with more than half of the votes) that nothing could be split: people who vote along one long chat.
    """
    whole = connected([(("p", e.prompt_key), ("c", e.conversation)) for e in examples])
    sizes = Counter(whole)
    if len(sizes) >= 8 and max(sizes.values()) <= len(examples) / 2:
        return whole, True
    return connected([(("p", e.prompt_key),) for e in examples]), len({e.conversation for e in examples}) == len(examples)


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
