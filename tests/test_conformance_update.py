"""A policy update from end to end against arithmetic written out row by row, and runs that were interrupted.

What `train_ppo` hands to the update is recomputed from the sampled tokens alone: log-probabilities by transformers and PEFT
on unpadded rows, then plain loops in float64 that follow the papers. The gradient of the update is that of a naive loss.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.engine import Engine
from engine.features import reply_features
from engine.model import CausalModel
from engine.tokenizer import ChatTokenizer
from learner import ppo, rollout
from learner import round as round_module
from learner.config import PPOConfig, RewardConfig
from learner.faults import Endings, Outside
from learner.ppo import learn, train_ppo
from learner.reward import RewardModel
from learner.rollout import Trajectories
from learner.round import close_unfinished, replay_round
from learner.scorer import Scorer
from learner.sft import SFTConfig, encode_text, train
from learner.text_checks import faults, unfinished
from learner.value import VALUE, FittedValue, TrainedValue
from store.adapters import AdapterRegistry
from store.rounds import RoundFiles
from store.store import Store
from tests.test_round import learner_on, run, vote_on

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's
CONFIG = PPOConfig(
    updates=2, prompts_per_update=3, replies_per_prompt=4, max_new_tokens=10, epochs=1, minibatches=1, lora_r=4, lora_alpha=8, lr=2e-3,
    temperature=0.7, kl_coef=0.2, kl_target=3.0, kl_ceiling=1e6, uncertainty=0.5, missing_eos_penalty=1.5, broken_penalty=0.5,
    gamma=0.98, lam=0.9, max_seconds=600.0, warmup=1,
)  # fmt: skip
QUESTIONS = ["Hi", "Tell me about the moon.", "Why?", "Who are you?", "Thanks!"]


class Planted(RewardModel):
    """Two members that are not of one mind, each with a scale and an offset of its own."""

    def score(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], members: Sequence[int] | None = None, features: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        return torch.tensor([planted(c) for c in completion_ids])


def planted(completion: Sequence[int]) -> list[float]:
    return [3 * sum(t % 2 == 0 for t in completion) / len(completion) - 7, 40 * sum(t % 3 == 0 for t in completion) / len(completion)]


def prompts_of(tokenizer: ChatTokenizer) -> list[list[int]]:
    return [tokenizer.render([{"role": "user", "content": q}]) for q in QUESTIONS]


def far(model: CausalModel, name: str, seed: int = 0, size: float = 0.05) -> None:
    """An adapter `name` that changes what is said."""
    model.lora.create(name, r=4, alpha=8, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.lora.parameters(name).values():
            p.add_(size * torch.randn(p.shape, generator=generator))


@pytest.fixture
def model(tiny_llama: Path) -> CausalModel:
    """A tiny Llama two of whose favourite tokens end a reply, so that some replies are cut and some are not."""
    model, tokenizer = CausalModel.load(tiny_llama), ChatTokenizer.load(tiny_llama)
    batch = rollout.sample(Engine(model, tokenizer, max_sequences=20), prompts_of(tokenizer), version="base", group=4, max_tokens=10, temperature=1.0, seed=0)
    said = Counter(t for c in batch.completions for t in c if t > 4)
    model.eos_ids = (1, *(t for t, _ in said.most_common(2)))
    return model


@pytest.fixture
def tokenizer(tiny_llama: Path) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_llama)


# ---------------------------------------------------------------------------------------------- step 0


@pytest.mark.parametrize("start", [None, "far"])
def test_at_step_zero_kl_is_zero_and_the_ratio_is_one_exactly_for_every_family_and_reference(tiny_any: Path, start: str | None) -> None:
    """But for GPT-2's ratio: transformers computes it, whose passes with and without gradients differ in the last bits."""
    model, tokenizer = CausalModel.load(tiny_any), ChatTokenizer.load(tiny_any)
    if start:
        far(model, start)
    reward = Planted.create(model, RewardConfig(members=2, lora_r=4), 2)
    config = replace(CONFIG, updates=1, estimator="gae")
    first = train_ppo(model, tokenizer, reward, prompts=prompts_of(tokenizer), policy="p", config=config, start=start, reference=start).history[0]
    assert (first["kl"], first["clipfrac"]) == (0.0, 0.0)
    rounding = 1e-6 if type(model.net).__name__ == "General" else 0.0
    assert abs(first["ratio"] - 1.0) <= rounding and abs(first["step_kl"]) <= rounding
    assert first["engine_gap"] < 1e-3


