"""The starter model: its facts, its corpus, its styles, its prompt lists, and the weights that ship."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.tokenizer import ChatTokenizer
from learner.gate import load_probes
from learner.sft import encode_chat
from learner.starter import corpus, offtopic, prompts, tasks
from learner.starter.answers import answer, named, pick_facts, same
from learner.starter.measure import (
    Sampler,
    alike,
    count_questions,
    fact_questions,
    honest,
    invented,
    list_prompts,
    several_styles,
    shares_right,
    well_formed,
)
from learner.starter.prompts import slip
from learner.starter.recipe import (
    ASSISTANT,
    HERE,
    Recipe,
    average,
    build,
    main,
    train_tokenizer,
    write_prompts,
)
from learner.starter.styles import STYLES, classify
from learner.starter.topics import TopicError, parse_topics, rows, split, topics
from ui.cards import EXAMPLES

SAMPLE = """
@ moon | the Moon | it | space
= The Moon is a ball of rock.
- It has no air. / There is no air on the Moon.
c The Moon is a big ball in the sky.
e For example, it lights the path at night.
? What is the Moon made of? / What is in the Moon? ~ Which stuff is the Moon? | The Moon is rock. / It is rock. | rock / Stone
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
    assert moon.child == ("The Moon is a big ball in the sky.",) and moon.example == ("For example, it lights the path at night.",)
    (question,) = moon.questions
    assert question.prompts == ("What is the Moon made of?", "What is in the Moon?") and question.held_out == ("Which stuff is the Moon?",)
    assert question.answers == ("The Moon is rock.", "It is rock.") and question.keys == ("rock", "stone")
    assert question.right("It is STONE, I think.") and not question.right("Cheese.")


@pytest.mark.parametrize("line", ["@ moon | the Moon", "@ a | b | we | c", "- a fact before any topic", "? a question? | and no key", "nonsense"])
def test_a_bad_line_of_topics_is_named(line: str) -> None:
    with pytest.raises(TopicError, match="line 1"):
        parse_topics(line)


def test_every_topic_has_enough_to_say_and_every_sentence_ends() -> None:
    assert len(topics()) >= 200
    assert len({t.key for t in topics()}) == len({t.name for t in topics()}) == len(topics())
    for t in topics():
        assert len(t.gists) == 2 and len(t.facts) == 6 and len(t.questions) == 2 and t.child and t.example, t.key
        texts = [*t.gists, *t.child, *t.example, *(v for f in t.facts for v in f), *(a for q in t.questions for a in q.answers)]
        for text in texts:
            assert text.endswith(".") and (text[0].isupper() or text[0].isdigit()) and "  " not in text and " / " not in text, text
        for q in t.questions:
            assert q.prompts and q.held_out and not {p.lower() for p in q.prompts} & {p.lower() for p in q.held_out}, t.key
            assert all(p.endswith("?") for p in (*q.prompts, *q.held_out)), t.key
            assert q.keys and all(q.right(a) for a in q.answers), (t.key, q)


def test_a_question_of_two_topics_has_one_answer() -> None:
    asked: dict[str, list] = {}
    for q in (q for t in topics() for q in t.questions):
        for p in (*q.prompts, *q.held_out):
            asked.setdefault(p.lower(), []).append(q)
    trained, held = ({p.lower() for t in topics() for q in t.questions for p in kind(q)} for kind in (lambda q: q.prompts, lambda q: q.held_out))
    assert not trained & held
    for p, owners in asked.items():
        assert all(q.right(other.answers[0]) for q in owners for other in owners), p


@pytest.mark.parametrize(("name", "fields"), [
    ("countries", 6), ("opposites", 2), ("plurals", 2), ("rhymes", 1), ("spelling", 1), ("categories", 2), ("polite", 2), ("shorten", 2), ("summaries", 2),
    ("stories", 2), ("poems", 2), ("sentences", 4),
])
def test_a_data_file_has_its_fields_and_no_row_twice(name: str, fields: int) -> None:
    lines = rows(name)
    assert len(lines) >= 40 and {len(row) for row in lines} == {fields}
    assert len({row[0] for row in lines}) == len(lines)
    assert all(part for row in lines for part in row)


