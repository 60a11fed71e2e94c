"""From the same votes to a policy: ours against TRL's PPO, RLOO, OnlineDPO and DPO, at equal time and at equal rollouts.

`make peers`, then `python -m benchmarks.peers [--tastes friendly] [--votes 60]`. For each taste and seed, people of that
taste (with noise) vote on 4 replies of the base; both sides read the same file of votes. Ours is what a round trains:
reward model and policy with the shipped settings (the gate, which no peer has, is left out on both sides). Its wall clock
and its number of rollouts are the peers' budgets. Peers train with LoRA of our rank at three learning rates; for each
budget the best one is reported, by the gold judge itself, which favours them; what else they are given is in
`benchmarks/peer/policies.py`. DPO samples nothing: its 3 passes count for a budget where they took no more of it. One
contestant after the other, each in a process of its own.

The judge is the taste: win rate against base on held-out prompts, by our engine with the adapter each side saved, beside
KL, broken replies, seconds an update and peak memory. JSON last; exit status 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from benchmarks import rival
from benchmarks.contest import ContestError, Finished, Turns, peer_python
from benchmarks.judge import SAMPLES, Judge, Judged
from benchmarks.votes import People, picks_on
from engine.engine import BASE
from engine.model import CausalModel
from engine.tokenizer import ChatTokenizer
from learner import rollout
from learner.config import LearnerConfig
from learner.data import examples_from_votes
from learner.kl_control import kl_warranted
from learner.metrics import paired_difference
from learner.ppo import train_ppo
from learner.practice import choose_prompts
from learner.prompts import POOL, prompts_from
from learner.round import train_reward
from learner.tastes import taste_named
from server.settings import STARTER
from store.records import VotedComparison

METHODS = ("ppo", "rloo", "online_dpo", "dpo")
TARGETS = {"update": 0.5, "memory": 0.5}  # ours over TRL's PPO, at most
OURS, POLICY = "ours", "policy"
COUNTS = {"seconds": ("seconds", "passes"), "rollouts": ("rollouts", "passes")}  # budget -> stops that may lie within it


@dataclass(frozen=True)
class Run:
    """One policy: whose, at which rate, kept at which stop, what it took and what the taste says of it."""

    method: str
    rate: str  # of rival.RATES; "" for ours
    stop: str  # seconds, rollouts or passes; "both" for ours
    judged: Judged
    seconds: float
    rollouts: float
    reward_s: float  # of them, for the reward model
    update_s: float | None  # seconds for as many rollouts as one of our updates has; None where it samples nothing
    peak_bytes: int
    note: str = ""

    def row(self) -> dict[str, Any]:
        """One line of the report."""
        return {name: value for name, value in vars(self).items() if name != "judged"} | self.judged.row()

    def show(self) -> None:
        """One line for a person."""
        update = f"{self.update_s:.2f} s" if self.update_s else "-"
        j = self.judged
        print(f"{self.method:<11}{self.rate:<6} {self.stop:<9} wins {j.win_rate:.3f} ({j.low:.3f} to {j.high:.3f}) KL {j.kl:6.2f} "
              f"broken {j.broken:.3f} length {j.length:5.1f} | {self.seconds:.0f} s, {self.rollouts:.0f} rollouts, an update {update}, "
              f"{self.peak_bytes / 1e9:.2f} GB {self.note}", flush=True)  # fmt: skip


def main() -> None:
    """Run the benchmark, or be its own contestant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tastes", nargs="+", default=["friendly"], help="of learner/tastes.py")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--votes", type=int, default=60)
    parser.add_argument("--noise", type=float, default=0.1, help="share of votes for any other reply than the favourite")
    parser.add_argument("--held-out", type=int, default=100, help="prompts that the taste judges on")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rates", nargs="+", choices=list(rival.RATES), default=list(rival.RATES))
    parser.add_argument("--model", default=str(STARTER))
    parser.add_argument("--keep", type=Path, default=Path("tmp/peers"), help="where votes, adapters and logs stay")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of our learner, e.g. ppo.updates=4")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers-python", type=Path, help="interpreter with TRL; default PLAUDIT_PEERS, else what `make peers` built")
    parser.add_argument("--ours", action="store_true", help=argparse.SUPPRESS)  # be the contestant
    args = parser.parse_args()
    if args.ours:
        contend()
        return
    try:
        peer = peer_python(named=args.peers_python)
        torch.set_num_threads(args.threads)
        contests = [contest(peer, taste, seed, args) for taste in args.tastes for seed in args.seeds]
    except ContestError as error:
        raise SystemExit(str(error)) from None
    found = summary([row for each in contests for row in each["best"]], [each["ratios"] for each in contests], args.methods)
    for method, gain in found["ahead_by"].items():
        print(f"ours over {method:<11} mean gain in gold win rate " + ", ".join(f"{x:+.3f} at equal {at}" for at, x in gain.items()))
    machine = {"cpus": os.cpu_count(), "torch": torch.__version__, "threads": args.threads}
    print(json.dumps({"benchmark": "peers", "votes": args.votes, "noise": args.noise, "model": Path(args.model).name, "targets": TARGETS,
                      "rates": {rate: rival.RATES[rate] for rate in args.rates}, "machine": machine, **found, "contests": contests}))  # fmt: skip
    raise SystemExit(0 if all(found["met"].values()) else 1)


