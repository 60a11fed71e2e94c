"""Instruction data as operators have it, read into one shape: a conversation, and the replies that are good to it.

Chat JSONL (`messages`, as our own export of demonstrations), Alpaca JSON (Taori et al. 2023), Super-NaturalInstructions
task JSON (Wang et al. 2022), and rows of a prompt with its references. Both instruction finetuning and the scoring of
generated text read this. Preference files are `store/preferences.py`'s; bytes to rows is `store/rows.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from store.errors import BadImport
from store.records import Message
from store.rows import Row, messages, read_rows

LAYOUTS = "messages (chat), instruction and output (Alpaca), Definition and Instances (Super-NaturalInstructions), or prompt and references"


@dataclass(frozen=True)
class Instruction:
    """A conversation that ends with the user's turn, and good replies to it, the first being the one to learn."""

    prompt: tuple[Message, ...]
    references: tuple[str, ...]

    @property
    def chat(self) -> list[Message]:
        """The conversation with the first reference at its end."""
        return [*map(dict, self.prompt), {"role": "assistant", "content": self.references[0]}]


def read_instructions(file: str | Path, *, shots: int = 0) -> list[Instruction]:
    """Every instruction of a file, in its order; layouts may differ from row to row.

    shots: how many positive examples of a Super-NaturalInstructions task to show, as far as it has them. Raises BadImport
    naming file and line (or item, or instance); the message quotes nothing of the file. Rows of Alpaca's layout without a reply,
    as its own file has some, are left out.
    """
    found = [instruction for row in read_rows(file) for instruction in instructions(row, shots)]
    if not found:
        raise BadImport(f"{Path(file).name} holds no instruction")
    return found


def instructions(row: Row, shots: int = 0) -> list[Instruction]:
    """What one row says: one instruction, or all instances of a task. Raises BadImport."""
    where, fields = row
    if "messages" in fields:
        return [from_chat(fields["messages"], where)]
    if "Instances" in fields:
        return from_task(fields, where, shots)
    if "instruction" in fields:
        return from_alpaca(fields, where)
    if "prompt" in fields and ("references" in fields or "completion" in fields):
        prompt = messages(fields["prompt"], "user", where, "prompt")
        name = "references" if "references" in fields else "completion"
        return [made(prompt, texts(fields[name], where, name), where)]
    raise BadImport(f"{where} is in no known layout: it needs {LAYOUTS}")


def from_chat(value: Any, where: str) -> Instruction:
    """OpenAI's and TRL's `messages`: the last reply of the assistant is what is learned, with those before it."""
    chat = messages(value, "user", where, "messages")
    last = max((i for i, m in enumerate(chat) if m["role"] == "assistant"), default=0)
    if not last:
        raise BadImport(f"{where}: messages need a turn of the user's and then a reply of the assistant's")
    return made(chat[:last], (chat[last]["content"],), where)


def from_alpaca(fields: dict[str, Any], where: str) -> list[Instruction]:
    """`instruction`, `input` (may be empty or absent), `output`; none where that is empty: nothing can be learned from it."""
    parts = [fields.get(name, "") for name in ("instruction", "input")]
    if not all(isinstance(part, str) for part in parts) or not isinstance(fields.get("output"), str):
        raise BadImport(f"{where}: instruction, input and output must be strings, and output must be there")
    if not fields["output"].strip():
        return []
    return [made(user("\n\n".join(part for part in parts if part.strip())), (fields["output"],), where)]


def from_task(fields: dict[str, Any], where: str, shots: int = 0) -> list[Instruction]:
    """Super-NaturalInstructions: every instance under the task's definition and, if asked for, positive examples.

    The prompt is that of Tk-Instruct (Wang et al. 2022, Appendix), as the user's turn.
    """
    definition, instances = fields.get("Definition"), fields["Instances"]
    if isinstance(definition, list):
        definition = definition[0] if definition else None
    if not isinstance(definition, str) or not isinstance(instances, list):
        raise BadImport(f"{where}: Definition must be a string (or a list of one), Instances a list")
    shown = fields.get("Positive Examples") or []
    head = f"Definition: {definition.strip()}\n\n"
    for n, example in enumerate(shown[:shots] if isinstance(shown, list) else [], 1):
        asked, answered = pair(example, f"{where}, positive example {n}")
        head += f"Positive Example {n} -\nInput: {asked.strip()}\nOutput: {answered[0].strip()}\n\n"
    found = []
    for n, instance in enumerate(instances, 1):
        at = f"{where}, instance {n}"
        asked, answered = pair(instance, at)
        found.append(made(user(f"{head}Now complete the following example -\nInput: {asked.strip()}\nOutput:"), answered, at))
    return found


def pair(example: Any, where: str) -> tuple[str, tuple[str, ...]]:
    """Input and outputs of one example of a task."""
    if not isinstance(example, dict) or not isinstance(example.get("input"), str):
        raise BadImport(f"{where}: input must be a string")
    return example["input"], texts(example.get("output"), where, "output")


def texts(value: Any, where: str, name: str) -> tuple[str, ...]:
    """One string or a list of strings, or one message of the assistant's, none of them empty."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = [m["content"] for m in messages(value, "assistant", where, name)]
    found = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else ()
    if not found or not all(isinstance(text, str) and text.strip() for text in found):
        raise BadImport(f"{where}: {name} must be a string or a list of strings, none empty")
    return found


def user(text: str) -> tuple[Message, ...]:
    """One turn of the user's."""
    return ({"role": "user", "content": text},)


def made(prompt: Sequence[Message], references: tuple[str, ...], where: str) -> Instruction:
    """The instruction, when there is something to learn. Raises BadImport."""
    if not prompt or prompt[-1]["role"] != "user" or not prompt[-1]["content"].strip():
        raise BadImport(f"{where}: the reply must follow a message of the user's that is not empty")
    if not references[0].strip():
        raise BadImport(f"{where}: the reply is empty")
    for text in references:
        messages(text, "assistant", where, "reply")  # refuses half characters
    return Instruction(tuple(prompt), references)
