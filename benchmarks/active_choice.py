"""Does choosing what people are shown save votes? Reward-model accuracy against votes, chosen pairs beside random ones.

`python -m benchmarks.active_choice`. A person of known taste (with noise) votes on two of `--candidates` replies of the
base; every `--round` votes the reward model (heads on the base's features, as in a round without a LoRA pass) is fitted
anew and chooses the next pairs, but for the share left to chance and the first round. Accuracy is the mean score's, on
random pairs of held-out prompts that the taste tells apart. Headline: how many votes random pairs need, over how many
chosen pairs need for the same accuracy. All seeds share one set of replies; seeds differ in prompts, pairs and noise.
Replies and features are sampled once, and kept in `--samples` where it is given. JSON last.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from torch import Tensor

from engine.engine import Engine, SamplingParams
from engine.features import feature_count
from learner.batching import chunks, pass_tokens
from learner.config import RewardConfig
from learner.data import RankedExample, split_folds
from learner.heads import ridges
from learner.prompts import HERE as STARTER_DATA
from learner.prompts import prompts_from
from learner.reward import RewardModel, features_of
from learner.reward_fit import fit_members, weigh
from learner.tastes import Taste, favourite, taste_named
from learner.versions import open_model
from server.choice import POLICIES, choose
from server.settings import STARTER

RANDOM = "random"


@dataclass(frozen=True)
class Replies:
    """One prompt and what was sampled for it. features: (m, 3D + 6), on the bare base."""

    prompt_ids: tuple[int, ...]
    texts: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    features: Tensor


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tastes", nargs="+", default=["shorter", "friendly", "formal", "list", "random:1", "random:2"])
    parser.add_argument("--policies", nargs="+", default=[*POLICIES], choices=[*POLICIES])
    parser.add_argument("--votes", type=int, default=160)
    parser.add_argument("--round", type=int, default=16, help="votes between two fits of the reward model")
    parser.add_argument("--candidates", type=int, default=8, help="replies sampled for each comparison, of which --shown are shown")
    parser.add_argument("--shown", type=int, default=2)
    parser.add_argument("--random-share", type=float, default=0.25, help="share of comparisons that are not chosen")
    parser.add_argument("--noise", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--members", type=int, default=RewardConfig().members, help="of the ensemble that chooses")
    parser.add_argument("--prompts", type=int, default=400, help="to vote on")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--model", default=str(STARTER))
    parser.add_argument("--samples", type=Path, help="file of the sampled replies: read if it is there, else written")
    args = parser.parse_args()
    if args.votes > args.prompts or args.votes % args.round or not 2 <= args.shown <= args.candidates:
        raise SystemExit("--votes is a multiple of --round and at most --prompts; --shown is 2 to --candidates")
    torch.set_num_threads(1)
    began = time.monotonic()
    model, practice, held_out = sampled(args)
    print(f"{len(practice)} prompts to vote on and {len(held_out)} held out, {time.monotonic() - began:.0f} s", flush=True)
    results = [of_taste(model, name, practice, held_out, args) for name in args.tastes]
    saved = {policy: shown(over_tastes([r["savings"][policy] for r in results])) for policy in args.policies}
    for result in results:
        result["savings"] = {policy: shown(row) for policy, row in result["savings"].items()}
    for policy, row in saved.items():
        print(f"{policy:>14}: random needs {row['ratio']:.2f} times the votes (geometric mean over tastes; {row['low']:.2f} to {row['high']:.2f})")
    settings = {k: v for k, v in vars(args).items() if k not in ("samples", "model")} | {"model": Path(args.model).name}
    print(json.dumps({
        "benchmark": "active_choice", "settings": settings, "savings": saved, "tastes": results,
        "minutes": round((time.monotonic() - began) / 60, 1), "torch": torch.__version__,
    }))  # fmt: skip


def sampled(args: argparse.Namespace) -> tuple[Any, list[Replies], list[Replies]]:
    """The model, and the replies to the prompts that are voted on and to the held-out ones, with their features."""
    model, tokenizer = open_model(args.model, "cpu", "float32")
    count, key = args.candidates, [args.prompts, args.candidates, args.max_tokens, model.digest]
    if args.samples and args.samples.exists():
        kept = torch.load(args.samples, weights_only=True)
        if kept["key"] != key:
            raise SystemExit(f"{args.samples} holds other samples; name another file")
        raw = kept["replies"]
    else:
        practice = [*prompts_from(), *prompts_from(STARTER_DATA / "prompts_pool.txt")]
        if args.prompts > len(practice):
            raise SystemExit(f"there are {len(practice)} prompts to vote on, --prompts asks for {args.prompts}")
        texts = [*random.Random(0).sample(practice, args.prompts), *prompts_from(held_out=True)]
        prompts = [tokenizer.render([{"role": "user", "content": text}]) for text in texts]
        repeated = [ids for ids in prompts for _ in range(count)]
        engine = Engine(model, tokenizer, max_sequences=32, max_context=max(map(len, prompts)) + args.max_tokens)
        params = [SamplingParams(max_tokens=args.max_tokens, seed=i) for i in range(len(repeated))]
        done = engine.generate(repeated, params)
        pairs = [(s.prompt_ids, s.token_ids) for s in done]
        reward, features = RewardModel(model, RewardConfig(), []), torch.empty(len(pairs), feature_count(model.hidden_size))
        with torch.no_grad():
            for part in chunks([len(prompt) + len(reply) for prompt, reply in pairs], pass_tokens(model.device)):
                features[part] = features_of(model, reward.rows([pairs[i] for i in part]), None)
        raw = [(list(s.prompt_ids), s.text, list(s.token_ids), row) for s, row in zip(done, features, strict=True)]
        if args.samples:
            torch.save({"key": key, "replies": raw}, args.samples)
    every = [
        Replies(tuple(own[0][0]), tuple(r[1] for r in own), tuple(tuple(r[2]) for r in own), torch.stack([r[3] for r in own]))
        for own in (raw[i : i + count] for i in range(0, len(raw), count))
    ]
    return model, every[: args.prompts], every[args.prompts :]


def of_taste(model: Any, name: str, practice: Sequence[Replies], held_out: Sequence[Replies], args: argparse.Namespace) -> dict[str, Any]:
    """The curves of one taste, and what each policy saves."""
    taste = taste_named(name)
    tests = [Test.of(taste, replies) for replies in held_out]
    curves: dict[str, list[list[float]]] = {}
    ties: dict[str, float] = {}
    for policy in [RANDOM, *args.policies]:
        runs = [run(model, taste, policy, practice, tests, seed, args) for seed in range(args.seeds)]
        curves[policy], ties[policy] = [accuracy for accuracy, _ in runs], float(np.mean([tied for _, tied in runs]))
        means = np.mean(curves[policy], axis=0)
        print(f"{name:>10} {policy:>13}: " + " ".join(f"{a:.3f}" for a in means) + f"  ties {ties[policy]:.0%}", flush=True)
    at = [args.round * (i + 1) for i in range(args.votes // args.round)]
    saved = {p: against_random(at, curves[RANDOM], curves[p]) for p in args.policies}
    means = {p: [round(float(a), 4) for a in np.mean(c, axis=0)] for p, c in curves.items()}
    errors = {p: [round(float(a), 4) for a in np.std(c, axis=0, ddof=1) / len(c) ** 0.5] if len(c) > 1 else None for p, c in curves.items()}
    return {"taste": name, "votes": at, "accuracy": means, "standard_error": errors, "ties": ties, "savings": saved}


@dataclass(frozen=True)
class Test:
    """Held-out pairs of one prompt that the taste tells apart: (liked, other), and the features they are scored by."""

    pairs: list[tuple[int, int]]
    features: Tensor

    @classmethod
    def of(cls, taste: Taste, replies: Replies) -> Test:
        """All pairs: as good as random ones, with less noise."""
        gold = [taste(text) for text in replies.texts]
        pairs = [(i, j) for i in range(len(gold)) for j in range(len(gold)) if gold[i] > gold[j]]
        return cls(pairs, replies.features)


def run(
    model: Any, taste: Taste, policy: str, practice: Sequence[Replies], tests: Sequence[Test], seed: int, args: argparse.Namespace
) -> tuple[list[float], float]:
    """Held-out accuracy after each round of votes, and the share of votes that were ties."""
    draw = random.Random(f"{seed}")
    deck = draw.sample(practice, args.votes)
    config = replace(RewardConfig(), members=args.members)
    examples: list[RankedExample] = []
    features: list[Tensor] = []
    accuracies: list[float] = []
    reward: RewardModel | None = None
    for number, replies in enumerate(deck):
        # The draws of a vote are its own, so that all policies see the same prompts, chances and noise.
        own = random.Random(f"{seed}/{number}")
        pair = own.sample(range(args.candidates), args.shown)
        if own.random() >= args.random_share and policy != RANDOM and reward is not None:
            pair = list(choose(scored(reward, replies.features), args.shown, policy, own.getrandbits(31)))
        pick = favourite(taste, [replies.texts[i] for i in pair], args.noise, own)
        rest = tuple(i for i in range(args.shown) if i != pick)
        groups = (rest,) if pick is None else ((pick,), rest)
        ids = tuple(replies.token_ids[i] for i in pair)
        name = str(number)
        examples.append(RankedExample(
            replies.prompt_ids, ids, groups, "voter", name, name, name, name, seq=number, ties=pick is None,
            accepted=() if pick is None else (pick,),
        ))  # fmt: skip
        features.append(replies.features[pair])
        if len(examples) % args.round == 0:
            reward = fitted(model, examples, features, config, seed)
            accuracies.append(accuracy(reward, tests))
    return accuracies, sum(bool(e.tied) for e in examples) / len(examples)


def fitted(model: Any, examples: list[RankedExample], features: list[Tensor], config: RewardConfig, seed: int) -> RewardModel | None:
    """The members as a round fits them without a LoRA pass; None while every vote is a tie."""
    if not any(e.strict for e in examples):
        return None
    split = split_folds(examples, config.folds, seed).where_learned(examples)
    weighed, _, ridge = weigh(examples, features, split, ridges(config.ridge))
    return fit_members(model, weighed, config, 0, ridge, seed, lambda *_: None, features)


@torch.no_grad()
def scored(reward: RewardModel, features: Tensor) -> Tensor:
    """(m, members)."""
    return torch.stack([member.of_features(features) for member in reward.members], dim=1)


def accuracy(reward: RewardModel | None, tests: Sequence[Test]) -> float:
    """Share of the held-out pairs that the members' mean has in the taste's order, each prompt counting alike."""
    right = []
    for test in tests:
        if test.pairs:
            score = scored(reward, test.features).mean(1) if reward else torch.zeros(len(test.features))
            right.append(float(np.mean([0.5 + 0.5 * float((score[i] - score[j]).sign()) for i, j in test.pairs])))
    return float(np.mean(right))


def against_random(at: Sequence[int], theirs: Sequence[Sequence[float]], ours: Sequence[Sequence[float]]) -> dict[str, Any]:
    """`ratio` on the seeds' mean curves, and its 95% interval by bootstrapping the seeds.

    Seeds share replies, so the interval is about draws of votes, not of models or prompts to test on.
    """
    a, b = np.array(theirs), np.array(ours)
    rng = np.random.default_rng(0)
    rows = rng.integers(len(a), size=(1000, len(a)))
    return summary(ratio(at, a.mean(0), b.mean(0)), np.array([ratio(at, a[r].mean(0), b[r].mean(0)) for r in rows]))


def ratio(at: Sequence[int], theirs: np.ndarray, ours: np.ndarray) -> float:
    """Votes that random pairs need over votes that the policy needs, for the same accuracy.

    Geometric mean over 16 accuracies in the upper half of those that both curves reach (each curve its running maximum,
    linear between rounds). Symmetric: a policy that costs votes is below 1.
    """
    a, b = np.maximum.accumulate(theirs), np.maximum.accumulate(ours)
    low, high = max(a[0], b[0]), min(a[-1], b[-1])
    if high <= low:
        return 1.0
    levels = np.linspace((low + high) / 2, high, 16)
    return float(np.exp(np.mean([np.log(votes_for(level, at, a) / votes_for(level, at, b)) for level in levels])))


def votes_for(level: float, at: Sequence[int], curve: np.ndarray) -> float:
    """Where a rising curve first reaches `level`, between rounds by a straight line."""
    i = int(np.searchsorted(curve, level))
    if i == 0:
        return float(at[0])
    i = min(i, len(curve) - 1)
    step = curve[i] - curve[i - 1]
    return at[i - 1] + (at[i] - at[i - 1]) * min(1.0, float((level - curve[i - 1]) / step)) if step else float(at[i])


def summary(best: float, drawn: np.ndarray) -> dict[str, Any]:
    """A ratio with its interval; the draws go on to the mean over tastes."""
    return {"ratio": best, "low": float(np.quantile(drawn, 0.025)), "high": float(np.quantile(drawn, 0.975)), "draws": drawn}


def over_tastes(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Geometric mean over tastes."""
    best = float(np.exp(np.mean([np.log(row["ratio"]) for row in rows])))
    return summary(best, np.exp(np.mean([np.log(row["draws"]) for row in rows], axis=0)))


def shown(row: dict[str, Any]) -> dict[str, float]:
    """What of `summary` is printed."""
    return {name: round(row[name], 3) for name in ("ratio", "low", "high")}


if __name__ == "__main__":
    main()
