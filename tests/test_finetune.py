"""Instruction finetuning of an adapter: what carries loss, that only the adapter learns, which pass is kept, what is published."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from engine.model import CausalModel
from engine.tokenizer import ChatTokenizer
from learner.config import SFTRoundConfig
from learner.finetune import (
    AdapterModule,
    NothingLearned,
    encode,
    finetune,
    hold_out,
    last_reply,
    mean_loss,
    publish_finetuned,
)
from learner.sft import Example, SFTError
from store.adapters import AdapterRegistry

QUICK = SFTRoundConfig(passes=4, lora_r=4, lora_alpha=8, lr=5e-3, tokens_per_batch=128, max_seconds=1e9)


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


CHATS = [[said("user", f"Question {n}?"), said("assistant", f"The answer is {n % 3} and bees.")] for n in range(20)]


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> CausalModel:
    return CausalModel.load(tiny_llama)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_llama)


def learned(tokenizer: ChatTokenizer, example: Example) -> str:
    return tokenizer.hf.decode([i for i, on in zip(example.ids, example.loss, strict=True) if on])


def test_all_replies_of_a_chat_carry_loss_and_nothing_else(tokenizer: ChatTokenizer) -> None:
    chat = [said("system", "Be kind."), *CHATS[0], *CHATS[1]]
    example = encode(tokenizer, chat, 512)
    assert learned(tokenizer, example) == "The answer is 0 and bees.<|end|>The answer is 1 and bees.<|end|>"
    assert list(example.ids) == tokenizer.render(chat, generation_prompt=False)


def test_a_demonstration_carries_loss_on_its_last_reply_only(tokenizer: ChatTokenizer) -> None:
    prompt = tokenizer.render([*CHATS[0], CHATS[1][0]])
    example = last_reply(tokenizer, prompt, "Mine.", 512)
    assert learned(tokenizer, example) == "Mine.<|end|>"
    assert list(example.ids[: len(prompt)]) == prompt


def test_a_template_that_rewrites_earlier_turns_teaches_the_last_reply(tiny_llama: Path) -> None:
    tokenizer = ChatTokenizer.load(tiny_llama)
    tokenizer.hf.chat_template = "{{ messages|length }}" + tokenizer.hf.chat_template
    assert learned(tokenizer, encode(tokenizer, [*CHATS[0], *CHATS[1]], 512)) == "The answer is 1 and bees.<|end|>"


def test_what_the_template_refuses_is_left_out(tiny_llama: Path) -> None:
    tokenizer = ChatTokenizer.load(tiny_llama)
    tokenizer.hf.chat_template = "{{ raise_exception('no') }}"
    assert encode(tokenizer, CHATS[0], 512) is None


def test_a_long_chat_loses_its_oldest_tokens(tokenizer: ChatTokenizer) -> None:
    whole = encode(tokenizer, CHATS[0], 512)
    assert encode(tokenizer, CHATS[0], 6) == Example(whole.ids[-6:], whole.loss[-6:])


def test_held_out_prompts_are_never_trained_on_and_few_prompts_are_not_split() -> None:
    doubled = CHATS + CHATS
    training, held = hold_out(doubled, 0.2, 0)
    assert sorted(training + held) == list(range(40)) and len(held) == 8
    assert not {doubled[i][0]["content"] for i in training} & {doubled[i][0]["content"] for i in held}
    assert hold_out(doubled, 0.2, 0) == (training, held) != hold_out(doubled, 0.2, 1)
    assert hold_out(CHATS[:4], 0.2, 0) == ([0, 1, 2, 3], [])


@torch.no_grad()
def test_the_loss_is_that_of_the_assistants_tokens_by_transformers_own_logits(model: CausalModel, tokenizer: ChatTokenizer, tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    examples = [encode(tokenizer, chat, 512) for chat in CHATS[:5]]
    total, count = 0.0, 0
    for example in examples:
        ids = torch.tensor([example.ids])
        logits = theirs(ids).logits[0, :-1]
        on = torch.tensor(example.loss[1:])
        total += float(F.cross_entropy(logits[on], ids[0, 1:][on], reduction="sum"))
        count += int(on.sum())
    assert mean_loss(AdapterModule(model, None), examples, model.pad_id) == pytest.approx(total / count, abs=1e-4)


def test_the_held_out_loss_falls_and_only_the_adapter_changes(model: CausalModel, tokenizer: ChatTokenizer) -> None:
    examples = [encode(tokenizer, chat, 512) for chat in CHATS]
    before = {name: value.clone() for name, value in model.named_parameters()}
    model.lora.create("other", r=4, seed=5)
    other = {name: value.clone() for name, value in model.lora.parameters("other").items()}
    result = finetune(model, examples[:15], examples[15:], QUICK, adapter="new", seed=1)
    try:
        assert result.loss_after < result.loss_before - 1.0 and result.kept == result.passes == 4
        assert result.curve[0] == pytest.approx(mean_loss(AdapterModule(model, None), examples[15:], 0), abs=1e-3)
        assert min(result.curve) == pytest.approx(mean_loss(AdapterModule(model, "new"), examples[15:], 0), abs=1e-3)
        assert all(torch.equal(value, before[name]) for name, value in model.named_parameters() if name in before)
        assert all(torch.equal(value, other[name]) for name, value in model.lora.parameters("other").items())
    finally:
        model.lora.delete("other")
        model.lora.delete("new")


def test_the_best_pass_is_kept_and_a_run_that_gets_worse_ends_early(model: CausalModel, tokenizer: ChatTokenizer) -> None:
    """Held-out replies that the training replies contradict: any step away from the base makes them less likely."""
    good = [encode(tokenizer, chat, 512) for chat in CHATS[:6]]
    bad = [Example((*e.ids[:-1], 300), e.loss) for e in good]
    held = [Example(e.ids, (False,) * (len(e.ids) - 1) + (True,)) for e in good]
    training = [Example(e.ids, (False,) * (len(e.ids) - 1) + (True,)) for e in bad]
    result = finetune(model, training, held, replace(QUICK, passes=20, patience=2), adapter="new")
    try:
        assert result.kept < result.passes < 20 and "no lower held-out loss" in result.stopped
        at = mean_loss(AdapterModule(model, "new"), held, 0)
        assert at == pytest.approx(min(result.curve), abs=1e-3) and result.curve[-1] > min(result.curve)
    finally:
        model.lora.delete("new")


def test_the_clock_ends_a_run(model: CausalModel, tokenizer: ChatTokenizer) -> None:
    examples = [encode(tokenizer, chat, 512) for chat in CHATS]
    result = finetune(model, examples, [], replace(QUICK, max_seconds=1e-9), adapter="new")
    model.lora.delete("new")
    assert result.steps == 1 and result.stopped == "the time is up" and result.loss_before is None


def test_what_was_learned_before_the_time_was_up_is_kept_even_within_the_first_pass(model: CausalModel, tokenizer: ChatTokenizer) -> None:
    examples = [encode(tokenizer, chat, 512) for chat in CHATS]
    short = replace(QUICK, tokens_per_batch=1, max_steps=12, lr=1e-2)  # a chat a step: 15 of them are a pass
    result = finetune(model, examples[:15], examples[15:], short, adapter="new", seed=1)
    try:
        assert (result.steps, result.passes, result.kept) == (12, 1, 1) and len(result.curve) == 2
        assert result.loss_after == pytest.approx(mean_loss(AdapterModule(model, "new"), examples[15:], 0), abs=1e-6)
        assert result.loss_after < result.loss_before
    finally:
        model.lora.delete("new")


def test_a_run_is_the_same_bit_for_bit_when_run_again_for_as_many_steps(model: CausalModel, tokenizer: ChatTokenizer) -> None:
    examples = [encode(tokenizer, chat, 512) for chat in CHATS]
    got = []
    for name in ("one", "two"):
        finetune(model, examples[:15], examples[15:], replace(QUICK, max_steps=5), adapter=name, seed=3)
        got.append([p.detach().clone() for p in model.lora.parameters(name).values()])
        model.lora.delete(name)
    assert all(torch.equal(a, b) for a, b in zip(*got, strict=True))


def test_nothing_to_train_on_is_said(model: CausalModel) -> None:
    with pytest.raises(SFTError, match="no chat is left"):
        finetune(model, [Example((1, 2), (True, False))], [], QUICK, adapter="new")


def test_chats_become_a_version_without_a_gate_from_which_the_next_can_go_on(tmp_path: Path, model: CausalModel, tokenizer: ChatTokenizer) -> None:
    registry = AdapterRegistry(tmp_path)
    manifest, result = publish_finetuned(model, tokenizer, CHATS, QUICK, registry, name="bees")
    assert registry.verify("v000001") == manifest
    assert (manifest.kind, manifest.parent, manifest.gate, manifest.round) == ("sft", "base", None, None)
    assert manifest.extra["name"] == "bees" and manifest.extra["sft"]["loss_after"] == result.loss_after < result.loss_before
    assert model.lora.names() == []
    second, _ = publish_finetuned(model, tokenizer, CHATS, QUICK, registry, parent="v000001")
    assert second.parent == "v000001" and second.extra["sft"]["loss_before"] < result.loss_before - 1.0


def test_what_learned_nothing_is_not_published(tmp_path: Path, model: CausalModel, tokenizer: ChatTokenizer) -> None:
    with pytest.raises(NothingLearned, match="nothing learned"):
        publish_finetuned(model, tokenizer, CHATS, replace(QUICK, lr=1e-12, passes=1), AdapterRegistry(tmp_path))
    assert AdapterRegistry(tmp_path).versions() == [] and model.lora.names() == []
