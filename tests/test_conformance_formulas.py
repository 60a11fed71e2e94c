"""The learner's formulas on the numbers that TRL's and torchtune's own lines gave (`benchmarks/reference_losses.py`).

`tests/data/reference_losses.json` holds inputs, outputs and the versions that made them; agreement is to 1e-5. Where a
convention differs, the test says so and maps one onto the other:

- TRL adds a state after the end token: where there is room, the score lies on it, its value enters GAE, and the value loss
  and the whitening of the rewards count it. Our functions under TRL's wider mask give its numbers; with our own mask and
  nothing discounted the policy's advantages are the same, as the added value cancels.
- TRL's and our means are over all tokens of the minibatch, RLOO's over replies, which is our mean over rows of one "token".
- Variances are unbiased everywhere.
- torchtune's `whiten` has its flag the other way round: by default it gives the mean back.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.engine import Engine
from engine.model import CausalModel
from engine.tokenizer import ChatTokenizer
from learner import rollout
from learner.advantages import gae, last_valid, leave_one_out, token_rewards, whiten
from learner.losses import bradley_terry, kl_k1, kl_k3, masked_mean, masked_var, policy_loss, value_loss
from learner.rollout import Trajectories, collect

REFERENCE = json.loads((Path(__file__).parent / "data" / "reference_losses.json").read_text())
RUNS = list(REFERENCE["trl_ppo"])
END = REFERENCE["end"]


def tensors(value: Any) -> Any:
    """Lists as tensors, numbers as float32 (what the learner computes in), all the way down."""
    if isinstance(value, dict):
        return {key: tensors(item) for key, item in value.items()}
    if isinstance(value, list):
        made = torch.tensor(value)
        return made.float() if made.is_floating_point() else made
    return value


def run_of_trl(name: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Inputs, outputs and settings of one run of TRL's lines."""
    run = tensors(REFERENCE["trl_ppo"][name])
    return run, run["out"], run["settings"]


def equal(ours: Tensor, theirs: Any) -> None:
    torch.testing.assert_close(ours, torch.as_tensor(theirs, dtype=ours.dtype), rtol=1e-5, atol=1e-5)


def as_sampled(run: dict[str, Any]) -> Trajectories:
    """The run's replies as the engine hands them over: up to the end token, behind prompts of different lengths."""
    completions = [row[: row.index(END) + 1] if END in row else row for row in run["replies"].tolist()]
    return collect(
        [[2] * (1 + i % 3) for i in range(len(completions))], completions, texts=[""] * len(completions),
        finish_reasons=["stop" if END in c else "length" for c in completions], logprobs=[[0.0] * len(c) for c in completions],
        group=1, pad_id=REFERENCE["pad"],
    )  # fmt: skip


def test_the_reference_was_made_by_the_versions_that_are_named() -> None:
    assert REFERENCE["made_with"] == {"trl": "1.12.0", "torchtune": "0.6.1", "torch": "2.13.0+cpu"}


@pytest.mark.parametrize("name", [n for n in RUNS if n != "pad is end"])
def test_the_mask_and_what_a_missing_end_costs_equal_trls(name: str) -> None:
    run, out, settings = run_of_trl(name)
    batch = as_sampled(run)
    assert torch.equal(batch.mask, out["mask"]) and torch.equal(~batch.cut, out["has_end"])
    equal(run["scores"] - settings["missing_eos_penalty"] * batch.cut, out["scores"])


def test_where_pad_is_the_end_token_ours_still_counts_it_and_trls_does_not() -> None:
    """TRL finds a reply's end by its first pad: with pad = EOS the end token is no longer trained, and is out of GAE."""
    run, out, _ = run_of_trl("pad is end")
    mask = as_sampled(run).mask
    ended = run["replies"].eq(END).any(1)
    last = torch.zeros_like(mask)
    last[torch.arange(len(mask)), last_valid(mask)] = True
    assert ended.sum() == 5 and torch.equal(out["mask"], mask & ~(last & ended[:, None]))
    assert run["replies"][last & ended[:, None]].tolist() == [END] * 5


