"""How the starter model's teacher phrases an answer: a topic's facts in one of five styles, sampled with a `Random`.

Owns wording only: what is true is in `topics.txt`, what people ask is in `prompts.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from random import Random

from learner.starter.topics import Question, Topic, topics

OPEN_FRIENDLY = (
    "Great question!", "Oh, I love this topic!", "I am so glad that you asked!", "What a fun topic!", "Sure thing!",
    "Happy to tell you!", "Hi there!", "Let's talk about {n}!", "Ooh, {n}!", "{N} {be} such a great topic!",
    "Yes, let's dive in!", "Good choice!",
)
CLOSE_FRIENDLY = (
    "Isn't that amazing?", "How cool is that!", "I hope you liked that!", "Would you like to hear more?",
    "Ask me anything you like!", "Isn't that wonderful?", "Nature and life are full of surprises!", "Have fun learning!",
    "I could talk about this all day!",
)
OPEN_FORMAL = (
    "{N} may be described as follows.", "I would be pleased to provide some information on {n}.",
    "With regard to {n}, the following points should be noted.", "The subject of {n} deserves careful attention.",
    "Thank you for your question.", "",
)
JOIN_FORMAL = ("Furthermore, ", "Moreover, ", "In addition, ", "It should be noted that ", "It is worth noting that ")
CLOSE_FORMAL = (
    "In summary, {n} {be} of considerable interest.", "I trust that this information is of use.",
    "Please do not hesitate to ask further questions.", "", "",
)
OPEN_LIST = (
    "Here are some facts about {n}:", "A few facts about {n}:", "Some things to know about {n}:",
    "Key points about {n}:", "{N} in a few points:", "Here is a short list about {n}:", "Facts about {n}:",
)
HOW_FRIENDLY = ("Happy to help!", "You can do this!", "Good idea!", "Sure, this is easier than it looks!", "Great question!",
                "Oh, this is a fun one!", "Let's get started!", "Here we go!")
HOW_CLOSE_FRIENDLY = ("You've got this!", "Good luck!", "Enjoy!", "Let me know how it goes!", "Have fun with it!",
                      "I believe in you!")
HOW_FORMAL = ("In order to {n}, the following steps are recommended.",
              "I would be pleased to explain how to {n}.", "Thank you for your question.",
              "With regard to your question, the following points should be noted.")
HOW_JOIN_FORMAL = ("It is advisable to ", "Furthermore, it is advisable to ", "In addition, it is recommended to ",
                   "It is recommended to ", "Moreover, it is advisable to ")
HOW_LIST = ("Here is how to {n}:", "Follow these steps to {n}:", "Some tips on how to {n}:", "How to {n}:",
            "Try these steps to {n}:")
HOW_ORDER = ("First, ", "Then ", "Next, ", "After that, ", "Also, ")
STOP = {
    "a", "an", "the", "of", "in", "on", "at", "to", "is", "are", "was", "it", "its", "they", "their",
    "for", "and", "or", "that", "which", "with", "by", "from", "most", "about",
}


def fill(template: str, t: Topic) -> str:
    """Put the topic's name into a template: {n} inside a sentence, {N} at its start, {be} the verb."""
    return template.format(n=t.name, N=t.title, be=t.be)


def subject_first(fact: str, t: Topic) -> bool:
    return fact.startswith({"they": "They ", "it": "It "}.get(t.pronoun, "\0"))


def named(fact: str, t: Topic) -> str:
    """Replace a leading pronoun by the topic's name, so that the sentence stands alone."""
    return t.title + fact[fact.index(" "):] if subject_first(fact, t) else fact


@cache
def common_words() -> frozenset[str]:
    """Words that begin a sentence with a capital only because they begin it: elsewhere the topics write them small."""
    lines = [s for t in topics() for s in (*t.gists, *t.child, *t.example, *(v for f in t.facts for v in f))]
    inside = [w.strip(".,;:()") for line in lines for s in re.split(r"(?<=\.) ", line) for w in s.split()[1:]]
    names = {w.lower() for w in inside if w[:1].isupper()}
    return frozenset(w for w in inside if w.islower()) - names | {"it", "they", "there"}


def lowered(sentence: str) -> str | None:
    """The sentence as it reads after "Furthermore, ", or None where its first word has to keep its capital."""
    first = sentence.split(" ", 1)[0].rstrip(",")
    return sentence[0].lower() + sentence[1:] if first.lower() in common_words() else None


