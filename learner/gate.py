"""The gate: is a candidate better than the live version and no riskier? Every check with its figure, limit and reason.

Both answer prompts that PPO never saw. Held-out reward members, which PPO never optimised, say who wins; the rest guards
what a reward model does not see: distance from the reference, length, repetition, broken text, refusals, known facts.
One failed check rejects. Owns measuring and judging; does not train, publish, or decide what a rejected version is for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.engine import BASE, Engine
from engine.model import CausalModel
from engine.tokenizer import ChatTokenizer
from learner import rollout
from learner.config import GateConfig, served
from learner.metrics import student
from learner.packing import PackedRows
from learner.reward import RewardModel
from learner.rollout import Trajectories
from learner.text_checks import broken_rate, distinct_n, refusal_rate, repetition

PROBES = Path(__file__).parent / "starter" / "probe.jsonl"
NORMAL = NormalDist()
OTHERS = 3  # wrong answers that a probe's right one is set against
PROBES_AT_ONCE = 32  # with all their answers, a row each
LOOKS = (2.962, 2.094, 1.710)  # deviations from even odds that decide after a third of the prompts, two thirds, all: one error in 20 over all looks
Progress = Callable[[float, str], None]


class GateError(Exception):
    """The gate could not be run; the message says why. Nothing has been judged."""


@dataclass(frozen=True)
class Check:
    """One condition: what was measured, what it is held to, and in words why it matters or what it saw."""

    name: str
    value: float | None  # None: not a finite number
    limit: float
    passed: bool
    why: str


@dataclass(frozen=True)
class Verdict:
    """All checks. `verdict` is "pass" when none failed, else "rejected"."""

    checks: tuple[Check, ...]
    figures: dict[str, Any]  # what was measured beside the checks, intervals among them

    @property
    def failed(self) -> list[str]:
        """Names of the checks that failed."""
        return [check.name for check in self.checks if not check.passed]

    @property
    def verdict(self) -> str:
        return "rejected" if self.failed else "pass"

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON: verdict, failed, checks and every figure by its name."""
        return {"verdict": self.verdict, "failed": self.failed, "checks": [asdict(c) for c in self.checks], **self.figures}


@dataclass(frozen=True)
class Replies:
    """What one version answered; replies to one prompt are consecutive, `group` of them."""

    texts: list[str]
    finish_reasons: list[str]
    lengths: list[int]  # tokens
    group: int
    scores: Tensor | None = None  # (B, members) of the held-out reward members, raw

    @classmethod
    def of(cls, batch: Trajectories, scores: Tensor | None) -> Replies:
        """What was sampled, and what the held-out members gave for it."""
        return cls(batch.texts, batch.finish_reasons, batch.lengths.tolist(), batch.group, scores)

    def __add__(self, more: Replies) -> Replies:
        """Both, the answers to `more`'s prompts behind these; scores where both have them."""
        scores = None if self.scores is None or more.scores is None else torch.cat([self.scores, more.scores])
        return Replies(self.texts + more.texts, self.finish_reasons + more.finish_reasons, self.lengths + more.lengths, self.group, scores)

    @property
    def broken(self) -> float:
        """Share with a fault of `learner/text_checks.py`."""
        return broken_rate(zip(self.texts, self.finish_reasons, strict=True))

    @property
    def length(self) -> float:
        """Mean tokens."""
        return sum(self.lengths) / len(self.lengths)


Answers = dict[tuple[str | None, int], Replies]  # of a version (None: the base) to one look's prompts


@dataclass(frozen=True)
class Probe:
    """How well known answers are held: loss in nats a token, and the share whose right answer beats three wrong ones."""

    loss: float
    accuracy: float


