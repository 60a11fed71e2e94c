"""Reading data files: every layout in its real shape, the errors that name a line, and what goes out comes in again."""

from __future__ import annotations

import gzip
import json
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.formats import read_instructions
from store import BadImport, Store, import_preferences, read_preferences
from store.preferences import Preference, preference

CHAT = {"messages": [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A program."},
]}
ALPACA = [  # alpaca_data.json: an array
    {"instruction": "Give three tips for staying healthy.", "input": "", "output": "1. Eat well."},
    {"instruction": "Classify this.", "input": "Samantha", "output": "Female"},
]
TASK = {  # a task file of natural-instructions: tasks/task001_*.json
    "Contributors": ["Swaroop Mishra"], "Source": ["quoref"], "URL": ["https://example.org"], "Categories": ["Question Generation"],
    "Reasoning": [], "Definition": ["In this task, you write the plural."], "Input_language": ["English"],
    "Positive Examples": [{"input": "cat", "output": "cats", "explanation": "An s."}, {"input": "box", "output": "boxes", "explanation": ""}],
    "Negative Examples": [{"input": "cow", "output": "kine", "explanation": "Old."}],
    "Instances": [{"id": "task001-1", "input": "dog", "output": ["dogs", "the dogs"]}, {"id": "task001-2", "input": "ox", "output": ["oxen"]}],
    "Instance License": ["Apache 2.0"],
}


def write(path: Path, value: Any, *, lines: bool = False) -> Path:
    text = "\n".join(map(json.dumps, value)) if lines else json.dumps(value, indent=2)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


@pytest.mark.parametrize("name", ["chat.jsonl", "chat.jsonl.gz", "chat.json"])
def test_a_chat_is_learned_up_to_its_last_reply_whatever_the_file_is_called(tmp_path: Path, name: str) -> None:
    trailing = {"messages": [*CHAT["messages"], said("user", "Bye")]}
    first, second = read_instructions(write(tmp_path / name, [CHAT, trailing], lines=True))
    assert first == second and first.chat == CHAT["messages"]
    assert first.references == ("A program.",) and len(first.prompt) == 4


@pytest.mark.parametrize("name", ["alpaca.json", "alpaca.json.gz", "alpaca.jsonl"])
def test_alpaca_joins_instruction_and_input(tmp_path: Path, name: str) -> None:
    empty = {"instruction": "Draw a house.", "input": "", "output": " "}  # the file as published has a few
    found = read_instructions(write(tmp_path / name, [*ALPACA, empty], lines="jsonl" in name))
    assert [i.chat for i in found] == [
        [said("user", "Give three tips for staying healthy."), said("assistant", "1. Eat well.")],
        [said("user", "Classify this.\n\nSamantha"), said("assistant", "Female")],
    ]


def test_a_task_gives_every_instance_with_all_its_references(tmp_path: Path) -> None:
    found = read_instructions(write(tmp_path / "task001.json", TASK))
    assert [i.references for i in found] == [("dogs", "the dogs"), ("oxen",)]
    asked = "Definition: In this task, you write the plural.\n\nNow complete the following example -\nInput: dog\nOutput:"
    assert found[0].chat == [said("user", asked), said("assistant", "dogs")]


def test_a_tasks_positive_examples_are_shown_as_tk_instruct_shows_them(tmp_path: Path) -> None:
    (shown, *_) = read_instructions(write(tmp_path / "task001.json", TASK), shots=2)
    assert shown.prompt[0]["content"] == (
        "Definition: In this task, you write the plural.\n\nPositive Example 1 -\nInput: cat\nOutput: cats\n\n"
        "Positive Example 2 -\nInput: box\nOutput: boxes\n\nNow complete the following example -\nInput: dog\nOutput:"
    )
    assert read_instructions(tmp_path / "task001.json", shots=9) == read_instructions(tmp_path / "task001.json", shots=2)


def test_prompts_with_references_and_prompt_completion_rows_are_read(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Name a bird.", "references": ["An owl.", "A wren."]}, {"prompt": [said("user", "Hi")], "references": "Hello."},
        {"prompt": "Hi", "completion": [said("assistant", "Hello.")]},
    ]
    found = read_instructions(write(tmp_path / "g.jsonl", rows, lines=True))
    assert [i.references for i in found] == [("An owl.", "A wren."), ("Hello.",), ("Hello.",)]


@pytest.mark.parametrize("row, why", [
    ({"text": "plain"}, "no known layout"),
    ({"messages": [said("user", "Hi")]}, "reply of the assistant"),
    ({"messages": [said("assistant", "Hi")]}, "turn of the user"),
    ({"messages": [said("user", "Hi"), said("assistant", " ")]}, "reply is empty"),
    ({"messages": [said("user", "Hi"), said("assistant", "\ud800")]}, "half a character"),
    ({"messages": [{"role": "bot", "content": "Hi"}]}, "role"),
    ({"instruction": "Do.", "output": 3}, "strings"),
    ({"instruction": " ", "output": "x"}, "not empty"),
    ({"Definition": 3, "Instances": []}, "Definition"),
    ({"Definition": ["d"], "Instances": [{"input": "x", "output": ["y"]}, {"input": "x", "output": []}]}, "instance 2: output"),
    ({"Definition": ["d"], "Instances": ["x"]}, "instance 1: input"),
    ({"prompt": "Hi", "references": ["", "x"]}, "none empty"),
])
def test_a_bad_row_is_named_with_its_line(tmp_path: Path, row: dict, why: str) -> None:
    with pytest.raises(BadImport, match=f"x.jsonl:2.*{why}"):
        read_instructions(write(tmp_path / "x.jsonl", [CHAT, row], lines=True))


