"""How many votes does it take to learn a taste? Rounds as the learner runs them, without a server between.

`python -m benchmarks.votes`. For each taste and seed: people of that taste (with noise, some of them voting at random
where asked) vote on 4 replies of the live version; at each number of votes the learner runs a round on all votes so far,
a version that passes its gate goes live, and the taste judges it against the base on held-out prompts. Share: its win
rate over what the taste's best of 8 base replies gets. Beside it: KL, broken replies, known answers, seconds a round.
Prints a line a round; JSON last. Exit status 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import json
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

from engine.engine import BASE, Engine, SamplingParams
from engine.sequence import Sequence as Reply
from learner import rollout
from learner.config import LearnerConfig
from learner.gate import load_probes, probe_answers, reply_kl
from learner.prompts import prompts_from
from learner.round import Learner
from learner.tastes import HARD, SIMPLE, Taste, favourite, taste_named, win_rate
from learner.text_checks import broken_rate
from server.settings import STARTER
from store.adapters import AdapterRegistry
from store.records import Comparison, Completion, Vote, VotedComparison
from store.rounds import RoundFiles

JUDGED = "judged"  # the adapter under which a version is judged
SAMPLES, BEST_OF, MAX_TOKENS = 4, 8, 256
TARGETS = {"share_at_60": 0.9, "share_at_150": 1.0, "worst_at_150": 0.85, "kl": 6.0, "broken_rise": 0.01, "probe_fall": 0.02, "round_s": 120.0}


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
    """One taste learned from scratch on one model: its votes, its live version, and how both are judged."""

    def __init__(self, learner: Learner, people: People, seed: int, held_out: Sequence[str]) -> None:
        self.learner, self.people, self.seed = learner, people, seed
        self.model, self.tokenizer = learner.model, learner.tokenizer
        self.engine = Engine(self.model, self.tokenizer, max_sequences=48, max_context=1024)
        self.draw, self.deck = random.Random(f"course/{seed}"), list[str]()
        self.voted: list[VotedComparison] = []
        self.live, self.rounds = BASE, 0
        self.held_out = held_out
        self.theirs = self.sample(held_out, SAMPLES, BASE, 1)
        best = self.sample(held_out, BEST_OF, BASE, 2)
        liked = [max((r.text for r in best[i : i + BEST_OF]), key=people.liking) for i in range(0, len(best), BEST_OF)]
        self.best_of = win_rate(people.liking, [text for text in liked for _ in range(SAMPLES)], [r.text for r in self.theirs])
        self.probes = load_probes()
        self.known = probe_answers(self.model, self.tokenizer, self.probes, None)

    def render(self, prompt: str) -> list[int]:
        return self.tokenizer.render([{"role": "user", "content": prompt}])

    def sample(self, prompts: Sequence[str], each: int, version: str, seed: int) -> list[Reply]:
        """`each` replies to every prompt, by a version whose adapter is loaded as JUDGED, or the base."""
        ids = [self.render(p) for p in prompts for _ in range(each)]
        how = [SamplingParams(max_tokens=MAX_TOKENS, seed=(self.seed * 1009 + seed) * 1_000_003 + i) for i in range(len(ids))]
        return self.engine.generate(ids, how, version)

    def load(self) -> str:
        """The live version's adapter, by the name it is sampled under."""
        if self.live == BASE:
            return BASE
        self.model.lora.load(JUDGED, self.learner.registry.path(self.live))
        return JUDGED

    def unload(self) -> None:
        if JUDGED in self.model.lora.names():
            self.model.lora.delete(JUDGED)

    def ask(self, votes: int, prompts: Sequence[str]) -> None:
        """People vote on replies of the live version until there are so many votes."""
        asked = []
        for _ in range(votes - len(self.voted)):
            self.deck = self.deck or self.draw.sample(list(prompts), len(prompts))
            asked.append(self.deck.pop())
        replies = self.sample(asked, SAMPLES, self.load(), 100 + len(self.voted))
        self.unload()
        self.voted += picks_on(self.people, asked, replies, SAMPLES, self.live, len(self.voted))

    def round(self) -> dict[str, Any]:
        """One round on all votes so far; a version that passes goes live. The round's record."""
        self.rounds += 1
        record = self.learner.run_round(self.rounds, self.voted, self.live, run_requested=0, report=lambda *_: None)
        if record["state"] == "published":
            self.live = record["version"]
        return record

    def judge(self) -> dict[str, Any]:
        """The live version by the people's own taste, and what it cost."""
        version = self.load()
        ours = self.sample(self.held_out, SAMPLES, version, 3)
        liking = self.people.liking
        won = win_rate(liking, [r.text for r in ours], [r.text for r in self.theirs])
        adapter = None if version == BASE else version
        batch = rollout.sample(
            self.engine, [self.render(p) for p in self.held_out], version=version, group=2, max_tokens=MAX_TOKENS, temperature=1.0, seed=1,
        )  # fmt: skip
        kl = 0.0 if adapter is None else float(reply_kl(self.model, batch, adapter, None, 1.0).mean())
        known = probe_answers(self.model, self.tokenizer, self.probes, adapter)
        self.unload()
        broken, base = (broken_rate((r.text, r.finish_reason) for r in replies) for replies in (ours, self.theirs))
        return {
            "live": self.live, "win_rate": round(won, 4), "best_of_8": round(self.best_of, 4), "share": round(won / self.best_of, 4),
            "kl": round(kl, 3), "broken": round(broken, 4), "base_broken": round(base, 4), "probe_accuracy": round(known.accuracy, 4),
            "base_probe_accuracy": round(self.known.accuracy, 4), "probe_loss_rise": round(known.loss - self.known.loss, 4),
        }  # fmt: skip


def course(taste: str, seed: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a number of votes."""
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
            row = {"taste": taste, "seed": seed, "votes": votes, "state": record["state"], "round_s": round(seconds, 1)} | run.judge()
            row |= {"accuracy": reward.get("accuracy"), "failed": gate.get("failed"), "reason": record["reason"]}
            row |= {"stopped": (record["ppo"] or {}).get("stopped"), "timings": record["timings"]}
            print(json.dumps(row), flush=True)
            rows.append(row)
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
    args = parser.parse_args(argv)
    rows = [row for taste in args.tastes for seed in args.seeds for row in course(taste, seed, args)]
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
