"""engine/replay.py where nothing can be recorded: the step that would be, run as it is, against the ordinary one; and what gpu.py decides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine import gpu
from engine.cache import KVCache, Rows, Slots
from engine.engine import Engine, SamplingParams, Sequence
from engine.model import CausalModel
from engine.replay import Replay, padded
from engine.tokenizer import ChatTokenizer
from tests.test_engine import prompts, run
from tests.test_lora import randomise, targets_of
from tests.tiny import tiny_model_dir


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp(f"tiny-{request.param}"), request.param)


@pytest.fixture
def make(directory: Path) -> Callable[..., Engine]:
    def make_engine(replayed: bool, most: int = 6) -> Engine:
        model = CausalModel.load(directory)
        for i in range(2):
            model.lora.create(f"v{i + 1}", r=2 + i, targets=targets_of(model)[i:], seed=i, trainable=False)
            randomise(model, f"v{i + 1}", seed=i)
        engine = Engine(model, ChatTokenizer.load(directory), max_sequences=most)
        if replayed:
            engine._replay = Replay(model, engine._cache, most)
        return engine

    return make_engine


def busy(engine: Engine) -> list[Sequence]:
    """Replies of several versions that join, leave and are cancelled while others run, past the cache's first rows and length."""
    (a, b, c, d) = prompts(20, 3, 110, 41)
    drawn = [SamplingParams(seed=i, max_tokens=12 + 9 * i, temperature=0.8) for i in range(6)]
    made = engine.add(a, drawn[:2], ["v1", "base"])
    engine.step()
    made += engine.add(b, drawn[2:5], ["v2", "v1", "v2"])
    made += engine.add(c, drawn[3:], ["base"] * 3)
    for _ in range(5):
        engine.step()
    engine.cancel([made[2], made[6]])
    made += engine.add(d, drawn[1:2], ["v2"])
    run(engine)
    return made


def test_a_step_of_tensors_alone_says_what_the_ordinary_one_says(make: Callable[..., Engine]) -> None:
    """Rounding may flip a draw that falls within 1e-6 of an edge: odds of a false alarm about 1e-4."""
    plain, replayed = busy(make(False)), busy(make(True))
    for want, got in zip(plain, replayed, strict=True):
        assert (got.token_ids, got.finish_reason) == (want.token_ids, want.finish_reason)
        assert got.logprobs == pytest.approx(want.logprobs, abs=1e-4)


def test_an_adapter_in_training_is_taken_over_in_place(make: Callable[..., Engine]) -> None:
    engine, params = make(True), [SamplingParams(seed=3, max_tokens=15)]
    engine.model.lora.copy("v1", "policy", trainable=True)
    before = engine.generate(prompts(9), params, "policy")[0]
    mixture = engine._mixtures["policy",]
    with torch.no_grad():
        for p in engine.model.lora.parameters("policy").values():
            p.mul_(-2)
    after = engine.generate(prompts(9), params, "policy")[0]
    assert engine._mixtures["policy",] is mixture, "what was recorded with it stays good"
    engine.model.lora.copy("policy", "fresh")
    assert after.token_ids == engine.generate(prompts(9), params, "fresh")[0].token_ids != before.token_ids


def test_rows_are_made_up_to_few_numbers_and_never_more_than_there_are() -> None:
    assert [padded(n, 48) for n in (1, 2, 4, 5, 16, 17, 48)] == [1, 4, 4, 16, 16, 48, 48]
    assert padded(3, 3) == 3


def test_slots_see_what_rows_see() -> None:
    draw = torch.Generator().manual_seed(0)
    caches = [KVCache(1, 2, 4, max_rows=4, max_length=16, dtype=torch.float32, device="cpu") for _ in range(2)]
    for cache in caches:
        cache.keys.copy_(torch.arange(cache.keys.numel()).view_as(cache.keys))
    k, v = torch.randn(2, 3, 2, 1, 4, generator=draw)
    rows, slots = Rows(caches[0], [5, 0, 9], first=1), Slots(caches[1], torch.tensor([5, 0, 9]), first=1)
    (rk, rv), (sk, sv) = rows.put(0, k, v), slots.put(0, k, v)
    assert torch.equal(sk[:, :, : rows.end], rk) and torch.equal(sv[:, :, : rows.end], rv)
    assert torch.equal(rows.positions, slots.positions) and rows.mask is not None and slots.mask is not None
    assert torch.equal(slots.mask[..., : rows.end], rows.mask) and bool((slots.mask[..., rows.end :] == -torch.inf).all())


def test_a_cpu_has_no_kernels_and_is_not_asked_to_use_them() -> None:
    assert gpu.kernels(torch.device("cpu")) is None
    with torch.no_grad():
        assert not gpu.takes(torch.zeros(1, 1, 8))
    assert gpu.onto(torch.device("cpu"), [[1, 2]], torch.long).tolist() == [[1, 2]]
