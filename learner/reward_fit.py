"""How a reward model is fitted to votes, and tested on votes it has not seen.

Members (`learner/reward.py`) learn from votes by Bradley-Terry over all strict pairs of a comparison, a person's own better reply included
(Ouyang et al. 2022, Eq. 1), ties by half a win each way or Davidson (1970), "none is good" by an outside option (Luce
1959), each vote weighted by its voter's reliability (`learner/reliability.py`); they differ in their initial weights, order of data and in
Bayesian-bootstrap weights of the votes (Rubin 1981). Before any of it is believed, `cross_validate` scores every vote with members that
did not see its prompt, nor its voter where voters can be kept apart (`learner/data.py`), and whose votes were weighed without it.

Does not judge the figures (`learner/metrics.py`) or split the votes (`learner/data.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.features import COUNTS
from engine.model import CausalModel
from learner.batching import chunks, pass_tokens
from learner.config import RewardConfig
from learner.data import RankedExample, Split, split_folds
from learner.heads import HeldOut, knows_level, linear_probe, ridges
from learner.losses import outside_option, preference_loss
from learner.packing import LONG, worth_packing
from learner.reliability import Voter, weigh_voters, weighted
from learner.reward import RewardDiverged, RewardModel, read

Progress = Callable[[float, str], None]
Known = dict[tuple[tuple[int, ...], tuple[tuple[int, ...], ...]], Tensor]  # prompt and completions: their features on the base


class Fit:
    """The fitting of one member: its head on the frozen base's features first, then, if asked to, head and adapter together.

    Starting from a fitted head (Kumar et al. 2022, LP-FT) is what makes a few dozen votes and seconds enough.
    """

    def __init__(
        self, reward: RewardModel, which: int, examples: Sequence[RankedExample], features: Sequence[Tensor], ridge: float, seed: int
    ) -> None:
        self.reward, self.member, self.examples, self.seed = reward, reward.members[which], list(examples), seed
        self.generator = torch.Generator().manual_seed(seed)
        weights = torch.empty(len(examples)).exponential_(generator=self.generator)  # Bayesian bootstrap
        self.weights = weights / weights.mean() * torch.tensor([e.weight for e in examples])
        self.member.start(*linear_probe(examples, features, self.weights, ridge, COUNTS))
        ties = sum(bool(e.tied) for e in examples) / max(1, sum(bool(e.tied or e.strict) for e in examples))
        self.log_nu = self.member.log_nu if ties else None  # without ties Davidson's model is Bradley-Terry's
        if ties:
            with torch.no_grad():  # the nu at which equal replies tie as often as votes do
                self.member.log_nu.fill_(math.log(2 * ties / max(1 - ties, 0.05)))
        self.level = self.member.level if knows_level(examples) else None

    def begin(self) -> None:
        """Give the member its adapter, which changes nothing yet, and both their optimiser."""
        config, lora = self.reward.config, self.reward.model.lora
        lora.create(self.member.name, r=config.lora_r, alpha=config.lora_alpha, seed=self.seed)
        self.member.adapter = self.member.name
        adapter = list(lora.parameters(self.member.name).values())
        self.parameters = [*adapter, *self.member.parameters()]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": adapter, "lr": config.lr, "weight_decay": config.weight_decay},
                {"params": list(self.member.parameters()), "lr": config.head_lr, "weight_decay": 0.0},
            ]
        )
        self.peak = [group["lr"] for group in self.optimizer.param_groups]

    def epoch(self, number: int) -> float:
        """Pass `number` (from 0) over the examples; its mean loss. Raises RewardDiverged."""
        if not number:
            self.begin()
        config, total = self.reward.config, 0.0
        batches = self._batches()
        for i, batch in enumerate(batches):
            done = (number + i / len(batches)) / config.epochs
            for group, peak in zip(self.optimizer.param_groups, self.peak, strict=True):
                group["lr"] = peak * max(0.1, 1 - done)
            self.optimizer.zero_grad()
            for part in self._parts(batch):
                loss = self._loss(part) * (len(part) / len(batch))
                if not math.isfinite(loss.item()):
                    raise RewardDiverged("the reward model's loss is not a finite number")
                loss.backward()
                total += loss.item() / len(batches)
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
        return total

    def _parts(self, batch: Sequence[int]) -> list[list[int]]:
        """The batch in passes of about as many tokens as PPO's: their gradients add up, and memory does not grow with the batch."""
        sizes, reward = list[int](), self.reward
        for prompt, replies in ((self.examples[i].prompt_ids, self.examples[i].completions_ids) for i in batch):
            packed = worth_packing([(prompt, replies)], reward.model, reward.limit)
            sizes.append(len(prompt) + sum(map(len, replies)) if packed else len(replies) * min(reward.limit, len(prompt) + max(map(len, replies))))
        return [[batch[k] for k in part] for part in chunks(sizes, LONG * pass_tokens(reward.model.device))]

    def _batches(self) -> list[list[int]]:
        """Random batches of at most `pass_examples` examples, like lengths together so that little is padding."""
        drawn = torch.randperm(len(self.examples), generator=self.generator).tolist()[: self.reward.config.pass_examples]
        noise = torch.rand(len(self.examples), generator=self.generator).tolist()
        size = [max(map(len, e.completions_ids)) + len(e.prompt_ids) for e in self.examples]
        order = sorted(drawn, key=lambda i: size[i] * (1 + 0.5 * noise[i]))
        batches = [order[i : i + self.reward.config.batch] for i in range(0, len(order), self.reward.config.batch)]
        return [batches[i] for i in torch.randperm(len(batches), generator=self.generator).tolist()]

    def _loss(self, batch: Sequence[int]) -> Tensor:
        examples = [self.examples[i] for i in batch]
        scores = self.member(self.reward.model, self.reward.rows_of(examples))
        return comparisons_loss(scores, examples, self.log_nu, self.weights[list(batch)], self.level)


