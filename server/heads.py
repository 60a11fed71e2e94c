"""The learner's reward heads as the server uses them: read from a round's files, fed by the engine's bare base.

Owns the reading of `rounds/NNNNNN/reward` and of a few candidates, stretch by stretch, so that decoding goes on in
between. What a head sees is `engine/features.py`'s; a test holds the scores equal to `learner/reward.py`'s. Does not fit, and
does not choose (`server/choice.py`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from engine.cache import Prompt
from engine.features import feature_count, reply_features
from engine.model import CausalModel
from store.rounds import RoundFiles


class Unusable(Exception):
    """A round's reward model cannot score here; the message says why."""


@dataclass(frozen=True)
class Heads:
    """Linear members over `engine.features`. weight: (members, F); bias: (members,)."""

    weight: Tensor
    bias: Tensor
    max_tokens: int  # of prompt and reply; longer prompts lose their oldest
    round: int

    def scores(self, features: Tensor) -> Tensor:
        """(m, F) -> (m, members), logits of a pairwise preference."""
        return features @ self.weight.T + self.bias


def newest_heads(rounds: RoundFiles, base_digest: str) -> Heads | None:
    """Of the last round that fitted a reward model and says on which base; None before there is one. Raises Unusable."""
    for n in reversed(rounds.finished()):
        path = rounds.directory(n) / "reward"
        if (path / "reward.json").is_file():
            try:
                if "base_digest" in (record := rounds.read(n)):
                    return _read(path, record, base_digest, n)
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as damaged:
                raise Unusable(f"the reward model of round {n} cannot be read ({type(damaged).__name__})") from damaged
    return None


def _read(path: Path, record: dict[str, Any], base_digest: str, n: int) -> Heads:
    if record["base_digest"] != base_digest:
        raise Unusable(f"the reward model of round {n} was fitted on another base model")
    about = json.loads((path / "reward.json").read_text("utf-8"))
    members = about["members"]
    if any(member["adapter"] for member in members):
        raise Unusable(f"the reward model of round {n} reads the base through adapters, which are not loaded here")
    tensors = load_file(path / "heads.safetensors")
    weight = torch.cat([tensors[f"{i}.head.weight"] for i in range(len(members))])
    if weight.shape[1] != feature_count(about["hidden_size"]):
        raise Unusable(f"the reward model of round {n} is an earlier Plaudit's, which read replies differently")
    bias = torch.cat([tensors[f"{i}.head.bias"] for i in range(len(members))])
    return Heads(weight, bias, int(record["config"]["reward"]["max_tokens"]), n)


class Reading:
    """The replies to one prompt, read by the bare base a stretch at a time; `features` when `left` is 0.

    The prompt is read once: each reply overwrites the one before it behind the prompt. So that they share it, the
    prompt is cut to what fits `max_tokens` with the longest reply (the learner cuts for each reply).
    """

    def __init__(self, model: CausalModel, prompt_ids: Sequence[int], replies: Sequence[Sequence[int]], max_tokens: int) -> None:
        limit, longest = min(max_tokens, model.max_context), max(map(len, replies))
        kept = list(prompt_ids)[-max(limit - longest, 1) :]
        self._model, self._parts = model, [kept, *[list(reply)[-(limit - 1) :] for reply in replies]]
        self._cache = model.new_cache(1, len(kept) + max(map(len, self._parts[1:])))
        self._part = self._done = 0  # the part being read (0: the prompt), and how much of it has been
        self._total = torch.zeros(model.hidden_size)
        self._rows: list[Tensor] = []

    @property
    def left(self) -> int:
        """Tokens still to read."""
        return sum(map(len, self._parts[self._part :])) - self._done

    @property
    def features(self) -> Tensor:
        """(m, F) float32, as `learner.reward.features_of`."""
        return torch.cat(self._rows)

    @torch.inference_mode()
    def advance(self, count: int) -> int:
        """Read up to `count` tokens (at least one) of the present part; how many were read."""
        part = self._parts[self._part]
        ids = part[self._done : self._done + max(count, 1)]
        behind = len(self._parts[0]) if self._part else 0
        span = Prompt(self._cache, 0, behind + self._done, len(ids))
        hidden = self._model(torch.tensor([ids], device=self._model.device), cache=span)[0].float().cpu()  # (T, D)
        self._done += len(ids)
        self._total = self._total + hidden.sum(0)
        if self._done == len(part):
            if self._part:
                ends = self._model.sentence_ends[torch.tensor(part, device=self._model.device)].sum().cpu()
                self._rows.append(reply_features(hidden[-1:], self._total[None], torch.tensor([len(part)]), ends[None]))
            self._part, self._done, self._total = self._part + 1, 0, torch.zeros(self._model.hidden_size)
        return len(ids)
