"""How many votes does it take to learn a taste? Rounds as the learner runs them, without a server between.

`python -m benchmarks.votes`. For each taste and seed: people of that taste (with noise, some of them voting at random
where asked) vote on 4 replies of the live version; at each number of votes the learner runs a round on all votes so far,
a version that passes its gate goes live, and the taste judges it against the base on held-out prompts. Share: its win
rate over what the taste's best of 8 base replies gets. Beside it: KL, broken replies, known answers, seconds a round.
Prints a line a round; JSON last. Exit status 1 when a target is missed. `--plot FILE` draws share against votes for each
taste, beside TRL's DPO (3 passes from the base, the best of three learning rates by the judge itself) on the same votes.
All of it takes hours: `--rows FILE` keeps every row, and courses that are whole there are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from benchmarks import rival
from benchmarks.charts import chart_file
from benchmarks.contest import ContestError, peer_python
from benchmarks.judge import SAMPLES, Judge
from engine.engine import BASE
from engine.sequence import Sequence as Reply
from learner.config import LearnerConfig
from learner.prompts import prompts_from
from learner.round import Learner
from learner.tastes import HARD, SIMPLE, Taste, favourite, taste_named
from server.settings import STARTER
from store.adapters import AdapterRegistry
from store.records import Comparison, Completion, Vote, VotedComparison
from store.rounds import RoundFiles

JUDGEMENT = ("win_rate", "best_of_8", "share", "kl", "broken", "base_broken", "probe_accuracy", "base_probe_accuracy", "probe_loss_rise")
TARGETS = {"share_at_60": 0.9, "share_at_150": 1.0, "worst_at_150": 0.85, "kl": 6.0, "broken_rise": 0.01, "probe_fall": 0.02, "round_s": 120.0}
NEAR, FAR = f"DPO, within {TARGETS['kl']:g} nats", "DPO, at any distance"


class People:
    """Voters of one taste; some may vote at random. What they say follows the seed."""

    def __init__(self, taste: Taste, *, noise: float, careless: float, seed: int, count: int = 5) -> None:
        self.liking, self.noise, self.draw = taste, noise, random.Random(f"people/{seed}")
        self.names = [f"voter-{i}" for i in range(count)]
        self.careless = set(self.names[: round(careless * count)])

    def vote(self, number: int, comparison: Comparison) -> VotedComparison:
        """The vote of one of them, in turn."""
        voter = self.names[number % len(self.names)]
        texts = [c.text for c in comparison.completions]
        pick = self.draw.randrange(len(texts)) if voter in self.careless else favourite(self.liking, texts, self.noise, self.draw)
        every = range(len(texts))
        groups = (tuple(every),) if pick is None else ((pick,), tuple(i for i in every if i != pick))
        vote = Vote(f"vote-{number}", number + 1, comparison.id, voter, "tie" if pick is None else "favourite", groups, None, None, 0.0)
        return VotedComparison(replace(comparison, voter=voter, votes=(vote,)), vote)


def picks_on(people: People, asked: Sequence[str], replies: Sequence[Reply], each: int, version: str, first: int = 0) -> list[VotedComparison]:
    """Their votes, the first being number `first`, on `each` replies of `version` to every prompt."""
    found = []
    for i, prompt in enumerate(asked):
        shown = tuple(
            Completion(k, r.text, tuple(r.token_ids), tuple(r.logprobs), version, str(r.finish_reason), r.params.seed or 0)
            for k, r in enumerate(replies[i * each : (i + 1) * each])
        )
        name = f"{first + i}"
        comparison = Comparison(name, name, "", ({"role": "user", "content": prompt},), {"temperature": 1.0}, 0.0, shown)
        found.append(people.vote(first + i, comparison))
    return found


class Course:
    """One taste learned from scratch on one model: its votes, its live version, and the judge of both."""

    def __init__(self, learner: Learner, people: People, seed: int, held_out: Sequence[str]) -> None:
        self.learner, self.people = learner, people
        self.judge = Judge(learner.model, learner.tokenizer, people.liking, held_out, seed)
        self.draw, self.deck = random.Random(f"course/{seed}"), list[str]()
        self.voted: list[VotedComparison] = []
        self.live, self.rounds = BASE, 0

    def adapter(self) -> Path | None:
        """Where the live version lies; None for the base."""
        return None if self.live == BASE else self.learner.registry.path(self.live)

    def ask(self, votes: int, prompts: Sequence[str]) -> None:
        """People vote on replies of the live version until there are so many votes."""
        asked = []
        for _ in range(votes - len(self.voted)):
            self.deck = self.deck or self.draw.sample(list(prompts), len(prompts))
            asked.append(self.deck.pop())
        replies = self.judge.sample(asked, SAMPLES, self.adapter(), 100 + len(self.voted))
        self.voted += picks_on(self.people, asked, replies, SAMPLES, self.live, len(self.voted))

    def round(self) -> dict[str, Any]:
        """One round on all votes so far; a version that passes goes live. The round's record."""
        self.rounds += 1
        record = self.learner.run_round(self.rounds, self.voted, self.live, run_requested=0, report=lambda *_: None)
        if record["state"] == "published":
            self.live = record["version"]
        return record

    def standing(self) -> dict[str, Any]:
        """The live version by the people's own taste, and what it cost."""
        row = self.judge.judge(self.adapter()).row()
        return {"live": self.live} | {name: row[name] for name in JUDGEMENT}

    def dpo(self, peer: Path, folder: Path, threads: int) -> list[dict[str, Any]]:
        """TRL's DPO from the base on the same votes, judged alike; a row a learning rate."""
        votes = rival.write_votes(folder / "votes.json", self.voted, [])
        task = rival.job(self.learner.model.source, votes, self.learner.config.ppo, seed=self.judge.seed, stops={"passes": rival.DPO_PASSES})
        rows = []
        for rate in rival.RATES:
            answer = rival.run_peer(peer, "dpo", rate, task, folder / rate, threads)
            row = self.judge.judge(folder / rate / "passes").row()
            rows.append({"rate": rate, "seconds": round(answer["seconds"], 1)} | {name: row[name] for name in JUDGEMENT})
        return rows


