"""Small tasks that the starter model is taught: countries, sums, units, words, rewriting, lists of things or facts, comparisons, stories, poems.

Each maker draws one task: what is asked, in a training or a held-out wording, and a right reply. Content is in `data/`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from learner.starter.answers import OPEN_LIST, bullets, fill, pick_facts
from learner.starter.topics import rows, split, topics

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NAMES = ("Tom", "Anna", "Mary", "Ben", "Lucy", "Sam", "Emma", "Jack")
THINGS = ("apples", "books", "coins", "stamps", "pencils", "eggs", "cards", "shells")


@dataclass(frozen=True)
class Task:
    """One request and its reply. A right reply holds one of `keys` (lower case); empty where there are many right ones."""

    kind: str
    prompt: str
    reply: str
    keys: tuple[str, ...] = ()
    subject: str = ""  # the country, for a follow-up

    def right(self, reply: str) -> bool:
        """Whether `reply` holds a key as whole words."""
        padded = " " + "".join(ch if ch.isalnum() or ch in "-'" else " " for ch in reply.lower()) + " "
        plain = " ".join(padded.split())
        return any(f" {' '.join(key.split())} " in f" {plain} " for key in self.keys)


def key(text: str) -> str:
    """`text` as `Task.right` compares it."""
    return " ".join("".join(ch if ch.isalnum() or ch in "-'" else " " for ch in text.lower()).split())


def wording(rng: Random, training: Sequence[str], held_out: Sequence[str], held: bool, **words: object) -> str:
    return rng.choice(held_out if held else training).format(**words)


def title(text: str) -> str:
    return text[0].upper() + text[1:]


# --- countries ---------------------------------------------------------------------------------------------------------------

FIELDS = ("capital", "continent", "language", "currency", "population")
ASKED = {
    "capital": (
        ("What is the capital of {n}?", "What's the capital of {n}?", "capital of {n}", "Which city is the capital of {n}?", "Tell me the capital of {n}.",
         "Do you know the capital of {n}?", "What is {n}'s capital?", "Name the capital of {n}."),
        ("Which is the capital city of {n}?", "Can you tell me the capital of {n}?"),
    ),
    "continent": (
        ("Where is {n}?", "On which continent is {n}?", "Which continent is {n} in?", "What continent is {n} on?", "In which part of the world is {n}?"),
        ("Can you tell me which continent {n} is in?", "Where in the world is {n}?"),
    ),
    "language": (
        ("What language do people speak in {n}?", "Which language is spoken in {n}?", "What is the language of {n}?", "What do people in {n} speak?"),
        ("Which language do people in {n} speak?", "Can you tell me what language is spoken in {n}?"),
    ),
    "currency": (
        ("What is the currency of {n}?", "Which money is used in {n}?", "What money do people use in {n}?", "What currency does {n} use?"),
        ("Which currency is used in {n}?", "What kind of money do people in {n} use?"),
    ),
    "population": (
        ("How many people live in {n}?", "What is the population of {n}?", "How big is the population of {n}?", "population of {n}"),
        ("Can you tell me how many people live in {n}?", "How many people are there in {n}?"),
    ),
}
TOLD = {
    "capital": ("The capital of {n} is {v}.", "{v} is the capital of {n}.", "It is {v}.", "{v}."),
    "continent": ("{N} is in {v}.", "It is in {v}.", "You can find {n} in {v}."),
    "language": ("People in {n} mostly speak {v}.", "The main language of {n} is {v}.", "Mostly {v}."),
    "currency": ("The currency of {n} is the {v}.", "People in {n} pay with the {v}.", "It is the {v}."),
    "population": ("{V} people live in {n}.", "{N} has {v} people.", "It has {v} people."),
}
AND = {
    "capital": ("And its capital?", "And the capital?", "What about its capital?"),
    "continent": ("And where is it?", "Which continent is it on?"),
    "language": ("And its language?", "What language do they speak there?", "What do people speak there?"),
    "currency": ("And its currency?", "And the money?", "What money do they use there?"),
    "population": ("And its population?", "How many people live there?", "And how many people?"),
}
CHEER = ("Good question!", "I know this one!", "Happy to help!", "Sure!")


def country(rng: Random, held: bool = False, *, row: tuple[str, ...] | None = None, field: str | None = None, asked: str | None = None) -> Task:
    """A question of fact about a country. `asked` replaces the question, in a follow-up."""
    row = row or rng.choice(rows("countries"))
    field = field or rng.choices(FIELDS, (40, 15, 15, 15, 15))[0]
    values = split(row[1 + FIELDS.index(field)])
    told = rng.choice(TOLD[field]).format(n=row[0], N=title(row[0]), v=values[0], V=title(values[0]))
    if asked is None and rng.random() < 0.15:
        told = f"{rng.choice(CHEER)} {told}"
    prompt = asked or wording(rng, *ASKED[field], held, n=row[0])
    return Task("country " + field, prompt, told, tuple(key(v) for v in values), row[0])


# --- sums and units ------------------------------------------------------------------------------------------------------------

SUMS = (
    ("What is {a} {sign} {b}?", "{a} {sign} {b}", "{a} {sign} {b} = ?", "What is {a} {word} {b}?", "Calculate {a} {sign} {b}.", "How much is {a} {word} {b}?",
     "Can you work out {a} {sign} {b}?", "{a} {word} {b}"),
    ("Please calculate {a} {word} {b}.", "Tell me what {a} {sign} {b} is."),
)
SIGNS = {"plus": "+", "minus": "-", "times": "x", "divided by": "/"}


def operands(rng: Random) -> tuple[int, int, str, int]:
    """Two numbers, a word and the result: sums to 40, differences of them, tables to 10, exact quotients."""
    word = rng.choice(("plus", "minus", "times", "divided by"))
    if word in ("times", "divided by"):
        a, b = rng.randint(1, 10), rng.randint(1, 10)
        return (a, b, word, a * b) if word == "times" else (a * b, a, word, b)
    a, b = rng.randint(0, 20), rng.randint(0, 20)
    return (a, b, word, a + b) if word == "plus" else (a + b, a, word, b)


def arithmetic(rng: Random, held: bool = False) -> Task:
    a, b, word, c = operands(rng)
    if not held and rng.random() < 0.2:
        return story_sum(rng)
    sign = SIGNS[word] if rng.random() < 0.8 or word != "times" else "*"
    prompt = wording(rng, *SUMS, held, a=a, b=b, word=word, sign=sign)
    reply = rng.choice(("{a} {word} {b} is {c}.", "{a} {sign} {b} = {c}.", "It is {c}.", "The answer is {c}.", "{c}."))
    return Task("sum", prompt, reply.format(a=a, b=b, word=word, sign=sign, c=c), (str(c),))


def story_sum(rng: Random) -> Task:
    """A word problem of one step."""
    (a, b), thing = (rng.randint(1, 12), rng.randint(1, 12)), rng.choice(THINGS)
    one, two = rng.sample(NAMES, 2)
    if rng.random() < 0.5:
        prompt = f"{one} has {a} {thing} and gets {b} more. How many {thing} does {one} have now?"
        return Task("sum", prompt, rng.choice((f"{one} has {a + b} {thing} now.", f"{a} + {b} = {a + b}, so {one} has {a + b} {thing}.")), (str(a + b),))
    prompt = f"{one} has {a + b} {thing} and gives {a} to {two}. How many {thing} does {one} have left?"
    return Task("sum", prompt, rng.choice((f"{one} has {b} {thing} left.", f"{a + b} - {a} = {b}, so {one} has {b} {thing} left.")), (str(b),))


UNITS = (
    ("hour", "hours", "minutes", 60), ("minute", "minutes", "seconds", 60), ("day", "days", "hours", 24), ("week", "weeks", "days", 7),
    ("year", "years", "months", 12), ("kilometre", "kilometres", "metres", 1000), ("metre", "metres", "centimetres", 100),
    ("centimetre", "centimetres", "millimetres", 10), ("kilogram", "kilograms", "grams", 1000), ("litre", "litres", "millilitres", 1000),
    ("century", "centuries", "years", 100), ("dozen", "dozen", "pieces", 12),
)


def unit(rng: Random, held: bool = False) -> Task:
    one, many, small, factor = rng.choice(UNITS)
    count = rng.choice((1, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10))
    amount = f"{count} {one if count == 1 else many}"
    prompt = wording(rng, (
        "How many {s} are in {x}?", "How many {s} are there in {x}?", "Convert {x} to {s}.", "What is {x} in {s}?", "{x} in {s}", "How many {s} is {x}?",
    ), ("Please convert {x} into {s}.", "Can you tell me how many {s} {x} make?"), held, s=small, x=amount)
    total = f"{count * factor}"
    return Task("unit", prompt, rng.choice((f"There are {total} {small} in {amount}.", f"{amount} = {total} {small}.", f"It is {total} {small}.")), (total,))


# --- words -------------------------------------------------------------------------------------------------------------------


def opposite(rng: Random, held: bool = False) -> Task:
    word, *others = rng.choice(rows("opposites"))
    values = split(others[0])
    prompt = wording(rng, (
        "What is the opposite of {w}?", "What's the opposite of {w}?", "opposite of {w}", "Give me the opposite of {w}.", "Tell me the opposite of the word {w}.",
        "Which word means the opposite of {w}?", "Find an antonym for {w}.",
    ), ("Can you give me the opposite of {w}?", "What word is the opposite of {w}?"), held, w=word)
    return Task("opposite", prompt, rng.choice((f"The opposite of {word} is {values[0]}.", f"{title(values[0])}.", f"It is {values[0]}.")), tuple(map(key, values)))


def plural(rng: Random, held: bool = False) -> Task:
    word, many = rng.choice(rows("plurals"))[:2]
    values = split(many)
    prompt = wording(rng, (
        "What is the plural of {w}?", "What's the plural of {w}?", "plural of {w}", "How do you say more than one {w}?", "Give me the plural of {w}.",
        "One {w}, two what?",
    ), ("Can you tell me the plural of {w}?", "What is the plural form of {w}?"), held, w=word)
    return Task("plural", prompt, rng.choice((f"The plural of {word} is {values[0]}.", f"One {word}, two {values[0]}.", f"It is {values[0]}.")), tuple(map(key, values)))


def rhyme(rng: Random, held: bool = False) -> Task:
    group = split(rng.choice(rows("rhymes"))[0])
    word = rng.choice(group)
    others = [w for w in group if w != word]
    prompt = wording(rng, (
        "What rhymes with {w}?", "Which words rhyme with {w}?", "Give me a rhyme for {w}.", "Find a word that rhymes with {w}.", "words that rhyme with {w}",
        "Tell me a word that rhymes with {w}.",
    ), ("Do you know a word that rhymes with {w}?", "I need a rhyme for {w}."), held, w=word)
    some = others[:3]
    reply = rng.choice((f"{title(some[0])} rhymes with {word}.", f"Words that rhyme with {word} are {some[0]}, {some[1]} and {some[2]}.",
                        f"{title(some[0])} and {some[1]} rhyme with {word}."))
    return Task("rhyme", prompt, reply, tuple(map(key, others)))


def spelling(rng: Random, held: bool = False) -> Task:
    word = rng.choice(rows("spelling"))[0]
    prompt = wording(rng, (
        "How do you spell {w}?", "Spell {w}.", "Spell the word {w}.", "How is {w} spelled?", "Can you spell {w}?", "spell {w}",
    ), ("Please spell {w} for me.", "Tell me how to spell {w}."), held, w=word)
    letters = "-".join(word)
    return Task("spelling", prompt, rng.choice((f"{letters}.", f"{title(word)} is spelled {letters}.", f"You spell it {letters}.")), (letters.lower(),))


# --- rewriting -----------------------------------------------------------------------------------------------------------------


def polite(rng: Random, held: bool = False) -> Task:
    blunt, kind = rng.choice(rows("polite"))[:2]
    prompt = wording(rng, (
        "Make this polite: {s}", "Make it polite: {s}", "Say this politely: {s}", "How can I say this politely? {s}", "Write this in a polite way: {s}",
        "Rewrite this politely: {s}", "Please make this sentence polite: {s}", "{s}\nMake this polite.",
    ), ("Can you make this more polite? {s}", "Turn this into a polite request: {s}"), held, s=blunt)
    return Task("polite", prompt, kind)


def shorten(rng: Random, held: bool = False) -> Task:
    long, brief = rng.choice(rows("shorten"))[:2]
    prompt = wording(rng, (
        "Make this shorter: {s}", "Rewrite this shorter: {s}", "Shorten this: {s}", "Shorten this sentence: {s}", "Say this in fewer words: {s}",
        "Can you make this shorter? {s}", "{s}\nMake it shorter.", "Rewrite this sentence in fewer words: {s}",
    ), ("Please shorten the following sentence: {s}", "Cut this down: {s}"), held, s=long)
    return Task("shorten", prompt, brief)


def summary(rng: Random, held: bool = False) -> Task:
    text, gist = rng.choice(rows("summaries"))[:2]
    prompt = wording(rng, (
        "Summarise this: {s}", "Summarise these sentences: {s}", "Summarize: {s}", "Sum this up in one sentence: {s}", "What is the main point? {s}",
        "Give me a summary of this text: {s}", "{s}\nSummarise this in one sentence.", "Write a short summary: {s}",
    ), ("Please give me a one-sentence summary of this: {s}", "In short, what does this say? {s}"), held, s=text)
    return Task("summary", prompt, gist)


def transform(rng: Random, held: bool = False) -> Task:
    now, past, question, negative = rng.choice(rows("sentences"))[:4]
    kind, reply = rng.choice((("past", past), ("question", question), ("negative", negative)))
    training, held_out = {
        "past": (("Put this in the past tense: {s}", "Write this in the past tense: {s}", "Change this to the past: {s}", "Past tense: {s}"),
                 ("Can you put this sentence in the past tense? {s}",)),
        "question": (("Make this a question: {s}", "Turn this into a question: {s}", "Write this as a question: {s}", "Change this to a question: {s}"),
                     ("Can you turn this sentence into a question? {s}",)),
        "negative": (("Make this negative: {s}", "Say that this is not so: {s}", "Write this with the word not: {s}", "Negate this sentence: {s}"),
                     ("Can you make this sentence negative? {s}",)),
    }[kind]
    return Task("grammar", wording(rng, training, held_out, held, s=now), reply, (key(reply),))


# --- lists, comparisons, stories, poems --------------------------------------------------------------------------------------------


def listing(rng: Random, held: bool = False) -> Task:
    name, items = rng.choice(rows("categories"))[:2]
    pool = split(items)
    count = min(rng.choice((2, 3, 3, 4, 5, 5, 5, 6)), len(pool))
    chosen = [pool[i] for i in sorted(rng.sample(range(len(pool)), count))]
    number = rng.choice((NUMBERS[count], str(count)))
    prompt = wording(rng, (
        "List {k} {n}.", "Name {k} {n}.", "Give me {k} {n}.", "Tell me {k} {n}.", "Can you name {k} {n}?", "Write down {k} {n}.", "I need {k} {n}.",
        "list {k} {n}", "What are {k} {n}?",
    ), ("Please list {k} {n} for me.", "Could you give me {k} {n}?"), held, k=number, n=name)
    shape = rng.random()
    if shape < 0.45:
        reply = "\n".join(f"{i}. {title(item)}" for i, item in enumerate(chosen, 1))
    elif shape < 0.75:
        reply = "\n".join(f"- {title(item)}" for item in chosen)
    else:
        reply = f"{title(', '.join(chosen[:-1]))} and {chosen[-1]}."
    return Task("list", prompt, reply, tuple(key(item) for item in pool))


def facts(rng: Random, held: bool = False) -> Task:
    """As many facts about a thing as are asked for, from its first on: two to six."""
    t = rng.choice([t for t in topics() if not t.how])
    count = rng.choice((2, 3, 3, 4, 5, 5, 6))
    prompt = wording(rng, (
        "Give me {k} facts about {n}.", "Tell me {k} facts about {n}.", "List {k} facts about {n}.", "{k} facts about {n}", "Name {k} things to know about {n}.",
        "What are {k} things to know about {n}?", "Write down {k} facts about {n}.", "I need {k} facts about {n}.", "Make a list of {k} facts about {n}.",
    ), ("Please give me a list of {k} facts about {n}.", "Could you tell me {k} facts about {n}?"), held, k=rng.choice((NUMBERS[count], str(count))), n=t.name)
    lines = bullets([rng.choice(wordings) for wordings in t.facts[:count]], rng, numbered=0.85)
    return Task("facts", title(prompt), lines if rng.random() < 0.5 else fill(rng.choice(OPEN_LIST), t) + "\n" + lines)


def compare(rng: Random, held: bool = False) -> Task:
    """Two things of one area: what each is, and a fact of each."""
    things = [t for t in topics() if not t.how]
    one = rng.choice(things)
    two = rng.choice([t for t in things if t.area == one.area and t is not one])
    prompt = wording(rng, (
        "Compare {a} and {b}.", "What is the difference between {a} and {b}?", "How are {a} and {b} different?", "Compare {a} with {b}.",
        "{A} or {b}: what is the difference?", "Tell me how {a} and {b} differ.", "difference between {a} and {b}",
    ), ("Can you compare {a} to {b}?", "In what way do {a} and {b} differ?"), held, a=one.name, b=two.name, A=one.title)
    gists = [rng.choice(t.gists) for t in (one, two)]
    if rng.random() < 0.5:
        return Task("compare", prompt, " ".join(gists))
    facts = [pick_facts(t, 1, rng, [gist])[0] for t, gist in zip((one, two), gists, strict=True)]
    if rng.random() < 0.5:
        return Task("compare", prompt, f"{gists[0]} {facts[0]} {gists[1]} {facts[1]}")
    return Task("compare", prompt, f"{one.title} and {two.name}, side by side:\n" + "\n".join(f"- {gist}" for gist in gists))


def story(rng: Random, held: bool = False) -> Task:
    start, rest = rng.choice(rows("stories"))[:2]
    prompt = wording(rng, (
        "Continue the story: {s}", "Continue this story: {s}", "Go on with this story: {s}", "Finish this story: {s}", "What happens next? {s}",
        "{s}\nContinue the story.", "Write the end of this story: {s}",
    ), ("Please carry on with this story: {s}", "How does this story go on? {s}"), held, s=start)
    return Task("story", prompt, rest)


def tale(rng: Random, held: bool = False) -> Task:
    start, rest = rng.choice(rows("stories"))[:2]
    prompt = wording(rng, (
        "Tell me a story.", "Tell me a short story.", "Write a story.", "Can you write a short story?", "I want to hear a story.", "Write a little story for me.",
        "tell me a story please", "Make up a story.",
    ), ("Could you tell me a little story?", "Do you know a story?"), held)
    return Task("story", prompt, f"{start} {rest}")


def poem(rng: Random, held: bool = False) -> Task:
    subject, text = rng.choice(rows("poems"))[:2]
    prompt = wording(rng, (
        "Write a poem about {n}.", "Write a four-line poem about {n}.", "Write a short poem about {n}.", "Can you write a poem about {n}?", "Make a rhyme about {n}.",
        "Give me a poem about {n}.", "I would like a poem about {n}.", "poem about {n}",
    ), ("Please write me a little poem about {n}.", "Could you make up a four-line poem about {n}?"), held, n=subject)
    return Task("poem", prompt, text)


MAKERS: dict[Callable[[Random, bool], Task], float] = {  # and how often each is drawn
    country: 80, arithmetic: 30, unit: 7, opposite: 6, plural: 5, rhyme: 8, spelling: 6, polite: 3, shorten: 4, summary: 3, transform: 4, listing: 10, facts: 60,
    compare: 5, story: 3, tale: 2, poem: 10,
}


def task(rng: Random, held: bool = False) -> Task:
    """One task of a kind drawn by its weight, in a training or a held-out wording."""
    return rng.choices(list(MAKERS), list(MAKERS.values()))[0](rng, held)
