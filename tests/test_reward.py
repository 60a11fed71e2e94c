"""The reward model: what it learns, what it stores, what it leaves alone."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import kstest

from engine.features import COUNTS
from engine.model import CausalModel
from engine.tokenizer import ChatTokenizer
from learner.config import RewardConfig
from learner.data import Fold, RankedExample, Split, split_folds
from learner.heads import HeldOut, learning_curve, linear_probe
from learner.metrics import pair_accuracy
from learner.reward import (
    Fit,
    Known,
    RewardDiverged,
    RewardModel,
    base_features,
    comparisons_loss,
    cross_validate,
    features_of,
    fit_members,
)

QUIET = lambda fraction, message: None  # noqa: E731
SMALL = RewardConfig(members=2, folds=3, epochs=1, lora_r=4, lora_alpha=8, batch=4)


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> CausalModel:
    return CausalModel.load(tiny_llama)


def replies(count: int, seed: int, k: int = 3, end: int = 1) -> list[tuple[tuple[int, ...], list[tuple[int, ...]]]]:
    """Random prompts with k random replies each."""
    rng = random.Random(seed)
    draw = lambda least, most: tuple(rng.randrange(5, 400) for _ in range(rng.randrange(least, most)))  # noqa: E731
    return [(draw(4, 9), [(*draw(3, 20), end) for _ in range(k)]) for _ in range(count)]


def example(prompt: tuple, completions: list, groups: list, n: int, ties: bool = False) -> RankedExample:
    ranked = tuple(tuple(g) for g in groups)
    return RankedExample(prompt, tuple(completions), ranked, "ann", f"p{n}", f"c{n}", str(n), str(n), n, ties)


def shortest_wins(count: int, seed: int) -> list[RankedExample]:
    out = []
    for n, (prompt, completions) in enumerate(replies(count, seed)):
        best = min(range(len(completions)), key=lambda i: len(completions[i]))
        out.append(example(prompt, completions, [[best], [i for i in range(3) if i != best]], n))
    return out


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
        counts = [math.log(1 + len(c)), math.log(1 + len(c)) ** 2, math.log(1 + ends), math.log(1 + ends) ** 2]
        features = torch.cat([hidden[-1], own.mean(0), own.sum(0) / 64, torch.tensor(counts)])
        expected = float(reward.members[0].head(features).detach())
        assert float(together[i, 0]) == pytest.approx(expected, abs=1e-4)


def test_long_prompts_lose_their_oldest_tokens_and_never_the_reply(model: CausalModel) -> None:
    reward = RewardModel.create(model, RewardConfig(members=1, max_tokens=12), 1)
    rows = reward.rows([(range(100, 120), [7, 8, 1]), ([5], [6] * 20), ([5], [6])])
    assert rows.ids[0].tolist() == [*range(111, 120), 7, 8, 1]
    assert rows.reply.sum(1).tolist() == [3, 12, 1] and rows.valid.sum(1).tolist() == [12, 12, 2]


def test_the_probe_is_the_optimum_that_scipy_finds() -> None:
    rng = np.random.default_rng(0)
    features = [torch.tensor(rng.normal(size=(3, 4)), dtype=torch.float32) for _ in range(12)]
    examples = [example((5,), [(6,), (7,), (8,)], [[int(rng.integers(3))]], n) for n in range(12)]
    examples = [
        example((5,), [(6,), (7,), (8,)], [[e.groups[0][0]], [i for i in range(3) if i != e.groups[0][0]]], n)
        for n, e in enumerate(examples)
    ]
    weights, ridge = torch.tensor(rng.uniform(0.5, 1.5, 12), dtype=torch.float32), 0.3
    flat = np.concatenate([f.numpy() for f in features]).astype(float)
    mean, scale = flat.mean(0), flat.std(0, ddof=1) * 2.0  # sqrt(D) = 2

    def objective(w: np.ndarray) -> float:
        total = ridge / 2 * w @ w
        for own, e, weight in zip(features, examples, weights.tolist(), strict=True):
            scores = (own.numpy() - mean) / scale @ w
            winner = e.groups[0][0]
            total += weight * np.mean([np.log1p(np.exp(scores[loser] - scores[winner])) for loser in e.groups[1]])
        return float(total)

    best = minimize(objective, np.zeros(4), method="BFGS", options={"gtol": 1e-9}).x
    head, bias, _ = linear_probe(examples, features, weights, ridge)
    assert head.numpy() == pytest.approx(best / scale, abs=1e-4)
    scores = torch.cat(features) @ head + bias
    assert float(scores.mean()) == pytest.approx(0.0, abs=1e-5)


def test_counts_are_cheaper_and_bend_only_where_a_line_does_not_do(model: CausalModel) -> None:
    """The optimum that scipy finds where x^2 has lost what a line through x explains, and both count eight times their deviation."""
    rng = np.random.default_rng(3)
    x = rng.uniform(1, 4, size=(30, 3))
    flat = np.stack([rng.normal(size=(30, 3)), x, x**2], 2)
    best = [int(np.argmin(abs(row - 2.5))) for row in x]  # the one in the middle is liked
    examples = [example((5,), [(6,), (7,), (8,)], [[b], [i for i in range(3) if i != b]], n) for n, b in enumerate(best)]
    rows = flat.reshape(-1, 3)
    line = np.polyfit(rows[:, 1], rows[:, 2], 1)
    parts = np.stack([rows[:, 0], rows[:, 1], rows[:, 2] - np.polyval(line, rows[:, 1])], 1)
    z = ((parts - parts.mean(0)) / parts.std(0, ddof=1) * [1, 8, 8] / np.sqrt(3)).reshape(30, 3, 3)

    def objective(w: np.ndarray) -> float:
        return float(0.3 / 2 * w @ w + sum(np.mean([np.log1p(np.exp((own[i] - own[b]) @ w)) for i in range(3) if i != b]) for own, b in zip(z, best, strict=True)))

    expected = z @ minimize(objective, np.zeros(3), method="BFGS", options={"gtol": 1e-9}).x
    head, bias, _ = linear_probe(examples, [torch.tensor(own, dtype=torch.float32) for own in flat], torch.ones(30), 0.3, counts=2)
    found = torch.tensor(flat, dtype=torch.float32) @ head + bias
    assert found.numpy() == pytest.approx(expected, abs=2e-3)
    assert np.mean(found.argmax(1).numpy() == best) > 0.9


def test_a_wanted_number_of_sentences_is_learned_from_few_votes(model: CausalModel, tiny_llama: Path) -> None:
    """Three sentences are best, two and four worse, whatever their length: no line through any count tells them apart."""
    tokenizer, rng = ChatTokenizer.load(tiny_llama), random.Random(5)
    stop = tokenizer.encode("a.")[-1:]

    def reply(sentences: int) -> tuple[int, ...]:
        return (*(i for _ in range(sentences) for i in (*(rng.randrange(5, 400) for _ in range(rng.randrange(1, 6))), *stop)), 1)

    def votes(count: int, first: int) -> list[RankedExample]:
        found = []
        for n in range(first, first + count):
            kinds = rng.sample([2, 3, 4], 3)
            shown, best = [reply(k) for k in kinds], kinds.index(3)
            found.append(example((rng.randrange(5, 400),), shown, [[best], [i for i in range(3) if i != best]], n))
        return found

    assert model.sentence_ends[list(stop)].all()
    train, test = votes(40, 0), votes(40, 100)
    reward = fit_members(model, train, SMALL, 0, 0.1, 0, lambda *_: None)
    right = [int(s.mean(1).argmax()) == e.groups[0][0] for s, e in zip(reward.score_examples(test), test, strict=True)]
    assert sum(right) > 30


def test_the_probe_recovers_a_planted_bradley_terry_scale() -> None:
    """Picks drawn from known scores, whose scale the fit must find: within 15%, 3 standard errors at 3000 votes."""
    rng = np.random.default_rng(1)
    truth = np.array([1.2, -0.7, 0.4])
    features, examples = [], []
    for n in range(3000):
        x = rng.normal(size=(2, 3))
        first = rng.random() < 1 / (1 + math.exp(-(x[0] - x[1]) @ truth))
        features.append(torch.tensor(x, dtype=torch.float32))
        examples.append(example((5,), [(6,), (7,)], [[0], [1]] if first else [[1], [0]], n))
    head, _, _ = linear_probe(examples, features, torch.ones(3000), 1e-3)
    assert head.numpy() == pytest.approx(truth, rel=0.15)


def test_ties_pull_scores_together() -> None:
    features = [torch.tensor([[1.0, 0.3], [0.0, -0.2]]), torch.tensor([[2.0, 0.1], [0.5, 0.4]])]
    strict = [example((5,), [(6,), (7,)], [[0], [1]], n) for n in range(2)]
    mixed = [strict[0], example((5,), [(6,), (7,)], [[0, 1]], 1, ties=True)]
    apart, _, _ = linear_probe(strict, features, torch.ones(2), 0.1)
    closer, _, _ = linear_probe(mixed, features, torch.ones(2), 0.1)
    assert float((features[1] @ closer).diff()) > float((features[1] @ apart).diff())  # 0 - 1, negative: nearer to 0


def luce_with_none(count: int, seed: int, level: float) -> tuple[list[RankedExample], list[torch.Tensor], np.ndarray, np.ndarray]:
    """Choices among three replies and "none of them" by Luce: examples, features, and (features, choice) for an oracle."""
    rng = np.random.default_rng(seed)
    truth, rows, picks = np.array([1.0, -0.6, 0.4]), rng.normal(size=(count, 3, 3)), []
    rows -= rows.mean((0, 1))  # scores are about the mean reply's, and so is the level
    for x in rows:
        picks.append(int((np.append(x @ truth, level) + rng.gumbel(size=4)).argmax()))
    blank = [example((5,), [(6,), (7,), (8,)], [], n) for n in range(count)]
    examples = [
        replace(e, refused=(0, 1, 2)) if c == 3 else replace(e, groups=((c,), tuple(i for i in range(3) if i != c)), accepted=(c,))
        for e, c in zip(blank, picks, strict=True)
    ]
    return examples, [torch.tensor(x, dtype=torch.float32) for x in rows], rows, np.array(picks)


def test_the_probe_with_an_outside_option_is_the_optimum_that_scipy_finds() -> None:
    examples, features, rows, picks = luce_with_none(30, 0, 0.5)
    assert 5 < sum(bool(e.refused) for e in examples) < 25
    scale = rows.reshape(-1, 3).std(0, ddof=1) * math.sqrt(3)

    def objective(p: np.ndarray) -> float:
        total = 0.2 / 2 * p[:3] @ p[:3]
        for x, c in zip(rows, picks, strict=True):
            s = x / scale @ p[:3]
            if c == 3:
                total += np.log1p(np.exp(s - p[3])).mean()
            else:
                total += np.mean([np.log1p(np.exp(s[j] - s[c])) for j in range(3) if j != c]) + np.log1p(np.exp(p[3] - s[c])) / 3
        return float(total)

    best = minimize(objective, np.zeros(4), method="BFGS", options={"gtol": 1e-9}).x
    probe = linear_probe(examples, features, torch.ones(30), 0.2)
    assert probe.weight.numpy() == pytest.approx(best[:3] / scale, abs=1e-4)
    assert float(probe.level) == pytest.approx(best[3], abs=1e-4)


@pytest.mark.parametrize("level", [0.0, 1.5])
def test_the_level_of_simulated_voters_is_found(level: float) -> None:
    """3000 choices: within 0.2, and as near as scipy's maximum likelihood of the whole choice (multinomial logit) comes."""
    examples, features, rows, picks = luce_with_none(3000, 1, level)

    def nll(p: np.ndarray) -> float:
        utility = np.concatenate([rows @ p[:3], np.full((len(rows), 1), p[3])], axis=1)
        return float((np.log(np.exp(utility).sum(1)) - utility[np.arange(len(rows)), picks]).mean())

    oracle = minimize(nll, np.zeros(4), method="BFGS").x
    probe = linear_probe(examples, features, torch.ones(3000), 1e-3)
    found = [*probe.weight.tolist(), float(probe.level)]
    assert found == pytest.approx([1.0, -0.6, 0.4, level], abs=0.2)
    assert found == pytest.approx(oracle, abs=0.12)  # pairs waste a little of what the choice says