def run_gate(
    model: CausalModel,
    tokenizer: ChatTokenizer,
    judges: RewardModel | None,
    *,
    prompts: Sequence[Sequence[int]],
    candidate: str,
    live: str | None,
    reference: str | None,
    config: GateConfig,
    seed: int = 0,
    probes: Sequence[dict[str, str]] | None = None,
    facts: Probe | None = None,
    answers: Answers | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure adapter `candidate` against `live` and `reference` (adapters; None for the base) and judge it.

    prompts: token ids that PPO did not practise on. judges: reward members that it did not optimise; None leaves out the
    win rate and nothing else (instruction finetuning was not made to win by them). probes: known answers
    `{"prompt", "answer"}`; the bundled ones when None. facts: what the reference made of them before, if it was asked. answers: what
    `live` and `reference` said beside another candidate, asked the same prompts with this seed and config; what they say now is left
    there. Returns `Verdict.to_dict()`. Raises GateError.
    """
    show, config = progress or (lambda fraction, words: None), served(config, model.sampling)
    answers = {} if answers is None else answers
    weights = model.lora.parameters(candidate)
    if bad := [name for name, p in weights.items() if not bool(p.isfinite().all())]:
        return Verdict((finite_check(len(bad)),), {}).to_dict()  # nothing else can be asked of it
    fitting = [list(p) for p in prompts if len(p) + config.max_new_tokens <= model.max_context][: config.prompts]
    if not fitting:
        raise GateError("no held-out prompt leaves room for a reply: lower gate.max_new_tokens or use shorter prompts")

    # 1. Both versions, and the reference, answer a third of the prompts; and another, and the last, where that leaves open who wins.
    room = max(map(len, fitting)) + config.max_new_tokens
    engine = Engine(model, tokenizer, max_sequences=min(48, len(fitting) * config.replies_per_prompt), max_context=room)
    said: dict[str | None, Replies] = {}
    distance = torch.zeros(0)
    parts = [part for part in (fitting[i :: len(LOOKS)] for i in range(len(LOOKS))) if part] if judges else [fitting]
    for look, part in enumerate(parts):
        for version in dict.fromkeys((candidate, live, reference)):
            more = None if version == candidate else answers.get((version, look))
            if more is None:
                show(look / len(parts), f"answering held-out prompts, {len(part)} of {len(fitting)}")
                try:
                    batch = rollout.sample(
                        engine, part, version=version or BASE, group=config.replies_per_prompt, max_tokens=config.max_new_tokens,
                        temperature=config.temperature, top_p=config.top_p, seed=seed * 1_000_003 + 7 + look * len(fitting) * config.replies_per_prompt,
                    )  # fmt: skip
                except FloatingPointError:
                    return Verdict((finite_check(1),), {}).to_dict()
                scores = judges.score(batch.prompts, batch.completions) if judges and version in (candidate, live) else None
                more = Replies.of(batch, scores)
                if version == candidate:
                    distance = torch.cat([distance, reply_kl(model, batch, candidate, reference, config.temperature)])
                else:
                    answers[version, look] = more
            said[version] = said[version] + more if look else more
        deviations = LOOKS[-1] if part is parts[-1] else LOOKS[look]
        won = win_rate(said[candidate], said[live], deviations)
        if won and (won[1] > config.min_win_rate or won[2] <= config.min_win_rate):
            break

    # 2. The known answers.
    show(0.85, "asking for known facts")
    known = load_probes() if probes is None else list(probes)
    held = theirs = None
    if len(known) > OTHERS:
        held = probe_answers(model, tokenizer, known, candidate)
        theirs = facts or probe_answers(model, tokenizer, known, reference)

    # 3. The verdict.
    return judge(said[candidate], said[live], said[reference], distance, config, held, theirs, deviations).to_dict()


def win_rate(candidate: Replies, live: Replies, deviations: float) -> tuple[float, float, float] | None:
    """Share of picks that the held-out members expect to go to the candidate, and its interval of so many deviations either way; None where
    nobody scored the replies.

    `LOOKS` are O'Brien & Fleming's (1979) for three looks and 5% one-sided: early on only what is plain counts, and hardly anything is lost at the end.
    """
    if candidate.scores is None or live.scores is None:
        return None
    return mean_interval(preferred(candidate.scores, live.scores, candidate.group), 2 * NORMAL.cdf(deviations) - 1)


def judge(
    candidate: Replies, live: Replies, reference: Replies, kl: Tensor, config: GateConfig,
    candidate_probe: Probe | None = None, reference_probe: Probe | None = None, deviations: float = LOOKS[-1],
) -> Verdict:  # fmt: skip
    """The checks, from what was measured. kl: (B,) nats of each of the candidate's replies against the reference. deviations: of the win
    rate's interval. Where nobody scored the replies there is no win rate to check.
    """
    won = win_rate(candidate, live, deviations)
    mean_kl = float(kl.mean())
    ratio = candidate.length / live.length
    theirs = distinct_n(reference.texts, 2)
    distinct = distinct_n(candidate.texts, 2) / theirs if theirs else 1.0  # where the reference says single words, there is nothing to lose
    rises = {
        "broken": candidate.broken - reference.broken,
        "refusals": refusal_rate(candidate.texts) - refusal_rate(live.texts),
        "repetition": repetition(candidate.texts) - repetition(reference.texts),
    }
    numbers = [mean_kl, ratio, distinct, *rises.values()] + ([won[0]] if won else [])
    if candidate_probe is not None:
        numbers += [candidate_probe.loss, candidate_probe.accuracy]
    checks = [
        finite_check(sum(not math.isfinite(x) for x in numbers)),
        *([] if won is None else [Check(
            "win_rate", finite(won[1]), config.min_win_rate, won[1] > config.min_win_rate,
            f"held-out reward members expect {won[0]:.0%} of picks to go to it rather than to the live version; the check is on the lower "
            f"{NORMAL.cdf(deviations):.1%} bound",
        )]),
        Check("kl", finite(mean_kl), config.max_kl, mean_kl <= config.max_kl, "nats a reply away from the reference"),
        Check(
            "length", finite(ratio), config.max_length_ratio, 1 / config.max_length_ratio <= ratio <= config.max_length_ratio,
            f"{candidate.length:.0f} tokens a reply, the live version {live.length:.0f}; the limit holds either way",
        ),
        Check(
            "broken", finite(rises["broken"]), config.max_broken_rise, rises["broken"] <= config.max_broken_rise,
            f"{candidate.broken:.0%} of its replies are broken, of the reference's {reference.broken:.0%}",
        ),
        Check(
            "repetition", finite(rises["repetition"]), config.max_repetition_rise, rises["repetition"] <= config.max_repetition_rise,
            "share of 4-word runs that repeat within a reply, above the reference's",
        ),
        Check(
            "distinct2", finite(distinct), config.min_distinct2_ratio, distinct >= config.min_distinct2_ratio,
            "different word pairs over all its replies, against the reference's: a collapsed policy says the same to all",
        ),
        Check(
            "refusals", finite(rises["refusals"]), config.max_refusal_rise, rises["refusals"] <= config.max_refusal_rise,
            "share of replies that decline or do not know, above the live version's",
        ),
    ]  # fmt: skip
    figures: dict[str, Any] = {
        "win_rate": won and won[0], "win_rate_interval": won and [won[1], won[2]], "kl": mean_kl,
        "prompts": len(candidate.texts) // candidate.group, "replies": len(candidate.texts),
        "length": candidate.length, "live_length": live.length, "broken": candidate.broken, "live_broken": live.broken,
        "reference_broken": reference.broken, "distinct2": distinct_n(candidate.texts, 2), "refusals": refusal_rate(candidate.texts),
    }  # fmt: skip
    if candidate_probe is not None and reference_probe is not None:
        rise = candidate_probe.loss - reference_probe.loss
        fall = reference_probe.accuracy - candidate_probe.accuracy
        checks += [
            Check(
                "probe_loss", finite(rise), config.max_probe_loss_rise, rise <= config.max_probe_loss_rise,
                f"nats a token on known answers, above the reference's {reference_probe.loss:.2f}",
            ),
            Check(
                "probe_accuracy", finite(fall), config.max_probe_accuracy_fall, fall <= config.max_probe_accuracy_fall,
                f"it tells the known answer from {OTHERS} wrong ones in {candidate_probe.accuracy:.0%}, the reference in "
                f"{reference_probe.accuracy:.0%}",
            ),
        ]  # fmt: skip
        figures |= {"probe": asdict(candidate_probe), "reference_probe": asdict(reference_probe)}
    return Verdict(tuple(checks), figures)


def finite_check(bad: int) -> Check:
    """All numbers of the candidate are finite; `bad` are not."""
    return Check("finite", float(bad), 0.0, bad == 0, "weights or figures that are NaN or infinite")


def finite(x: float) -> float | None:
    """x for JSON: None when it is NaN or infinite."""
    return x if math.isfinite(x) else None


def win_shares(ours: Tensor, theirs: Tensor, group: int) -> Tensor:
    """(B, members) scores of both -> (prompts,): share of pairs of replies to one prompt, over members, that ours wins.

    Ties count half. NaN never wins.
    """
    a = ours.view(-1, group, 1, ours.shape[1])
    b = theirs.view(-1, 1, group, theirs.shape[1])
    return ((a > b).float() + 0.5 * (a == b).float()).mean((1, 2, 3))


def preferred(ours: Tensor, theirs: Tensor, group: int) -> Tensor:
    """(B, members) scores of both -> (prompts,): mean sigma(ours - theirs) over pairs of replies to one prompt and over members.

    The share of picks that Bradley & Terry (1952) expect to go to ours. A pair that is all but a tie says next to nothing here,
    where `win_shares` takes it for a whole win: of two versions that differ in few replies this is surer with the same replies.
    """
    a = ours.view(-1, group, 1, ours.shape[1])
    b = theirs.view(-1, 1, group, theirs.shape[1])
    return (a - b).sigmoid().mean((1, 2, 3))


def mean_interval(x: Tensor, confidence: float = 0.9) -> tuple[float, float, float]:
    """Mean of independent x and its two-sided t interval; 90% two-sided is 95% each side.

    A share cannot leave [0, 1]. With all x equal the spread says nothing, so the interval is at least that of one
    more x at the far end (the rule of adding a pseudo-observation, Agresti & Coull 1998).
    """
    n = len(x)
    mean = float(x.mean())
    if n < 2:
        return mean, 0.0, 1.0
    seen = torch.cat([x, x.new_tensor([1.0 - round(mean)])]) if float(x.std()) == 0 else x
    half = student((1 + confidence) / 2, len(seen) - 1) * float(seen.std()) / math.sqrt(len(seen))
    return mean, max(0.0, mean - half), min(1.0, mean + half)


def reply_kl(model: CausalModel, batch: Trajectories, adapter: str, reference: str | None, temperature: float) -> Tensor:
    """(B,) nats of each reply sampled from `adapter`, by `rollout.reply_divergence`; the mean estimates KL(adapter, reference)."""
    total = torch.zeros(len(batch))
    for rows in rollout.passes(model, batch, range(len(batch))):
        total[rows.cpu()] = rollout.reply_divergence(model, batch, rows, adapter, reference, temperature).kl.sum(1).cpu()
    return total


def probe_answers(model: CausalModel, tokenizer: ChatTokenizer, probes: Sequence[dict[str, str]], adapter: str | None) -> Probe:
    """Loss on the known answers, and how often the right one is the likeliest."""
    each = probe_logprobs(model, tokenizer, probes, adapter)
    return Probe(float(-each[:, 0].mean()), float(told_apart(each).mean()))


def told_apart(each: Tensor) -> Tensor:
    """`probe_logprobs` -> (n,) 1 where the right answer beats the wrong ones, else 0."""
    return (each[:, 0] > each[:, 1:].max(1).values).float()


@torch.no_grad()
def probe_logprobs(
    model: CausalModel, tokenizer: ChatTokenizer, probes: Sequence[dict[str, str]], adapter: str | None
) -> Tensor:
    """(n, 1 + OTHERS) mean nats a token of each probe's own answer and of the answers of the next OTHERS probes.

    Setting answers against each other is blind to style: a version that now prefers lists finds every plain sentence
    less likely, the right one no more than the wrong ones.
    """
    prompts = [tokenizer.render([{"role": "user", "content": p["prompt"]}]) for p in probes]
    answers = [[*tokenizer.encode(p["answer"]), tokenizer.end_id] for p in probes]
    n, mean = len(probes), torch.zeros(len(probes), 1 + OTHERS)
    groups = [(prompts[i], [answers[(i + k) % n] for k in range(1 + OTHERS)]) for i in range(n)]
    if not model.packs:
        rows = [(prompt, answer) for prompt, own in groups for answer in own]
        apart = [model.logprobs(torch.tensor([[*p, *a]], device=model.device), adapter=adapter)[0, len(p) - 1 :].mean() for p, a in rows]
        return torch.stack(apart).view(n, 1 + OTHERS).cpu()
    order = sorted(range(n), key=lambda i: sum(map(len, groups[i][1])))
    for part in (order[i : i + PROBES_AT_ONCE] for i in range(0, n, PROBES_AT_ONCE)):
        packed = PackedRows.of([groups[i] for i in part], model.pad_id, model.device)
        hidden = model(packed.ids, positions=packed.positions, valid=packed.valid, attend=packed.attend, adapter=adapter)  # (N, T, D)
        answer, column = packed.reply.nonzero(as_tuple=True)  # of every answer token: its answer, its column
        first = torch.cat([answer.new_ones(1, dtype=torch.bool), answer[1:] != answer[:-1]])
        ends = torch.tensor([len(prompts[i]) - 1 for i in part], device=model.device)
        row = packed.row[answer]
        logits = model.logits(hidden[row, torch.where(first, ends[row], column - 1)])  # the prompt's end chooses an answer's first token
        losses = F.cross_entropy(logits, packed.ids[row, column], reduction="none")
        each = torch.zeros(len(packed.row), device=model.device).index_add_(0, answer, -losses) / packed.reply.sum(1)
        mean[part] = each.view(-1, 1 + OTHERS).cpu()
    return mean


def load_probes(path: Path = PROBES) -> list[dict[str, str]]:
    """The bundled known answers; none where the file is absent. Raises GateError when it is damaged."""
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line.strip()]
        return [{"prompt": str(row["prompt"]), "answer": str(row["answer"])} for row in rows]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise GateError(f"{path.name} is not JSONL with prompt and answer: restore it ({error!r})") from error
