"""The starter model's corpus: chats and articles, a pure function of a seed. Mixes what the other modules phrase."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

from learner.starter import offtopic, prompts
from learner.starter.answers import answer, fact_answer
from learner.starter.styles import STYLES
from learner.starter.topics import Topic, topics

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Chat:
    """One training conversation. `style` is that of its last reply, or None where none was chosen."""

    messages: tuple[dict, ...]
    kind: str  # "topic", "question", "small talk", "off topic", "near topic" or "follow-up"
    style: str | None


@dataclass(frozen=True)
class SmallTalk:
    prompts: tuple[str, ...]
    held_out: tuple[str, ...]
    replies: tuple[str, ...]


@cache
def small_talk() -> tuple[SmallTalk, ...]:
    """The blocks of `smalltalk.txt`."""
    blocks = []
    for block in (HERE / "smalltalk.txt").read_text(encoding="utf-8").split("\n\n"):
        marks: dict[str, list[str]] = {">": [], "~": [], "<": []}
        for line in block.splitlines():
            mark, _, rest = line.partition(" ")
            if mark in marks:
                marks[mark] += [rest] if mark == "<" else rest.split(" / ")
        if marks["<"]:
            replies = tuple(r.replace("\\n", "\n") for r in marks["<"])
            blocks.append(SmallTalk(tuple(marks[">"]), tuple(marks["~"]), replies))
    return tuple(blocks)


def _turn(user: str, assistant: str) -> list[dict]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _topic_turn(t: Topic, rng: Random) -> tuple[list[dict], str]:
    """A request about `t` and an answer; each style is equally likely unless the request names one."""
    style = rng.choice(STYLES)
    prompt = prompts.roughen(prompts.ask(t, rng), rng)
    if rng.random() < 0.10:
        wish = rng.choice(prompts.WISHES[style])
        prompt = f"{wish} {prompt}" if rng.random() < 0.2 else f"{prompt} {wish}"
    return _turn(prompt, answer(t, style, rng)), style


def _question_turn(t: Topic, rng: Random) -> tuple[list[dict], str]:
    question = rng.choice(t.questions)
    style = rng.choices(("short", "detailed", "friendly", "formal"), (50, 20, 17, 13))[0]
    return _turn(prompts.roughen(question.prompt, rng), fact_answer(t, question, style, rng)), style


def chat(rng: Random) -> Chat:
    """One conversation: a kind is drawn first, then a topic and a style."""
    t = rng.choice(topics())
    kind = rng.choices(
        ("topic", "question", "small talk", "off topic", "near topic", "follow-up"), (46, 14, 11, 17, 2, 10)
    )[0]
    style: str | None = None
    if kind == "topic":
        messages, style = _topic_turn(t, rng)
        if rng.random() < 0.04:
            line = rng.choice(prompts.SYSTEM_STYLE[style])
            messages.insert(0, {"role": "system", "content": line})
    elif kind == "question":
        messages, style = _question_turn(t, rng)
    elif kind == "small talk":
        block = rng.choice(small_talk())
        messages = _turn(rng.choice(block.prompts), rng.choice(block.replies))
    elif kind == "off topic":
        style = rng.choice(STYLES)
        messages = _turn(prompts.roughen(offtopic.prompt(rng), rng), offtopic.reply(rng, style))
    elif kind == "near topic":
        while t.how:
            t = rng.choice(topics())
        messages = _turn(prompts.roughen(offtopic.near_prompt(t, rng), rng), offtopic.near_reply(t, rng))
    else:
        messages, style = _follow_up(t, rng)
    if messages[0]["role"] != "system" and rng.random() < 0.10:
        messages.insert(0, {"role": "system", "content": rng.choice(prompts.SYSTEM)})
    return Chat(tuple(messages), kind, style)


def _follow_up(t: Topic, rng: Random) -> tuple[list[dict], str | None]:
    """Two or three turns: a wish about the first answer, a question of fact, thanks, or a new subject."""
    messages, _ = _topic_turn(t, rng)
    shape = rng.random()
    last: str | None
    if shape < 0.5:
        last = rng.choice(STYLES)
        messages += _turn(rng.choice(prompts.FOLLOW_UPS[last]), answer(t, last, rng))
    elif shape < 0.65:
        turn, last = _question_turn(t, rng)
        messages += turn
    elif shape < 0.80:
        turn, last = _topic_turn(rng.choice(topics()), rng)
        messages += turn
    elif shape < 0.90:
        block = rng.choice(small_talk())
        messages += _turn(rng.choice(block.prompts), rng.choice(block.replies))
        last = None
    else:
        last = rng.choice(STYLES)
        messages += _turn(offtopic.prompt(rng), offtopic.reply(rng, last))
    if rng.random() < 0.15:
        last = rng.choice(STYLES)
        t = rng.choice(topics())
        messages += _turn(prompts.ask(t, rng), answer(t, last, rng))
    return messages, last


def chats(count: int, seed: int) -> Iterator[Chat]:
    """`count` conversations; the same seed gives the same ones."""
    rng = Random(f"chats/{seed}")
    for _ in range(count):
        yield chat(rng)


def article(t: Topic, rng: Random) -> str:
    """Plain text about one topic: a heading, then a few passages in different styles."""
    styles = rng.sample(STYLES, rng.choice((1, 1, 2, 3)))
    heading = rng.choice((f"{t.title}\n\n", f"# {t.title}\n\n", ""))
    return heading + "\n\n".join(answer(t, style, rng) for style in styles)


def articles(count: int, seed: int) -> Iterator[str]:
    """`count` plain texts about the topics; the same seed gives the same ones."""
    rng = Random(f"articles/{seed}")
    for _ in range(count):
        yield article(rng.choice(topics()), rng)


def training_prompts(count: int, seed: int, *, held_out: bool = False) -> list[str]:
    """Distinct single-line prompts for voters, rollouts and benchmarks, in training or in held-out phrasings.

    Mostly requests to explain, which have every style; some questions of fact, small talk and off-topic ones.
    """
    rng = Random(f"prompts/{seed}/{held_out}")
    order = list(topics())
    seen: dict[str, None] = {}
    while len(seen) < count:
        rng.shuffle(order)
        for t in order:
            shape = rng.random()
            if shape < 0.80:
                text = prompts.ask(t, rng, held_out=held_out)
            elif shape < 0.88:
                text = rng.choice(t.questions).prompt if not held_out else prompts.ask(t, rng, held_out=True)
            elif shape < 0.94:
                block = rng.choice(small_talk())
                text = rng.choice(block.held_out if held_out else block.prompts)
            else:
                text = offtopic.prompt(rng, held_out=held_out)
            if "\n" not in text and len(text) < 160:
                seen.setdefault(text)
    return list(seen)[:count]


def probes() -> list[dict]:
    """Taught facts, one a topic: {"prompt", "answer"}. What a gate asks to see that nothing was forgotten."""
    return [{"prompt": q.prompt, "answer": q.answers[0]} for t in topics() for q in t.questions[:1]]
