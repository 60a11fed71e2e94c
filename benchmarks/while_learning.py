"""Chat while the learner trains: what a round costs the person who is typing, and what the chat costs the learner.

`python -m benchmarks.while_learning [--quick]`. A real server on the starter model as shipped. Simulated people vote; then
one client streams reply after reply without a pause, first with the learner idle, then through a whole round. The same
round (a copy of the data, the same seed) runs once more on a server that nobody talks to.

Gap: time between two pieces of one streamed reply, as the client sees it. What is left for the learner: all cores less the
CPU seconds a second that server and client use in the PPO stage. With it the learner could run at `alone * min(1, left /
cores it used alone)` tokens a second; `learner_share` is how much of that it got. Prints as it goes, JSON last; exit status
1 when a target is missed. It needs a quiet machine: what other processes use is measured too, and said when it is much.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import httpx

from benchmarks.serving import (
    Server,
    cpu_seconds,
    learner_pid,
    machine_cpu_seconds,
    serving,
    until_learner_rests,
)
from learner.prompts import prompts_from
from learner.simulate import Client, simulate
from store.rounds import RoundFiles

TARGETS = {"gap_ratio": 1.5, "learner_share": 0.6}  # at most, at least
OTHERS = 0.15  # cores used by other processes, over which the figures are called doubtful
STAGES = ("training_reward", "ppo", "gating")


class Chatter:
    """A client that streams one reply after the other; `gaps` are (when it ended, seconds). Use as a context manager."""

    def __init__(self, url: str, prompts: Sequence[str]) -> None:
        self.url, self.prompts = url, prompts
        self.gaps: list[tuple[float, float]] = []
        self.failed: list[str] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="chatter", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(timeout=60)

    def _run(self) -> None:
        number = 0
        with httpx.Client(base_url=self.url, timeout=120, headers={"Plaudit-Voter": "chatter"}, trust_env=False) as http:
            while not self._done.is_set():
                try:
                    self._reply(http, self.prompts[number % len(self.prompts)], number)
                except (httpx.HTTPError, RuntimeError) as error:
                    self.failed.append(f"{type(error).__name__}: {error}")
                number += 1

    def _reply(self, http: httpx.Client, prompt: str, seed: int) -> None:
        body = {"model": "plaudit", "messages": [{"role": "user", "content": prompt}], "stream": True, "seed": seed}
        last = None
        with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                raise RuntimeError(f"{answer.status_code} {answer.read().decode()[:200]}")
            for line in answer.iter_lines():
                if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                    now = time.monotonic()
                    if last is not None:
                        self.gaps.append((now, now - last))
                    last = now


@dataclass
class Stage:
    """One stretch of a run: wall and CPU seconds of the parts."""

    name: str
    began: float
    ended: float
    chat_cpu: float  # server and client
    learner_cpu: float
    others_cpu: float  # everything else on the machine

    @property
    def seconds(self) -> float:
        return self.ended - self.began


@dataclass
class Watch:
    """Cuts a run into stages by what the learner says it does."""

    server: Server
    stages: list[Stage] = field(default_factory=list)

    def used(self) -> tuple[float, ...]:
        """Now, and the CPU seconds so far of the chat (server and this process), of the learner, and of all else."""
        chat, learner = cpu_seconds(self.server.pid) + time.process_time(), cpu_seconds(learner_pid(self.server))
        return time.monotonic(), chat, learner, machine_cpu_seconds() - chat - learner

    def stretch(self, name: str, before: tuple[float, ...]) -> tuple[float, ...]:
        """Close the stage that began at `before`; what the next one begins at."""
        after = self.used()
        used = (now - then for then, now in zip(before[1:], after[1:], strict=True))
        self.stages.append(Stage(name, before[0], after[0], *used))
        return after

    def idle(self, seconds: float) -> None:
        """Look at an idle learner for so long."""
        before = self.used()
        time.sleep(seconds)
        self.stretch("idle", before)

    def round(self, limit_s: float = 3600.0) -> dict[str, Any]:
        """Have the learner run a round, and wait for its record."""
        files = RoundFiles(self.server.data_dir / "rounds")
        with Client(self.server.url) as client:
            client.call("POST", "/v1/learner/run")
        before, now, end = self.used(), "idle", time.monotonic() + limit_s
        while not files.finished():
            if time.monotonic() > end:
                raise RuntimeError(f"the round did not end within {limit_s:.0f} s")
            time.sleep(0.1)
            says = str((files.read_heartbeat() or {}).get("state"))
            if says != now:
                before, now = self.stretch(now, before), says
        self.stretch(now, before)
        return files.read(files.finished()[0])

    def named(self, *names: str) -> list[Stage]:
        """The stages of these names."""
        return [stage for stage in self.stages if stage.name in names]


def within(gaps: Sequence[tuple[float, float]], stages: Sequence[Stage]) -> list[float]:
    """The gaps that ended in one of the stages."""
    return [gap for ended, gap in gaps if any(s.began <= ended < s.ended for s in stages)]


def gap_figures(gaps: Sequence[float]) -> dict[str, Any]:
    """Median and 99th percentile, ms. Raises RuntimeError for too few."""
    if len(gaps) < 100:
        raise RuntimeError(f"only {len(gaps)} tokens were streamed: let it run longer (--idle-s, --updates)")
    return {"gaps": len(gaps), "median_ms": round(1000 * statistics.median(gaps), 3), "p99_ms": round(1000 * statistics.quantiles(gaps, n=100)[98], 3)}


def ppo_speed(record: dict[str, Any]) -> float:
    """Reply tokens a second over the round's PPO updates: sampled, scored and practised."""
    rows = [row for row in (record.get("ppo") or {}).get("history", ()) if "tokens_per_second" in row]
    if not rows:
        raise RuntimeError(f"the round had no PPO update ({record.get('state')}: {record.get('reason')}); try more --votes")
    return sum(row["tokens_per_second"] * row["seconds"] for row in rows) / sum(row["seconds"] for row in rows)