def kept(file: Path | None, wanted: dict[str, Any], votes: Sequence[int]) -> list[dict[str, Any]]:
    """The newest rows of `file` that say what `wanted` says, one for each of `votes`; none where one is missing."""
    if file is None or not file.exists():
        return []
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    found = {row["votes"]: row for row in rows if wanted.items() <= row.items()}
    return [found[n] for n in votes] if found.keys() >= set(votes) else []


def course(taste: str, seed: int, peer: Path | None, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a number of votes. peer: the interpreter with TRL, where DPO shall learn beside us. Raises ContestError."""
    asked = {"taste": taste, "seed": seed, "noise": args.noise, "careless": args.careless, "threads": args.threads, "set": args.set}
    asked |= {"held_out": args.held_out, "model": Path(args.model).name}
    if (known := kept(args.rows, asked, args.votes)) and (peer is None or all("dpo" in row for row in known)):
        return known
    config = LearnerConfig().override({"seed": str(seed), "threads": str(args.threads)} | dict(s.split("=", 1) for s in args.set))
    held_out = random.Random(seed).sample(prompts_from(held_out=True), args.held_out)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        learner = Learner.load(args.model, config, RoundFiles(Path(folder) / "rounds"), AdapterRegistry(Path(folder) / "adapters"))
        people = People(taste_named(taste), noise=args.noise, careless=args.careless, seed=seed)
        run = Course(learner, people, seed, held_out)
        for votes in args.votes:
            run.ask(votes, prompts_from())
            began = time.monotonic()
            record = run.round()
            seconds = time.monotonic() - began
            reward, gate = record["reward"] or {}, record["gate"] or {}
            row = asked | {"votes": votes, "state": record["state"], "round_s": round(seconds, 1)} | run.standing()
            row |= {"accuracy": reward.get("accuracy"), "failed": gate.get("failed"), "reason": record["reason"]}
            row |= {"stopped": (record["ppo"] or {}).get("stopped"), "timings": record["timings"]}
            if peer is not None:
                row["dpo"] = run.dpo(peer, Path(folder) / f"dpo-{votes}", args.threads)
            print(json.dumps(row), flush=True)
            rows.append(row)
            if args.rows is not None:
                with args.rows.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    return rows


def votes_for(rows: Sequence[dict[str, Any]], share: float) -> float | None:
    """Votes at which the line through the rows of one course first reaches `share`, from share 0.5 / best of 8 at none."""
    before, low = 0.0, 0.5 / rows[0]["best_of_8"]
    for row in rows:
        if row["share"] >= share:
            return before + (row["votes"] - before) * max(0.0, share - low) / max(1e-9, row["share"] - low)
        before, low = row["votes"], row["share"]
    return None


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over tastes and seeds at each number of votes, and the votes each taste needed for a share of 0.9."""
    at: dict[str, Any] = {}
    for votes in sorted({row["votes"] for row in rows}):
        these = [row for row in rows if row["votes"] == votes]
        at[str(votes)] = {
            "median_share": statistics.median(row["share"] for row in these), "worst_share": min(row["share"] for row in these),
            "largest_kl": max(row["kl"] for row in these), "largest_broken_rise": max(row["broken"] - row["base_broken"] for row in these),
            "mean_broken_rise": statistics.fmean(row["broken"] - row["base_broken"] for row in these),
            "largest_probe_fall": max(row["base_probe_accuracy"] - row["probe_accuracy"] for row in these),
            "median_round_s": statistics.median(row["round_s"] for row in these),
        }  # fmt: skip
    needed: dict[str, list[float | None]] = {}
    for taste, seed in dict.fromkeys((row["taste"], row["seed"]) for row in rows):
        needed.setdefault(taste, []).append(votes_for([r for r in rows if (r["taste"], r["seed"]) == (taste, seed)], 0.9))
    return {"at": at, "votes_for_0.9": needed}


def lines(rows: Sequence[dict[str, Any]]) -> dict[str, list[tuple[int, float, float]]]:
    """One taste's {who: [(votes, share, KL)]}, medians over its seeds, from the base at 0 votes on.

    Of DPO's learning rates the best by the judge itself in each round: of those within the target's nats (the base where none is), and of all.
    """

    def best(row: dict[str, Any], nats: float) -> dict[str, Any]:
        return max([{"share": 0.5 / row["best_of_8"], "kl": 0.0}, *(one for one in row["dpo"] if one["kl"] <= nats)], key=lambda one: one["share"]) | {"votes": row["votes"]}

    beside = [row for row in rows if "dpo" in row]
    return {
        who: [(0, statistics.median(0.5 / row["best_of_8"] for row in rows), 0.0)] + [
            (votes, *(statistics.median(row[name] for row in own if row["votes"] == votes) for name in ("share", "kl")))
            for votes in sorted({row["votes"] for row in own})
        ]
        for who, own in (("Plaudit", rows), (NEAR, [best(row, TARGETS["kl"]) for row in beside]), (FAR, [best(row, math.inf) for row in beside]))
    }  # fmt: skip


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Share against votes, a panel a taste; hollow where KL is over the target."""
    from matplotlib.figure import Figure

    tastes = list(dict.fromkeys(row["taste"] for row in rows))
    across = min(4, len(tastes))
    figure = Figure(figsize=(3.2 * across, 2.8 * -(-len(tastes) // across)), layout="constrained")
    shared = None  # one scale for all, so that panels can be compared
    for number, taste in enumerate(tastes, 1):
        panel = shared = figure.add_subplot(-(-len(tastes) // across), across, number, sharey=shared)
        panel.axhline(TARGETS["share_at_60"], color="0.8", linewidth=1)
        found = lines([row for row in rows if row["taste"] == taste])
        for who, colour, style in (("Plaudit", "C0", "-"), (NEAR, "C1", "-"), (FAR, "C1", ":")):
            points = found[who]
            panel.plot([p[0] for p in points], [p[1] for p in points], color=colour, linestyle=style, label=who)
            panel.scatter([p[0] for p in points], [p[1] for p in points], edgecolors=colour, zorder=3,
                          c=[colour if p[2] <= TARGETS["kl"] else "white" for p in points])  # fmt: skip
        panel.set(title=taste, xlabel="votes", ylabel="share of best of 8")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), title=f"hollow: over {TARGETS['kl']:g} nats", loc="outside upper center", ncols=3)
    figure.savefig(file, dpi=120)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tastes", nargs="+", default=[*SIMPLE, *HARD])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--votes", nargs="+", type=int, default=[30, 60, 100, 150], help="numbers of votes at which a round is run")
    parser.add_argument("--noise", type=float, default=0.1, help="share of votes for any other reply than the favourite")
    parser.add_argument("--careless", type=float, default=0.0, help="share of the five voters who vote at random")
    parser.add_argument("--held-out", type=int, default=100, help="prompts that the taste judges on")
    parser.add_argument("--model", default=str(STARTER))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the learner, e.g. ppo.updates=10")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="keep the rows here; courses that are whole in it are taken from it")
    parser.add_argument("--plot", type=chart_file, metavar="FILE", help="draw share against votes beside TRL's DPO; needs `make peers`")
    parser.add_argument("--peers-python", type=Path, help="interpreter with TRL; default PLAUDIT_PEERS, else what `make peers` built")
    args = parser.parse_args(argv)
    try:
        peer = peer_python(args.peers_python) if args.plot else None
        rows = [row for taste in args.tastes for seed in args.seeds for row in course(taste, seed, peer, args)]
    except ContestError as error:
        raise SystemExit(str(error)) from None
    if args.plot:
        draw(rows, args.plot)
    found = summary(rows)
    met = {"kl": all(row["kl"] <= TARGETS["kl"] for row in rows)}
    met["broken"] = all(at["mean_broken_rise"] <= TARGETS["broken_rise"] for at in found["at"].values())
    met["probes"] = all(at["largest_probe_fall"] <= TARGETS["probe_fall"] for at in found["at"].values())
    met["round"] = all(at["median_round_s"] <= TARGETS["round_s"] for at in found["at"].values())
    if sixty := found["at"].get("60"):
        met["share_at_60"] = sixty["median_share"] >= TARGETS["share_at_60"]
    if most := found["at"].get("150"):
        met["share_at_150"] = most["median_share"] >= TARGETS["share_at_150"] and most["worst_share"] >= TARGETS["worst_at_150"]
    machine = {"cpus": os.cpu_count(), "torch": torch.__version__, "threads": args.threads}
    print(json.dumps({"noise": args.noise, "careless": args.careless, "targets": TARGETS, "met": met, "machine": machine, **found, "rows": rows}))
    return 0 if all(met.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
