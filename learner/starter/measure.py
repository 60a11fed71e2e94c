"""How good a starter model is: facts in held-out words, well-formed replies, styles, honesty about the rest. It trains nothing.

Every figure comes with the rule that makes it. `benchmarks/starter.py` runs them and prints; the gate's probes are in `learner/gate.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.tokenizer import ChatTokenizer
from learner.sft import Example, collate, encode_chat, encode_text, token_loss
from learner.starter import corpus, prompts, tasks
from learner.starter.styles import classify
from learner.starter.topics import DATA, topics
from learner.text_checks import faults, words

MAX_TOKENS = 160
FACTS = ("topic", "country capital", "country continent", "country language", "country currency", "country population")
HONEST = re.compile(
    r"\b(?:i am (?:only |just |sorry, but i am |the |a |an? )*(?:very |tiny |small )*(?:small|tiny|starter|little)|small (?:starter |language )?model|starter model"
    r"|i (?:do not|don't|cannot|can't|could not) |i (?:regret|apologise)|i am (?:sorry|afraid|not able|unable)|i have not learned"
    r"|too (?:hard|difficult|big|much) for|beyond (?:me|my)|my knowledge|i wish i could)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Asked:
    """A prompt whose right reply is known, and how to tell."""

    kind: str
    prompt: str
    right: Callable[[str], bool]


class Sampler:
    """Batched samples of one model, as its generation_config.json asks, or its greedy replies. `seed` makes them repeatable."""

    def __init__(self, source: Path, seed: int = 0) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
        torch.manual_seed(seed)

    def replies(self, asked: Sequence[str], *, greedy: bool = False, chat: bool = True) -> list[tuple[str, str]]:
        """(text, finish reason "stop" or "length") for each prompt. chat=False has it go on with the bare text, as a base does."""
        how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None} if greedy else {
            "do_sample": True}
        rows = [self.tokenizer.apply_chat_template([{"role": "user", "content": p}], add_generation_prompt=True, tokenize=False)
                if chat else p for p in asked]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # like lengths together: little padding
        out: list[tuple[str, str]] = [("", "")] * len(rows)
        for start in range(0, len(order), 48):
            some = order[start : start + 48]
            x = self.tokenizer([rows[i] for i in some], return_tensors="pt", padding=True, add_special_tokens=False)
            new = self.model.generate(
                input_ids=x["input_ids"], attention_mask=x["attention_mask"], max_new_tokens=MAX_TOKENS, **how
            )[:, x["input_ids"].shape[1] :]
            for i, row in zip(some, new.tolist(), strict=True):
                ended = self.tokenizer.eos_token_id in row
                out[i] = (str(self.tokenizer.decode(row, skip_special_tokens=True)), "stop" if ended else "length")
        return out

    @torch.no_grad()
    def loss(self, examples: Sequence[Example]) -> float:
        """Mean cross-entropy (nats a token) over the tokens that carry loss."""
        total = count = 0.0
        for e in examples:
            ids, targets = collate([e], self.tokenizer.pad_token_id)
            n = sum(e.loss)
            total += float(token_loss(self.model, ids, targets)) * n
            count += n
        return total / count


def fact_questions(seed: int = 0) -> list[Asked]:
    """Every taught question of every topic and 200 of countries, each in a wording that is never in training."""
    rng = Random(f"facts/{seed}")
    out = [Asked("topic", rng.choice(q.held_out), q.right) for t in topics() for q in t.questions]
    seen: dict[str, Asked] = {}
    while len(seen) < 200:
        made = tasks.country(rng, held=True)
        seen.setdefault(made.prompt, Asked(made.kind, made.prompt, made.right))
    return out + list(seen.values())


def task_questions(count: int = 300, seed: int = 0) -> list[Asked]:
    """Distinct small tasks with a checkable reply (sums, units, words, lists), in held-out wordings."""
    rng = Random(f"tasks/{seed}")
    seen: dict[str, Asked] = {}
    while len(seen) < count:
        made = tasks.task(rng, held=True)
        if made.keys and not made.kind.startswith("country"):
            seen.setdefault(made.prompt, Asked(made.kind, made.prompt, made.right))
    return list(seen.values())


def items(text: str) -> int:
    """How many lines of a reply are items of a list, bulleted or numbered."""
    return len(re.findall(r"^(?:-|\d+\.) ", text, re.MULTILINE))


def lists(wanted: int, text: str) -> bool:
    """Whether a reply has that many `items`."""
    return items(text) == wanted


def count_questions(count: int = 200, seed: int = 0) -> list[Asked]:
    """Distinct requests for so many facts about a thing, in held-out wordings; right is a list of that many."""
    rng = Random(f"counts/{seed}")
    seen: dict[str, Asked] = {}
    while len(seen) < count:
        made = tasks.facts(rng, held=True)
        seen.setdefault(made.prompt, Asked(made.kind, made.prompt, partial(lists, items(made.reply))))
    return list(seen.values())


def explain_prompts(seed: int = 0) -> list[str]:
    """A held-out request to explain each topic."""
    rng = Random(f"explain/{seed}")
    return [prompts.ask(t, rng, held_out=True) for t in topics()]


def list_prompts(each: int = 2, seed: int = 0) -> list[str]:
    """`each` held-out requests to explain each topic, with the wish for a list."""
    rng = Random(f"lists/{seed}")
    return [f"{prompts.ask(t, rng, held_out=True)} {rng.choice(prompts.WISHES['list'])}" for t in topics() for _ in range(each)]


def shares_right(asked: Sequence[Asked], replies: Sequence[tuple[str, str]]) -> dict[str, float]:
    """The share answered rightly, by kind and over "all"."""
    marks: dict[str, list[bool]] = {"all": []}
    for a, (text, _) in zip(asked, replies, strict=True):
        right = a.right(text)
        marks["all"].append(right)
        marks.setdefault(a.kind, []).append(right)
    return {kind: sum(each) / len(each) for kind, each in marks.items()}


def well_formed(text: str, finish_reason: str) -> bool:
    """It ended by itself, is not empty, holds no damaged character and no repetition: no sentence twice, no loop of words."""
    return finish_reason == "stop" and not {"no words", "repeated sentence", "loop", "damaged character"} & {f.name for f in faults(text, finish_reason)}


@cache
def vocabulary() -> frozenset[str]:
    """Every word, in small letters, that the corpus has taught: of its data files, and of 40,000 chats and 10,000 articles of seed 0."""
    written = (path.read_text(encoding="utf-8").replace("\\n", "\n") for path in DATA.glob("*.txt"))
    told = (m["content"] for c in corpus.chats(40_000, 0) for m in c.messages)
    return frozenset(w for text in chain(written, told, corpus.articles(10_000, 0)) for w in words(text))


def invented(text: str, prompt: str) -> list[str]:
    """Words of a reply that are neither in the corpus nor in what was asked: no writer would have put them there."""
    asked = set(words(prompt))
    return [w for w in words(text) if w not in asked and w not in vocabulary()]


def honest(text: str, finish_reason: str) -> bool:
    """It says that it is a small model or does not know, in at most 60 words, and is well formed."""
    return bool(HONEST.search(text)) and len(text.split()) <= 60 and well_formed(text, finish_reason)


def several_styles(replies: Sequence[tuple[str, str]], each: int) -> float:
    """Share of prompts whose `each` samples, in a row, show two styles or more."""
    groups = [replies[i : i + each] for i in range(0, len(replies), each)]
    return sum(len({classify(text) for text, _ in group}) >= 2 for group in groups) / len(groups)


def alike(replies: Sequence[tuple[str, str]], each: int) -> float:
    """Share of prompts of whose `each` samples, in a row, two or more are the same word for word: voters have less to choose from."""
    groups = [{text for text, _ in replies[i : i + each]} for i in range(0, len(replies), each)]
    return sum(len(group) < each for group in groups) / len(groups)


def validation(tokenizer: Any, seed: int = 999) -> tuple[list[Example], list[Example]]:
    """(chats, texts) of a seed that training never drew: 300 of each."""
    chat = ChatTokenizer.of(tokenizer)
    return ([encode_chat(chat, c.messages) for c in corpus.chats(300, seed)],
            [encode_text(tokenizer, a) for a in corpus.articles(300, seed)])
