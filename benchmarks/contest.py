"""Contestants in processes of their own that take turns: one interpreter, one peak memory and one warm model each.

Parent and child talk in JSON lines over the child's standard input and output; what libraries print goes to a log. Both
ends are here and use the standard library alone, so that a peer's interpreter can import them. Owns the processes, the
turns and the peak memory; does not know what a turn measures.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parents[1]
PEERS = ROOT / ".venv-peers" / "bin" / "python"


class ContestError(Exception):
    """A contestant is not there or did not finish; the message says what to do or shows the end of its log."""


def peer_python(named: Path | None = None, env: Mapping[str, str] = os.environ, built: Path = PEERS) -> Path:
    """The interpreter that has TRL: `named` or `PLAUDIT_PEERS` (a virtual environment or its python), else what `make peers` built.

    Raises ContestError when it is absent.
    """
    if named is None and env.get("PLAUDIT_PEERS"):
        named = Path(env["PLAUDIT_PEERS"])
    python = built if named is None else named
    if python.is_dir():
        python = python / "bin" / "python"
    if not os.access(python, os.X_OK):
        raise ContestError(
            "the peers are not installed: run `make peers`, or set PLAUDIT_PEERS to a virtual environment with benchmarks/peers.txt"
            if named is None
            else f"there is no python at {named}: point --peers-python or PLAUDIT_PEERS at a virtual environment with benchmarks/peers.txt"
        )
    return python.absolute()  # not resolved: the link is what makes it a virtual environment


def peak_bytes() -> int:
    """The most memory this process has held at once.

    Linux's VmHWM rather than `ru_maxrss`, which a child inherits from the process that started it.
    """
    try:
        for line in Path("/proc/self/status").read_text("ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Finished(Exception):
    """The parent has asked for the last turn: unwind."""


class Turns:
    """A contestant's own end: `wait` for a request, do it, `say` what came of it.

    Making one takes over standard output: what anything else prints goes to standard error from then on. The process
    ends when its parent does, however that ended: a turn may be an hour long.
    """

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        sys.stdout.flush()
        os.dup2(2, 1)
        self.began = time.perf_counter()
        threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()

    def wait(self) -> dict[str, Any]:
        """The next request; the clock of `say` starts. Raises Finished when there is none."""
        line = sys.stdin.readline()
        if not line:
            raise Finished
        self.began = time.perf_counter()
        return json.loads(line)

    def say(self, **figures: Any) -> None:
        """Answer: `figures`, the seconds since the request (unless given) and the peak memory so far."""
        figures = {"seconds": time.perf_counter() - self.began, "peak_bytes": peak_bytes()} | figures
        print(json.dumps(figures), file=self.out, flush=True)


def end_with(parent: int) -> None:
    """End this process, at once, when it is no longer a child of `parent`."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


class Contestant:
    """The parent's end of one child process. Use as a context manager; leaving it ends the child.

    sleeping: its OpenMP threads sleep while they wait, as Plaudit's do (they would starve the learner beside them); else they do what
    its libraries have them do, which is to spin for a while: faster where nothing else runs, as in a contest of turns.
    """

    def __init__(self, name: str, command: Sequence[str | Path], log: Path, *, threads: int, sleeping: bool = True) -> None:
        self.name, self.log = name, log
        self.answers: list[dict[str, Any]] = []
        env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | ({"OMP_WAIT_POLICY": "passive"} if sleeping else {})
        env |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
               "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "PYTHONUNBUFFERED": "1"}  # fmt: skip
        with log.open("wb") as errors:
            self.child = subprocess.Popen(
                [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, cwd=ROOT, env=env, text=True
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.child.stdin is not None and self.child.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it died with a request unread
            self.child.stdin.close()
        try:
            self.child.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        self.child.stdout.close()

    def turn(self, **request: Any) -> dict[str, Any]:
        """Ask for one turn and wait for the answer, which is kept in `answers` too. Raises ContestError when it dies."""
        assert self.child.stdin is not None and self.child.stdout is not None
        try:
            self.child.stdin.write(json.dumps(request) + "\n")
            self.child.stdin.flush()
            line = self.child.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            said = self.log.read_text("utf-8", errors="replace")[-1500:]
            raise ContestError(f"{self.name} ended before its turn was over:\n{said}")
        self.answers.append(json.loads(line))
        return self.answers[-1]

    def median_s(self, skip: int = 1) -> float:
        """Median seconds a turn, the first `skip` (warm-up) left out."""
        return statistics.median(answer["seconds"] for answer in self.answers[skip:])

    @property
    def peak_bytes(self) -> int:
        """The child's peak memory as of its last answer."""
        return int(self.answers[-1]["peak_bytes"])


def round_robin(contestants: Sequence[Contestant], turns: int, shown: Any = None) -> None:
    """`turns` turns of each, one after the other in every round, so that other load on the machine hits all alike."""
    for number in range(turns):
        for contestant in contestants:
            answer = contestant.turn()
            if shown is not None:
                shown(number, contestant, answer)
