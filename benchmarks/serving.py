"""A real `plaudit serve` as a child process, for benchmarks: started on a free port, waited for, measured, stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from store.rounds import RoundFiles

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    data_dir: Path
    pid: int
    ready_s: float  # from start to /readyz


@contextlib.contextmanager
def serving(*flags: str, data_dir: Path | None = None, ready_within_s: float = 120.0) -> Iterator[Server]:
    """Run `plaudit serve` with `flags` on a data directory of its own; its output goes to `serve.log` there.

    A benchmark that is told to end (SIGTERM) stops its server too, so this is for the main thread.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with contextlib.ExitStack() as stack:
        directory = data_dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="plaudit-bench-")))
        directory.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        log = stack.enter_context((directory / "serve.log").open("wb"))
        command = [sys.executable, str(ROOT / "plaudit.py"), "serve", "--port", str(port), "--data-dir", str(directory), *flags]
        began = time.monotonic()
        child = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        url = f"http://127.0.0.1:{port}"
        try:
            while not is_ready(url):
                if child.poll() is not None or time.monotonic() - began > ready_within_s:
                    raise RuntimeError(f"the server did not start:\n{(directory / 'serve.log').read_text()[-2000:]}")
                time.sleep(0.1)
            yield Server(url, directory, child.pid, time.monotonic() - began)
        finally:
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(timeout=60)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def cpu_seconds(pid: int) -> float:
    """CPU seconds that a process has used so far, all its threads together, its children not. Linux only."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()
    except FileNotFoundError:
        raise RuntimeError(f"cannot read the CPU time of process {pid}: it has ended, or this is not Linux") from None
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")  # utime and stime, fields 14 and 15 of proc(5)


def machine_cpu_seconds() -> float:
    """CPU seconds that everything on this machine together has used so far. Linux only."""
    user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text("ascii").splitlines()[0].split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")  # idle and waiting for the disk left out


def learner_pid(server: Server) -> int:
    """The learner's process, as its heartbeat says. Raises RuntimeError while there is none."""
    pid = (RoundFiles(server.data_dir / "rounds").read_heartbeat() or {}).get("pid")
    if pid is None:
        raise RuntimeError(f"no learner has said anything in {server.data_dir}")
    return int(pid)


def until_learner_rests(server: Server, limit_s: float = 120.0) -> None:
    """Wait until the learner has loaded its model and has nothing to do. Raises RuntimeError after `limit_s`."""
    end, files = time.monotonic() + limit_s, RoundFiles(server.data_dir / "rounds")
    while (files.read_heartbeat() or {}).get("state") not in ("idle", "paused"):
        if time.monotonic() > end:
            raise RuntimeError(f"the learner has not come to rest after {limit_s:.0f} s; see {server.data_dir / 'learner.log'}")
        time.sleep(0.2)


def is_ready(url: str) -> bool:
    """Whether `/readyz` answers 200."""
    try:
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False
