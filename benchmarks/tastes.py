"""How hard is each known taste on the base model? How rare is what it likes, and could length alone fake it?

`python -m benchmarks.tastes`. Samples the base, four replies a prompt as voters see them, and asks every taste of
`learner/tastes.py`. Measures the base's habits and the tastes; learns nothing. JSON last. Exit status 1 when length can fake the
taste that it must not (`contrary`).
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from typing import Any

import torch
from scipy.stats import spearmanr

from engine.engine import BASE, Engine, SamplingParams
from engine.model import CausalModel
from engine.tokenizer import ChatTokenizer
from learner.prompts import prompts_from
from learner.tastes import HARD, SIMPLE, taste_named, win_rate, words
from server.settings import STARTER

SHOWN = 4  # replies a comparison
TOO_MUCH = 0.1  # rank correlation with length, and how far the longest and the shortest may beat chance


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tastes", nargs="+", default=[*SIMPLE, *HARD])
    parser.add_argument("--prompts", type=int, default=200, help="half of them the training ones, half held out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default=str(STARTER))
    args = parser.parse_args()
    torch.set_num_threads(1)
    replies = sampled(args.model, args.prompts, args.seed)
    rows = [{"taste": name, **measured(name, replies)} for name in args.tastes]
    for row in rows:
        print("  ".join(f"{key} {value:+.3f}" if isinstance(value, float) else f"{value:12}" for key, value in row.items()), flush=True)
    fooled = [row["taste"] for row in rows if row["taste"] == "contrary" and faked(row)]
    print(json.dumps({"prompts": len(replies), "replies": SHOWN * len(replies), "seed": args.seed, "tastes": rows, "faked": fooled}))
    raise SystemExit(1 if fooled else 0)


def sampled(source: str, count: int, seed: int) -> list[list[str]]:
    """SHOWN + 1 replies of the base to each of `count` prompts: those shown, and one to measure the best of them against."""
    model, tokenizer = CausalModel.load(source), ChatTokenizer.load(source)
    draw = random.Random(seed)
    decks = [prompts_from(held_out=held) for held in (False, True)]
    prompts = [prompt for deck in decks for prompt in draw.sample(deck, min(count // 2, len(deck)))]
    ids = [tokenizer.render([{"role": "user", "content": p}]) for p in prompts for _ in range(SHOWN + 1)]
    engine = Engine(model, tokenizer, max_sequences=48, max_context=min(model.max_context, max(map(len, ids)) + 256))
    params = [SamplingParams(**model.sampling._asdict(), max_tokens=256, seed=seed * 1_000_003 + i) for i in range(len(ids))]
    texts = [reply.text for reply in engine.generate(ids, params, BASE)]
    return [texts[i : i + SHOWN + 1] for i in range(0, len(texts), SHOWN + 1)]


def measured(name: str, replies: Sequence[Sequence[str]]) -> dict[str, Any]:
    """The figures of one taste."""
    taste = taste_named(name)
    flat = [text for group in replies for text in group[:SHOWN]]
    scores = [taste(text) for text in flat]
    longest, shortest, chance, told = 0, 0, 0.0, 0
    for group in replies:
        own, lengths = [taste(t) for t in group[:SHOWN]], [words(t) for t in group[:SHOWN]]
        best = {i for i, score in enumerate(own) if score == max(own)}
        if len(best) < SHOWN:
            told += 1
            longest += lengths.index(max(lengths)) in best
            shortest += lengths.index(min(lengths)) in best
            chance += len(best) / SHOWN
    return {
        "mean": sum(scores) / len(scores), "least": scores.count(min(scores)) / len(scores),  # share with the least score
        "told_apart": told / len(replies),  # comparisons that are no tie of all
        "best_of_4": win_rate(taste, [max(group[:SHOWN], key=taste) for group in replies], [group[SHOWN] for group in replies]),
        "length_rank_correlation": float(spearmanr(scores, [words(text) for text in flat]).statistic),
        "longest_is_favourite": longest / max(1, told), "shortest_is_favourite": shortest / max(1, told), "any_is_favourite": chance / max(1, told),
    }  # fmt: skip


def faked(row: dict[str, Any]) -> bool:
    """Whether length tells what the taste likes."""
    ahead = max(row["longest_is_favourite"], row["shortest_is_favourite"]) - row["any_is_favourite"]
    return abs(row["length_rank_correlation"]) > TOO_MUCH or ahead > TOO_MUCH


if __name__ == "__main__":
    main()
