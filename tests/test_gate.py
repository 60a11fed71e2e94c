"""The gate against seeded bad candidates: each is rejected, and by the check that is there for it."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.engine import BASE, Engine
from engine.model import CausalModel
from engine.source import Sampling
from engine.tokenizer import ChatTokenizer
from learner import rollout
from learner.config import GateConfig, RewardConfig
from learner.gate import (
    LOOKS,
    GateError,
    Probe,
    Replies,
    judge,
    load_probes,
    mean_interval,
    preferred,
    probe_answers,
    probe_logprobs,
    reply_kl,
    run_gate,
    win_shares,
)
from learner.reward import RewardModel

PROMPTS, GROUP = 24, 2
THINGS = ["moon", "sun", "bee", "cat", "tea", "sea", "tree", "egg", "ice", "owl", "bear", "rice", "wolf", "rain", "gold", "salt"]
DOINGS = ["shines", "sleeps", "grows", "melts", "sings", "moves", "waits", "falls", "turns", "glows", "rests", "stands"]


def sound(seed: int, words: int = 12) -> list[str]:
    """Whole little sentences, all different."""
    rng = random.Random(seed)
    texts = []
    for _ in range(PROMPTS * GROUP):
        said = [f"The {a} {rng.choice(DOINGS)} near one {b}." for a, b in zip(rng.sample(THINGS, words // 5 + 1), rng.sample(THINGS, words // 5 + 1), strict=True)]
        texts.append(" ".join(said))
    return texts


def replies(texts: Sequence[str], score: float = 0.0, seed: int = 0, reason: str = "stop", lengths: Sequence[int] | None = None) -> Replies:
    scores = score + torch.randn(len(texts), 3, generator=torch.Generator().manual_seed(seed))
    return Replies(list(texts), [reason] * len(texts), list(lengths or [len(t.split()) for t in texts]), GROUP, scores)


LIVE = replies(sound(0), seed=1)
BETTER = replies(sound(2), score=1.5, seed=3)
KL = torch.full((PROMPTS * GROUP,), 3.0)
CONFIG = GateConfig()


def test_a_better_and_sound_candidate_passes_every_check() -> None:
    verdict = judge(BETTER, LIVE, LIVE, KL, CONFIG, Probe(1.1, 0.9), Probe(1.0, 0.9))
    assert verdict.verdict == "pass" and verdict.failed == []
    assert {c.name for c in verdict.checks} == {
        "finite", "win_rate", "kl", "length", "broken", "repetition", "distinct2", "refusals", "probe_loss", "probe_accuracy",
    }  # fmt: skip
    plain = verdict.to_dict()
    assert plain["win_rate_interval"][0] > 0.5 and plain["kl"] == 3.0 and plain["checks"][0]["passed"] is True


def test_one_that_is_no_better_is_rejected_by_the_win_rate() -> None:
    assert judge(replies(sound(2), seed=3), LIVE, LIVE, KL, CONFIG).failed == ["win_rate"]


def test_chance_passes_the_win_rate_one_time_in_twenty() -> None:
    passed = 0
    for seed in range(300):
        ours = replies(LIVE.texts, seed=1000 + seed)
        passed += judge(ours, replies(LIVE.texts, seed=5000 + seed), LIVE, KL, CONFIG).verdict == "pass"
    assert passed <= 30  # 5% nominal is 15 of 300, deviation 3.8: a false alarm once in 25000 runs


def test_a_looping_candidate_is_rejected() -> None:
    loops = replies(["The moon is round and round and round and round and round and round."] * 48, score=9.0)
    failed = judge(loops, LIVE, LIVE, KL, CONFIG).failed
    assert {"broken", "repetition", "distinct2"} <= set(failed) and "win_rate" not in failed


def test_a_collapsed_candidate_that_says_the_same_to_all_is_rejected() -> None:
    assert judge(replies(["The moon glows near one tree."] * 48, score=9.0), LIVE, LIVE, KL, CONFIG).failed == ["distinct2"]
    words = replies(["Yes.", "No."] * 24)
    assert "distinct2" not in judge(words, words, words, KL, CONFIG).failed  # single words have no pairs to lose


def test_one_that_refuses_all_is_rejected() -> None:
    texts = [f"I am sorry, but I cannot help with the {a} and the {b}." for a in THINGS for b in DOINGS][:48]
    assert "refusals" in judge(replies(texts, score=9.0), LIVE, LIVE, KL, CONFIG).failed


def test_one_that_runs_on_and_on_is_rejected() -> None:
    long = replies(sound(4, words=70), score=9.0, reason="length", lengths=[160] * 48)
    assert {"length", "broken"} <= set(judge(long, LIVE, LIVE, KL, CONFIG).failed)


def test_one_that_says_next_to_nothing_is_rejected_by_length() -> None:
    long = replies(sound(0, words=70), seed=1)
    assert "length" in judge(replies([f"The {t}." for t in THINGS * 3], score=9.0, lengths=[2] * 48), long, long, KL, CONFIG).failed


def test_broken_text_that_the_members_like_is_rejected() -> None:
    hacked = replies([t[:-1] + " in, They help." if i % 4 == 0 else t for i, t in enumerate(sound(2))], score=9.0)
    assert judge(hacked, LIVE, LIVE, KL, CONFIG).failed == ["broken"]
    assert judge(hacked, LIVE, hacked, KL, CONFIG).failed == []  # the reference's own rate is what it is held to


def test_each_check_compares_with_the_version_it_is_about() -> None:
    """Length and refusals with the live version, which people know; what is broken, repeated or the same to all with the reference."""
    ours = replies(sound(2), lengths=[10] * 48)
    live = replies([f"I am sorry, but I cannot help with the {a} and the {b}." for a in THINGS for b in DOINGS][:48], lengths=[20] * 48)
    reference = replies(["The moon is round and round and round and round and round and round."] * 48, lengths=[40] * 48)
    value = {c.name: c.value for c in judge(ours, live, reference, KL, CONFIG).checks}
    assert value["length"] == 0.5 and value["refusals"] == -1.0
    assert value["broken"] == -1.0 and value["repetition"] < -0.3 and value["distinct2"] > 5


def test_one_that_is_too_far_away_is_rejected() -> None:
    assert judge(BETTER, LIVE, LIVE, KL * 3, CONFIG).failed == ["kl"]


def test_one_that_has_forgotten_facts_is_rejected() -> None:
    assert judge(BETTER, LIVE, LIVE, KL, CONFIG, Probe(1.0, 0.6), Probe(1.0, 0.9)).failed == ["probe_accuracy"]
    assert judge(BETTER, LIVE, LIVE, KL, CONFIG, Probe(3.0, 0.9), Probe(1.0, 0.9)).failed == ["probe_loss"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_figure_that_is_not_finite_rejects(bad: float) -> None:
    verdict = judge(BETTER, LIVE, LIVE, KL * bad, CONFIG)
    assert "finite" in verdict.failed and next(c for c in verdict.checks if c.name == "kl").value is None
    silent = replace(BETTER, scores=BETTER.scores * math.nan)
    assert "win_rate" in judge(silent, LIVE, LIVE, KL, CONFIG).failed  # NaN never wins


def test_win_shares_by_a_naive_loop() -> None:
    ours, theirs = torch.randn(6, 2).round(), torch.randn(6, 2).round()
    for p, got in enumerate(win_shares(ours, theirs, 3).tolist()):
        points = [
            1.0 if ours[3 * p + i, m] > theirs[3 * p + j, m] else 0.5 if ours[3 * p + i, m] == theirs[3 * p + j, m] else 0.0
            for i in range(3) for j in range(3) for m in range(2)
        ]  # fmt: skip
        assert got == pytest.approx(sum(points) / len(points), abs=1e-6)


def test_preferred_is_the_share_of_picks_that_bradley_terry_expects() -> None:
    ours, theirs = 2 * torch.randn(6, 2), 2 * torch.randn(6, 2)
    for p, got in enumerate(preferred(ours, theirs, 3).tolist()):
        odds = [math.exp(ours[3 * p + i, m] - theirs[3 * p + j, m]) for i in range(3) for j in range(3) for m in range(2)]
        assert got == pytest.approx(sum(x / (1 + x) for x in odds) / len(odds), abs=1e-6)


def test_of_two_versions_that_differ_in_few_replies_the_better_one_is_seen() -> None:
    draw = torch.Generator().manual_seed(0)
    scores = 0.1 * torch.randn(2, 192, 1, generator=draw)  # both alike: which is ahead is noise
    scores[1, ::8] -= 4.0  # but for the live version's bad replies, one in eight
    (_, low, _), (_, counted, _) = (mean_interval(share(scores[0], scores[1], 4)) for share in (preferred, win_shares))
    assert low > 0.53 and low > counted


def test_all_looks_are_wrong_one_time_in_twenty_together() -> None:
    from scipy import stats

    share = [[math.sqrt(min(i, j) / max(i, j)) for j in (1, 2, 3)] for i in (1, 2, 3)]  # of the prompts that two looks have in common
    together = stats.multivariate_normal([0, 0, 0], share, abseps=1e-7, releps=1e-7)
    assert 1 - together.cdf(LOOKS) == pytest.approx(0.05, abs=3e-4)
    assert [look / LOOKS[-1] for look in LOOKS] == pytest.approx([math.sqrt(3), math.sqrt(1.5), 1], abs=1e-3)


def test_the_interval_is_scipys_t_interval() -> None:
    from scipy import stats

    x = torch.tensor([0.2, 0.9, 0.5, 0.7, 1.0])
    low, high = stats.t.interval(0.9, 4, loc=x.mean().item(), scale=stats.sem(x.numpy()))
    assert mean_interval(x) == pytest.approx((0.66, low, min(1.0, high)), abs=1e-5)


def test_the_interval_of_equal_or_few_values_is_not_a_point() -> None:
    mean, low, high = mean_interval(torch.ones(10))
    assert mean == 1.0 and 0.5 < low < 0.95 and high == 1.0
    assert mean_interval(torch.ones(1)) == (1.0, 0.0, 1.0)


# ------------------------------------------------------------------------------------------ on a real (tiny) model


class Liking(RewardModel):
    """Members whose scores are planted: they like what `version` says, whatever it is, on top of noise."""

    def score(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], members: Sequence[int] | None = None, features: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        return torch.tensor([[float(len(set(c)))] * 2 for c in completion_ids])


@pytest.fixture
def model(tiny_llama: Path) -> CausalModel:
    return CausalModel.load(tiny_llama)


@pytest.fixture
def tokenizer(tiny_llama: Path) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_llama)


@pytest.fixture
def prompts(tokenizer: ChatTokenizer) -> list[list[int]]:
    return [tokenizer.render([{"role": "user", "content": q}]) for q in ("Hi", "Why?", "Tell me about the moon.", "Who are you?")]


def shaken(model: CausalModel, name: str, by: float) -> str:
    model.lora.create(name, r=4, seed=0)
    with torch.no_grad():
        for p in model.lora.parameters(name).values():
            p.add_(by * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return name


def test_the_gate_runs_on_a_real_model_and_the_live_version_itself_does_not_pass(
    model: CausalModel, tokenizer: ChatTokenizer, prompts: list[list[int]]
) -> None:
    judges = Liking.create(model, RewardConfig(lora_r=4), 2, "judge")
    model.lora.create("same", r=4, seed=0)  # changes nothing
    said: list[float] = []
    gate = run_gate(
        model, tokenizer, judges, prompts=prompts, candidate="same", live=None, reference=None, config=GateConfig(max_new_tokens=10),
        probes=[], progress=lambda fraction, words: said.append(fraction),
    )  # fmt: skip
    assert gate["verdict"] == "rejected" and gate["failed"] == ["win_rate"]
    assert gate["win_rate"] == 0.5 and gate["kl"] == 0.0 and gate["broken"] == gate["live_broken"]
    assert said == sorted(said) and said[-1] < 1


def test_replies_are_those_that_people_get(
    model: CausalModel, tokenizer: ChatTokenizer, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[float, float]] = []
    sample = rollout.sample
    monkeypatch.setattr(rollout, "sample", lambda *args, **how: asked.append((how["temperature"], how["top_p"])) or sample(*args, **how))
    monkeypatch.setattr(model, "sampling", Sampling(0.8, 0.5))
    model.lora.create("same", r=4, seed=0)
    for config in (GateConfig(max_new_tokens=4), GateConfig(max_new_tokens=4, top_p=1.0)):
        run_gate(model, tokenizer, None, prompts=prompts, candidate="same", live=None, reference=None, config=config, probes=[])
    assert asked == [(0.8, 0.5)] * 2 + [(0.8, 1.0)] * 2


def test_what_live_and_reference_said_is_asked_once_for_several_candidates(
    model: CausalModel, tokenizer: ChatTokenizer, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    judges, config = Liking.create(model, RewardConfig(lora_r=4), 2, "judge"), GateConfig(max_new_tokens=10)
    other, near, far = shaken(model, "other", 0.02), shaken(model, "near", 0.05), shaken(model, "far", 0.2)
    versions: list[str] = []
    sample = rollout.sample

    def listened(*args, **how):
        versions.append(how["version"])
        return sample(*args, **how)

    def asked(candidate: str, answers: dict | None) -> dict:
        return run_gate(
            model, tokenizer, judges, prompts=prompts, candidate=candidate, live=other, reference=None, config=config, probes=[], answers=answers
        )

    alone = [asked(candidate, None) for candidate in (near, far)]
    monkeypatch.setattr(rollout, "sample", listened)
    answers: dict = {}
    assert [asked(candidate, answers) for candidate in (near, far)] == alone and alone[0] != alone[1]
    looks = max(look for _, look in answers) + 1
    assert versions.count(other) == versions.count(BASE) == looks and versions.count(near) + versions.count(far) > looks


def test_distance_is_measured_from_the_reference_and_not_the_live_version(model: CausalModel, tokenizer: ChatTokenizer, prompts: list[list[int]]) -> None:
    other, near, config = shaken(model, "other", 0.3), shaken(model, "near", 0.05), GateConfig(max_new_tokens=10)

    def asked(live: str | None, reference: str | None) -> dict:
        return run_gate(model, tokenizer, None, prompts=prompts, candidate=near, live=live, reference=reference, config=config, probes=[])

    base, from_other, to_other = asked(None, None), asked(other, None), asked(None, other)
    assert from_other["kl"] == base["kl"] < to_other["kl"]


class Partial(RewardModel):
    """Members that like the candidate, who is scored first, by `strength` more than the live version."""

    strength, calls = 0.0, 0

    def score(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], members: Sequence[int] | None = None, features: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        self.calls += 1
        noise = torch.randn(len(completion_ids), 2, generator=torch.Generator().manual_seed(self.calls))
        return 0.1 * noise + self.strength * (self.calls % 2)


@pytest.mark.parametrize(("strength", "asked", "failed"), [(1.0, 4, []), (0.3, 7, []), (0.0, 10, ["win_rate"]), (-1.0, 4, ["win_rate"])])
def test_some_of_the_prompts_do_where_they_leave_nothing_open(
    model: CausalModel, tokenizer: ChatTokenizer, prompts: list[list[int]], strength: float, asked: int, failed: list[str]
) -> None:
    judges = Partial.create(model, RewardConfig(lora_r=4), 2, "judge")
    judges.strength = strength
    model.lora.create("same", r=4, seed=0)
    ten = [*prompts, *([*p, *p] for p in prompts), *([*p, *p, *p] for p in prompts[:2])]
    gate = run_gate(
        model, tokenizer, judges, prompts=ten, candidate="same", live=None, reference=None, config=GateConfig(max_new_tokens=10), probes=[]
    )
    assert gate["prompts"] == asked and gate["replies"] == 4 * asked and gate["failed"] == failed


def test_a_candidate_far_from_the_reference_is_found_out_on_a_real_model(
    model: CausalModel, tokenizer: ChatTokenizer, prompts: list[list[int]]
) -> None:
    judges = Liking.create(model, RewardConfig(lora_r=4), 2, "judge")
    far = shaken(model, "far", 0.5)
    gate = run_gate(
        model, tokenizer, judges, prompts=prompts, candidate=far, live=None, reference=None, config=GateConfig(max_new_tokens=10), probes=[]
    )
    assert "kl" in gate["failed"] and gate["kl"] > 8


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_rejected_before_anything_is_asked(
    model: CausalModel, tokenizer: ChatTokenizer, prompts: list[list[int]], bad: float
) -> None:
    judges = Liking.create(model, RewardConfig(lora_r=4), 2, "judge")
    name = shaken(model, "bad", 0.01)
    with torch.no_grad():
        next(iter(model.lora.parameters(name).values()))[0, 0] = bad
    gate = run_gate(model, tokenizer, judges, prompts=prompts, candidate=name, live=None, reference=None, config=CONFIG, probes=[])
    assert gate["verdict"] == "rejected" and gate["failed"] == ["finite"]


def test_prompts_without_room_are_an_error_and_not_a_verdict(model: CausalModel, tokenizer: ChatTokenizer) -> None:
    judges = Liking.create(model, RewardConfig(lora_r=4), 2, "judge")
    model.lora.create("same", r=4, seed=0)
    with pytest.raises(GateError, match="leaves room"):
        run_gate(model, tokenizer, judges, prompts=[[5] * 500], candidate="same", live=None, reference=None, config=CONFIG, probes=[])


def test_kl_is_that_of_plain_forward_passes(model: CausalModel, tokenizer: ChatTokenizer, prompts: list[list[int]]) -> None:
    far = shaken(model, "far", 0.1)
    batch = rollout.sample(Engine(model, tokenizer), prompts, version=far, group=1, max_tokens=9, temperature=1.0, seed=0)
    got = reply_kl(model, batch, far, None, 1.0)
    for i in range(4):
        row = torch.tensor([[*batch.prompts[i], *batch.completions[i]]])
        with torch.no_grad():
            p, q = (model.logits(model(row, adapter=a))[0, len(batch.prompts[i]) - 1 : -1].log_softmax(-1) for a in (far, None))
        assert got[i].item() == pytest.approx((p.exp() * (p - q)).sum().item(), abs=1e-3)


def test_probe_loss_and_accuracy_by_a_naive_loop(model: CausalModel, tokenizer: ChatTokenizer) -> None:
    probes = [{"prompt": f"What is {t}?", "answer": f"It is {t}."} for t in ("tea", "a bee", "the moon", "ice", "rain")]

    def mean(prompt: str, answer: str) -> float:
        start = tokenizer.render([{"role": "user", "content": prompt}])
        row = [*start, *tokenizer.encode(answer), tokenizer.eos_ids[0]]
        with torch.no_grad():
            return model.logprobs(torch.tensor([row]))[0, len(start) - 1 :].mean().item()

    table = [[mean(p["prompt"], probes[(i + k) % 5]["answer"]) for k in range(4)] for i, p in enumerate(probes)]
    got = probe_answers(model, tokenizer, probes, None)
    assert got.loss == pytest.approx(-sum(row[0] for row in table) / 5, abs=1e-4)
    assert got.accuracy == pytest.approx(sum(row[0] > max(row[1:]) for row in table) / 5)


def test_damaged_probes_are_told_and_absent_ones_are_none(tmp_path: Path) -> None:
    assert load_probes(tmp_path / "none.jsonl") == []
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(GateError, match="restore"):
        load_probes(tmp_path / "bad.jsonl")


def test_known_answers_are_told_alike_where_no_rows_can_be_shared(model: CausalModel, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    probes = load_probes()[:6]
    together = probe_logprobs(model, tokenizer, probes, None)
    monkeypatch.setattr(model, "packs", False)
    torch.testing.assert_close(probe_logprobs(model, tokenizer, probes, None), together, rtol=1e-4, atol=1e-4)
