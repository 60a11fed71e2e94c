"""Does the gate turn bad versions away, for the right reason, and let good ones through?

`python -m benchmarks.gate --work DIR`. Bad ones are made by real means (`benchmarks/candidates.py`): finetuned to loop, to refuse, to flatter,
to tell wrong facts; noise; a learner that optimised the opposite; files that are damaged or another model's. Each meets judges
that were taught by a taste it might please. It counts as turned away when it is rejected (or, a file, refused) and one of the
checks that are there for its kind is among the reasons. Good ones are what a round makes of 100 votes: a taste's votes, the
reward, PPO with the settings as they are but for the clock and the votes' share of the KL target. A good one counts when the taste itself, which nobody learned from, likes it
better than the live version in more than 55% of pairs on held-out prompts; others are shown and made up for.

What is made is kept in --work, so that a run can be resumed; the gate is asked anew each time. Progress on stdout, JSON last. Exit
status 1 when a bad one gets through or more than one good one of twenty is rejected.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import candidates
from benchmarks.candidates import CANDIDATE, NotMade, Workshop
from engine.lora import WEIGHTS, AdapterError
from learner.config import LearnerConfig
from learner.gate import run_gate
from learner.reward import RewardModel
from learner.tastes import HARD, SIMPLE
from learner.versions import load_version
from server.settings import STARTER
from store.adapters import AdapterRegistry
from store.errors import CorruptAdapter

GOLD = 0.55  # a good candidate's win rate by the taste itself is above it
TASTES = (*SIMPLE, *HARD, "longer", "random:1")
Make = Callable[[Workshop, RewardModel], None]


@dataclass(frozen=True)
class Bad:
    """A kind of bad candidate that the gate must see."""

    name: str
    pleases: str  # the taste whose judges it meets
    reasons: tuple[str, ...]  # checks that are there for it: one of them must fail
    make: Make  # leaves it in CANDIDATE


@dataclass(frozen=True)
class BadFile:
    """A version that must not even load."""

    name: str
    reason: str  # in the refusal's words
    publish: Callable[[Workshop], tuple[AdapterRegistry, str]]


def taught(name: str, pleases: str, reasons: Sequence[str], rewrite: candidates.Rewrite) -> Bad:
    """One that is bad by what it was finetuned to say."""
    return Bad(name, pleases, tuple(reasons), lambda shop, _: shop.taught(name, rewrite))


BAD = (
    taught("collapsed", "friendly", ["distinct2"], candidates.collapsed),
    taught("looping", "longer", ["repetition", "broken"], candidates.looping),
    taught("stuttering", "longer", ["repetition", "broken"], candidates.stuttering),
    taught("refusing", "shorter", ["refusals"], candidates.refusing),
    taught("padded", "longer", ["length", "distinct2"], candidates.padded),
    taught("cut", "shorter", ["broken", "length"], candidates.cut),
    taught("one word", "shorter", ["length", "distinct2"], candidates.one_word),
    taught("salad", "friendly", ["kl", "broken", "probe_accuracy"], candidates.salad),
    taught("gibberish", "longer", ["kl", "broken", "probe_accuracy"], candidates.gibberish),
    taught("praising", "friendly", ["kl", "distinct2", "broken"], candidates.praising),
    taught("half praising", "friendly", ["broken"], candidates.half_praising),
    Bad("wrong facts", "friendly", ("probe_accuracy", "probe_loss"), lambda shop, _: shop.mixed_up("friendly")),
    Bad("noise, 12 nats", "friendly", ("kl",), lambda shop, _: shop.noise(12)),
    Bad("noise, 100 nats", "longer", ("kl",), lambda shop, _: shop.noise(100)),
    Bad("NaN", "friendly", ("finite",), lambda shop, _: shop.overflowing()),
    Bad("the live version again", "friendly", ("win_rate",), lambda shop, _: shop.unchanged()),
    Bad("the opposite", "shorter", ("win_rate",), lambda shop, judges: shop.optimised("shorter", judges, shop.seed, against=True, updates=6)),
)
BAD_FILES = (
    BadFile("infinity in the file", "NaN or infinite", lambda shop: shop.published("infinite", candidates.infinite)),
    BadFile("truncated file", "is damaged", lambda shop: shop.published("truncated", candidates.truncated)),
    BadFile("another rank", "has shape", lambda shop: shop.published("rank", candidates.other_rank)),
    BadFile("another base", "another base model", lambda shop: shop.published("base", base_digest="0" * 64)),
    BadFile("a byte changed", "is not what was published", lambda shop: changed(*shop.published("changed"))),
)


def changed(registry: AdapterRegistry, version: str) -> tuple[AdapterRegistry, str]:
    """One bit of the weights flipped after publishing."""
    path = registry.path(version) / WEIGHTS
    path.chmod(0o644)
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(bytes(whole))
    return registry, version


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="keep what is made here, and take it from here")
    parser.add_argument("--good", type=int, default=20, help="good candidates to ask about, 0 for none")
    parser.add_argument("--no-bad", action="store_true", help="leave the bad ones out")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the bad ones, these")
    parser.add_argument("--tastes", nargs="+", default=TASTES, help="of the good ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", default=str(STARTER))
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the learner, e.g. gate.prompts=96")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = LearnerConfig().override(dict(pair.split("=", 1) for pair in args.set))
    shop = Workshop(args.model, args.work, config, args.seed)
    chosen = [kind for kind in (*BAD, *BAD_FILES) if not args.only or kind.name in args.only]
    bad = [] if args.no_bad else [shown(asked_bad(shop, kind) if isinstance(kind, Bad) else asked_file(shop, kind)) for kind in chosen]
    good: list[dict[str, Any]] = []
    for taste, seed in trials(args.tastes, args.seed, 2 * args.good):
        if sum(row["counts"] for row in good) < args.good:
            good.append(shown(asked_good(shop, taste, seed)))
    counted = [row for row in good if row["counts"]]
    rejected_bad, rejected_good = sum(row["turned_away"] for row in bad), sum(row["verdict"] == "rejected" for row in counted)
    met = rejected_bad == len(bad) and rejected_good <= len(counted) // 20 and len(counted) == args.good
    print(json.dumps({
        "bad": len(bad), "rejected_bad": rejected_bad, "good": len(counted), "rejected_good": rejected_good, "met": met,
        "machine": {"threads": args.threads, "torch": torch.__version__}, "base": shop.model.digest, "seed": args.seed,
        "bad_candidates": bad, "good_candidates": good,
    }))  # fmt: skip
    raise SystemExit(0 if met else 1)


def trials(tastes: Sequence[str], first: int, most: int) -> Iterator[tuple[str, int]]:
    """(taste, seed): every taste once before any comes again."""
    yield from ((tastes[i % len(tastes)], first + i // len(tastes)) for i in range(most))


def asked_bad(shop: Workshop, kind: Bad) -> dict[str, Any]:
    """What the gate says of one bad candidate."""
    with shop.judges(kind.pleases, shop.seed, lambda *_: None) as judges:
        row = judged(shop, judges, lambda: kind.make(shop, judges), shop.seed)
    away = turned_away(row["verdict"], row["failed"], kind.reasons)
    return {"bad": kind.name, "pleases": kind.pleases, "turned_away": away, "expected": list(kind.reasons), **row}


def turned_away(verdict: str, failed: Sequence[str], reasons: Sequence[str]) -> bool:
    """Rejected, and by a check that is there for it: one that fell by another check got through its own."""
    return verdict == "rejected" and bool(set(reasons) & set(failed))


def asked_file(shop: Workshop, kind: BadFile) -> dict[str, Any]:
    """What loading says of one bad file."""
    registry, version = kind.publish(shop)
    try:
        load_version(shop.model, registry, version, CANDIDATE)
    except (AdapterError, CorruptAdapter) as refusal:
        said = str(refusal).replace(str(registry.root), "")
        return {"bad": kind.name, "turned_away": kind.reason in said, "expected": [kind.reason], "verdict": "refused", "why": [said]}
    shop.model.lora.delete(CANDIDATE)
    return {"bad": kind.name, "turned_away": False, "expected": [kind.reason], "verdict": "loaded", "why": []}


def asked_good(shop: Workshop, taste: str, seed: int) -> dict[str, Any]:
    """What the gate says of what a round makes of a taste's votes, and what the taste itself says."""
    gold: list[float] = []

    def make(judges: RewardModel) -> None:
        shop.optimised(taste, judges, seed)
        gold.extend(shop.gold(taste, seed))

    try:
        with shop.judges(taste, seed, lambda *_: None) as judges:
            row = judged(shop, judges, lambda: make(judges), seed)
    except NotMade as reason:
        return {"good": f"{taste}, seed {seed}", "counts": False, "verdict": "not made", "why": [str(reason)]}
    return {"good": f"{taste}, seed {seed}", "counts": gold[0] > GOLD, "gold": round(gold[0], 4), "gold_interval": [round(x, 4) for x in gold[1:]], **row}


