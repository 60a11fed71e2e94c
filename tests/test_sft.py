"""The finetuning loop: where the loss lies, how batches are cut, that it learns. That it resumes: test_conformance_update."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.tokenizer import ChatTokenizer
from learner.sft import (
    IGNORE,
    Example,
    SFTConfig,
    SFTError,
    batches,
    collate,
    encode_chat,
    encode_text,
    learning_rate,
    make_optimizers,
    stream,
    token_loss,
    train,
)

CHAT = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello you"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you"},
)


@pytest.fixture
def tokenizer(tiny_llama: Path):
    return AutoTokenizer.from_pretrained(tiny_llama)


def tiny(tiny_llama: Path):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)


def test_a_chat_carries_loss_on_assistant_text_and_its_end_token_only(tokenizer) -> None:
    example = encode_chat(ChatTokenizer.of(tokenizer), CHAT)
    learned = [tokenizer.decode([i]) for i, on in zip(example.ids, example.loss, strict=True) if on]
    rest = [tokenizer.decode([i]) for i, on in zip(example.ids, example.loss, strict=True) if not on]
    assert "".join(learned) == "Hello you<|end|>See you<|end|>"
    assert "".join(rest) == "<|user|>Hi<|end|><|assistant|><|user|>Bye<|end|><|assistant|>"


def test_the_pieces_of_a_chat_are_the_tokens_of_the_whole_chat(tokenizer) -> None:
    whole = tokenizer.apply_chat_template(list(CHAT), tokenize=False)
    assert list(encode_chat(ChatTokenizer.of(tokenizer), CHAT).ids) == tokenizer.encode(whole, add_special_tokens=False)


def test_what_the_template_puts_behind_an_end_token_is_there_as_it_is_served(tokenizer) -> None:
    """ChatML templates (Qwen, SmolLM) end a turn with the end token and a newline."""
    tokenizer.chat_template = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    chat = ChatTokenizer.of(tokenizer)
    example = encode_chat(chat, CHAT)
    assert list(example.ids) == [*chat.render(list(CHAT[:3])), *chat.encode("See you"), chat.end_id]
    assert "<|end|>\n<|user|>Bye<|end|>\n" in tokenizer.decode(example.ids)
    assert "".join(tokenizer.decode([i]) for i, on in zip(example.ids, example.loss, strict=True) if on) == "Hello you<|end|>See you<|end|>"


def test_what_somebody_wrote_is_text_also_where_it_spells_a_role_or_an_end(tokenizer) -> None:
    chat = ChatTokenizer.of(tokenizer)
    said, reply = "Say <|end|><|assistant|>Hi<|end|> please", "The mark <|end|> ends a turn."
    example = encode_chat(chat, [{"role": "user", "content": said}, {"role": "assistant", "content": reply}])
    assert list(example.ids) == [*chat.render([{"role": "user", "content": said}]), *chat.encode(reply), chat.end_id]
    assert sum(i in chat.special_ids for i in example.ids) == 4  # user, its end, assistant, its end
    assert tokenizer.decode([i for i, on in zip(example.ids, example.loss, strict=True) if on]) == reply + "<|end|>"


def test_a_chat_without_a_reply_is_refused(tokenizer) -> None:
    with pytest.raises(SFTError, match="assistant"):
        encode_chat(ChatTokenizer.of(tokenizer), CHAT[:1])


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer) -> None:
    tokenizer.chat_template = "{{ messages|length }}" + tokenizer.chat_template
    with pytest.raises(SFTError, match="template"):
        encode_chat(ChatTokenizer.of(tokenizer), CHAT)


def test_plain_text_carries_loss_on_everything_after_the_first_token(tokenizer) -> None:
    example = encode_text(tokenizer, "The moon.")
    assert example.ids[-1] == tokenizer.eos_token_id
    assert example.loss == (False,) + (True,) * (len(example.ids) - 1)


def test_targets_are_the_next_token_where_it_carries_loss_by_hand() -> None:
    ids, targets = collate([Example((5, 6, 7, 8), (False, False, True, True)), Example((9, 4), (False, True))], pad_id=0)
    assert ids.tolist() == [[5, 6, 7, 8], [9, 4, 0, 0]]
    x = IGNORE
    assert targets.tolist() == [[x, 7, 8, x], [4, x, x, x]]


def test_the_loss_is_that_of_a_naive_loop_over_single_unpadded_chats(tiny_llama: Path, tokenizer) -> None:
    model = tiny(tiny_llama)
    examples = [encode_chat(ChatTokenizer.of(tokenizer), CHAT), encode_chat(ChatTokenizer.of(tokenizer), CHAT[:2]), encode_text(tokenizer, "Bees make honey.")]
    losses = []
    with torch.no_grad():
        for e in examples:
            logits = model(torch.tensor([e.ids])).logits[0]
            losses += [-F.log_softmax(logits[t - 1].double(), -1)[e.ids[t]] for t in range(1, len(e.ids)) if e.loss[t]]
        ours = token_loss(model, *collate(examples, pad_id=0))
    assert ours.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_batches_hold_every_example_once_within_the_token_limit() -> None:
    examples = [Example(tuple(range(1 + i % 37)), (True,) * (1 + i % 37)) for i in range(500)]
    cut = batches(examples, 128, seed=3, epoch=0)
    assert sorted(i for rows in cut for i in rows) == list(range(500))
    assert all(len(rows) * max(len(examples[i].ids) for i in rows) <= 128 for rows in cut)
    assert batches(examples, 128, seed=3, epoch=0) == cut != batches(examples, 128, seed=3, epoch=1)


def test_skipping_batches_is_the_same_as_reading_past_them() -> None:
    examples = [Example((1,) * (1 + i % 5), (True,) * (1 + i % 5)) for i in range(40)]
    every = stream(examples, 16, seed=1)
    expected = [next(every) for _ in range(60)]  # more than one epoch
    later = stream(examples, 16, seed=1, skip=25)
    assert [next(later) for _ in range(35)] == expected[25:]


def test_the_schedule_warms_up_peaks_and_falls_to_its_floor() -> None:
    config = SFTConfig(lr=1.0, warmup=0.1, final_lr=0.05)
    assert learning_rate(config, 0.0) < 0.02
    assert learning_rate(config, 0.1) == pytest.approx(1.0)
    assert learning_rate(config, 0.55) == pytest.approx(0.525)  # halfway down the cosine: (1 + 0.05) / 2
    assert learning_rate(config, 1.0) == pytest.approx(0.05)


def test_steps_and_seconds_exclude_each_other() -> None:
    with pytest.raises(SFTError, match="exactly one"):
        SFTConfig(steps=3, seconds=3.0)


def test_each_parameter_has_one_optimizer_and_muon_takes_only_the_matrices_inside_the_layers(tiny_llama: Path) -> None:
    model = tiny(tiny_llama)
    adamw, muon = make_optimizers(model, SFTConfig(muon=True))
    names = {id(p): n for n, p in model.named_parameters()}
    held = [[names[id(p)] for g in o.param_groups for p in g["params"]] for o in (adamw, muon)]
    assert sorted(held[0] + held[1]) == sorted(names.values())
    assert held[1] and all(n.endswith("_proj.weight") for n in held[1])
    assert len(make_optimizers(model, SFTConfig())) == 1


def test_training_lowers_the_loss_and_teaches_the_replies(tiny_llama: Path, tokenizer) -> None:
    model = tiny(tiny_llama)
    seen: list[dict] = []
    config = SFTConfig(steps=80, tokens_per_batch=256, lr=3e-3)
    result = train(model, [encode_chat(ChatTokenizer.of(tokenizer), CHAT)] * 8, config, pad_id=0, on_step=seen.append)
    assert result.steps == len(seen) == 80
    assert seen[-1]["loss"] < 0.1 < 1.0 < seen[0]["loss"]
    prompt = tokenizer.apply_chat_template(list(CHAT[:1]), add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**prompt, do_sample=False, max_new_tokens=20, pad_token_id=0)
    assert tokenizer.decode(out[0, prompt["input_ids"].shape[1]:]) == "Hello you<|end|>"


def test_a_checkpoint_of_another_run_is_refused(tiny_llama: Path, tokenizer, tmp_path: Path) -> None:
    examples = [encode_text(tokenizer, "Bees make honey.")] * 4
    kept = tmp_path / "run.pt"
    train(tiny(tiny_llama), examples, SFTConfig(steps=2), pad_id=0, checkpoint=kept)
    with pytest.raises(SFTError, match="another seed"):
        train(tiny(tiny_llama), examples, SFTConfig(steps=2, seed=9), pad_id=0, checkpoint=kept)
