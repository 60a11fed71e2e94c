"""One PPO update, ours and TRL's, on the same shapes: seconds and peak memory.

`make peers`, then `python -m benchmarks.ppo_update [--models S M] [--updates 5]`. 8 rollouts of 64 + 32 tokens, 4 epochs, one
minibatch, LoRA r=16 on every linear layer, f32, random weights (S: a 5M Llama, M: the shape of SmolLM2-135M). Four
contestants in processes of their own take turns, update by update: TRL's `PPOTrainer` (8 prompts; LoRA policy; its value and
reward models are whole models, as it wants them); what we ship, GAE with a value by least squares and three reward members that
are heads on the base, which is held to the targets; the same where a LoRA pass paid, so that each member reads the base through an
adapter of its own; and our GAE with a value adapter trained as TRL's value model is, and one such member. Ours answer 2
prompts with 4 replies each, and read each prompt once for its four. An update is rollouts, scores, reference
log-probabilities and the epochs. Medians after one update of warm-up; JSON last; exit status 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.contest import Contestant, ContestError, Finished, Turns, peer_python, round_robin

TARGETS = {"speed": 2.5, "memory": 0.5}  # ours against TRL: at least so many times as fast, at most this share of its peak
ROLLOUTS, REPLIES, PROMPT, NEW, EPOCHS, LORA_R = 8, 4, 64, 32, 4, 16
PEER, SHIPPED = "trl", "ours, gae-ls"
OURS = {SHIPPED: "gae-ls", "ours, gae-ls, members with LoRA": "gae-ls+lora", "ours, gae, a member with LoRA": "gae+lora"}


def main() -> None:
    """Run the benchmark, or be one of its contestants."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["S", "M"], default=["S", "M"])
    parser.add_argument("--updates", type=int, default=5, help="counted updates of each contestant")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpointing", action="store_true", help="TRL's default, gradient checkpointing: slower, less memory")
    parser.add_argument("--ours", choices=list(OURS.values()), help=argparse.SUPPRESS)  # the rest: what a contestant is told
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ours:
        contend(args.ours, args.directory)
        return
    try:
        report = [measure(name, peer_python(), args) for name in args.models]
    except ContestError as error:
        raise SystemExit(str(error)) from None
    met = {row["model"]: row["met"] for row in report}
    print(json.dumps({"benchmark": "ppo_update", "targets": TARGETS, "cpus": os.cpu_count(), "threads": args.threads,
                      "peer_checkpointing": args.checkpointing, "met": met, "models": report}))  # fmt: skip
    raise SystemExit(0 if all(met.values()) else 1)


def measure(name: str, peer: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All contestants on one model, taking turns."""
    from benchmarks.engine import SHAPES, random_model

    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="plaudit-bench-")))
        random_model(directory / "model", SHAPES[name])
        draw = random.Random(0)
        prompts = [[draw.randrange(2, SHAPES[name]["vocab_size"]) for _ in range(PROMPT)] for _ in range(4 * ROLLOUTS)]
        task = {"prompts": prompts, "rollouts": ROLLOUTS, "new": NEW, "epochs": EPOCHS, "lora_r": LORA_R,
                "updates": args.updates + 2, "checkpointing": args.checkpointing}  # fmt: skip
        (directory / "task.json").write_text(json.dumps(task), "utf-8")
        commands = {
            PEER: [peer, "-m", "benchmarks.peer.ppo_update", directory],
            **{
                label: [sys.executable, "-m", "benchmarks.ppo_update", "--ours", how, "--directory", directory]
                for label, how in OURS.items()
            },
        }
        contestants = {
            label: stack.enter_context(Contestant(label, command, directory / f"{i}.log", threads=args.threads, sleeping=label != PEER))
            for i, (label, command) in enumerate(commands.items())
        }

        def shown(number: int, contestant: Contestant, answer: dict[str, Any]) -> None:
            counted = f"update {number}" if number else "warm-up"
            print(f"{name} {counted:<9} {contestant.name:<31} {answer['seconds']:8.2f} s {answer['peak_bytes'] / 1e9:6.2f} GB", flush=True)

        round_robin(list(contestants.values()), args.updates + 1, shown)
        return summary(name, {label: (c.median_s(), c.peak_bytes) for label, c in contestants.items()})


def summary(name: str, figures: dict[str, tuple[float, int]]) -> dict[str, Any]:
    """Seconds and bytes of every contestant, the ratios against the peer, and whether what we ship meets the targets."""
    seconds, peak = figures[PEER]
    rows = {
        label: {"seconds": round(s, 4), "peak_bytes": b, "speed": round(seconds / s, 3), "memory": round(b / peak, 3)}
        for label, (s, b) in figures.items()
    }
    for label, row in rows.items():
        print(f"{name} {label:<31} {row['seconds']:8.2f} s an update ({row['speed']:.2f}x as fast), "
              f"{row['peak_bytes'] / 1e9:.2f} GB ({row['memory']:.2f}x)", flush=True)  # fmt: skip
    ours = rows[SHIPPED]
    return {"model": name, "met": ours["speed"] >= TARGETS["speed"] and ours["memory"] <= TARGETS["memory"], "contestants": rows}


def contend(how: str, directory: Path) -> None:
    """Be one of our contestants, a value of `OURS`: `train_ppo`, an update a turn."""
    turns = Turns()
    estimator, _, lora = how.partition("+")
    task = json.loads((directory / "task.json").read_text("utf-8"))

    import torch

    from engine.model import CausalModel
    from engine.tokenizer import ChatTokenizer
    from learner.config import PPOConfig, RewardConfig
    from learner.ppo import train_ppo
    from learner.reward import RewardModel

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model, tokenizer = CausalModel.load(directory / "model"), ChatTokenizer.load(directory / "model")
    reward_config = RewardConfig(members=1) if estimator == "gae" else RewardConfig()
    reward = RewardModel.create(model, reward_config, reward_config.members)
    generator = torch.Generator().manual_seed(0)
    for member in reward.members:
        if lora:  # as after LoRA training: each member reads the base through its own adapter
            model.lora.create(member.name, r=reward_config.lora_r, alpha=reward_config.lora_alpha)
            member.adapter = member.name
        with torch.no_grad():
            member.head.weight.copy_(torch.randn(member.head.weight.shape, generator=generator))
    config = PPOConfig(
        estimator=estimator, updates=task["updates"], prompts_per_update=task["rollouts"] // REPLIES, replies_per_prompt=REPLIES,
        max_new_tokens=task["new"], epochs=task["epochs"], minibatches=1, lora_r=task["lora_r"], kl_ceiling=1e9, max_seconds=1e9,
    )  # fmt: skip

    def on_update(row: dict[str, Any]) -> None:
        turns.say(tokens=row["length"] * task["rollouts"])
        turns.wait()

    with contextlib.suppress(Finished):
        turns.wait()
        train_ppo(model, tokenizer, reward, prompts=task["prompts"], policy="policy", config=config, on_update=on_update)


if __name__ == "__main__":
    main()