@torch.no_grad()
def base_features(reward: RewardModel, examples: Sequence[RankedExample], known: Known | None = None) -> list[Tensor]:
    """(K, F) features of each example's completions on the bare base.

    One example a pass, so that they hang on no other: `known`, which is left with those of these examples, spares a later
    round most of the reading, and that round run again without it finds the same bits. Raises RewardDiverged.
    """
    before, found = known or {}, []
    for example in examples:
        pair = example.prompt_ids, example.completions_ids
        found.append(before[pair] if pair in before else read(reward.model, reward.rows_of([example]), None).cpu())
        if not bool(found[-1].isfinite().all()):
            raise RewardDiverged("what the base makes of a vote's replies is not a finite number")
    if known is not None:
        known.clear()
        known.update({(e.prompt_ids, e.completions_ids): own for e, own in zip(examples, found, strict=True)})
    return found


def comparisons_loss(
    scores: Tensor, examples: Sequence[RankedExample], log_nu: Tensor | None, weights: Tensor, level: Tensor | None = None
) -> Tensor:
    """Weighted mean over comparisons of the mean pair loss and the outside option's, nats.

    scores: (sum K,), in the examples' order. level: the outside option's score; None leaves it out.
    """
    own = scores.split([len(e.completions_ids) for e in examples])
    losses = [preference_loss(s, e.stated, e.tied, log_nu) for s, e in zip(own, examples, strict=True)]
    if level is not None:
        said = [outside_option(s[: e.shown], e.accepted, e.refused, level) for s, e in zip(own, examples, strict=True)]
        losses = [loss + other for loss, other in zip(losses, said, strict=True)]
    return (torch.stack(losses) * weights.to(scores.device)).mean()


@dataclass(frozen=True)
class CrossValidation:
    """Held-out scores of every vote that a fold tested.

    scores: {index of the example: (K,) scores}. curve: held-out loss (nats a comparison) after 0, 1, ... whole passes;
    epochs: how many paid. ridge: the penalty that was best for the heads. judges: the members that gave the scores, one
    a fold, as they were then. examples: as given, but weighted by how reliable their voters are, which `voters` says.
    learned: what each fold's member learned from, {index of the example: its weight there}. features: `base_features` of the examples.
    """

    scores: dict[int, list[float]]
    curve: list[float]
    epochs: int
    ridge: float
    judges: RewardModel
    examples: list[RankedExample]
    voters: dict[str, Voter]
    learned: list[dict[int, float]]
    features: list[Tensor]


def cross_validate(
    model: CausalModel, examples: Sequence[RankedExample], split: Split, config: RewardConfig, seed: int, progress: Progress,
    known: Known | None = None,
) -> CrossValidation:  # fmt: skip
    """Fit one member a fold, side by side, until the pooled held-out loss stops falling; scores at the best pass.

    The members stay as `judges`: each has left some prompts (and voters) unseen, none is what PPO optimises. Voters are
    weighed (`weigh`) before anything is fitted that stays, for each fold by its training votes alone: a voter who agrees with
    the votes that are tested would else count for more. known: see `base_features`.
    """
    reward = RewardModel.create(model, config, len(split.folds), "judge")
    progress(0.0, "reading the votes")
    features = base_features(reward, examples, known)
    alike = examples
    examples, voters, ridge = weigh(alike, features, split, ridges(config.ridge))
    fits = []
    for i, fold in enumerate(split.folds):
        own = [features[j] for j in fold.train]
        fits.append(Fit(reward, i, weighed_alone([alike[j] for j in fold.train], own, config.folds, ridge, seed), own, ridge, seed + i))
    learned = [{j: e.weight for j, e in zip(fold.train, fit.examples, strict=True)} for fold, fit in zip(split.folds, fits, strict=True)]
    best = [Tested.of(reward, i, examples, features, fold.test) for i, fold in enumerate(split.folds)]
    curve, passes = [mean_loss(best)], 0
    while passes + 1 == len(curve) <= config.epochs:  # each pass so far has paid
        tried: list[Tested] = []
        for i, fold in enumerate(split.folds):
            progress((len(curve) + i / len(fits)) / (config.epochs + 1), f"cross-validation: pass {len(curve)}, fold {i + 1} of {len(fits)}")
            fits[i].epoch(len(curve) - 1)
            tried.append(Tested.of(reward, i, examples, features, fold.test))
            if mean_loss(tried) >= mean_loss(best[: i + 1]) - config.worth:
                break
        else:
            best, passes = tried, len(curve)
        if len(tried) == len(fits):
            curve.append(mean_loss(tried))
        else:
            break
    for i, kept in enumerate(best):
        kept.restore(reward, i)
    return CrossValidation({j: s for kept in best for j, s in kept.scores.items()}, curve, passes, ridge, reward, examples, voters, learned, features)