@pytest.mark.parametrize("name, text, why", [
    ("a.json", '{"messages": [\n  oops', "a.json:2 is not JSON"),
    ("b.json", "[1]", "b.json, item 1 is not a JSON object"),
    ("c.jsonl", '{"messages": []}\n{', "c.jsonl:2 is not JSON"),
    ("d.json", '{"instruction": "a", "output": "b"}\n{"instruction"', "d.json:2 is not JSON"),
    ("e.jsonl", "\n", "holds no instruction"),
    ("f.json", "", "is not JSON"),
    ("g.json", "[" * 100_000, "too deep"),
])
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, name: str, text: str, why: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(BadImport, match=why):
        read_instructions(tmp_path / name)


def test_a_directory_is_told_from_a_file(tmp_path: Path) -> None:
    with pytest.raises(BadImport, match="is a directory"):
        read_instructions(tmp_path)


# --- preferences

PROMPT = [said("user", "Hi"), said("assistant", "Hello!"), said("user", "What is blue?")]
BLUE, RED = said("assistant", "The sky."), said("assistant", "Blood.")


@pytest.mark.parametrize("row", [
    {"prompt": PROMPT, "chosen": [BLUE], "rejected": [RED]},
    {"chosen": [*PROMPT, BLUE], "rejected": [*PROMPT, RED]},
    {"prompt": PROMPT, "chosen": "The sky.", "rejected": "Blood.", "generator": "x", "voter": "imported"},
])
def test_all_layouts_state_the_same_preference(row: dict) -> None:
    assert preference(row, "x:1") == Preference(tuple(PROMPT), "The sky.", "Blood.")


def test_plain_strings_are_a_question_and_two_answers() -> None:
    assert preference({"prompt": "a", "chosen": "b", "rejected": "c"}, "x:1") == Preference((said("user", "a"),), "b", "c")


@pytest.mark.parametrize("row, why", [
    ({"chosen": "b", "rejected": "c"}, "no 'prompt'"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "voter": "\ud800"}, "voter must be a string"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "voter": 5}, "voter must be a string"),
    ({"chosen": [*PROMPT, BLUE], "rejected": [*PROMPT, BLUE]}, "same text"),
    ({"chosen": [*PROMPT, BLUE], "rejected": PROMPT}, "message of the user"),
    ({"chosen": [*PROMPT, BLUE, said("user", "?"), RED], "rejected": [*PROMPT, RED]}, "one reply"),
])
def test_conversations_that_do_not_part_at_the_last_reply_are_refused(row: dict, why: str) -> None:
    with pytest.raises(BadImport, match=f"x:1.*{why}"):
        preference(row, "x:1")


words = st.text(alphabet=string.printable + "é你🙂", max_size=20)
turns = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), words), max_size=4).map(
    lambda turns: tuple(said(role, text) for role, text in turns)
)
preferences = st.builds(
    lambda before, last, replies, voter: Preference((*before, said("user", last)), *replies, voter), turns, words,
    st.lists(words, min_size=2, max_size=2, unique=True), words,
)


@given(preferences, st.booleans())
def test_what_goes_out_in_trls_layouts_comes_in_the_same(item: Preference, implicit: bool) -> None:
    assert preference(json.loads(json.dumps(item.row(implicit=implicit))), "x:1") == item


@given(preferences)
def test_the_implicit_prompt_is_what_trl_itself_would_find(item: Preference) -> None:
    """TRL's `extract_prompt`, written out: the first index at which the conversations differ ends the prompt."""
    row = item.row(implicit=True)
    split = [a == b for a, b in zip(row["chosen"], row["rejected"], strict=True)].index(False)
    assert row["chosen"][:split] == item.row()["prompt"] and row["chosen"][split:] == item.row()["chosen"]


@pytest.mark.parametrize("format", ["preference", "preference-implicit"])
def test_what_the_store_exports_it_imports_again(tmp_path: Path, format: str) -> None:
    file = write(tmp_path / "in.jsonl", [{"prompt": PROMPT, "chosen": [BLUE], "rejected": [RED]}], lines=True)
    with Store.open(tmp_path / "a") as store:
        import_preferences(store, file, hash_voter=str)
        rows = list(store.export(format))
    assert ("prompt" in rows[0]) == (format == "preference")
    (again,) = read_preferences(write(tmp_path / "out.jsonl", rows, lines=True))
    assert (again.prompt, again.chosen, again.rejected) == (tuple(PROMPT), "The sky.", "Blood.")


@pytest.mark.parametrize("name", ["hh_harmless_preferences.jsonl.gz", "alpaca_eval_preferences.jsonl.gz"])
def test_the_real_preferences_are_read_whole_in_every_layout(shared_data: Path, name: str) -> None:
    with gzip.open(shared_data / name, "rt") as lines:
        count = sum(1 for _ in lines)
    found = read_preferences(shared_data / name)
    assert len(found) == count
    assert all(preference(item.row(implicit=True), "x:1") == item for item in found)
