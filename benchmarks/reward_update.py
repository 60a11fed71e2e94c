"""Reward-model training, ours and TRL's, on the same random comparisons: pairs a second and peak memory.

`make peers`, then `python -m benchmarks.reward_update [--models S M] [--quick]`. Comparisons of K = 2 and K = 4 ranked replies,
64 + 64 tokens, one pass of LoRA r=16 on every linear layer, f32, random weights (S: a 5M Llama, M: the shape of
SmolLM2-135M). Ours takes eight comparisons a step, all pairs of a comparison from one reading of its replies; TRL's
`RewardTrainer` gets the pairs themselves (one, and six), eight a step, its default. Contestants are processes of their own
and take turns; seconds are those of the pass alone, neither side's loading and preparing. What is learned from real votes
and how well is `benchmarks/reward_peers.py`'s. Medians after one turn of warm-up; JSON last; exit status 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.contest import Contestant, ContestError, Finished, Turns, peer_python, round_robin
from learner.config import RewardConfig
from learner.data import RankedExample

TARGETS = {2: 1.6, 4: 3.0}  # K: ours against TRL's, at least so many times as many pairs a second
PROMPT, REPLY = 64, 64
OURS, PEER = "ours", "trl"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, or be our contestant; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["S", "M"], default=["S"])
    parser.add_argument("--comparisons", type=int, default=24, help="of a pass")
    parser.add_argument("--turns", type=int, default=3, help="counted passes of each contestant")
    parser.add_argument("--quick", action="store_true", help="8 comparisons, one turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers-python", type=Path, help="interpreter with TRL; default PLAUDIT_PEERS, else what `make peers` built")
    parser.add_argument("--ours", type=Path, metavar="TASK", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.ours:
        contend(args.ours)
        return 0
    if args.quick:
        args.comparisons, args.turns = 8, 1
    try:
        peer = peer_python(args.peers_python)
        rows = [measure(peer, model, k, args) for model in args.models for k in TARGETS]
    except ContestError as error:
        raise SystemExit(str(error)) from None
    met = {f"{row['model']} K={row['k']}": row["met"] for row in rows}
    print(json.dumps({"benchmark": "reward_update", "targets": TARGETS, "met": met, "cpus": os.cpu_count(), "threads": args.threads,
                      "comparisons": args.comparisons, "turns": args.turns, "rows": rows}))  # fmt: skip
    return 0 if all(met.values()) else 1


def comparisons(count: int, k: int, vocab: int) -> list[RankedExample]:
    """Random prompts, each with k random replies in a random ranking without ties."""
    draw, made = random.Random(k), []

    def ids(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(2, vocab) for _ in range(length))

    for i in range(count):
        order = tuple((place,) for place in draw.sample(range(k), k))
        made.append(RankedExample(ids(PROMPT), tuple(ids(REPLY) for _ in range(k)), order, f"voter-{i % 4}", str(i), str(i), str(i), str(i), i))
    return made


def measure(peer: Path, name: str, k: int, args: argparse.Namespace) -> dict[str, Any]:
    """Both contestants on one model and one K. Raises ContestError."""
    from benchmarks.engine import SHAPES, random_model

    config = RewardConfig()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="plaudit-bench-")))
        random_model(folder / "model", SHAPES[name])
        examples = comparisons(args.comparisons, k, SHAPES[name]["vocab_size"])
        task = {"model": str(folder / "model"), "examples": [asdict(e) for e in examples], "out": str(folder), "seed": 0, "passes": 1.0, "lr": config.lr,
                "max_tokens": PROMPT + REPLY, "lora_r": config.lora_r, "lora_alpha": config.lora_alpha}  # fmt: skip
        (folder / "task.json").write_text(json.dumps(task), "utf-8")
        commands: dict[str, list[str | Path]] = {
            PEER: [peer, "-m", "benchmarks.peer.reward_update", folder / "task.json"],
            OURS: [sys.executable, "-m", "benchmarks.reward_update", "--ours", folder / "task.json"],
        }
        sides = {n: stack.enter_context(Contestant(n, c, folder / f"{n}.log", threads=args.threads, sleeping=n != PEER)) for n, c in commands.items()}
        pairs = args.comparisons * k * (k - 1) // 2

        def shown(number: int, contestant: Contestant, answer: dict[str, Any]) -> None:
            print(f"{name} K={k} {f'turn {number}' if number else 'warm-up':<8} {contestant.name:<5} {pairs / answer['seconds']:8.1f} pairs/s "
                  f"{answer['peak_bytes'] / 1e9:6.2f} GB", flush=True)  # fmt: skip

        round_robin(list(sides.values()), args.turns + 1, shown)
        return summary(name, k, pairs, {n: (side.median_s(), side.peak_bytes) for n, side in sides.items()})


def summary(name: str, k: int, pairs: int, figures: dict[str, tuple[float, int]]) -> dict[str, Any]:
    """Pairs a second and bytes of both, the ratio, and whether it meets the target."""
    speed, memory = figures[PEER][0] / figures[OURS][0], figures[OURS][1] / figures[PEER][1]
    print(f"{name} K={k}: {speed:.2f}x TRL's pairs a second (at least {TARGETS[k]:g}x), {memory:.2f}x its memory", flush=True)
    return {"model": name, "k": k, "pairs": pairs, "speed": round(speed, 3), "memory": round(memory, 3), "met": speed >= TARGETS[k],
            "pairs_per_s": {who: round(pairs / s, 2) for who, (s, _) in figures.items()}, "peak_bytes": {who: b for who, (_, b) in figures.items()}}  # fmt: skip


def contend(file: Path) -> None:
    """Be our contestant: one pass of a fresh member a turn, its start on the base's features not timed."""
    turns = Turns()
    task = json.loads(file.read_text("utf-8"))

    import torch

    from benchmarks.reward_peers import example_of
    from engine.model import CausalModel
    from learner.reward import RewardModel
    from learner.reward_fit import Fit, base_features

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model, examples = CausalModel.load(task["model"]), [example_of(row) for row in task["examples"]]
    config = replace(RewardConfig(), pass_examples=len(examples), max_tokens=task["max_tokens"])
    with contextlib.suppress(Finished):
        while True:
            turns.wait()
            reward = RewardModel.create(model, config, 1)
            fit = Fit(reward, 0, examples, base_features(reward, examples), config.ridge, task["seed"])
            began = time.perf_counter()
            fit.epoch(0)
            turns.say(seconds=time.perf_counter() - began)
            reward.delete()


if __name__ == "__main__":
    raise SystemExit(main())
