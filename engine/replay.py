"""Decode steps that a GPU replays: recorded once for so many rows (a CUDA graph), then started with a single call.

A step is some hundred kernels of a few microseconds; told one by one by Python it would take ten times as long as reading
the weights does. Nothing that is recorded hangs on Python's numbers: tokens, lengths and adapters of the rows lie in one tensor
that is filled before each replay, and rows that make up the number belong to nobody. Recordings are made when they are first needed and dropped
with the adapters' mixture that is in them, or when the cache moves. On a CPU, where nothing can be recorded, the same step runs as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from engine.cache import KVCache, Slots
from engine.gpu import onto
from engine.lora import Mixture
from engine.model import CausalModel

GROWTH = 4  # rows are made up to 1, 4, 16, 64, ...: few recordings, and a GPU hardly minds the rows of nobody


@dataclass(frozen=True)
class Recording:
    """A recorded step, and where its result lies after a replay: (rows, D)."""

    graph: Any  # torch.cuda.CUDAGraph
    hidden: Tensor


class Replay:
    """The decode steps of one engine: sequence i has row i + 1 of its cache."""

    def __init__(self, model: CausalModel, cache: KVCache, most: int) -> None:
        self.model, self.cache, self.most = model, cache, most
        self.given = torch.zeros(most, 3, dtype=torch.long, device=model.device)  # token, length, adapter of each row
        self.recordings: WeakKeyDictionary[Any, dict[int, Recording]] = WeakKeyDictionary()  # by mixture; the model's own without one
        self.recorded_on: Tensor | None = None

    def __call__(self, ids: Sequence[int], lengths: Sequence[int], adapters: Sequence[int], mixture: Mixture | None) -> Tensor:
        """Feed every sequence its newest token: its last hidden state, (n, D), good until the next call.

        lengths: tokens cached. adapters: each one's in the mixture, -1 for the base.
        """
        n, rows = len(ids), padded(len(ids), self.most)
        self.cache.reserve(1 + rows, max(lengths) + 1)
        filled = [*zip(ids, lengths, adapters, strict=True), *[(0, 0, -1)] * (rows - n)]
        self.given[:rows].copy_(onto(self.given.device, filled, torch.long), non_blocking=True)
        if not self.given.is_cuda:
            return self.step(rows, mixture)[:n]
        if self.recorded_on is not self.cache.keys:
            self.recordings.clear()
            self.recorded_on = self.cache.keys
        of_mixture = self.recordings.setdefault(self.model if mixture is None else mixture, {})
        with torch.cuda.device(self.given.device):
            if rows not in of_mixture:
                of_mixture[rows] = self.record(rows, mixture, beside=[*of_mixture.values()])
            of_mixture[rows].graph.replay()
        return of_mixture[rows].hidden[:n]

    def step(self, rows: int, mixture: Mixture | None) -> Tensor:
        """What is recorded: (rows, D)."""
        ids, lengths, adapters = self.given[:rows].T.contiguous()
        if mixture is not None:
            mixture.follow(adapters)
        return self.model(ids[:, None], adapter=mixture, cache=Slots(self.cache, lengths, first=1))[:, -1]

    def record(self, rows: int, mixture: Mixture | None, beside: Sequence[Recording] = ()) -> Recording:
        """Run the step once, so that everything it needs is there, and record it, in the memory of those `beside` it: no two run at once."""
        self.step(rows, mixture)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=beside[0].graph.pool() if beside else None, capture_error_mode="thread_local"):
            hidden = self.step(rows, mixture)
        return Recording(graph, hidden)


def padded(rows: int, most: int) -> int:
    """The number of rows that is recorded for so many."""
    size = 1
    while size < rows:
        size *= GROWTH
    return min(size, most)
