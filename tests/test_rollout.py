"""Rollouts: the training pass sees the tokens and log-probabilities that were sampled, whatever the padding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from engine.engine import Engine
from engine.model import CausalModel
from engine.tokenizer import ChatTokenizer
from learner import packing, rollout
from learner.rollout import (
    Trajectories,
    collect,
    passes,
    reply_divergence,
    reply_hidden,
    reply_logprobs,
    sample,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's
QUESTIONS = ["Hi", "Tell me about the moon, please.", "Why?"]


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> CausalModel:
    """A tiny Llama with an adapter that changes what it says."""
    model = CausalModel.load(tiny_llama)
    model.lora.create("policy", r=4, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.lora.parameters("policy").values():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def engine(model: CausalModel, tiny_llama: Path) -> Engine:
    return Engine(model, ChatTokenizer.load(tiny_llama), max_sequences=8)


@pytest.fixture(scope="module")
def prompts(engine: Engine) -> list[list[int]]:
    return [engine.tokenizer.render([{"role": "user", "content": q}]) for q in QUESTIONS]


@pytest.fixture(scope="module")
def batch(engine: Engine, prompts: list[list[int]]) -> Trajectories:
    return sample(engine, prompts, version="policy", group=2, max_tokens=24, temperature=0.7, seed=5)


def alone(model: CausalModel, batch: Trajectories, i: int, temperature: float) -> torch.Tensor:
    """Log-probabilities of row i's reply, computed on that row by itself."""
    row = torch.tensor([[*batch.prompts[i], *batch.completions[i]]])
    with torch.no_grad():
        return model.logprobs(row, adapter="policy", temperature=temperature)[0, len(batch.prompts[i]) - 1 :]


def test_the_batch_holds_what_was_sampled(batch: Trajectories, prompts: list[list[int]]) -> None:
    assert len(batch) == 6 and batch.prompts[0] == batch.prompts[1] == prompts[0]
    for i, completion in enumerate(batch.completions):
        assert batch.tokens[i][batch.mask[i]].tolist() == completion and int(batch.lengths[i]) == len(completion)
        assert batch.ids[i][batch.valid[i]].tolist() == [*batch.prompts[i], *completion]


def test_training_log_probabilities_are_those_recorded_while_sampling(model: CausalModel, batch: Trajectories) -> None:
    with torch.no_grad():
        logprobs = reply_logprobs(model, batch, torch.arange(6), "policy", 0.7)
    assert (logprobs - batch.engine_logprobs).abs().max() < 1e-4
    with torch.no_grad():  # temperature on one side only is another number altogether
        hot = reply_logprobs(model, batch, torch.arange(6), "policy", 1.0)
    assert (hot - batch.engine_logprobs).abs().max() > 0.1


def test_padding_and_company_change_nothing(model: CausalModel, batch: Trajectories) -> None:
    with torch.no_grad():
        logprobs = reply_logprobs(model, batch, torch.tensor([4, 1, 3]), "policy", 0.7)
    for k, i in enumerate([4, 1, 3]):
        assert torch.allclose(logprobs[k, : len(batch.completions[i])], alone(model, batch, i, 0.7), atol=1e-4)
        assert (logprobs[k, len(batch.completions[i]) :] == 0).all()


def test_left_padding_gives_the_same_log_probabilities(model: CausalModel, batch: Trajectories) -> None:
    row = [*batch.prompts[2], *batch.completions[2]]
    ids = torch.tensor([[model.pad_id] * 5 + row])
    valid = torch.tensor([[False] * 5 + [True] * len(row)])
    with torch.no_grad():
        left = model.logprobs(ids, valid=valid, adapter="policy", temperature=0.7)[0, 5 + len(batch.prompts[2]) - 1 :]
        right = reply_logprobs(model, batch, torch.tensor([2]), "policy", 0.7)
    assert torch.allclose(left, right[0], atol=1e-4)


def test_divergence_from_the_reference_is_that_of_transformers(model: CausalModel, batch: Trajectories, tiny_llama: Path, tmp_path: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.lora.save("policy", tmp_path / "policy")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "policy")
    found = reply_divergence(model, batch, torch.arange(6), "policy", None, 0.5)
    assert found.kl.max() > 0.01
    with torch.no_grad():
        for i in range(6):
            row, first, n = torch.tensor([[*batch.prompts[i], *batch.completions[i]]]), len(batch.prompts[i]), len(batch.completions[i])
            p, q = ((m(row).logits[0, first - 1 : -1] / 0.5).log_softmax(-1) for m in (adapted, plain))
            assert torch.allclose(found.logprobs[i, :n], p.gather(1, row[0, first:, None])[:, 0], atol=1e-3)
            assert torch.allclose(found.ref_logprobs[i, :n], q.gather(1, row[0, first:, None])[:, 0], atol=1e-3)
            assert torch.allclose(found.entropy[i, :n], -(p.exp() * p).sum(-1), atol=1e-3)
            assert torch.allclose(found.kl[i, :n], (p.exp() * (p - q)).sum(-1), atol=1e-3)
            assert all((x[i, n:] == 0).all() for x in (found.logprobs, found.ref_logprobs, found.entropy, found.kl))
    same = reply_divergence(model, batch, torch.arange(6), "policy", "policy", 0.5)
    assert (same.kl == 0).all() and torch.equal(same.logprobs, same.ref_logprobs)


