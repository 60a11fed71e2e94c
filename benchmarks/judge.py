"""The known taste as judge: a policy's replies to held-out prompts against the base's.

Owns the base's replies, which every policy is compared with, and what is said of a policy: win rate, share of what the
taste's best of 8 base replies wins, KL, broken replies, known answers. Does not train, and does not know where a policy
came from: it is a PEFT adapter in a directory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.engine import BASE, Engine, SamplingParams
from engine.model import CausalModel
from engine.sequence import Sequence as Reply
from engine.tokenizer import ChatTokenizer
from learner import rollout
from learner.gate import load_probes, probe_answers, reply_kl
from learner.metrics import clustered_accuracy
from learner.tastes import Taste, win_rate
from learner.text_checks import broken_rate

JUDGED = "judged"  # the adapter under which a policy is judged
SAMPLES, BEST_OF, MAX_TOKENS = 4, 8, 256


@dataclass(frozen=True)
class Judged:
    """What the taste says of a policy. points: (prompts,) share of its replies that are liked better than base's."""

    win_rate: float
    low: float  # of the win rate, 95%, by prompt
    high: float
    best_of_8: float
    share: float  # win rate over best_of_8
    kl: float  # nats a reply from the base
    broken: float
    base_broken: float
    length: float  # tokens a reply
    probe_accuracy: float
    base_probe_accuracy: float
    probe_loss_rise: float
    points: tuple[float, ...]

    def row(self) -> dict[str, Any]:
        """The figures, rounded, without the points."""
        return {name: round(value, 4) for name, value in asdict(self).items() if name != "points"}


class Judge:
    """One taste and one base. The model may carry other adapters meanwhile, but for one named JUDGED."""

    def __init__(self, model: CausalModel, tokenizer: ChatTokenizer, liking: Taste, held_out: Sequence[str], seed: int) -> None:
        self.model, self.tokenizer, self.liking, self.held_out, self.seed = model, tokenizer, liking, held_out, seed
        self.engine = Engine(model, tokenizer, max_sequences=48, max_context=1024)
        self.theirs = self.sample(held_out, SAMPLES, None, 1)
        best = self.sample(held_out, BEST_OF, None, 2)
        liked = [max((r.text for r in best[i : i + BEST_OF]), key=liking) for i in range(0, len(best), BEST_OF)]
        self.best_of = win_rate(liking, [text for text in liked for _ in range(SAMPLES)], [r.text for r in self.theirs])
        self.base_broken = broken_rate((r.text, r.finish_reason) for r in self.theirs)
        self.probes = load_probes()
        self.known = probe_answers(model, tokenizer, self.probes, None)

    def render(self, prompt: str) -> list[int]:
        return self.tokenizer.render([{"role": "user", "content": prompt}])

    def sample(self, prompts: Sequence[str], each: int, adapter: Path | None, stream: int) -> list[Reply]:
        """`each` replies to every prompt, as a server would give them, by the policy saved at `adapter` or the base. Other streams draw other replies."""
        ids = [self.render(p) for p in prompts for _ in range(each)]
        how = [SamplingParams(**self.model.sampling._asdict(), max_tokens=MAX_TOKENS, seed=(self.seed * 1009 + stream) * 1_000_003 + i) for i in range(len(ids))]
        version = self._load(adapter)
        try:
            return self.engine.generate(ids, how, version)
        finally:
            self._unload()

    def judge(self, adapter: Path | None) -> Judged:
        """The policy saved at `adapter` (PEFT); None is the base itself."""
        ours = self.sample(self.held_out, SAMPLES, adapter, 3)
        wins = [win_rate(self.liking, [a.text], [b.text]) for a, b in zip(ours, self.theirs, strict=True)]
        points = tuple(sum(wins[i : i + SAMPLES]) / SAMPLES for i in range(0, len(wins), SAMPLES))
        version = self._load(adapter)
        try:
            batch = rollout.sample(
                self.engine, [self.render(p) for p in self.held_out], version=version, group=2, max_tokens=MAX_TOKENS, temperature=1.0, seed=1,
            )  # fmt: skip
            name = None if version == BASE else version
            kl = 0.0 if name is None else float(reply_kl(self.model, batch, name, None, 1.0).mean())
            known = probe_answers(self.model, self.tokenizer, self.probes, name)
        finally:
            self._unload()
        won = clustered_accuracy(points, None, len(wins))
        return Judged(
            won.value, won.low, won.high, self.best_of, won.value / self.best_of, kl,
            broken_rate((r.text, r.finish_reason) for r in ours), self.base_broken, sum(len(r.token_ids) for r in ours) / len(ours),
            known.accuracy, self.known.accuracy, known.loss - self.known.loss, points,
        )  # fmt: skip

    def _load(self, adapter: Path | None) -> str:
        """The name the policy is sampled under."""
        if adapter is None:
            return BASE
        self.model.lora.load(JUDGED, adapter)
        return JUDGED

    def _unload(self) -> None:
        if JUDGED in self.model.lora.names():
            self.model.lora.delete(JUDGED)
