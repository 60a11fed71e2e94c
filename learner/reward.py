"""The reward model: several members, each a scalar head (and, where votes warrant it, a LoRA adapter) on the one shared base.

A completion's score is linear in what the base makes of it: the final hidden state of its last valid token (Stiennon et al.
2020), the mean and the sum of those of its own tokens, and how many tokens and sentences it has (`engine/features.py`); prompt and
completion are exactly as the engine saw them. Counts of their own also keep length out of the other weights (ODIN, Chen et al. 2024).

Members learn from votes by Bradley-Terry over all strict pairs of a comparison, a person's own better reply included
(Ouyang et al. 2022, Eq. 1), ties by half a win each way or Davidson (1970), "none is good" by an outside option (Luce
1959), each vote weighted by its voter's reliability (`learner/reliability.py`); they differ in their initial weights, order of data and in Bayesian-bootstrap
weights of the votes (Rubin 1981). Before any of it is believed, `cross_validate` scores every vote with members that
saw neither its prompt nor its voter.

Owns fitting, scoring, saving. Does not judge the figures (`learner/metrics.py`) or split the votes (`learner/data.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.features import COUNTS, feature_count, reply_features
from engine.lora import AdapterError
from engine.model import CausalModel
from learner.batching import chunks, pass_tokens
from learner.config import RewardConfig
from learner.data import RankedExample, Split
from learner.heads import HeldOut, knows_level, linear_probe
from learner.losses import outside_option, preference_loss
from learner.packing import PackedRows, worth_packing
from learner.reliability import Voter, weigh_voters, weighted

Pair = tuple[Sequence[int], Sequence[int]]  # prompt and reply, token ids
HEADS, ABOUT = "heads.safetensors", "reward.json"
Progress = Callable[[float, str], None]
Known = dict[tuple[tuple[int, ...], tuple[tuple[int, ...], ...]], Tensor]  # prompt and completions: their features on the base


class RewardDiverged(Exception):
    """Fitting or scoring met a number that is not finite; the round must be dropped."""


class Member(nn.Module):
    """One member: its heads, its adapter, and its own tendency to call ties.

    score = head(`engine.features` of the reply): (F,) -> scalar. log_nu: Davidson's tie parameter. level: the score of
    "none of them". adapter: the one it reads the base through, called `name`; None until LoRA training begins, so that
    all heads on the bare base share one forward pass.
    """

    def __init__(self, name: str, hidden_size: int) -> None:
        super().__init__()
        self.name = name
        self.adapter: str | None = None
        self.head = nn.Linear(feature_count(hidden_size), 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.log_nu = nn.Parameter(torch.zeros(()))
        self.level = nn.Parameter(torch.zeros(()))

    @torch.no_grad()
    def start(self, weight: Tensor, bias: Tensor, level: Tensor) -> None:
        """Set the head from one weight vector (F,) over `features_of`, the bias, and the level."""
        self.level.copy_(level)
        self.head.weight.copy_(weight[None])
        self.head.bias.fill_(bias.item())

    def of_features(self, features: Tensor) -> Tensor:
        """(..., F) -> (...,) scores, in logits of a pairwise preference."""
        return self.head(features).squeeze(-1)

    def forward(self, model: CausalModel, batch: Rows | PackedRows) -> Tensor:
        """Scores (N,) of the rows' replies."""
        return self.of_features(read(model, batch, self.adapter))


@dataclass(frozen=True)
class Rows:
    """Prompt + reply, padded on the right. ids, valid: (N, T); reply: (N, T) bool, True on the reply's tokens."""

    ids: Tensor
    valid: Tensor
    reply: Tensor


def read(model: CausalModel, batch: Rows | PackedRows, adapter: str | None) -> Tensor:
    """(N, F) features of the rows' replies, in order."""
    return features_of_packed(model, batch, adapter) if isinstance(batch, PackedRows) else features_of(model, batch, adapter)


def features_of(model: CausalModel, batch: Rows, adapter: str | None) -> Tensor:
    """(N, F) `engine.features.reply_features`, the last state being that of the last valid token (not of column -1)."""
    hidden = model(batch.ids, valid=batch.valid, adapter=adapter).float()  # (N, T, D)
    last = hidden[torch.arange(len(batch.ids), device=batch.ids.device), batch.valid.sum(1) - 1]
    total = torch.where(batch.reply[:, :, None], hidden, 0.0).sum(1)
    return reply_features(last, total, batch.reply.sum(1), (batch.reply & model.sentence_ends[batch.ids]).sum(1))


