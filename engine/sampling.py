"""Choosing tokens from logits. Pure: tensors and numbers in, tokens and log-probabilities out.

Every choice is made from one uniform number that depends only on (seed, position), by inverting the row's cumulative
distribution. So a sequence's tokens do not depend on what else is in the batch, and a batch is sampled in a few
operations, not one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.gpu import onto

BLOCK = 1024  # tokens
NUCLEUS = 256  # tokens that are looked at first
MASK = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), 53 bits, from a seed and a position: splitmix64's output function (Steele et al. 2014), chained."""
    return (_mix(_mix(seed & MASK) ^ position) >> 11) * 2.0**-53


def _mix(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def sample(
    logits: Tensor, temperatures: Sequence[float], top_ps: Sequence[float], uniforms: Sequence[float]
) -> tuple[list[int], list[float]]:
    """One token per row, and its log-probability in nats.

    logits: (n, V) float32. The log-probability is under the full softmax of logits / temperature, before top-p; a
    temperature of 0 takes the likeliest token and reports at temperature 1. A row with a NaN gives NaN.
    """
    device = logits.device
    if any(t not in (0, 1) for t in temperatures):
        logits = logits / onto(device, [[t or 1.0] for t in temperatures], torch.float32)
    probs = logits.softmax(-1)
    greedy = [t == 0 for t in temperatures]
    if all(greedy):
        tokens = logits.argmax(-1, keepdim=True)
    else:
        drawn = onto(device, uniforms, torch.float64)
        cut = [i for i, p in enumerate(top_ps) if p < 1]
        if len(cut) == len(top_ps):
            tokens = nucleus(probs, onto(device, top_ps, torch.float64), drawn)
        else:
            tokens = (invert_in_blocks if probs.is_cuda else invert)(probs, drawn)
            if cut:
                tokens[cut] = nucleus(probs[cut], onto(device, [top_ps[i] for i in cut], torch.float64), drawn[cut])
        if any(greedy):
            tokens = torch.where(onto(device, greedy, torch.bool)[:, None], logits.argmax(-1, keepdim=True), tokens)
    logprobs = probs.gather(-1, tokens).log()
    chosen, nats = torch.cat((tokens.double(), logprobs.double()), 1).T.tolist()  # one transfer; a GPU is waited for here alone
    return [int(token) for token in chosen], nats


def draw(logits: Tensor, temperatures: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """`sample` with top_p 1, of tensors alone, each (n,) -> tokens, and log-probabilities in float64, (n,). It waits for nothing, so it can be recorded."""
    greedy = temperatures == 0
    scaled = logits / torch.where(greedy, 1.0, temperatures).to(logits.dtype)[:, None]
    top, likeliest = scaled.max(-1, keepdim=True)
    weights = (scaled - top).exp()  # (n, V)
    tokens = torch.where(greedy[:, None], likeliest, invert_in_blocks(weights, uniforms))
    total = weights.sum(-1, keepdim=True, dtype=torch.float64)
    return tokens[:, 0], ((scaled.gather(-1, tokens) - top).double() - total.log())[:, 0]


def invert(probs: Tensor, uniforms: Tensor) -> Tensor:
    """(n, V) weights, (n,) numbers in [0, 1) -> (n, 1): the first token whose cumulative share exceeds the number."""
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    target = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).clamp(max=probs.shape[-1] - 1)


def invert_in_blocks(probs: Tensor, uniforms: Tensor) -> Tensor:
    """`invert`, to rounding in float64: first the block of tokens, then the token. A GPU adds up one long row slowly."""
    blocks = F.pad(probs, (0, -probs.shape[-1] % BLOCK)).view(len(probs), -1, BLOCK)  # (n, blocks, BLOCK)
    reached = blocks.sum(-1, dtype=torch.float64).cumsum(-1)  # (n, blocks)
    target = uniforms[:, None] * reached[:, -1:]
    block = torch.searchsorted(reached, target, right=True).clamp(max=reached.shape[-1] - 1)  # (n, 1)
    before = F.pad(reached, (1, 0)).gather(-1, block)
    inside = blocks[torch.arange(len(probs), device=probs.device), block[:, 0]].cumsum(-1, dtype=torch.float64)  # (n, BLOCK)
    within = torch.minimum(target - before, inside[:, -1:] * (1 - 2.0**-50))  # rounding must not lead to a token without a share
    return (block * BLOCK + torch.searchsorted(inside, within, right=True)).clamp(max=probs.shape[-1] - 1)


def nucleus(probs: Tensor, top_ps: Tensor, uniforms: Tensor, count: int = NUCLEUS) -> Tensor:
    """(n, V) probabilities, (n,) top-p, (n,) numbers in [0, 1) -> (n, 1): a token of each row's nucleus, the fewest likeliest tokens that together reach top-p.

    Holtzman et al. 2020. Inverts the cumulative distribution in order of likelihood; the likeliest token is always kept. `count` of them are sorted, and more
    only in rows that need more: a nucleus is nearly always small, and a full sort of a big vocabulary slow.
    """
    count = min(count, probs.shape[-1])
    top, index = probs.topk(count, dim=-1)  # (n, count), likeliest first
    total = top.cumsum(-1, dtype=torch.float64)
    last = torch.searchsorted(total, top_ps[:, None]).clamp(max=count - 1)  # the first with which top-p is reached
    target = uniforms[:, None] * total.gather(-1, last)
    tokens = index.gather(-1, torch.minimum(torch.searchsorted(total, target, right=True), last))
    more = total[:, -1] < top_ps
    if count < probs.shape[-1] and bool(more.any()):
        tokens[more] = nucleus(probs[more], top_ps[more], uniforms[more], 8 * count)
    return tokens
