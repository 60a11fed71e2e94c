"""What things cost as there is more of them: is any curve worse than a straight line?

`python -m benchmarks.growth [--quick] [--votes 1000 10000 100000 1000000] [--plot FILE]`. On the starter model: decoding time
against people at once, the time of a decode step against the tokens before it, the time of a whole round and of the reward
training in it against votes (the cap on votes included), and each call of the store against the votes it holds (bulk inserts
into the store's own schema; medians of warm calls, without waiting for the disk: see `http_votes` for that).

Each curve gets an exponent b of cost ~ size^b: the slope of the least-squares line through (log size, log cost), once over
all sizes and once over the upper half of them (three at least), the larger of both; so that a floor at small sizes does not
hide what comes after it. `met`: b <= 1.1, and b <= 0.3 where the cost should not depend on the size at all; and a round on 200
votes in three minutes. `--plot` draws the curves and needs matplotlib. JSON last; exit status 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch

from benchmarks.charts import chart_file
from benchmarks.filling import fill
from benchmarks.votes import Course, People
from engine.engine import BASE, Engine, SamplingParams
from engine.model import CausalModel
from engine.tokenizer import ChatTokenizer
from learner.config import LearnerConfig
from learner.prompts import prompts_from
from learner.round import Learner
from learner.tastes import taste_named
from server.settings import STARTER
from store.adapters import AdapterRegistry
from store.records import Completion, NewComparison, VotedComparison
from store.rounds import RoundFiles
from store.store import Store

TARGETS = {"linear": 1.1, "flat": 0.3}  # exponents, at most
ROUND = (200, 180.0)  # votes, seconds at most
DISTINCT, TASTE = 400, "friendly"
NEW, PROMPT, REPLIES = 32, 64, 4


@dataclass(frozen=True)
class Curve:
    """Cost against size. kind: "linear" or "flat", what it may be at most."""

    name: str
    sizes: list[int]
    seconds: list[float]
    kind: str = "linear"
    unit: str = ""

    @property
    def exponent(self) -> float:
        """As the module says."""
        return exponent(self.sizes, self.seconds)

    @property
    def met(self) -> bool:
        return self.exponent <= TARGETS[self.kind]

    def row(self) -> dict[str, Any]:
        """For the report."""
        milliseconds = [round(1000 * s, 4) for s in self.seconds]
        return {"sizes": self.sizes, "ms": milliseconds, "unit": self.unit, "exponent": round(self.exponent, 3), "limit": TARGETS[self.kind], "met": self.met}


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """b of cost ~ size^b: the steeper of the least-squares lines through all points and through the upper half, in logs."""

    def slope(start: int) -> float:
        return float(np.polyfit(np.log(sizes[start:]), np.log(costs[start:]), 1)[0])

    return max(slope(0), slope(max(0, min(len(sizes) // 2, len(sizes) - 3))))


def timed(call: Callable[[], Any], times: int) -> float:
    """Median seconds of a call, after one that is not counted."""
    call()
    took = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def ids(draw: random.Random, count: int, vocab: int) -> list[int]:
    """Random token ids that have text."""
    return [draw.randrange(4, vocab) for _ in range(count)]


# --------------------------------------------------------------------------------------------------------- the engine


def concurrency(model: CausalModel, tokenizer: ChatTokenizer, people: Sequence[int], repeats: int) -> Curve:
    """Seconds until so many people at once have NEW tokens each."""
    draw, engine = random.Random(0), Engine(model, tokenizer, max_sequences=max(people), max_context=PROMPT + NEW)

    def all_of(count: int) -> None:
        for i in range(count):
            engine.add(ids(draw, PROMPT, model.vocab_size), [SamplingParams(max_tokens=NEW, seed=i, ignore_eos=True)], ["base"])
        while engine.has_work():
            engine.step()

    seconds = [timed(lambda: all_of(count), repeats) for count in people]  # noqa: B023
    for count, s in zip(people, seconds, strict=True):
        print(f"{count:8} people at once   {s * 1000:10.1f} ms   {count * NEW / s:8.0f} tokens/s", flush=True)
    return Curve("decoding against people at once", list(people), seconds, unit="people")


def context(model: CausalModel, tokenizer: ChatTokenizer, lengths: Sequence[int]) -> Curve:
    """Median seconds of a decode step of REPLIES replies behind so many tokens."""
    draw, engine = random.Random(0), Engine(model, tokenizer, max_sequences=REPLIES, max_context=max(lengths))
    seconds = []
    for length in lengths:
        params = [SamplingParams(max_tokens=NEW, seed=i, ignore_eos=True) for i in range(REPLIES)]
        engine.add(ids(draw, length - NEW, model.vocab_size), params, ["base"] * REPLIES)
        while not engine.scheduler.running:
            engine.step()
        steps = []
        while engine.has_work():
            began = time.perf_counter()
            engine.step()
            steps.append(time.perf_counter() - began)
        seconds.append(statistics.median(steps))
        print(f"{length:8} tokens before   {seconds[-1] * 1000:10.2f} ms a step", flush=True)
    return Curve("decode step against context", list(lengths), seconds, unit="tokens")


# -------------------------------------------------------------------------------------------------------- the learner


def rounds(source: str, counts: Sequence[int], config: LearnerConfig) -> list[Curve]:
    """Seconds of a whole round from the base on so many votes of one taste, and of its reward training; nothing is kept from round to round.

    Real replies to the bundled prompts; past `DISTINCT` comparisons more people vote on the same ones.
    """
    whole, training = [], []
    with tempfile.TemporaryDirectory(prefix="plaudit-bench-") as folder:
        learner = Learner.load(source, config, RoundFiles(Path(folder) / "rounds"), AdapterRegistry(Path(folder) / "adapters"))
        course = Course(learner, People(taste_named(TASTE), noise=0.1, careless=0.0, seed=0), 0, prompts_from(held_out=True)[:4])
        course.ask(min(DISTINCT, max(counts)), prompts_from())
        for n, count in enumerate(counts, 1):
            learner.features.clear()
            learner.facts.clear()
            began = time.perf_counter()
            record = learner.run_round(n, by_more_people(course.voted, count), BASE, run_requested=0, report=lambda *_: None)
            whole.append(time.perf_counter() - began)
            if record["state"] not in ("published", "rejected"):
                raise SystemExit(f"the round on {count} votes ended early, so its time says nothing: {record['state']}, {record['reason']}")
            training.append(record["timings"]["reward_s"])
            print(f"{count:8} votes          {whole[-1]:10.2f} s   ({record['reward']['votes_used']} used, reward training {training[-1]:.2f} s, {record['state']})", flush=True)
    return [Curve("whole round against votes", list(counts), whole, unit="votes"), Curve("reward training against votes", list(counts), training, unit="votes")]


def by_more_people(voted: Sequence[VotedComparison], count: int) -> list[VotedComparison]:
    """`count` votes: those of `voted`, then the same by others."""
    found = []
    for i in range(count):
        again, item = i // len(voted), voted[i % len(voted)]
        found.append(replace(item, vote=replace(item.vote, id=f"vote-{i}", seq=i + 1, voter=f"{item.vote.voter}-{again}")))
    return found


# ---------------------------------------------------------------------------------------------------------- the store


def store_calls(counts: Sequence[int], times: int) -> list[Curve]:
    """Seconds of each call of a store that holds so many votes."""
    voters = [f"voter-{i}" for i in range(10)]
    took: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="plaudit-bench-") as folder, Store.open(folder) as store:
        store.db.execute("pragma synchronous = off")  # how long the disk takes depends on its mood and not on the votes held
        held, draw = 0, random.Random(0)
        for count in counts:
            began = time.perf_counter()
            fill(store, held, count - held, voters, voted=True)
            held = count
            print(f"{count:8} votes          {time.perf_counter() - began:10.1f} s to fill", flush=True)
            for (name, kind), call in calls(store, held, draw).items():
                took.setdefault((name, kind), []).append(timed(call, times))
                print(f"{'':8} {name:<44} {took[name, kind][-1] * 1000:10.3f} ms", flush=True)
    return [Curve(f"store: {name}", list(counts), seconds, kind, "votes") for (name, kind), seconds in took.items()]


def calls(store: Store, held: int, draw: random.Random) -> dict[tuple[str, str], Callable[[], Any]]:
    """The store's calls that the server and the learner make, and how each may grow with the votes held."""

    def any_comparison() -> str:
        return f"cmp_{draw.randrange(held)}"

    def vote() -> None:
        number = draw.randrange(held)
        store.record_vote(f"cmp_{number}", f"voter-{number % 10}", groups=[[0], [1]], kind="favourite")

    def chat() -> None:
        number = f"{held}-{draw.getrandbits(64)}"
        replies = tuple(Completion(i, "A reply.", tuple(range(12)), (-1.0,) * 12, "base", "stop", 0) for i in range(2))
        store.record_comparison(NewComparison(f"cmp-{number}", f"conv-{number}", "voter-1", ({"role": "user", "content": "Hello"},), {}, replies))

    newest_seq = store.vote_counts().last_seq
    return {
        ("vote", "flat"): vote,
        ("record a comparison", "flat"): chat,
        ("one comparison", "flat"): lambda: store.comparison(any_comparison()),
        ("one voter's conversations, newest 50", "flat"): lambda: store.conversations("voter-7"),
        ("everybody's conversations, newest 50", "flat"): lambda: store.conversations(),
        ("votes since the last 16 (learner, each second)", "flat"): lambda: store.standing_votes(since_seq=newest_seq - 16),
        ("vote counts (status of every page)", "flat"): store.vote_counts,
        ("counts (operator's page)", "flat"): store.counts,
        ("the newest 200 votes, whole", "flat"): lambda: store.voted_comparisons(since_seq=newest_seq - 200, limit=200),
    }