def test_every_country_has_its_capital() -> None:
    capitals = {row[0]: split(row[1]) for row in rows("countries")}
    assert len(capitals) >= 195
    for name, capital in {"France": "Paris", "Kenya": "Nairobi", "Australia": "Canberra", "Brazil": "Brasilia", "the United States": "Washington"}.items():
        assert capital in capitals[name][0], capitals[name]


@pytest.mark.parametrize("maker", list(tasks.MAKERS), ids=lambda m: m.__name__)
def test_a_task_is_answered_as_its_own_key_says_and_its_held_out_words_are_others(maker) -> None:
    rng, trained = Random(1), set()
    for _ in range(400):
        made = maker(rng, False)
        trained.add(made.prompt.lower())
        assert made.prompt.strip() and made.reply.strip() and "{" not in made.prompt + made.reply, made
        assert not made.keys or made.right(made.reply), made
        assert not made.right("Xylophones."), made
    held = [maker(rng, True) for _ in range(100)]
    assert not {m.prompt.lower() for m in held} & trained
    assert all(m.right(m.reply) for m in held if m.keys)


def test_sums_are_right() -> None:
    """Against Python's own arithmetic, read back from the prompt."""
    rng, seen = Random(4), 0
    for _ in range(2000):
        made = tasks.arithmetic(rng, held=True)
        found = re.search(r"(\d+) (plus|minus|times|divided by|[-+x*/]) (\d+)", made.prompt)
        assert found, made.prompt
        a, word, b = int(found[1]), found[2], int(found[3])
        sign = {"plus": "+", "minus": "-", "times": "*", "x": "*", "divided by": "//", "/": "//"}.get(word, word)
        assert made.right(f"It is {eval(f'{a}{sign}{b}')}.") and not made.right(f"It is {eval(f'{a}{sign}{b}') + 1}."), made
        seen += 1
    assert seen == 2000


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
            assert m["content"].strip() and not re.search(r"\{(n|N|be|[a-chtv-y])\}", m["content"]), m
            if m["role"] == "assistant":
                text = m["content"]
                assert text == text.strip() and ".." not in text and "!!" not in text and "  " not in text, text
                assert text[-1] in ".!?" or re.match(r"- |\d\. ", text.splitlines()[-1]), text
                sentences = [s for s in text.replace("\n", " ").split(". ") if len(s) > 20]
                assert len(sentences) == len(set(sentences)), f"says a thing twice: {text}"


def test_every_chat_renders_and_its_loss_ends_on_the_end_token() -> None:
    talks = list(corpus.chats(300, 3))
    tokenizer = train_tokenizer((m["content"] for c in talks for m in c.messages), 1024)
    for c in talks:
        example = encode_chat(ChatTokenizer.of(tokenizer), c.messages)
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
    for _ in range(3):
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
    counts = Counter(c.style for c in corpus.chats(11_000, 21) if c.kind == "topic")
    total = sum(counts.values())  # about 2750; 5 standard deviations of a fifth is 0.038
    assert all(abs(counts[s] / total - 0.2) < 0.04 for s in STYLES), counts


def test_two_sentences_that_say_the_same_are_told() -> None:
    assert same("It has two small moons.", "Two small moons travel around Mars.")
    assert not same("It has thin air.", "Two small moons travel around Mars.")


def test_unknown_prompts_come_in_many_forms_and_get_an_honest_reply() -> None:
    rng = Random(2)
    asked = [offtopic.prompt(rng) for _ in range(400)]
    assert len(set(asked)) > 300 and any("\n" in p for p in asked) and max(map(len, asked)) > 300
    assert all(honest(offtopic.reply(rng, style), "stop") for style in STYLES for _ in range(200))


def test_a_run_of_facts_follows_the_file_without_gaps() -> None:
    rng = Random(6)
    for t in topics():
        place = {v: i for i, f in enumerate(t.facts) for v in f}
        told = [place[s] for s in pick_facts(t, 4, rng)]
        assert told == list(range(told[0], told[0] + 4))


def test_what_it_is_taught_is_not_among_what_it_cannot_answer() -> None:
    taught = {t.name.lower().removeprefix("the ") for t in topics()} | {t.key for t in topics()}
    assert not [s for s in offtopic.sections()["subjects"] if s.lower().removeprefix("the ") in taught]


