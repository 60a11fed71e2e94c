"""The starter model's corpus: chats and articles, a pure function of a seed. Mixes what the other modules phrase."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from random import Random

from learner.starter import offtopic, prompts, tasks
from learner.starter.answers import answer, child_answer, example_answer, fact_answer, pick_facts
from learner.starter.styles import STYLES
from learner.starter.topics import DATA, Topic, topics

KINDS = {  # and how many in a hundred conversations
    "topic": 20, "question": 17, "child": 4, "example": 2, "task": 26, "small talk": 11, "off topic": 11, "near topic": 3, "follow-up": 6,
}


@dataclass(frozen=True)
class Chat:
    """One training conversation. `style` is that of its last reply, or None where none was chosen."""

    messages: tuple[dict, ...]
    kind: str  # one of KINDS
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
    for block in (DATA / "smalltalk.txt").read_text(encoding="utf-8").split("\n\n"):
        marks: dict[str, list[str]] = {">": [], "~": [], "<": []}
        for line in block.splitlines():
            mark, _, rest = line.partition(" ")
            if mark in marks:
                marks[mark] += [rest] if mark == "<" else rest.split(" / ")
        if marks["<"]:
            replies = tuple(r.replace("\\n", "\n") for r in marks["<"])
            blocks.append(SmallTalk(tuple(marks[">"]), tuple(marks["~"]), replies))
    return tuple(blocks)


def turn(user: str, assistant: str) -> list[dict]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _topic(t: Topic, rng: Random) -> tuple[list[dict], str]:
    """A request about `t` and an answer; each style is equally likely unless the request names one."""
    style = rng.choice(STYLES)
    twice = not t.how and rng.random() < 0.12
    prompt = prompts.roughen(prompts.ask_twice(t, rng) if twice else prompts.ask(t, rng), rng)
    if rng.random() < 0.10:
        wish = rng.choice(prompts.WISHES[style])
        prompt = f"{wish} {prompt}" if rng.random() < 0.2 else f"{prompt} {wish}"
    return turn(prompt, answer(t, style, rng)), style


def _question(t: Topic, rng: Random) -> tuple[list[dict], str]:
    question = rng.choice(t.questions)
    style = rng.choices(("short", "detailed", "friendly", "formal"), (68, 8, 14, 10))[0]
    return turn(prompts.roughen(rng.choice(question.prompts), rng), fact_answer(t, question, style, rng)), style


def _task(rng: Random) -> list[dict]:
    made = tasks.task(rng)
    exact = made.kind in ("sum", "spelling", "plural", "rhyme", "opposite", "grammar")
    return turn(made.prompt if exact else prompts.roughen(made.prompt, rng), made.reply)


def _small_talk(rng: Random) -> list[dict]:
    block = rng.choice(small_talk())
    return turn(rng.choice(block.prompts), rng.choice(block.replies))


def _off_topic(rng: Random, style: str) -> list[dict]:
    return turn(prompts.roughen(offtopic.prompt(rng), rng), offtopic.reply(rng, style))


def _near_topic(rng: Random) -> list[dict]:
    if rng.random() < 0.4:
        asked, reply = offtopic.about_country(rng.choice(tasks.rows("countries"))[0], rng)
    else:
        t = rng.choice([t for t in topics() if not t.how])
        asked, reply = offtopic.near_prompt(t, rng), offtopic.near_reply(t, rng)
    return turn(prompts.roughen(asked, rng), reply)


def chat(rng: Random) -> Chat:
    """One conversation: a kind is drawn first, then a topic and a style."""
    t = rng.choice(topics())
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    style: str | None = None
    if kind == "topic":
        messages, style = _topic(t, rng)
        if rng.random() < 0.04:
            messages.insert(0, {"role": "system", "content": rng.choice(prompts.SYSTEM_STYLE[style])})
    elif kind == "question":
        messages, style = _question(t, rng)
    elif kind == "child":
        messages = turn(prompts.roughen(prompts.ask_for_child(t, rng), rng), child_answer(t, rng))
    elif kind == "example":
        messages = turn(prompts.roughen(prompts.ask_example(t, rng), rng), example_answer(t, rng))
    elif kind == "task":
        messages = _task(rng)
    elif kind == "small talk":
        messages = _small_talk(rng)
    elif kind == "off topic":
        style = rng.choice(STYLES)
        messages = _off_topic(rng, style)
    elif kind == "near topic":
        messages = _near_topic(rng)
    else:
        messages, style = _follow_up(t, rng)
    if messages[0]["role"] != "system" and rng.random() < 0.06:
        messages.insert(0, {"role": "system", "content": rng.choice(prompts.SYSTEM)})
    return Chat(tuple(messages), kind, style)


def _countries(rng: Random) -> list[dict]:
    """A question about a country, then another about the same one ("And its population?") or the same about another."""
    first = tasks.country(rng)
    row = next(r for r in tasks.rows("countries") if r[0] == first.subject)
    field = first.kind.removeprefix("country ")
    if rng.random() < 0.6:
        other = rng.choice([f for f in tasks.FIELDS if f != field])
        then = tasks.country(rng, row=row, field=other, asked=rng.choice(tasks.AND[other]))
    else:
        row = rng.choice(tasks.rows("countries"))
        asked = rng.choice(("And {n}?", "What about {n}?", "And of {n}?", "and {n}?")).format(n=row[0])
        then = tasks.country(rng, row=row, field=field, asked=asked)
    return [*turn(first.prompt, first.reply), *turn(then.prompt, then.reply)]


def _follow_up(t: Topic, rng: Random) -> tuple[list[dict], str | None]:
    """Two or three turns: a wish about the first answer, a question of fact, a reason, thanks, or a new subject."""
    shape = rng.random()
    last: str | None = None
    if shape < 0.2:
        return _countries(rng), None
    if shape < 0.3 and not t.how:  # "Why?" after a bare sentence gets the facts behind it
        gist = rng.choice(t.gists)
        asked = rng.choice(("Why?", "why?", "Why is that?", "How so?", "Why so?", "Can you say why?"))
        return [*turn(prompts.roughen(prompts.ask(t, rng), rng), gist), *turn(asked, " ".join(pick_facts(t, 2, rng, [gist])))], None
    messages, _ = _topic(t, rng)
    if shape < 0.62:
        last = rng.choice(STYLES)
        messages += turn(rng.choice(prompts.FOLLOW_UPS[last]), answer(t, last, rng))
    elif shape < 0.68:
        messages += turn(rng.choice(("Explain it to a child.", "In simple words?", "Can you say it for a child?", "Simpler, please.")), child_answer(t, rng))
    elif shape < 0.73:
        messages += turn(rng.choice(("Give me an example.", "An example, please.", "For example?", "Do you have an example?")), rng.choice(t.example))
    elif shape < 0.83:
        more, last = _question(t, rng)
        messages += more
    elif shape < 0.88:
        more, last = _topic(rng.choice(topics()), rng)
        messages += more
    elif shape < 0.93:
        messages += _small_talk(rng)
    elif shape < 0.96:
        messages += _task(rng)
    else:
        last = rng.choice(STYLES)
        messages += _off_topic(rng, last)
    return messages, last


def chats(count: int, seed: int) -> Iterator[Chat]:
    """`count` conversations; the same seed gives the same ones."""
    rng = Random(f"chats/{seed}")
    for _ in range(count):
        yield chat(rng)


def article(rng: Random) -> str:
    """Plain text, as a book for young readers has it: passages on a topic, questions with answers, a country, a story, a poem, exercises."""
    shape = rng.random()
    if shape < 0.5:
        t = rng.choice(topics())
        styles = rng.sample(STYLES, rng.choice((1, 1, 2)))
        passages = [answer(t, style, rng) for style in styles]
        if rng.random() < 0.4:
            passages.append(" ".join((*t.child, *t.example)))
        return rng.choice((f"{t.title}\n\n", f"# {t.title}\n\n", "")) + "\n\n".join(passages)
    if shape < 0.75:
        some = rng.choice(topics()), rng.choice(topics())
        asked = [rng.choice(t.questions) for t in some]
        return "\n".join(f"{rng.choice(q.prompts)} {rng.choice(q.answers)}" for q in asked)
    if shape < 0.85:
        row = rng.choice(tasks.rows("countries"))
        told = [tasks.country(rng, row=row, field=name).reply for name in rng.sample(tasks.FIELDS, 3)]
        return f"{tasks.title(row[0])}\n\n{' '.join(told)}"
    made = [tasks.task(rng) for _ in range(rng.randint(1, 3))]
    return "\n\n".join(f"{m.prompt}\n{m.reply}" for m in made)


def articles(count: int, seed: int) -> Iterator[str]:
    """`count` plain texts; the same seed gives the same ones."""
    rng = Random(f"articles/{seed}")
    for _ in range(count):
        yield article(rng)


def training_prompts(count: int, seed: int, *, held_out: bool = False) -> list[str]:
    """Distinct single-line prompts for voters, rollouts and benchmarks, in training or in held-out phrasings.

    Mostly requests to explain, which have every style; some questions of fact, tasks, small talk and off-topic ones.
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
            elif shape < 0.85:
                question = rng.choice(t.questions)
                text = rng.choice(question.held_out if held_out else question.prompts)
            elif shape < 0.90:
                text = tasks.task(rng, held_out).prompt
            elif shape < 0.95:
                block = rng.choice(small_talk())
                text = rng.choice(block.held_out if held_out else block.prompts)
            else:
                text = offtopic.prompt(rng, held_out=held_out)
            if "\n" not in text and len(text) < 160:
                seen.setdefault(text)
    return list(seen)[:count]


def probes() -> list[dict]:
    """Taught facts, one of every topic, in held-out words: {"prompt", "answer"}. What a gate asks, to see that nothing was forgotten."""
    return [{"prompt": q.held_out[0], "answer": q.answers[0]} for t in topics() for q in t.questions[:1]]
