"""engine/prefixes.py by itself against a list of sequences, and in the engine against a cold read of the same prompt."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cache import KVCache
from engine.engine import Engine, SamplingParams, Sequence
from engine.model import CausalModel
from engine.prefixes import SHORTEST, Prefixes, common
from engine.tokenizer import ChatTokenizer
from tests.test_lora import randomise, targets_of

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
SCOPE = ("base", "ann")


def test_memory_that_runs_out_leaves_the_cache_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = KVCache(1, 1, 1, 8, 1024, torch.float32, "cpu")
    cache.keys[:], cache.values[:] = 1.0, 2.0
    real, calls = torch.Tensor.new_zeros, []

    def second_fails(tensor: torch.Tensor, *shape: int) -> torch.Tensor:
        calls.append(shape)
        if len(calls) == 2:
            raise RuntimeError("not enough memory")
        return real(tensor, *shape)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="memory"):
        patch.setattr(torch.Tensor, "new_zeros", second_fails)
        cache.reserve(5, 300)
    assert cache.keys.shape == cache.values.shape == (1, 4, 1, 128, 1)
    cache.reserve(5, 300)
    assert cache.keys.shape == cache.values.shape == (1, 8, 1, 300, 1)
    assert cache.values[0, :4, 0, :128].eq(2).all() and cache.values.sum() == 2 * 4 * 128
    cache.shrink(cache.bytes)
    assert cache.length == 300
    cache.shrink(cache.bytes - 1)
    assert cache.keys.shape == cache.values.shape == (1, 4, 1, 128, 1) and not cache.keys.any()


def written(ids: list[int], rows: int = 2) -> KVCache:
    """A cache whose row 0 holds keys that say which tokens lie before them, so that a wrong piece shows."""
    cache = KVCache(1, 1, 1, rows, 256, torch.float32, "cpu")
    cache.reserve(rows, max(1, len(ids)))
    for i in range(len(ids)):
        cache.keys[0, 0, 0, i, 0] = hash(tuple(ids[: i + 1])) % 100_003
        cache.values[0, 0, 0, i, 0] = -cache.keys[0, 0, 0, i, 0]
    return cache


# Few token ids and long common beginnings, so that nodes are split in all the ways they can be.
texts = st.lists(st.integers(0, 3), min_size=1, max_size=6).map(lambda tail: [7] * SHORTEST + [t for t in tail for _ in range(9)])


@settings(max_examples=60, deadline=None)
@given(st.lists(texts, min_size=1, max_size=12), texts)
def test_what_is_restored_is_the_longest_prefix_of_all_that_was_kept(kept: list[list[int]], asked: list[int]) -> None:
    prefixes = Prefixes(1 << 20)
    for ids in kept:
        prefixes.keep(SCOPE, ids, written(ids), 0)
    cache = written([])
    count = prefixes.restore(SCOPE, asked, cache, 1)
    assert count == min(max(common(ids, asked) for ids in kept), len(asked) - 1)
    want = written(asked)
    assert torch.equal(cache.keys[:, 1, :, :count], want.keys[:, 0, :, :count])
    assert torch.equal(cache.values[:, 1, :, :count], want.values[:, 0, :, :count])
    distinct = {tuple(ids[: i + 1]) for ids in kept for i in range(len(ids))}
    assert prefixes.bytes == 8 * len(distinct)  # a key and a value of 4 bytes for every distinct prefix, and none twice


def test_over_its_budget_the_longest_unused_goes_first() -> None:
    long = [[i] * 40 for i in range(4)]
    prefixes = Prefixes(3 * 40 * 8)
    for ids in long[:3]:
        prefixes.keep(SCOPE, ids, written(ids), 0)
    assert prefixes.restore(SCOPE, long[0], written([]), 1) == 39
    prefixes.keep(SCOPE, long[3], written(long[3]), 0)
    assert prefixes.bytes == prefixes.budget
    assert [prefixes.restore(SCOPE, ids, written([]), 1) for ids in long] == [39, 0, 39, 39]
    huge = [9] * 121
    prefixes.keep(SCOPE, huge, written(huge), 0)  # more than all there is: nothing is thrown out for it
    assert prefixes.bytes == prefixes.budget and prefixes.restore(SCOPE, huge, written([]), 1) == 0


def test_scopes_share_nothing_and_a_version_can_be_forgotten() -> None:
    prefixes, ids = Prefixes(1 << 20), list(range(50))
    for scope in (SCOPE, ("v1", "ann"), ("v1", "bob")):
        prefixes.keep(scope, ids, written(ids), 0)
    assert prefixes.restore(("base", "bob"), ids, written([]), 1) == 0
    prefixes.forget("v1")
    assert prefixes.restore(("v1", "ann"), ids, written([]), 1) == prefixes.restore(("v1", "bob"), ids, written([]), 1) == 0
    assert prefixes.restore(SCOPE, ids, written([]), 1) == 49 and prefixes.bytes == 50 * 8
    prefixes.forget()
    assert prefixes.bytes == 0 and prefixes.restore(SCOPE, ids, written([]), 1) == 0


# --- in the engine


def engine_of(directory: Path, adapters: int = 0, **kwargs: int) -> Engine:
    model = CausalModel.load(directory)
    for i in range(adapters):
        model.lora.create(f"v{i + 1}", r=4, targets=targets_of(model), seed=i)
        randomise(model, f"v{i + 1}", seed=i)
    return Engine(model, ChatTokenizer.load(directory), **kwargs)


def say(engine: Engine, prompt: list[int], version: str = "base", owner: str = "", count: int = 1, temperature: float = 0.0) -> list[Sequence]:
    params = [SamplingParams(temperature=temperature, seed=i, max_tokens=20, ignore_eos=True) for i in range(count)]
    replies = engine.add(prompt, params, [version] * count, owner)
    while engine.has_work():
        engine.step()
    return replies


def some(n: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(5, 400), k=n)


@pytest.fixture
def warm(tiny_any: Path) -> Callable[..., Engine]:
    return lambda **kwargs: engine_of(tiny_any, adapters=2, reuse_bytes=1 << 26, **kwargs)


@pytest.mark.parametrize("version", ["base", "v1"])
def test_the_next_turn_reads_what_is_new_and_says_what_a_cold_read_would(tiny_any: Path, warm: Callable[..., Engine], version: str) -> None:
    engine, cold = warm(), engine_of(tiny_any, adapters=2)
    first = say(engine, some(60, 1), version, count=3, temperature=1.0)
    for picked in first:
        turn = picked.prompt_ids + picked.token_ids + some(9, 2)
        before = engine.stats.prefill_tokens
        (ours,), (theirs,) = say(engine, turn, version), say(cold, turn, version)
        assert engine.stats.prefill_tokens - before == 10  # the reply's last token was never fed, and nine are new
        assert ours.token_ids == theirs.token_ids and ours.logprobs == pytest.approx(theirs.logprobs, abs=2e-4)
    assert engine.stats.reused_tokens == 3 * 79


def test_one_version_or_person_never_reads_what_another_left(warm: Callable[..., Engine], tiny_any: Path) -> None:
    engine, cold, prompt = warm(), engine_of(tiny_any, adapters=2), some(60, 1)
    for version in ("base", "v1", "v2"):
        assert say(engine, prompt, version, "ann")[0].token_ids == say(cold, prompt, version)[0].token_ids
    say(engine, prompt, "base", "bob")
    assert engine.stats.reused_tokens == 0
    say(engine, prompt, "v1", "ann")
    assert engine.stats.reused_tokens == 59


def test_an_unloaded_version_leaves_nothing_and_forget_drops_the_rest(warm: Callable[..., Engine]) -> None:
    engine, prompt = warm(), some(60, 1)
    say(engine, prompt, "base"), say(engine, prompt, "v1")
    kept = engine.stats.kept_bytes
    engine.unload_version("v1")
    assert engine.stats.kept_bytes == kept / 2
    engine.forget()
    assert engine.stats.kept_bytes == 0


def test_kept_tokens_take_no_slot_and_a_cancelled_or_broken_reply_leaves_only_its_prompt(warm: Callable[..., Engine]) -> None:
    engine, prompt = warm(max_sequences=2), some(60, 1)
    say(engine, prompt, count=2)
    engine.forget()
    replies = engine.add(prompt, [SamplingParams(max_tokens=50, ignore_eos=True)] * 2, ["base"] * 2)
    for _ in range(5):
        engine.step()
    a_token = engine.stats.kept_bytes // 60  # the prompt's, so far
    assert engine.stats.running == 2
    engine.cancel(replies)
    assert engine.stats.kept_bytes == 60 * a_token
    say(engine, some(60, 2), count=2)  # both slots are there
    assert engine.stats.kept_bytes > 120 * a_token


def test_nothing_is_kept_unless_asked_for(tiny_llama: Path) -> None:
    engine = engine_of(tiny_llama)
    say(engine, some(60, 1)), say(engine, some(60, 1))
    assert engine.stats.reused_tokens == engine.stats.kept_bytes == 0 and engine.stats.prefill_tokens == 120
