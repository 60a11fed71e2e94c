"""Adapters side by side and adapters swapped: decode time against the bare model, a swap against PEFT, and what a swap disturbs.

    python -m benchmarks.adapters [--quick] [--threads N]

LoRA r=16 on every linear layer. Decode: nine replies at once by the bare base, by one version, and by three versions (three
each), step by step in turns. Swap: from the files to the first token served, against PEFT's load_adapter + set_adapter +
delete_adapter on the same files (no token served). Disturbance: the longest time between two tokens of another reply while
versions come and go between steps. Memory: of the process over 1,000 swaps (M: 200). Models as in `benchmarks/engine.py`; digests,
which the server checks before it loads a version, are not part of either side. JSON last; exit status 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.engine import SHAPES, random_model
from engine.engine import Engine, SamplingParams
from engine.mixture import PATIENCE
from engine.model import CausalModel
from engine.tokenizer import ChatTokenizer
from server.settings import STARTER

TARGETS = {"mixed": 1.25, "one": 1.05, "swap": 15.0, "disturbed": 2.0, "growth_mb": 8.0}  # at most; swap: at least
VERSIONS, REPLIES, R = ("v1", "v2", "v3"), 9, 16


def adapters(model: CausalModel, folder: Path) -> list[Path]:
    """PEFT directories of `VERSIONS`, with random numbers that do something."""
    made = []
    for seed, name in enumerate(VERSIONS):
        model.lora.create(name, r=R, alpha=2 * R, seed=seed)
        with torch.no_grad():
            for parameter in model.lora.parameters(name).values():
                parameter.normal_(0, 0.02, generator=torch.Generator().manual_seed(seed))
        model.lora.save(name, folder / name)
        model.lora.delete(name)
        made.append(folder / name)
    return made


def decoding(engine: Engine, versions: Sequence[str], steps: int) -> None:
    """Replies of these versions, run until all have a token and the weights of a lone one are added up, which goes a layer a step."""
    settling = PATIENCE + len(engine.model.lora.linears) + 4
    params = SamplingParams(max_tokens=steps + settling + 4, ignore_eos=True)
    for i, version in enumerate(versions):
        engine.add([5 + i] * 64, [params], [version])
    for _ in range(settling):
        engine.step()


def decode_ratios(model: CausalModel, tokenizer: ChatTokenizer, steps: int) -> dict[str, float]:
    """Median milliseconds of a step for each mixture, and its ratio to the bare model's."""
    # "one" settles last: a model keeps one version added up, and reading the prompts of "mixed" would give it up
    crowds = {"bare": ["base"] * REPLIES, "mixed": [*VERSIONS] * (REPLIES // 3), "one": ["v1"] * REPLIES}
    engines = {name: Engine(model, tokenizer, max_sequences=REPLIES) for name in crowds}
    times: dict[str, list[float]] = {name: [] for name in crowds}
    for name, crowd in crowds.items():
        decoding(engines[name], crowd, steps)
    for _ in range(steps):
        for name, engine in engines.items():
            began = time.perf_counter()
            engine.step()
            times[name].append(time.perf_counter() - began)
    for engine in engines.values():
        while engine.has_work():
            engine.step()
    median = {name: statistics.median(each) for name, each in times.items()}
    return {f"{name}_ms": round(1000 * s, 3) for name, s in median.items()} | {name: round(median[name] / median["bare"], 3) for name in ("one", "mixed")}


def swap_seconds(engine: Engine, path: Path, name: str) -> float:
    """From the files to the first token of this version, which is then unloaded (also counted)."""
    began = time.perf_counter()
    engine.load_version(name, path)
    engine.add([5, 6, 7], [SamplingParams(max_tokens=1, ignore_eos=True)], [name])
    while engine.has_work():
        engine.step()
    engine.unload_version(name)
    return time.perf_counter() - began


def peft_seconds(model: PeftModel, path: Path, name: str) -> float:
    """PEFT: load, make active, delete."""
    began = time.perf_counter()
    model.load_adapter(str(path), adapter_name=name)
    model.set_adapter(name)
    model.set_adapter("kept")
    model.delete_adapter(name)
    return time.perf_counter() - began


def disturbance(engine: Engine, paths: Sequence[Path], swaps: int) -> dict[str, float]:
    """Milliseconds between the tokens of a reply by the base: the median without swaps, and the longest while files are read or a version appears and another goes."""
    engine.add([5] * 64, [SamplingParams(max_tokens=engine.model.max_context - 64, ignore_eos=True)], ["base"])
    for _ in range(4):
        engine.step()
    quiet, disturbed, reading, number = list[float](), list[float](), None, 0
    with ThreadPoolExecutor(1) as reader:  # as the server does: files are read beside decoding, and the version appears between two steps
        while number < swaps and engine.has_work():
            began, busy = time.perf_counter(), True
            if reading is None and len(quiet) <= len(disturbed):
                busy = False
            elif reading is None:
                reading = reader.submit(engine.model.lora.read, paths[number % len(paths)])
            elif reading.done():
                engine.load_version(f"n{number}", reading.result())
                if number:
                    engine.unload_version(f"n{number - 1}")
                reading, number = None, number + 1
            engine.step()
            (disturbed if busy else quiet).append(time.perf_counter() - began)
    while engine.has_work():
        engine.step()
    engine.unload_version(f"n{number - 1}")
    return {"step_ms": round(1000 * statistics.median(quiet), 3), "longest_ms": round(1000 * max(disturbed), 3), "longest_quiet_ms": round(1000 * max(quiet), 3),
            "disturbed": round(max(disturbed) / statistics.median(quiet), 3)}  # fmt: skip


def growth(engine: Engine, paths: Sequence[Path], swaps: int) -> float:
    """MB that the process holds more after `swaps` swaps than after the first fifty."""
    for number in range(50 + swaps):
        if number == 50:
            before = resident()
        swap_seconds(engine, paths[number % len(paths)], f"s{number}")
    return round((resident() - before) / 1e6, 2)


def resident() -> int:
    """Bytes of memory this process holds now (Linux)."""
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(name: str, directory: Path, quick: bool) -> dict[str, Any]:
    """All figures of one model, printed as they come."""
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = CausalModel.load(directory), ChatTokenizer.load(directory)
        paths = adapters(model, Path(folder))
        engine = Engine(model, tokenizer, max_sequences=4)
        peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval(), str(paths[0]), adapter_name="kept")
        times: dict[str, list[float]] = {"ours": [], "peft": []}
        for turn in range(4 if quick else 12):
            took = swap_seconds(engine, paths[turn % 3], f"t{turn}"), peft_seconds(peft, paths[turn % 3], f"t{turn}")
            for who, elapsed in zip(times, took, strict=True):
                times[who] += [elapsed] if turn else []
        ours, theirs = (statistics.median(each) for each in times.values())
        row: dict[str, Any] = {"model": name, "swap_ms": round(1000 * ours, 3), "peft_ms": round(1000 * theirs, 3), "swap": round(theirs / ours, 2)}
        print(f"  {name}: files to first token {row['swap_ms']:.2f} ms, PEFT {row['peft_ms']:.1f} ms: {row['swap']:.1f}x", flush=True)
        del peft
        row |= disturbance(engine, paths, 10 if quick else 40)
        print(f"  {name}: a step takes {row['step_ms']:.2f} ms, with a swap before it {row['longest_ms']:.2f} at most: {row['disturbed']:.2f}x", flush=True)
        row["swaps"] = 100 if quick else 1000 if name == "S" else 200
        row["growth_mb"] = growth(engine, paths, row["swaps"])
        print(f"  {name}: {row['growth_mb']:+.1f} MB over {row['swaps']} swaps", flush=True)
        for version, path in zip(VERSIONS, paths, strict=True):
            model.lora.load(version, path)
        row |= decode_ratios(model, tokenizer, 16 if quick else 64)
        print(f"  {name}: a step of {REPLIES} replies {row['bare_ms']:.2f} ms bare, {row['one']:.2f}x by one version, {row['mixed']:.2f}x by three", flush=True)
        return row


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="S only, few repeats, 100 swaps")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 = torch's own choice")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    print(f"float32, {torch.get_num_threads()} threads, torch {torch.__version__}")
    rows = [measure("S", STARTER, args.quick)]
    if not args.quick:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure("M", random_model(Path(folder) / "M", SHAPES["M"]), False))
    met = {f"{row['model']}-{what}": row[what] >= limit if what == "swap" else row[what] <= limit for row in rows for what, limit in TARGETS.items()}
    print(json.dumps({"benchmark": "adapters", "targets": TARGETS, "met": met, "threads": torch.get_num_threads(), "rows": rows}))
    raise SystemExit(0 if all(met.values()) else 1)


if __name__ == "__main__":
    main()