@pytest.mark.parametrize("name", [n for n in RUNS if n != "pad is end"])
def test_rewards_returns_and_advantages_equal_trls(name: str) -> None:
    run, out, settings = run_of_trl(name)
    mask, wider = as_sampled(run).mask, out["mask_p1"]  # ours, and with TRL's state after the end
    kl = (kl_k1 if settings["kl_estimator"] == "k1" else kl_k3)(run["logprobs"], run["ref_logprobs"])
    equal(torch.where(mask, kl, 0.0), out["kl"])
    rewards = token_rewards(out["scores"], torch.where(mask, kl, 0.0), wider, settings["kl_coef"])
    if settings["whiten_rewards"]:
        rewards = whiten(rewards, wider, shift_mean=False)
    equal(rewards, out["rewards"])
    advantages, returns = gae(rewards, run["values"], wider, settings["gamma"], settings["lam"])
    equal(returns, out["returns"])
    equal(whiten(advantages, mask), out["advantages"])


@pytest.mark.parametrize("name", ["full", "full, whitened", "undiscounted"])
def test_advantages_equal_trls_with_our_own_place_for_the_score_where_its_added_state_is_absent_or_cancels(name: str) -> None:
    run, out, settings = run_of_trl(name)
    mask = as_sampled(run).mask
    assert torch.equal(mask, out["mask_p1"]) is (name != "undiscounted")
    rewards = token_rewards(out["scores"], kl_k1(run["logprobs"], run["ref_logprobs"]), mask, settings["kl_coef"])
    if settings["whiten_rewards"]:
        rewards = whiten(rewards, mask, shift_mean=False)
    advantages, _ = gae(rewards, run["values"], mask, settings["gamma"], settings["lam"])
    equal(whiten(advantages, mask), out["advantages"])


class Echo:
    """A model whose hidden states are given logits, which it puts where the states that chose the reply tokens lie."""

    def __init__(self, batch: Trajectories, logits: Tensor) -> None:
        self.hidden = torch.full((*batch.ids.shape, logits.shape[-1]), 50.0)
        for b, prompt in enumerate(batch.prompts):
            for r in range(len(batch.completions[b])):
                self.hidden[b, len(prompt) - 1 + r] = logits[b, r]

    def __call__(self, ids: Tensor, *, valid: Tensor, adapter: str | None) -> Tensor:
        return self.hidden[:, : ids.shape[1]]

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


@pytest.mark.parametrize("name", [n for n in RUNS if n != "pad is end"])
def test_log_probabilities_at_a_temperature_the_clipped_policy_loss_and_its_gradient_equal_trls(name: str) -> None:
    run, out, settings = run_of_trl(name)
    batch, logits = as_sampled(run), run["logits"].requires_grad_()
    new = rollout.reply_logprobs(Echo(batch, logits), batch, torch.arange(len(batch)), None, settings["temperature"])  # type: ignore[arg-type]
    equal(new[batch.mask], out["new_logprobs"][batch.mask])
    ours = policy_loss(new, run["old_logprobs"], out["advantages"], batch.mask, settings["cliprange"])
    equal(ours.loss, out["policy_loss"])
    equal(ours.clipfrac, out["policy_clipfrac"])
    assert 0.0 < ours.clipfrac < 1.0  # both branches of the clip are in the numbers
    equal(torch.autograd.grad(ours.loss, logits)[0], out["logits_grad"])


@pytest.mark.parametrize("name", [n for n in RUNS if n != "pad is end"])
def test_the_clipped_value_loss_and_its_gradient_equal_trls(name: str) -> None:
    run, out, settings = run_of_trl(name)
    new, wider = run["new_values"][:, :-1].requires_grad_(), out["mask_p1"]
    ours = value_loss(new, run["values"], out["returns"], wider, settings["cliprange_value"])
    equal(ours.loss, out["value_loss"])
    equal(ours.clipfrac, out["value_clipfrac"])
    assert 0.0 < ours.clipfrac < 1.0
    equal(torch.autograd.grad(ours.loss, new)[0], out["values_grad"][:, :-1])


