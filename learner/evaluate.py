"""Versions against each other on what can be counted: MMLU, generated text, known answers, and a reward model's blind choice.

Every benchmark gives each version one number an item, the same items for all; from those come the value, its 95%
interval, and the paired difference, which is far sharper than two intervals side by side. Owns asking and comparing.
Reads only. Does not read MMLU's layout (`learner/mmlu.py`), score text (`learner/rouge.py`) or judge reward models
(`learner/reward_eval.py`).
"""

from __future__ import annotations

import contextlib
import math
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch

from engine.engine import BASE, Engine, SamplingParams
from engine.model import CausalModel
from engine.tokenizer import ChatTokenizer
from learner import rollout
from learner.formats import Instruction
from learner.gate import OTHERS, load_probes, mean_interval, probe_logprobs, told_apart, win_shares
from learner.metrics import student, wilson
from learner.mmlu import Subject, letter_logprobs, prompt_ids
from learner.reward import RewardModel
from learner.rouge import best_rouge_l

Adapters = Mapping[str, str | None]  # version -> the adapter it is loaded as; None: the base
Progress = Callable[[int, int], None]
Item = TypeVar("Item")
ROWS = 32  # sequences sampled side by side


class EvaluationError(ValueError):
    """The benchmark cannot be run as asked; the message says what to change."""


@dataclass(frozen=True)
class Estimate:
    """A mean over items and its 95% interval; one item alone has none."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Figure:
    """One measure of one benchmark, for every version asked."""

    benchmark: str
    metric: str
    better: str  # higher | lower
    items: int
    values: dict[str, Estimate]
    difference: Estimate | None = None  # the first version less the second, item by item
    parts: dict[str, dict[str, float]] = field(default_factory=dict)  # e.g. by subject
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def mean_t(values: Sequence[float], reach: float | None = None) -> Estimate:
    """Mean of independent numbers with Student's two-sided 95% interval.

    reach: how far from the mean a number can lie. Where all are equal the spread says nothing, so the interval is that of
    two more, one at either end (a pseudo-observation each way, Agresti & Coull 1998).
    """
    mean = math.fsum(values) / len(values)
    if reach and min(values) == max(values):
        values = [*values, mean - reach, mean + reach]
    n = len(values)
    if n < 2:
        return Estimate(mean, None, None)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1))
    half = student(0.975, n - 1) * deviation / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half)


def bounded(values: Sequence[float]) -> Estimate:
    """The same for numbers in [0, 1], kept there, and honest where all are equal (`gate.mean_interval`)."""
    return Estimate(*mean_interval(torch.tensor(values, dtype=torch.float64), 0.95))


def right(values: Sequence[float]) -> Estimate:
    """Share of items that are right (0 or 1 each) with Wilson's 95% interval."""
    interval = wilson(math.fsum(values) / len(values), len(values))
    return Estimate(interval.value, interval.low, interval.high)


def compare(
    benchmark: str, metric: str, scores: Mapping[str, Sequence[float]], estimate: Callable[[Sequence[float]], Estimate],
    *, better: str = "higher", groups: Sequence[str] = (), notes: Sequence[str] = (),
) -> Figure:  # fmt: skip
    """The figure from one score an item and version; of two versions also their paired difference.

    groups: a label an item (a subject, a file), for the means by label.
    """
    each = [list(own) for own in scores.values()]
    reach = 1.0 if better == "higher" else None  # what is better higher is a share of something here
    difference = mean_t([a - b for a, b in zip(*each, strict=True)], reach) if len(each) == 2 else None
    parts: dict[str, dict[str, float]] = {}
    if len(set(groups)) > 1:
        for version, own in scores.items():
            sums: dict[str, list[float]] = defaultdict(list)
            for label, score in zip(groups, own, strict=True):
                sums[label].append(score)
            for label, part in sums.items():
                parts.setdefault(label, {})[version] = math.fsum(part) / len(part)
    values = {version: estimate(own) for version, own in scores.items()}
    return Figure(benchmark, metric, better, len(each[0]), values, difference, parts, tuple(notes))


