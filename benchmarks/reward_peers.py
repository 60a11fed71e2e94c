"""Real preferences: our reward model against TRL's RewardTrainer, on the same base, the same folds and the same tokens.

`make peers`, then `python -m benchmarks.reward_peers`. Rows of Anthropic's harmlessness votes and of AlpacaEval's go in the
way `plaudit import` takes them and are split as a round splits them. Each side cross-validates in a process of its own, with
a part of every fold's training votes and then all of them (the learning curve; smaller parts lie within larger), tested on
the same votes. Ours is `learner.reward_fit.cross_validate` as shipped, one member a fold; TRL's is one LoRA pass of our rank at
each of three learning rates, of which the one with the best held-out accuracy is compared, which favours it. Beside both the
length-only baseline. Seconds are those of a whole cross-validation, testing included. JSON last; exit status 1 when a
target is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from benchmarks.contest import Contestant, ContestError, Finished, Turns, peer_python
from benchmarks.rival import RATES
from engine.model import CausalModel
from engine.tokenizer import ChatTokenizer
from learner.config import RewardConfig
from learner.data import Fold, RankedExample, Split, examples_from_votes, prompt_groups, split_folds
from learner.metrics import clustered_accuracy, length_baseline, pair_accuracy, paired_difference
from learner.reward_fit import cross_validate
from server.settings import STARTER
from store import Store, import_preferences

DATA = Path(__file__).parents[2] / "shared" / "data"
FILES = tuple(DATA / f"{name}_preferences.jsonl.gz" for name in ("hh_harmless", "alpaca_eval"))
TARGETS = {"accuracy": 0.0, "speed": 2.0}  # ours less TRL's, at least; TRL's seconds over ours, at least
OURS, PEER = "ours", "trl"


def main() -> None:
    """Run the benchmark, or be our contestant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="+", type=Path, default=list(FILES), help="JSONL or JSONL.gz of prompt, chosen, rejected, voter")
    parser.add_argument("--rows", type=int, default=600, help="of each file only the first so many (0: all); the time grows with them")
    parser.add_argument("--parts", nargs="+", type=float, default=[0.25, 0.5, 1.0], help="of the training votes: the learning curve")
    parser.add_argument("--folds", type=int, default=RewardConfig().folds)
    parser.add_argument("--passes", type=float, default=1.0, help="of TRL's trainer over the pairs")
    parser.add_argument("--max-tokens", type=int, default=256, help="of prompt and reply; the oldest go first")
    parser.add_argument("--model", default=str(STARTER))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers-python", type=Path, help="interpreter with TRL; default PLAUDIT_PEERS, else what `make peers` built")
    parser.add_argument("--ours", type=Path, metavar="TASK", help=argparse.SUPPRESS)  # be the contestant
    args = parser.parse_args()
    if args.ours:
        contend(args.ours)
        return
    if absent := [str(file) for file in args.files if not file.exists()]:
        raise SystemExit(f"the real preferences are not here: {absent[0]} is absent")
    try:
        peer = peer_python(args.peers_python)
        report = [measure(peer, file, args) for file in args.files]
    except ContestError as error:
        raise SystemExit(str(error)) from None
    met = {name: all(row["met"][name] for row in report) for name in TARGETS}
    machine = {"cpus": os.cpu_count(), "torch": torch.__version__, "threads": args.threads}
    print(json.dumps({"benchmark": "reward_peers", "targets": TARGETS, "met": met, "machine": machine, "model": Path(args.model).name,
                      "passes": args.passes, "max_tokens": args.max_tokens, "seed": args.seed, "data": report}))  # fmt: skip
    raise SystemExit(0 if all(met.values()) else 1)


