"""Does optimising the reward model too far make replies worse, and does the stop rule end before that?

`python -m benchmarks.overoptimisation`. A known gold reward (a taste, less what broken replies cost) labels a few noisy
votes; proxies are fitted to them: one member alone, and the ensemble with its lower confidence bound. PPO then optimises
each with no KL price (`--kl-coef`) and no ceiling (Gao et al. 2023, "Scaling laws for reward model overoptimization"), and after every few
updates the policy's replies to held-out prompts are scored by proxy, gold and the held-out members (the judges). Gold
and proxy are in deviations of the base's replies. Reported: where gold peaked, where the run would have been stopped by
the judges, by the KL ceiling, and what gold was there. `--plot FILE.png` draws gold and proxy against sqrt(KL). JSON last.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from benchmarks.charts import chart_file
from benchmarks.votes import People, picks_on
from engine.engine import BASE, Engine, SamplingParams
from engine.model import CausalModel
from engine.tokenizer import ChatTokenizer
from learner import rollout
from learner.config import FOREVER, LearnerConfig
from learner.data import examples_from_votes, split_folds
from learner.gate import reply_kl
from learner.kl_control import kl_price, kl_warranted
from learner.ppo import train_ppo
from learner.prompts import prompts_from
from learner.reward import RewardModel
from learner.reward_fit import cross_validate, fit_members
from learner.rollout import Trajectories
from learner.scorer import Scorer
from learner.stopping import Judged
from learner.tastes import Taste, taste_named
from learner.text_checks import broken
from server.settings import STARTER

POLICY = "policy"
BROKEN_COST = 3.0  # deviations of the taste among base replies


class Gold:
    """The reward that people's votes come from: a taste in deviations of the base's replies, less what broken text costs."""

    def __init__(self, taste: Taste, base: Trajectories) -> None:
        self.taste = taste
        said = [taste(text) for text in base.texts]
        self.mean, self.deviation = statistics.fmean(said), statistics.stdev(said)
        self.level = statistics.fmean(self.raw(base))

    def __call__(self, text: str, reason: str = "stop") -> float:
        return (self.taste(text) - self.mean) / self.deviation - BROKEN_COST * broken(text, reason)

    def raw(self, batch: Trajectories) -> list[float]:
        return [self(text, reason) for text, reason in zip(batch.texts, batch.finish_reasons, strict=True)]

    def above_base(self, batch: Trajectories) -> float:
        """Mean of the batch less the base's."""
        return statistics.fmean(self.raw(batch)) - self.level


def curve(
    model: CausalModel, tokenizer: ChatTokenizer, proxy: RewardModel, judges: RewardModel, gold: Gold, base: Trajectories,
    held_out: Sequence[Sequence[int]], practice: Sequence[Sequence[int]], config: LearnerConfig, args: argparse.Namespace,
) -> list[dict[str, float]]:  # fmt: skip
    """Proxy, gold, judges and KL of the policy on held-out prompts, from no update on."""
    score, judge = Scorer(proxy, base), Scorer(judges, base)
    engine = Engine(model, tokenizer, max_sequences=48, max_context=1024)
    points: list[dict[str, float]] = [{"update": 0, "kl": 0.0, "proxy": float(score(base).mean()), "judges": float(judge(base).mean()), "gold": 0.0, "broken": share_broken(base)}]

    def look(row: dict[str, Any]) -> None:
        if (row["update"] + 1) % args.every:
            return
        batch = rollout.sample(engine, held_out, version=POLICY, group=4, max_tokens=config.ppo.max_new_tokens, temperature=1.0, seed=7)
        points.append({
            "update": row["update"] + 1, "kl": float(reply_kl(model, batch, POLICY, None, 1.0).mean()), "proxy": float(score(batch).mean()),
            "judges": float(judge(batch).mean()), "gold": gold.above_base(batch), "broken": share_broken(batch),
        })  # fmt: skip
        print("   " + json.dumps({k: round(v, 3) for k, v in points[-1].items()}), flush=True)

    free = replace(
        config.ppo, updates=args.updates, tokens=10**9, kl_coef=args.kl_coef / kl_price(config.ppo.kl_target), kl_horizon=1e9, kl_ceiling=1e6, broken_penalty=0.0, max_seconds=FOREVER, patience=10**6,
        uncertainty=config.ppo.uncertainty if len(proxy.members) > 1 else 0.0,
    )  # fmt: skip
    train_ppo(model, tokenizer, proxy, prompts=practice, policy=POLICY, config=free, judges=None, seed=args.seed, on_update=look)
    model.lora.delete(POLICY)
    return points


def share_broken(batch: Trajectories) -> float:
    return statistics.fmean(broken(t, r) for t, r in zip(batch.texts, batch.finish_reasons, strict=True))


