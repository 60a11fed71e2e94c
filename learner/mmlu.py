"""MMLU in its own CSV layout (Hendrycks et al. 2021): reading it, asking it few-shot, and which letter the model finds likeliest.

A folder (searched through) of `<subject>_test.csv` with `<subject>_dev.csv` for the shots; rows of question, four choices
and the letter of the right one, no header. Owns the layout, the prompt and the log-likelihoods; `learner/evaluate.py` compares.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.model import CausalModel
from engine.tokenizer import ChatTokenizer
from learner.batching import chunks, pass_tokens
from store.errors import BadImport
from store.rows import read_text

LETTERS = ("A", "B", "C", "D")


@dataclass(frozen=True)
class Question:
    """One multiple-choice question. answer: index of the right choice."""

    text: str
    choices: tuple[str, str, str, str]
    answer: int

    def shown(self, solved: bool) -> str:
        """As in the paper: question, lettered choices, "Answer:", and the letter when `solved`."""
        lines = [self.text, *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=True))]
        return "\n".join([*lines, "Answer:" + (f" {LETTERS[self.answer]}\n\n" if solved else "")])


@dataclass(frozen=True)
class Subject:
    """One subject: its questions, and the solved ones that come before them."""

    name: str
    test: tuple[Question, ...]
    dev: tuple[Question, ...] = ()


def read_questions(file: Path) -> tuple[Question, ...]:
    """The questions of one CSV. Raises BadImport naming file and line."""
    found = []
    rows = csv.reader(io.StringIO(read_text(file), newline=""))
    try:
        for row in rows:
            if not row:
                continue
            where = f"{file.name}:{rows.line_num}"
            if len(row) != 6:
                raise BadImport(f"{where} has {len(row)} columns; a row is question, A, B, C, D, answer")
            if row[5].strip() not in LETTERS:
                raise BadImport(f"{where}: the answer must be A, B, C or D (and the file have no header)")
            found.append(Question(row[0], (row[1], row[2], row[3], row[4]), LETTERS.index(row[5].strip())))
    except csv.Error as error:
        raise BadImport(f"{file.name}:{rows.line_num} is not CSV ({error})") from None
    if not found:
        raise BadImport(f"{file.name} has no questions")
    return tuple(found)


def read_mmlu(folder: str | Path, shots: int = 5) -> list[Subject]:
    """Every subject under `folder`, by name, with its first `shots` solved questions. Raises BadImport."""
    folder = Path(folder)
    tests = sorted(folder.rglob("*_test.csv")) if folder.is_dir() else []
    if not tests:
        raise BadImport(f"there is no *_test.csv under {folder}: give the folder of MMLU's CSV files")
    found = []
    for file in tests:
        name = file.name.removesuffix("_test.csv")
        dev: tuple[Question, ...] = ()
        if shots:
            beside = [file.with_name(f"{name}_dev.csv"), *sorted(folder.rglob(f"{name}_dev.csv"))]
            source = next((path for path in beside if path.is_file()), None)
            if source is None:
                raise BadImport(f"{name}_dev.csv is not there, and few-shot prompts need it: add it, or ask with 0 shots")
            dev = read_questions(source)[:shots]
        found.append(Subject(name, read_questions(file), dev))
    return found


def prompt_text(subject: Subject, question: Question, shots: int) -> str:
    """The paper's prompt: what the questions are about, `shots` solved ones, and the question."""
    about = subject.name.replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about {about}.\n\n"
    return head + "".join(q.shown(True) for q in subject.dev[:shots]) + question.shown(False)


def prompt_ids(tokenizer: ChatTokenizer, subject: Subject, question: Question, limit: int) -> list[int]:
    """The prompt as the user's turn, with as many shots as fit into `limit` tokens; the oldest tokens of one that
    does not fit even alone are lost."""
    for shots in range(len(subject.dev), -1, -1):
        ids = tokenizer.render([{"role": "user", "content": prompt_text(subject, question, shots)}])
        if len(ids) <= limit:
            return ids
    return ids[-limit:]


@torch.no_grad()
def letter_logprobs(
    model: CausalModel, tokenizer: ChatTokenizer, prompts: Sequence[Sequence[int]], adapter: str | None,
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:  # fmt: skip
    """(N, 4) log-likelihood, nats, of each letter as the beginning of the reply. Raises BadImport where letters share
    their first token."""
    letters = [tokenizer.encode(letter)[0] for letter in LETTERS]
    if len(set(letters)) < len(LETTERS):
        raise BadImport("this model's tokenizer writes A, B, C and D with the same first token: MMLU cannot be asked")
    found = torch.empty(len(prompts), len(LETTERS))
    done = 0
    for rows in chunks([len(p) for p in prompts], pass_tokens(model.device)):
        longest = max(len(prompts[i]) for i in rows)
        ids = torch.full((len(rows), longest), model.pad_id)
        valid = torch.zeros(len(rows), longest, dtype=torch.bool)
        for row, i in enumerate(rows):
            ids[row, : len(prompts[i])] = torch.tensor(list(prompts[i]))
            valid[row, : len(prompts[i])] = True
        hidden = model(ids.to(model.device), valid=valid.to(model.device), adapter=adapter)
        last = hidden[torch.arange(len(rows)), valid.sum(1) - 1]  # (n, D): the state that chooses the reply's first token
        found[rows] = model.logits(last).log_softmax(-1)[:, letters].cpu()
        done += len(rows)
        if progress is not None:
            progress(done, len(prompts))
    return found
