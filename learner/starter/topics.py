"""The facts that the starter model is taught, as data. Reads `data/topics_*.txt`; says nothing about how they are phrased."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"
FORMAT = """\
#   @ key | name as it stands inside a sentence | it, they, who or how | area
#   = a sentence that says what it is (for "how" topics: the short answer)
#   - a fact / the same fact in other words        ("how" topics: a step, in order)
#   c what one would say to a child
#   e For example, ...
#   ? a question / in other words ~ a wording held out of training | an answer / another | key phrase / another
"""


@dataclass(frozen=True)
class Question:
    """One question of fact in several wordings, the answers that are taught, and the key phrases that a right answer holds."""

    prompts: tuple[str, ...]
    held_out: tuple[str, ...]
    answers: tuple[str, ...]
    keys: tuple[str, ...]  # lower case

    def right(self, reply: str) -> bool:
        """Whether `reply` holds one of the key phrases."""
        low = reply.lower()
        return any(key in low for key in self.keys)


@dataclass(frozen=True)
class Topic:
    """One thing the model knows: what it is, six facts in two wordings each, a child's version, an example, two questions.

    `pronoun` is "it" or "they" for things, "who" for a person of the past; "how" marks a task, whose facts are steps in order.
    """

    key: str
    name: str  # as it stands inside a sentence: "the Moon", "bees", "boil an egg"
    pronoun: str
    area: str
    gists: tuple[str, ...]
    facts: tuple[tuple[str, ...], ...]
    child: tuple[str, ...]
    example: tuple[str, ...]
    questions: tuple[Question, ...]

    @property
    def how(self) -> bool:
        return self.pronoun == "how"

    @property
    def title(self) -> str:
        return self.name[0].upper() + self.name[1:]

    @property
    def be(self) -> str:
        return "are" if self.pronoun == "they" else "is"


class TopicError(ValueError):
    """A line of a topic file does not fit the format; the message names the file and the line."""


def split(text: str) -> tuple[str, ...]:
    """The alternatives of one field: "a / b" gives ("a", "b")."""
    return tuple(part.strip() for part in text.split(" / ") if part.strip())


def parse_topics(text: str, name: str = "topics") -> tuple[Topic, ...]:
    """Read the format above. Raises TopicError on a line that fits nothing."""
    blocks: list[dict] = []
    for number, line in enumerate(text.splitlines(), 1):
        mark, _, rest = line.strip().partition(" ")
        try:
            if mark == "@":
                key, title, pronoun, area = (part.strip() for part in rest.split("|"))
                if pronoun not in ("it", "they", "who", "how"):
                    raise ValueError("the third field must be it, they, who or how")
                blocks.append({"key": key, "name": title, "pronoun": pronoun, "area": area,
                               "gists": [], "facts": [], "child": [], "example": [], "questions": []})
            elif mark == "=":
                blocks[-1]["gists"].append(rest.strip())
            elif mark == "-":
                blocks[-1]["facts"].append(split(rest))
            elif mark in ("c", "e"):
                blocks[-1]["child" if mark == "c" else "example"].append(rest.strip())
            elif mark == "?":
                asked, answers, keys = rest.split(" | ")
                training, _, held_out = asked.partition(" ~ ")
                blocks[-1]["questions"].append(
                    Question(split(training), split(held_out), split(answers), split(keys.lower()))
                )
            elif mark not in ("", "#"):
                raise ValueError("a line starts with @, =, -, c, e, ? or #")
        except (ValueError, IndexError) as err:
            raise TopicError(f"{name} line {number}: {err}") from err
    fields: list[dict[str, Any]] = [{k: tuple(v) if isinstance(v, list) else v for k, v in b.items()} for b in blocks]
    return tuple(Topic(**block) for block in fields)


@cache
def topics() -> tuple[Topic, ...]:
    """Every topic, file by file in the order of their names."""
    found = [parse_topics(path.read_text(encoding="utf-8"), path.name) for path in sorted(DATA.glob("topics_*.txt"))]
    return tuple(t for part in found for t in part)


@cache
def rows(name: str) -> tuple[tuple[str, ...], ...]:
    """The lines of `data/NAME.txt`, cut at " | "; comments and empty lines left out; "\\n" is a line break."""
    lines = (DATA / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return tuple(
        tuple(part.strip().replace("\\n", "\n") for part in line.split(" | "))
        for line in lines if line.strip() and not line.startswith("#")
    )