def features_of_packed(model: CausalModel, batch: PackedRows, adapter: str | None) -> Tensor:
    """`features_of` each reply, (M, F) float32, where replies to one prompt share a row."""
    hidden = model(batch.ids, positions=batch.positions, valid=batch.valid, attend=batch.attend, adapter=adapter).float()  # (N, T, D)
    of_reply = [hidden[n, columns] for n, columns in zip(batch.row.tolist(), batch.reply, strict=True)]
    total = torch.stack([own.sum(0) for own in of_reply])
    ends = (batch.reply & model.sentence_ends[batch.ids][batch.row]).sum(1)
    return reply_features(hidden[batch.row, batch.last], total, batch.reply.sum(1), ends)


class RewardModel:
    """An ensemble over one CausalModel. `members` are in order; scores come as one column a member."""

    def __init__(self, model: CausalModel, config: RewardConfig, members: Sequence[Member]) -> None:
        self.model, self.config, self.members = model, config, list(members)

    @classmethod
    def create(cls, model: CausalModel, config: RewardConfig, count: int, prefix: str = "reward") -> RewardModel:
        """`count` fresh members `<prefix>0`, `<prefix>1`, ..., all heads on the bare base."""
        return cls(model, config, [Member(f"{prefix}{i}", model.hidden_size).to(model.device) for i in range(count)])

    @torch.no_grad()
    def score(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], members: Sequence[int] | None = None
    ) -> Tensor:
        """Scores (N, members) of N completions, each on its own prompt. `members` picks some of them, by position."""
        rows = list(zip(prompt_ids, completion_ids, strict=True))
        chosen = self.members if members is None else [self.members[i] for i in members]
        scores = torch.empty(len(rows), len(chosen))
        for part in chunks([len(prompt) + len(reply) for prompt, reply in rows], pass_tokens(self.model.device)):
            batch = self.rows([rows[i] for i in part])
            features = {a: features_of(self.model, batch, a) for a in dict.fromkeys(m.adapter for m in chosen)}
            for column, member in enumerate(chosen):
                scores[part, column] = member.of_features(features[member.adapter]).cpu()
        return scores

    def score_examples(self, examples: Sequence[RankedExample], members: Sequence[int] | None = None) -> list[Tensor]:
        """Scores (K, members) of each example's completions."""
        flat = self.score(
            [e.prompt_ids for e in examples for _ in e.completions_ids],
            [c for e in examples for c in e.completions_ids],
            members,
        )
        return list(flat.split([len(e.completions_ids) for e in examples]))

    def save(self, path: Path) -> None:
        """Write the heads (safetensors), each member's adapter (PEFT) where it has one, and what they are, under `path`."""
        path.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for i, member in enumerate(self.members):
            if member.adapter:
                self.model.lora.save(member.adapter, path / f"member{i}")
            tensors |= {f"{i}.{name}": value.detach().cpu().contiguous() for name, value in member.state_dict().items()}
        save_file(tensors, path / HEADS)
        about = {
            "members": [{"name": m.name, "adapter": m.adapter is not None} for m in self.members],
            "hidden_size": self.model.hidden_size, "base": self.model.source,
        }  # fmt: skip
        (path / ABOUT).write_text(json.dumps(about, indent=2) + "\n", "utf-8")

    @classmethod
    def load(cls, model: CausalModel, config: RewardConfig, path: Path) -> RewardModel:
        """Read what `save` wrote; its scores are the same. Raises AdapterError, OSError."""
        about = json.loads((path / ABOUT).read_text("utf-8"))
        tensors, members = load_file(path / HEADS), []
        for i, written in enumerate(about["members"]):
            member = Member(written["name"], about["hidden_size"])
            if written["adapter"]:
                model.lora.load(member.name, path / f"member{i}")
                member.adapter = member.name
            if tensors[f"{i}.head.weight"].shape != member.head.weight.shape:
                raise AdapterError(f"the reward model in {path.name} is an earlier Plaudit's, which read replies differently: run a round")
            member.load_state_dict({key: tensors[f"{i}.{key}"] for key in member.state_dict()})
            members.append(member.to(model.device))
        return cls(model, config, members)

    def delete(self) -> None:
        """Take the members' adapters out of the model."""
        for member in self.members:
            if member.adapter:
                self.model.lora.delete(member.adapter)
                member.adapter = None

    def rows_of(self, examples: Sequence[RankedExample]) -> Rows | PackedRows:
        """The completions of the examples, in order: one row an example where that is cheaper, else one a completion."""
        groups = [(e.prompt_ids, e.completions_ids) for e in examples]
        if worth_packing(groups, self.model.hidden_size, min(self.config.max_tokens, self.model.max_context)):
            return PackedRows.of(groups, self.model.pad_id, self.model.device)
        return self.rows([(prompt, reply) for prompt, replies in groups for reply in replies])

    def rows(self, pairs: Sequence[Pair]) -> Rows:
        """(prompt, reply) pairs as rows of at most `max_tokens` each: the oldest tokens go first, the end is always kept."""
        limit = min(self.config.max_tokens, self.model.max_context)
        kept = [[*prompt, *reply][-limit:] for prompt, reply in pairs]
        longest = max(map(len, kept))
        ids = torch.full((len(kept), longest), self.model.pad_id, dtype=torch.long)
        valid = torch.zeros(len(kept), longest, dtype=torch.bool)
        replied = torch.zeros(len(kept), longest, dtype=torch.bool)
        for i, (row, (_, reply)) in enumerate(zip(kept, pairs, strict=True)):
            ids[i, : len(row)] = torch.tensor(row)
            valid[i, : len(row)] = True
            replied[i, max(0, len(row) - len(reply)) : len(row)] = True
        device = self.model.device
        return Rows(ids.to(device), valid.to(device), replied.to(device))


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
            loss = self._loss(batch)
            if not math.isfinite(loss.item()):
                raise RewardDiverged("the reward model's loss is not a finite number")
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            total += loss.item() / len(batches)
        return total

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
    features: `base_features` of the examples.
    """

    scores: dict[int, list[float]]
    curve: list[float]
    epochs: int
    ridge: float
    judges: RewardModel
    examples: list[RankedExample]
    voters: dict[str, Voter]
    features: list[Tensor]


def cross_validate(
    model: CausalModel, examples: Sequence[RankedExample], split: Split, config: RewardConfig, seed: int, progress: Progress,
    known: Known | None = None,
) -> CrossValidation:  # fmt: skip
    """Fit one member a fold, side by side, until the pooled held-out loss stops falling; scores at the best pass.

    The members stay as `judges`: each has left some prompts (and voters) unseen, none is what PPO optimises. Voters are
    weighed (`weigh`) before anything is fitted that stays. known: see `base_features`.
    """
    reward = RewardModel.create(model, config, len(split.folds), "judge")
    progress(0.0, "reading the votes")
    features = base_features(reward, examples, known)
    examples, voters, ridge = weigh(examples, features, split, config.ridge)
    fits = [
        Fit(reward, i, [examples[j] for j in fold.train], [features[j] for j in fold.train], ridge, seed + i)
        for i, fold in enumerate(split.folds)
    ]
    best = [Tested.of(reward, i, examples, features, fold.test) for i, fold in enumerate(split.folds)]
    curve, passes = [mean_loss(best)], 0
    while passes + 1 == len(curve) <= config.epochs:  # each pass so far has paid
        tried: list[Tested] = []
        for i, fold in enumerate(split.folds):
            progress((len(curve) + i / len(fits)) / (config.epochs + 1), f"cross-validation: pass {len(curve)}, fold {i + 1} of {len(fits)}")
            fits[i].epoch(len(curve) - 1)
            tried.append(Tested.of(reward, i, examples, features, fold.test))
            if mean_loss(tried) >= (1 - config.worth) * mean_loss(best[: i + 1]):
                break
        else:
            best, passes = tried, len(curve)
        if len(tried) == len(fits):
            curve.append(mean_loss(tried))
        else:
            break
    for i, kept in enumerate(best):
        kept.restore(reward, i)
    return CrossValidation({j: s for kept in best for j, s in kept.scores.items()}, curve, passes, ridge, reward, examples, voters, features)


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
    examples: Sequence[RankedExample], features: Sequence[Tensor], split: Split, least: float
) -> tuple[list[RankedExample], dict[str, Voter], float]:
    """The examples weighted by their voters, the voters, and the heads' penalty for examples so weighted.

    Twice: by held-out scores of heads that took all votes alike, then of heads that weighed them. The second pays where
    many are off: with one contrary voter in five, the first heads know too little to tell who it is.
    """
    examples, voters, heads = list(examples), dict[str, Voter](), HeldOut(examples, features, split, COUNTS)
    ridge, people = heads.choose_ridge(examples, least), len({e.voter for e in examples})
    for _ in range(2 if people > 2 else 1):
        voters = weigh_voters(examples, heads.scores(examples, ridge))
        if people > 1:
            examples = weighted(examples, voters)
            ridge = heads.choose_ridge(examples, least)
    return examples, voters, ridge


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
