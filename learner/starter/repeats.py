"""Against saying a thing twice, and other ways to go astray: replies that do, and the loss that makes them unlikely.

A small model that does not know which fact comes next falls back on one of the topic's, now and then the one it has just told. The
likelihood of the corpus hardly minds. This is unlikelihood training (Welleck et al. 2020, "Neural Text Generation with Unlikelihood
Training") of whole sentences instead of tokens: their probability is what counts, so those that the model would never say weigh nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor

from engine.tokenizer import ChatTokenizer
from learner.sft import IGNORE, Example, batches, collate, encode_chat, token_loss
from learner.starter import corpus, prompts, tasks
from learner.starter.answers import answer
from learner.starter.topics import topics

ITEM = re.compile(r"^(?:-|(\d+)\.) (.+)$")
BETWEEN = re.compile(r"(?<=[.!?]) (?=[A-Z])")


def repeated(reply: str, rng: Random) -> tuple[str, str] | None:
    """(how a reply begins, what it has said before and says again); None for less than three sentences or two items.

    In a list the next item's mark belongs to what is said again: where nothing is left to say, it should have ended before it.
    """
    lines = reply.split("\n")
    items = [m for line in lines if (m := ITEM.match(line))]
    if len(items) >= 2:
        said = rng.randint(1, len(items))
        head = lines[: lines.index(items[said - 1].group()) + 1]
        mark = f"{int(items[said - 1][1]) + 1}." if items[0][1] else "-"
        return "\n".join(head), f"\n{mark} {rng.choice(items[:said])[2]}"
    sentences = BETWEEN.split(reply)
    if len(lines) > 1 or len(sentences) < 3:
        return None
    said = rng.randint(2, len(sentences))
    return " ".join(sentences[:said]), f" {rng.choice(sentences[:said])}"


def broken_off(reply: str, rng: Random) -> tuple[str, str] | None:
    """The same for a list that ends behind the mark of an item that never comes, which is where a model goes that may not say one again."""
    found = repeated(reply, rng)
    return (found[0], found[1].split(" ")[0]) if found and found[1].startswith("\n") else None


def late(reply: str, rng: Random) -> tuple[str, str] | None:
    """(how a list of facts begins, up to its first mark, a fact that belongs further down); None for less than three items.

    The corpus's lists begin at the topic's first fact. One that begins elsewhere runs out of facts before its last mark, and goes back.
    """
    lines = reply.split("\n")
    items = [m for line in lines if (m := ITEM.match(line))]
    if len(items) < 3:
        return None
    mark = "1." if items[0][1] else "-"
    further = items[1:] if items[0][1] else items[2:]  # bullets may begin with what the thing is, and the first fact
    return "\n".join([*lines[: lines.index(items[0].group())], mark]), f" {rng.choice(further)[2]}"


def small(reply: str, rng: Random) -> tuple[str, str] | None:
    """(how a reply begins, the next sentence's first word in small letters); None for less than two sentences, or a list.

    What is asked about stands in the prompt with a small letter ("What are spiders?"), and after "Happy to help!" it is copied as it stands there.
    """
    sentences = BETWEEN.split(reply)
    if "\n" in reply or len(sentences) < 2:
        return None
    said = rng.choice((1, rng.randint(1, len(sentences) - 1)))
    return " ".join(sentences[:said]), f" {sentences[said].split(' ')[0].lower()}"


def opened(rng: Random) -> list[dict]:
    """A chat about a thing or a person whose reply has a kind or a formal word before it."""
    t = rng.choice([t for t in topics() if not t.how])
    asked = prompts.ask_twice(t, rng) if rng.random() < 0.5 else prompts.ask(t, rng)
    return corpus.turn(asked, answer(t, rng.choice(("friendly", "formal")), rng))


def listed(rng: Random, *, steps: bool = True) -> list[dict]:
    """A chat whose reply is a list about a thing, or with `steps` now and then of how something is done."""
    if rng.random() < 0.5:
        made = tasks.facts(rng)
        return corpus.turn(made.prompt, made.reply)
    t = rng.choice([t for t in topics() if steps or not t.how])
    return corpus.turn(prompts.ask(t, rng), answer(t, "list", rng))


def examples(tokenizer: ChatTokenizer, count: int, seed: int) -> list[Example]:
    """Chats whose last reply says something again, half of them lists, where most of it happens, or (two in twelve each) breaks off, or begins a
    sentence with a small letter, or (one in twelve) begins a list where it will have to; loss on that alone.
    """
    rng, out = Random(f"repeats/{seed}"), list[Example]()
    while len(out) < count:
        wrong = rng.choices((repeated, broken_off, late, small), (7, 2, 1, 2))[0]
        off = wrong is broken_off
        if wrong is late:
            messages = listed(rng, steps=False)
        elif wrong is small:
            messages = opened(rng)
        else:
            messages = listed(rng) if rng.random() < 0.5 else list(corpus.chat(rng).messages)
        if (found := wrong(messages[-1]["content"], rng)) is None:
            continue
        begun, again = found
        start = encode_chat(tokenizer, [*messages[:-1], {"role": "assistant", "content": begun}]).ids
        span = (*tokenizer.encode(again), *(start[-1:] if off else ()))  # the end of the turn
        out.append(Example((*start[:-1], *span), (False,) * (len(start) - 1) + (True,) * len(span)))
    return out


@torch.no_grad()
def likeliest(model: Any, rows: Sequence[Example], keep: int, pad_id: int) -> list[Example]:
    """The `keep` rows whose repetition the model finds likeliest. Most it would never say, and from those there is nothing to learn."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    found = torch.cat([probability(model, [rows[i] for i in order[start : start + 32]], pad_id) for start in range(0, len(order), 32)])
    return [rows[order[i]] for i in sorted(found.topk(keep).indices.tolist())]


def probability(model: Any, rows: Sequence[Example], pad_id: int) -> Tensor:
    """(B,): how likely the model, a transformers causal LM, is to say what carries loss in each row, from its first token to its last."""
    ids, targets = collate(rows, pad_id)
    hidden = model.model(input_ids=ids.to(model.device)).last_hidden_state
    told = targets.to(model.device) != IGNORE
    at = model.lm_head(hidden[told]).float().log_softmax(-1).gather(-1, targets.to(model.device)[told][:, None])[:, 0]
    return torch.zeros(len(rows), device=model.device).index_add(0, told.nonzero()[:, 0], at).exp()


class Unlikely:
    """A loss for `learner.sft.train`: the corpus's, and `weight` times the unlikelihood -log(1 - p) of repeated sentences, in the mean."""

    def __init__(self, rows: Sequence[Example], weight: float, pad_id: int, tokens: int, seed: int) -> None:
        self.rows, self.weight, self.pad_id, self.seed = rows, weight, pad_id, seed
        self.batches = batches(rows, tokens, seed, epoch=0)

    def __call__(self, model: Any, ids: Tensor, targets: Tensor) -> Tensor:
        """As `learner.sft.token_loss`. Which rows come is drawn from what is in `ids`, so that a resumed run goes on as one without a break."""
        drawn = Random(f"{self.seed}/{ids.tolist()}").choice(self.batches)
        p = probability(model, [self.rows[i] for i in drawn], self.pad_id)
        return token_loss(model, ids, targets) - self.weight * torch.log1p(-p.clamp(max=1 - 1e-6)).mean()