def test_none_good_votes_make_better_scores() -> None:
    """40 choices of which about half are refusals, 12 draws: more pairs right than without them, by 2 standard errors."""
    gains = []
    for seed in range(12):
        examples, features, _, _ = luce_with_none(40, 100 + seed, 1.5)
        kept = [i for i, e in enumerate(examples) if not e.refused]
        fresh = np.random.default_rng(seed).normal(size=(4000, 3))
        right = []
        for rows in (range(40), kept):
            head = linear_probe([examples[i] for i in rows], [features[i] for i in rows], torch.ones(len(rows)), 0.3).weight.numpy()
            right.append(np.mean((fresh @ head > 0) == (fresh @ [1.0, -0.6, 0.4] > 0)))
        gains.append(right[0] - right[1])
    assert np.mean(gains) > 2 * np.std(gains, ddof=1) / math.sqrt(12)


def test_without_refusals_the_outside_option_is_not_there() -> None:
    examples, features, _, _ = luce_with_none(40, 2, 0.0)
    kept = [(e, x) for e, x in zip(examples, features, strict=True) if not e.refused]
    picks, own = [e for e, _ in kept], [x for _, x in kept]
    silent = [replace(e, accepted=()) for e in picks]
    one, two = (linear_probe(rows, own, torch.ones(len(rows)), 0.1) for rows in (picks, silent))
    assert torch.equal(one.weight, two.weight) and float(one.level) == 0.0
    refusals = [replace(e, accepted=()) for e in examples]  # nor with refusals alone, which have no finite level
    only = linear_probe(refusals, features, torch.ones(40), 0.1)
    assert float(only.level) == 0.0


