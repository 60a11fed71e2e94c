"""Replies to one prompt in one row: the prompt is read once, each reply sees it and itself, and no other reply.

Owns how such rows are laid out and when they cost less than a row for each reply. What is read off them is
`learner/reward.py`'s. The hidden states are those of separate rows, up to float rounding (a test holds them equal).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from learner.batching import chunks

Group = tuple[Sequence[int], Sequence[Sequence[int]]]  # a prompt and the replies to it, token ids
WORTH = 0.9  # of the cost of separate rows, at most: a dense mask is slower than the causal one
LONG = 4  # a prompt with its replies may make a pass so many times as long as others: cut in pieces, each would read the prompt


class Reader(Protocol):
    """What of `engine.model.CausalModel` says whether packing pays."""

    hidden_size: int
    packs: bool


@dataclass(frozen=True)
class PackedRows:
    """A row for each prompt, replies one after the other behind it, padded on the right.

    ids, positions, valid: (N, T); attend: (N, T, T) bool. For each of the M replies in order: row (M,), the column of its
    prompt's last token asked (M,), that of its own last token (the prompt's, for an empty reply) last (M,), its columns reply (M, T) bool.
    """

    ids: Tensor
    positions: Tensor
    valid: Tensor
    attend: Tensor
    row: Tensor
    asked: Tensor
    last: Tensor
    reply: Tensor

    @classmethod
    def of(cls, groups: Sequence[Group], pad_id: int, device: torch.device | str) -> PackedRows:
        """Lay the groups out."""
        wide = max(len(prompt) + sum(map(len, replies)) for prompt, replies in groups)
        ids = torch.full((len(groups), wide), pad_id, dtype=torch.long)
        positions = torch.zeros(len(groups), wide, dtype=torch.long)
        owner = torch.full((len(groups), wide), -1)  # 0: the prompt; 1, 2, ...: a reply; -1: padding
        row, asked, last, columns = [], [], [], []
        for n, (prompt, replies) in enumerate(groups):
            ids[n, : len(prompt)] = torch.tensor(prompt, dtype=torch.long)
            positions[n, : len(prompt)] = torch.arange(len(prompt))
            owner[n, : len(prompt)] = 0
            at = len(prompt)
            for k, reply in enumerate(replies, 1):
                end = at + len(reply)
                ids[n, at:end] = torch.tensor(reply, dtype=torch.long)
                positions[n, at:end] = torch.arange(len(prompt), len(prompt) + len(reply))
                owner[n, at:end] = k
                row.append(n)
                asked.append(len(prompt) - 1)
                last.append(end - 1 if reply else len(prompt) - 1)
                columns.append((at, end))
                at = end
        reply_columns = torch.zeros(len(row), wide, dtype=torch.bool)
        for m, (at, end) in enumerate(columns):
            reply_columns[m, at:end] = True
        same = (owner[:, None, :] == owner[:, :, None]) | (owner[:, None, :] == 0)
        attend = same & torch.ones(wide, wide, dtype=torch.bool).tril()
        parts = (ids, positions, owner >= 0, attend, torch.tensor(row), torch.tensor(asked), torch.tensor(last), reply_columns)
        return cls(*(part.to(device) for part in parts))

    def before(self, *, whole: bool = False) -> Tensor:
        """(M, R), R tokens being the longest reply: the column whose state chose each of its tokens; any column after its last.

        whole: (M, R + 1), so that the column of every reply's last token is there too.
        """
        lengths = self.reply.sum(1, keepdim=True)  # (M, 1)
        at = (self.last[:, None] - lengths + torch.arange(int(lengths.max()) + whole, device=lengths.device)).clamp(0, self.ids.shape[1] - 1)
        at[:, 0] = self.asked
        return at


def worth_packing(groups: Sequence[Group], model: Reader, limit: int) -> bool:
    """Whether `model` can read replies in one row, that costs clearly less than one a reply, and every prompt fits `limit` whole with each reply.

    Counted: padded tokens, each with a transformer layer's 24 D^2 multiplications and additions and 4 T D of attention.
    """
    if not model.packs or any(len(prompt) + max(map(len, replies)) > limit for prompt, replies in groups):
        return False
    packed = max(len(prompt) + sum(map(len, replies)) for prompt, replies in groups)
    plain = max(len(prompt) + max(map(len, replies)) for prompt, replies in groups)
    rows = sum(len(replies) for _, replies in groups)
    return len(groups) * cost(packed, model.hidden_size) <= WORTH * rows * cost(plain, model.hidden_size)


def by_prompt(prompts: Sequence[Sequence[int]], rows: Sequence[int]) -> list[list[int]]:
    """`rows`, those that follow each other and have one prompt together."""
    return [list(run) for _, run in groupby(rows, lambda i: prompts[i])]


def passes(prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]], rows: Sequence[int], most: int, model: Reader) -> list[list[int]]:
    """`rows` in `batching.chunks` of at most `most` padded tokens, those of one prompt together where reading it once is clearly cheaper.

    Rows of one prompt together may have `LONG` times `most`, one row alone any number. prompts, replies: of every row, token ids.
    """

    def tokens(rows: Sequence[int]) -> int:
        return len(prompts[rows[0]]) + sum(len(replies[i]) for i in rows)

    alone, groups = [[i] for i in rows], list[list[int]]()
    for own in by_prompt(prompts, rows):
        groups.append([])
        for i in own:
            if groups[-1] and tokens([*groups[-1], i]) > LONG * most:
                groups.append([])
            groups[-1].append(i)
    together, apart = (sum(cost(tokens(rows), model.hidden_size) for rows in units) for units in (groups, alone))
    units = groups if model.packs and together <= WORTH * apart else alone
    return [[i for unit in part for i in units[unit]] for part in chunks([tokens(rows) for rows in units], most)]


def cost(tokens: int, hidden_size: int) -> float:
    """Relative cost of a row of so many tokens."""
    return tokens * (6.0 * hidden_size + tokens)
