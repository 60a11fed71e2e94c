"""Replies packed behind their shared prompt: the same scores and gradients as a row for each, and only where it pays."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from engine.model import CausalModel
from learner.config import RewardConfig
from learner.data import RankedExample
from learner.packing import LONG, PackedRows, passes, worth_packing
from learner.reward import RewardModel, features_of, features_of_packed


def groups(seed: int = 0) -> list[tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]]:
    draw = random.Random(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(5, 250) for _ in range(length))

    return [(ids(30), (ids(5), ids(9), ids(1))), (ids(41), (ids(7), ids(0))), (ids(12), (ids(6), ids(3), ids(4), ids(8)))]


@pytest.fixture
def model(tiny_any: Path) -> CausalModel:
    loaded = CausalModel.load(tiny_any)
    loaded.lora.create("a", r=4, alpha=8, seed=1)
    with torch.no_grad():
        for name, parameter in loaded.lora.parameters("a").items():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    return loaded


def test_packed_replies_have_the_features_and_gradients_of_rows_of_their_own(model: CausalModel) -> None:
    reward = RewardModel.create(model, RewardConfig(), 1)
    plain = reward.rows([(prompt, reply) for prompt, replies in groups() for reply in replies])
    packed = PackedRows.of(groups(), model.pad_id, "cpu")
    found, gradients = [], []
    for features in (features_of(model, plain, "a"), features_of_packed(model, packed, "a")):
        weight = torch.linspace(-1, 1, features.numel()).view(features.shape)
        parameters = list(model.lora.parameters("a").values())
        gradients.append(torch.autograd.grad((features * weight).sum(), parameters))
        found.append(features.detach())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


def test_no_reply_sees_another(model: CausalModel) -> None:
    before, after = groups(), groups()
    prompt, replies = after[0]
    after[0] = (prompt, ((9, 9, 9, 9, 9), *replies[1:]))
    features = [features_of_packed(model, PackedRows.of(g, model.pad_id, "cpu"), None) for g in (before, after)]
    assert not torch.equal(features[0][0], features[1][0])
    torch.testing.assert_close(features[0][1:], features[1][1:], rtol=0, atol=0)


@dataclass
class Shape:
    """What of a model packing asks for."""

    hidden_size: int = 256
    packs: bool = True


def test_they_are_packed_where_that_is_cheaper_and_nothing_would_be_cut() -> None:
    long_prompt, short_prompt = [((1,) * 64, ((2,) * 64,) * 4)], [((1,) * 4, ((2,) * 64,) * 4)]
    wide = Shape()
    assert worth_packing(long_prompt, wide, 512) and worth_packing([((1,) * 64, ((2,) * 64,) * 2)], wide, 512)
    assert not worth_packing(short_prompt, wide, 512)  # little to share, and a longer row to attend over
    assert not worth_packing(long_prompt, wide, 127)  # the prompt would have to be cut
    assert not worth_packing([((1,) * 64, ((2,) * 64,))], wide, 512)  # one reply
    assert not worth_packing(long_prompt, Shape(packs=False), 512)  # a model that tells places by columns
    uneven = [*long_prompt, ((1,) * 4, ((2,) * 2,) * 4)]
    assert worth_packing(uneven, wide, 512) == (2 * 320 * (1536 + 320) <= 0.9 * 8 * 128 * (1536 + 128))


def test_training_takes_the_packed_rows_and_learns_the_same(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from learner import reward as module
    from learner.reward_fit import Fit, base_features

    examples = [
        RankedExample(prompt, replies, ((0,), tuple(range(1, len(replies)))), "ann", str(i), str(i), str(i), str(i), i)
        for i, (prompt, replies) in enumerate(groups(0) + groups(1))
    ]
    losses = []
    for packed in (True, False):
        base = CausalModel.load(tiny_llama)
        reward = RewardModel.create(base, RewardConfig(batch=2), 1)
        fit = Fit(reward, 0, examples, base_features(reward, examples), 0.1, 0)
        kinds = []
        monkeypatch.setattr(module, "worth_packing", lambda *_, packed=packed: packed)
        monkeypatch.setattr(reward, "rows_of", lambda batch, own=reward.rows_of, kinds=kinds: kinds.append(type(rows := own(batch))) or rows)
        losses.append([fit.epoch(0), fit.epoch(1)])
        assert set(kinds) == {PackedRows if packed else module.Rows}
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_step_is_taken_in_parts_that_fit_and_learns_the_same(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from learner import reward_fit
    from learner.reward_fit import Fit, base_features

    examples = [
        RankedExample(prompt, replies, ((0,), tuple(range(1, len(replies)))), "ann", str(i), str(i), str(i), str(i), i)
        for i, (prompt, replies) in enumerate(groups(0) + groups(1))
    ]
    learned, losses = [], []
    for tokens in (10**6, 1):
        monkeypatch.setattr(reward_fit, "pass_tokens", lambda _, tokens=tokens: tokens)
        base = CausalModel.load(tiny_llama)
        reward = RewardModel.create(base, RewardConfig(batch=4), 1)
        fit = Fit(reward, 0, examples, base_features(reward, examples), 0.1, 0)
        read, own = [], reward.rows_of
        monkeypatch.setattr(reward, "rows_of", lambda batch, own=own, read=read: read.append(len(batch)) or own(batch))
        losses.append(fit.epoch(0))
        learned.append([p.detach().clone() for p in fit.parameters])
        assert sum(read) == len(examples) and (set(read) == {1}) == (tokens == 1)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert all(torch.allclose(x, y, atol=2e-4) for x, y in zip(*learned, strict=True))


def test_a_comparison_too_long_to_be_packed_counts_for_what_it_takes_unpacked(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from learner import reward_fit
    from learner.reward_fit import Fit, base_features

    monkeypatch.setattr(reward_fit, "pass_tokens", lambda _: 25)  # four times as many in a part
    replies = ((7,) * 20, (8,) * 2, (9,) * 2)
    examples = [RankedExample((5,) * 20, replies, ((0,), (1, 2)), "ann", str(i), str(i), str(i), str(i), i) for i in range(2)]
    for limit, parts in ((40, [[0, 1]]), (30, [[0], [1]])):  # 44 columns each, or three rows of 30
        reward = RewardModel.create(CausalModel.load(tiny_llama), RewardConfig(max_tokens=limit), 1)
        assert Fit(reward, 0, examples, base_features(reward, examples), 0.1, 0)._parts([0, 1]) == parts


def test_a_prompt_with_its_replies_makes_no_pass_of_any_length() -> None:
    prompts, replies = [(1,) * 400] * 8, [(2,) * 160] * 8
    found = passes(prompts, replies, range(8), 256, Shape())
    assert sorted(found) == [[0, 1, 2], [3, 4, 5], [6, 7]] and LONG * 256 == 1024  # of 880 tokens at most
    assert sorted(passes(prompts, replies, range(3), 64, Shape())) == [[0], [1], [2]]
    assert sorted(passes(prompts, replies, range(3), 256, Shape(packs=False))) == [[0], [1], [2]]
