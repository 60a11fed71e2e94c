"""engine/sampling.py against naive loops, scipy, and the arithmetic of counting."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from engine.sampling import draw, invert, invert_in_blocks, nucleus, sample, uniform


def row(*logits: float) -> torch.Tensor:
    return torch.tensor([logits], dtype=torch.float32)


def test_uniforms_are_uniform_and_do_not_follow_each_other() -> None:
    """False alarm odds: 1e-4 for each of the two tests."""
    numbers = [uniform(seed, position) for seed in range(100) for position in range(100)]
    assert all(0 <= u < 1 for u in numbers)
    assert stats.kstest(numbers, "uniform").pvalue > 1e-4
    pairs = [(uniform(s, p), uniform(s, p + 1)) for s in range(200) for p in range(20)]
    table = [[sum(int(4 * a) == i and int(4 * b) == j for a, b in pairs) for j in range(4)] for i in range(4)]
    assert stats.chi2_contingency(table).pvalue > 1e-4


def test_the_generator_is_splitmix64_chained() -> None:
    """The first outputs of splitmix64 from state 0 and from 1234567, as published with the algorithm."""
    from engine.sampling import _mix

    assert _mix(0) == 0xE220A8397B1DCDAF
    assert _mix(1234567) == 6457827717110365317


def test_samples_come_as_often_as_their_probability_says() -> None:
    """Chi-square over 20,000 draws at temperature 0.7; false alarm odds 1e-4."""
    logits, n = row(1.0, 0.0, -1.0, 2.0, 0.5), 20_000
    weights = [math.exp(x / 0.7) for x in logits[0].tolist()]
    expected = [n * w / sum(weights) for w in weights]
    tokens, _ = sample(logits.expand(n, -1), [0.7] * n, [1.0] * n, [uniform(s, 3) for s in range(n)])
    counts = [tokens.count(i) for i in range(5)]
    assert stats.chisquare(counts, expected).pvalue > 1e-4


def test_nucleus_samples_are_spread_as_the_kept_tokens_alone() -> None:
    """p = (.5, .25, .125, .125), top_p = .7 keeps the first two, 2 to 1. False alarm odds 1e-4."""
    logits, n = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log(), 9_000
    tokens, logprobs = sample(logits.expand(n, -1), [1.0] * n, [0.7] * n, [uniform(s, 0) for s in range(n)])
    assert set(tokens) == {0, 1}
    assert stats.binomtest(tokens.count(0), n, 2 / 3).pvalue > 1e-4
    assert {t: round(lp, 4) for t, lp in zip(tokens, logprobs, strict=True)} == {0: round(math.log(0.5), 4), 1: round(math.log(0.25), 4)}


def naive_nucleus(probs: list[float], top_p: float) -> list[float]:
    kept, total = [0.0] * len(probs), 0.0
    for i in sorted(range(len(probs)), key=lambda i: -probs[i]):
        if total >= top_p:
            break
        kept[i] = probs[i]
        total += probs[i]
    return kept


@pytest.mark.parametrize("vocab", [3, 50, 700, 5000])
def test_nucleus_keeps_what_a_plain_loop_keeps(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    spread = torch.tensor([[0.01], [1.0], [6.0], [0.3]])  # from nearly flat to nearly certain
    probs = (torch.randn(4, vocab, generator=generator) * spread).softmax(-1)
    top_ps = [0.9, 0.35, 0.999, 1.0]
    n = 1000
    numbers = (torch.arange(n, dtype=torch.float64) + 0.5) / n  # evenly, so every token gets its share of them to within one
    for row_probs, p in zip(probs, top_ps, strict=True):
        drawn = nucleus(row_probs.expand(n, -1), torch.full((n,), p, dtype=torch.float64), numbers)[:, 0].bincount(minlength=vocab)
        kept = torch.tensor(naive_nucleus(row_probs.tolist(), p), dtype=torch.float64)
        off = (drawn - n * kept / kept.sum()).abs() > 1.01
        assert int(off.sum()) <= 1  # float32 and float64 sums may part at the very edge
        assert int(drawn.sum()) == n and drawn[kept == 0].sum() <= 1


def test_a_seed_draws_the_same_token_whatever_needs_a_longer_look_beside_it() -> None:
    generator = torch.Generator().manual_seed(5)
    sharp, flat = torch.randn(6, 4000, generator=generator) * 3, torch.zeros(6, 4000)
    numbers = [uniform(s, 0) for s in range(6)]
    alone = [sample(sharp[i : i + 1], [1.0], [0.9], numbers[i : i + 1])[0][0] for i in range(6)]
    for others, top_p in ((flat, 0.9), (flat, 1.0), (sharp, 1.0)):
        together, _ = sample(torch.cat([sharp, others]), [1.0] * 12, [0.9] * 6 + [top_p] * 6, numbers * 2)
        assert together[:6] == alone


@pytest.mark.parametrize("top_p", [1e-6, 1e-50])  # the latter is 0 in float32
def test_a_tiny_top_p_is_greedy(top_p: float) -> None:
    tokens, _ = sample(row(0.0, 3.0, 2.9).expand(50, -1), [1.0] * 50, [top_p] * 50, [uniform(s, 0) for s in range(50)])
    assert set(tokens) == {1}


def test_temperature_zero_takes_the_likeliest_and_reports_at_temperature_one() -> None:
    tokens, logprobs = sample(row(1.0, 3.0, 2.0), [0.0], [1.0], [0.999])
    assert tokens == [1]
    assert logprobs[0] == pytest.approx(3 - math.log(math.e + math.e**3 + math.e**2), abs=1e-6)


def test_logprobs_are_under_the_full_softmax_at_the_temperature() -> None:
    logits = row(1.0, 3.0, 2.0)
    for temperature in (0.5, 1.0, 2.0):
        tokens, logprobs = sample(logits, [temperature], [0.5], [0.2])
        scaled = [x / temperature for x in logits[0].tolist()]
        assert logprobs[0] == pytest.approx(scaled[tokens[0]] - math.log(sum(map(math.exp, scaled))), abs=1e-6)


def test_each_row_has_its_own_settings() -> None:
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(0)) * 2
    settings = [(0.0, 1.0, 0.3), (1.0, 1.0, 0.7), (0.6, 0.8, 0.5), (1.7, 0.4, 0.9)]
    together = sample(logits, *zip(*settings, strict=True))
    for i, one in enumerate(settings):
        token, logprob = sample(logits[i : i + 1], *[[value] for value in one])
        assert together[0][i] == token[0]
        assert together[1][i] == pytest.approx(logprob[0], abs=1e-6)


def test_an_impossible_token_is_never_taken() -> None:
    logits = row(float("-inf"), 0.0, float("-inf"), 0.0, float("-inf"))
    tokens, _ = sample(logits.expand(4, -1), [1.0] * 4, [1.0] * 4, [0.0, 0.4999, 0.5, 1 - 2**-53])
    assert tokens == [1, 1, 3, 3]


def test_broken_logits_show_as_a_broken_logprob_in_their_row_only() -> None:
    logits = torch.tensor([[0.0, float("nan")], [0.0, 0.0]])
    _, logprobs = sample(logits, [1.0, 1.0], [1.0, 1.0], [0.5, 0.5])
    assert math.isnan(logprobs[0])
    assert logprobs[1] == pytest.approx(math.log(0.5))


@pytest.mark.parametrize("vocabulary", [7, 1024, 5000])
def test_finding_the_block_first_finds_the_same_token(vocabulary: int) -> None:
    """With tokens that have no share, and the numbers at both ends."""
    generator = torch.Generator().manual_seed(vocabulary)
    probs = torch.randn(64, vocabulary, generator=generator).mul(3).softmax(-1)
    probs[::2, torch.randperm(vocabulary, generator=generator)[: vocabulary // 2]] = 0.0
    uniforms = torch.rand(64, dtype=torch.float64, generator=generator)
    uniforms[:2], uniforms[2:4] = 0.0, 1 - 2.0**-53
    got = invert_in_blocks(probs, uniforms)
    assert torch.equal(got, invert(probs, uniforms)) and got.shape == (64, 1)
    assert bool((probs.gather(1, got) > 0).all())


def test_drawing_with_tensors_alone_is_sampling() -> None:
    """Greedy rows, other temperatures and a row that broke down; to rounding, so odds of a false alarm about 1e-4."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(9, 3000, generator=generator) * 4
    logits[8, 17] = math.nan
    temperatures, uniforms = [1.0, 0.7, 0.0, 2.0, 1.0, 0.0, 0.3, 1.0, 1.0], torch.rand(9, dtype=torch.float64, generator=generator)
    tokens, logprobs = draw(logits, torch.tensor(temperatures, dtype=torch.float64), uniforms)
    want, nats = sample(logits, temperatures, [1.0] * 9, uniforms.tolist())
    assert tokens[:8].tolist() == want[:8] and logprobs[:8].tolist() == pytest.approx(nats[:8], abs=1e-5)
    assert math.isnan(logprobs[8]) and 0 <= tokens[8] < 3000
