"""People who come as they please: our engine against `transformers.generate` one request at a time.

    python -m benchmarks.load [--quick] [--people 8 32] [--threads N]

Requests arrive by a seeded Poisson process, so fast that about as many as named are being answered at any time; prompts of
64 to 320 tokens, replies of 16 to 96. Ours: tokens a second from the first arrival to the last token, and the gaps between the
tokens of each reply. The peer answers a spread of the same requests one after the other, without waiting for anyone to come.
Models as in `benchmarks/engine.py`. JSON last; exit status 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from benchmarks.engine import SHAPES, random_model
from benchmarks.generate import Peer
from engine.engine import Engine, SamplingParams
from engine.model import CausalModel
from engine.tokenizer import ChatTokenizer
from server.settings import STARTER

TARGETS = {8: 3.0, 32: 4.0}  # times the peer's tokens a second, at least
GAP_S = 0.25  # 99 in 100 tokens come within so long of the one before: faster than anyone reads
EACH = 3  # requests a person


@dataclass(frozen=True)
class Request:
    """What one person asks: `at` seconds after the start, `new` tokens wanted."""

    at: float
    prompt: list[int]
    new: int


def requests(people: int, mean_gap_s: float, vocab: int, seed: int = 0) -> list[Request]:
    """`EACH` requests a person, in order of arrival; the first comes at once."""
    draw = random.Random(seed)
    made, at = [], 0.0
    for _ in range(EACH * people):
        made.append(Request(at, [draw.randrange(5, vocab) for _ in range(draw.randint(64, 320))], draw.randint(16, 96)))
        at += draw.expovariate(1 / mean_gap_s)
    return made


@dataclass
class Served:
    """How a load went: seconds from the first arrival to the last token, most replies at once, gaps between a reply's tokens."""

    seconds: float
    most: int
    gaps: list[float]


def serve(engine: Engine, load: Sequence[Request]) -> Served:
    """Drive the engine as the server does: take in who has come, step."""
    left, last, gaps, most = list(load), dict[int, float](), list[float](), 0
    began = time.perf_counter()
    while left or engine.has_work():
        now = time.perf_counter() - began
        while left and left[0].at <= now:
            one = left.pop(0)
            engine.add(one.prompt, [SamplingParams(max_tokens=one.new, seed=len(left), ignore_eos=True)], ["base"])
        if not engine.has_work():
            time.sleep(max(0.0, left[0].at - now))
            continue
        deltas = engine.step()
        now, most = time.perf_counter() - began, max(most, len(deltas))
        for delta in deltas:
            if delta.sequence.id in last:
                gaps.append(now - last[delta.sequence.id])
            last[delta.sequence.id] = now
    return Served(time.perf_counter() - began, most, gaps)


def measure(name: str, directory: Path, people: Sequence[int], alone: int, peer: Peer) -> list[dict[str, Any]]:
    """One model: a row for each number of people. alone: requests that the peer answers."""
    model = CausalModel.load(directory)
    engine = Engine(model, ChatTokenizer.load(directory), max_sequences=max(people))
    serve(engine, requests(1, 1e-6, model.vocab_size, seed=1))  # warm-up
    peer([[5] * 64], 8)
    rows = []
    for count in people:
        sample = requests(count, 1.0, model.vocab_size)
        one = statistics.median(serve(engine, [Request(0.0, r.prompt, r.new)]).seconds for r in sample[:3])
        load = requests(count, one / count, model.vocab_size)  # a request that takes `one` alone takes longer in company
        spread = load[:: max(1, len(load) // alone)][:alone]
        theirs = sum(r.new for r in spread) / sum(peer([r.prompt], r.new) for r in spread)
        served = serve(engine, load)
        ours = sum(r.new for r in load) / served.seconds
        p99 = statistics.quantiles(served.gaps, n=100)[98]
        rows.append({"model": name, "people": count, "requests": len(load), "most_at_once": served.most, "tokens_per_s": round(ours, 1),
                     "generate_tokens_per_s": round(theirs, 1), "ratio": round(ours / theirs, 2), "median_gap_ms": round(1000 * statistics.median(served.gaps), 2),
                     "p99_gap_ms": round(1000 * p99, 2), "longest_gap_ms": round(1000 * max(served.gaps), 2)})  # fmt: skip
        row = rows[-1]
        print(f"  {name}, {count} people ({served.most} replies at once at most): {ours:.0f} tokens/s, generate one at a time {theirs:.0f}: {row['ratio']:.2f}x; "
              f"gap {row['median_gap_ms']:.1f} ms, 99 in 100 under {row['p99_gap_ms']:.0f} ms", flush=True)  # fmt: skip
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="S only, and the peer answers 4 requests instead of 12")
    parser.add_argument("--people", type=int, nargs="+", default=list(TARGETS))
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 = torch's own choice")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"float32, {torch.get_num_threads()} threads, torch {torch.__version__}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("S",) if args.quick else ("S", "M"):
            directory = STARTER if name == "S" else random_model(Path(folder) / name, SHAPES[name])
            with Peer(directory, Path(folder) / f"{name}.log", torch.get_num_threads()) as peer:
                rows += measure(name, directory, args.people, 4 if args.quick else 12, peer)
    met = {f"{row['model']}-{row['people']}": row["ratio"] >= TARGETS.get(row["people"], 1.0) for row in rows}
    met |= {f"{row['model']}-{row['people']}-gap": row["p99_gap_ms"] <= 1000 * GAP_S for row in rows}
    print(json.dumps({"benchmark": "load", "targets": {**TARGETS, "p99_gap_s": GAP_S}, "met": met, "threads": torch.get_num_threads(), "rows": rows}))
    raise SystemExit(0 if all(met.values()) else 1)


if __name__ == "__main__":
    main()
