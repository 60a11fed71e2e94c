"""From the same votes to a policy: ours against TRL's PPO, RLOO, OnlineDPO and DPO, at equal time and at equal rollouts.

`make peers`, then `python -m benchmarks.peers [--taste friendly] [--votes 60]`. A known taste votes (with noise) on replies
of the base model; the votes are kept in a file that every side reads. Ours is a round's reward model and PPO with the
shipped settings; its wall clock and its number of rollouts become the peers' budgets. Peers train with LoRA of our rank,
each at two learning rates, of which the better (by the gold judge itself, and for each budget anew) is reported; what else
they are given is in `benchmarks/peer/policies.py`. One contestant after the other, each in a process of its own.

The judge is the taste: win rate against base on held-out prompts, by our engine with the adapter each side saved, beside
the nats a reply from base, the share of broken replies and what the taste's best of 8 base replies wins. JSON last; exit
status 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.contest import Contestant, ContestError, Finished, Turns, peer_python
from benchmarks.votes import Votes, collect

METHODS = ("ppo", "rloo", "online_dpo", "dpo")
RATES = {"low": 1e-4, "high": 1e-3}  # TRL's defaults are 1e-6 to 3e-6 for full models; LoRA takes 10 to 100 times as much
TARGETS = {"update": 0.5, "memory": 0.5}  # ours over TRL's PPO
OURS = "ours"


@dataclass(frozen=True)
class Judged:
    """What the taste says of a policy. points: (prompts,) share of its replies that are liked better than base's."""

    win_rate: float
    low: float
    high: float
    kl: float
    broken: float
    length: float
    points: tuple[float, ...]


def main() -> None:
    """Run the benchmark, or be its own contestant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--taste", default="friendly", help="of learner/tastes.py")
    parser.add_argument("--votes", type=int, default=60)
    parser.add_argument("--noise", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", type=int, default=100, help="prompts that the judge asks")
    parser.add_argument("--samples", type=int, default=4, help="replies a prompt that the judge reads")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rates", nargs="+", choices=list(RATES), default=list(RATES))
    parser.add_argument("--model", default="", help="default the bundled starter model")
    parser.add_argument("--keep", type=Path, default=Path("tmp/peers"), help="votes, adapters and logs; votes there are used again")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of our learner, e.g. ppo.updates=4")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ours", action="store_true", help=argparse.SUPPRESS)  # be the contestant
    args = parser.parse_args()
    if args.ours:
        contend()
        return
    try:
        report = measure(peer_python(), args)
    except ContestError as error:
        raise SystemExit(str(error)) from None
    print(json.dumps({"benchmark": "peers", "targets": TARGETS, "rates": RATES, "cpus": os.cpu_count(), "threads": args.threads, **report}))
    raise SystemExit(0 if report["met"] else 1)


def measure(peer: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Votes, ours, every peer at every rate, the judge; the report."""
    import torch

    from learner.config import LearnerConfig

    torch.set_num_threads(args.threads)
    judge = Judge(args)
    directory = (args.keep / f"{args.taste.replace(':', '-')}-{args.votes}-{args.noise:g}-{args.seed}").absolute()
    directory.mkdir(parents=True, exist_ok=True)
    votes_file = judge.votes_file(directory / "votes.json", args)
    ppo = LearnerConfig().override(dict(setting.split("=", 1) for setting in args.set)).ppo
    job = {"model": judge.source, "votes": str(votes_file), "seed": args.seed, "settings": args.set,
           "update_rollouts": ppo.prompts_per_update * ppo.replies_per_prompt, "replies_per_prompt": ppo.replies_per_prompt,
           "max_new_tokens": ppo.max_new_tokens, "lora_r": ppo.lora_r, "lora_alpha": ppo.lora_alpha}  # fmt: skip

    answer = contest(OURS, [sys.executable, "-m", "benchmarks.peers", "--ours"], job | {"out": str(directory / OURS)}, args.threads)
    budget = {"budget_s": answer["total_s"], "rollouts": answer["rollouts"]}
    mine = judge.judge(OURS, directory / OURS / "policy" if answer["trained"] else None)
    rows = [row_of(OURS, "", "both", answer, mine)]
    shown(rows[-1])
    print(f"budgets: {budget['budget_s']:.0f} s, {budget['rollouts']} rollouts; best of 8 base replies wins {judge.best_of:.3f}", flush=True)
    judged: dict[tuple[str, str, str], Judged] = {}
    for method in args.methods:
        for rate in args.rates:
            out = directory / f"{method}-{rate}"
            task = job | budget | {"method": method, "lr": RATES[rate], "out": str(out)}
            answer = contest(f"{method}-{rate}", [peer, "-m", "benchmarks.peer.policies"], task, args.threads)
            for at in ("time", "rollouts"):
                judged[method, rate, at] = judge.judge(f"{method}-{rate}-{at}", out / at)
                rows.append(row_of(method, rate, at, answer, judged[method, rate, at]))
                shown(rows[-1])
    best = [better(rows, judged, mine, method, at) for method in args.methods for at in ("time", "rollouts")]
    ratios = against_ppo(rows)
    ahead = all(row["win_rate"] < mine.win_rate for row in best if row["at"] == "time")
    met = ahead and all(ratios[name] <= TARGETS[name] for name in ratios)
    for row in best:
        print(f"{row['method']:<11} at equal {row['at']:<9} {row['win_rate']:.3f} (rate {row['rate']}); ours is ahead by "
              f"{row['behind']:+.3f} +- {row['half_width']:.3f}", flush=True)  # fmt: skip
    said = {"taste": args.taste, "votes": args.votes, "noise": args.noise, "seed": args.seed, "model": Path(judge.source).name,
            "held_out": len(judge.prompts), "best_of_8": judge.best_of, "base_broken": judge.base_broken, "base_length": judge.base_length}  # fmt: skip
    return said | budget | {"met": met, "ahead_at_equal_time": ahead, "ratios": ratios, "best": best, "rows": rows}