def contest(peer: Path, taste: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One taste and seed: votes, ours, every peer at every rate, the judge. Raises ContestError."""
    config = LearnerConfig().override({"seed": str(seed)} | dict(s.split("=", 1) for s in args.set))
    model, tokenizer = CausalModel.load(args.model), ChatTokenizer.load(args.model)
    held_out = random.Random(seed).sample(prompts_from(held_out=True), args.held_out)
    judge = Judge(model, tokenizer, taste_named(taste), held_out, seed)
    folder = args.keep / f"{taste.replace(':', '-')}-{args.votes}-{args.noise:g}-{seed}"
    voted = vote(judge, People(judge.liking, noise=args.noise, careless=0.0, seed=seed), args.votes)
    votes = rival.write_votes(folder / "votes.json", voted, practice_of(voted, tokenizer, config))

    task = rival.job(args.model, votes, config.ppo, seed=seed, stops={}) | {"settings": config.to_dict()}
    answer = rival.run(OURS, [sys.executable, "-m", "benchmarks.peers", "--ours"], task, folder / OURS, args.threads)
    mine = Run(OURS, "", "both", judge.judge(folder / OURS / POLICY if answer.pop("trained") else None), **answer)
    print(f"{taste}, seed {seed}: best of 8 base replies wins {judge.best_of:.3f}, base has {judge.base_broken:.3f} broken")
    mine.show()
    runs, failed = list[Run](), list[str]()
    budget = {"seconds": mine.seconds, "rollouts": mine.rollouts}
    for method in args.methods:
        for rate in args.rates:
            stops = {"seconds": budget["seconds"]} | ({"passes": rival.DPO_PASSES} if method == "dpo" else {"rollouts": budget["rollouts"]})
            out = folder / f"{method}-{rate}"
            try:
                answer = rival.run_peer(peer, method, rate, task | {"stops": stops}, out, args.threads)
            except ContestError as error:  # an hour of the others' figures is not to be lost for it
                failed.append(str(error))
                print(error, flush=True)
                continue
            for stop, spent in answer["saved"].items():
                run = Run(method, rate, stop, judge.judge(out / stop), spent["seconds"], spent["rollouts"],
                          answer["reward_s"], answer["update_s"], answer["peak_bytes"])  # fmt: skip
                runs.append(run)
                run.show()
    best = [beside(mine, fit, at) for method in args.methods for at in COUNTS if (fit := best_within(runs, method, at, budget[at]))]
    return {"taste": taste, "seed": seed, "budget": budget, "ratios": against_ppo(mine, runs), "best": best, "failed": failed,
            "rows": [run.row() for run in (mine, *runs)]}  # fmt: skip


def vote(judge: Judge, people: People, votes: int) -> list[VotedComparison]:
    """So many votes on replies of the base, to prompts drawn without repeating while there are any left."""
    draw, deck, asked = random.Random(f"course/{judge.seed}"), list[str](), list[str]()
    while len(asked) < votes:
        deck = deck or draw.sample(prompts_from(), len(prompts_from()))
        asked.append(deck.pop())
    return picks_on(people, asked, judge.sample(asked, SAMPLES, None, 100), SAMPLES, BASE)


def practice_of(voted: Sequence[VotedComparison], tokenizer: ChatTokenizer, config: LearnerConfig) -> list[dict[str, Any]]:
    """The prompts that a round would practise on, with their words, which some peers want."""
    lines = {item.comparison.messages[-1]["content"] for item in voted} | set(prompts_from(Path(config.pool) if config.pool else POOL))
    words = {tuple(tokenizer.render([{"role": "user", "content": line}])): line for line in sorted(lines)}
    return [{"prompt": words[ids], "ids": ids} for ids in choose_prompts(voted, tokenizer, config, config.seed).practice]


def best_within(runs: Sequence[Run], method: str, at: str, budget: float) -> Run | None:
    """The policy of `method` that won most of those that a budget bought: stopped by it, or done before it was used."""
    spent = {"seconds": lambda run: run.seconds, "rollouts": lambda run: run.rollouts}[at]
    fit = [run for run in runs if run.method == method and (run.stop == at or (run.stop in COUNTS[at] and spent(run) <= budget))]
    return max(fit, key=lambda run: run.judged.win_rate, default=None)


def beside(mine: Run, theirs: Run, at: str) -> dict[str, Any]:
    """How far ours is ahead in gold win rate (paired by prompt, 95%)."""
    gain, half = paired_difference(mine.judged.points, theirs.judged.points, range(len(mine.judged.points)))
    return {"method": theirs.method, "at": at, "rate": theirs.rate, "stop": theirs.stop, "win_rate": round(theirs.judged.win_rate, 4),
            "kl": round(theirs.judged.kl, 3), "broken": round(theirs.judged.broken, 4), "ours": round(mine.judged.win_rate, 4), "ahead_by": round(gain, 4), "half_width": round(half, 4)}  # fmt: skip


def against_ppo(mine: Run, runs: Sequence[Run]) -> dict[str, float]:
    """Ours over the least that TRL's PPO took at any rate: seconds an update, and peak memory. Empty where one has none."""
    theirs = [run for run in runs if run.method == "ppo"]
    if not theirs or mine.update_s is None:
        return {}
    return {
        "update": round(mine.update_s / min(run.update_s for run in theirs if run.update_s), 3),
        "memory": round(mine.peak_bytes / min(run.peak_bytes for run in theirs), 3),
    }


def summary(best: Sequence[dict[str, Any]], ratios: Sequence[dict[str, float]], methods: Sequence[str]) -> dict[str, Any]:
    """Mean gains over all tastes and seeds, the median ratios, and which targets are met (what nobody measured is not)."""
    ahead: dict[str, dict[str, float]] = {}
    for row in best:
        these = [r["ahead_by"] for r in best if (r["method"], r["at"]) == (row["method"], row["at"])]
        ahead.setdefault(row["method"], {})[row["at"]] = round(statistics.fmean(these), 4)
    median = {name: statistics.median(found[name] for found in ratios if found) for name in TARGETS if any(ratios)}
    met = {name: name in median and median[name] <= limit for name, limit in TARGETS.items()}
    met["ahead_at_equal_time"] = all(ahead.get(method, {}).get("seconds", 0.0) > 0 for method in methods)
    return {"met": met, "ahead_by": ahead, "ratios": median}


def contend() -> None:
    """Be our contestant: what a round trains, on the votes of the request."""
    turns = Turns()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        while True:
            turns.say(**trained(turns.wait()))
    except Finished:
        pass


def trained(job: dict[str, Any]) -> dict[str, Any]:
    """Reward model and policy from the votes of `job`; the policy is left in `out`/POLICY. What it took."""
    config, path = LearnerConfig.from_dict(job["settings"]), Path(job["votes"])
    model, tokenizer = CausalModel.load(job["model"]), ChatTokenizer.load(job["model"])
    examples = examples_from_votes(rival.read_voted(path), tokenizer)
    practice = [prompt["ids"] for prompt in json.loads(path.read_text("utf-8"))["practice"]]
    torch.manual_seed(job["seed"])
    began = time.monotonic()
    reward, judges, report, may_train = train_reward(model, examples, config, job["seed"], lambda *_: None)
    reward_s = time.monotonic() - began
    if reward is None or not may_train:
        return {"seconds": reward_s, "rollouts": 0, "reward_s": reward_s, "update_s": None, "trained": False, "note": report["words"]}
    ppo = replace(config.ppo, kl_target=kl_warranted(config.ppo, len(examples)))  # as a round has it
    drawn, sample = [0], rollout.sample

    def counted(*args: Any, **kwargs: Any) -> rollout.Trajectories:
        batch = sample(*args, **kwargs)
        drawn[0] += len(batch)
        return batch

    rollout.sample = counted  # also the reference's, which are the unit of the score, and those by which the best state is told
    result = train_ppo(model, tokenizer, reward, prompts=practice, policy=POLICY, config=ppo, judges=judges, seed=job["seed"])
    seconds = time.monotonic() - began
    model.lora.save(POLICY, Path(job["out"]) / POLICY)
    updates = [row["seconds"] for row in result.history if "tokens_per_second" in row]  # those that learned
    return {
        "seconds": seconds, "rollouts": drawn[0], "reward_s": reward_s, "trained": True,
        "update_s": statistics.fmean(updates) if updates else None, "note": f"{report['verdict']}; {result.stopped}",
    }  # fmt: skip


if __name__ == "__main__":
    main()
