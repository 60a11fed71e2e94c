"""PPO on a tiny model: exact at step 0, really raises a planted reward, stops where it must, never leaves damage."""

from __future__ import annotations

import math
import random
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from engine.engine import Engine
from engine.model import CausalModel
from engine.tokenizer import ChatTokenizer
from learner import rollout
from learner.config import ConfigError, PPOConfig, RewardConfig
from learner.faults import (
    Endings,
    FaultPrice,
    Outside,
    broken_share,
    fault_advantages,
    fault_rewards,
    fault_tokens,
)
from learner.kl_control import KLController, kl_price, kl_warranted
from learner.ppo import Mixed, PPOError, PPOResult, learn, prompt_batches, train_ppo
from learner.reward import RewardDiverged, RewardModel
from learner.rollout import Trajectories, collect, reply_logprobs
from learner.scorer import Scorer
from learner.stopping import Finalists, Judged, Kept
from learner.value import TrainedValue

QUESTIONS = ["Hi", "Tell me about the moon.", "Why?", "Who are you?", "Name a fruit.", "Thanks!"]
SMALL = PPOConfig(
    temperature=1.0,
    estimator="gae", updates=3, prompts_per_update=4, replies_per_prompt=4, max_new_tokens=12, epochs=1, minibatches=1, lora_r=4, lora_alpha=8,
    lr=5e-3, value_lr=5e-3, broken_penalty=0.0, missing_eos_penalty=0.0, kl_target=20.0, kl_ceiling=10.0, max_seconds=300.0,
)  # fmt: skip


class Planted(RewardModel):
    """Real members (the value function starts from them), and scores that a function gives."""

    def plant(self, function: object) -> Planted:
        self.function = function
        return self

    def score(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], members: Sequence[int] | None = None, features: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        return torch.tensor([[float(self.function(c))] * len(self.members) for c in completion_ids])


@pytest.fixture
def model(tiny_llama: Path) -> CausalModel:
    return CausalModel.load(tiny_llama)


@pytest.fixture
def tokenizer(tiny_llama: Path) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_llama)


@pytest.fixture
def prompts(tokenizer: ChatTokenizer) -> list[list[int]]:
    return [tokenizer.render([{"role": "user", "content": q}]) for q in QUESTIONS]


def reward_for(model: CausalModel, function: object, prefix: str = "reward") -> Planted:
    return Planted.create(model, RewardConfig(members=2, lora_r=4), 2, prefix=prefix).plant(function)


def even_share(completion: Sequence[int]) -> float:
    """What the planted reward likes: tokens with an even id."""
    return sum(t % 2 == 0 for t in completion) / len(completion)


def state(model: CausalModel, name: str) -> list[Tensor]:
    return [p.detach().clone() for p in model.lora.parameters(name).values()]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_at_step_zero_kl_is_zero_and_the_ratio_is_one(model: CausalModel, tokenizer: ChatTokenizer, prompts: list[list[int]], temperature: float) -> None:
    config = replace(SMALL, updates=1, temperature=temperature)
    first = train_ppo(model, tokenizer, reward_for(model, even_share), prompts=prompts, policy="p", config=config).history[0]
    assert first["kl"] == 0.0 and first["ratio"] == 1.0 and first["step_kl"] == 0.0 and first["clipfrac"] == 0.0
    assert first["engine_gap"] < 1e-3  # the engine's temperature and the training pass's are the same


@pytest.mark.parametrize("estimator", ["gae-ls", "gae", "rloo", "reinforce"])
def test_a_planted_reward_is_really_raised(model: CausalModel, tokenizer: ChatTokenizer, prompts: list[list[int]], estimator: str) -> None:
    engine = Engine(model, tokenizer, max_sequences=60)

    def replies(version: str) -> list[list[int]]:
        return rollout.sample(engine, prompts, version=version, group=10, max_tokens=12, temperature=1.0, seed=99).completions

    said = [t for c in replies("base") for t in c]
    liked = max(set(said), key=said.count)

    def share(tokens: Sequence[int]) -> float:
        return sum(t == liked for t in tokens) / len(tokens)

    config = replace(SMALL, updates=12, epochs=2, minibatches=2, estimator=estimator, prompts_per_update=6, lr=1e-2, value_lr=1e-2)
    result = train_ppo(model, tokenizer, reward_for(model, share), prompts=prompts, policy="p", config=config, seed=1)
    now = [t for c in replies("p") for t in c]
    before, after = share(said), share(now)
    spread = (after * (1 - after) / len(now)) ** 0.5  # how far it rises depends on the machine's rounding; that it rises does not
    assert after > before + 6 * spread, (before, after, [h["score"] for h in result.history])
    assert result.kl > 0.5 and result.kept_update == 12


def test_scores_of_zero_leave_only_what_cut_replies_cost(model: CausalModel, tokenizer: ChatTokenizer, prompts: list[list[int]]) -> None:
    config = replace(SMALL, updates=1, missing_eos_penalty=3.0)
    first = train_ppo(model, tokenizer, reward_for(model, lambda c: 0.0), prompts=prompts, policy="p", config=config).history[0]
    assert first["cut"] > 0.5 and first["reward"] == pytest.approx(-3.0 * first["cut"], abs=1e-6)