def test_an_edit_wins_in_the_loss_and_in_the_probe() -> None:
    edited = replace(example((5,), [(6,), (7,), (8,)], [[0], [1]], 0), edit_beats=(0,))
    scores = torch.tensor([1.0, 0.0, 3.0])
    expected = (math.log1p(math.exp(-1.0)) + math.log1p(math.exp(-2.0))) / 2  # reply 0 over 1, the edit over 0
    assert float(comparisons_loss(scores, [edited], None, torch.ones(1))) == pytest.approx(expected)
    refused = replace(example((5,), [(6,), (7,)], [], 1), edit_beats=(0,), refused=(0,))
    whole = comparisons_loss(torch.tensor([1.0, 0.0, 3.0, 0.5, 2.0]), [edited, refused], None, torch.ones(2), torch.tensor(0.2))
    other = math.log1p(math.exp(-1.5)) + math.log1p(math.exp(0.3))  # the edit over the reply, and none over it
    assert float(whole) == pytest.approx((expected + other) / 2)
    features = [torch.tensor([[0.0, 0.0], [0.0, 1.0], [2.0, 0.0]])]
    head, _, _ = linear_probe([edited], features, torch.ones(1), 0.1)
    assert head[0] > 0 > head[1]


def test_members_weigh_votes_by_the_bayesian_bootstrap(model: CausalModel) -> None:
    """Independent exponentials scaled to mean 1, which is Dirichlet(1, ..., 1) times n (Rubin 1981); times the voter's weight."""
    examples = [replace(example((5,), [(6,), (7,)], [[n % 2], [1 - n % 2]], n), weight=0.5 + n % 2) for n in range(400)]
    features = [torch.tensor([[0.3, 1.0], [0.1, 2.0]])] * 400
    reward = RewardModel.create(model, SMALL, 1)
    reward.members[0].start = lambda *_: None  # the features are made up
    drawn = Fit(reward, 0, examples, features, 0.1, 3).weights / torch.tensor([e.weight for e in examples])
    assert float(drawn.mean()) == pytest.approx(1.0, abs=1e-5)
    assert kstest(drawn.numpy(), "expon").pvalue > 0.001