def contest(name: str, command: Sequence[str | Path], job: dict[str, Any], threads: int) -> dict[str, Any]:
    """One contestant's whole run, in a process of its own."""
    out = Path(job["out"])
    out.mkdir(parents=True, exist_ok=True)
    with Contestant(name, command, out / "log.txt", threads=threads) as contestant:
        return contestant.turn(**job)


def row_of(method: str, rate: str, at: str, answer: dict[str, Any], judged: Judged) -> dict[str, Any]:
    """One line of the report. at: "time" or "rollouts", which budget it was stopped by."""
    figures = {name: value if name == "points" else round(value, 4) for name, value in asdict(judged).items()}
    del figures["points"]
    stopped = answer.get("saved", {}).get(at, {"seconds": answer.get("total_s"), "rollouts": answer.get("rollouts")})
    return {"method": method, "rate": rate, "at": at, **figures, "seconds": stopped["seconds"], "rollouts": stopped["rollouts"],
            "reward_s": answer["reward_s"], "update_s": answer["update_s"], "peak_bytes": answer["peak_bytes"],
            **({"note": answer["note"]} if answer.get("note") else {})}  # fmt: skip


def shown(row: dict[str, Any]) -> None:
    """One line for a person."""
    update = f"{row['update_s']:.2f} s" if row["update_s"] else "-"
    print(f"{row['method']:<11}{row['rate']:<5} {row['at']:<9} wins {row['win_rate']:.3f} ({row['low']:.3f} to {row['high']:.3f}) "
          f"KL {row['kl']:6.2f} broken {row['broken']:.3f} length {row['length']:5.1f} | {row['seconds']:.0f} s, {row['rollouts']:.0f} rollouts, "
          f"an update {update}, {row['peak_bytes'] / 1e9:.2f} GB {row.get('note', '')}", flush=True)  # fmt: skip


def better(rows: Sequence[dict[str, Any]], judged: dict[tuple[str, str, str], Judged], mine: Judged, method: str, at: str) -> dict[str, Any]:
    """The learning rate at which `method` won most, and how far it is behind ours (paired by prompt, 95%)."""
    from learner.metrics import paired_difference

    row = max((row for row in rows if row["method"] == method and row["at"] == at), key=lambda row: row["win_rate"])
    theirs = judged[method, row["rate"], at]
    gain, half = paired_difference(mine.points, theirs.points, range(len(mine.points)))
    return {name: row[name] for name in ("method", "rate", "at", "win_rate", "kl", "broken")} | {
        "behind": round(gain, 4), "half_width": round(half, 4) if math.isfinite(half) else None
    }