def measure(peer: Path, file: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Both sides on one file; its part of the report. Raises ContestError."""
    examples = [e for e in read_examples(file, args.rows, ChatTokenizer.load(args.model)) if e.strict]
    split, config = split_folds(examples, args.folds, args.seed), RewardConfig()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="plaudit-bench-")))
        task = {"model": args.model, "examples": [asdict(e) for e in examples], "out": str(folder), "seed": args.seed, "passes": args.passes,
                "max_tokens": args.max_tokens, "lora_r": config.lora_r, "lora_alpha": config.lora_alpha}  # fmt: skip
        (folder / "task.json").write_text(json.dumps(task), "utf-8")
        commands: dict[str, list[str | Path]] = {
            OURS: [sys.executable, "-m", "benchmarks.reward_peers", "--ours", folder / "task.json"],
            PEER: [peer, "-m", "benchmarks.peer.reward", folder / "task.json"],
        }
        sides = {n: stack.enter_context(Contestant(n, c, folder / f"{n}.log", threads=args.threads, sleeping=n != PEER)) for n, c in commands.items()}
        rows = []
        for part in args.parts:
            folds = parts_of(split.folds, part, args.seed)
            asked = {"folds": [asdict(fold) for fold in folds]}
            for name, rate in ((OURS, ""), *((PEER, rate) for rate in RATES)):
                answer = sides[name].turn(**asked, **({"lr": RATES[rate]} if rate else {}))
                right = accuracies({int(i): own for i, own in answer["scores"].items()}, examples)
                row = {"who": name, "rate": rate, "part": part, "votes": round(sum(len(f.train) for f in folds) / len(folds)),
                       "right": right, "seconds": answer["seconds"], "peak_bytes": answer["peak_bytes"]}  # fmt: skip
                rows.append(row)
                print(f"{file.name.removesuffix('_preferences.jsonl.gz'):<12} {name:<5}{rate:<6} {row['votes']:5} votes: "
                      f"{sum(right.values()) / len(right):.3f} right, {row['seconds']:7.1f} s, {row['peak_bytes'] / 1e9:.2f} GB", flush=True)  # fmt: skip
    lengths = [[len(c) for c in e.completions_ids] for e in examples]
    length_only = length_baseline(lengths, [e.groups for e in examples], [(fold.train, fold.test) for fold in split.folds])
    found = compared(rows, length_only, prompt_groups(examples)[0])
    print(f"{file.name}: ours {found['accuracy']['value']:.3f}, ahead of TRL by {found['ahead_by']:+.3f} +- {found['half_width']:.3f}, "
          f"{found['speed']:.1f}x as fast; length alone {found['length_only']['value']:.3f}", flush=True)  # fmt: skip
    return {"file": file.name, "votes": len(examples), "folds": len(split.folds), "split": split.note, **found}


def read_examples(file: Path, rows: int, tokenizer: ChatTokenizer) -> list[RankedExample]:
    """The first `rows` rows (0: all) as votes read back from a database."""
    opened = gzip.open if file.suffix == ".gz" else open
    with tempfile.TemporaryDirectory() as data_dir:
        kept = Path(data_dir) / "rows.jsonl"
        with opened(file, "rt", encoding="utf-8") as lines:
            kept.write_text("".join(line for i, line in enumerate(lines) if not rows or i < rows), encoding="utf-8")
        with Store.open(data_dir) as store:
            import_preferences(store, kept, hash_voter=str)
            return examples_from_votes(store.voted_comparisons(), tokenizer)


def parts_of(folds: Sequence[Fold], part: float, seed: int) -> list[Fold]:
    """The folds with so much of their training votes, drawn so that smaller parts lie within larger; tests whole."""
    draw = random.Random(f"parts/{seed}")
    orders = [draw.sample(fold.train, len(fold.train)) for fold in folds]
    return [Fold(tuple(order[: max(1, round(part * len(order)))]), fold.test) for order, fold in zip(orders, folds, strict=True)]


def accuracies(scores: dict[int, list[float]], examples: Sequence[RankedExample]) -> dict[int, float]:
    """{index of the vote: share of its pairs that the held-out scores order as the voter did}."""
    return {i: found for i, own in sorted(scores.items()) if (found := pair_accuracy(own, examples[i].groups)) is not None}


def compared(rows: Sequence[dict[str, Any]], length_only: dict[int, float], clusters: Sequence[object]) -> dict[str, Any]:
    """Ours against the better of TRL's rates on the largest part, both learning curves, and which targets are met."""

    def best(who: str, part: float) -> dict[str, Any]:
        own = [row for row in rows if (row["who"], row["part"]) == (who, part)]
        return max(own, key=lambda row: sum(row["right"].values()) / len(row["right"]))

    def interval(right: dict[int, float]) -> dict[str, float]:
        found = clustered_accuracy(list(right.values()), [clusters[i] for i in right])
        return {"value": round(found.value, 4), "low": round(found.low, 4), "high": round(found.high, 4)}

    parts = sorted({row["part"] for row in rows})
    ours, theirs = best(OURS, parts[-1]), best(PEER, parts[-1])
    tested = list(ours["right"])
    gain, half = paired_difference(
        [ours["right"][i] for i in tested], [theirs["right"][i] for i in tested], [clusters[i] for i in tested]
    )
    speed = theirs["seconds"] / ours["seconds"]
    curve = [
        {"votes": best(who, part)["votes"], "who": who, **interval(best(who, part)["right"]), "seconds": round(best(who, part)["seconds"], 2)}
        for who in (OURS, PEER)
        for part in parts
    ]
    return {
        "met": {"accuracy": gain >= TARGETS["accuracy"], "speed": speed >= TARGETS["speed"]}, "accuracy": interval(ours["right"]),
        "peer_accuracy": interval(theirs["right"]), "peer_rate": theirs["rate"], "ahead_by": round(gain, 4), "half_width": round(half, 4),
        "speed": round(speed, 3), "memory": round(ours["peak_bytes"] / theirs["peak_bytes"], 3), "length_only": interval(length_only),
        "learning_curve": curve, "rows": [{**row, "right": round(sum(row["right"].values()) / len(row["right"]), 4)} for row in rows],
    }  # fmt: skip


def contend(file: Path) -> None:
    """Be our contestant: a cross-validation a turn."""
    turns = Turns()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    task = json.loads(file.read_text("utf-8"))
    model = CausalModel.load(task["model"])
    examples = [example_of(row) for row in task["examples"]]
    config = replace(RewardConfig(), max_tokens=task["max_tokens"])
    with contextlib.suppress(Finished):
        while True:
            folds = tuple(Fold(tuple(fold["train"]), tuple(fold["test"])) for fold in turns.wait()["folds"])
            checked = cross_validate(model, examples, Split(folds, "prompt", ""), config, task["seed"], lambda *_: None)
            turns.say(scores=checked.scores)
            for name in model.lora.names():
                model.lora.delete(name)


def example_of(row: dict[str, Any]) -> RankedExample:
    """`dataclasses.asdict` and JSON undone."""
    nested = {name: tuple(map(tuple, row[name])) for name in ("completions_ids", "groups")}
    return RankedExample(**{name: tuple(value) if isinstance(value, list) else value for name, value in row.items()} | nested)


if __name__ == "__main__":
    main()
