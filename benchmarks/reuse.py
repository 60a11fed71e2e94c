"""The next turn of a conversation: time to its first token with what was read before, against a cold read of the same prompt.

    python -m benchmarks.reuse [--quick] [--threads N] [--repeats N]

A first turn of 384 tokens is answered with 64; the next turn is those 448 and 64 new ones, 512 in all. Contestants, in turns
within every repeat: our engine that keeps what it read, our engine that does not, and `transformers.generate`. Models as in
`benchmarks/engine.py`. Medians over repeats; the greedy replies after both reads must be equal. JSON last; exit status 1 when
the target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from benchmarks.engine import SHAPES, random_model, seconds
from benchmarks.generate import Peer
from engine.engine import Engine, SamplingParams, Sequence
from engine.model import CausalModel
from engine.tokenizer import ChatTokenizer
from server.settings import STARTER, Settings

TARGET = 0.3  # warm over cold, at most
FIRST, REPLY, NEXT, SAID = 384, 64, 64, 16


def say(engine: Engine, prompt: list[int], count: int) -> Sequence:
    """`count` greedy tokens after `prompt`."""
    (reply,) = engine.add(prompt, [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)], ["base"])
    while engine.has_work():
        engine.step()
    return reply


def measure(name: str, directory: Path, repeats: int, peer: Peer) -> dict[str, Any]:
    """One model: median seconds to the first token of the next turn, warm and cold and by transformers."""
    budget = Settings.model_fields["reuse_mb"].default << 20  # as the server has it
    model = CausalModel.load(directory)
    cold = Engine(model, ChatTokenizer.load(directory), max_sequences=4)
    warm = Engine(model, cold.tokenizer, max_sequences=4, reuse_bytes=budget)
    generator = torch.Generator().manual_seed(1)

    def words(count: int) -> list[int]:
        return torch.randint(5, model.vocab_size, (count,), generator=generator).tolist()

    times: dict[str, list[float]] = {"reused": [], "cold": [], "generate": []}
    for turn in range(repeats + 1):
        begun = say(warm, words(FIRST), REPLY)
        prompt = begun.prompt_ids + begun.token_ids + words(NEXT)
        took = {
            "reused": seconds(partial(say, warm, prompt, 1)),
            "cold": seconds(partial(say, cold, prompt, 1)),
            "generate": peer([prompt], 1),
        }
        if turn:  # the first is the warm-up
            for contestant, elapsed in took.items():
                times[contestant].append(elapsed)
        if say(warm, prompt, SAID).token_ids != say(cold, prompt, SAID).token_ids:
            raise SystemExit(f"{name}: the reply after a reused prefix is not the one after a cold read")
        warm.forget()
    median = {contestant: statistics.median(each) for contestant, each in times.items()}
    row = {"model": name, "prompt": FIRST + REPLY + NEXT, "reused_tokens": FIRST + REPLY - 1,
           **{f"{contestant}_ms": round(1000 * s, 2) for contestant, s in median.items()},
           "reused_over_cold": round(median["reused"] / median["cold"], 3), "reused_over_generate": round(median["reused"] / median["generate"], 3)}  # fmt: skip
    print(f"  {name}: first token after {row['reused_ms']:.1f} ms reused, {row['cold_ms']:.1f} cold, {row['generate_ms']:.1f} generate: "
          f"{row['reused_over_cold']:.2f}x of cold (target at most {TARGET})", flush=True)  # fmt: skip
    return row


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="S only, two repeats")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 = torch's own choice")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"{FIRST} tokens answered with {REPLY}, then {NEXT} more; float32, {torch.get_num_threads()} threads, torch {torch.__version__}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("S",) if args.quick else ("S", "M"):
            directory = STARTER if name == "S" else random_model(Path(folder) / name, SHAPES[name])
            with Peer(directory, Path(folder) / f"{name}.log", torch.get_num_threads()) as peer:
                rows.append(measure(name, directory, 2 if args.quick else args.repeats, peer))
    met = {row["model"]: row["reused_over_cold"] <= TARGET for row in rows}
    print(json.dumps({"benchmark": "reuse", "target": TARGET, "met": met, "threads": torch.get_num_threads(), "rows": rows}))
    raise SystemExit(0 if all(met.values()) else 1)


if __name__ == "__main__":
    main()
