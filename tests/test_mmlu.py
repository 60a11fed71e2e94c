"""MMLU's own layout, prompt and scoring, held against the published format and transformers' own logits."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from engine.model import CausalModel
from engine.tokenizer import ChatTokenizer
from learner.batching import chunks
from learner.mmlu import Question, letter_logprobs, prompt_ids, prompt_text, read_mmlu, read_questions
from store import BadImport

DEV = [["Find the degree of Q(sqrt(2)) over Q.", "0", "4", "2", "6", "C"], ["What is 1 + 1?", "1", "2", "3", "4", "B"]]
TEST = [['A "quoted", comma', "a\nb", "x", "y", "z", "A"], ["Is 2 prime?", "no", "yes", "maybe", "never", "B"], ["Pick d.", "a", "b", "c", "d", "D"]]


def folder(path: Path, *, dev: bool = True) -> Path:
    """The archive's layout: data/dev/<subject>_dev.csv, data/test/<subject>_test.csv (and val, which nothing reads)."""
    for part, rows in (("test", TEST), ("val", TEST), *([("dev", DEV)] if dev else [])):
        (path / part).mkdir(parents=True)
        with (path / part / f"abstract_algebra_{part}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    return path


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> CausalModel:
    return CausalModel.load(tiny_llama)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_llama)


def test_the_archives_layout_is_read_with_quotes_commas_and_line_ends(tmp_path: Path) -> None:
    (subject,) = read_mmlu(folder(tmp_path), 5)
    assert subject.name == "abstract_algebra" and len(subject.dev) == 2
    assert subject.test[0] == Question('A "quoted", comma', ("a\nb", "x", "y", "z"), 0)
    assert [q.answer for q in subject.test] == [0, 1, 3]
    assert len(read_mmlu(tmp_path, 1)[0].dev) == 1


def test_the_prompt_is_the_papers(tmp_path: Path) -> None:
    (subject,) = read_mmlu(folder(tmp_path), 5)
    assert prompt_text(subject, subject.test[1], 1) == (
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        "Find the degree of Q(sqrt(2)) over Q.\nA. 0\nB. 4\nC. 2\nD. 6\nAnswer: C\n\n"
        "Is 2 prime?\nA. no\nB. yes\nC. maybe\nD. never\nAnswer:"
    )


def test_shots_that_do_not_fit_are_left_out(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    (subject,) = read_mmlu(folder(tmp_path), 5)
    sizes = [len(tokenizer.render([{"role": "user", "content": prompt_text(subject, subject.test[1], k)}])) for k in range(3)]
    for shots, limit in ((2, sizes[2]), (1, sizes[2] - 1), (0, sizes[1] - 1)):
        assert len(prompt_ids(tokenizer, subject, subject.test[1], limit)) == sizes[shots]
    assert len(prompt_ids(tokenizer, subject, subject.test[1], 10)) == 10


@pytest.mark.parametrize("text, why", [
    ("q,a,b,c,A\n", "x_test.csv:1 has 5 columns"),
    ("q,a,b,c,d,A\nq,a,b,c,d,E\n", "x_test.csv:2: the answer must be"),
    ("question,A,B,C,D,answer\n", "no header"),
    ("", "no questions"),
    ("q,\"a\x00\",b,c,d", "x_test.csv:1"),
])
def test_a_wrong_row_is_named(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "x_test.csv").write_text(text)
    with pytest.raises(BadImport, match=why):
        read_questions(tmp_path / "x_test.csv")


def test_a_folder_without_tests_or_without_shots_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(BadImport, match=r"no \*_test.csv under"):
        read_mmlu(tmp_path)
    with pytest.raises(BadImport, match=r"no \*_test.csv under"):
        read_mmlu(tmp_path / "none")
    folder(tmp_path / "data", dev=False)
    with pytest.raises(BadImport, match=r"abstract_algebra_dev\.csv is not there"):
        read_mmlu(tmp_path / "data")
    assert read_mmlu(tmp_path / "data", 0)[0].dev == ()


@torch.no_grad()
def test_the_letters_log_likelihoods_are_transformers_own(tmp_path: Path, model: CausalModel, tokenizer: ChatTokenizer, tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    (subject,) = read_mmlu(folder(tmp_path), 5)
    prompts = [prompt_ids(tokenizer, subject, q, 512) for q in subject.test]
    assert len({len(p) for p in prompts}) > 1  # so that padding is exercised
    got = letter_logprobs(model, tokenizer, prompts, None)
    letters = [tokenizer.hf.convert_tokens_to_ids(letter) for letter in "ABCD"]
    for row, prompt in zip(got, prompts, strict=True):
        expected = theirs(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)[letters]
        assert torch.allclose(row, expected, atol=1e-4)


def test_batches_hold_like_lengths_and_everything_once() -> None:
    assert chunks([5, 1, 9, 1, 30], 10) == [[1, 3], [0], [2], [4]]
    assert chunks([], 10) == []