@dataclass(frozen=True)
class Tested:
    """One fold's member at one moment: its scores of the votes it did not see, their losses (nats), and its parameters."""

    scores: dict[int, list[float]]
    losses: list[float]
    adapter: str | None
    state: dict[str, Tensor]

    @classmethod
    @torch.no_grad()
    def of(
        cls, reward: RewardModel, which: int, examples: Sequence[RankedExample], features: Sequence[Tensor], test: Sequence[int]
    ) -> Tested:
        """Score `test` (indices of examples). features: the base's, which are enough while the member has no adapter."""
        member = reward.members[which]
        if member.adapter:
            rows = [s[:, 0] for s in reward.score_examples([examples[j] for j in test], [which])]
        else:
            rows = [member.of_features(features[j].to(reward.model.device)).cpu() for j in test]
        losses = [preference_loss(s, examples[j].strict, []).item() for j, s in zip(test, rows, strict=True) if examples[j].strict]
        if not all(map(math.isfinite, losses)):
            raise RewardDiverged("the reward model's held-out loss is not a finite number")
        state = {name: value.detach().clone() for name, value in named(reward, which).items()}
        return cls({j: s.tolist() for j, s in zip(test, rows, strict=True)}, losses, member.adapter, state)

    @torch.no_grad()
    def restore(self, reward: RewardModel, which: int) -> None:
        """Put the member back to where it was."""
        member = reward.members[which]
        if member.adapter and not self.adapter:
            reward.model.lora.delete(member.adapter)
            member.adapter = None
        for name, value in named(reward, which).items():
            value.copy_(self.state[name])


def mean_loss(parts: Sequence[Tested]) -> float:
    """Nats a comparison, over the folds together."""
    losses = [loss for part in parts for loss in part.losses]
    return sum(losses) / max(1, len(losses))


def weigh(
    examples: Sequence[RankedExample], features: Sequence[Tensor], split: Split, penalties: Sequence[float]
) -> tuple[list[RankedExample], dict[str, Voter], float]:
    """The examples weighted by their voters, the voters, and which of `penalties` suits the heads for examples so weighted.

    Twice: by held-out scores of heads that took all votes alike, then of heads that weighed them. The second pays where
    many are off: with one contrary voter in five, the first heads know too little to tell who it is.
    """
    examples, voters, heads = list(examples), dict[str, Voter](), HeldOut(examples, features, split, COUNTS)
    ridge, people = heads.choose_ridge(examples, penalties), len({e.voter for e in examples})
    for _ in range(2 if people > 2 else 1):
        voters = weigh_voters(examples, heads.scores(examples, ridge))
        if people > 1:
            examples = weighted(examples, voters)
            ridge = heads.choose_ridge(examples, penalties)
    return examples, voters, ridge


def weighed_alone(examples: Sequence[RankedExample], features: Sequence[Tensor], folds: int, ridge: float, seed: int) -> list[RankedExample]:
    """A fold's training votes weighted by their voters, as these votes alone tell it; all alike where they cannot be split."""
    try:
        split = split_folds(examples, folds, seed).where_learned(examples)
    except ValueError:
        return list(examples)
    return weigh(examples, features, split, [ridge])[0]


def fit_members(
    model: CausalModel, examples: Sequence[RankedExample], config: RewardConfig, epochs: int, ridge: float, seed: int,
    progress: Progress, features: Sequence[Tensor] | None = None,
) -> RewardModel:  # fmt: skip
    """The ensemble that PPO optimises: `config.members` members on all examples, `epochs` passes each.

    features: `base_features` of the examples, where they are there already.
    """
    reward = RewardModel.create(model, config, config.members)
    features = base_features(reward, examples) if features is None else features
    for i in range(config.members):
        fit = Fit(reward, i, examples, features, ridge, seed + i)
        for epoch in range(epochs):
            progress((i + epoch / epochs) / config.members, f"member {i + 1} of {config.members}, pass {epoch + 1}")
            fit.epoch(epoch)
    return reward


def named(reward: RewardModel, which: int) -> dict[str, nn.Parameter]:
    """Every parameter of one member, its adapter's included where it has one."""
    member = reward.members[which]
    adapter = reward.model.lora.parameters(member.adapter) if member.adapter else {}
    return {**adapter, **dict(member.named_parameters())}