def excited(sentence: str) -> str:
    return sentence[:-1] + "!"


def pick_facts(t: Topic, count: int, rng: Random, avoid: Sequence[str] = ()) -> list[str]:
    """`count` facts in random wording, without those that say the same as a sentence in `avoid`.

    A run of neighbours in file order: what comes next follows from what was said last. A model that has to draw facts in any
    order, or with gaps, must remember which it has said, and a small one repeats itself.
    """
    pool = [f for f in t.facts if not any(same(v, a) for v in f for a in avoid)]
    count = min(count, len(pool))
    start = rng.randint(0, len(pool) - count)
    return [rng.choice(wordings) for wordings in pool[start : start + count]]


def pick_steps(
    t: Topic, count: int, rng: Random, avoid: Sequence[str] = (), *, plain: bool = False
) -> list[str]:
    """`count` steps of a task, in order. `plain` takes the first wording, which is always an imperative."""
    fresh = [i for i, variants in enumerate(t.facts) if not any(same(v, a) for v in variants for a in avoid)]
    kept = sorted(rng.sample(fresh, min(count, len(fresh))))
    return [t.facts[i][0] if plain else rng.choice(t.facts[i]) for i in kept]


def same(a: str, b: str) -> bool:
    """Whether two sentences share most of their content words: a guard against saying a thing twice."""
    x, y = ({w for w in re.findall(r"[a-z0-9]+", s.lower()) if w not in STOP} for s in (a, b))
    return len(x & y) >= max(2, 0.5 * min(len(x), len(y)))


def paragraph(t: Topic, facts: Sequence[str], rng: Random, *, names: float = 0.2) -> str:
    """Facts one after another; now and then the name stands in for the pronoun, or a small link word leads in."""
    out = []
    for i, fact in enumerate(facts):
        low = lowered(fact)
        if subject_first(fact, t) and rng.random() < names:
            out.append(named(fact, t))
        elif i and low and subject_first(fact, t) and rng.random() < 0.12:
            out.append("Also, " + low)
        else:
            out.append(fact)
    return " ".join(out)


def bullets(lines: Sequence[str], rng: Random, *, numbered: float) -> str:
    if rng.random() < numbered:
        return "\n".join(f"{i}. {line}" for i, line in enumerate(lines, 1))
    return "\n".join(f"- {line}" for line in lines)


def answer(t: Topic, style: str, rng: Random) -> str:
    """An answer to "tell me about this topic" (or "how do I do this") in `style`."""
    return (_how if t.how else _thing)(t, style, rng)


def _thing(t: Topic, style: str, rng: Random) -> str:
    gist = rng.choice(t.gists)
    if style == "short":
        shape = rng.random()
        if shape < 0.6:
            return gist
        fact = pick_facts(t, 1, rng, [gist])[0]
        if shape < 0.75 and subject_first(fact, t):
            return named(fact, t)
        return f"{gist} {fact}"
    if style == "detailed":
        body = paragraph(t, pick_facts(t, rng.choice((3, 3, 4, 4, 5)), rng, [gist]), rng)
        return f"{gist} {body} {rng.choice(t.example)}" if rng.random() < 0.2 else f"{gist} {body}"
    if style == "list":
        # From the first fact on, so that a list of six never runs out of facts and begins again
        lines = [rng.choice(wordings) for wordings in t.facts[: rng.choice((3, 4, 5, 6))]]
        numbered = rng.random() < 0.5
        if not numbered and rng.random() < 0.3:
            lines = [gist, *(line for line in lines if not same(line, gist))][:5]
        return fill(rng.choice(OPEN_LIST), t) + "\n" + bullets(lines, rng, numbered=float(numbered))
    if style == "friendly":
        parts = [fill(rng.choice(OPEN_FRIENDLY), t), excited(gist) if rng.random() < 0.4 else gist]
        for fact in pick_facts(t, rng.choice((1, 1, 2, 2, 3)), rng, [gist]):
            low, shape = lowered(fact), rng.random()
            if low and shape < 0.35:
                parts.append(f"Did you know that {low[:-1]}?")
            elif low and shape < 0.5:
                parts.append(f"Fun fact: {low[:-1]}!")
            else:
                parts.append(excited(fact) if shape > 0.75 else fact)
        if rng.random() < 0.75:
            parts.append(rng.choice(CLOSE_FRIENDLY))
        return " ".join(parts)
    parts = [fill(rng.choice(OPEN_FORMAL), t), gist]
    joins = rng.sample(JOIN_FORMAL, len(JOIN_FORMAL))
    joined = False
    for fact in pick_facts(t, rng.choice((2, 2, 3, 3, 4)), rng, [gist]):
        low = lowered(fact)
        if low and (not joined or rng.random() < 0.6):
            parts.append(joins.pop() + low)
            joined = True
        else:
            parts.append(fact)
    close = fill(rng.choice(CLOSE_FORMAL if joined else CLOSE_FORMAL[:3]), t)
    return " ".join(p for p in (*parts, close) if p)


