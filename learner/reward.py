"""The reward model: several members, each a scalar head (and, where votes warrant it, a LoRA adapter) on the one shared base.

A completion's score is linear in what the base makes of it: the final hidden state of its last valid token (Stiennon et al.
2020), the mean and the sum of those of its own tokens, and how many tokens and sentences it has (`engine/features.py`); prompt and
completion are exactly as the engine saw them. Counts of their own also keep length out of the other weights (ODIN, Chen et al. 2024).

Owns scoring and saving. Members are fitted to votes in `learner/reward_fit.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.features import feature_count, reply_features
from engine.lora import AdapterError
from engine.model import CausalModel
from learner import packing
from learner.batching import pass_tokens
from learner.config import RewardConfig
from learner.data import RankedExample
from learner.packing import Group, PackedRows, worth_packing

Pair = tuple[Sequence[int], Sequence[int]]  # prompt and reply, token ids
HEADS, ABOUT = "heads.safetensors", "reward.json"


class RewardDiverged(Exception):
    """Fitting or scoring met a number that is not finite; the round must be dropped."""


class Member(nn.Module):
    """One member: its heads, its adapter, and its own tendency to call ties.

    score = head(`engine.features` of the reply): (F,) -> scalar. log_nu: Davidson's tie parameter. level: the score of
    "none of them". adapter: the one it reads the base through, called `name`; None until LoRA training begins, so that
    all heads on the bare base share one forward pass.
    """

    def __init__(self, name: str, hidden_size: int) -> None:
        super().__init__()
        self.name = name
        self.adapter: str | None = None
        self.head = nn.Linear(feature_count(hidden_size), 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.log_nu = nn.Parameter(torch.zeros(()))
        self.level = nn.Parameter(torch.zeros(()))

    @torch.no_grad()
    def start(self, weight: Tensor, bias: Tensor, level: Tensor) -> None:
        """Set the head from one weight vector (F,) over `features_of`, the bias, and the level."""
        self.level.copy_(level)
        self.head.weight.copy_(weight[None])
        self.head.bias.fill_(bias.item())

    def of_features(self, features: Tensor) -> Tensor:
        """(..., F) -> (...,) scores, in logits of a pairwise preference."""
        return self.head(features).squeeze(-1)

    def forward(self, model: CausalModel, batch: Rows | PackedRows) -> Tensor:
        """Scores (N,) of the rows' replies."""
        return self.of_features(read(model, batch, self.adapter))


@dataclass(frozen=True)
class Rows:
    """Prompt + reply, padded on the right. ids, valid: (N, T); reply: (N, T) bool, True on the reply's tokens."""

    ids: Tensor
    valid: Tensor
    reply: Tensor


def read(model: CausalModel, batch: Rows | PackedRows, adapter: str | None) -> Tensor:
    """(N, F) features of the rows' replies, in order."""
    return features_of_packed(model, batch, adapter) if isinstance(batch, PackedRows) else features_of(model, batch, adapter)


def features_of(model: CausalModel, batch: Rows, adapter: str | None) -> Tensor:
    """(N, F) `engine.features.reply_features`, the last state being that of the last valid token (not of column -1)."""
    hidden = model(batch.ids, valid=batch.valid, adapter=adapter).float()  # (N, T, D)
    last = hidden[torch.arange(len(batch.ids), device=batch.ids.device), batch.valid.sum(1) - 1]
    total = torch.where(batch.reply[:, :, None], hidden, 0.0).sum(1)
    return reply_features(last, total, batch.reply.sum(1), (batch.reply & model.sentence_ends[batch.ids]).sum(1))


def features_of_packed(model: CausalModel, batch: PackedRows, adapter: str | None) -> Tensor:
    """`features_of` each reply, (M, F) float32, where replies to one prompt share a row."""
    hidden = model(batch.ids, positions=batch.positions, valid=batch.valid, attend=batch.attend, adapter=adapter).float()  # (N, T, D)
    of_reply = [hidden[n, columns] for n, columns in zip(batch.row.tolist(), batch.reply, strict=True)]
    total = torch.stack([own.sum(0) for own in of_reply])
    ends = (batch.reply & model.sentence_ends[batch.ids][batch.row]).sum(1)
    return reply_features(hidden[batch.row, batch.last], total, batch.reply.sum(1), ends)


