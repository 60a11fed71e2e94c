"""Decode steps that a GPU replays: recorded once for so many rows (a CUDA graph), then started with a single call.

A step is some hundred kernels of a few microseconds; told one by one by Python it would take ten times as long as reading
the weights does. Nothing that is recorded hangs on Python's numbers: what the rows are fed and sampled with lies in one tensor that is filled
before each replay, and rows that make up the number belong to nobody. Recordings are made when they are first needed and dropped
with the adapters' mixture that is in them, or when the cache moves. On a CPU, where nothing can be recorded, the same step runs as it is.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from engine import gpu
from engine.cache import KVCache, Slots
from engine.mixture import Mixture
from engine.model import CausalModel
from engine.sampling import draw

GROWTH = 4  # rows are made up to 1, 4, 16, 64, ...: few recordings, and a GPU hardly minds the rows of nobody
SAID = -1  # in place of a token: the one that the last step sampled in this row


class Fed(NamedTuple):
    """What a step takes in for one row."""

    token: int  # the newest, or SAID
    length: int  # tokens cached
    adapter: int  # in the mixture; -1 for none
    temperature: float  # 0 = greedy
    uniform: float  # what the next token is drawn with


NOBODY = Fed(0, 0, -1, 0.0, 0.0)


class Recording(NamedTuple):
    """A recorded step, and where its results lie after a replay."""

    graph: Any  # torch.cuda.CUDAGraph
    said: Tensor  # (rows, 2) float64: token sampled with top_p 1, its log-probability
    logits: Tensor  # (rows, V)


class Flight:
    """A step under way. `logits` (n, V) are good until the next step is started."""

    def __init__(self, said: Tensor, logits: Tensor) -> None:
        self.logits, self.landed = logits, said
        if said.is_cuda:
            self.landed = torch.empty(said.shape, dtype=said.dtype, pin_memory=True).copy_(said, non_blocking=True)
            self.over = torch.cuda.Event()
            self.over.record()

    def read(self) -> tuple[list[int], list[float]]:
        """Tokens and log-probabilities; waits for them."""
        if self.logits.is_cuda:
            self.over.synchronize()
        tokens, logprobs = self.landed.T.tolist()
        return [int(token) for token in tokens], logprobs


class Replay:
    """The decode steps of one engine: sequence i has row i + 1 of its cache."""

    def __init__(self, model: CausalModel, cache: KVCache, most: int) -> None:
        self.model, self.cache, self.most = model, cache, most
        self.given = torch.zeros(most, len(NOBODY), dtype=torch.float64, device=model.device)  # a Fed each; float64 holds any length exactly
        self.tokens = torch.zeros(most, dtype=torch.long, device=model.device)  # that the last step sampled
        self.recordings: WeakKeyDictionary[Any, dict[int, Recording]] = WeakKeyDictionary()  # by mixture; the model's own without one
        self.recorded_on: Tensor | None = None

    def __call__(self, fed: Sequence[Fed], mixture: Mixture | None) -> Flight:
        """Start a step that gives every row its next token."""
        n, rows = len(fed), padded(len(fed), self.most)
        self.cache.reserve(1 + rows, max(row.length for row in fed) + 1)
        with torch.cuda.device(self.given.get_device()):
            filled = torch.tensor([*fed, *[NOBODY] * (rows - n)], dtype=torch.float64, pin_memory=self.given.is_cuda)
            self.given[:rows].copy_(filled, non_blocking=True)
            if not self.given.is_cuda:
                said, logits = self.step(rows, mixture)
                return Flight(said[:n], logits[:n])
            recording = self.recording(rows, mixture)
            recording.graph.replay()
            return Flight(recording.said[:n], recording.logits[:n])

    def step(self, rows: int, mixture: Mixture | None) -> tuple[Tensor, Tensor]:
        """What is recorded: `said` and `logits` of a Recording."""
        token, length, adapter, temperature, uniform = self.given[:rows].T.contiguous()
        ids = torch.where(token == SAID, self.tokens[:rows], token.long())
        if mixture is not None:
            mixture.follow(adapter)
        with gpu.recorded():
            hidden = self.model(ids[:, None], adapter=mixture, cache=Slots(self.cache, length.long(), first=1))[:, -1]
            logits = self.model.logits(hidden)
        tokens, logprobs = draw(logits, temperature, uniform)
        self.tokens[:rows] = tokens
        return torch.stack((tokens.double(), logprobs), 1), logits

    def recording(self, rows: int, mixture: Mixture | None) -> Recording:
        """The step for so many rows and this mixture, recorded if it is not yet."""
        if self.recorded_on is not self.cache.keys:
            self.recordings.clear()
            self.recorded_on = self.cache.keys
        made = self.recordings.setdefault(self.model if mixture is None else mixture, {})
        if rows not in made:
            before = self.tokens.clone()
            self.step(rows, mixture)  # so that everything it needs is there
            self.tokens.copy_(before)
            graph = torch.cuda.CUDAGraph()
            others = (other for some in self.recordings.values() for other in some.values())
            shared = next((other.graph.pool() for other in others), None)  # their memory: no two run at once
            with uncollected(), torch.cuda.graph(graph, pool=shared, capture_error_mode="thread_local"):
                said, logits = self.step(rows, mixture)
            made[rows] = Recording(graph, said, logits)
        return made[rows]


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection within: one that destroys an old recording makes the GPU give up the one being made."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def padded(rows: int, most: int) -> int:
    """The number of rows that is recorded for so many."""
    size = 1
    while size < rows:
        size *= GROWTH
    return min(size, most)
