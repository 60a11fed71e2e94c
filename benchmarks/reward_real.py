"""Can the reward model learn from real people? Cross-validated accuracy on Anthropic's harmlessness votes.

`python -m benchmarks.reward_real`. Rows of `hh_harmless_preferences` go in the way `plaudit import` takes them, come out
of the database as votes, and are fitted and tested as in a round, but with one member, five folds, at most 256 tokens and all rows. Beside it the length-only baseline; JSON last.
A base of a few million parameters that never read such talk is not expected to do well: the figure is what it is.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from engine.model import CausalModel
from engine.tokenizer import ChatTokenizer
from learner.config import LearnerConfig
from learner.data import examples_from_votes
from learner.round import train_reward
from learner.worker import STARTER
from store import Store, import_preferences

VOTES = Path(__file__).parents[2] / "shared" / "data" / "hh_harmless_preferences.jsonl.gz"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, default=VOTES, help="JSONL or JSONL.gz of prompt, chosen, rejected, voter")
    parser.add_argument("--rows", type=int, default=600, help="only the first so many (0: all); the time grows with them")
    parser.add_argument("--model", default=str(STARTER), help="base model; default the bundled starter model")
    parser.add_argument("--max-tokens", type=int, default=256, help="of prompt and reply; the oldest go first")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--passes", type=int, default=1, help="LoRA passes at most (0: only heads on the frozen base)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.file.exists():
        raise SystemExit(f"the real preferences are not here: {args.file} is absent")
    torch.set_num_threads(args.threads)
    print(json.dumps(measure(args)))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Import, fit, test; the report."""
    model, tokenizer = CausalModel.load(args.model, dtype=torch.float32), ChatTokenizer.load(args.model)
    with tempfile.TemporaryDirectory() as data_dir:
        rows = Path(data_dir) / "rows.jsonl"
        opened = gzip.open if args.file.suffix == ".gz" else open
        with opened(args.file, "rt", encoding="utf-8") as lines:
            rows.write_text("".join(line for i, line in enumerate(lines) if not args.rows or i < args.rows), encoding="utf-8")
        with Store.open(data_dir) as store:
            count = import_preferences(store, rows, hash_voter=str)
            examples = examples_from_votes(store.voted_comparisons(), tokenizer)
    tokens = [len(e.prompt_ids) + len(c) for e in examples for c in e.completions_ids]
    print(f"{count} votes, {len(examples)} usable; prompt and reply have {sum(tokens) / len(tokens):.0f} tokens on average")
    config = LearnerConfig()
    fit = replace(config.reward, members=1, folds=args.folds, epochs=args.passes, max_tokens=args.max_tokens)
    config = replace(config, reward=fit)
    began = time.monotonic()
    _, _, report, may_train = train_reward(model, examples, config, args.seed, shown)
    print(f"\n{report['words']}")
    own, alone = report["accuracy"], report["length_only"]
    print(f"held out: {own['value']:.1%} ({own['low']:.1%} to {own['high']:.1%}); length alone {alone['value']:.1%} "
          f"({alone['low']:.1%} to {alone['high']:.1%}); {report['split']}")  # fmt: skip
    return {
        "benchmark": "reward_real", "data": args.file.name, "rows": count, "model": Path(args.model).name, "folds": args.folds,
        "max_tokens": args.max_tokens, "cut_share": sum(t > args.max_tokens for t in tokens) / len(tokens), "may_train": may_train,
        "seconds": round(time.monotonic() - began, 1), "threads": args.threads, **report,
    }  # fmt: skip


def shown(fraction: float, message: str) -> None:
    """Progress on one line."""
    print(f"\r{fraction:4.0%} {message:<60}", end="", flush=True)


if __name__ == "__main__":
    main()
