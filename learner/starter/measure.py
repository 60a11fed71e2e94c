"""Measures a starter model: styles, broken replies, faithfulness to its facts, honesty about the rest.

`python -m learner.starter.measure [--model DIR]` prints the figures of the model card, JSON last. It trains nothing.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from learner.starter import offtopic, prompts
from learner.starter.answers import answer, fact_answer
from learner.starter.corpus import probes, small_talk
from learner.starter.recipe import ASSISTANT
from learner.starter.styles import STYLES, classify
from learner.starter.topics import Topic, topics
from learner.text_checks import broken

MAX_TOKENS = 160


class Sampler:
    """Batched samples of one model at temperature 1, or its greedy replies. `seed` makes them repeatable."""

    def __init__(self, source: Path, seed: int = 0) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
        torch.manual_seed(seed)

    def replies(self, asked: list[str], *, greedy: bool = False) -> list[tuple[str, str]]:
        """(text, finish reason "stop" or "length") for each prompt."""
        out: list[tuple[str, str]] = []
        how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None} if greedy else {
            "do_sample": True, "temperature": 1.0, "top_k": 0}
        for start in range(0, len(asked), 32):
            rows = [self.tokenizer.apply_chat_template(
                [{"role": "user", "content": p}], add_generation_prompt=True, tokenize=False) for p in asked[start : start + 32]]
            x = self.tokenizer(rows, return_tensors="pt", padding=True, add_special_tokens=False)
            new = self.model.generate(
                input_ids=x["input_ids"], attention_mask=x["attention_mask"], max_new_tokens=MAX_TOKENS, **how
            )[:, x["input_ids"].shape[1] :]
            for row in new.tolist():
                ended = self.tokenizer.eos_token_id in row
                out.append((str(self.tokenizer.decode(row, skip_special_tokens=True)), "stop" if ended else "length"))
        return out


def split(text: str) -> list[str]:
    """A reply's sentences and bullets, without list marks."""
    lines = [re.sub(r"^(?:-|\d+\.)\s+", "", line) for line in text.splitlines()]
    return [s for line in lines for s in re.split(r"(?<=[.!?:])\s+", line) if s]


def taught(t: Topic, rounds: int = 250) -> set[str]:
    """Sentences that the teacher says about `t` in any style (nearly all of them, by sampling)."""
    rng = Random(t.key)
    said = [answer(t, style, rng) for _ in range(rounds) for style in STYLES]
    said += [fact_answer(t, q, style, rng) for _ in range(20) for q in t.questions for style in ("short", "detailed", "friendly", "formal")]
    return {s for text in said for s in split(text)}


def explain(sampler: Sampler, each: int) -> dict:
    """`each` samples of a held-out request for every topic: styles, breakage, and sentences that were taught."""
    rng = Random(5)
    asked = [(t, prompts.ask(t, rng, held_out=True)) for t in topics()]
    replies = sampler.replies([p for _, p in asked for _ in range(each)])
    styles: Counter = Counter()
    several = sound = sentences = 0
    for i, (t, _) in enumerate(asked):
        mine = [text for text, _ in replies[i * each : (i + 1) * each]]
        kinds = [classify(text) for text in mine]
        styles.update(kinds)
        several += len(set(kinds)) >= 2
        known = taught(t)
        for text in mine:
            parts = split(text)
            sentences += len(parts)
            sound += sum(s in known for s in parts)
    lengths = sorted(len(sampler.tokenizer.encode(text)) for text, _ in replies)
    return {
        "replies": len(replies),
        "broken": sum(broken(text, end) for text, end in replies) / len(replies),
        "ended": sum(end == "stop" for _, end in replies) / len(replies),
        "taught_sentences": sound / max(1, sentences),
        "styles": {s: styles[s] / len(replies) for s in STYLES},
        "prompts_with_several_styles": several / len(asked),
        "tokens_p5_p50_p95": [lengths[int(len(lengths) * q)] for q in (0.05, 0.5, 0.95)],
    }


def right(sampler: Sampler) -> float:
    """Share of probe questions whose greedy reply holds an accepted answer."""
    accepted = {q.prompt: q.answers for t in topics() for q in t.questions}
    asked = [p["prompt"] for p in probes()]
    plain = [text.rstrip("!.").lower() for text, _ in sampler.replies(asked, greedy=True)]
    return sum(any(a.rstrip(".").lower() in text for a in accepted[p]) for p, text in zip(asked, plain, strict=True)) / len(asked)


def honest(sampler: Sampler, asked: list[str]) -> dict:
    """Whether replies to what it cannot know say so: their first sentence is one of the honest ones."""
    rng = Random(6)
    known = {s for style in STYLES for _ in range(3000) for s in split(offtopic.reply(rng, style))[:1]}
    replies = sampler.replies(asked)
    return {
        "replies": len(replies),
        "honest": sum((split(text) or [""])[0] in known for text, _ in replies) / len(replies),
        "broken": sum(broken(text, end) for text, end in replies) / len(replies),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure a starter model.")
    parser.add_argument("--model", type=Path, default=ASSISTANT)
    parser.add_argument("--each", type=int, default=4, help="samples a topic")
    args = parser.parse_args(argv)
    sampler = Sampler(args.model)
    rng = Random(7)
    unknown = [offtopic.prompt(rng, held_out=True) for _ in range(96)]
    chatter = [p for block in small_talk() for p in block.held_out]
    talk = sampler.replies(chatter)
    said = {s for block in small_talk() for r in block.replies for s in split(r)}
    parts = [s for text, _ in talk for s in split(text)]
    figures = {
        "explain": explain(sampler, args.each),
        "probes_right": right(sampler),
        "off_topic": honest(sampler, unknown),
        "small_talk": {"replies": len(talk), "taught_sentences": sum(s in said for s in parts) / max(1, len(parts))},
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