def test_at_step_zero_minibatches_and_chunks_of_other_shapes_keep_the_ratio_at_one_to_rounding(model: CausalModel, tokenizer: ChatTokenizer) -> None:
    """With lr 0 every minibatch is still at step 0; only the order of additions within a matrix product may differ."""
    reward = Planted.create(model, RewardConfig(members=2, lora_r=4), 2)
    config = replace(CONFIG, updates=1, estimator="rloo", epochs=2, minibatches=3, chunk_tokens=50, lr=0.0)
    first = train_ppo(model, tokenizer, reward, prompts=prompts_of(tokenizer), policy="p", config=config).history[0]
    assert first["kl"] == 0.0 and first["ratio"] == pytest.approx(1.0, abs=1e-5) and first["clipfrac"] == 0.0


# ---------------------------------------------------------------------------------------------- what is handed to the update


class Watched:
    """The run of `train_ppo` seen from outside: its rollouts, the policy at each update, and what the update was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
        self.directory, self.batches, self.given = directory, list[Trajectories](), list[dict[str, Any]]()
        sample, update = rollout.sample, ppo.learn

        def watched_sample(*args: Any, **kwargs: Any) -> Trajectories:
            self.batches.append(sample(*args, **kwargs))
            return self.batches[-1]

        def watched_update(model: CausalModel, policy: str, value: Any, mixed: Any, batch: Trajectories, old: Tensor, advantages: Tensor, ends: Endings, outside: Outside, old_values: Any, returns: Any, *rest: Any) -> dict[str, float]:
            model.lora.save(policy, self.directory / str(len(self.given)))
            self.given.append({"batch": batch, "old": old, "advantages": advantages, "ends": ends, "outside": outside, "old_values": old_values, "returns": returns})
            return update(model, policy, value, mixed, batch, old, advantages, ends, outside, old_values, returns, *rest)

        monkeypatch.setattr(rollout, "sample", watched_sample)
        monkeypatch.setattr(ppo, "learn", watched_update)


def by_transformers(directory: Path, adapter: Path | None, batch: Trajectories, temperature: float) -> list[Tensor]:
    """Log-probabilities of the whole vocabulary where each reply token was chosen, (R, V) a row, no padding."""
    oracle: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    if adapter:
        oracle = peft.PeftModel.from_pretrained(oracle, adapter)
    rows = []
    for prompt, completion in zip(batch.prompts, batch.completions, strict=True):
        with torch.no_grad():
            logits = oracle.eval()(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1].double()
        rows.append((logits / temperature).log_softmax(-1))
    return rows


def chosen(batch: Trajectories, rows: Sequence[Tensor]) -> list[list[float]]:
    """Of `by_transformers`, those of the tokens that were sampled."""
    return [row.gather(1, torch.tensor(own)[:, None])[:, 0].tolist() for row, own in zip(rows, batch.completions, strict=True)]


def scores_by_hand(config: PPOConfig, unit: Trajectories, begun: Trajectories, batch: Trajectories) -> list[float]:
    """mean - uncertainty * deviation over the members, each in deviations of the reference's replies, less the penalties.

    A member says log sigmoid(score - good), good being one deviation above the mean of the version that the run begins at.
    """
    raw, base, start = (np.array([planted(c) for c in b.completions]) for b in (batch, unit, begun))
    raw, base = (-np.log1p(np.exp(start.mean(0) + start.std(0, ddof=1) - x)) for x in (raw, base))
    groups = base.reshape(-1, unit.group, 2)
    within = ((groups - groups.mean(1, keepdims=True)) ** 2).sum((0, 1)) / (len(base) - len(groups))
    members = (raw - base.mean(0)) / np.sqrt(within)
    fair = members.mean(1) - config.uncertainty * members.std(1, ddof=1)
    cut = [reason == "length" for reason in batch.finish_reasons]
    return list(fair - config.missing_eos_penalty * np.array(cut))


def faults_by_hand(price: float, decay: float, tokenizer: ChatTokenizer, batch: Trajectories) -> tuple[list[list[float]], list[list[float]]]:
    """What faults cost, as rewards (at a fault's last token) and as advantages (on its tokens, and fading before them).

    A cut reply's end is none.
    """
    rewards, advantages = [], []
    for completion, text, reason in zip(batch.completions, batch.texts, batch.finish_reasons, strict=True):
        last = len(completion) - 1
        said = [len(tokenizer.decode(list(completion[: k + 1]))) for k in range(len(completion))]
        spans = [(min([k for k in range(last) if said[k] > f.start] + [last]), min([k for k in range(last) if said[k] >= f.end] + [last])) for f in faults(text) if reason == "stop" or f.end <= len(text)]
        rewards.append([-price if any(t == b for _, b in spans) else 0.0 for t in range(last + 1)])
        share = [max([1.0 if a <= t <= b else decay ** (a - t) if t < a else 0.0 for a, b in spans] + [0.0]) for t in range(last + 1)]
        advantages.append([-price * x for x in share])
    return rewards, advantages


def broken_by_hand(tokenizer: ChatTokenizer, batch: Trajectories) -> float:
    """Share of replies with a fault."""
    costs, _ = faults_by_hand(1.0, 1.0, tokenizer, batch)
    return sum(any(row) for row in costs) / len(batch)


def ends_by_hand(cost: float, tokenizer: ChatTokenizer, batch: Trajectories) -> list[list[float]]:
    """What ending in each token's place would cost."""
    return [[cost if unfinished(tokenizer.decode(c[:k])) else 0.0 for k in range(len(c))] for c in batch.completions]


def deviation(rows: list[list[float]]) -> float:
    """Over all tokens of the batch together (unbiased)."""
    return float(np.std([x for row in rows for x in row], ddof=1))


def white(rows: list[list[float]], keep_mean: bool = False) -> list[list[float]]:
    """Over all tokens of the batch together: variance 1 (unbiased), and mean 0 unless it is kept."""
    every = [x for row in rows for x in row]
    mean = sum(every) / len(every)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in every) / (len(every) - 1) + 1e-8)
    return [[(x - mean) / deviation + (mean if keep_mean else 0.0) for x in row] for row in rows]