def test_members_learn_the_level_with_their_adapter(model: CausalModel) -> None:
    examples = repeating_wins(16, 12)
    examples += [replace(e, groups=(), refused=(0, 1, 2), prompt_key=f"q{n}") for n, e in enumerate(repeating_wins(8, 13))]
    examples = [replace(e, accepted=e.groups[0]) if e.groups else e for e in examples]
    heads, trained = (fit_members(model, examples, SMALL, epochs, 0.1, 0, QUIET) for epochs in (0, 1))
    before, after = (r.members[0].level.item() for r in (heads, trained))
    assert before != 0.0 and after != before
    trained.delete()


def test_voters_who_vote_at_random_weigh_less_in_what_is_fitted(model: CausalModel) -> None:
    rng = random.Random(5)
    examples = [replace(e, voter=f"v{n % 4}") for n, e in enumerate(repeating_wins(80, 14))]
    for n, e in enumerate(examples):
        if e.voter == "v3":
            best = rng.randrange(3)
            examples[n] = replace(e, groups=((best,), tuple(i for i in range(3) if i != best)))
    checked = cross_validate(model, examples, split_folds(examples, 3, 0), replace(SMALL, epochs=0), 0, QUIET)
    assert checked.voters["v3"].weight < 0.8 * min(checked.voters[v].weight for v in ("v0", "v1", "v2"))
    assert [e.weight for e in checked.examples] == [checked.voters[e.voter].weight for e in examples]
    alone = cross_validate(model, [replace(e, voter="v") for e in examples], split_folds(examples, 3, 0), replace(SMALL, epochs=0), 0, QUIET)
    assert {e.weight for e in alone.examples} == {1.0}


