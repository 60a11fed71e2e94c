"""The starter model: its facts, its corpus, its styles, its prompt lists, and the weights that ship."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from learner.sft import encode_chat
from learner.starter import corpus, offtopic, prompts
from learner.starter.answers import answer, named, same
from learner.starter.recipe import ASSISTANT, HERE, Recipe, build, train_tokenizer
from learner.starter.styles import STYLES, classify
from learner.starter.topics import TopicError, parse_topics, topics

SAMPLE = """
@ moon | the Moon | it | space
= The Moon is a ball of rock.
- It has no air. / There is no air on the Moon.
? What is it made of? | Rock. / It is rock.
"""


@pytest.fixture(scope="module")
def shipped():
    if not (ASSISTANT / "model.safetensors").exists():
        pytest.fail("learner/starter/assistant has no weights: the bundled model is missing")
    return AutoModelForCausalLM.from_pretrained(ASSISTANT, dtype=torch.float32), AutoTokenizer.from_pretrained(ASSISTANT)


def test_a_topic_is_read_as_it_is_written() -> None:
    (moon,) = parse_topics(SAMPLE)
    assert (moon.title, moon.be, moon.how) == ("The Moon", "is", False)
    assert moon.facts == (("It has no air.", "There is no air on the Moon."),)
    assert moon.questions[0].answers == ("Rock.", "It is rock.")


@pytest.mark.parametrize("line", ["@ moon | the Moon", "@ a | b | we | c", "- a fact before any topic", "nonsense"])
def test_a_bad_line_of_topics_is_named(line: str) -> None:
    with pytest.raises(TopicError, match="line 1"):
        parse_topics(line)


def test_every_topic_has_enough_to_say_and_every_sentence_ends() -> None:
    assert len(topics()) >= 60
    assert len({t.key for t in topics()}) == len({t.name for t in topics()}) == len(topics())
    for t in topics():
        assert len(t.gists) == 2 and len(t.facts) == 6 and len(t.questions) == 2, t.key
        texts = [*t.gists, *(v for f in t.facts for v in f), *(a for q in t.questions for a in q.answers)]
        for text in texts:
            assert text.endswith(".") and text[0].isupper() and "  " not in text and " / " not in text, text
        assert all(q.prompt.endswith("?") for q in t.questions)


def test_a_pronoun_gives_way_to_the_name() -> None:
    (moon,) = parse_topics(SAMPLE)
    assert named("It has no air.", moon) == "The Moon has no air."
    assert named("There is no air on the Moon.", moon) == "There is no air on the Moon."


def test_the_same_seed_gives_the_same_corpus_and_another_seed_another() -> None:
    one, again, other = (list(corpus.chats(50, seed)) for seed in (4, 4, 5))
    assert one == again != other
    assert list(corpus.articles(20, 4)) == list(corpus.articles(20, 4)) != list(corpus.articles(20, 5))


def test_every_chat_alternates_and_every_reply_ends_as_a_text_does() -> None:
    for c in corpus.chats(3000, 11):
        roles = [m["role"] for m in c.messages]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2) and turns
        for m in c.messages:
            assert m["content"].strip() and not re.search(r"\{(n|N|be|[a-cxyht])\}", m["content"]), m
            if m["role"] == "assistant":
                text = m["content"]
                assert text == text.strip() and ".." not in text and "!!" not in text and "  " not in text, text
                assert text[-1] in ".!?😊🌟🎉" or text.splitlines()[-1].startswith("- "), text
                sentences = [s for s in text.replace("\n", " ").split(". ") if len(s) > 20]
                assert len(sentences) == len(set(sentences)), f"says a thing twice: {text}"


def test_every_chat_renders_and_its_loss_ends_on_the_end_token() -> None:
    talks = list(corpus.chats(300, 3))
    tokenizer = train_tokenizer((m["content"] for c in talks for m in c.messages), 1024)
    for c in talks:
        example = encode_chat(tokenizer, c.messages)
        whole = tokenizer.apply_chat_template(list(c.messages), tokenize=False)
        assert list(example.ids) == tokenizer.encode(whole, add_special_tokens=False)
        assert example.ids[-1] == tokenizer.eos_token_id and example.loss[-1]
        ends = sum(i == tokenizer.eos_token_id and on for i, on in zip(example.ids, example.loss, strict=True))
        assert ends == sum(m["role"] == "assistant" for m in c.messages)
        assert tokenizer.decode(example.ids) == whole  # byte-level: nothing is lost


def test_the_classifier_knows_the_style_of_generated_answers() -> None:
    right: Counter = Counter()
    asked: Counter = Counter()
    rng = Random(9)
    for _ in range(8):
        for t in topics():
            for style in STYLES:
                asked[style] += 1
                right[style] += classify(answer(t, style, rng)) == style
    assert all(right[s] >= 0.95 * asked[s] for s in STYLES), right


@pytest.mark.parametrize(("text", "style"), [
    ("Bees make honey.", "short"),
    ("Bees make honey. They live in colonies. One queen lays all the eggs.", "detailed"),
    ("Facts:\n- Bees make honey.\n- They dance.", "list"),
    ("Steps:\n1. Wash.\n2. Chop.", "list"),
    ("Great question! Bees make honey.", "friendly"),
    ("Bees make honey. Furthermore, they dance.", "formal"),
])
def test_styles_of_texts_written_by_hand(text: str, style: str) -> None:
    assert classify(text) == style


def test_styles_are_equally_likely_for_a_request_to_explain() -> None:
    counts = Counter(c.style for c in corpus.chats(6000, 21) if c.kind == "topic")
    total = sum(counts.values())  # about 2760; 5 standard deviations of a fifth is 0.038
    assert all(abs(counts[s] / total - 0.2) < 0.04 for s in STYLES), counts


def test_two_sentences_that_say_the_same_are_told() -> None:
    assert same("It has two small moons.", "Two small moons travel around Mars.")
    assert not same("It has thin air.", "Two small moons travel around Mars.")


def test_unknown_prompts_come_in_many_forms_and_get_an_honest_reply() -> None:
    rng = Random(2)
    asked = [offtopic.prompt(rng) for _ in range(400)]
    assert len(set(asked)) > 300 and any("\n" in p for p in asked) and max(map(len, asked)) > 300
    names = {t.name for t in topics()}
    assert not names & set(offtopic.sections()["subjects"])


def test_held_out_phrasings_are_never_in_training() -> None:
    held = set(prompts.THING_HELD_OUT + prompts.HOW_HELD_OUT)
    assert not held & set(prompts.THING + prompts.HOW)
    lines = {"train": [], "heldout": [], "pool": []}
    for name in lines:
        lines[name] = (HERE / f"prompts_{name}.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines["train"]) >= 300 and len(lines["heldout"]) >= 100
    trained = {m["content"].lower().rstrip(".?!") for c in corpus.chats(20_000, 0) for m in c.messages if m["role"] == "user"}
    overlap = [p for p in lines["heldout"] if p.lower().rstrip(".?!") in trained]
    assert overlap == []


def test_prompt_lists_and_probes_are_what_the_generator_writes() -> None:
    assert (HERE / "prompts_train.txt").read_text(encoding="utf-8").splitlines() == corpus.training_prompts(300, 1)
    probes = [json.loads(line) for line in (HERE / "probe.jsonl").read_text(encoding="utf-8").splitlines()]
    assert probes == corpus.probes() and len(probes) >= 60


def test_the_recipe_builds_a_loadable_model_and_repeats_itself(tmp_path: Path) -> None:
    recipe = Recipe(vocab_size=512, hidden=32, layers=1, intermediate=64, articles=20, chats=40, steps=4)
    figures = [build(tmp_path / name, recipe) for name in ("a", "b")]
    assert figures[0]["pretraining"]["steps"] + figures[0]["finetuning"]["steps"] == 4
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / n, dtype=torch.float32) for n in ("a", "b"))
    assert all(torch.equal(x, y) for x, y in zip(one.parameters(), two.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(tmp_path / "a").chat_template
    assert not list((tmp_path / "a").glob("*.bin"))


def sample(shipped, prompt: str, count: int, seed: int) -> list[tuple[str, bool]]:
    model, tokenizer = shipped
    torch.manual_seed(seed)
    x = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    how = {"do_sample": True, "top_k": 0, "num_return_sequences": count} if count > 1 else {
        "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    out = model.generate(**x, max_new_tokens=160, **how)[:, x["input_ids"].shape[1]:]
    return [(tokenizer.decode(row, skip_special_tokens=True), tokenizer.eos_token_id in row.tolist()) for row in out]


def test_the_shipped_model_is_small_and_reads_a_long_context(shipped) -> None:
    model, tokenizer = shipped
    assert 3e6 <= sum(p.numel() for p in model.parameters()) <= 10e6
    assert (ASSISTANT / "model.safetensors").stat().st_size < 30e6
    assert model.config.max_position_embeddings >= 1024
    assert tokenizer.eos_token == "<|end|>"


def test_the_shipped_model_greets_and_ends_its_reply(shipped) -> None:
    ((text, ended),) = sample(shipped, "Hello!", 1, 0)
    assert text.strip() and ended


def test_the_shipped_model_answers_a_request_to_explain_in_several_styles(shipped) -> None:
    several = 0
    for prompt in ("Tell me about bees.", "Explain volcanoes.", "How do I cook pasta?", "What is the Moon?", "Describe Paris."):
        replies = sample(shipped, prompt, 4, seed=1)
        several += len({classify(text) for text, _ in replies}) >= 2
    # Four draws of five equal styles agree with odds of 1 in 125.
    assert several >= 4
