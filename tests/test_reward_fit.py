"""Fitting the reward model: what it learns, what each vote weighs, and that it is tested on votes it has not seen."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from engine.features import COUNTS
from engine.model import CausalModel
from engine.tokenizer import ChatTokenizer
from learner.config import RewardConfig
from learner.data import Fold, RankedExample, Split, split_folds
from learner.heads import linear_probe
from learner.metrics import pair_accuracy
from learner.reward import RewardDiverged, RewardModel, features_of
from learner.reward_fit import (
    Fit,
    Known,
    base_features,
    comparisons_loss,
    cross_validate,
    fit_members,
    weighed_alone,
)
from tests.ranked import SMALL, example, quiet, repeating_wins, replies, shortest_wins


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> CausalModel:
    return CausalModel.load(tiny_llama)


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
    features = [torch.randn(2, 2 + COUNTS, generator=torch.Generator().manual_seed(0))] * 400
    reward = RewardModel.create(model, SMALL, 1)
    reward.members[0].start = lambda *_: None  # the features are made up
    drawn = Fit(reward, 0, examples, features, 0.1, 3).weights / torch.tensor([e.weight for e in examples])
    assert float(drawn.mean()) == pytest.approx(1.0, abs=1e-5)
    assert kstest(drawn.numpy(), "expon").pvalue > 0.001


def test_members_learn_the_level_with_their_adapter(model: CausalModel) -> None:
    examples = repeating_wins(16, 12)
    examples += [replace(e, groups=(), refused=(0, 1, 2), prompt_key=f"q{n}") for n, e in enumerate(repeating_wins(8, 13))]
    examples = [replace(e, accepted=e.groups[0]) if e.groups else e for e in examples]
    heads, trained = (fit_members(model, examples, SMALL, epochs, 0.1, 0, quiet) for epochs in (0, 1))
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
    checked = cross_validate(model, examples, split_folds(examples, 3, 0), replace(SMALL, epochs=0), 0, quiet)
    assert checked.voters["v3"].weight < 0.8 * min(checked.voters[v].weight for v in ("v0", "v1", "v2"))
    assert [e.weight for e in checked.examples] == [checked.voters[e.voter].weight for e in examples]
    split = split_folds(examples, 3, 0)
    for fold, learned in zip(split.folds, checked.learned, strict=True):  # by its own votes alone, and not by those it is tested on
        votes = [examples[j] for j in fold.train]
        own = weighed_alone(votes, [checked.features[j] for j in fold.train], SMALL.folds, checked.ridge, 0)
        assert learned == {j: e.weight for j, e in zip(fold.train, own, strict=True)}
        assert learned != {j: checked.examples[j].weight for j in fold.train}
    alone = cross_validate(model, [replace(e, voter="v") for e in examples], split_folds(examples, 3, 0), replace(SMALL, epochs=0), 0, quiet)
    assert {e.weight for e in alone.examples} == {1.0}


def test_a_comparison_weighs_the_same_however_many_replies_it_has() -> None:
    scores = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0])
    two, three = example((5,), [(6,), (7,)], [[0], [1]], 0), example((5,), [(6,), (7,), (8,)], [[0], [1, 2]], 1)
    both = comparisons_loss(scores, [two, three], None, torch.ones(2))
    assert float(both) == pytest.approx(math.log(2))  # a mean of means, each log 2; not 3 pairs against 1
    doubled = comparisons_loss(torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0]), [two, three], None, torch.tensor([2.0, 0.0]))
    assert float(doubled) == pytest.approx(math.log1p(math.exp(-1.0)))


def test_it_learns_a_taste_and_only_members_change(model: CausalModel) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    examples = repeating_wins(40, 2)
    config = RewardConfig(members=2, epochs=1, ridge=0.01, lora_r=4, lora_alpha=8)
    reward = fit_members(model, examples, config, 1, 0.01, 0, quiet)
    fresh = repeating_wins(60, 3)
    means = [scores.mean(1).tolist() for scores in reward.score_examples(fresh)]
    accuracy = np.mean([pair_accuracy(s, e.groups) for s, e in zip(means, fresh, strict=True)])
    assert accuracy > 0.8  # random weights, 40 votes; chance is 0.5 with standard error 0.05
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    one, two = (reward.score_examples(fresh, [i])[0] for i in range(2))
    assert not torch.equal(one, two)


def test_the_same_seed_gives_the_same_members(model: CausalModel) -> None:
    examples = shortest_wins(12, 6)
    first = torch.cat(fit_members(model, examples, SMALL, 1, 0.01, 7, quiet).score_examples(examples))
    second = torch.cat(fit_members(model, examples, SMALL, 1, 0.01, 7, quiet).score_examples(examples))
    other = torch.cat(fit_members(model, examples, SMALL, 1, 0.01, 8, quiet).score_examples(examples))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_every_vote_is_scored_by_a_member_that_never_saw_it(model: CausalModel) -> None:
    """Labels that cannot be learned but could be remembered: held-out accuracy must stay at chance."""
    rng = random.Random(0)
    examples = []
    for n, (prompt, completions) in enumerate(replies(60, 8, k=2)):
        examples.append(example(prompt, completions, [[0], [1]] if rng.random() < 0.5 else [[1], [0]], n))
    split = split_folds(examples, 3, 0)
    checked = cross_validate(model, examples, split, RewardConfig(epochs=1, ridge=1e-3, lora_r=4), 0, quiet)
    assert sorted(checked.scores) == list(range(60))
    held_out = np.mean([pair_accuracy(checked.scores[i], examples[i].groups) for i in range(60)])
    assert 0.27 < held_out < 0.73  # 0.5 +- 3.5 standard errors
    leaky = Split((Fold(tuple(range(60)), tuple(range(60))),), "prompt", "")
    seen = cross_validate(model, examples, leaky, RewardConfig(epochs=0, ridge=1e-3, lora_r=4), 0, quiet)
    assert np.mean([pair_accuracy(seen.scores[i], examples[i].groups) for i in range(60)]) > 0.9  # what a leak looks like


def test_passes_are_used_only_as_far_as_they_lower_the_held_out_loss(model: CausalModel) -> None:
    examples = shortest_wins(24, 9)
    config = RewardConfig(epochs=2, lr=0.5, head_lr=0.5, lora_r=4)  # steps so wild that they only do harm
    checked = cross_validate(model, examples, split_folds(examples, 3, 0), config, 0, quiet)
    assert checked.epochs == 0 and checked.curve[0] == min(checked.curve)
    assert [m.adapter for m in checked.judges.members] == [None] * 3 and "judge0" not in model.lora.names()
    features = base_features(checked.judges, examples)
    fold = split_folds(examples, 3, 0).folds[0]
    expected = checked.judges.members[0].of_features(features[fold.test[0]]).detach()
    scored = checked.judges.score_examples([examples[fold.test[0]]], [0])[0][:, 0]
    assert scored.tolist() == pytest.approx(expected.tolist(), abs=1e-4)  # the judges went back to where they were best


def test_a_pass_is_used_where_it_saves_as_many_nats_as_it_is_worth(model: CausalModel) -> None:
    examples = shortest_wins(24, 9)
    split = split_folds(examples, 3, 0)
    config = RewardConfig(epochs=1, lr=5e-3, head_lr=1e-2, lora_r=4, ridge=30.0, worth=0.0)  # heads held so tight that they say little
    paid = cross_validate(model, examples, split, config, 0, quiet)
    saved = paid.curve[0] - paid.curve[1]
    assert paid.epochs == 1 and saved > 0
    paid.judges.delete()
    dear = cross_validate(model, examples, split, replace(config, worth=saved * 1.01), 0, quiet)
    assert dear.epochs == 0 and dear.curve[0] == paid.curve[0]
    fair = cross_validate(model, examples, split, replace(config, worth=saved * 0.5), 0, quiet)
    assert fair.epochs == 1 and fair.curve == paid.curve


def test_numbers_that_are_not_finite_end_the_fit(model: CausalModel) -> None:
    examples = shortest_wins(12, 10)
    config = RewardConfig(epochs=2, lr=1e30, head_lr=1e30, lora_r=4)
    with pytest.raises(RewardDiverged):
        fit_members(model, examples, config, 2, 0.01, 0, quiet)


def test_votes_that_the_base_makes_no_number_of_end_the_round_by_name(model: CausalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("learner.reward_fit.read", lambda *_: torch.full((3, 4), math.nan))
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
    for vote, own in zip(examples[2:], second, strict=True):
        batch = reward.rows([(vote.prompt_ids, c) for c in vote.completions_ids])
        with torch.no_grad():
            assert torch.allclose(own, features_of(model, batch, None), atol=1e-4)