def test_a_comparison_weighs_the_same_however_many_replies_it_has() -> None:
    scores = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0])
    two, three = example((5,), [(6,), (7,)], [[0], [1]], 0), example((5,), [(6,), (7,), (8,)], [[0], [1, 2]], 1)
    both = comparisons_loss(scores, [two, three], None, torch.ones(2))
    assert float(both) == pytest.approx(math.log(2))  # a mean of means, each log 2; not 3 pairs against 1
    doubled = comparisons_loss(torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0]), [two, three], None, torch.tensor([2.0, 0.0]))
    assert float(doubled) == pytest.approx(math.log1p(math.exp(-1.0)))


def repeating_wins(count: int, seed: int) -> list[RankedExample]:
    """The best of three replies says one word over and over; which place it has is random."""
    rng, out = random.Random(seed), []
    for n, (prompt, completions) in enumerate(replies(count, seed)):
        best = rng.randrange(3)
        completions[best] = (*completions[best][:2], *[7] * 6, 1)
        out.append(example(prompt, completions, [[best], [i for i in range(3) if i != best]], n))
    return out


def test_it_learns_a_taste_and_only_members_change(model: CausalModel) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    examples = repeating_wins(40, 2)
    config = RewardConfig(members=2, epochs=1, ridge=0.01, lora_r=4, lora_alpha=8)
    reward = fit_members(model, examples, config, 1, 0.01, 0, QUIET)
    fresh = repeating_wins(60, 3)
    means = [scores.mean(1).tolist() for scores in reward.score_examples(fresh)]
    accuracy = np.mean([pair_accuracy(s, e.groups) for s, e in zip(means, fresh, strict=True)])
    assert accuracy > 0.8  # random weights, 40 votes; chance is 0.5 with standard error 0.05
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    one, two = (reward.score_examples(fresh, [i])[0] for i in range(2))
    assert not torch.equal(one, two)


def test_saved_and_loaded_it_gives_the_same_scores(model: CausalModel, tmp_path: Path) -> None:
    examples = shortest_wins(12, 4)
    reward = fit_members(model, examples, SMALL, 1, 0.01, 5, QUIET)
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
    reward = fit_members(model, examples, SMALL, 0, 0.01, 5, QUIET)
    assert [m.adapter for m in reward.members] == [None, None]
    reward.save(tmp_path / "heads")
    assert sorted(path.name for path in (tmp_path / "heads").iterdir()) == ["heads.safetensors", "reward.json"]
    again = RewardModel.load(model, SMALL, tmp_path / "heads")
    for a, b in zip(reward.score_examples(examples), again.score_examples(examples), strict=True):
        assert torch.equal(a, b)


def test_the_same_seed_gives_the_same_members(model: CausalModel) -> None:
    examples = shortest_wins(12, 6)
    first = torch.cat(fit_members(model, examples, SMALL, 1, 0.01, 7, QUIET).score_examples(examples))
    second = torch.cat(fit_members(model, examples, SMALL, 1, 0.01, 7, QUIET).score_examples(examples))
    other = torch.cat(fit_members(model, examples, SMALL, 1, 0.01, 8, QUIET).score_examples(examples))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_every_vote_is_scored_by_a_member_that_never_saw_it(model: CausalModel) -> None:
    """Labels that cannot be learned but could be remembered: held-out accuracy must stay at chance."""
    rng = random.Random(0)
    examples = []
    for n, (prompt, completions) in enumerate(replies(60, 8, k=2)):
        examples.append(example(prompt, completions, [[0], [1]] if rng.random() < 0.5 else [[1], [0]], n))
    split = split_folds(examples, 3, 0)
    checked = cross_validate(model, examples, split, RewardConfig(epochs=1, ridge=1e-3, lora_r=4), 0, QUIET)
    assert sorted(checked.scores) == list(range(60))
    held_out = np.mean([pair_accuracy(checked.scores[i], examples[i].groups) for i in range(60)])
    assert 0.27 < held_out < 0.73  # 0.5 +- 3.5 standard errors
    leaky = Split((Fold(tuple(range(60)), tuple(range(60))),), "prompt", "")
    seen = cross_validate(model, examples, leaky, RewardConfig(epochs=0, ridge=1e-3, lora_r=4), 0, QUIET)
    assert np.mean([pair_accuracy(seen.scores[i], examples[i].groups) for i in range(60)]) > 0.9  # what a leak looks like