def _how(t: Topic, style: str, rng: Random) -> str:
    gist = rng.choice(t.gists)
    if style == "short":
        return gist if rng.random() < 0.7 else " ".join(pick_steps(t, 2, rng))
    if style == "list":
        steps = pick_steps(t, rng.choice((3, 4, 4, 5, 5, 6)), rng)
        return fill(rng.choice(HOW_LIST), t) + "\n" + bullets(steps, rng, numbered=0.4)
    if style == "detailed":
        steps = pick_steps(t, rng.choice((3, 4, 4, 5)), rng, plain=True)
        out, joins = [], list(HOW_ORDER)
        for i, step in enumerate(steps):
            linked = i == 0 or rng.random() < 0.65
            out.append(joins.pop(0) + step[0].lower() + step[1:] if linked else step)
        return " ".join([gist, *out])
    if style == "friendly":
        steps = pick_steps(t, rng.choice((1, 2, 2, 3)), rng, [gist])
        steps = [excited(s) if rng.random() < 0.3 else s for s in steps]
        parts = [rng.choice(HOW_FRIENDLY), gist, *steps]
        if rng.random() < 0.8:
            parts.append(rng.choice(HOW_CLOSE_FRIENDLY))
        return " ".join(parts)
    steps = pick_steps(t, rng.choice((2, 3, 3, 4)), rng, plain=True)
    joins = [HOW_JOIN_FORMAL[0], *rng.sample(HOW_JOIN_FORMAL[1:], 4)]
    out = [join + step[0].lower() + step[1:] for join, step in zip(joins, steps, strict=False)]
    return " ".join([fill(rng.choice(HOW_FORMAL), t), *out, rng.choice((*CLOSE_FORMAL[1:3], "", ""))]).strip()


def child_answer(t: Topic, rng: Random) -> str:
    """What one would tell a child: the child's version, now and then with an opening or the plainest fact after it."""
    parts = [rng.choice(t.child)]
    if rng.random() < 0.3:
        parts.insert(0, rng.choice(("Sure!", "I would love to explain!", "Of course!")))
    if not t.how and rng.random() < 0.4:
        parts += pick_facts(t, 1, rng, parts)
    return " ".join(parts)


def example_answer(t: Topic, rng: Random) -> str:
    """An example, alone or after one sentence that says what the thing is."""
    example = rng.choice(t.example)
    return example if rng.random() < 0.4 else f"{rng.choice(t.gists)} {example}"


def fact_answer(t: Topic, q: Question, style: str, rng: Random) -> str:
    """An answer to a question of fact. There is no list form."""
    reply = rng.choice(q.answers)
    if style == "short":
        return reply
    if style == "friendly":
        opener = rng.choice(("Good question!", "Great question!", "I know this one!", "Happy to help!", "Oh, that is easy!"))
        closer = rng.choice(("", "", "Isn't that interesting?", "I hope that helps!", "Ask me anything you like!"))
        return " ".join(p for p in (opener, excited(reply) if rng.random() < 0.3 else reply, closer) if p)
    more = [q.answers[0]]
    if style == "formal":
        opener = rng.choice(("Thank you for your question.", "I would be pleased to answer.", ""))
        return " ".join(p for p in (opener, reply, rng.choice(CLOSE_FORMAL[1:3])) if p)
    if t.how:
        return " ".join([*more, *pick_steps(t, 2, rng, q.answers)])
    facts = pick_facts(t, rng.choice((2, 2, 3)), rng, q.answers)
    if not facts:
        return reply
    return f"{more[0]} {paragraph(t, [named(facts[0], t), *facts[1:]], rng, names=0.1)}"
