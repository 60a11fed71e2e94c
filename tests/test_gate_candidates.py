"""Candidates made bad on purpose are bad in the way their kind says, and files gone wrong are refused for that."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from benchmarks import candidates
from benchmarks.candidates import CANDIDATE, Workshop, done, fresh, made
from benchmarks.gate import BAD, BAD_FILES, Bad, BadFile, asked_file, turned_away
from engine.lora import WEIGHTS
from engine.model import CausalModel
from engine.tokenizer import ChatTokenizer
from learner.config import GateConfig, LearnerConfig, SFTRoundConfig
from learner.finetune import encode, finetune
from learner.gate import probe_answers, run_gate
from tests.test_gate import GROUP, KL, PROMPTS, judge, replies

WORDS = [a + b + c for a in ("ba", "ko", "mi", "tu", "re", "fa") for b in ("lo", "ni", "sa", "du", "ve") for c in ("m", "r", "t", "n", "ps")]


def varied(seed: int) -> list[str]:
    """Replies of three whole sentences, as different as a real model's to different prompts."""
    draw = random.Random(seed)
    return [" ".join(f"The {a} {b} near some {c} today." for a, b, c in (draw.sample(WORDS, 3) for _ in range(3))) for _ in range(PROMPTS * GROUP)]


LIVE = replies(varied(0), seed=1)
BY_TEXT = [kind for kind in BAD if hasattr(candidates, kind.name.replace(" ", "_")) and kind.name not in ("salad", "gibberish")]


@pytest.mark.parametrize("kind", BY_TEXT, ids=lambda kind: kind.name)
def test_what_a_bad_version_says_fails_a_check_that_is_there_for_it_though_the_judges_love_it(kind: Bad) -> None:
    draw, rewrite = random.Random(0), getattr(candidates, kind.name.replace(" ", "_"))
    said = replies([rewrite("What?", text, draw) for text in LIVE.texts], score=9.0)
    failed = judge(said, LIVE, LIVE, KL, GateConfig()).failed
    assert set(kind.reasons) & set(failed) and "win_rate" not in failed


def test_there_are_twenty_kinds_at_least_and_no_two_of_one_name() -> None:
    names = [kind.name for kind in (*BAD, *BAD_FILES)]
    assert len(names) == len(set(names)) >= 20 and len(LIVE.texts) == PROMPTS * GROUP


def test_a_rejection_for_another_reason_does_not_count() -> None:
    assert turned_away("rejected", ["kl", "broken"], ["kl", "length"])
    assert not turned_away("rejected", ["win_rate"], ["kl", "length"])
    assert not turned_away("pass", [], ["kl"])


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Workshop:
    return Workshop(str(tiny_llama), tmp_path_factory.mktemp("gate"), LearnerConfig(), seed=0)


@pytest.mark.parametrize("kind", BAD_FILES, ids=lambda kind: kind.name)
def test_a_file_gone_wrong_is_refused_and_says_why(shop: Workshop, kind: BadFile) -> None:
    row = asked_file(shop, kind)
    assert row["turned_away"] and row["verdict"] == "refused" and kind.reason in row["why"][0]
    assert CANDIDATE not in shop.model.lora.names()


def test_a_file_that_is_sound_is_loaded_and_so_not_turned_away(shop: Workshop) -> None:
    row = asked_file(shop, BadFile("sound", "anything", lambda shop: shop.published("sound")))
    assert row["verdict"] == "loaded" and not row["turned_away"]


def test_the_gate_and_practice_share_no_prompt(shop: Workshop) -> None:
    assert len(shop.asked) == shop.config.gate.prompts and not {tuple(p) for p in shop.asked} & {tuple(p) for p in shop.practice}


def test_only_what_was_made_whole_and_from_the_same_is_taken_again(tmp_path: Path) -> None:
    about = {"seed": 0, "taste": "list"}
    fresh(tmp_path / "a")
    (tmp_path / "a" / WEIGHTS).write_bytes(b"half")
    assert not made(tmp_path / "a", about)  # killed before it was done
    done(tmp_path / "a", about)
    assert made(tmp_path / "a", about) and not made(tmp_path / "a", about | {"seed": 1})


def test_knowledge_unlearned_is_found_out_though_nothing_else_is_wrong(tiny_llama: Path) -> None:
    """A reference that knows a dozen facts, and a candidate taught to mix them up."""
    model, tokenizer = CausalModel.load(tiny_llama), ChatTokenizer.load(tiny_llama)
    things = ["moon", "sun", "bee", "cat", "tea", "sea", "tree", "egg"]
    probes = [{"prompt": f"What is the {a}?", "answer": f"The {a} is {'aeiouxyz'[i]}."} for i, a in enumerate(things)]
    sft = SFTRoundConfig(passes=25, tokens_per_batch=512, lr=2e-2, max_seconds=600.0)

    def taught(name: str, shift: int) -> str:
        chats = [
            [{"role": "user", "content": p["prompt"]}, {"role": "assistant", "content": probes[(i + shift) % 8]["answer"]}]
            for i, p in enumerate(probes)
        ]  # fmt: skip
        finetune(model, [e for chat in chats if (e := encode(tokenizer, chat, 512))], [], sft, adapter=name, seed=0)
        return name

    knows, forgot = taught("knows", 0), taught("forgot", 1)
    assert probe_answers(model, tokenizer, probes, knows).accuracy == 1.0
    config = GateConfig(prompts=8, replies_per_prompt=2, max_new_tokens=12, max_kl=1e9, max_broken_rise=1.0, max_repetition_rise=1.0, min_distinct2_ratio=0.0)
    prompts = [tokenizer.render([{"role": "user", "content": p["prompt"]}]) for p in probes]
    torch.manual_seed(0)
    verdict = run_gate(model, tokenizer, None, prompts=prompts, candidate=forgot, live=knows, reference=knows, config=config, probes=probes)
    assert verdict["failed"] == ["probe_loss", "probe_accuracy"] and verdict["probe"]["accuracy"] < 0.2
    assert run_gate(model, tokenizer, None, prompts=prompts, candidate=knows, live=knows, reference=knows, config=config, probes=probes)["verdict"] == "pass"