def test_passes_are_used_only_as_far_as_they_lower_the_held_out_loss(model: CausalModel) -> None:
    examples = shortest_wins(24, 9)
    config = RewardConfig(epochs=2, lr=0.5, head_lr=0.5, lora_r=4)  # steps so wild that they only do harm
    checked = cross_validate(model, examples, split_folds(examples, 3, 0), config, 0, QUIET)
    assert checked.epochs == 0 and checked.curve[0] == min(checked.curve)
    assert [m.adapter for m in checked.judges.members] == [None] * 3 and "judge0" not in model.lora.names()
    features = base_features(checked.judges, examples)
    fold = split_folds(examples, 3, 0).folds[0]
    expected = checked.judges.members[0].of_features(features[fold.test[0]]).detach()
    scored = checked.judges.score_examples([examples[fold.test[0]]], [0])[0][:, 0]
    assert scored.tolist() == pytest.approx(expected.tolist(), abs=1e-4)  # the judges went back to where they were best


def test_clear_tastes_get_a_small_penalty_and_noise_a_large_one(model: CausalModel) -> None:
    rng, clear = random.Random(1), repeating_wins(30, 11)
    features = base_features(RewardModel.create(model, SMALL, 1), clear)
    noise = [replace(e, groups=((best := rng.randrange(3),), tuple(i for i in range(3) if i != best))) for e in clear]
    split = split_folds(clear, 3, 0)
    assert HeldOut(clear, features, split, COUNTS).choose_ridge(clear, 0.01) < HeldOut(noise, features, split, COUNTS).choose_ridge(noise, 0.01)


def test_numbers_that_are_not_finite_end_the_fit(model: CausalModel) -> None:
    examples = shortest_wins(12, 10)
    config = RewardConfig(epochs=2, lr=1e30, head_lr=1e30, lora_r=4)
    with pytest.raises(RewardDiverged):
        fit_members(model, examples, config, 2, 0.01, 0, QUIET)


def test_votes_that_the_base_makes_no_number_of_end_the_round_by_name(model: CausalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("learner.reward.read", lambda *_: torch.full((3, 4), math.nan))
    with pytest.raises(RewardDiverged, match="not a finite number"):
        base_features(RewardModel.create(model, SMALL, 1), shortest_wins(1, seed=3))


def test_a_vote_is_read_once_and_its_features_hang_on_no_other(model: CausalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    examples, reward = shortest_wins(6, seed=3), RewardModel.create(model, SMALL, 1)
    known: Known = {}
    first = base_features(reward, examples[:4], known)
    reads = list[int]()
    rows_of = RewardModel.rows_of
    monkeypatch.setattr(RewardModel, "rows_of", lambda self, some: (reads.append(len(some)), rows_of(self, some))[1])
    second = base_features(reward, examples[2:], known)
    assert reads == [1, 1] and len(known) == 4  # two are new, two are gone
    assert all(torch.equal(a, b) for a, b in zip(first[2:] + second[2:], base_features(reward, examples[2:]), strict=True))
    for example, own in zip(examples[2:], second, strict=True):
        batch = reward.rows([(example.prompt_ids, c) for c in example.completions_ids])
        with torch.no_grad():
            assert torch.allclose(own, features_of(model, batch, None), atol=1e-4)


def test_the_learning_curve_rises_with_votes_and_ends_at_the_heads_own_accuracy(model: CausalModel) -> None:
    examples = shortest_wins(48, seed=5)
    split = split_folds(examples, 3, 0)
    features = base_features(RewardModel.create(model, SMALL, 1), examples)
    curve = learning_curve(examples, features, split, 0.01, seed=0)
    assert [point["votes"] for point in curve] == [8, 16, 24, 32]
    heads = HeldOut(examples, features, split, COUNTS).scores(examples, 0.01)
    right = [pair_accuracy(scores, examples[i].groups) for i, scores in heads.items()]
    assert curve[-1]["accuracy"] == pytest.approx(sum(right) / len(right), abs=1e-4)
    assert curve[-1]["accuracy"] >= curve[0]["accuracy"] and curve[-1]["accuracy"] > 0.8
