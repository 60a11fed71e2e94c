"""Fifteen benchmarks, one after the other, each with its log: what `make bench` runs. The GPU's and the long ones (votes, peers, gate, ...) run by themselves.

`python -m benchmarks.suite [--only NAME ...] [--logs DIR]`; charts lie beside the logs. The sizes are such that a quiet machine of two cores is done in
under 40 minutes; each benchmark run by itself measures more. One that misses a target, fails or takes too long does not
stop the rest. A table and JSON last; exit status 1 unless all of them ended well.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PLAN: tuple[tuple[str, ...], ...] = (  # module, arguments: the engine, the server, the learner, what is learned
    ("engine", "--repeats", "1"),
    ("llama", "--models", "S", "--repeats", "1"),
    ("load", "--quick"),
    ("reuse", "--quick"),
    ("adapters", "--quick"),
    ("http_votes",),
    ("replay",),
    ("while_learning", "--updates", "6"),
    ("growth", "--votes", "1000", "10000", "100000", "300000", "--plot", "{logs}/growth.png"),
    ("ppo_update", "--models", "S", "--updates", "3"),
    ("reward_update", "--models", "S"),
    ("reward_real",),
    ("reward_peers", "--rows", "120", "--parts", "1.0"),
    ("tastes", "--prompts", "100"),
    ("learning", "--tastes", "shorter", "--held-out", "60"),
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """How one benchmark ended. state: met, missed (a target), measured (figures that name no target), failed (no figures came of it)."""

    name: str
    state: str
    seconds: float
    words: str  # which targets it missed, or its last words

    def __str__(self) -> str:
        return f"{self.name:<16} {self.state:<7} {self.seconds / 60:6.1f} min  {self.words}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[name for name, *_ in PLAN], metavar="NAME", help=f"some of {', '.join(name for name, *_ in PLAN)}")
    parser.add_argument("--logs", type=Path, default=ROOT / "tmp" / "bench" / time.strftime("%Y%m%d-%H%M%S"), help="folder of the logs")
    parser.add_argument("--limit-minutes", type=float, default=15.0, help="for each benchmark, after which it is ended")
    args = parser.parse_args(argv)
    args.logs.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    plan = [(name, arguments) for name, *arguments in PLAN if not args.only or name in args.only]
    outcomes = []
    for number, (name, arguments) in enumerate(plan, 1):
        print(f"\n=== {number} of {len(plan)}, {(time.monotonic() - began) / 60:.1f} min so far: {name} {' '.join(arguments)}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}", *(argument.format(logs=args.logs) for argument in arguments)]
        outcomes.append(run(name, command, args.logs / f"{name}.log", 60 * args.limit_minutes))
    minutes = (time.monotonic() - began) / 60
    print(f"\n=== {minutes:.1f} min; logs in {args.logs}")
    for outcome in outcomes:
        print(outcome)
    print(json.dumps({"benchmark": "suite", "cpus": os.cpu_count(), "minutes": round(minutes, 2), "logs": str(args.logs), "outcomes": [vars(o) for o in outcomes]}))
    return 0 if all(outcome.state in ("met", "measured") for outcome in outcomes) else 1


def run(name: str, command: Sequence[str], log: Path, limit_s: float) -> Outcome:
    """One benchmark, its output shown and logged."""
    began, lines = time.monotonic(), list[str]()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=ROOT)
    late = threading.Event()

    def end() -> None:
        late.set()
        child.terminate()  # its servers and contestants end with it

    clock, last_resort = threading.Timer(limit_s, end), threading.Timer(limit_s + 90, child.kill)
    clock.start()
    last_resort.start()
    assert child.stdout is not None
    try:
        with log.open("w", encoding="utf-8") as file, child.stdout:
            for line in child.stdout:
                file.write(line)
                file.flush()
                lines.append(line)
                print(line if len(line) < 1000 else f"{line[:300]} ... (whole in {log})\n", end="", flush=True)
        child.wait()
    finally:
        clock.cancel()
        last_resort.cancel()
        if child.poll() is None:  # interrupted
            child.terminate()
            child.wait()
    state, words = judged(child.returncode, lines)
    if late.is_set():
        state, words = "failed", f"ended after {limit_s / 60:g} minutes"
    return Outcome(name, state, round(time.monotonic() - began, 1), words)


def judged(code: int, lines: Sequence[str]) -> tuple[str, str]:
    """(state, words) from the exit status and what was printed: a benchmark's last line is JSON when it came to its end."""
    said = [line.strip() for line in lines if line.strip()]
    last = said[-1] if said else ""
    try:
        figures: Any = json.loads(last)
    except ValueError:
        figures = None
    if not isinstance(figures, dict | list):
        return "failed", last[:200] or "it said nothing"
    if code == 0:
        return ("met" if isinstance(figures, dict) and "met" in figures else "measured"), ""
    met = figures.get("met") if isinstance(figures, dict) else None
    return "missed", ", ".join(name for name, ok in met.items() if not ok) if isinstance(met, dict) else ""


if __name__ == "__main__":
    raise SystemExit(main())