def some(items: Sequence[Item], limit: int | None, seed: int) -> list[Item]:
    """At most `limit` of the items, drawn by `seed`, in their order."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[i] for i in sorted(random.Random(seed).sample(range(len(items)), limit))]


def mmlu(
    model: CausalModel, tokenizer: ChatTokenizer, adapters: Adapters, subjects: Sequence[Subject], *,
    limit: int | None = None, seed: int = 0, progress: Progress | None = None,
) -> Figure:  # fmt: skip
    """Share of questions whose right letter is the likeliest beginning of the reply (Hendrycks et al. 2021)."""
    asked = some([(subject, question) for subject in subjects for question in subject.test], limit, seed)
    prompts = [prompt_ids(tokenizer, subject, question, model.max_context) for subject, question in asked]
    scores = {}
    for at, (version, adapter) in enumerate(adapters.items()):
        show = stretch(progress, at, len(adapters))
        picked = letter_logprobs(model, tokenizer, prompts, adapter, show).argmax(1).tolist()
        scores[version] = [float(p == question.answer) for p, (_, question) in zip(picked, asked, strict=True)]
    shots = max(len(subject.dev) for subject in subjects)
    return compare("mmlu", f"accuracy, {shots}-shot", scores, right, groups=[subject.name for subject, _ in asked])


def generation(
    model: CausalModel, tokenizer: ChatTokenizer, adapters: Adapters, instructions: Sequence[Instruction], *, name: str,
    max_tokens: int = 128, limit: int | None = None, seed: int = 0, progress: Progress | None = None,
) -> Figure:  # fmt: skip
    """ROUGE-L of the likeliest reply (greedy) against the references, as Super-NaturalInstructions is scored.

    Prompts that the template refuses, or that leave no room for `max_tokens`, are left out for every version alike.
    """
    room = model.max_context - max_tokens
    chosen, prompts, left_out = [], [], 0
    for item in some(instructions, limit, seed):
        try:
            ids = tokenizer.render([dict(m) for m in item.prompt])
        except ValueError:
            ids = []
        if 0 < len(ids) <= room:
            chosen.append(item)
            prompts.append(ids)
        else:
            left_out += 1
    if not prompts:
        raise EvaluationError(f"{name}: no prompt fits the model and leaves room for {max_tokens} tokens; lower --max-tokens")
    params = [SamplingParams(temperature=0, max_tokens=max_tokens)] * len(prompts)
    engine = Engine(model, tokenizer, max_sequences=min(ROWS, len(prompts)), max_context=max(map(len, prompts)) + max_tokens)
    scores: dict[str, list[float]] = {}
    for at, (version, adapter) in enumerate(adapters.items()):
        show, scores[version] = stretch(progress, at, len(adapters)), []
        for begin in range(0, len(prompts), ROWS):
            part = slice(begin, begin + ROWS)
            replies = engine.generate(prompts[part], params[part], adapter or BASE)
            scores[version] += [best_rouge_l(r.text, item.references) for r, item in zip(replies, chosen[part], strict=True)]
            show(min(begin + ROWS, len(prompts)), len(prompts))
    notes = [f"{left_out} prompts too long or refused by the chat template"] if left_out else []
    return compare(name, "ROUGE-L", scores, bounded, notes=notes)


def known_answers(model: CausalModel, tokenizer: ChatTokenizer, adapters: Adapters, progress: Progress | None = None) -> list[Figure]:
    """The bundled probe set, the gate's own: is the right answer told from wrong ones, and how likely is it."""
    probes = load_probes()
    if len(probes) <= OTHERS:
        raise EvaluationError("the bundled known answers (learner/starter/probe.jsonl) are missing: restore the file")
    told, loss = {}, {}
    for at, (version, adapter) in enumerate(adapters.items()):
        each = probe_logprobs(model, tokenizer, probes, adapter)
        told[version], loss[version] = told_apart(each).tolist(), (-each[:, 0]).tolist()
        stretch(progress, at, len(adapters))(1, 1)
    return [
        compare("known answers", f"told from {OTHERS} wrong ones", told, right),
        compare("known answers", "nats a token", loss, mean_t, better="lower"),
    ]


def blind_win_rate(
    model: CausalModel, tokenizer: ChatTokenizer, adapters: Adapters, reward: RewardModel, prompts: Sequence[Sequence[dict[str, str]]],
    *, replies: int = 2, max_tokens: int = 96, limit: int | None = None, seed: int = 0,
    progress: Progress | None = None,
) -> Figure:  # fmt: skip
    """Share of pairs of replies to one prompt that the first version wins, over the reward model's members, ties half.

    The members see prompt and reply and nothing of where it came from. Both versions draw with the same seeds, at the model's own temperature and top-p. Prompts that the chat
    template refuses, and those without room for a reply, are left out. Raises EvaluationError when none is left.
    """
    if len(adapters) != 2:
        raise EvaluationError("a win rate needs two different versions: name one, and another with --against")
    rendered = []
    for prompt in some(prompts, limit, seed):
        with contextlib.suppress(ValueError):
            rendered.append(tokenizer.render([dict(m) for m in prompt]))
    fitting = [ids for ids in rendered if len(ids) + max_tokens <= model.max_context]
    if not fitting:
        why = f"no prompt leaves room for a reply of {max_tokens} tokens: lower --max-tokens" if rendered else "the model's chat template refuses every prompt"
        raise EvaluationError(why)
    room = max(map(len, fitting)) + max_tokens
    engine = Engine(model, tokenizer, max_sequences=min(ROWS, replies * len(fitting)), max_context=room)
    scores = []
    for at, adapter in enumerate(adapters.values()):
        show, own = stretch(progress, at, 2), []
        for begin in range(0, len(fitting), ROWS):
            part = fitting[begin : begin + ROWS]
            batch = rollout.sample(
                engine, part, version=adapter or BASE, group=replies, max_tokens=max_tokens, **model.sampling._asdict(),
                seed=seed * 1_000_003 + begin * replies,
            )  # fmt: skip
            own.append(reward.score(batch.prompts, batch.completions))
            show(min(begin + ROWS, len(fitting)), len(fitting))
        scores.append(torch.cat(own))
    ours, theirs = adapters
    wins = win_shares(scores[0], scores[1], replies).tolist()
    return compare("blind win rate", f"against {theirs}", {ours: wins}, bounded)


def stretch(progress: Progress | None, at: int, of: int) -> Progress:
    """Progress of part `at` of `of` equal ones."""

    def show(done: int, total: int) -> None:
        if progress is not None:
            progress(at * total + done, of * total)

    return show
