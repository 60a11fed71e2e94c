"""The reward model: what a score is made of, what it stores, what it leaves alone."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from engine.model import CausalModel
from engine.tokenizer import ChatTokenizer
from learner.config import RewardConfig
from learner.reward import RewardModel
from learner.reward_fit import fit_members
from tests.ranked import SMALL, quiet, replies, shortest_wins


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> CausalModel:
    return CausalModel.load(tiny_llama)


@pytest.mark.parametrize("adapter", [None, "reward0"])
def test_the_score_is_last_state_mean_sum_and_counts_whatever_the_padding(model: CausalModel, tiny_llama: Path, adapter: str | None) -> None:
    reward = RewardModel.create(model, SMALL, 1)
    if adapter:
        model.lora.create(adapter, r=4, alpha=8)
        for name, p in model.lora.parameters(adapter).items():
            torch.nn.init.normal_(p, std=0.1 if "lora_B" in name else 0.3)
        reward.members[0].adapter = adapter
    torch.nn.init.normal_(reward.members[0].head.weight)
    tokenizer = ChatTokenizer.load(tiny_llama)
    data, spoken = replies(5, 1), tokenizer.encode("One. Two! Is it three?")
    prompts, completions = [p for p, _ in data], [(*spoken[: 3 * i], *c[0]) for i, (_, c) in enumerate(data)]
    together = reward.score(prompts, completions)
    assert together.shape == (5, 1)
    for i, (p, c) in enumerate(zip(prompts, completions, strict=True)):
        with torch.no_grad():
            hidden = model(torch.tensor([[*p, *c]]), adapter=adapter)[0]
        own, texts = hidden[len(p) :], [tokenizer.hf.decode([i]) for i in c]
        ends = sum(any(mark in text for mark in ".!?\n") for text in texts)
        counts = [math.log(1 + len(c)), math.log(1 + len(c)) ** 2, len(c) / 64, (len(c) / 64) ** 2, math.log(1 + ends), math.log(1 + ends) ** 2]
        features = torch.cat([hidden[-1], own.mean(0), own.sum(0) / 64, torch.tensor(counts)])
        expected = float(reward.members[0].head(features).detach())
        assert float(together[i, 0]) == pytest.approx(expected, abs=1e-4)


def test_replies_to_one_prompt_score_as_each_does_alone_in_any_order(model: CausalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = RewardModel.create(model, SMALL, 1)
    torch.nn.init.normal_(reward.members[0].head.weight)
    shared, other = tuple(range(10, 90)), tuple(range(40, 45))
    rows = [(shared, (7, 8)), (shared, (9,) * 5), (shared, ()), (other, (6, 7)), (shared, (7, 9))]
    kinds, plain = [], RewardModel.laid_out
    monkeypatch.setattr(RewardModel, "laid_out", lambda self, groups: kinds.append(type(found := plain(self, groups)).__name__) or found)
    alone = [float(reward.score([p], [c])[0, 0]) for p, c in rows]
    assert set(kinds) == {"Rows"}
    assert reward.score(*zip(*rows, strict=True))[:, 0].tolist() == pytest.approx(alone, abs=1e-4)
    assert "PackedRows" in kinds


def test_long_prompts_lose_their_oldest_tokens_and_never_the_reply(model: CausalModel) -> None:
    reward = RewardModel.create(model, RewardConfig(members=1, max_tokens=12), 1)
    rows = reward.rows([(range(100, 120), [7, 8, 1]), ([5], [6] * 20), ([5], [6])])
    assert rows.ids[0].tolist() == [*range(111, 120), 7, 8, 1]
    assert rows.reply.sum(1).tolist() == [3, 12, 1] and rows.valid.sum(1).tolist() == [12, 12, 2]


def test_saved_and_loaded_it_gives_the_same_scores(model: CausalModel, tmp_path: Path) -> None:
    examples = shortest_wins(12, 4)
    reward = fit_members(model, examples, SMALL, 1, 0.01, 5, quiet)
    expected = reward.score_examples(examples)
    reward.save(tmp_path / "reward")
    reward.delete()
    assert not [name for name in model.lora.names() if name.startswith("reward")]
    again = RewardModel.load(model, SMALL, tmp_path / "reward")
    for a, b in zip(expected, again.score_examples(examples), strict=True):
        assert torch.equal(a, b)
    assert (tmp_path / "reward" / "member1" / "adapter_model.safetensors").is_file()


def test_heads_on_the_bare_base_need_no_adapter_on_disk_either(model: CausalModel, tmp_path: Path) -> None:
    examples = shortest_wins(12, 4)
    reward = fit_members(model, examples, SMALL, 0, 0.01, 5, quiet)
    assert [m.adapter for m in reward.members] == [None, None]
    reward.save(tmp_path / "heads")
    assert sorted(path.name for path in (tmp_path / "heads").iterdir()) == ["heads.safetensors", "reward.json"]
    again = RewardModel.load(model, SMALL, tmp_path / "heads")
    for a, b in zip(reward.score_examples(examples), again.score_examples(examples), strict=True):
        assert torch.equal(a, b)
