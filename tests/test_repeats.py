"""Unlikelihood of repeated sentences: what is made of a reply, the probability against a naive product, and that training lowers it."""

import re
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from engine.tokenizer import ChatTokenizer
from learner.sft import SFTConfig, collate, token_loss, train
from learner.starter import repeats
from learner.starter.recipe import ASSISTANT
from learner.starter.repeats import Unlikely, broken_off, late, opened, probability, repeated, small
from learner.starter.topics import topics
from learner.text_checks import faults


@pytest.fixture(scope="module")
def shipped():
    return AutoModelForCausalLM.from_pretrained(ASSISTANT, dtype=torch.float32), AutoTokenizer.from_pretrained(ASSISTANT)


def test_prose_goes_on_with_one_of_its_own_sentences() -> None:
    seen = {repeated("Bees fly. Bees dance! Are they old?", Random(seed)) for seed in range(60)}
    both, three = "Bees fly. Bees dance!", "Bees fly. Bees dance! Are they old?"
    assert seen == {(both, " Bees fly."), (both, " Bees dance!"), (three, " Bees fly."), (three, " Bees dance!"), (three, " Are they old?")}


def test_a_list_goes_on_with_one_of_its_own_items_under_the_next_mark() -> None:
    seen = {repeated("Facts:\n1. Bees fly.\n2. Bees dance.", Random(seed)) for seed in range(60)}
    assert seen == {("Facts:\n1. Bees fly.", "\n2. Bees fly."), ("Facts:\n1. Bees fly.\n2. Bees dance.", "\n3. Bees fly."),
                    ("Facts:\n1. Bees fly.\n2. Bees dance.", "\n3. Bees dance.")}  # fmt: skip
    assert repeated("- Bees fly.\n- Bees dance.", Random(1))[1].startswith("\n- Bees ")


def test_a_list_breaks_off_behind_a_mark() -> None:
    assert {broken_off("Facts:\n1. Bees fly.\n2. Bees dance.", Random(seed)) for seed in range(60)} == {
        ("Facts:\n1. Bees fly.", "\n2."), ("Facts:\n1. Bees fly.\n2. Bees dance.", "\n3.")}  # fmt: skip
    assert broken_off("- Bees fly.\n- Bees dance.", Random(1))[1] == "\n-"
    assert broken_off("Bees fly. Bees dance! Are they old?", Random(1)) is None


def test_a_list_begins_with_a_fact_from_further_down() -> None:
    numbered, bulleted = "Facts:\n1. Bees fly.\n2. Bees dance.\n3. Bees hum.", "- Bees are insects.\n- Bees fly.\n- Bees dance."
    assert {late(numbered, Random(seed)) for seed in range(60)} == {("Facts:\n1.", " Bees dance."), ("Facts:\n1.", " Bees hum.")}
    assert {late(bulleted, Random(seed)) for seed in range(60)} == {("-", " Bees dance.")}  # the second may be the first fact
    assert late("Bees fly. They dance. They hum.", Random(0)) is None and late("1. Bees fly.\n2. Bees dance.", Random(0)) is None


def test_a_sentence_begins_with_a_small_letter() -> None:
    seen = {small("Happy to help! Bees fly. They dance.", Random(seed)) for seed in range(60)}
    assert seen == {("Happy to help!", " bees"), ("Happy to help! Bees fly.", " they")}
    assert small("Bees fly.", Random(0)) is None and small("Sure! Here:\n- Bees fly.\n- Bees dance.", Random(0)) is None
    for seed in range(40):
        asked, told = opened(Random(seed))
        assert small(told["content"], Random(seed)) and not faults(told["content"]) and asked["role"] == "user"


@pytest.mark.parametrize("reply", ["Bees fly.", "Bees fly. They dance.", "- Bees fly.", "x = 1\ny = 2\nz = 3", ""])
def test_what_says_too_little_is_left_alone(reply: str) -> None:
    assert repeated(reply, Random(0)) is None