def test_over_the_ceiling_the_run_stops_and_goes_back(model: CausalModel, tokenizer: ChatTokenizer, prompts: list[list[int]]) -> None:
    config = replace(SMALL, updates=10, lr=5e-2, kl_coef=0.0, kl_target=2.0, kl_ceiling=1.0, back_offs=0)
    result = train_ppo(model, tokenizer, reward_for(model, even_share), prompts=prompts, policy="p", config=config)
    assert "ceiling" in result.stopped and result.history[-1]["kl"] > 2.0 >= result.kl
    assert result.kept_update < result.history[-1]["update"]
    ids = [prompts[i % 6] for i in range(24)]
    batch = rollout.sample(Engine(model, tokenizer, max_sequences=24), ids, version="p", group=1, max_tokens=12, temperature=1.0, seed=5)
    with torch.no_grad():
        new = rollout.reply_logprobs(model, batch, torch.arange(24), "p", 1.0)
        ref = rollout.reply_logprobs(model, batch, torch.arange(24), None, 1.0)
    assert float((new - ref).sum(1).mean()) < 4.0  # what is in the adapter is the kept policy, not the one that ran away


def test_over_the_ceiling_it_goes_on_from_the_last_good_state_with_smaller_steps(
    model: CausalModel, tokenizer: ChatTokenizer, prompts: list[list[int]]
) -> None:
    config = replace(SMALL, updates=10, lr=5e-2, kl_coef=0.02, kl_target=2.0, kl_ceiling=1.0, back_offs=8)
    result = train_ppo(model, tokenizer, reward_for(model, even_share), prompts=prompts, policy="p", config=config)
    over = [row["update"] for row in result.history if row["kl"] > 2.0]
    assert over and "policy_loss" not in result.history[over[0]]  # no update was made from there
    after = result.history[over[0] + 1]
    assert after["kl"] == pytest.approx(result.history[over[0] - 1]["kl"], abs=1.0) and after["kl"] <= 2.0
    assert after["kl_coef"] > result.history[over[0]]["kl_coef"]
    assert any("policy_loss" in row for row in result.history[over[0] + 1 :])  # and it was learned from
    assert result.kept_update >= over[0] - 1 and result.kl <= 2.0


