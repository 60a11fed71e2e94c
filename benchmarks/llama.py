"""Text generation against llama.cpp, on the same weights, in the same run.

    make peers, then python -m benchmarks.llama [--models S M] [--quick] [--threads N] [--repeats N]

Random Llamas in the shapes of `benchmarks/engine.py`. Loads: one prompt of 256 tokens with K = 4 replies of 64, its first tokens alone, and
8 and 32 people who come as in `benchmarks/load.py` (Poisson arrivals, mixed lengths, the same for both sides). Contestants in processes of
their own take turns: our engine and llama.cpp, each in float32, and each with weights of 8 bits. llama.cpp is told what it likes: K replies share
a prompt's cells, and every step decodes all who are being answered and reads one new prompt; people have a pool of cells together or a stretch each,
and threads that sleep while they wait, as ours do, or that do as they come: whichever took it less time. First both sides answer a prompt greedily in float32, which must be the same tokens.
What 8 bits cost in quality is measured on the bundled starter: its float32 replies to held-out prompts, decoded again token by token
with 8 bits; KL of the next token and how often the likeliest one is the same. Medians; JSON last; exit status 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.contest import Contestant, ContestError, Finished, Turns, peer_python
from benchmarks.engine import NEW, PROMPT, REPLIES, SHAPES
from benchmarks.load import requests

TARGETS = {("S", "K=4"): 1.0, ("M", "K=4"): 0.9, **{(m, f"{n} people"): 1.5 for m in SHAPES for n in (8, 32)}}  # of llama.cpp's tokens a second
KINDS = ("f32", "q8")
SLOTS = 32  # replies that either side may write at once


def loads(vocab: int, new: int) -> dict[str, dict[str, Any]]:
    """What is asked for, by name."""
    draw = random.Random(1)
    one = [[draw.randrange(2, vocab) for _ in range(PROMPT)]]
    return {"K=4": {"prompts": one, "replies": REPLIES, "new": new}, "K=4, first token": {"prompts": one, "replies": REPLIES, "new": 1}}


def coming(people: int, vocab: int, one: float) -> dict[str, Any]:
    """So many people at about any time, where a request alone takes `one` second."""
    return {"people": [(r.at, r.prompt, r.new) for r in requests(people, one / people, vocab)], "slots": SLOTS}


def alone(side: Contestant, vocab: int) -> float:
    """Seconds of a request that nobody else disturbs."""
    return statistics.median(side.turn(people=[(0.0, r.prompt, r.new)], slots=SLOTS)["seconds"] for r in requests(1, 1.0, vocab))


def measure(peer: Path, name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All figures of one model, printed as they come. Raises ContestError."""
    from benchmarks.engine import random_model

    rows = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="plaudit-bench-")))
        directory = random_model(folder / "model", SHAPES[name])
        commands: dict[str, list[str | Path]] = {}
        for kind in KINDS:
            commands[f"ours {kind}"] = [sys.executable, "-m", "benchmarks.llama", "--ours", directory, kind]
            commands[f"llama.cpp {kind}"] = [peer, "-m", "benchmarks.peer.llama", directory, folder, kind]
        sides = {  # our threads sleep while they wait; llama.cpp's in one process, in another they do as it comes
            n: [
                stack.enter_context(Contestant(n, c, folder / f"{n} {i}.log", threads=args.threads, sleeping=sleeping))
                for i, sleeping in enumerate((True,) if n.startswith("ours") else (True, False))
            ]
            for n, c in commands.items()
        }  # fmt: skip
        asked = loads(SHAPES[name]["vocab_size"], 16 if args.quick else NEW)
        greedy = {n: side.turn(**asked["K=4"] | {"replies": 1, "greedy": True})["tokens"] for n, (side, *_) in sides.items()}
        if greedy["ours f32"] != greedy["llama.cpp f32"]:
            raise ContestError(f"{name}: the greedy replies differ, so this is not the same work")
        one = alone(sides["ours f32"][0], SHAPES[name]["vocab_size"])
        asked |= {f"{people} people": coming(people, SHAPES[name]["vocab_size"], one) for people in args.people}
        for load, request in asked.items():
            turns: dict[str, list[float]] = {n: [] for n in sides}
            for number in range(args.repeats + 1):
                warm_up = {} if number else {"people": request["people"][:1]} if "people" in request else request  # of many people one: contexts are made then
                for n, these in sides.items():
                    ways = (True, False) if "people" in request and n.startswith("llama.cpp") else (True,)
                    seconds = min(side.turn(**request | warm_up, greedy=False, unified=way)["seconds"] for side in these for way in ways)
                    turns[n] += [seconds] if number else []
            tokens = sum(r[2] for r in request["people"]) if "people" in request else len(request["prompts"]) * request["replies"] * request["new"]
            speed = {n: tokens / sorted(t)[len(t) // 2] for n, t in turns.items()}
            for kind in KINDS:
                ratio, target = speed[f"ours {kind}"] / speed[f"llama.cpp {kind}"], TARGETS.get((name, load))
                print(f"{name} {load:17} {kind}  ours {speed[f'ours {kind}']:8.1f} tok/s   llama.cpp {speed[f'llama.cpp {kind}']:8.1f}   {ratio:5.2f}x"
                      f"{f' (target {target:g})' if target else ''}", flush=True)  # fmt: skip
                rows.append({"model": name, "load": load, "kind": kind, "ratio": round(ratio, 3), "target": target, "met": None if target is None else ratio >= target,
                             "tokens_per_s": {who: round(speed[f"{who} {kind}"], 1) for who in ("ours", "llama.cpp")}})  # fmt: skip
    return rows


def quality(prompts: int) -> dict[str, float]:
    """What 8 bits change on the starter: nats a token and share of tokens, over its own replies."""
    import torch

    from benchmarks.engine import STARTER
    from engine.cache import Prompt, Rows
    from engine.engine import Engine, SamplingParams
    from engine.model import CausalModel
    from engine.tokenizer import ChatTokenizer
    from learner.prompts import prompts_from

    tokenizer, exact, small = ChatTokenizer.load(STARTER), CausalModel.load(STARTER), CausalModel.load(STARTER)
    asked = [tokenizer.render([{"role": "user", "content": p}]) for p in prompts_from(held_out=True)[:prompts]]
    engine = Engine(exact, tokenizer)
    replies = engine.generate(asked, [SamplingParams(max_tokens=128, seed=i) for i in range(prompts)])
    small.pack(int8=True)
    divergence, same, surprise = [], [], []
    with torch.inference_mode():
        for reply in replies:
            ids, start = reply.prompt_ids + reply.token_ids, len(reply.prompt_ids)
            meant = exact.logits(exact(torch.tensor([ids[:-1]]))[0, start - 1 :]).log_softmax(-1)  # (T, V)
            cache = small.new_cache(1, len(ids))
            said = [small(torch.tensor([ids[:start]]), cache=Prompt(cache, 0, 0, start))[:, -1]]
            said += [small(torch.tensor([[t]]), cache=Rows(cache, [start + i]))[:, -1] for i, t in enumerate(ids[start:-1])]
            got = small.next_logits(torch.cat(said)).log_softmax(-1)
            divergence += (meant.exp() * (meant - got)).sum(-1).tolist()
            same += (meant.argmax(-1) == got.argmax(-1)).tolist()
            surprise += (meant - got).gather(-1, torch.tensor(ids[start:])[:, None])[:, 0].tolist()
    count = len(divergence)
    found = {"tokens": count, "kl_mean": sum(divergence) / count, "kl_max": max(divergence), "same_likeliest": sum(same) / count, "nll_rise": sum(surprise) / count}
    print(f"8 bits on the starter, {count} tokens of {prompts} replies: KL {found['kl_mean']:.2g} nats a token (at most {found['kl_max']:.2g}), the likeliest "
          f"token the same in {found['same_likeliest']:.2%}, negative log-likelihood up by {found['nll_rise']:.2g} nats a token", flush=True)  # fmt: skip
    return found


def contend(directory: Path, kind: str) -> None:
    """Be our contestant."""
    turns = Turns()

    import torch

    from benchmarks.load import Request, serve
    from engine.engine import Engine, SamplingParams
    from engine.model import CausalModel
    from engine.tokenizer import ChatTokenizer

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = CausalModel.load(directory)
    engine = Engine(model, ChatTokenizer.load(directory), max_sequences=32, int8=kind == "q8")
    with contextlib.suppress(Finished):
        while True:
            asked = turns.wait()
            if "people" in asked:
                serve(engine, [Request(*r) for r in asked["people"]])
                turns.say()
                continue
            params = [SamplingParams(max_tokens=asked["new"], seed=i, temperature=float(not asked["greedy"]), ignore_eos=True) for i in range(asked["replies"])]
            replies = [s for prompt in asked["prompts"] for s in engine.add(prompt, params, ["base"] * len(params))]
            while engine.has_work():
                engine.step()
            turns.say(tokens=[s.token_ids for s in replies] if asked["greedy"] else None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--quick", action="store_true", help="16 new tokens, one repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--people", type=int, nargs="*", default=[8, 32])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--peers-python", type=Path, help="the interpreter with llama-cpp-python; default: what `make peers` built")
    parser.add_argument("--ours", nargs=2, metavar=("DIR", "KIND"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ours:
        contend(Path(args.ours[0]), args.ours[1])
        return 0
    args.repeats = 1 if args.quick else args.repeats
    rows = []
    try:
        peer = peer_python(args.peers_python)
        print(f"prompt {PROMPT}, {16 if args.quick else NEW} new tokens, {args.threads} threads")
        cost = quality(20 if args.quick else 100)
        for name in args.models:
            rows += measure(peer, name, args)
    except ContestError as error:
        print(error, file=sys.stderr)
        return 1
    met = {f"{row['model']} {row['load']} {row['kind']}": row["met"] for row in rows if row["met"] is not None}
    print(json.dumps({"benchmark": "llama", "threads": args.threads, "repeats": args.repeats, "met": met, "int8": cost, "rows": rows}))
    return 0 if all(met.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