def test_leave_one_out_advantages_equal_trls_rloo_with_the_kl_in_the_reward() -> None:
    run = tensors(REFERENCE["trl_rloo"])
    kl = torch.where(run["mask"], kl_k1(run["logprobs"], run["ref_logprobs"]), 0.0)
    ours = leave_one_out(run["scores"] - run["beta"] * kl.sum(1), run["group"])
    equal(ours, run["out"]["advantages"])
    # TRL divides by deviation + 1e-4, we by sqrt(variance + 1e-8).
    white = whiten(ours[:, None], torch.ones(len(ours), 1, dtype=torch.bool))[:, 0]
    equal(white * (ours.var() + 1e-8).sqrt() / (ours.std() + 1e-4), run["out"]["normalized"])


def test_a_tokens_own_kl_as_its_cost_is_the_gradient_of_each_states_kl_with_the_visits_held_fixed() -> None:
    """`learner/ppo.py` charges a token of a leave-one-out update with its own KL, TRL's RLOO with all of the reply's.

    All replies of two tokens out of three, each weighed by its probability, so that the expectation is exact. TRL's is
    the gradient of the whole replies' KL; ours leaves out that a token decides which states come after it.
    """
    draw = torch.Generator().manual_seed(0)
    first, then = (torch.randn(*shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in ((1, 3), (3, 3)))
    ref_first, ref_then = (torch.randn(*shape, generator=draw, dtype=torch.float64).log_softmax(-1) for shape in ((1, 3), (3, 3)))
    p, q = first.log_softmax(-1), then.log_softmax(-1)
    replies = torch.cartesian_prod(torch.arange(3), torch.arange(3))  # (9, 2)
    logprobs = torch.stack([p[0, replies[:, 0]], q[replies[:, 0], replies[:, 1]]], 1)
    ref = torch.stack([ref_first[0, replies[:, 0]], ref_then[replies[:, 0], replies[:, 1]]], 1)
    kl, chance = kl_k1(logprobs, ref).detach(), logprobs.sum(1).exp().detach()[:, None]

    def expected(cost: Tensor) -> Tensor:
        loss = policy_loss(logprobs, logprobs.detach(), -cost * chance * cost.numel(), torch.ones(9, 2, dtype=torch.bool), 0.2).loss
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, (first, then), retain_graph=True)])

    def exact(of: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(of, (first, then), retain_graph=True)])

    states = (p.exp() * (p - ref_first)).sum(), (q.exp() * (q - ref_then)).sum(1)  # KL of each state's choice
    visits = p.exp()[0]
    equal(expected(kl), exact(states[0] + (visits.detach() * states[1]).sum()))
    whole = exact(states[0] + (visits * states[1]).sum())
    equal(expected(kl.sum(1, keepdim=True).expand(9, 2)), whole)
    assert (expected(kl) - whole).abs().max() > 0.01


def test_the_clipped_loss_of_whole_replies_equals_trls_rloo() -> None:
    run = tensors(REFERENCE["trl_rloo"])
    new, old = ((run[k] * run["mask"]).sum(1, keepdim=True) for k in ("new_logprobs", "logprobs"))
    ours = policy_loss(new, old, run["out"]["advantages"][:, None], torch.ones(6, 1, dtype=torch.bool), run["clip"])
    equal(ours.loss, run["out"]["loss"])


def test_bradley_terry_equals_trls_reward_loss() -> None:
    run = tensors(REFERENCE["trl_reward"])
    pairs = [(i, 6 + i) for i in range(6)]
    equal(bradley_terry(torch.cat([run["chosen"], run["rejected"]]), pairs), run["out"]["loss"])