def stops(points: Sequence[dict[str, float]], config: LearnerConfig, votes: int) -> dict[str, Any]:
    """Where gold peaked, and where each stop rule would have ended, with gold there."""
    peak = max(points, key=lambda p: p["gold"])
    judged, stopped = Judged(config.ppo.patience, config.ppo.part), None
    for point in points:
        if judged.parted(point["judges"], point["proxy"]):
            stopped = points[judged.looks.index(max(judged.looks))]
            break
    under = [p for p in points if p["kl"] <= config.ppo.kl_ceiling * kl_warranted(config.ppo, votes)]
    ends: dict[str, Any] = {"peak": peak, "last": points[-1], "judges": stopped, "kl_ceiling": under[-1]}
    ends["gold_lost_by_the_end"] = peak["gold"] - points[-1]["gold"]
    first = min((p for p in (stopped, under[-1]) if p is not None), key=lambda p: p["update"])
    return ends | {"stopped_at": first, "gold_lost_at_stop": peak["gold"] - first["gold"], "before_the_turn": first["update"] <= peak["update"]}


def plot(path: Path, curves: dict[str, Sequence[dict[str, float]]], ends: dict[str, dict[str, Any]], title: str) -> None:
    """Gold (solid) and proxy (dashed) against the square root of KL, and where the stop rule ends each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for (name, points), colour in zip(curves.items(), ("tab:red", "tab:blue"), strict=False):
        x = [math.sqrt(max(0.0, p["kl"])) for p in points]
        axes.plot(x, [p["gold"] for p in points], "-", color=colour, label=f"gold, {name}")
        axes.plot(x, [p["proxy"] for p in points], "--", color=colour, label=f"proxy, {name}")
        stop = ends[name]["stopped_at"]
        axes.plot(math.sqrt(max(0.0, stop["kl"])), stop["gold"], "o", color=colour, label=f"stop rule, {name}")
    axes.set(xlabel="sqrt(KL from the base, nats a reply)", ylabel="reward above base (deviations)", title=title)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--taste", default="random:1")
    parser.add_argument("--votes", type=int, default=60)
    parser.add_argument("--noise", type=float, default=0.2)
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--every", type=int, default=3, help="updates between looks")
    parser.add_argument("--kl-coef", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default=str(STARTER))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plot", type=chart_file, metavar="FILE", help="draw the curves")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    config = LearnerConfig()
    model, tokenizer = CausalModel.load(args.model), ChatTokenizer.load(args.model)
    engine = Engine(model, tokenizer, max_sequences=48, max_context=1024)
    render: Callable[[str], list[int]] = lambda p: tokenizer.render([{"role": "user", "content": p}])  # noqa: E731
    held_out = [render(p) for p in prompts_from(held_out=True)[:48]]
    base = rollout.sample(engine, held_out, version=BASE, group=4, max_tokens=config.ppo.max_new_tokens, temperature=1.0, seed=3)
    gold = Gold(taste_named(args.taste), base)

    # 1. Votes by the gold reward on base replies, and the proxies they give.
    asked = random.Random(args.seed).sample(prompts_from(), args.votes)
    how = [SamplingParams(max_tokens=256, seed=args.seed * 1_000_003 + i) for i in range(4 * len(asked))]
    replies = engine.generate([render(p) for p in asked for _ in range(4)], how)
    people = People(gold, noise=args.noise, careless=0.0, seed=args.seed)
    voted = picks_on(people, asked, replies, 4, BASE)
    examples = examples_from_votes(voted, tokenizer)
    checked = cross_validate(model, examples, split_folds(examples, config.reward.folds, args.seed), config.reward, args.seed, lambda *_: None)
    proxies = {}
    for name, members in (("one member", 1), ("ensemble", config.reward.members)):
        settings = replace(config.reward, members=members)
        proxies[name] = fit_members(model, checked.examples, settings, checked.epochs, checked.ridge, args.seed, lambda *_: None, checked.features)

    # 2. Optimise each too far.
    practice = [render(p) for p in prompts_from()]
    curves, ends = {}, {}
    for name, proxy in proxies.items():
        print(f"== {name}", flush=True)
        curves[name] = curve(model, tokenizer, proxy, checked.judges, gold, base, held_out, practice, config, args)
        ends[name] = stops(curves[name], config, len(examples))
    if args.plot:
        plot(args.plot, curves, ends, f"{args.votes} votes, {args.noise:.0%} noise, taste {args.taste}")
    met = all(end["before_the_turn"] or end["gold_lost_at_stop"] < 0.1 for end in ends.values())
    turned = any(end["gold_lost_by_the_end"] > 0.2 for end in ends.values())
    print(json.dumps({
        "taste": args.taste, "votes": args.votes, "noise": args.noise, "seed": args.seed, "gold_turned": turned, "stopped_in_time": met,
        "ends": ends, "curves": curves,
    }))  # fmt: skip
    return 0 if met and turned else 1


if __name__ == "__main__":
    sys.exit(main())
