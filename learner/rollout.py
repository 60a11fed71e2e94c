"""Rollouts: the policy's own replies to prompts, sampled by the same engine that serves people.

Owns the step from prompts to a `Trajectories` batch, and the log-probabilities of its replies under any adapter. Does
not own rewards, advantages or the update (`learner/ppo.py`).

Rows are prompt + reply, padded on the right. What is learned from lies in reply columns: token r of a reply was chosen
from the hidden state at column `prompt length - 1 + r`, so hidden states are gathered there and everything per reply
token is (B, R), starting at column 0, padded on the right; `mask` says which entries are real.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.engine import Engine, SamplingParams
from engine.model import CausalModel
from engine.tokenizer import ChatTokenizer
from learner import packing
from learner.batching import pass_tokens
from learner.packing import PackedRows, worth_packing

NUCLEUS = 64  # tokens: where the reference might go on in more ways, it is open what to say


@dataclass(frozen=True)
class Trajectories:
    """A batch of sampled replies; those to one prompt are consecutive, `group` of them."""

    prompts: list[list[int]]  # B
    completions: list[list[int]]  # B, end token included where the reply ended with one
    texts: list[str]
    finish_reasons: list[str]  # "stop", or "length" for a reply that was cut
    group: int
    ids: Tensor  # (B, T) prompt + reply
    valid: Tensor  # (B, T) bool
    chosen_at: Tensor  # (B, R) column of `ids` whose hidden state chose reply token r
    mask: Tensor  # (B, R) bool: real reply tokens, the end token among them
    engine_logprobs: Tensor  # (B, R) nats, as recorded while sampling; 0 outside the mask
    features: Tensor | None = None  # (B, F) what the bare base makes of each whole reply (`engine/features.py`), where it has read them

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def tokens(self) -> Tensor:
        """(B, R) the reply tokens; the pad id outside the mask."""
        after = (self.chosen_at + 1).clamp(max=self.ids.shape[1] - 1)
        return self.ids.gather(1, after)

    @property
    def lengths(self) -> Tensor:
        """(B,) tokens of each reply."""
        return self.mask.sum(1)

    @property
    def cut(self) -> Tensor:
        """(B,) bool: the reply hit the length limit and has no end token."""
        return torch.tensor([reason == "length" for reason in self.finish_reasons], device=self.mask.device)


def collect(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    texts: Sequence[str],
    finish_reasons: Sequence[str],
    logprobs: Sequence[Sequence[float]],
    group: int,
    pad_id: int,
    device: torch.device | str = "cpu",
) -> Trajectories:
    """Lay rows out as tensors. Raises ValueError for a reply without tokens."""
    if not all(completions) or not all(prompts):
        raise ValueError("a rollout needs at least one prompt token and one reply token")
    rows = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]
    size, longest, reply = len(rows), max(map(len, rows)), max(map(len, completions))
    ids = torch.full((size, longest), pad_id, dtype=torch.long)
    valid = torch.zeros(size, longest, dtype=torch.bool)
    recorded = torch.zeros(size, reply)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        valid[i, : len(row)] = True
        recorded[i, : len(completions[i])] = torch.tensor(list(logprobs[i]))
    first = torch.tensor([len(p) - 1 for p in prompts])
    step = torch.arange(reply)
    mask = step < torch.tensor([[len(c)] for c in completions])
    chosen_at = (first[:, None] + step).clamp(max=longest - 1)
    return Trajectories(
        [list(p) for p in prompts], [list(c) for c in completions], list(texts), list(finish_reasons), group,
        ids.to(device), valid.to(device), chosen_at.to(device), mask.to(device), recorded.to(device),
    )  # fmt: skip


def sample(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    *,
    version: str,
    group: int,
    max_tokens: int,
    temperature: float,
    seed: int,
    top_p: float = 1.0,
) -> Trajectories:
    """`group` replies to each prompt by adapter `version`; reply i of the batch has seed `seed + i`.

    Raises PromptTooLong; and FloatingPointError when the policy's arithmetic broke down while sampling.
    """
    repeated = [list(p) for p in prompts for _ in range(group)]
    params = [
        SamplingParams(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed + i) for i in range(len(repeated))
    ]
    replies = engine.generate(repeated, params, version)
    if any(s.finish_reason == "cancelled" for s in replies):
        raise FloatingPointError("the policy gave a log-probability that is not finite while sampling")
    return collect(
        repeated,
        [s.token_ids for s in replies],
        texts=[s.text for s in replies],
        finish_reasons=[str(s.finish_reason) for s in replies],
        logprobs=[s.logprobs for s in replies],
        group=group,
        pad_id=engine.model.pad_id,
        device=engine.model.device,
    )


def at_characters(tokenizer: ChatTokenizer, completion: Sequence[int], ends: Sequence[int]) -> list[int]:
    """For each number of characters, the token that completes so many of the reply's text; the last one when none does."""
    reached = [len(tokenizer.decode(list(completion[: k + 1]))) for k in range(len(completion))] if ends else []
    return [next((k for k, length in enumerate(reached) if length >= end > 0), len(completion) - 1) for end in ends]


