"""Advantages against hand arithmetic and the defining sums. Against TRL and torchtune: test_conformance_formulas."""

from __future__ import annotations

import math

import pytest
import torch

from learner.advantages import gae, last_valid, leave_one_out, token_rewards, whiten


def batch(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


RAGGED = torch.tensor([[True, True, True, False], [True, True, False, False], [False, False, True, True]])


def test_the_score_lands_on_the_last_valid_token_whatever_the_padding() -> None:
    rewards = token_rewards(torch.tensor([5.0, 6.0, 7.0]), torch.ones(3, 4), RAGGED, 0.5)
    assert rewards.tolist() == [[-0.5, -0.5, 4.5, 0], [-0.5, 5.5, 0, 0], [0, 0, -0.5, 6.5]]


def test_token_rewards_add_up_to_the_score_minus_the_weighted_kl() -> None:
    scores, kl = batch(0, 3), batch(1, 3, 4)
    total = token_rewards(scores, kl, RAGGED, 0.3).sum(1)
    assert torch.allclose(total, scores - 0.3 * (kl * RAGGED).sum(1))


def test_a_reply_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="no token"):
        last_valid(torch.tensor([[True, False], [False, False]]))


def test_gae_by_hand() -> None:
    # gamma 0.5, lam 0.5: delta = [1 + 0.5*4 - 2, 3 + 0 - 4] = [1, -1]; A = [1 - 0.25, -1]
    adv, ret = gae(torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 4.0]]), torch.ones(1, 2, dtype=torch.bool), 0.5, 0.5)
    assert adv.tolist() == [[0.75, -1.0]] and ret.tolist() == [[2.75, 3.0]]


def test_gae_is_its_defining_sum_on_each_row_alone() -> None:
    rewards, values, gamma, lam = batch(2, 3, 4), batch(3, 3, 4), 0.9, 0.8
    adv, ret = gae(rewards, values, RAGGED, gamma, lam)
    for b in range(3):
        where = [t for t in range(4) if RAGGED[b, t]]
        r, v = [rewards[b, t].item() for t in where], [values[b, t].item() for t in where] + [0.0]
        delta = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(r))]
        for i, t in enumerate(where):
            want = sum((gamma * lam) ** (k - i) * delta[k] for k in range(i, len(r)))
            assert adv[b, t].item() == pytest.approx(want, rel=1e-9)
            assert ret[b, t].item() == pytest.approx(want + v[i], rel=1e-9)
    assert (adv[~RAGGED] == 0).all() and (ret[~RAGGED] == 0).all()


def test_gae_with_lambda_one_is_the_return_minus_the_value() -> None:
    rewards, values = batch(4, 1, 5), batch(5, 1, 5)
    adv, ret = gae(rewards, values, torch.ones(1, 5, dtype=torch.bool), 1.0, 1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    assert torch.allclose(adv, to_go - values) and torch.allclose(ret, to_go)


def test_left_and_right_padding_give_the_same_advantages() -> None:
    r, v = batch(8, 1, 3), batch(9, 1, 3)
    pad, on, off = torch.full((1, 2), 9.0, dtype=torch.float64), torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.bool)
    left = gae(torch.cat([pad, r], 1), torch.cat([pad, v], 1), torch.cat([off, on], 1), 0.9, 0.9)[0][:, 2:]
    right = gae(torch.cat([r, pad], 1), torch.cat([v, pad], 1), torch.cat([on, off], 1), 0.9, 0.9)[0][:, :3]
    assert torch.equal(left, right)


def test_leave_one_out_by_hand() -> None:
    got = leave_one_out(torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0]), 3)
    assert got.tolist() == [1 - 4, 2 - 3.5, 6 - 1.5, -1.5, -1.5, 3]


def test_leave_one_out_sums_to_zero_in_each_group() -> None:
    assert leave_one_out(batch(10, 12), 4).view(3, 4).sum(1).abs().max() < 1e-12


def test_leave_one_out_needs_company() -> None:
    for count, group in ((4, 1), (5, 2)):
        with pytest.raises(ValueError, match="at least two"):
            leave_one_out(torch.zeros(count), group)


def test_whitening_gives_mean_zero_and_variance_one_on_the_mask_only() -> None:
    x = batch(11, 3, 4) * 7 + 3
    white = whiten(x, RAGGED)
    chosen = white[RAGGED]
    assert chosen.mean().item() == pytest.approx(0, abs=1e-9) and chosen.var().item() == pytest.approx(1, rel=1e-6)
    assert (white[~RAGGED] == 0).all()


def test_whitening_rewards_keeps_their_mean() -> None:
    x = batch(12, 3, 4) * 5 - 2
    chosen = x[RAGGED]
    want = (chosen - chosen.mean()) * torch.rsqrt(chosen.var() + 1e-8) + chosen.mean()
    assert torch.allclose(whiten(x, RAGGED, shift_mean=False)[RAGGED], want)


def test_whitening_equal_numbers_is_finite() -> None:
    assert whiten(torch.full((2, 2), 3.0), torch.ones(2, 2, dtype=torch.bool)).abs().max() == 0
    assert math.isfinite(whiten(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool)).item())
