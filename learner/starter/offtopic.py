"""Prompts that the starter model cannot answer, in many forms, with an honest reply. Reads `offtopic.txt`.

The prompts only have to be varied, so that an unknown one lands on "I don't know" rather than on noise.
"""

from __future__ import annotations

from functools import cache
from random import Random

from learner.starter.styles import STYLES
from learner.starter.topics import DATA, Topic, topics

SOUNDS = ("ba", "cor", "den", "el", "fi", "gra", "hum", "is", "jo", "kan", "lum", "mor", "ni", "os", "per", "qua", "ri",
          "sta", "tum", "ul", "ver", "wex", "yo", "zen", "tion", "ing", "ly", "ment", "ous", "er", "th", "ck", "sh", "pl")


@cache
def sections() -> dict[str, tuple[str, ...]]:
    """The lists of `offtopic.txt` by name; prompts held out of training are under "<name> held out"."""
    out: dict[str, list[str]] = {}
    name = ""
    for line in (DATA / "offtopic.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            name = line.strip("[]")
        elif line and not line.startswith("#"):
            held = line.startswith("~ ")
            entries = (line[2:] if held else line).split(" / ")
            out.setdefault(name + " held out" if held else name, []).extend(e.replace("\\n", "\n") for e in entries)
    return {k: tuple(v) for k, v in out.items()}


def invented_word(rng: Random) -> str:
    """A word that does not exist, standing in for all the words that the model has never seen."""
    word = "".join(rng.choice(SOUNDS) for _ in range(rng.choice((2, 2, 3, 3, 4))))
    return word.capitalize() if rng.random() < 0.4 else word


def subject(rng: Random) -> str:
    shape = rng.random()
    if shape < 0.65:
        return rng.choice(sections()["subjects"])
    if shape < 0.85:
        return invented_word(rng)
    return f"{invented_word(rng)} {rng.choice((invented_word(rng), rng.choice(sections()['subjects'])))}"


def passage(rng: Random, most: int = 8) -> str:
    """A made-up background text: sentences of many kinds, with invented words strewn in."""
    lines = []
    for _ in range(rng.randint(1, most)):
        line = rng.choice(sections()["filler"])
        if rng.random() < 0.5:
            words = line.split(" ")
            for _ in range(max(1, len(words) // 4)):
                words[rng.randrange(len(words))] = invented_word(rng)
            line = " ".join(words)
        lines.append(line)
    return rng.choice((" ", " ", "\n", "\n\n")).join(lines)


def deed(rng: Random) -> str:
    """Something that one can do, sensible or not: a verb and an object."""
    return f"{rng.choice(sections()['verbs'])} {rng.choice((rng.choice(sections()['objects']), rng.choice(sections()['objects']), subject(rng)))}"


def prompt(rng: Random, *, held_out: bool = False) -> str:
    """An off-topic prompt: a task, a template about a subject or a deed, or a long passage with a request."""
    part = sections()
    shape = rng.random()
    tail = " held out" if held_out else ""
    if shape < (0.30 if held_out else 0.18):
        return rng.choice(part["tasks" + tail])
    chatty = not held_out and rng.random() < 0.5
    template = rng.choice(part["chatty" if chatty else "templates" + tail])
    about = template.format(x=subject(rng), y=subject(rng), v=deed(rng), w=deed(rng))
    if shape < 0.68 or held_out:
        return about
    if shape < 0.90:
        bits = [rng.choice(part["openers"]), passage(rng), rng.choice((about, rng.choice(part["asks"])))]
        if rng.random() < 0.4:
            bits = [bits[2], bits[1]]
        return rng.choice((" ", "\n", "\n\n")).join(bits)
    return " ".join(invented_word(rng) for _ in range(rng.randint(1, 12))) + rng.choice(("", "?", "."))


def near_prompt(t: Topic, rng: Random) -> str:
    """A request about a known topic that the model still cannot meet, such as a poem."""
    return rng.choice(sections()["neartopic"]).format(t=t.name)


def near_reply(t: Topic, rng: Random) -> str:
    return rng.choice(sections()["near replies"]).format(t=t.name)


def about_country(country: str, rng: Random) -> tuple[str, str]:
    """A question about a known country that goes beyond what was taught of it, and an honest reply."""
    return rng.choice(sections()["nearcountry"]).format(c=country), rng.choice(sections()["nearcountry replies"]).format(c=country)


@cache
def things() -> tuple[str, ...]:
    """What an honest reply may offer instead."""
    return tuple(t.name for t in topics() if not t.how)


def reply(rng: Random, style: str | None = None) -> str:
    """An honest answer to what it does not know; it often names topics that it does know."""
    a, b, c = rng.sample(things(), 3)
    how = rng.choice([t.name for t in topics() if t.how])
    template = rng.choice(sections()["replies " + (style or rng.choice(STYLES))])
    return template.format(a=a, b=b, c=c, h=how)
