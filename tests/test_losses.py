"""The loss functions against hand arithmetic and naive loops. Against TRL and torchtune: test_conformance_formulas."""

from __future__ import annotations

import math

import pytest
import torch

from learner.losses import (
    bradley_terry,
    davidson,
    kl_k1,
    kl_k3,
    masked_mean,
    masked_var,
    outside_option,
    policy_loss,
    preference_loss,
    value_loss,
)


def batch(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_mask(seed: int, *shape: int) -> torch.Tensor:
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[:, 1] = True
    return mask


def test_masked_mean_and_variance_are_those_of_the_chosen_numbers() -> None:
    x = torch.tensor([[1.0, 100.0, 2.0], [6.0, math.nan, math.inf]])
    mask = torch.tensor([[True, False, True], [True, False, False]])
    assert masked_mean(x, mask).item() == pytest.approx(3.0)
    assert masked_var(x, mask).item() == pytest.approx((4 + 1 + 9) / 2)


def test_masked_statistics_of_nothing_are_zero() -> None:
    none = torch.zeros(2, 3, dtype=torch.bool)
    assert masked_mean(torch.ones(2, 3), none) == 0 and masked_var(torch.ones(2, 3), none) == 0


def test_bradley_terry_of_one_pair_by_hand() -> None:
    # s_w - s_l = log 3, so P(w wins) = 3/4
    loss = bradley_terry(torch.tensor([0.0, math.log(3.0)]), [(1, 0)])
    assert loss.item() == pytest.approx(-math.log(0.75), abs=1e-6)


def test_k_wise_loss_weighs_a_comparison_by_one_over_its_pairs() -> None:
    s = batch(0, 4)
    ranking = [2, 0, 3, 1]
    pairs = [(ranking[a], ranking[b]) for a in range(4) for b in range(a + 1, 4)]
    naive = sum(-math.log(1 / (1 + math.exp(-(s[w] - s[x]).item()))) for w, x in pairs) / math.comb(4, 2)
    assert bradley_terry(s, pairs).item() == pytest.approx(naive, rel=1e-9)


def test_no_pairs_cost_nothing_but_keep_the_graph() -> None:
    s = torch.zeros(3, requires_grad=True)
    nu = torch.zeros((), requires_grad=True)
    (bradley_terry(s, []) + davidson(s, [], [], nu)).backward()
    assert s.grad.tolist() == [0.0, 0.0, 0.0]


def test_davidson_by_its_definition_with_strengths() -> None:
    s, nu = batch(1, 3), 0.7
    p = [math.exp(v) for v in s.tolist()]

    def parts(i: int, j: int) -> tuple[float, float]:
        z = p[i] + p[j] + nu * math.sqrt(p[i] * p[j])
        return p[i] / z, nu * math.sqrt(p[i] * p[j]) / z

    naive = (-math.log(parts(0, 1)[0]) - math.log(parts(0, 2)[0]) - math.log(parts(1, 2)[1])) / 3
    loss = davidson(s, [(0, 1), (0, 2)], [(1, 2)], torch.tensor(math.log(nu), dtype=torch.float64))
    assert loss.item() == pytest.approx(naive, rel=1e-9)


def test_davidson_outcomes_sum_to_one() -> None:
    s, nu = batch(2, 2), torch.tensor(0.3, dtype=torch.float64)
    chances = [
        (-davidson(s, [(0, 1)], [], nu)).exp(), (-davidson(s, [(1, 0)], [], nu)).exp(), (-davidson(s, [], [(0, 1)], nu)).exp(),
    ]  # fmt: skip
    assert sum(chances).item() == pytest.approx(1.0, rel=1e-12)


def test_davidson_without_ties_becomes_bradley_terry() -> None:
    s, pairs = batch(3, 4), [(0, 1), (3, 2), (1, 2)]
    never = torch.tensor(-60.0, dtype=torch.float64)
    assert davidson(s, pairs, [], never).item() == pytest.approx(bradley_terry(s, pairs).item(), rel=1e-9)
    assert preference_loss(s, pairs, [(0, 3)], None).item() == bradley_terry(s, pairs).item()
    assert preference_loss(s, pairs, [(0, 3)], never).item() == davidson(s, pairs, [(0, 3)], never).item()


def test_a_tie_pulls_scores_together_and_a_win_apart() -> None:
    s = torch.tensor([1.0, 0.0], requires_grad=True)
    nu = torch.zeros(())
    (tie,) = torch.autograd.grad(davidson(s, [], [(0, 1)], nu), s)
    (win,) = torch.autograd.grad(davidson(s, [(0, 1)], [], nu), s)
    assert tie[0] > 0 > tie[1] and win[0] < 0 < win[1]


def test_the_outside_option_by_hand() -> None:
    """sigma(1) = 0.731059, sigma(2) = 0.880797; level 1."""
    s, level = torch.tensor([2.0, 3.0, 0.0], dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    assert outside_option(s, (0,), (), level).item() == pytest.approx(-math.log(0.7310585786) / 3)
    assert outside_option(s, (0, 1), (), level).item() == pytest.approx(-(math.log(0.7310585786) + math.log(0.8807970780)) / 2 / 3)
    refused = -(math.log(1 - 0.7310585786) + math.log(1 - 0.8807970780) + math.log(0.7310585786)) / 3
    assert outside_option(s, (), (0, 1, 2), level).item() == pytest.approx(refused)
    assert outside_option(s, (), (), level).item() == 0.0


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_outside_options_pairs_have_luces_scores_as_their_optimum(k: int) -> None:
    """Expected loss over Luce's choice among k replies and none, with its true chances: no gradient at the true scores."""
    s, level = batch(7, k).requires_grad_(), torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    chances = torch.cat([s, level[None]]).softmax(0).detach()
    expected = chances[k] * outside_option(s, (), tuple(range(k)), level)
    for i in range(k):
        expected = expected + chances[i] * outside_option(s, (i,), (), level)
    for gradient in torch.autograd.grad(expected, (s, level)):
        assert gradient.abs().max().item() < 1e-12


def test_losses_stay_finite_for_huge_scores() -> None:
    s = torch.tensor([500.0, -500.0], requires_grad=True)
    loss = davidson(s, [(1, 0)], [], torch.zeros(())) + bradley_terry(s, [(1, 0)])
    loss.backward()
    assert loss.item() == pytest.approx(2000.0) and s.grad.isfinite().all()


def test_kl_estimators_agree_with_the_exact_divergence() -> None:
    p, q = batch(4, 6).log_softmax(0), batch(5, 6).log_softmax(0)
    exact = (p.exp() * (p - q)).sum()  # expectation over tokens drawn from p, computed exactly
    assert (p.exp() * kl_k1(p, q)).sum().item() == pytest.approx(exact.item(), rel=1e-9)
    assert (p.exp() * kl_k3(p, q)).sum().item() == pytest.approx(exact.item(), rel=1e-9)
    assert (kl_k3(p, q) >= 0).all() and (kl_k1(p, q) < 0).any()


def test_kl_estimates_are_zero_for_equal_policies() -> None:
    same = batch(6, 9)
    assert all(k(same, same).abs().max() == 0 for k in (kl_k1, kl_k3))


def test_policy_loss_is_the_naive_loop_over_masked_tokens() -> None:
    new, old, adv, mask = batch(7, 3, 5), batch(8, 3, 5), batch(9, 3, 5), some_mask(0, 3, 5)
    terms, cut = [], 0
    for b in range(3):
        for t in range(5):
            if mask[b, t]:
                r, a = math.exp(new[b, t] - old[b, t]), adv[b, t].item()
                objective = min(r * a, min(max(r, 0.8), 1.2) * a)
                terms.append(-objective)
                cut += objective < r * a
    out = policy_loss(new, old, adv, mask, 0.2)
    assert out.loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-9)
    assert out.clipfrac.item() == pytest.approx(cut / len(terms))


def test_at_the_old_policy_ratio_is_one_and_the_gradient_is_reinforce() -> None:
    new = batch(13, 2, 4).requires_grad_()
    adv, mask = batch(14, 2, 4), some_mask(2, 2, 4)
    out = policy_loss(new, new.detach(), adv, mask, 0.2)
    out.loss.backward()
    assert out.mean.item() == 1.0 and out.kl.item() == 0.0 and out.clipfrac.item() == 0.0
    assert torch.allclose(new.grad, -adv * mask / mask.sum())


def test_a_clipped_token_gives_no_gradient() -> None:
    new = torch.tensor([[0.5, 0.5]], requires_grad=True)  # ratio 1.65
    policy_loss(new, torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]), torch.ones(1, 2, dtype=torch.bool), 0.2).loss.backward()
    assert new.grad[0, 0] == 0.0 and new.grad[0, 1] > 0  # only what would grow a good token further is cut


def test_what_padding_holds_changes_nothing_even_nan() -> None:
    new, old, adv, mask = batch(15, 2, 4), batch(16, 2, 4), batch(17, 2, 4), some_mask(3, 2, 4)
    want = policy_loss(new, old, adv, mask, 0.2)
    junk = torch.where(mask, new, math.nan).requires_grad_()
    got = policy_loss(junk, old, adv, mask, 0.2)
    got.loss.backward()
    assert got.loss.item() == want.loss.item() and junk.grad.isfinite().all()


def test_value_loss_is_the_naive_loop_over_masked_tokens() -> None:
    v, old, ret, mask = batch(18, 3, 4), batch(19, 3, 4), batch(20, 3, 4), some_mask(4, 3, 4)
    terms = []
    for b in range(3):
        for t in range(4):
            if mask[b, t]:
                x, o, r = v[b, t].item(), old[b, t].item(), ret[b, t].item()
                terms.append(max((x - r) ** 2, (min(max(x, o - 0.2), o + 0.2) - r) ** 2))
    out = value_loss(v, old, ret, mask, 0.2)
    assert out.loss.item() == pytest.approx(0.5 * sum(terms) / len(terms), rel=1e-9)