def test_examples_are_faulty_chats_with_loss_on_the_repetition_alone(shipped) -> None:
    _, tokenizer = shipped
    rows = repeats.examples(ChatTokenizer.of(tokenizer), 200, 3)
    assert rows == repeats.examples(ChatTokenizer.of(tokenizer), 200, 3) and len(rows) == 200
    flagged = broken = begun = lower = 0
    further = {fact for t in topics() if not t.how for wordings in t.facts[1:] for fact in wordings}
    for row in rows:
        text = tokenizer.decode(row.ids)
        assert tuple(tokenizer.encode(text, add_special_tokens=False)) == row.ids  # cut where the tokenizer cuts
        again = tokenizer.decode([t for t, on in zip(row.ids, row.loss, strict=True) if on])
        reply = text.rsplit("<|assistant|>", 1)[1]
        assert reply.endswith(again)
        if off := again.endswith("<|end|>"):
            assert again in ("\n-<|end|>", *(f"\n{n}.<|end|>" for n in range(2, 8)))
        elif first := f"\n{reply}".removesuffix(again).endswith(("\n1.", "\n-")):
            assert again.strip() in further
        elif uncapped := re.fullmatch(r" [a-z][^ ]*", again) is not None:
            assert reply[: -len(again)].endswith((".", "!", "?"))
        else:
            assert again.split(" ", 1)[1] in reply[: -len(again)]
        broken += off
        begun += not off and first
        lower += not off and not first and uncapped
        flagged += any(f.name == "repeated sentence" for f in faults(reply, "stop"))
    assert flagged > 80 and 10 < broken < 50 and 10 < begun < 50 and 10 < lower < 60  # short items such as "Red" are no sentences


@torch.no_grad()
def test_the_probability_is_the_product_of_each_tokens(shipped) -> None:
    model, tokenizer = shipped
    rows = repeats.examples(ChatTokenizer.of(tokenizer), 6, 5)
    for row, got in zip(rows, probability(model, rows, tokenizer.pad_token_id).tolist(), strict=True):
        chances = model(torch.tensor([row.ids])).logits[0].softmax(-1)
        want = 1.0
        for t, on in enumerate(row.loss):
            want *= float(chances[t - 1, row.ids[t]]) if on else 1.0
        assert got == pytest.approx(want, rel=1e-3, abs=1e-12)


@torch.no_grad()
def test_the_loss_adds_the_mean_unlikelihood(shipped) -> None:
    model, tokenizer = shipped
    rows = repeats.examples(ChatTokenizer.of(tokenizer), 4, 7)
    ids, targets = collate(rows, tokenizer.pad_token_id)
    p = probability(model, rows, tokenizer.pad_token_id).double()
    want = float(token_loss(model, ids, targets)) + 50 * float(-(1 - p).log().mean())
    got = Unlikely(rows, 50.0, tokenizer.pad_token_id, tokens=100_000, seed=0)(model, ids, targets)
    assert float(got) == pytest.approx(want, rel=1e-5)


@torch.no_grad()
def test_which_rows_come_follows_from_the_batch_so_that_a_killed_run_resumes_as_it_was(shipped) -> None:
    model, tokenizer = shipped
    rows = repeats.examples(ChatTokenizer.of(tokenizer), 12, 7)
    one, other = (collate(rows[i : i + 4], tokenizer.pad_token_id) for i in (0, 4))
    first, anew = (Unlikely(rows, 1e4, tokenizer.pad_token_id, tokens=200, seed=0) for _ in range(2))
    assert len(first.batches) > 3
    before = float(first(model, *one)), float(first(model, *other))
    assert (float(anew(model, *other)), float(first(model, *one))) == (before[1], before[0])


def test_half_of_the_examples_are_lists(shipped) -> None:
    _, tokenizer = shipped
    begun = [tokenizer.decode(row.ids).rsplit("<|assistant|>", 1)[1] for row in repeats.examples(ChatTokenizer.of(tokenizer), 300, 4)]
    assert 0.5 < sum("\n- " in f"\n{reply}" or "\n2. " in reply for reply in begun) / 300 < 0.9  # and some of the corpus's own


def test_what_the_model_finds_likeliest_is_kept(shipped) -> None:
    model, tokenizer = shipped
    rows = repeats.examples(ChatTokenizer.of(tokenizer), 90, 6)
    kept = repeats.likeliest(model, rows, 20, tokenizer.pad_token_id)
    with torch.no_grad():
        each = [float(probability(model, [row], tokenizer.pad_token_id)) for row in rows]
    best = sorted(range(90), key=lambda i: -each[i])[:20]
    assert sorted(row.ids for row in kept) == sorted(rows[i].ids for i in best) and all(row in rows for row in kept)


def test_training_with_it_makes_a_learned_repetition_unlikely(shipped) -> None:
    """A small model is taught to repeat; with the loss it is not, and the rest is learned as well."""
    _, tokenizer = shipped
    rows = repeats.examples(ChatTokenizer.of(tokenizer), 8, 9)
    likely = []
    for weight in (0.0, 50.0):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=True))
        loss = Unlikely(rows, weight, tokenizer.pad_token_id, tokens=100_000, seed=0)
        train(model, rows, SFTConfig(steps=120, lr=2e-2), pad_id=tokenizer.pad_token_id, loss_of=loss)
        likely.append(float(probability(model, rows, tokenizer.pad_token_id).detach().mean()))
    assert likely[0] > 0.3 and likely[1] < 0.5 * likely[0]
