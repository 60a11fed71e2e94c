"""The value function by least squares: what it sees, by transformers; what it says, by numpy; what it is for, on tokens that foretell a score."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from engine.model import CausalModel
from engine.tokenizer import ChatTokenizer
from learner import rollout
from learner.config import RewardConfig
from learner.reward import RewardModel
from learner.rollout import Trajectories
from learner.value import KEEP, RIDGE, FittedValue, prefix_features


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> CausalModel:
    return CausalModel.load(tiny_llama)


def replies(model: CausalModel, tokenizer: ChatTokenizer, count: int, seed: int) -> Trajectories:
    draw = torch.Generator().manual_seed(seed)
    prompts = [tokenizer.render([{"role": "user", "content": q}]) for q in ("Hi", "Tell me about the moon.", "Why?")]
    said = [[*torch.randint(5, 400, (int(torch.randint(1, 9, (1,), generator=draw)),), generator=draw).tolist(), 1] for _ in range(count)]
    return rollout.collect(
        [prompts[i % 3] for i in range(count)], said, texts=[""] * count, finish_reasons=["stop"] * count, logprobs=[[0.0] * len(s) for s in said],
        group=1, pad_id=model.pad_id,
    )  # fmt: skip


def members(model: CausalModel) -> RewardModel:
    reward = RewardModel.create(model, RewardConfig(members=2, lora_r=4), 2)
    for i, member in enumerate(reward.members):
        torch.nn.init.normal_(member.head.weight, generator=torch.Generator().manual_seed(i))
    return reward


def seen(model: CausalModel, value: FittedValue, batch: Trajectories) -> Tensor:
    rows = torch.arange(len(batch))
    with torch.no_grad():
        inputs = value.inputs(prefix_features(model, batch, rows, rollout.reply_hidden(model, batch, rows, None)))
        return value.beside(inputs, torch.linspace(-1, 1, len(batch)), batch.group)


def test_it_sees_what_the_mean_head_makes_of_the_reply_so_far(model: CausalModel, tiny_llama: Path) -> None:
    batch, reward = replies(model, ChatTokenizer.load(tiny_llama), 4, 0), members(model)
    got = seen(model, FittedValue(reward), batch)
    theirs = AutoModelForCausalLM.from_pretrained(tiny_llama)
    weight = torch.stack([m.head.weight[0] for m in reward.members]).mean(0).detach()
    size = model.hidden_size
    for i, (prompt, said) in enumerate(zip(batch.prompts, batch.completions, strict=True)):
        with torch.no_grad():
            states = theirs(torch.tensor([[*prompt, *said]]), output_hidden_states=True).hidden_states[-1][0]
        for t in range(len(said)):
            own = states[len(prompt) : len(prompt) + t].sum(0)
            ends = sum(bool(model.sentence_ends[token]) for token in said[:t])
            n, k, m = math.log1p(t), t / 64, math.log1p(ends)
            mean, total = float(own / max(1, t) @ weight[size : 2 * size]), float(own / 64 @ weight[2 * size : 3 * size])
            by_hand = [float(states[len(prompt) - 1 + t] @ weight[:size]), mean, total, n, n * n, k, k * k, m, m * m, mean * n, total * n, 1.0, 0.0]
            assert got[i, t].tolist() == pytest.approx(by_hand, abs=2e-4), (i, t)


def test_it_hears_what_came_of_the_other_replies_to_the_prompt_and_never_of_its_own() -> None:
    came = torch.tensor([1.0, 2.0, 6.0, -1.0, 0.0, 1.0])
    seen = FittedValue.beside(torch.ones(6, 2, 12), came, 3)
    assert torch.equal(seen[..., :12], torch.ones(6, 2, 12))
    assert seen[:, :, 12].tolist() == [[x, x] for x in (4.0, 3.5, 1.5, 0.5, 0.0, -0.5)]
    came[0] = 100.0
    assert FittedValue.beside(torch.ones(6, 2, 12), came, 3)[0, :, 12].tolist() == [4.0, 4.0]


def test_it_says_what_ridge_regression_says_and_forgets_old_batches(model: CausalModel, tiny_llama: Path) -> None:
    tokenizer, value = ChatTokenizer.load(tiny_llama), FittedValue(members(model))
    rows, targets, weights = [], [], []
    for k in range(3):
        batch = replies(model, tokenizer, 12, k)
        inputs, returns = seen(model, value, batch), torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(k))
        value.fit(inputs, returns, batch.mask)
        rows.append(inputs[batch.mask].numpy())
        targets.append(returns[batch.mask].numpy())
        weights.append(np.full(len(targets[-1]), KEEP ** (2 - k)))
    x, y, w = np.concatenate(rows).astype(float), np.concatenate(targets), np.sqrt(np.concatenate(weights))
    penalty = np.sqrt(RIDGE) * np.diag(np.sqrt((w[:, None] ** 2 * x**2).sum(0)))  # ridge as rows of its own
    solved, *_ = np.linalg.lstsq(np.vstack([w[:, None] * x, penalty]), np.concatenate([w * y, np.zeros(x.shape[1])]), rcond=None)
    assert value(inputs)[batch.mask].numpy() == pytest.approx(rows[-1] @ solved, abs=1e-3)


def test_it_foresees_a_score_that_hangs_on_length(model: CausalModel, tiny_llama: Path) -> None:
    tokenizer, value = ChatTokenizer.load(tiny_llama), FittedValue(members(model))
    for k in range(4):
        batch = replies(model, tokenizer, 24, k)
        inputs, returns = seen(model, value, batch), -batch.lengths.float()[:, None].expand(batch.mask.shape)
        guess = value(inputs)
        value.fit(inputs, returns, batch.mask)
    spread = returns[batch.mask]
    assert float((guess[batch.mask] - spread).var()) < 0.85 * float(spread.var())