def against_ppo(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Ours over TRL's PPO, the most favourable of its runs: seconds an update of as many rollouts, and peak memory."""
    ours, theirs = rows[0], [row for row in rows if row["method"] == "ppo"]
    if not theirs or not ours["update_s"]:
        return {}
    return {
        "update": round(ours["update_s"] / min(row["update_s"] for row in theirs), 3),
        "memory": round(ours["peak_bytes"] / min(row["peak_bytes"] for row in theirs), 3),
    }


class Judge:
    """The taste and the base's replies that it compares with; also the only one who samples the votes."""

    def __init__(self, args: argparse.Namespace) -> None:
        from engine.engine import BASE, Engine
        from engine.model import CausalModel
        from engine.tokenizer import ChatTokenizer
        from learner.simulate import prompts_from
        from learner.tastes import taste_named, win_rate
        from learner.text_checks import broken_rate
        from server.settings import STARTER

        self.source = args.model or str(STARTER)
        self.model, self.tokenizer = CausalModel.load(self.source), ChatTokenizer.load(self.source)
        self.taste, self.seed, self.samples = taste_named(args.taste), args.seed, args.samples
        held_out = prompts_from(held_out=True)
        self.prompts = random.Random(args.seed).sample(held_out, min(args.held_out, len(held_out)))
        self.ids = [self.tokenizer.render([{"role": "user", "content": p}]) for p in self.prompts]
        self.engine = Engine(self.model, self.tokenizer, max_sequences=32, max_context=min(self.model.max_context, max(map(len, self.ids)) + 256))
        base = self.sample(BASE, self.samples, 1)
        self.base = base.texts
        self.base_broken, self.base_length = broken_rate(zip(base.texts, base.finish_reasons, strict=True)), float(base.lengths.float().mean())
        eight = self.sample(BASE, 8, 2).texts
        best = [max(eight[8 * i : 8 * i + 8], key=self.taste) for i in range(len(self.prompts)) for _ in range(self.samples)]
        self.best_of = win_rate(self.taste, best, self.base)

    def sample(self, version: str, group: int, stream: int) -> Any:
        """`group` replies to each held-out prompt."""
        from learner import rollout

        return rollout.sample(self.engine, self.ids, version=version, group=group, max_tokens=256, temperature=1.0, seed=(self.seed * 10 + stream) * 1_000_003)

    def votes_file(self, path: Path, args: argparse.Namespace) -> Path:
        """The votes: those kept at `path` where they are of this base and this run, else new ones."""
        from engine.engine import Engine
        from learner.round import POOL
        from learner.simulate import prompts_from

        if path.exists():
            kept = Votes.load(path)
            if kept.base_digest == self.model.digest and len(kept.votes) == args.votes:
                return path
        prompts, pool = prompts_from(), [line.strip() for line in POOL.read_text("utf-8").splitlines() if line.strip()]
        longest = max(len(self.tokenizer.render([{"role": "user", "content": p}])) for p in prompts)
        engine = Engine(self.model, self.tokenizer, max_sequences=32, max_context=min(self.model.max_context, longest + 256))
        collect(engine, args.taste, prompts, pool, votes=args.votes, noise=args.noise, seed=args.seed).save(path)
        return path

    def judge(self, name: str, adapter: Path | None) -> Judged:
        """Judge the policy saved at `adapter` (PEFT); None is the base itself."""
        from engine.engine import BASE
        from learner.gate import reply_kl
        from learner.metrics import clustered_accuracy
        from learner.text_checks import broken_rate

        version = BASE if adapter is None else name
        if adapter is not None:
            self.model.lora.load(name, adapter)
        batch = self.sample(version, self.samples, 3)
        points = [
            (self.taste(a) > self.taste(b)) + 0.5 * (self.taste(a) == self.taste(b)) for a, b in zip(batch.texts, self.base, strict=True)
        ]
        by_prompt = [sum(points[i : i + self.samples]) / self.samples for i in range(0, len(points), self.samples)]
        share = clustered_accuracy(by_prompt)
        kl = 0.0 if adapter is None else float(reply_kl(self.model, batch, name, None, 1.0).mean())
        if adapter is not None:
            self.model.lora.delete(name)
        return Judged(
            share.value, share.low, share.high, kl, broken_rate(zip(batch.texts, batch.finish_reasons, strict=True)),
            float(batch.lengths.float().mean()), tuple(by_prompt),
        )  # fmt: skip


def contend() -> None:
    """Be our contestant: a round's reward model and PPO on the votes of the request."""
    import torch

    turns = Turns()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        while True:
            turns.say(**run(turns.wait()))
    except Finished:
        pass


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Train on the votes and save the policy under `out`/policy; what it took."""
    from engine.model import CausalModel
    from engine.tokenizer import ChatTokenizer
    from learner.config import LearnerConfig
    from learner.ppo import train_ppo
    from learner.round import train_reward

    config = LearnerConfig().override(dict(setting.split("=", 1) for setting in job["settings"]))
    votes = Votes.load(Path(job["votes"]))
    model, tokenizer = CausalModel.load(job["model"]), ChatTokenizer.load(job["model"])
    began = time.monotonic()
    reward, judges, report, may_train = train_reward(model, votes.examples(), config, job["seed"], lambda *_: None)
    reward_s = time.monotonic() - began
    if reward is None or not may_train:
        return {"total_s": reward_s, "reward_s": reward_s, "update_s": None, "rollouts": 0, "trained": False, "note": report["words"]}
    result = train_ppo(
        model, tokenizer, reward, prompts=votes.practice_ids, policy="policy", config=config.ppo, judges=judges, seed=job["seed"]
    )
    total = time.monotonic() - began
    model.lora.save("policy", Path(job["out"]) / "policy")
    rounds = len(result.history) + 1  # batches sampled: every update's, the last measurement's, and the unit of the score
    return {
        "total_s": total, "reward_s": reward_s, "update_s": (total - reward_s) / max(1, len(result.history) - 1), "trained": True,
        "rollouts": rounds * job["update_rollouts"], "kept_update": result.kept_update, "note": f"{report['verdict']}; {result.stopped}",
    }  # fmt: skip


if __name__ == "__main__":
    main()
