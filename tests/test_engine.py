"""engine/engine.py against transformers.generate, against itself alone, and by counting."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.engine import (
    Delta,
    Engine,
    PromptTooLong,
    QueueFull,
    SamplingParams,
    Sequence,
    UnknownVersion,
    VersionInUse,
    probe,
)
from engine.lora import AdapterError
from engine.model import CausalModel
from engine.stopping import StreamingText
from engine.tokenizer import ChatTokenizer
from tests.test_lora import made_by_peft, randomise, targets_of

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(5, 400) for _ in range(n)] for n in lengths]


def greedy(max_tokens: int, **kwargs: object) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **kwargs)


def run(engine: Engine) -> list[Delta]:
    deltas = []
    while engine.has_work():
        deltas += engine.step()
    return deltas


def oracle(model: torch.nn.Module, prompt: list[int], max_tokens: int) -> list[int]:
    """Greedy tokens of transformers, the end token included."""
    ids = torch.tensor([prompt])
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_tokens)
    return out[0, len(prompt) :].tolist()


@pytest.fixture
def make(tiny_llama: Path, either_way: None) -> Callable[..., Engine]:
    def make_engine(directory: Path = tiny_llama, adapters: int = 0, **kwargs: int) -> Engine:
        model = CausalModel.load(directory)
        for i in range(adapters):
            model.lora.create(f"v{i + 1}", r=2 + i, targets=targets_of(model)[i:], seed=i)
            randomise(model, f"v{i + 1}", seed=i)
        return Engine(model, ChatTokenizer.load(directory), **kwargs)

    return make_engine


# --- against the reference


def test_greedy_tokens_equal_those_of_transformers_for_a_batch_of_mixed_lengths(tiny_any: Path, make: Callable[..., Engine]) -> None:
    engine, model = make(tiny_any, max_sequences=4), AutoModelForCausalLM.from_pretrained(tiny_any).eval()
    many = prompts(5, 30, 12, 1, 77, 33, 8, 50)
    lengths = [10, 15, 40, 25, 30, 12, 40, 20]
    got = engine.generate(many, [greedy(n) for n in lengths])
    assert [s.token_ids for s in got] == [oracle(model, p, n) for p, n in zip(many, lengths, strict=True)]


def test_greedy_tokens_with_an_adapter_made_by_peft_equal_those_of_transformers(tiny_any: Path, make: Callable[..., Engine], tmp_path: Path) -> None:
    engine, base = make(tiny_any), AutoModelForCausalLM.from_pretrained(tiny_any).eval()
    bank = engine.model.lora
    theirs = made_by_peft(base, tmp_path, targets_of(engine.model), r=4, fan_in_fan_out=bank.fan_in_fan_out)
    engine.load_version("v1", tmp_path)
    many = prompts(9, 40, 17)
    got = engine.generate(many, [greedy(25)] * 3, "v1")
    assert [s.token_ids for s in got] == [oracle(theirs, p, 25) for p in many]
    bare = engine.generate(many, [greedy(25)] * 3)
    assert all(a.token_ids != b.token_ids for a, b in zip(got, bare, strict=True))


def test_logprobs_of_samples_equal_a_plain_forward_of_transformers(tiny_any: Path, make: Callable[..., Engine]) -> None:
    engine, model = make(tiny_any), AutoModelForCausalLM.from_pretrained(tiny_any).eval()
    settings = [SamplingParams(temperature=t, top_p=p, max_tokens=20, seed=i) for i, (t, p) in enumerate([(1, 1), (0.7, 0.9), (1.5, 0.5), (0, 1)])]
    (prompt,) = prompts(23)
    for s in engine.generate([prompt] * 4, settings):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + s.token_ids])).logits[0, len(prompt) - 1 : -1].double()
        want = (logits / (s.params.temperature or 1)).log_softmax(-1).gather(-1, torch.tensor(s.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(s.logprobs, dtype=torch.float64), want, rtol=0, atol=1e-4)


def test_the_probe_names_the_likeliest_tokens_as_peft_computes_them(tiny_llama: Path, tmp_path: Path) -> None:
    model = CausalModel.load(tiny_llama)
    model.lora.create("a", r=4)
    randomise(model, "a")
    model.lora.save("a", tmp_path)
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path).eval()
    (prompt,) = prompts(12)
    got = probe(model, "a", prompt, top=5)
    with torch.no_grad():
        want = theirs(torch.tensor([prompt])).logits[0, -1].log_softmax(-1).topk(5)
    assert (got["prompt_ids"], got["top_ids"]) == (prompt, want.indices.tolist())
    assert got["top_logprobs"] == pytest.approx(want.values.tolist(), abs=1e-4)


def test_what_is_spoken_is_what_the_probe_says(tiny_any: Path, make: Callable[..., Engine]) -> None:
    engine = make(tiny_any)
    engine.model.lora.create("spoken", r=4)
    randomise(engine.model, "spoken")
    for prompt in ([7], *prompts(12, 40)):
        for version in ("base", "spoken"):
            told = probe(engine.model, None if version == "base" else version, prompt, engine.model.vocab_size), engine.spoken(version, prompt)
            said, here = (dict(zip(p["top_ids"], p["top_logprobs"], strict=True)) for p in told)
            assert len(here) == engine.model.vocab_size and max(abs(said[i] - here[i]) for i in said) < 1e-4


# --- together or alone


def test_the_same_seed_gives_the_same_tokens_whatever_else_is_running(tiny_any: Path, make: Callable[..., Engine]) -> None:
    """Rounding may flip a draw that falls within 1e-6 of an edge: odds of a false alarm about 1e-4."""
    settings = [SamplingParams(temperature=0.6 + 0.2 * i, top_p=1 - 0.1 * i, seed=7 * i, max_tokens=30) for i in range(4)]
    (prompt, *others) = prompts(21, 5, 60, 33, 14)
    alone = [make(tiny_any).generate([prompt], [p])[0].token_ids for p in settings]
    engine = make(tiny_any, max_sequences=6)
    noise = [engine.add(p, [SamplingParams(seed=99 + i, max_tokens=11 + 3 * i)], ["base"]) for i, p in enumerate(others)]
    engine.step()
    ours = [engine.add(prompt, settings[:2], ["base"] * 2)]
    engine.step()
    ours.append(engine.add(prompt, settings[2:], ["base"] * 2))
    engine.step()
    engine.cancel(noise[1])
    run(engine)
    assert [s.token_ids for group in ours for s in group] == alone
    assert len({tuple(tokens) for tokens in alone}) == 4


def test_versions_side_by_side_in_one_batch_equal_each_alone(tiny_any: Path, make: Callable[..., Engine]) -> None:
    """Sampled, so odds of a false alarm from rounding about 1e-4."""
    engine = make(tiny_any, adapters=3)
    versions = ["v2", "base", "v1", "v3", "v1"]
    settings = [SamplingParams(seed=i, max_tokens=25) for i in range(5)]
    (prompt,) = prompts(31)
    mixed = engine.add(prompt, settings, versions)
    assert [s.version for s in mixed] == versions
    run(engine)
    for s in mixed:
        alone = make(tiny_any, adapters=3).generate([prompt], [s.params], s.version)[0]
        assert s.token_ids == alone.token_ids
        assert s.logprobs == pytest.approx(alone.logprobs, abs=1e-4)
    assert len({tuple(s.token_ids) for s in mixed}) == 5


def test_only_running_versions_are_stacked(make: Callable[..., Engine]) -> None:
    engine = make(adapters=3)
    engine.add(prompts(8)[0], [greedy(3)], ["v2"])
    engine.step()
    mixture = engine._mixture(["v2"])[1]
    assert mixture is not None and mixture.count == 1
    run(engine)
    engine.add(prompts(8)[0], [greedy(3)], ["base"])
    engine.step()
    assert engine._mixture(["base"])[1] is None


def test_an_adapter_trained_between_two_batches_is_used_as_it_is_now(make: Callable[..., Engine], tiny_llama: Path) -> None:
    engine = make(adapters=1)
    before = engine.generate(prompts(9), [greedy(12)], "v1")[0]
    with torch.no_grad():
        for p in engine.model.lora.parameters("v1").values():
            p.mul_(-2)
    fresh = make(adapters=1)
    with torch.no_grad():
        for p in fresh.model.lora.parameters("v1").values():
            p.mul_(-2)
    after, want = engine.generate(prompts(9), [greedy(12)], "v1")[0], fresh.generate(prompts(9), [greedy(12)], "v1")[0]
    assert after.token_ids == want.token_ids != before.token_ids


def test_a_long_prompt_is_read_in_pieces_while_others_go_on(make: Callable[..., Engine], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.engine.PREFILL_TOKENS", 32)
    engine, model = make(), AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    short, long = prompts(10, 200)
    (a,) = engine.add(short, [greedy(20)], ["base"])
    engine.step()
    (b,) = engine.add(long, [greedy(20)], ["base"])
    for _ in range(6):
        engine.step()
    assert (len(a.token_ids), len(b.token_ids)) == (7, 0)
    run(engine)
    assert [a.token_ids, b.token_ids] == [oracle(model, short, 20), oracle(model, long, 20)]


# --- counting


def test_replies_of_one_version_share_one_prefill(make: Callable[..., Engine]) -> None:
    engine = make(adapters=1)
    (prompt,) = prompts(40)
    engine.add(prompt, [SamplingParams(seed=i, max_tokens=4) for i in range(5)], ["base", "v1", "base", "v1", "base"])
    run(engine)
    assert engine.stats.prefill_tokens == 2 * 40
    engine.generate([prompt] * 6, [SamplingParams(seed=i, max_tokens=4) for i in range(6)])
    assert engine.stats.prefill_tokens == 3 * 40


def test_a_step_adds_one_token_to_each_and_says_what_it_added(make: Callable[..., Engine]) -> None:
    engine = make()
    sequences = engine.add(prompts(6)[0], [greedy(5, ignore_eos=True), SamplingParams(max_tokens=3, ignore_eos=True)], ["base"] * 2)
    texts = {s.id: "" for s in sequences}
    for turn in range(1, 6):
        deltas = engine.step()
        assert len(deltas) == (2 if turn <= 3 else 1)
        for delta in deltas:
            texts[delta.sequence.id] += delta.text
            assert len(delta.sequence.token_ids) == len(delta.sequence.logprobs) == turn
            assert delta.finished == delta.sequence.finished == (turn == delta.sequence.params.max_tokens)
    assert not engine.has_work()
    assert engine.step() == []
    for s in sequences:
        assert texts[s.id] == s.text == engine.tokenizer.decode(s.token_ids)
        assert s.finish_reason == "length"
    assert (engine.stats.tokens, engine.stats.finished, engine.stats.steps) == (8, 2, 5)


def test_more_work_than_rows_waits_its_turn(make: Callable[..., Engine]) -> None:
    engine = make(max_sequences=2)
    for i, prompt in enumerate(prompts(4, 5, 6, 7, 8)):
        engine.add(prompt, [greedy(3 + i, ignore_eos=True)], ["base"])
    order: list[Sequence] = []
    while engine.has_work():
        deltas = engine.step()
        assert len(deltas) <= 2
        order += [d.sequence for d in deltas if d.finished]
    assert [s.id for s in order] == [0, 1, 2, 3, 4]


def test_cancelling_frees_the_rows_before_the_next_step(make: Callable[..., Engine]) -> None:
    engine = make(max_sequences=2)
    running = engine.add(prompts(6)[0], [greedy(50, ignore_eos=True)] * 2, ["base"] * 2)
    waiting = engine.add(prompts(7)[0], [greedy(3, ignore_eos=True)], ["base"])
    engine.step()
    assert (engine.stats.running, engine.stats.queued) == (2, 1)
    engine.cancel([running[0]])
    assert (running[0].finish_reason, engine.stats.running) == ("cancelled", 1)
    assert [d.sequence for d in engine.step()] == [running[1], *waiting]
    engine.cancel([running[0], running[1], *waiting])
    assert not engine.has_work()
    assert engine.step() == []
    assert engine.stats.cancelled == 3


def test_cancelling_one_leaves_the_tokens_of_the_others_as_they_were(make: Callable[..., Engine], tiny_llama: Path) -> None:
    engine, model = make(), AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    many = prompts(5, 9, 20, 3, 14)
    sequences = [engine.add(p, [greedy(30)], ["base"])[0] for p in many]
    for victim in (0, 3):
        for _ in range(4):
            engine.step()
        engine.cancel([sequences[victim]])
    run(engine)
    for i in (1, 2, 4):
        assert sequences[i].token_ids == oracle(model, many[i], 30)


def test_the_queue_is_bounded_and_says_so(make: Callable[..., Engine]) -> None:
    engine = make(max_sequences=1, max_queue=3)
    (prompt,) = prompts(4)
    engine.add(prompt, [greedy(9)] * 1, ["base"])
    engine.step()
    engine.add(prompt, [greedy(2)] * 3, ["base"] * 3)
    with pytest.raises(QueueFull, match="3 replies are waiting and the queue holds 3"):
        engine.add(prompt, [greedy(2)], ["base"])
    assert engine.stats.queued == 3
    run(engine)
    engine.add(prompt, [greedy(2)], ["base"])


def test_what_does_not_fit_is_refused_with_its_numbers_and_what_just_fits_runs(make: Callable[..., Engine]) -> None:
    engine = make(max_context=40)
    (prompt,) = prompts(30)
    with pytest.raises(PromptTooLong, match=r"30 tokens and 11 more were asked for.* of 40"):
        engine.add(prompt, [greedy(11)], ["base"])
    (s,) = engine.add(prompt, [greedy(10, ignore_eos=True)], ["base"])
    run(engine)
    assert len(s.token_ids) == 10


def test_what_makes_no_sense_is_refused_and_nothing_is_queued(make: Callable[..., Engine]) -> None:
    engine = make()
    with pytest.raises(UnknownVersion, match="no version 'v9' is loaded: there are base"):
        engine.add([5], [greedy(1)], ["v9"])
    with pytest.raises(ValueError, match="at least one token"):
        engine.add([], [greedy(1)], ["base"])
    with pytest.raises(ValueError, match="token ids must be between 0 and"):
        engine.add([5, 10_000], [greedy(1)], ["base"])
    with pytest.raises(PromptTooLong):
        engine.generate([[5], [6] * 600], [greedy(1)] * 2)
    assert not engine.has_work()


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1}, {"max_tokens": 0}, {"stop": ("",)}, {"stop": "end"}])
def test_settings_that_make_no_sense_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingParams(**wrong)


# --- versions


def test_a_version_stays_while_a_reply_is_pinned_to_it(make: Callable[..., Engine], tmp_path: Path) -> None:
    engine = make(adapters=1)
    engine.model.lora.save("v1", tmp_path)
    engine.load_version("v2", tmp_path)
    assert engine.versions() == ["base", "v1", "v2"]
    with pytest.raises(AdapterError, match="already loaded"):
        engine.load_version("v2", tmp_path)
    (s,) = engine.add(prompts(5)[0], [greedy(4)], ["v2"])
    for _ in range(2):
        with pytest.raises(VersionInUse, match="v2"):
            engine.unload_version("v2")
        engine.step()
    engine.cancel([s])
    engine.unload_version("v2")
    assert engine.versions() == ["base", "v1"]
    with pytest.raises(UnknownVersion):
        engine.unload_version("base")


def test_a_version_loaded_in_the_middle_of_a_batch_disturbs_nothing(make: Callable[..., Engine], tmp_path: Path) -> None:
    engine = make(adapters=2)
    engine.model.lora.save("v2", tmp_path)
    (prompt,) = prompts(12)
    want = make(adapters=2).generate([prompt], [greedy(20)], "v1")[0]
    (s,) = engine.add(prompt, [greedy(20)], ["v1"])
    for _ in range(5):
        engine.step()
    engine.load_version("v3", tmp_path)
    (t,) = engine.add(prompt, [greedy(20)], ["v3"])
    run(engine)
    assert s.token_ids == want.token_ids
    assert t.token_ids == make(adapters=2).generate([prompt], [greedy(20)], "v2")[0].token_ids


def test_a_version_whose_numbers_break_down_ends_its_own_replies_only(make: Callable[..., Engine]) -> None:
    engine = make(adapters=1)
    (prompt,) = prompts(12)
    want = engine.generate([prompt], [greedy(12)])[0].token_ids
    with torch.no_grad():
        next(iter(engine.model.lora.parameters("v1").values())).fill_(3e38)  # finite, as loaded; the products are not
    broken, sound = engine.add(prompt, [greedy(12)] * 2, ["v1", "base"])
    run(engine)
    assert broken.finish_reason == "cancelled" and len(broken.token_ids) <= 1  # alone, at the prompt, it may not overflow yet
    assert sound.token_ids == want
    again = engine.generate([prompt] * 3, [greedy(12)] * 3)
    assert [s.token_ids for s in again] == [want] * 3


# --- text


def test_a_reply_that_ends_itself_keeps_the_end_token_but_not_its_text(make: Callable[..., Engine], tiny_llama: Path) -> None:
    engine = make()
    engine._eos = frozenset({oracle(AutoModelForCausalLM.from_pretrained(tiny_llama), prompts(11)[0], 8)[7]})
    (s,) = engine.generate(prompts(11), [greedy(50)])
    assert s.finish_reason == "stop"
    assert s.token_ids[-1] in engine._eos and not set(s.token_ids[:-1]) & engine._eos
    assert s.text == engine.tokenizer.decode(s.token_ids[:-1])


def test_a_stop_string_across_tokens_ends_the_reply_before_it(make: Callable[..., Engine]) -> None:
    engine = make()
    (whole,) = engine.generate(prompts(11), [greedy(40, ignore_eos=True)])
    tokens = [engine.tokenizer.decode([i]) for i in whole.token_ids]
    cut = next(i for i in range(8, 30) if "\ufffd" not in "".join(tokens[i : i + 2]) and all(len(t) > 1 for t in tokens[i : i + 2]))
    stop = tokens[cut][-1] + tokens[cut + 1][:1]  # the end of one token and the beginning of the next
    (s,) = engine.add(prompts(11)[0], [greedy(40, stop=("never seen", stop), ignore_eos=True)], ["base"])
    shown = "".join(delta.text for delta in run(engine))
    assert s.finish_reason == "stop"
    assert s.text == shown == whole.text[: whole.text.index(stop)]
    assert s.token_ids == whole.token_ids[: len(s.token_ids)]
    assert len(s.token_ids) <= cut + 2


def test_what_might_be_a_stop_string_is_shown_once_it_is_not(make: Callable[..., Engine]) -> None:
    engine = make()
    (whole,) = engine.generate(prompts(11), [greedy(20, ignore_eos=True)])
    almost = whole.text[3:9] + "\x00"
    (s,) = engine.add(prompts(11)[0], [greedy(20, stop=(almost,), ignore_eos=True)], ["base"])
    deltas = run(engine)
    assert s.text == "".join(d.text for d in deltas) == whole.text
    assert s.finish_reason == "length"


def test_stop_strings_cut_any_text_where_a_plain_search_would(tiny_llama: Path) -> None:
    tokenizer = ChatTokenizer.load(tiny_llama)
    rng = random.Random(0)
    for _ in range(400):
        text = "".join(rng.choice(["a", "b", "ab", "é", "🙂", " "]) for _ in range(rng.randrange(1, 25)))
        stop = tuple("".join(rng.choice("abé🙂 ") for _ in range(rng.randrange(1, 4))) for _ in range(rng.randrange(0, 3)))
        streaming, shown = StreamingText(tokenizer, stop), ""
        for token in [i for c in text.encode() for i in byte_token(tokenizer, c)]:
            if not streaming.stopped:
                shown += streaming.push(token)
        shown += streaming.flush()
        ends = [text.find(s) + len(s) for s in stop if s in text]
        first = min(ends, default=None)  # the stop string that is complete first
        if first is None:
            assert shown == text and not streaming.stopped
        else:
            assert streaming.stopped
            assert shown == text[: min(text[:first].find(s) for s in stop if s in text[:first])]


@functools.cache
def byte_token(tokenizer: ChatTokenizer, byte: int) -> list[int]:
    """The token of one byte in the byte-level alphabet (GPT-2's bytes_to_unicode)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    char = chr(byte) if byte in printable else chr(256 + others.index(byte))
    return [tokenizer.hf.convert_tokens_to_ids(char)]


def test_an_emoji_streams_whole_through_the_engine(make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make()
    spelled = [i for c in "é 🙂!".encode() for i in byte_token(engine.tokenizer, c)]
    script = iter(spelled)
    monkeypatch.setattr(engine, "_sample", lambda logits: ([next(script)], [-1.0]))
    engine.add(prompts(4)[0], [SamplingParams(max_tokens=len(spelled))], ["base"])
    assert [delta.text for delta in run(engine)] == ["", "é", " ", "", "", "", "🙂", "!"]


def test_a_temperature_that_no_logit_survives_is_greedy(make: Callable[..., Engine]) -> None:
    assert SamplingParams(temperature=1e-40).temperature == 0 and SamplingParams(temperature=1e-3).temperature == 1e-3
    engine = make()
    cold, still = (engine.generate(prompts(9), [SamplingParams(temperature=t, max_tokens=8)])[0] for t in (1e-40, 0))
    assert cold.token_ids == still.token_ids and cold.logprobs == still.logprobs