def passes(model: CausalModel, batch: Trajectories, rows: Sequence[int], max_tokens: int = 0) -> list[Tensor]:
    """`rows` in `packing.passes` of at most `max_tokens` padded tokens; 0: as many as suit the device."""
    most = max_tokens or pass_tokens(batch.ids.device)
    found = packing.passes(batch.prompts, batch.completions, sorted(rows), most, model)  # the same rows, the same passes
    return [torch.tensor(part, device=batch.ids.device) for part in found]


def over(model: CausalModel, batch: Trajectories, max_tokens: int, compute: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """`compute` on `passes` of all rows, its (n, R', ...) results put together as (B, R, ...), 0 outside the mask."""
    whole: list[Tensor] = []
    for chunk in passes(model, batch, range(len(batch)), max_tokens):
        for i, part in enumerate(compute(chunk)):
            if i == len(whole):
                whole.append(torch.zeros(*batch.mask.shape, *part.shape[2:], dtype=part.dtype, device=batch.mask.device))
            real = batch.mask[chunk, : part.shape[1]]
            whole[i][chunk, : part.shape[1]] = torch.where(real.view(*real.shape, *[1] * (part.dim() - 2)), part, part.new_zeros(()))
    return tuple(whole)


def reply_hidden(model: CausalModel, batch: Trajectories, rows: Tensor, adapter: str | None, *, whole: bool = False) -> Tensor:
    """(n, R', D) hidden states that chose the reply tokens of `rows`, R' the longest reply among them.

    whole: (n, R' + 1, D), so that the state after all of a reply's n tokens is there too, at n.
    """
    each = rows.tolist()
    groups = [(batch.prompts[own[0]], [batch.completions[i] for i in own]) for own in packing.by_prompt(batch.prompts, each)]
    if len(groups) < len(each) and worth_packing(groups, model, model.max_context):
        packed = PackedRows.of(groups, model.pad_id, model.device)
        hidden = model(packed.ids, positions=packed.positions, valid=packed.valid, attend=packed.attend, adapter=adapter)  # (N, T', D)
        # Not by indexing: several replies take their prompt's last state, and on several threads its gradients would add up in any order
        at = packed.row[:, None] * packed.ids.shape[1] + packed.before(whole=whole)  # (n, R') or one more
        return hidden.flatten(0, 1).index_select(0, at.flatten()).view(*at.shape, -1)
    wide = int(batch.valid[rows].sum(1).max())
    reply = int(batch.mask[rows].sum(1).max())
    hidden = model(batch.ids[rows, :wide], valid=batch.valid[rows, :wide], adapter=adapter)  # (n, T', D)
    at = (batch.chosen_at[rows, :1] + torch.arange(reply + whole, device=rows.device)).clamp(max=wide - 1)
    return hidden.gather(1, at[:, :, None].expand(-1, -1, hidden.shape[-1]))


def reply_logits(model: CausalModel, batch: Trajectories, rows: Tensor, hidden: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logits / temperature (N, V) of the real reply tokens of `rows`, those tokens (N,), and where they lie: (n, R') bool.

    hidden: `reply_hidden` of them.
    """
    mask = batch.mask[rows, : hidden.shape[1]]
    logits = model.logits(hidden[mask])
    if temperature != 1.0:  # the vocabulary is wide: a division by 1 and its gradient are two passes over it
        logits = logits / temperature
    return logits, batch.tokens[rows, : hidden.shape[1]][mask], mask


def reply_logprobs(
    model: CausalModel, batch: Trajectories, rows: Tensor, adapter: str | None, temperature: float
) -> Tensor:
    """Log-probability of each reply token under the full softmax of logits / temperature, as the engine samples.

    (n, R') nats, 0 outside the mask.
    """
    return reply_chances(model, batch, rows, adapter, temperature).logprobs


class Chances(NamedTuple):
    """What a policy might have said at each reply token, (n, R') each, 0 outside the mask."""

    logprobs: Tensor  # nats, of what it did say
    ending: Tensor  # the probability of one of the end tokens
    outside: Tensor  # the probability of what is not in a nucleus


def reply_chances(
    model: CausalModel, batch: Trajectories, rows: Tensor, adapter: str | None, temperature: float, end_ids: Sequence[int] = (),
    nucleus: Tensor | None = None,
) -> Chances:  # fmt: skip
    """By one pass of `adapter`; logits / temperature and their full softmax. nucleus: (B, R, W) as `Divergence.nucleus`; None is the whole vocabulary."""
    logits, tokens, mask = reply_logits(model, batch, rows, reply_hidden(model, batch, rows, adapter), temperature)
    chosen = -F.cross_entropy(logits, tokens, reduction="none")
    total = logits.gather(1, tokens[:, None]) - chosen[:, None]  # log of the sum over the vocabulary
    outside = torch.zeros_like(chosen)
    if nucleus is not None:
        ids = nucleus[rows, : mask.shape[1]][mask]  # (N, W)
        within = torch.where(ids >= 0, (logits.gather(1, ids.clamp(min=0)) - total).exp(), 0.0).sum(1)
        outside = torch.where(ids[:, 0] >= 0, 1 - within, 0.0)
    return Chances(laid_out(mask, chosen), laid_out(mask, (logits[:, list(end_ids)] - total).exp().sum(1)), laid_out(mask, outside))


@dataclass(frozen=True)
class Divergence:
    """Two policies on the replies of one of them; each (n, R') nats, 0 outside the mask."""

    logprobs: Tensor  # of the sampled tokens, under the policy
    ref_logprobs: Tensor  # and under the reference
    entropy: Tensor  # of the policy where each token was chosen
    kl: Tensor  # KL(policy, reference) where each token was chosen, summed over the whole vocabulary
    nucleus: Tensor  # (n, R', W) int64, no nats: the reference's nucleus there, likeliest first, then -1; all -1 where it has more than W tokens
    ref_hidden: Tensor  # (n, R' + 1, D), no nats: the reference's states before each token and after the last, as `reply_hidden`'s `whole`


@torch.no_grad()
def reply_divergence(
    model: CausalModel, batch: Trajectories, rows: Tensor, adapter: str | None, reference: str | None, temperature: float, top_p: float = 1.0
) -> Divergence:
    """How `adapter`, which sampled the replies, differs from `reference` at each of their tokens. top_p: of the nucleus; 1 gives none.

    A reply's sum of `kl` has the mean of its sum of log p - log q, the KL of whole replies, with less noise: what the tokens
    drawn add to it is averaged out (Rao-Blackwell; Amini et al. 2025, "Better Estimation of the KL Divergence").
    """
    logits, tokens, mask = reply_logits(model, batch, rows, reply_hidden(model, batch, rows, adapter), temperature)
    ref_hidden = reply_hidden(model, batch, rows, reference, whole=True)
    ref, _, _ = reply_logits(model, batch, rows, ref_hidden[:, :-1], temperature)
    entropy, kl = torch.zeros(len(tokens), device=tokens.device), torch.zeros(len(tokens), device=tokens.device)
    nucleus = torch.full((len(tokens), min(NUCLEUS, logits.shape[1])), -1, device=tokens.device)
    for part in torch.arange(len(tokens), device=tokens.device).split(256):  # a vocabulary may be large
        p, q = logits[part].log_softmax(-1), ref[part].log_softmax(-1)
        entropy[part] = -(p.exp() * p).sum(-1)
        kl[part] = (p.exp() * (p - q)).sum(-1)
        if top_p < 1:
            top, ids = q.exp().topk(nucleus.shape[1], dim=-1)
            reached = top.cumsum(-1)
            nucleus[part] = torch.where((reached - top < top_p) & (reached[:, -1:] >= top_p), ids, -1)
    return Divergence(
        laid_out(mask, -F.cross_entropy(logits, tokens, reduction="none")), laid_out(mask, -F.cross_entropy(ref, tokens, reduction="none")),
        laid_out(mask, entropy), laid_out(mask, kl), nucleus.new_full((*mask.shape, nucleus.shape[1]), -1).masked_scatter(mask[:, :, None], nucleus), ref_hidden,
    )  # fmt: skip


def laid_out(mask: Tensor, values: Tensor) -> Tensor:
    """`values` (N,), one a True of `mask` (n, R'), where it is True; 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=mask.device).masked_scatter(mask, values)