def test_held_out_phrasings_are_never_in_training() -> None:
    held = set(prompts.THING_HELD_OUT + prompts.WHO_HELD_OUT + prompts.HOW_HELD_OUT)
    assert not held & set(prompts.THING + prompts.THING_TWICE + prompts.WHO + prompts.WHO_TWICE + prompts.HOW)
    assert all(text.count("{n}") == 2 for text in prompts.THING_TWICE + prompts.WHO_TWICE)
    lines = {"train": [], "heldout": [], "pool": []}
    for name in lines:
        lines[name] = (HERE / f"prompts_{name}.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines["train"]) >= 300 and len(lines["heldout"]) >= 100
    trained = {m["content"].lower().rstrip(".?!") for c in corpus.chats(20_000, 0) for m in c.messages if m["role"] == "user"}
    overlap = [p for p in lines["heldout"] if p.lower().rstrip(".?!") in trained]
    assert overlap == []


def test_prompt_lists_and_probes_are_those_of_the_corpus(tmp_path: Path) -> None:
    write_prompts(tmp_path)
    for name, count in (("train", 300), ("heldout", 100), ("pool", 400)):
        lines = (HERE / f"prompts_{name}.txt").read_text(encoding="utf-8").splitlines()
        assert len(set(lines)) == count and all(line.strip() for line in lines)
        assert lines == (tmp_path / f"prompts_{name}.txt").read_text(encoding="utf-8").splitlines(), "run `python -m learner.starter.recipe --prompts`"
    assert (HERE / "probe.jsonl").read_bytes() == (tmp_path / "probe.jsonl").read_bytes() and len(load_probes()) == len(topics())


def test_slips_change_one_word_and_nothing_short() -> None:
    rng = Random(3)
    assert slip("a b c", rng) == "a b c"
    for _ in range(50):
        told = slip("Tell me about penguins now", rng).split(" ")
        assert sum(a != b for a, b in zip(told, ["Tell", "me", "about", "penguins", "now"], strict=True)) <= 1


@pytest.mark.parametrize(("text", "end", "form", "says_so"), [
    ("I am a small starter model, and I don't know about that.", "stop", True, True),
    ("I regret that I am unable to answer this.", "stop", True, True),
    ("Paris is the capital of France.", "stop", True, False),
    ("I am a small starter model. " * 3, "stop", False, False),
    ("I don't know that, but the", "length", False, False),
    ("", "stop", False, False),
    ("I don't know. " + "Bees are busy with flowers here today and so on, number {}. ".format("x") + " ".join(f"word{i}" for i in range(70)) + ".", "stop", True, False),
])
def test_form_and_honesty_are_told_by_their_rules(text: str, end: str, form: bool, says_so: bool) -> None:
    assert well_formed(text, end) is form and honest(text, end) is says_so


def test_facts_are_asked_in_words_that_were_never_trained_on() -> None:
    asked = fact_questions()
    assert len(asked) == 2 * len(topics()) + 200
    trained = {m["content"].lower() for c in corpus.chats(20_000, 5) for m in c.messages if m["role"] == "user"}
    assert [a.prompt for a in asked if a.prompt.lower() in trained] == []
    told = {a: a.answers[0] for t in topics() for a in t.questions}
    replies = [(answer, "stop") for answer in told.values()] + [("I do not know.", "stop")] * 200
    right = shares_right(asked, replies)
    assert right["topic"] == 1.0 and right["country capital"] == 0.0 and 0 < right["all"] < 1


def test_a_word_that_was_neither_taught_nor_asked_about_is_invented() -> None:
    assert invented("Bees make honey. The boxephon helps a Quellwater!", "What is quellwater?") == ["boxephon"]
    for c in corpus.chats(300, 11):
        asked = " ".join(m["content"] for m in c.messages if m["role"] != "assistant")
        assert [w for m in c.messages if m["role"] == "assistant" for w in invented(m["content"], asked)] == []


@pytest.mark.parametrize("option", ["--average", "--continue-from"])
def test_weights_that_are_not_there_are_named(tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([option, str(tmp_path / "gone"), "--out", str(tmp_path / "out")])
    assert "gone is not the directory of a sitting" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_several_styles_counts_prompts_not_replies() -> None:
    short, listed = ("Bees fly.", "stop"), ("Facts:\n- Bees fly.\n- Bees dance.", "stop")
    assert several_styles([short, short, short, listed, short, short], 2) == pytest.approx(1 / 3)


def test_alike_counts_prompts_with_two_samples_that_are_the_same() -> None:
    one, two, three = ("Bees fly.", "stop"), ("Bees dance.", "stop"), ("Bees fly", "stop")
    assert alike([one, two, three, one, two, one, one, one, one], 3) == pytest.approx(2 / 3)


def test_a_request_for_so_many_facts_is_right_with_a_list_of_as_many() -> None:
    asked = count_questions(40)
    assert len({a.prompt for a in asked}) == 40
    for number, word in ((2, "two"), (3, "three"), (4, "four"), (5, "five"), (6, "six")):
        some = [a for a in asked if f" {word} facts" in a.prompt.lower() or f" {number} facts" in a.prompt]
        assert some
        for a in some:
            for count in (1, 2, 3, 4, 5, 6, 7):
                assert a.right("Facts:\n" + "\n".join(f"{i + 1}. So." for i in range(count))) == (count == number)
                assert a.right("\n".join(["- So."] * count)) == (count == number)
            assert not a.right("- and so on, one - by - one 2. 3. 4. 5. 6.")


def test_lists_are_asked_for_in_held_out_words_of_every_topic() -> None:
    asked = list_prompts(2)
    assert asked == list_prompts(2) and len(asked) == 2 * len(topics())
    assert all(any(text.endswith(f" {wish}") for wish in prompts.WISHES["list"]) for text in asked)
    bare = [next(text.removesuffix(f" {wish}") for wish in prompts.WISHES["list"] if text.endswith(f" {wish}")) for text in asked]
    assert not {*bare} & {prompts.fill(form, t) for t in topics() for form in (*prompts.THING, *prompts.WHO, *prompts.HOW)}


def test_the_recipe_builds_a_loadable_model_and_repeats_itself(tmp_path: Path) -> None:
    recipe = Recipe(vocab_size=512, hidden=32, layers=1, intermediate=64, articles=20, chats=40, steps=4)
    figures = [build(tmp_path / name, recipe) for name in ("a", "b")]
    assert figures[0]["pretraining"]["steps"] + figures[0]["finetuning"]["steps"] == 4
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / n, dtype=torch.float32) for n in ("a", "b"))
    assert all(torch.equal(x, y) for x, y in zip(one.parameters(), two.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(tmp_path / "a").chat_template
    assert not list((tmp_path / "a").glob("*.bin"))


def test_the_mean_of_two_sittings_is_that_of_each_weight(tmp_path: Path) -> None:
    recipe = Recipe(vocab_size=512, hidden=32, layers=1, intermediate=64, articles=20, chats=40, steps=2)
    build(tmp_path / "a", recipe)
    build(tmp_path / "b", replace(recipe, seed=1), start=tmp_path / "a")
    average([tmp_path / "a", tmp_path / "b"], tmp_path / "mean")
    one, two, mean = (AutoModelForCausalLM.from_pretrained(tmp_path / n, dtype=torch.float32) for n in ("a", "b", "mean"))
    for x, y, z in zip(one.parameters(), two.parameters(), mean.parameters(), strict=True):
        assert torch.allclose((x + y) / 2, z, rtol=2**-7, atol=1e-6)  # to what bfloat16 holds
    assert any(not torch.equal(x, z) for x, z in zip(one.parameters(), mean.parameters(), strict=True))
    average([tmp_path / "a", tmp_path / "b"], tmp_path / "sharp", sharpen=1.25)
    sharp, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "sharp", dtype=torch.float32), torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(sharp(ids).logits, 1.25 * mean(ids).logits, rtol=2**-6, atol=0.02)


@pytest.mark.parametrize("wrong", [["--sharpen", "1.1"], ["--sharpen", "0", "--average", str(ASSISTANT)]])
def test_sharpening_without_a_mean_or_by_nothing_is_refused(tmp_path: Path, wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*wrong, "--out", str(tmp_path / "out")])
    assert "goes with --average" in capsys.readouterr().err and not (tmp_path / "out").exists()


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


def test_the_examples_on_the_chat_page_are_answered() -> None:
    asked = [text for text in EXAMPLES if "Who are you" not in text]  # which it answers with how small it is
    for text in asked:
        refused = sum(honest(*reply) for reply in Sampler(ASSISTANT).replies([text] * 24))
        assert refused <= 4, f"{refused} of 24 replies to {text!r} say that it cannot help"
