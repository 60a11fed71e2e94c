"""Continuous batching: sequences join and leave between decode steps, each pinned to its adapter version.

Owns the running of one model: `step()` is the whole story. The queue and rows are the scheduler's
(`engine/scheduler.py`), the arithmetic the model's (`engine/model.py`). Not thread-safe: one thread owns an Engine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.cache import Pack, Prompt, Rows
from engine.gpu import onto
from engine.lora import Adapter, AdapterError
from engine.mixture import Mixture
from engine.model import CausalModel
from engine.prefixes import Prefixes
from engine.replay import SAID, Fed, Flight, Replay
from engine.sampling import sample, uniform
from engine.scheduler import QueueFull, Scheduler
from engine.sequence import BASE, PromptRead, SamplingParams, Sequence
from engine.stopping import StreamingText
from engine.tokenizer import ChatTokenizer

__all__ = [
    "BASE", "Delta", "Engine", "EngineStats", "PromptTooLong", "QueueFull", "SamplingParams", "Sequence",
    "UnknownVersion", "VersionInUse", "probe",
]  # fmt: skip
MIXTURES = 4  # kept for when the same versions run together again
IDLE_BYTES = 256 << 20  # of keys and values that are kept while nobody is answered
PREFILL_TOKENS = 512  # prompt tokens read per step at most, so that a long prompt does not hold up the others
GPU_PREFILL_TOKENS = 2048  # the same on a GPU


class PromptTooLong(Exception):
    """Prompt and reply do not fit into the model's context; the message has the numbers."""


class UnknownVersion(Exception):
    """No adapter of that name is loaded."""


class VersionInUse(Exception):
    """The version still writes replies; unload it when they have ended."""


@dataclass(frozen=True)
class Delta:
    """What one step added to one sequence: one token, and the text that has become safe to show (may be "")."""

    sequence: Sequence
    text: str
    finished: bool


@dataclass
class EngineStats:
    """Counters since the start, and how full the engine is now."""

    running: int = 0
    queued: int = 0
    steps: int = 0
    prefill_tokens: int = 0  # prompt tokens put through the model
    reused_tokens: int = 0  # prompt tokens that were known from before
    tokens: int = 0  # tokens sampled
    finished: int = 0
    cancelled: int = 0
    kv_bytes: int = 0
    kept_bytes: int = 0  # of keys and values that may be reused