def draw_curves(curves: Sequence[Curve], file: Path) -> None:
    """Cost against size, both in logs: a panel for each kind of size, the straight line through the first point in grey."""
    from matplotlib.figure import Figure

    panels: dict[str, list[Curve]] = {}
    for curve in curves:
        panels.setdefault("store" if curve.name.startswith("store") else curve.name, []).append(curve)
    crowded = "store" in panels  # the last one: its legend has a place of its own
    across = min(3, len(panels) + crowded)
    down = -(-(len(panels) + crowded) // across)
    figure = Figure(figsize=(4.4 * across, 3.6 * down), layout="constrained")
    for number, (title, own) in enumerate(panels.items(), 1):
        panel = figure.add_subplot(down, across, number)
        for curve in own:
            panel.loglog(curve.sizes, [1000 * s for s in curve.seconds], marker="o", label=f"{curve.name.removeprefix('store: ')} ({curve.exponent:.2f})")
        first = own[0]
        panel.loglog(first.sizes, [1000 * first.seconds[0] * n / first.sizes[0] for n in first.sizes], color="0.8", linestyle="--", zorder=0)
        panel.set(title=title, xlabel=first.unit, ylabel="ms")
        if title == "store":
            beside = figure.add_subplot(down, across, number + 1)
            beside.axis("off")
            beside.legend(*panel.get_legend_handles_labels(), loc="center left", fontsize="small", title="exponent in brackets")
        else:
            panel.legend(fontsize="x-small")
    figure.savefig(file, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller sizes")
    parser.add_argument("--votes", nargs="+", type=int, default=[1_000, 10_000, 100_000, 1_000_000], help="that the store holds; a million take 2 GB of disk")
    parser.add_argument("--parts", nargs="+", choices=["engine", "round", "store"], default=["engine", "round", "store"])
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves the choice to it")
    parser.add_argument("--model", default=str(STARTER))
    parser.add_argument("--plot", type=chart_file, metavar="FILE", help="draw the curves")
    args = parser.parse_args(argv)
    if sorted(set(args.votes)) != args.votes or len(args.votes) < 3:
        raise SystemExit("--votes takes three or more numbers, each larger than the one before")
    if args.threads:
        torch.set_num_threads(args.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    curves: list[Curve] = []
    if "engine" in args.parts:
        model, tokenizer = CausalModel.load(args.model), ChatTokenizer.load(args.model)
        people = [1, 4, 16] if args.quick else [1, 2, 4, 8, 16, 32, 64]
        lengths = [64, 256, 1024] if args.quick else [64, 128, 256, 512, 1024, 2048]
        curves += [concurrency(model, tokenizer, people, 1 if args.quick else 3), context(model, tokenizer, [n for n in lengths if n <= model.max_context])]
    if "round" in args.parts:
        config = LearnerConfig().override({"ppo.updates": "2", "gate.prompts": "12"} if args.quick else {})
        curves += rounds(args.model, [30, 60, 120] if args.quick else [50, 200, 1_000, 5_000], config)
    if "store" in args.parts:
        curves += store_calls([1_000, 4_000, 16_000] if args.quick else args.votes, 5 if args.quick else 15)
    for curve in curves:
        print(f"{curve.name:<60} size^{curve.exponent:5.2f} (at most {TARGETS[curve.kind]:g}): {'met' if curve.met else 'MISSED'}", flush=True)
    if args.plot:
        draw_curves(curves, args.plot)
    met = {curve.name: curve.met and math.isfinite(curve.exponent) for curve in curves}
    for curve in curves:
        if curve.name.startswith("whole round") and ROUND[0] in curve.sizes:
            took = curve.seconds[curve.sizes.index(ROUND[0])]
            met[f"a round on {ROUND[0]} votes"] = took <= ROUND[1]
            print(f"a round on {ROUND[0]} votes: {took:.0f} s (at most {ROUND[1]:g})", flush=True)
    machine = {"cpus": os.cpu_count(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps({"benchmark": "growth", "targets": TARGETS, "fit": "least squares in logs, the steeper of all sizes and the upper half",
                      "met": met, "machine": machine, "curves": {curve.name: curve.row() for curve in curves}}))  # fmt: skip
    return 0 if all(met.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