def judged(shop: Workshop, judges: RewardModel, make: Callable[[], None], seed: int) -> dict[str, Any]:
    """Make a candidate, ask the gate, take it away again."""
    try:
        began = time.monotonic()
        make()
        middle = time.monotonic()
        verdict = run_gate(
            shop.model, shop.tokenizer, judges, prompts=shop.asked, candidate=CANDIDATE, live=None, reference=None, config=shop.config.gate, seed=seed
        )
    finally:
        if CANDIDATE in shop.model.lora.names():
            shop.model.lora.delete(CANDIDATE)
    return {
        "verdict": verdict["verdict"], "failed": verdict["failed"],
        "why": [f"{c['name']} {c['value'] if c['value'] is None else round(c['value'], 3)} (limit {c['limit']}): {c['why']}" for c in verdict["checks"] if not c["passed"]],
        "values": {c["name"]: None if c["value"] is None else round(c["value"], 4) for c in verdict["checks"]},
        "win_rate": verdict.get("win_rate"), "made_s": round(middle - began, 1), "gate_s": round(time.monotonic() - middle, 1),
    }  # fmt: skip


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """One line for a person; the row as it came."""
    if "bad" in row:
        head = f"{'turned away' if row['turned_away'] else 'MISSED':11}  bad: {row['bad']}"
    else:
        gold = f", the taste prefers it in {row['gold']:.1%} of pairs" if "gold" in row else ""
        head = f"{row['verdict']:11}  good: {row['good']}{gold}{'' if row['counts'] else ' (does not count)'}"
    print(head, *row["why"], sep="\n             ", flush=True)
    print("             " + json.dumps({k: row[k] for k in ("values", "win_rate", "made_s", "gate_s") if k in row}), flush=True)
    return row


if __name__ == "__main__":
    main()