@pytest.mark.parametrize("width", [1, 64])
def test_the_references_nucleus_and_what_lies_outside_it_are_by_transformers(
    model: CausalModel, batch: Trajectories, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(rollout, "NUCLEUS", width)
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.lora.save("policy", tmp_path / "policy")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "policy")
    nucleus = reply_divergence(model, batch, torch.arange(6), "policy", None, 0.1, 0.6).nucleus
    assert nucleus.shape == (*batch.mask.shape, width) and (reply_divergence(model, batch, torch.arange(6), "policy", None, 0.1).nucleus == -1).all()
    rows = torch.tensor([4, 1])
    found, alone = rollout.reply_chances(model, batch, rows, "policy", 0.1, model.eos_ids, nucleus), rollout.reply_chances(model, batch, rows, "policy", 0.1)
    assert torch.equal(found.logprobs, alone.logprobs) and (alone.outside == 0).all() and (alone.ending == 0).all()
    wide = []
    with torch.no_grad():
        for k, i in enumerate(rows.tolist()):
            row, first, n = torch.tensor([[*batch.prompts[i], *batch.completions[i]]]), len(batch.prompts[i]), len(batch.completions[i])
            p, q = ((m(row).logits[0, first - 1 : -1] / 0.1).softmax(-1) for m in (adapted, plain))
            assert torch.allclose(found.ending[k, :n], p[:, list(model.eos_ids)].sum(1), atol=1e-3)
            for t in range(n):
                said, reached = [], 0.0
                for share, token in sorted(((float(x), v) for v, x in enumerate(q[t])), reverse=True):
                    said, reached = [*said, token], reached + share
                    if reached >= 0.6:
                        break
                wide.append(len(said) > width)
                assert nucleus[i, t].tolist() == ([-1] * width if wide[-1] else said + [-1] * (width - len(said)))
                assert found.outside[k, t].item() == pytest.approx(0.0 if wide[-1] else 1 - float(p[t, said].sum()), abs=1e-3)
            assert (found.outside[k, n:] == 0).all()
    assert any(wide) == (width == 1) and not all(wide)


def test_divergence_has_the_mean_of_the_log_ratio_and_less_noise(model: CausalModel, engine: Engine, prompts: list[list[int]]) -> None:
    batch = sample(engine, prompts[:1], version="policy", group=384, max_tokens=6, temperature=1.0, seed=0)
    found = reply_divergence(model, batch, torch.arange(len(batch)), "policy", None, 1.0)
    ratio, exact = (found.logprobs - found.ref_logprobs).sum(1), found.kl.sum(1)
    error = float((ratio - exact).std()) / len(batch) ** 0.5
    assert abs(float(ratio.mean() - exact.mean())) < 4 * error  # one false alarm in 15,000 seeds; this one is fixed
    assert float(exact.var()) < 0.5 * float(ratio.var())


def test_the_end_token_is_part_of_a_reply_and_a_cut_reply_is_flagged() -> None:
    batch = collect(
        [[5, 6], [5]], [[7, 1], [8, 9, 9]], texts=["a", "b"], finish_reasons=["stop", "length"],
        logprobs=[[-1.0, -2.0], [-1.0, -1.0, -3.0]], group=1, pad_id=0,
    )  # fmt: skip
    assert batch.mask.tolist() == [[True, True, False], [True, True, True]]
    assert batch.cut.tolist() == [False, True]
    assert batch.chosen_at[0, :2].tolist() == [1, 2] and batch.chosen_at[1].tolist() == [0, 1, 2]
    assert batch.engine_logprobs[0].tolist() == [-1.0, -2.0, 0.0]


def test_a_reply_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        collect([[5]], [[]], texts=[""], finish_reasons=["stop"], logprobs=[[]], group=1, pad_id=0)


def test_the_same_seed_gives_the_same_rollouts(engine: Engine, prompts: list[list[int]], batch: Trajectories) -> None:
    again = sample(engine, prompts, version="policy", group=2, max_tokens=24, temperature=0.7, seed=5)
    other = sample(engine, prompts, version="policy", group=2, max_tokens=24, temperature=0.7, seed=6)
    assert again.completions == batch.completions != other.completions
    assert batch.completions[0] != batch.completions[1]  # one prompt's replies differ