def gae_by_hand(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Schulman et al. 2016, Eq. 16, as its sum; the value after the last token is 0."""
    after = [*values[1:], 0.0]
    delta = [r + gamma * n - v for r, n, v in zip(rewards, after, values, strict=True)]
    return [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(delta))) for t in range(len(delta))]


def close(ours: Tensor, rows: list[list[float]]) -> None:
    """`ours` (B, R) holds the ragged `rows`, and 0 behind them."""
    for i, row in enumerate(rows):
        assert ours[i, : len(row)].tolist() == pytest.approx(row, rel=2e-3, abs=2e-3), i
        assert (ours[i, len(row) :] == 0).all()


@pytest.mark.parametrize("whitened", [True, False])
@pytest.mark.parametrize("estimator", ["gae-ls", "gae", "rloo"])
def test_the_update_is_given_what_the_papers_say_recomputed_from_the_tokens(
    model: CausalModel, tokenizer: ChatTokenizer, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, estimator: str, whitened: bool
) -> None:
    far(model, "start", seed=1)
    far(model, "reference", seed=2, size=0.03)
    model.lora.save("reference", tmp_path / "reference")
    config = replace(CONFIG, estimator=estimator, whiten_rewards=whitened, whiten_advantages=whitened, kl_target=0.1)
    watched, guesses, guess = Watched(monkeypatch, tmp_path), list[Tensor](), FittedValue.__call__
    told, taught, fit = list[Tensor](), list[list[list[float]]](), FittedValue.fit
    monkeypatch.setattr(FittedValue, "fit", lambda self, seen, returns, mask: (told.append(torch.where(mask, returns, 0.0)), fit(self, seen, returns, mask))[1])
    monkeypatch.setattr(FittedValue, "__call__", lambda self, seen: (guesses.append(guess(self, seen)), guesses[-1])[1])  # test_value has what it says
    reward = Planted.create(model, RewardConfig(members=2, lora_r=4), 2)
    result = train_ppo(model, tokenizer, reward, prompts=prompts_of(tokenizer), policy="p", config=config, start="start", reference="reference", seed=4)
    unit, _, started = watched.batches[:3]  # between them, whether it begins too far from the reference
    beta, practised = config.kl_coef / (2 * config.kl_target) ** 0.5, 0
    least, begun, cost = beta / 3, 0.0, config.broken_penalty
    allowed = 0.7 * broken_by_hand(tokenizer, unit)
    assert started.prompts == unit.prompts and len(watched.given) == 2 and len(unit) == 4 * len(QUESTIONS) and sorted(map(tuple, unit.prompts[::4])) == sorted(map(tuple, prompts_of(tokenizer)))
    for update, given in enumerate(watched.given):
        batch = given["batch"]
        assert batch.completions is watched.batches[3 + update].completions and 0 < int(batch.cut.sum()) < len(batch) and min(map(len, batch.completions)) < 10
        every = by_transformers(tiny_llama, tmp_path / str(update), batch, config.temperature)
        every_ref = by_transformers(tiny_llama, tmp_path / "reference", batch, config.temperature)
        logprobs, ref = chosen(batch, every), chosen(batch, every_ref)
        close(given["old"], logprobs)
        kl = [[p - q for p, q in zip(*rows, strict=True)] for rows in zip(logprobs, ref, strict=True)]
        mean_kl = sum(float((p.exp() * (p - q)).sum()) for p, q in zip(every, every_ref, strict=True)) / len(batch)
        assert result.history[update]["kl"] == pytest.approx(mean_kl, abs=2e-3) and abs(mean_kl) > 0.05
        assert result.history[update]["kl_coef"] == pytest.approx(beta, rel=1e-4)
        price = beta * max(1.0, mean_kl / config.kl_target) ** 2
        assert result.history[update]["kl_price"] == pytest.approx(price, rel=2e-2) and result.history[update]["fault_price"] == pytest.approx(cost)
        scores = scores_by_hand(config, unit, started, batch)
        costs, local = faults_by_hand(cost, config.fault_decay, tokenizer, batch)
        ending = cost  # in the units of the advantages, whichever way those came by them
        assert any(any(row) for row in costs), "else faults are not tested"
        assert result.history[update]["reward"] == pytest.approx(float(np.mean([a + sum(b) for a, b in zip(scores, costs, strict=True)])), abs=1e-4)
        if estimator == "rloo":
            n = config.replies_per_prompt
            better = [scores[i] - (sum(scores[i - i % n : i - i % n + n]) - scores[i]) / (n - 1) for i in range(len(scores))]
            advantages = [[a + f - price * k for k, f in zip(*rows, strict=True)] for a, *rows in zip(better, kl, local, strict=True)]
            assert given["returns"] is given["old_values"] is None
        elif estimator == "gae-ls":
            values = [row[: len(c)].tolist() for row, c in zip(guesses[update], batch.completions, strict=True)]
            rewards = [[*row[:-1], row[-1] + a] for a, row in zip(scores, costs, strict=True)]
            gains = [gae_by_hand(r, v, config.gamma, config.lam) for r, v in zip(rewards, values, strict=True)]
            advantages = [[a - price * k for a, k in zip(*rows, strict=True)] for rows in zip(gains, kl, strict=True)]
            taught.append([[sum(config.gamma**k * r for k, r in enumerate(row[t:])) for t in range(len(row))] for row in rewards])
            assert given["returns"] is given["old_values"] is None and max(abs(v) for row in values for v in row) > 0.1
        else:
            rewards = [[c - price * k for k, c in zip(*rows, strict=True)] for rows in zip(kl, costs, strict=True)]
            for row, score in zip(rewards, scores, strict=True):
                row[-1] += score  # the last token of the reply itself, whatever the longest reply's length is
            ending /= deviation(rewards) if whitened else 1.0
            rewards = white(rewards, keep_mean=True) if whitened else rewards
            values = [row[: len(c)].tolist() for row, c in zip(given["old_values"], batch.completions, strict=True)]
            advantages = [gae_by_hand(r, v, config.gamma, config.lam) for r, v in zip(rewards, values, strict=True)]
            close(given["returns"], [[a + v for a, v in zip(*rows, strict=True)] for rows in zip(advantages, values, strict=True)])
        close(given["advantages"], white(advantages) if whitened else advantages)
        ends = ends_by_hand(ending / (deviation(advantages) if whitened else 1.0), tokenizer, batch)
        assert given["ends"].ids == tuple(sorted(model.eos_ids)) and any(x == 0 for row in ends for x in row) and any(x > 0 for row in ends for x in row)
        close(given["ends"].costs, ends)
        assert given["outside"].price == pytest.approx(config.outside_penalty * max(max(row) for row in ends), rel=1e-4), "as dear as a fault"
        done = max(update / config.updates, practised / config.tokens)
        practised += sum(map(len, batch.completions))
        begun = mean_kl if update == 0 else begun
        target = max(begun + min(1, 4 * done) * (config.kl_target - begun), 0.1 * config.kl_target)  # moves over the first quarter of a run
        error = min(max(mean_kl / target - 1, -0.2), 0.2)  # Ziegler et al. 2019, section 2.2
        beta = max(least, beta * (1 + error * len(batch) / config.kl_horizon))  # theirs has no least
        excess = (broken_by_hand(tokenizer, batch) - allowed) / max(allowed, 0.02)  # dual ascent
        cost = min(max(cost * (1 + 0.2 * min(max(excess, -1.0), 1.0)), config.broken_penalty), 8 * config.broken_penalty)
        assert update or cost > config.broken_penalty, "else it is not seen to move"
    for returns, rows in zip(told[1:], taught, strict=True):  # the first is of the reference's replies
        close(returns, rows)


def test_the_updates_gradient_is_that_of_the_clipped_losses_summed_token_by_token(model: CausalModel, tokenizer: ChatTokenizer) -> None:
    far(model, "p")
    batch = rollout.sample(Engine(model, tokenizer, max_sequences=20), prompts_of(tokenizer), version="p", group=4, max_tokens=10, temperature=0.7, seed=1)
    reward = RewardModel.create(model, RewardConfig(members=1, lora_r=4), 1)
    torch.nn.init.normal_(reward.members[0].head.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    value = TrainedValue(model, reward, Scorer(reward, batch))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        new = rollout.reply_logprobs(model, batch, torch.arange(20), "p", 0.7)
        old = torch.where(batch.mask, new + 0.3 * torch.randn(new.shape, generator=draw), 0.0)
        old_values = torch.where(batch.mask, value(batch, torch.arange(20)) + 0.3 * torch.randn(new.shape, generator=draw), 0.0)
    advantages, returns = torch.randn(new.shape, generator=draw), torch.randn(new.shape, generator=draw)
    costs = Endings(5 * torch.rand(new.shape, generator=draw), model.eos_ids)
    said = torch.stack([torch.randperm(model.vocab_size, generator=draw)[:64] for _ in range(new.numel())]).view(*new.shape, 64)
    said[..., 40:] = -1
    said[::3] = -1  # the reference had too many ways to go on
    outside = Outside(said, 3.0)
    trained = {**model.lora.parameters("p"), **{f"value {n}": p for n, p in model.lora.parameters(VALUE).items()}, **dict(value.head.named_parameters())}

    terms: list[Tensor] = []
    clipped, paid = Counter[str](), list[float]()
    for i, (prompt, completion) in enumerate(zip(batch.prompts, batch.completions, strict=True)):
        row = torch.tensor([[*prompt, *completion]])
        logprobs = model.logprobs(row, adapter="p", temperature=0.7)[0, len(prompt) - 1 :]
        wide = model.logits(model(row, adapter="p")[0, len(prompt) - 1 : -1]) / 0.7
        states, start = model(row, adapter=VALUE)[0], len(prompt)
        own = [states[start : start + t].sum(0, keepdim=True) for t in range(len(completion))]
        ends = [model.sentence_ends[completion[:t]].sum()[None] for t in range(len(completion))]
        seen = [reply_features(states[start + t - 1][None], own[t], torch.tensor([t]), ends[t]) for t in range(len(completion))]
        values = value.head(torch.cat(seen)).squeeze(-1)
        for t in range(len(completion)):
            ratio, a, v, before, target = (logprobs[t] - old[i, t]).exp(), advantages[i, t], values[t], old_values[i, t], returns[i, t]
            gain, squared = ratio * a, (v - target) ** 2
            if not 0.8 <= ratio.item() <= 1.2:  # Schulman et al. 2017, Eq. 7: the smaller gain; a clipped one is a constant
                gain = min(gain, a * (0.8 if ratio.item() < 0.8 else 1.2))
            if not -0.2 <= (v - before).item() <= 0.2:  # the greater error
                squared = max(squared, (before + (0.2 if v.item() > before.item() else -0.2) - target) ** 2)
            clipped.update({"policy": not gain.requires_grad, "value": not squared.requires_grad})
            ending = wide[t].softmax(0)[list(costs.ids)].sum()
            strange = 0.0 if i % 3 == 0 else 1 - wide[t].softmax(0)[said[i, t, :40]].sum()
            terms += [-gain + 0.5 * squared + ending * costs.costs[i, t] + 3.0 * strange]
            paid.append(float(ending.detach() * costs.costs[i, t]))
    expected = torch.autograd.grad(torch.stack(terms).sum() / len(terms), list(trained.values()), allow_unused=True)
    assert all(0.02 < clipped[what] / len(terms) < 0.98 for what in ("policy", "value"))

    before = {name: p.detach().clone() for name, p in trained.items()}
    config = replace(CONFIG, clip=0.2, value_clip=0.2, max_grad_norm=1e9, chunk_tokens=60)
    optimizer = torch.optim.SGD([*trained.values()], lr=1.0)
    policy = list(model.lora.parameters("p").values())
    figures = learn(model, "p", value, None, batch, old, advantages, costs, outside, old_values, returns, optimizer, policy, config, random.Random(0))
    for (name, p), gradient in zip(trained.items(), expected, strict=True):
        torch.testing.assert_close(before[name] - p.detach(), torch.zeros_like(p) if gradient is None else gradient, rtol=1e-3, atol=1e-4)
    assert figures["end_cost"] == pytest.approx(sum(paid) / len(paid), rel=1e-4) and figures["end_cost"] > 0.01
    assert figures["policy_loss"] + figures["end_cost"] + 3.0 * figures["outside"] + figures["value_loss"] == pytest.approx(torch.stack(terms).mean().item(), rel=1e-4)
    assert figures["clipfrac"] == pytest.approx(clipped["policy"] / len(terms)) and figures["value_clipfrac"] == pytest.approx(clipped["value"] / len(terms))


# ---------------------------------------------------------------------------------------------- resume equals uninterrupted


class Killed(BaseException):
    """What nothing catches, in place of a signal."""


def killed_at(step: int) -> Callable[[dict], None]:
    """An `on_step` that ends the run at `step`, before it could save."""

    def on_step(figures: dict) -> None:
        if figures["step"] == step:
            raise Killed

    return on_step


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("muon", [False, True])
def test_finetuning_killed_and_resumed_ends_bit_for_bit_as_if_it_had_never_stopped(tiny_llama: Path, tmp_path: Path, muon: bool, bf16: bool) -> None:
    """Killed once at a checkpoint, once in the second epoch with steps since, once while a checkpoint was being written."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    examples = [encode_text(tokenizer, "Bees make honey. " * (1 + i % 4)) for i in range(12)]
    config = SFTConfig(steps=12, tokens_per_batch=64, lr=1e-3, seed=5, muon=muon, bf16=bf16)

    def fresh() -> Any:
        return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)

    straight, resumed = fresh(), fresh()
    whole, kept = tmp_path / "whole.pt", tmp_path / "run.pt"
    train(straight, examples, config, pad_id=0, checkpoint=whole)
    train(fresh(), examples, config, pad_id=0, checkpoint=kept, stop_after=4)
    with pytest.raises(Killed):
        train(fresh(), examples, config, pad_id=0, checkpoint=kept, on_step=killed_at(7))
    kept.with_suffix(".partial").write_bytes(b"half a checkpoint")
    seen: list[int] = []
    result = train(resumed, examples, config, pad_id=0, checkpoint=kept, on_step=lambda figures: seen.append(figures["step"]))
    assert seen == list(range(5, 13)) and result.steps == 12  # from the last checkpoint, and no step is left out
    for (name, a), b in zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    ends = [torch.load(path, weights_only=True) for path in (whole, kept)]
    assert ends[0]["tokens"] == ends[1]["tokens"] == result.tokens
    assert all(same(a["state"], b["state"]) for a, b in zip(ends[0]["optimizers"], ends[1]["optimizers"], strict=True))