def test_what_was_gone_back_to_is_learned_from_even_if_it_measures_over_the_ceiling_now(
    model: CausalModel, tokenizer: ChatTokenizer, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """48 replies are a noisy measure: going back to the same policy again, with half the step each time, would end the learning."""
    sampled, sample, measure = [0], rollout.sample, rollout.reply_divergence

    def counted(*args: object, **kwargs: object) -> rollout.Trajectories:
        sampled[0] += 1  # the reference's replies, then an update's each
        return sample(*args, **kwargs)

    def noisy(*args: object) -> rollout.Divergence:
        found = measure(*args)
        return replace(found, kl=found.kl + 1.0) if sampled[0] - 2 in (3, 4, 5) else found

    monkeypatch.setattr(rollout, "sample", counted)
    monkeypatch.setattr(rollout, "reply_divergence", noisy)
    config = replace(SMALL, updates=8, lr=1e-3, kl_target=5.0, kl_ceiling=1.0, back_offs=1)
    result = train_ppo(model, tokenizer, reward_for(model, even_share), prompts=prompts, policy="p", config=config)
    assert [row["update"] for row in result.history if row["kl"] > 5.0] == [3, 4, 5]
    # From 3 it went back; 4 is that same policy again, and learned from; 5 was led over the ceiling again, and that was once too often.
    assert [row["update"] for row in result.history if "policy_loss" not in row] == [3, 5]
    assert "went back to update 2" in result.stopped and result.kept_update == 2  # which 4 was, too


def test_a_run_that_always_went_back_to_where_it_began_says_that_nothing_came_of_it(
    model: CausalModel, tokenizer: ChatTokenizer, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled, sample, measure = [0], rollout.sample, rollout.reply_divergence

    def counted(*args: object, **kwargs: object) -> rollout.Trajectories:
        sampled[0] += 1
        return sample(*args, **kwargs)

    def far(*args: object) -> rollout.Divergence:
        found = measure(*args)
        return replace(found, kl=found.kl + 1.0) if sampled[0] - 2 in (1, 3, 5, 7) else found

    monkeypatch.setattr(rollout, "sample", counted)
    monkeypatch.setattr(rollout, "reply_divergence", far)
    config = replace(SMALL, updates=8, lr=1e-3, kl_target=5.0, kl_ceiling=1.0, back_offs=3)
    result = train_ppo(model, tokenizer, reward_for(model, even_share), prompts=prompts, policy="p", config=config)
    assert result.kept_update == 0 and "went back to update 0" in result.stopped
    assert not any(p.any() for name, p in model.lora.parameters("p").items() if ".lora_B." in name)


def test_the_base_over_the_ceiling_of_a_named_reference_is_left_for_it_too(model: CausalModel, tokenizer: ChatTokenizer, prompts: list[list[int]]) -> None:
    model.lora.create("named", r=4, seed=0)
    with torch.no_grad():
        for p in model.lora.parameters("named").values():
            p.add_(0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    config = replace(SMALL, updates=1, kl_target=0.25, kl_ceiling=2.0)
    result = train_ppo(model, tokenizer, reward_for(model, even_share), prompts=prompts, policy="p", config=config, reference="named")
    assert result.history[0]["kl"] == pytest.approx(0.0, abs=1e-4) and "over the ceiling of 0.5" in str(result.note)
    for name in ("p", "named"):
        model.lora.delete(name)


def test_a_start_over_the_ceiling_is_left_for_the_reference(model: CausalModel, tokenizer: ChatTokenizer, prompts: list[list[int]]) -> None:
    model.lora.create("far", r=4, seed=0)
    with torch.no_grad():
        for p in model.lora.parameters("far").values():
            p.add_(0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    reward = reward_for(model, even_share)
    spent = replace(SMALL, updates=1, kl_target=0.25, kl_ceiling=2.0)
    result = train_ppo(model, tokenizer, reward, prompts=prompts, policy="p", config=spent, start="far")
    assert result.history[0]["kl"] == 0.0 and "nats from it, over the ceiling of 0.5" in str(result.note)
    model.lora.delete("p")
    result = train_ppo(model, tokenizer, reward, prompts=prompts, policy="p", config=replace(spent, kl_target=1e3), start="far")
    assert result.history[0]["kl"] > 1.0 and result.note is None
    model.lora.delete("p")
    named = train_ppo(model, tokenizer, reward, prompts=prompts, policy="p", config=spent, start="far", reference="far")
    assert named.history[0]["kl"] == 0.0 and named.note is None  # measured against the reference that was named, not against the base


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_not_finite_ends_the_run_and_leaves_the_start(
    model: CausalModel, tokenizer: ChatTokenizer, prompts: list[list[int]], bad: float
) -> None:
    calls = []

    def turns_bad(completion: Sequence[int]) -> float:
        calls.append(1)
        return bad if len(calls) > 2 * 16 else even_share(completion)  # the unit and update 0 are fine

    with pytest.raises(RewardDiverged, match="not a finite number"):
        train_ppo(model, tokenizer, reward_for(model, turns_bad), prompts=prompts, policy="p", config=SMALL)
    ups = [p for name, p in model.lora.parameters("p").items() if "lora_B" in name]
    assert all((p == 0).all() for p in ups)  # update 1's policy was never measured, so it is not kept
    assert "value" not in model.lora.names()


def test_the_run_goes_back_where_held_out_members_part(model: CausalModel, tokenizer: ChatTokenizer, prompts: list[list[int]]) -> None:
    config = replace(SMALL, updates=12, judge_every=1, patience=2, part=0.3, epochs=2, minibatches=2)
    reward = reward_for(model, even_share)
    opposed = reward_for(model, lambda c: -even_share(c), "judge")
    result = train_ppo(model, tokenizer, reward, prompts=prompts, policy="p", config=config, judges=opposed)
    assert "no longer agree" in result.stopped and result.kept_update < result.history[-1]["update"] - 1


def test_held_out_members_part_only_where_the_score_does_not_fall_with_them() -> None:
    def ends(looks: list[tuple[float, float]]) -> list[bool]:
        judged = Judged(patience=2, part=0.5)
        return [judged.parted(judges, score) for judges, score in looks]

    assert ends([(1.9, 1.8), (1.3, 1.3), (1.1, 1.2)]) == [False] * 3  # the KL price called it back: both like it less
    assert ends([(1.0, 1.0), (0.3, 1.0), (0.2, 1.4)]) == [False, False, True]
    assert ends([(1.0, 1.0), (0.3, 1.5), (0.7, 1.6)]) == [False] * 3  # one look is noise
    assert ends([(1.0, 1.0), (0.2, 0.8), (0.1, 0.9)]) == [False, False, True]  # by more than the score's own fall


def test_the_finalists_are_those_that_were_best_over_a_few_batches(model: CausalModel) -> None:
    model.lora.create("p", r=2, seed=0)

    def found(worth: Sequence[float], count: int = 3, window: int = 2) -> list[int]:
        finalists = Finalists(count, window)
        for update, value in enumerate(worth):
            finalists.look(value, Kept(model, "p", update))
        return [state.update for _, state in finalists.found]

    assert found([9.0, 0.0, 1.0, 4.0, 3.0, 0.0]) == [1, 4]  # means 4.5, 0.5, 2.5, 3.5, 1.5
    assert found([0.0, 9.0, 0.0, 5.0, 5.0, 0.0], count=1) == [4]  # one good batch is less than two
    assert found([1.0, 2.0, 3.0, 4.0]) == [3]  # of neighbours the better stands for all
    assert found([6.0, 6.0, 0.0, 4.0, 4.0, 0.0, 5.0, 5.0, 0.0, 1.0, 1.0], count=3) == [1, 7, 4]
    assert found([9.0], window=3) == []


def test_of_the_finalists_the_best_is_found_by_asking_each_as_the_policy(model: CausalModel) -> None:
    model.lora.create("p", r=2, seed=0)
    first = next(iter(model.lora.parameters("p").values()))
    finalists = Finalists(3, window=1)
    assert finalists.best(lambda _: 0.0) is None
    for update, worth in enumerate((3.0, 1.0, 2.0)):
        torch.nn.init.constant_(first, float(update))
        finalists.look(worth, Kept(model, "p", update))
    assert [state.update for _, state in finalists.found] == [0, 2, 1]
    best = finalists.best(lambda _: {0: 1.0, 1: 5.0, 2: 4.0}[int(first.flatten()[0])])
    assert best is not None and best.update == 1


def test_what_a_run_unlearned_again_is_not_what_it_leaves(model: CausalModel, tokenizer: ChatTokenizer, prompts: list[list[int]]) -> None:
    before = rollout.sample(Engine(model, tokenizer, max_sequences=60), prompts, version="base", group=10, max_tokens=12, temperature=1.0, seed=99)
    said = [t for c in before.completions for t in c]
    liked = max(set(said), key=said.count)
    calls: list[int] = []

    def turning(completion: Sequence[int]) -> float:
        """The share of the liked token, until from batch 10 to the last, 24, it is not liked at all."""
        calls.append(1)
        share = sum(t == liked for t in completion) / len(completion)
        return -share if 10 <= (len(calls) - 1) // 24 - 1 <= 24 else share  # before batch 0 the unit, after the last the finalists

    config = replace(SMALL, updates=24, epochs=2, minibatches=2, prompts_per_update=6, lr=1e-2, value_lr=1e-2)
    result = train_ppo(model, tokenizer, reward_for(model, turning), prompts=prompts, policy="p", config=config, seed=1)
    assert 5 <= result.kept_update <= 9 and result.history[-1]["update"] == 24
    assert f"went back to update {result.kept_update}, the best of them" in result.stopped
    assert result.kl == pytest.approx(result.history[result.kept_update]["kl"])


def test_a_run_is_paid_for_beating_a_good_reply_of_the_version_it_begins_at(
    model: CausalModel, tokenizer: ChatTokenizer, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[Scorer, Trajectories, Trajectories | None]] = []

    class Watched(Scorer):
        def __init__(self, reward: RewardModel, reference: Trajectories, start: Trajectories | None) -> None:
            super().__init__(reward, reference, start)
            made.append((self, reference, start))

    monkeypatch.setattr("learner.ppo.Scorer", Watched)
    reward = reward_for(model, lambda c: 8 * even_share(c))
    config = replace(SMALL, updates=8, epochs=2, minibatches=2)
    train_ppo(model, tokenizer, reward, prompts=prompts, policy="live", config=config)
    train_ppo(model, tokenizer, reward, prompts=prompts, policy="next", start="live", config=replace(config, updates=1))
    (_, unit, begun), (second, again, live) = made
    assert begun is None and live is not None and again.completions == unit.completions
    assert live.prompts == unit.prompts and live.completions != unit.completions
    raw = reward.score(live.prompts, live.completions)
    assert torch.allclose(second.good, raw.mean(0) + raw.std(0))


@pytest.mark.parametrize(("estimator", "limit", "start", "reference", "shared"), [
    ("gae-ls", 512, None, None, True), ("rloo", 512, None, None, True), ("gae-ls", 512, "live", None, True),
    ("gae-ls", 12, None, None, False), ("gae-ls", 512, "live", "live", False),
])  # fmt: skip
def test_the_base_reads_a_batch_once_where_it_is_the_reference_and_members_read_it_too(
    model: CausalModel, tokenizer: ChatTokenizer, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch,
    estimator: str, limit: int, start: str | None, reference: str | None, shared: bool,
) -> None:  # fmt: skip
    if start:
        model.lora.create(start, r=4, seed=0)
        with torch.no_grad():
            for p in model.lora.parameters(start).values():
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    reward = RewardModel.create(model, RewardConfig(members=3, lora_r=4, max_tokens=limit), 3)
    judges = RewardModel.create(model, RewardConfig(members=2, lora_r=4, max_tokens=limit), 2, "judge")
    for i, member in enumerate((*reward.members, *judges.members)):
        torch.nn.init.normal_(member.head.weight, generator=torch.Generator().manual_seed(i))
    model.lora.create("reward2", r=4, seed=0)  # two members read the base, the third its own adapter
    reward.members[2].adapter = "reward2"
    with torch.no_grad():
        for p in model.lora.parameters("reward2").values():
            p.add_(0.1)
    read, seen = RewardModel.score, list[bool]()

    def compared(self: RewardModel, p: Sequence[Sequence[int]], c: Sequence[Sequence[int]], members: None = None, features: torch.Tensor | None = None) -> torch.Tensor:
        seen.append(features is not None)
        anew = read(self, p, c)
        assert features is None or (torch.allclose(read(self, p, c, features=features), anew, atol=1e-4) and anew.std(0).min() > 1e-2)
        return anew

    monkeypatch.setattr(RewardModel, "score", compared)
    config = replace(SMALL, estimator=estimator, updates=2, judge_every=1, kl_ceiling=1e9)
    train_ppo(model, tokenizer, reward, judges=judges, prompts=prompts, policy="p", start=start, reference=reference, config=config)
    assert len(seen) >= 6 and set(seen) == {shared}


def free(batch: Trajectories) -> tuple[Endings, Outside]:
    """Ending costs nothing anywhere, and anything may be said."""
    return Endings(torch.zeros(batch.mask.shape), (1,)), Outside(torch.full((*batch.mask.shape, 1), -1), 0.0)


def spoken(model: CausalModel, tokenizer: ChatTokenizer, texts: Sequence[str], reasons: Sequence[str]) -> Trajectories:
    ids = [[*tokenizer.encode(text), tokenizer.eos_ids[0]] for text in texts]
    return collect(
        [[5, 6]] * len(ids), ids, texts=texts, finish_reasons=reasons, logprobs=[[0.0] * len(i) for i in ids], group=1, pad_id=model.pad_id,
    )  # fmt: skip


def test_a_fault_costs_at_the_tokens_in_which_it_came_about(model: CausalModel, tokenizer: ChatTokenizer) -> None:
    texts = ["Bees can can fly. They eat.", "Bees fly. They fly.", "Bees fly", "Bees fly. Bees can fly. Bees can fly. Yes."]
    batch = spoken(model, tokenizer, texts, ["stop"] * 4)
    spans = fault_tokens(batch, tokenizer)
    assert [row for row, *_ in spans] == [0, 2, 3]
    for (row, first, last), before, upto in ((spans[0], "Bees ", "Bees can can"), (spans[2], texts[3][:24], texts[3][:37])):
        said = [tokenizer.decode(batch.completions[row][:k]) for k in (first, first + 1, last, last + 1)]
        assert len(said[0]) <= len(before) < len(said[1]) and len(said[2]) < len(upto) <= len(said[3])
    assert spans[1] == (2, len(batch.completions[2]) - 1, len(batch.completions[2]) - 1)  # the end token came too soon
    rewards = fault_rewards(spans, batch.mask, 2.5)
    assert rewards.sum(1).tolist() == [-2.5, 0.0, -2.5, -2.5] and rewards[0, spans[0][2]] == -2.5


def test_ending_costs_wherever_it_would_leave_a_reply_unfinished(model: CausalModel, tokenizer: ChatTokenizer) -> None:
    texts = ["Bees fly. They eat", "Bees can can fly.", "Bees (all of"]
    batch = spoken(model, tokenizer, texts, ["stop", "stop", "length"])
    ends = Endings.of(batch, tokenizer, (7, 9), 2.5)
    assert ends.ids == (7, 9)
    for row, (text, tokens) in enumerate(zip(texts, batch.completions, strict=True)):
        said = [tokenizer.decode(tokens[:k]) for k in range(len(tokens))]  # before each token, the end token among them
        assert said[0] == "" and said[-1] == text and any(s.endswith("fly.") for s in said) == (row < 2)
        assert ends.costs[row].tolist() == [0.0 if s.strip().endswith("fly.") else 2.5 for s in said] + [0.0] * (batch.mask.shape[1] - len(tokens))
    assert [row for row, *_ in fault_tokens(batch, tokenizer)] == [0, 1]


def test_where_ending_would_break_replies_the_policy_learns_not_to_though_it_is_paid_to(
    model: CausalModel, tokenizer: ChatTokenizer, prompts: list[list[int]]
) -> None:
    """Short replies are liked best; a tiny model's are next to never whole sentences, so ending is a fault almost anywhere."""

    def replies() -> Trajectories:
        return rollout.sample(Engine(model, tokenizer, max_sequences=16), prompts, version="base", group=4, max_tokens=12, temperature=1.0, seed=0)

    said = Counter(t for c in replies().completions for t in c if t > 4)
    model.eos_ids = (1, *(t for t, _ in said.most_common(2)))  # or it would end too seldom to learn anything
    batch, likely = replies(), {}

    def ending(adapter: str | None) -> float:
        with torch.no_grad():
            found = rollout.reply_chances(model, batch, torch.arange(len(batch)), adapter, 1.0, model.eos_ids).ending
        return float(found[batch.mask].mean())

    for penalty in (0.0, 8.0):
        config = replace(SMALL, estimator="rloo", broken_penalty=penalty, updates=12)
        train_ppo(model, tokenizer, reward_for(model, lambda c: -len(c)), prompts=prompts, policy="p", config=config, seed=1)
        likely[penalty] = ending("p")
        model.lora.delete("p")
    assert likely[8.0] < ending(None) < 0.9 * likely[0.0], likely


def test_what_the_reference_would_not_say_becomes_less_likely_where_it_costs(
    model: CausalModel, tokenizer: ChatTokenizer, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout, "NUCLEUS", model.vocab_size)  # a tiny model's is wide
    likely = {}
    for penalty in (0.0, 80.0):
        config = replace(SMALL, estimator="rloo", broken_penalty=1.0, outside_penalty=penalty, nucleus=0.6, updates=10)
        result = train_ppo(model, tokenizer, reward_for(model, even_share), prompts=prompts, policy="p", config=config, seed=1)
        likely[penalty] = [row["outside"] for row in result.history[:-1]]
        model.lora.delete("p")
    assert likely[80.0][0] == pytest.approx(likely[0.0][0], abs=0.05) and 0.3 < likely[0.0][0] < 0.5
    assert likely[80.0][-1] < min(likely[80.0][0], likely[0.0][-1]) - 0.01, likely


def test_end_tokens_that_the_vocabulary_has_no_row_for_are_none(model: CausalModel, tokenizer: ChatTokenizer, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    of = Endings.of
    monkeypatch.setattr(Endings, "of", lambda batch, tokenizer, ids, price: (given.append(ids), of(batch, tokenizer, ids, price))[1])
    model.eos_ids = (1, -1, model.vocab_size)
    train_ppo(model, tokenizer, reward_for(model, even_share), prompts=prompts, policy="p", config=replace(SMALL, updates=1), seed=1)
    assert given == [(1,)]


def test_a_reply_that_was_cut_is_not_broken_by_its_end_alone(model: CausalModel, tokenizer: ChatTokenizer) -> None:
    texts = ["Bees fly. They are", "Bees can can fly. They are", "Bees fly (and"]
    assert [row for row, *_ in fault_tokens(spoken(model, tokenizer, texts, ["length"] * 3), tokenizer)] == [1]
    assert broken_share(fault_tokens(spoken(model, tokenizer, texts, ["stop"] * 3), tokenizer), 3) == 1.0


def test_the_price_of_a_fault_by_hand() -> None:
    price = FaultPrice(3.0, reference=0.05)  # so 0.035 is aimed at
    seen = []
    for rate in (0.0525, 0.5, 0.0175, 0.0, 0.0):
        price.update(rate)
        seen.append(price.price)
    assert seen == pytest.approx([3.3, 3.3 * 1.2, 3.3 * 1.2 * 0.9, 3.0, 3.0])  # never below its start
    for _ in range(100):
        price.update(1.0)
    assert price.price == 24.0
    whole = FaultPrice(3.0, reference=0.0)
    whole.update(0.02)
    assert whole.price == pytest.approx(3.6)


def test_the_tokens_before_a_fault_answer_for_it_less_the_further_they_are() -> None:
    mask = torch.ones(2, 5, dtype=torch.bool)
    found = fault_advantages([(0, 2, 3), (1, 1, 1), (1, 3, 4)], mask, 2.0, 0.5)
    assert found.tolist() == [[-0.5, -1.0, -2.0, -2.0, 0.0], [-1.0, -2.0, -1.0, -2.0, -2.0]]  # by hand


def test_mixing_in_demonstrations_keeps_them_likely(model: CausalModel, tokenizer: ChatTokenizer, prompts: list[list[int]]) -> None:
    shown = [(prompts[i], [*tokenizer.encode("A plain reply."), tokenizer.eos_ids[0]]) for i in range(2)]
    config = replace(SMALL, estimator="rloo", updates=4, ptx_replies=2)
    after = {}
    for coef in (0.0, 1.0):
        result = train_ppo(
            model, tokenizer, reward_for(model, even_share, prefix=f"r{coef}"), prompts=prompts, policy=f"p{coef}",
            config=replace(config, ptx_coef=coef), demonstrations=shown,
        )  # fmt: skip
        batch = collect(
            [p for p, _ in shown], [r for _, r in shown], texts=["", ""], finish_reasons=["stop"] * 2,
            logprobs=[[0.0] * len(r) for _, r in shown], group=1, pad_id=model.pad_id,
        )  # fmt: skip
        with torch.no_grad():
            after[coef] = float(reply_logprobs(model, batch, torch.arange(2), result.adapter, 1.0).sum())
    assert after[1.0] > after[0.0] + 1.0


def test_the_mixed_loss_is_the_cross_entropy_of_the_replies(
    model: CausalModel, tokenizer: ChatTokenizer, prompts: list[list[int]], tiny_llama: Path
) -> None:
    model.lora.create("p", r=2, alpha=4)
    shown = [(prompts[0], [7, 8, 9]), (prompts[1], [10, 11])]
    mixed = Mixed(model, tokenizer, shown, spoken(model, tokenizer, ["Hi."], ["stop"]), replace(SMALL, ptx_replies=2))
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    nats = 0.0
    for prompt, reply in shown:
        with torch.no_grad():
            logprobs = plain(torch.tensor([[*prompt, *reply]])).logits[0].log_softmax(-1)
        nats -= sum(float(logprobs[len(prompt) - 1 + i, token]) for i, token in enumerate(reply))
    assert float(mixed.loss("p", random.Random(0)).detach()) == pytest.approx(nats / 5, abs=1e-4)


def test_without_demonstrations_the_references_sound_replies_are_mixed_in(model: CausalModel, tokenizer: ChatTokenizer) -> None:
    said = spoken(model, tokenizer, ["Bees are small.", "Bees are are small.", "Bees"], ["stop", "stop", "length"])
    mixed = Mixed(model, tokenizer, (), said, SMALL)
    assert mixed.batch.completions == [said.completions[0]]
    with pytest.raises(PPOError, match="ptx_coef"):
        Mixed(model, tokenizer, (), spoken(model, tokenizer, ["Bees"], ["length"]), SMALL)


def test_time_ends_a_run_between_updates(model: CausalModel, tokenizer: ChatTokenizer, prompts: list[list[int]]) -> None:
    result = train_ppo(model, tokenizer, reward_for(model, even_share), prompts=prompts, policy="p", config=replace(SMALL, max_seconds=1e-6))
    assert result.kept_update == 0 and "were up" in result.stopped


def test_steps_grow_in_the_warm_up_and_shrink_with_whatever_runs_out_first(
    model: CausalModel, tokenizer: ChatTokenizer, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *rest: (rates.append(self.param_groups[0]["lr"]), step(self, *rest))[1])
    config = replace(SMALL, estimator="gae-ls", updates=8, warmup=2, lr=1.0e-3)
    result = train_ppo(model, tokenizer, reward_for(model, even_share), prompts=prompts, policy="p", config=config, schedule=[0.0, 0.25, 0.5, 1.0])
    assert rates == pytest.approx([0.5e-3, 0.75e-3, 0.5e-3]) and [row["done"] for row in result.history] == [0.0, 0.25, 0.5, 1.0]
    rates.clear()
    clock = replace(config, warmup=1, max_seconds=3.0)  # a clock that only the test moves: a second an update
    now = iter(range(10**6))
    monkeypatch.setattr("learner.ppo.time.monotonic", lambda: float(next(now)))
    slow = train_ppo(model, tokenizer, reward_for(model, even_share), prompts=prompts, policy="q", config=clock)
    assert slow.stopped.startswith("3 s were up after") and rates == pytest.approx([1e-3 * max(0.1, 1 - row["done"]) for row in slow.history[:-1]])


def test_a_budget_of_practised_tokens_ends_a_run(model: CausalModel, tokenizer: ChatTokenizer, prompts: list[list[int]]) -> None:
    def run(tokens: int) -> PPOResult:
        return train_ppo(model, tokenizer, reward_for(model, even_share), prompts=prompts, policy=f"p{tokens}", config=replace(SMALL, updates=3, tokens=tokens))

    free = run(10**6)
    assert len(free.history) == 4 and free.stopped == "all 3 updates done"
    first = round(free.history[0]["length"] * SMALL.prompts_per_update * SMALL.replies_per_prompt)
    assert run(first).stopped == f"{first} tokens were practised after 1 updates"
    assert run(first + 1).stopped == f"{first + 1} tokens were practised after 2 updates"


def test_prompts_that_leave_no_room_are_told(model: CausalModel, tokenizer: ChatTokenizer) -> None:
    with pytest.raises(PPOError, match="no prompt leaves room"):
        train_ppo(model, tokenizer, reward_for(model, even_share), prompts=[[5] * 505], policy="p", config=SMALL)


def test_the_same_seed_makes_the_same_policy(model: CausalModel, tokenizer: ChatTokenizer, prompts: list[list[int]]) -> None:
    config = replace(SMALL, updates=2)
    ends = []
    for name in ("a", "b"):
        train_ppo(model, tokenizer, reward_for(model, even_share), prompts=prompts, policy=name, config=config, seed=4)
        ends.append(state(model, name))
    assert all(torch.equal(x, y) for x, y in zip(*ends, strict=True))


def test_an_exploding_ratio_drops_the_run_before_it_moves_the_policy(model: CausalModel, tokenizer: ChatTokenizer, prompts: list[list[int]]) -> None:
    model.lora.create("p", r=4, seed=0)
    engine = Engine(model, tokenizer, max_sequences=16)
    batch = rollout.sample(engine, prompts, version="p", group=2, max_tokens=12, temperature=1.0, seed=0)
    with torch.no_grad():
        old = rollout.reply_logprobs(model, batch, torch.arange(12), "p", 1.0) - 3.0  # e^3, 20 times as likely now
    trained = list(model.lora.parameters("p").values())
    before = state(model, "p")
    with pytest.raises(PPOError, match="20 times as likely within one batch: the run is dropped; lower ppo"):
        learn(model, "p", None, None, batch, old, torch.ones(batch.mask.shape), *free(batch), None, None, torch.optim.SGD(trained, lr=1.0), trained, SMALL, random.Random(0))
    assert all(torch.equal(a, b) for a, b in zip(before, state(model, "p"), strict=True))


def test_a_minibatch_in_chunks_gives_the_gradient_of_the_whole(model: CausalModel, tokenizer: ChatTokenizer, prompts: list[list[int]]) -> None:
    moves = []
    for tokens in (10**6, 40):
        model.lora.create("p", r=4, seed=0)
        engine = Engine(model, tokenizer, max_sequences=16)
        batch = rollout.sample(engine, prompts, version="p", group=2, max_tokens=12, temperature=1.0, seed=0)
        with torch.no_grad():
            old = rollout.reply_logprobs(model, batch, torch.arange(12), "p", 1.0)
        advantages = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(0))
        trained = list(model.lora.parameters("p").values())
        before = state(model, "p")
        optimizer = torch.optim.SGD(trained, lr=1.0)
        learn(model, "p", None, None, batch, old, advantages, *free(batch), None, None, optimizer, trained, replace(SMALL, chunk_tokens=tokens, max_grad_norm=1e9), random.Random(0))
        moves.append([b - a for a, b in zip(before, state(model, "p"), strict=True)])
    assert max(float(m.abs().max()) for m in moves[0]) > 1e-4
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(*moves, strict=True))


def test_the_value_function_starts_as_the_reward_of_what_has_been_said(model: CausalModel, tokenizer: ChatTokenizer, prompts: list[list[int]]) -> None:
    reward = RewardModel.create(model, RewardConfig(members=2, lora_r=4), 2)
    torch.nn.init.normal_(reward.members[0].head.weight, generator=torch.Generator().manual_seed(0))
    batch = rollout.sample(Engine(model, tokenizer, max_sequences=12), prompts, version="base", group=2, max_tokens=8, temperature=1.0, seed=0)
    scorer = Scorer(reward, batch)
    with torch.no_grad():
        values = TrainedValue(model, reward, scorer)(batch, torch.arange(12))
    prefixes = [c[:5] for c in batch.completions]
    liked = (reward.score(batch.prompts, prefixes)[:, 0] - scorer.good[0]) / 2 - math.log(2)  # log sigmoid, to first order
    scores = (liked - scorer.mean[0]) / scorer.std[0]
    rows = [i for i, c in enumerate(batch.completions) if len(c) > 5]
    assert rows and torch.allclose(values[rows, 5], scores[rows], atol=1e-3)


def test_scores_are_log_odds_against_a_good_reply_whatever_a_members_offset(model: CausalModel, tokenizer: ChatTokenizer, prompts: list[list[int]]) -> None:
    batch = rollout.sample(Engine(model, tokenizer, max_sequences=12), prompts, version="base", group=2, max_tokens=8, temperature=1.0, seed=0)
    reward = RewardModel.create(model, RewardConfig(members=2, lora_r=4), 2)
    reward.score = lambda p, c, features: torch.tensor([[4 * even_share(x), 50 + 4 * even_share(x)] for x in c])  # type: ignore[method-assign]
    scorer = Scorer(reward, batch)
    units = scorer(batch)
    assert torch.allclose(units[:, 0], units[:, 1], atol=1e-4) and units.mean(0).abs().max() < 1e-5
    within = units[:, 0].view(-1, 2)
    pooled = ((within - within.mean(1, keepdim=True)) ** 2).sum() / (12 - 6)
    assert float(pooled) == pytest.approx(1.0, rel=1e-4)
    raw = [4 * even_share(c) for c in batch.completions]
    good = statistics.mean(raw) + statistics.stdev(raw)
    odds = [-math.log1p(math.exp(good - x)) for x in raw]  # by hand: log sigmoid(score - good)
    assert float(units[3, 0] - units[8, 0]) == pytest.approx((odds[3] - odds[8]) / float(scorer.std[0]), abs=1e-4) and odds[3] != odds[8]


def test_few_votes_warrant_few_nats() -> None:
    config = PPOConfig(kl_target=4.0, kl_votes=64)
    assert [kl_warranted(config, votes) for votes in (4, 16, 64, 500)] == pytest.approx([1.0, 2.0, 4.0, 4.0])


def test_the_kl_controller_by_hand() -> None:
    controller = KLController(0.1, target=4.0, horizon=100.0)
    controller.update(4.4, 50)
    assert controller.beta == pytest.approx(0.1 * (1 + 0.1 * 0.5))
    controller.update(100.0, 50)  # clipped at 20%
    assert controller.beta == pytest.approx(0.1 * 1.05 * 1.1)
    controller.update(0.0, 50)
    assert controller.beta == pytest.approx(0.1 * 1.05 * 1.1 * 0.9)
    for _ in range(100):
        controller.update(0.0, 50)
    assert controller.beta == pytest.approx(0.1 / 3)  # never below a third of where it began


def test_over_the_target_a_nat_costs_more_at_once() -> None:
    controller = KLController(0.1, target=4.0, horizon=100.0)
    assert [controller.price(kl) for kl in (0.0, 4.0, 6.0, 8.0)] == pytest.approx([0.1, 0.1, 0.225, 0.4])


@pytest.mark.parametrize(("begun", "half_way"), [(0.0, 2.0), (6.0, 5.0)])
def test_the_kl_target_moves_from_where_the_run_began(begun: float, half_way: float) -> None:
    controller = KLController(0.1, target=4.0, horizon=100.0)
    controller.update(begun, 50, done=0.0)
    first = controller.beta
    assert first == pytest.approx(0.09 if begun == 0 else 0.1)
    controller.update(half_way, 50, done=0.125)  # half of the first quarter
    assert controller.beta == pytest.approx(first)
    controller.update(4.4, 50, done=0.25)
    assert controller.beta == pytest.approx(first * 1.05)


@pytest.mark.parametrize("target", [1.0, 4.5])
def test_at_its_price_the_best_policy_for_a_normal_score_lies_at_the_target(target: float) -> None:
    """Of outcomes scored N(0, 1) by the reference, pi ~ pi_ref exp(score / beta): its KL by quadrature."""
    score = torch.linspace(-12, 12, 100_001, dtype=torch.float64)
    reference = torch.softmax(-(score**2) / 2, 0)
    best = torch.softmax(reference.log() + score / kl_price(target), 0)
    assert float((best * (best / reference).log()).nansum()) == pytest.approx(target, rel=1e-6)


def test_every_prompt_comes_once_before_any_comes_again() -> None:
    draw = prompt_batches([[i] for i in range(6)], 4, seed=0)
    dealt = [p[0] for _ in range(3) for p in next(draw)]
    assert sorted(dealt[:6]) == sorted(dealt[6:]) == list(range(6))


def test_a_kept_policy_comes_back_bit_for_bit(model: CausalModel) -> None:
    model.lora.create("p", r=4, seed=0)
    before, kept = state(model, "p"), Kept(model, "p")
    with torch.no_grad():
        for p in model.lora.parameters("p").values():
            p.fill_(math.nan)
    kept.restore()
    assert all(torch.equal(a, b) for a, b in zip(before, state(model, "p"), strict=True))


@pytest.mark.parametrize("setting", [{"warmup": 0}, {"max_seconds": 0.0}])
def test_settings_that_no_run_can_have_are_named(setting: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"ppo.{next(iter(setting))} must"):
        replace(SMALL, **setting)