def test_passes_hold_every_row_once_and_stay_small(model: CausalModel, batch: Trajectories) -> None:
    parts = passes(model, batch, [0, 2, 3, 5], max_tokens=90)
    assert sorted(torch.cat(parts).tolist()) == [0, 2, 3, 5]
    for part in parts:
        assert len(part) == 1 or len(part) * int(batch.valid[part].sum(1).max()) <= 90
    assert len(passes(model, batch, range(6), 10**6)) == 1


def test_hidden_states_are_those_before_each_reply_token(model: CausalModel, batch: Trajectories) -> None:
    with torch.no_grad():
        hidden = reply_hidden(model, batch, torch.tensor([0, 3]), "policy")
        for k, i in enumerate([0, 3]):
            for r in (0, len(batch.completions[i]) - 1):
                prefix = torch.tensor([[*batch.prompts[i], *batch.completions[i][:r]]])
                assert torch.allclose(hidden[k, r], model(prefix, adapter="policy")[0, -1], atol=1e-4)


@pytest.mark.parametrize(("rows", "packed"), [([0, 3], False), ([0, 1, 2, 3, 4, 5], True)])
def test_the_whole_of_it_has_the_state_after_each_replys_last_token_too(model: CausalModel, batch: Trajectories, rows: list[int], packed: bool) -> None:
    groups = [(batch.prompts[own[0]], [batch.completions[i] for i in own]) for own in packing.by_prompt(batch.prompts, rows)]
    assert (len(groups) < len(rows) and packing.worth_packing(groups, model, model.max_context)) == packed
    with torch.no_grad():
        whole = reply_hidden(model, batch, torch.tensor(rows), "policy", whole=True)
        assert torch.equal(whole[:, :-1], reply_hidden(model, batch, torch.tensor(rows), "policy"))
        for k, i in enumerate(rows):
            ids = torch.tensor([[*batch.prompts[i], *batch.completions[i]]])
            assert torch.allclose(whole[k, len(batch.completions[i])], model(ids, adapter="policy")[0, -1], atol=1e-4)


@pytest.fixture(scope="module")
def long_asked(engine: Engine) -> Trajectories:
    """Four replies to each of two long prompts of unlike length."""
    prompts = [engine.tokenizer.render([{"role": "user", "content": " ".join(QUESTIONS * n)}]) for n in (6, 4)]
    return sample(engine, prompts, version="policy", group=4, max_tokens=12, temperature=0.7, seed=5)


def test_a_long_prompt_is_read_once_for_all_its_replies(model: CausalModel, long_asked: Trajectories, monkeypatch: pytest.MonkeyPatch) -> None:
    read, plain = [], CausalModel.forward

    def forward(self: CausalModel, ids: torch.Tensor, **rest: object) -> torch.Tensor:
        read.append(ids.shape)
        return plain(self, ids, **rest)

    monkeypatch.setattr(CausalModel, "forward", forward)
    parts = passes(model, long_asked, range(8), max_tokens=200)
    assert sorted(sorted(part.tolist()) for part in parts) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with torch.no_grad():
        for part in parts:
            found = reply_logprobs(model, long_asked, part, "policy", 0.7)
            for k, i in enumerate(part.tolist()):
                assert torch.allclose(found[k, : len(long_asked.completions[i])], alone(model, long_asked, i, 0.7), atol=1e-4)
                assert (found[k, len(long_asked.completions[i]) :] == 0).all()
    tokens = [len(long_asked.prompts[4 * n]) + sum(map(len, long_asked.completions[4 * n : 4 * n + 4])) for n in (0, 1)]
    assert {shape for shape in read if shape != (1, shape[1]) or shape[1] in tokens} == {(1, count) for count in tokens}


def test_reading_a_prompt_once_gives_the_gradient_of_reading_it_for_each_reply(
    model: CausalModel, long_asked: Trajectories, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, parameters = torch.tensor([0, 1, 3, 4, 6]), list(model.lora.parameters("policy").values())
    weight = torch.linspace(-1, 2, 5 * long_asked.mask.shape[1]).view(5, -1)
    gradients, kinds = [], []
    for worth in (True, False):
        monkeypatch.setattr("learner.rollout.worth_packing", lambda *_, worth=worth: kinds.append(worth) or worth)
        found = reply_logprobs(model, long_asked, rows, "policy", 1.0)
        gradients.append(torch.autograd.grad((found * weight[:, : found.shape[1]]).sum(), parameters))
    assert kinds == [True, False]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def test_short_prompts_are_read_with_each_reply(model: CausalModel, batch: Trajectories) -> None:
    short = collect(
        [[5, 6]] * 4, [[7] * 40] * 4, texts=[""] * 4, finish_reasons=["stop"] * 4, logprobs=[[0.0] * 40] * 4, group=4, pad_id=model.pad_id
    )
    assert [part.tolist() for part in passes(model, short, range(4), max_tokens=90)] == [[0, 1], [2, 3]]