def shares(beside: float, alone: float, chat_cores: float, learner_cores: float, cpus: int) -> dict[str, float]:
    """The learner's speed (tokens/s) beside the chat against what the cores that the chat leaves would allow.

    chat_cores: used by the chat beside the learner; learner_cores: used by the learner alone.
    """
    left = max(cpus - chat_cores, 1e-9)
    possible = alone * min(1.0, left / learner_cores)
    return {"left_cores": round(left, 3), "possible_tokens_per_s": round(possible, 1), "learner_share": round(beside / possible, 3)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 updates, little else in the round, and 8 s of idle chat")
    parser.add_argument("--votes", type=int, default=60)
    parser.add_argument("--updates", type=int, default=12, help="PPO updates of the round")
    parser.add_argument("--idle-s", type=float, default=30.0, help="seconds of chat with the learner idle")
    parser.add_argument("--taste", default="list")
    args = parser.parse_args(argv)
    updates, idle_s = (3, 8.0) if args.quick else (args.updates, args.idle_s)
    prompts, cpus = prompts_from(), os.cpu_count() or 1
    settings = f"--set ppo.updates={updates} --set ppo.tokens=100000000 --set ppo.max_seconds=3600"  # the same work, however slow
    if args.quick:
        settings += " --set reward.epochs=0 --set gate.prompts=8 --set ppo.max_new_tokens=32"
    flags = ("--seed", "0", "--round-votes", "1000000", "--promotion", "manual", "--learner-args", settings)
    with tempfile.TemporaryDirectory(prefix="plaudit-bench-") as scratch:
        voted, alone_dir = Path(scratch) / "voted", Path(scratch) / "alone"
        with serving(*flags, "--no-learner", data_dir=voted) as server:
            report = simulate(server.url, prompts, args.taste, votes=args.votes)
            print(f"{args.votes} votes in {report.seconds:.0f} s", flush=True)
        shutil.copytree(voted, alone_dir)

        with serving(*flags, data_dir=voted) as server:
            until_learner_rests(server)
            watch = Watch(server)
            with Chatter(server.url, prompts) as chat:
                watch.idle(idle_s)
                record = watch.round()
            pieces = {
                name: gap_figures(within(chat.gaps, watch.named(*stages)))
                for name, stages in {"idle": ("idle",), "round": STAGES, **{s: (s,) for s in STAGES if len(within(chat.gaps, watch.named(s))) >= 100}}.items()
            }
        for name, figures in pieces.items():
            print(f"{name:<16} median gap {figures['median_ms']:7.2f} ms, p99 {figures['p99_ms']:7.2f} ms over {figures['gaps']} gaps", flush=True)

        with serving(*flags, data_dir=alone_dir) as server:
            until_learner_rests(server)
            by_itself = Watch(server)
            other = by_itself.round()

    def per_s(of: Watch, part: str) -> float:
        stages = of.named("ppo")
        return sum(getattr(s, part) for s in stages) / sum(s.seconds for s in stages)

    speeds = {"beside": ppo_speed(record), "alone": ppo_speed(other)}
    cores = {"chat": per_s(watch, "chat_cpu"), "learner_beside": per_s(watch, "learner_cpu"), "learner_alone": per_s(by_itself, "learner_cpu")}
    cores |= {"others_beside": per_s(watch, "others_cpu"), "others_alone": per_s(by_itself, "others_cpu")}
    found = shares(speeds["beside"], speeds["alone"], cores["chat"], cores["learner_alone"], cpus)
    ratio = round(pieces["round"]["median_ms"] / pieces["idle"]["median_ms"], 3)
    print(f"learner's PPO: {speeds['beside']:.0f} tokens/s beside the chat, {speeds['alone']:.0f} alone; the chat used {cores['chat']:.2f} "
          f"of {cpus} cores, so {found['possible_tokens_per_s']:.0f} were possible: share {found['learner_share']:.2f}; gap ratio {ratio:.2f}", flush=True)  # fmt: skip
    if max(cores["others_beside"], cores["others_alone"]) > OTHERS:
        print(f"other processes used {cores['others_beside']:.2f} cores beside the chat and {cores['others_alone']:.2f} else: the learner steps back "
              "for them too, so its share says little", flush=True)  # fmt: skip
    met = {"gap_ratio": ratio <= TARGETS["gap_ratio"], "learner_share": found["learner_share"] >= TARGETS["learner_share"], "none_failed": not chat.failed}
    print(json.dumps({
        "benchmark": "while_learning", "targets": TARGETS, "met": met, "cpus": cpus, "votes": args.votes, "updates": updates, "gap_ratio": ratio, **found,
        "gaps": pieces, "ppo_tokens_per_s": {k: round(v, 1) for k, v in speeds.items()}, "cores": {k: round(v, 3) for k, v in cores.items()},
        "round_s": {k: r["timings"] for k, r in (("beside", record), ("alone", other))}, "failed": chat.failed[:5],
    }))  # fmt: skip
    return 0 if all(met.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