def same(a: Any, b: Any) -> bool:
    """Equal all the way down, tensors bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_a_round_killed_in_its_policy_updates_leaves_its_votes_to_the_next_which_replays_bit_for_bit(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round is not resumed but begun again: it is a pure function of its votes, seed, settings and start.

    The replay loads the model anew and has seen nothing of the killed round.
    """

    def half_way(*args: Any, **kwargs: Any) -> Any:
        def die(row: dict[str, Any]) -> None:
            if row["update"] == 1:
                raise Killed

        return train_ppo(*args, **kwargs | {"on_update": die})

    files, registry = RoundFiles(tmp_path / "rounds"), AdapterRegistry(tmp_path / "adapters")
    tokenizer, learner = ChatTokenizer.load(tiny_llama), learner_on(tmp_path, CausalModel.load(tiny_llama), ChatTokenizer.load(tiny_llama))
    with Store.open(tmp_path) as store:
        vote_on(store, tokenizer, 16)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(round_module, "train_ppo", half_way)
            run(learner, store.voted_comparisons())
        assert files.unfinished() == [1] and registry.versions() == []
        assert close_unfinished(files, registry) == [(1, "abandoned")]
        record = run(learner, store.voted_comparisons())
    assert (record["round"], record["votes"], record["state"]) == (2, 16, "published"), record["reason"]
    assert replay_round(tmp_path, tiny_llama, 2)["same"]