@pytest.mark.parametrize("source", ["trl_dpo", "torchtune_dpo"])
def test_bradley_terry_on_dpos_implicit_rewards_equals_the_dpo_loss(source: str) -> None:
    """Rafailov et al. 2023, Eq. 7: DPO is Bradley-Terry with beta (log pi - log pi_ref) as the score."""
    run = tensors(REFERENCE[source])
    chosen = run["beta"] * (run["chosen_logps"] - run["ref_chosen_logps"])
    rejected = run["beta"] * (run["rejected_logps"] - run["ref_rejected_logps"])
    equal(torch.stack([bradley_terry(torch.stack(pair), [(0, 1)]) for pair in zip(chosen, rejected, strict=True)]), run["out"]["losses"])


def test_rewards_returns_and_advantages_equal_torchtunes() -> None:
    """torchtune puts the score where we do, on the last valid token: no mapping but that of its whitening."""
    run = tensors(REFERENCE["torchtune"])
    out, mask = run["out"], run["mask"]
    kl = kl_k1(run["logprobs"], run["ref_logprobs"])
    rewards = token_rewards(run["scores"], kl, mask, run["kl_coef"])
    equal(torch.where(mask, kl, 0.0), out["kl"])
    equal(rewards, out["rewards"])
    advantages, returns = gae(rewards, run["values"], mask, run["gamma"], run["lam"])
    equal(returns, out["returns"])
    equal(whiten(advantages, mask, shift_mean=False), out["advantages"])


def test_masked_statistics_equal_torchtunes() -> None:
    run = tensors(REFERENCE["torchtune"])
    out, mask = run["out"], run["mask"]
    equal(masked_mean(run["values"], mask), out["masked_mean"])
    equal(masked_var(run["values"], mask), out["masked_var"])
    equal(whiten(out["rewards"], mask)[mask], out["whiten_without_shift"][mask])
    equal(whiten(out["rewards"], mask, shift_mean=False)[mask], out["whiten"][mask])


def test_the_clipped_losses_and_their_gradients_equal_torchtunes() -> None:
    run = tensors(REFERENCE["torchtune"])
    out, mask = run["out"], run["mask"]
    new, values = run["new_logprobs"].requires_grad_(), run["new_values"].requires_grad_()
    policy = policy_loss(new, run["logprobs"], out["advantages"], mask, run["clip"])
    value = value_loss(values, run["values"], out["returns"], mask, run["value_clip"])
    equal(policy.loss, out["policy_loss"])
    equal(policy.clipfrac, out["clipfrac"])
    equal(value.loss, out["value_loss"])
    grads = torch.autograd.grad(policy.loss + run["value_coeff"] * value.loss, (new, values))
    equal(grads[0], out["new_logprobs_grad"])
    equal(grads[1], out["new_values_grad"])


def test_the_engine_ends_replies_at_the_first_of_several_stop_tokens_as_torchtune_cuts_them(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is made to say torchtune's replies, one of whose two stop tokens is also the pad."""
    run = REFERENCE["torchtune_stop"]
    model, tokenizer = CausalModel.load(tiny_llama), ChatTokenizer.load(tiny_llama)
    replies, wide = run["replies"], len(run["replies"][0])
    monkeypatch.setattr(model, "pad_id", run["fill"])
    engine = Engine(model, tokenizer, max_sequences=len(replies))
    engine._eos = frozenset(run["stop_tokens"])
    script = {1000 + i: reply for i, reply in enumerate(replies)}
    monkeypatch.setattr(engine, "_sample", lambda _: tuple(zip(*[
        (script[s.params.seed][len(s.token_ids)], -1.0) for s in engine.scheduler.running
    ], strict=True)))  # fmt: skip
    batch = rollout.sample(engine, [[5, 6]], version="base", group=len(replies), max_tokens=wide, temperature=1.0, seed=1000)
    assert batch.mask.tolist() == run["out"]["mask"] and batch.tokens.tolist() == run["out"]["kept"]
    # torchtune takes a reply that its last token just ended for one without an end (row 1); ours knows why it ended.
    assert run["out"]["no_end"][:2] == [True, True] and batch.cut.tolist()[:2] == [True, False]
    assert batch.cut.tolist()[2:] == run["out"]["no_end"][2:]