class Engine:
    """Runs one model for many sequences at once.

    reuse_bytes: memory for keys and values of finished conversations, whose next turn then reads only what is new; 0 keeps
    none, as it must be where adapters are trained. int8: see `CausalModel.pack`.
    """

    def __init__(
        self, model: CausalModel, tokenizer: ChatTokenizer, *, max_sequences: int = 32, max_context: int | None = None,
        max_queue: int = 256, reuse_bytes: int = 0, int8: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer = model, tokenizer
        model.pack(int8)
        self.max_context = min(max_context or model.max_context, model.max_context)
        self.scheduler = Scheduler(max_sequences, max_queue)
        self.stats = EngineStats()
        # Row 0 is where a prompt is read; it is then copied for each reply, so that running sequence i has row i + 1.
        self._cache = model.new_cache(max_sequences + 1, self.max_context)
        self._prefixes = Prefixes(reuse_bytes) if reuse_bytes else None
        self._ids = itertools.count()
        self._eos = frozenset(tokenizer.eos_ids) | frozenset(model.eos_ids)
        self._replay = Replay(model, self._cache, max_sequences) if model.device.type == "cuda" and model.net.replayable else None
        self._flying: tuple[list[Sequence], Flight] | None = None  # a step started ahead, and for whom
        self._mixtures: dict[tuple[str, ...], Mixture] = {}  # by the versions in them, the latest used last
        self._revision = model.lora.revision  # of the bank, that they were made from

    def add(
        self, prompt_ids: list[int], params: list[SamplingParams], versions: list[str], owner: str = ""
    ) -> list[Sequence]:
        """Queue `len(params)` replies to one prompt, reply i by versions[i]; those of one version share one prefill.

        owner: who asks. What was read for one is not reused for another, who could tell by the time it took.
        Raises QueueFull, PromptTooLong, UnknownVersion, or ValueError for an empty or impossible prompt; then
        nothing was queued.
        """
        self._check(prompt_ids, params, versions)
        self.scheduler.check_room(len(params))
        return self._queue(prompt_ids, params, versions, owner)

    @torch.inference_mode()
    def step(self) -> list[Delta]:
        """One new token for every running sequence; prompts join and finished sequences leave."""
        said = self._replayed()
        hidden = [*self._decode(), *self._prefill()]
        running = list(self.scheduler.running)
        if not running:
            return []
        if hidden:
            new = self._sample(self.model.next_logits(torch.cat(hidden)))
            said |= zip(running[len(said) :], zip(*new, strict=True), strict=True)
        deltas = [self._extend(s, *said[s]) for s in running]
        for row, delta in enumerate(deltas, 1):
            if delta.finished and delta.sequence.finish_reason != "cancelled":
                self._keep(delta.sequence, delta.sequence.prompt_ids + delta.sequence.token_ids[:-1], row)
        self._leave(delta.sequence for delta in deltas if delta.finished)
        self.stats.steps += 1
        self.stats.tokens += len(deltas)
        self.stats.finished += sum(delta.finished for delta in deltas)
        return deltas

    @torch.inference_mode()
    def cancel(self, sequences: Iterable[Sequence]) -> None:
        """End these sequences now; their rows are free for the next step. Harmless for finished ones."""
        alive = [s for s in sequences if not s.finished]
        for s in alive:
            s.finish_reason = "cancelled"
        self.stats.cancelled += len(alive)
        self._leave(alive)

    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self.scheduler.has_work()

    def versions(self) -> list[str]:
        """What a sequence may be written by: "base" and the loaded adapters."""
        return [BASE, *self.model.lora.names()]

    def load_version(self, name: str, adapter: str | Path | Adapter) -> None:
        """Have a version beside the others: a PEFT directory, or what `LoraBank.read` made of one elsewhere meanwhile. Raises AdapterError."""
        if name in self.versions():
            raise AdapterError(
                f"a version named {name!r} is already loaded: versions never change, use a new name"
            )
        self.model.lora.put(name, adapter if isinstance(adapter, Adapter) else self.model.lora.read(adapter))

    def unload_version(self, name: str) -> None:
        """Forget a version. Raises VersionInUse while a reply is pinned to it, UnknownVersion when there is none."""
        if name == BASE or name not in self.versions():
            raise UnknownVersion(
                f"no adapter version {name!r} is loaded: there are {', '.join(self.versions())}"
            )
        if name in self.scheduler.versions():
            raise VersionInUse(f"version {name!r} is still writing replies")
        self.model.lora.delete(name)
        self._mixtures.clear()
        self.forget(name)

    @torch.inference_mode()
    def spoken(self, version: str, prompt_ids: list[int]) -> dict[str, Any]:
        """What `probe` says, of every token, by the passes that write replies: a prompt read into a cache, then a step."""
        device, (*before, last) = self.model.device, prompt_ids
        cache, mixture = self.model.new_cache(1, len(prompt_ids)), self.model.lora.mixture((version,)) if version != BASE else None
        if mixture is not None:
            mixture.choose([0])
        if before:
            self.model(onto(device, [before], torch.long), adapter=mixture, cache=Prompt(cache, 0, 0, len(before)))
        hidden = self.model(onto(device, [[last]], torch.long), adapter=mixture, cache=Rows(cache, [len(before)], first=0))[:, -1]
        return likeliest(prompt_ids, self.model.next_logits(hidden)[0], self.model.vocab_size)

    def forget(self, version: str | None = None) -> None:
        """Drop what is kept for reuse: all of it (somebody erased words), or what one version made."""
        if self._prefixes is not None:
            self._prefixes.forget(version)
            self._count()

    def generate(
        self, prompts: list[list[int]], params: list[SamplingParams], version: str = BASE
    ) -> list[Sequence]:
        """Replies to many prompts (one each), in order. For rollouts: on an engine of one's own, without a queue bound.

        Consecutive equal prompts share one prefill. Raises as `add` does.
        """
        for prompt, p in zip(prompts, params, strict=True):
            self._check(prompt, [p], [version])
        sequences: list[Sequence] = []
        pairs = zip(prompts, params, strict=True)
        for prompt, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
            replies = [p for _, p in group]
            sequences += self._queue(prompt, replies, [version] * len(replies))
        while self.has_work():
            self.step()
        return sequences

    def _queue(
        self, prompt_ids: list[int], params: list[SamplingParams], versions: list[str], owner: str = ""
    ) -> list[Sequence]:
        sequences = [
            Sequence(next(self._ids), prompt_ids, p, version, owner, streaming=StreamingText(self.tokenizer, p.stop))
            for p, version in zip(params, versions, strict=True)
        ]
        for version in dict.fromkeys(versions):
            mine = [s for s in sequences if s.version == version]
            for at in range(0, len(mine), self.scheduler.max_sequences):
                self.scheduler.add(
                    PromptRead(prompt_ids, version, mine[at : at + self.scheduler.max_sequences], owner)
                )
        self._count()
        return sequences

    def _check(self, prompt_ids: list[int], params: list[SamplingParams], versions: list[str]) -> None:
        for version in versions:
            if version not in self.versions():
                raise UnknownVersion(
                    f"no version {version!r} is loaded: there are {', '.join(self.versions())}"
                )
        if not prompt_ids or not params:
            raise ValueError("a prompt needs at least one token, and at least one reply to be asked for")
        if not 0 <= min(prompt_ids) <= max(prompt_ids) < self.model.vocab_size:
            raise ValueError(
                f"token ids must be between 0 and {self.model.vocab_size - 1}: is this the model's tokenizer?"
            )
        longest = max(p.max_tokens for p in params)
        if len(prompt_ids) + longest > self.max_context:
            raise PromptTooLong(
                f"the prompt has {len(prompt_ids)} tokens and {longest} more were asked for, together over the limit "
                f"of {self.max_context}: shorten the conversation or lower max_tokens"
            )

    def _decode(self) -> list[Tensor]:
        """Feed every running sequence its newest token, where steps are not replayed: [(n, D)]."""
        running = self.scheduler.running
        if not running or self._replay is not None:
            return []
        ids = onto(self.model.device, [[s.token_ids[-1]] for s in running], torch.long)
        rows = Rows(self._cache, [s.cached for s in running], first=1)
        adapter = self._adapter([s.version for s in running])
        return [self.model(ids, adapter=adapter, cache=rows)[:, -1]]

    def _replayed(self) -> dict[Sequence, tuple[int, float]]:
        """Where steps are replayed: every running sequence's next token and its log-probability.

        The step after this one is started before this one's tokens are read, which it finds on the GPU. For a reply that turns out
        to be over that was for nothing, which costs less than a GPU that waits for Python.
        """
        running, flying = list(self.scheduler.running), self._flying
        self._flying = None
        if self._replay is None or not running:
            return {}
        sequences, flight = flying or self._start(running)
        drawn = all(s.params.top_p == 1 for s in sequences)
        if drawn and sequences == running and not self.scheduler.queued:
            self._flying = self._start(running, ahead=1)
        tokens, logprobs = flight.read() if drawn else self._sample(flight.logits, sequences)
        return {s: (t, p) for s, t, p in zip(sequences, tokens, logprobs, strict=True) if not s.finished}

    def _start(self, sequences: list[Sequence], ahead: int = 0) -> tuple[list[Sequence], Flight]:
        """Start a replayed step. ahead: 1 where each one's newest token is not known here yet."""
        assert self._replay is not None
        adapters, mixture = self._mixture([s.version for s in sequences])
        fed = [
            Fed(SAID if ahead else s.token_ids[-1], s.cached + ahead, i, s.params.temperature, uniform(s.params.seed, len(s.token_ids) + ahead))
            for s, i in zip(sequences, adapters, strict=True)
        ]
        return sequences, self._replay(fed, mixture)

    def _prefill(self) -> list[Tensor]:
        """Read waiting prompts, up to a budget of tokens; where one is done, its sequences join: [(K, D), ...]."""
        hidden: list[Tensor] = []
        budget = PREFILL_TOKENS if self._replay is None else GPU_PREFILL_TOKENS
        while budget > 0 and (read := self._next_read()):
            if self._replay is not None and not read.done and read.left <= budget:
                budget -= self._prefill_pack(budget, hidden)
                continue
            count = min(read.left, budget)
            ids = onto(self.model.device, [read.prompt_ids[read.done : read.done + count]], torch.long)
            adapter = self._adapter([read.version])
            span = Prompt(self._cache, 0, read.done, count)
            last = self.model(ids, adapter=adapter, cache=span)[:, -1]  # (1, D)
            read.done += count
            budget -= count
            self.stats.prefill_tokens += count
            if not read.left:
                self._keep(read, read.prompt_ids, 0)
                for row in self.scheduler.join(read):
                    self._cache.reserve(row + 2, 0)
                    self._cache.copy(0, row + 1, len(read.prompt_ids))
                hidden.append(last.expand(len(read.sequences), -1))
        return hidden

    def _next_read(self) -> PromptRead | None:
        """The prompt to read on, from where it is not known from before."""
        read = self.scheduler.next_read()
        if read and not read.done and self._prefixes is not None:
            read.done = self._prefixes.restore((read.version, read.owner), read.prompt_ids, self._cache, 0)
            self.stats.reused_tokens += read.done
        return read

    def _prefill_pack(self, budget: int, hidden: list[Tensor]) -> int:
        """Read the next prompts of one version together, as far as they fit the budget whole: a GPU reads a few no faster than many."""
        pack: list[tuple[PromptRead, range]] = []
        count = 0
        while (read := self._next_read()) and not read.done and count + read.left <= budget:
            if pack and pack[0][0].version != read.version:
                break
            pack.append((read, self.scheduler.join(read)))
            count += read.left
        reads, rows = [read for read, _ in pack], [row for _, row in pack]
        self._cache.reserve(rows[-1][-1] + 2, 0)
        ids = onto(self.model.device, [[i for read in reads for i in read.prompt_ids]], torch.long)
        span = Pack(self._cache, [row[0] + 1 for row in rows], [read.left for read in reads])
        states = self.model(ids, adapter=self._adapter([reads[0].version]), cache=span)[0]  # (T, D)
        end = 0
        for read, (first, *others) in zip(reads, rows, strict=True):
            end += read.left
            read.done = read.left
            self._keep(read, read.prompt_ids, first + 1)
            for row in others:
                self._cache.copy(first + 1, row + 1, read.done)
            hidden.append(states[end - 1].expand(1 + len(others), -1))
        self.stats.prefill_tokens += count
        return count

    def _keep(self, whose: Sequence | PromptRead, ids: list[int], row: int) -> None:
        """Remember `ids`, whose keys and values are in `row`, for what may follow them."""
        if self._prefixes is not None:
            self._prefixes.keep((whose.version, whose.owner), ids, self._cache, row)

    def _adapter(self, versions: list[str]) -> Mixture | None:
        """The adapters of a batch whose row i is by versions[i]."""
        rows, mixture = self._mixture(versions)
        if mixture is not None:
            mixture.choose(rows)
        return mixture

    def _mixture(self, versions: list[str]) -> tuple[list[int], Mixture | None]:
        """For a batch whose row i is by versions[i]: each one's adapter in a mixture, -1 for the base, and the mixture.

        Only versions that are running are stacked. What was stacked before may be wanted again soon, and a few mixtures are kept.
        """
        names = tuple(sorted(self.scheduler.active_versions() - {BASE}))
        if self._revision != self.model.lora.revision:
            self._revision = self.model.lora.revision
            self._mixtures.clear()
        mixture = self._mixtures.pop(names, None) or (self.model.lora.mixture(names) if names else None)
        if mixture is not None:
            if mixture.stale:
                mixture.renew()
            self._mixtures[names] = mixture
            if len(self._mixtures) > MIXTURES:
                del self._mixtures[next(iter(self._mixtures))]
        return [names.index(v) if v != BASE else -1 for v in versions], mixture

    def _sample(self, logits: Tensor, sequences: list[Sequence] | None = None) -> tuple[list[int], list[float]]:
        """The next token of these sequences, or of the last that run."""
        running = self.scheduler.running[-len(logits) :] if sequences is None else sequences
        return sample(
            logits,
            [s.params.temperature for s in running],
            [s.params.top_p for s in running],
            [uniform(s.params.seed, len(s.token_ids)) for s in running],
        )

    def _extend(self, s: Sequence, token: int, logprob: float) -> Delta:
        """Append one token and decide whether the sequence ends with it."""
        if not math.isfinite(logprob):  # this version's arithmetic broke down: only its own replies end
            self._cache.clear(self.scheduler.running.index(s) + 1)
            s.finish_reason = "cancelled"
            return Delta(s, "", True)
        s.token_ids.append(token)
        s.logprobs.append(logprob)
        assert s.streaming is not None
        if token in self._eos and not s.params.ignore_eos:
            s.finish_reason = "stop"
            text = s.streaming.flush()
        else:
            text = s.streaming.push(token)
            if s.streaming.stopped:
                s.finish_reason = "stop"
            elif len(s.token_ids) == s.params.max_tokens:
                s.finish_reason = "length"
                text += s.streaming.flush()
                if s.streaming.stopped:  # the last characters were held back, and completed a stop string
                    s.finish_reason = "stop"
        s.text += text
        return Delta(s, text, s.finished)

    def _leave(self, gone: Iterable[Sequence]) -> None:
        for sequence, src, dst in self.scheduler.remove(gone):
            self._cache.copy(src + 1, dst + 1, sequence.cached + (self._flying is not None))  # a step under way has added one
        self._count()

    def _count(self) -> None:
        self.stats.running, self.stats.queued = len(self.scheduler.running), self.scheduler.queued
        if not self.has_work():
            self._flying = None
            for mixture in self._mixtures.values():
                mixture.rest()
            if self._replay is None:  # what is recorded would have to be recorded anew
                self._cache.shrink(IDLE_BYTES)
        self.stats.kv_bytes = self._cache.bytes
        self.stats.kept_bytes = self._prefixes.bytes if self._prefixes is not None else 0


@torch.inference_mode()
def probe(model: CausalModel, adapter: str | None, prompt_ids: list[int], top: int = 32) -> dict[str, Any]:
    """What a version says next after `prompt_ids`: the `top` likeliest tokens and their log-probabilities (nats).

    Published with an adapter and compared after loading it: the proof that what is served is what was made.
    """
    hidden = model(torch.tensor([prompt_ids], device=model.device), adapter=adapter)[:, -1]
    return likeliest(prompt_ids, model.logits(hidden)[0], min(top, model.vocab_size))


def likeliest(prompt_ids: list[int], logits: Tensor, top: int) -> dict[str, Any]:
    """A probe's answer: the `top` likeliest tokens by `logits` (V,), and their log-probabilities."""
    logprobs, ids = logits.log_softmax(-1).topk(top)
    return {"prompt_ids": list(prompt_ids), "top_ids": ids.tolist(), "top_logprobs": logprobs.tolist()}
