"""The facts that the starter model is taught, as data. Reads `topics.txt`; says nothing about how they are phrased."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Question:
    """One question of fact, and the answers that count as right (the first is the one probes use)."""

    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Topic:
    """One thing the model knows: what it is, six facts in two wordings each, and two questions.

    `pronoun` is "it" or "they" for things; "how" marks a task, whose facts are steps in order.
    """

    key: str
    name: str  # as it stands inside a sentence: "the Moon", "bees", "boil an egg"
    pronoun: str
    area: str
    gists: tuple[str, ...]
    facts: tuple[tuple[str, ...], ...]
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
    """A line of `topics.txt` does not fit the format described at its top; the message names the line."""


def parse_topics(text: str) -> tuple[Topic, ...]:
    """Read the format of `topics.txt`. Raises TopicError on a line that fits nothing."""
    blocks: list[dict] = []
    for number, line in enumerate(text.splitlines(), 1):
        mark, _, rest = line.strip().partition(" ")
        try:
            if mark == "@":
                key, name, pronoun, area = (part.strip() for part in rest.split("|"))
                if pronoun not in ("it", "they", "how"):
                    raise ValueError("the third field must be it, they or how")
                blocks.append({"key": key, "name": name, "pronoun": pronoun, "area": area,
                               "gists": [], "facts": [], "questions": []})
            elif mark == "=":
                blocks[-1]["gists"].append(rest.strip())
            elif mark == "-":
                blocks[-1]["facts"].append(tuple(part.strip() for part in rest.split(" / ")))
            elif mark == "?":
                prompt, answers = rest.split(" | ")
                blocks[-1]["questions"].append(
                    Question(prompt.strip(), tuple(part.strip() for part in answers.split(" / ")))
                )
            elif mark not in ("", "#"):
                raise ValueError("a line starts with @, =, -, ? or #")
        except (ValueError, IndexError) as err:
            raise TopicError(f"topics.txt line {number}: {err}") from err
    fields: list[dict[str, Any]] = [{k: tuple(v) if isinstance(v, list) else v for k, v in b.items()} for b in blocks]
    return tuple(Topic(**block) for block in fields)


@cache
def topics() -> tuple[Topic, ...]:
    """Every topic, in file order."""
    return parse_topics((HERE / "topics.txt").read_text(encoding="utf-8"))