class RewardModel:
    """An ensemble over one CausalModel. `members` are in order; scores come as one column a member."""

    def __init__(self, model: CausalModel, config: RewardConfig, members: Sequence[Member]) -> None:
        self.model, self.config, self.members = model, config, list(members)

    @classmethod
    def create(cls, model: CausalModel, config: RewardConfig, count: int, prefix: str = "reward") -> RewardModel:
        """`count` fresh members `<prefix>0`, `<prefix>1`, ..., all heads on the bare base."""
        return cls(model, config, [Member(f"{prefix}{i}", model.hidden_size).to(model.device) for i in range(count)])

    @property
    def limit(self) -> int:
        """Tokens of a prompt and its reply that are read; of longer ones the oldest are lost."""
        return min(self.config.max_tokens, self.model.max_context)

    @property
    def reads_base(self) -> bool:
        """Whether a member reads the bare base."""
        return any(member.adapter is None for member in self.members)

    @torch.no_grad()
    def score(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], members: Sequence[int] | None = None,
        features: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Scores (N, members) of N completions, each on its own prompt.

        members: some of them, by position. features: (N, F) of the completions on the bare base, where it has read them already.
        """
        chosen = self.members if members is None else [self.members[i] for i in members]
        scores = torch.empty(len(prompt_ids), len(chosen))
        unread = list(enumerate(chosen))
        if features is not None:
            for column, member in unread:
                if member.adapter is None:
                    scores[:, column] = member.of_features(features).cpu()
            unread = [(column, member) for column, member in unread if member.adapter]
        if not unread:
            return scores
        for rows in packing.passes(prompt_ids, completion_ids, range(len(prompt_ids)), pass_tokens(self.model.device), self.model):
            batch = self.laid_out([(prompt_ids[own[0]], [completion_ids[i] for i in own]) for own in packing.by_prompt(prompt_ids, rows)])
            found = {a: read(self.model, batch, a) for a in dict.fromkeys(member.adapter for _, member in unread)}
            for column, member in unread:
                scores[rows, column] = member.of_features(found[member.adapter]).cpu()
        return scores

    def score_examples(self, examples: Sequence[RankedExample], members: Sequence[int] | None = None) -> list[Tensor]:
        """Scores (K, members) of each example's completions."""
        flat = self.score(
            [e.prompt_ids for e in examples for _ in e.completions_ids],
            [c for e in examples for c in e.completions_ids],
            members,
        )
        return list(flat.split([len(e.completions_ids) for e in examples]))

    def save(self, path: Path) -> None:
        """Write the heads (safetensors), each member's adapter (PEFT) where it has one, and what they are, under `path`."""
        path.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for i, member in enumerate(self.members):
            if member.adapter:
                self.model.lora.save(member.adapter, path / f"member{i}")
            tensors |= {f"{i}.{name}": value.detach().cpu().contiguous() for name, value in member.state_dict().items()}
        save_file(tensors, path / HEADS)
        about = {
            "members": [{"name": m.name, "adapter": m.adapter is not None} for m in self.members],
            "hidden_size": self.model.hidden_size, "base": self.model.source,
        }  # fmt: skip
        (path / ABOUT).write_text(json.dumps(about, indent=2) + "\n", "utf-8")

    @classmethod
    def load(cls, model: CausalModel, config: RewardConfig, path: Path) -> RewardModel:
        """Read what `save` wrote; its scores are the same. Raises AdapterError, OSError."""
        about = json.loads((path / ABOUT).read_text("utf-8"))
        tensors, members = load_file(path / HEADS), []
        for i, written in enumerate(about["members"]):
            member = Member(written["name"], about["hidden_size"])
            if written["adapter"]:
                model.lora.load(member.name, path / f"member{i}")
                member.adapter = member.name
            if tensors[f"{i}.head.weight"].shape != member.head.weight.shape:
                raise AdapterError(f"the reward model in {path.name} is an earlier Plaudit's, which read replies differently: run a round")
            member.load_state_dict({key: tensors[f"{i}.{key}"] for key in member.state_dict()})
            members.append(member.to(model.device))
        return cls(model, config, members)

    def delete(self) -> None:
        """Take the members' adapters out of the model."""
        for member in self.members:
            if member.adapter:
                self.model.lora.delete(member.adapter)
                member.adapter = None

    def rows_of(self, examples: Sequence[RankedExample]) -> Rows | PackedRows:
        """The completions of the examples, in order: one row an example where that is cheaper, else one a completion."""
        return self.laid_out([(e.prompt_ids, e.completions_ids) for e in examples])

    def laid_out(self, groups: Sequence[Group]) -> Rows | PackedRows:
        """Prompts with their replies: one row a prompt where that is cheaper, else one a reply."""
        if worth_packing(groups, self.model, self.limit):
            return PackedRows.of(groups, self.model.pad_id, self.model.device)
        return self.rows([(prompt, reply) for prompt, replies in groups for reply in replies])

    def rows(self, pairs: Sequence[Pair]) -> Rows:
        """(prompt, reply) pairs as rows of at most `max_tokens` each: the oldest tokens go first, the end is always kept."""
        kept = [[*prompt, *reply][-self.limit :] for prompt, reply in pairs]
        longest = max(map(len, kept))
        ids = torch.full((len(kept), longest), self.model.pad_id, dtype=torch.long)
        valid = torch.zeros(len(kept), longest, dtype=torch.bool)
        replied = torch.zeros(len(kept), longest, dtype=torch.bool)
        for i, (row, (_, reply)) in enumerate(zip(kept, pairs, strict=True)):
            ids[i, : len(row)] = torch.tensor(row)
            valid[i, : len(row)] = True
            replied[i, max(0, len(row) - len(reply)) : len(row)] = True
        device = self.model.device
        return Rows(ids.to(device), valid.to(device), replied.to(device))
