"""The supervised child: restart with back-off, degraded after repeated crashes, gone at shutdown."""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from server.supervisor import Backoff, Supervisor

QUICK = Backoff(first_s=0.05, longest_s=0.2, healthy_s=60.0, degraded_after=3)
CRASHES_TWICE = """
import os, pathlib, sys, time
runs = pathlib.Path(sys.argv[1]); n = len(runs.read_text()) if runs.exists() else 0
runs.write_text("x" * (n + 1))
print("run", n + 1, "nice", os.nice(0), "omp", os.environ["OMP_NUM_THREADS"], flush=True)
if n < 2:
    sys.exit(7)
time.sleep(60)
"""


def child(tmp_path: Path, source: str, **options: object) -> Supervisor:
    script = tmp_path / "child.py"
    script.write_text(source)
    command = [sys.executable, str(script), str(tmp_path / "runs")]
    return Supervisor(command, tmp_path / "learner.log", backoff=QUICK, **options)  # type: ignore[arg-type]


async def until(condition: object, timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_crashing_child_is_started_again_and_its_words_go_to_the_log(tmp_path: Path) -> None:
    async def scenario() -> None:
        supervisor = child(tmp_path, CRASHES_TWICE, nice=5, threads=3)
        await supervisor.start()
        log = tmp_path / "learner.log"
        await until(lambda: log.exists() and b"run 3" in log.read_bytes())
        assert supervisor.running and supervisor.crashes == 2 and not supervisor.degraded
        assert supervisor.last_exit == 7 and supervisor.restarts == 2
        assert b"nice 5 omp 3" in log.read_bytes()
        pid = supervisor.pid
        assert pid is not None
        await supervisor.stop(grace_s=5)
        assert gone(pid) and not supervisor.running

    asyncio.run(scenario())


def test_a_child_that_always_crashes_is_degraded_but_still_tried(tmp_path: Path) -> None:
    async def scenario() -> None:
        supervisor = child(tmp_path, "import sys; sys.exit(3)")
        await supervisor.start()
        await until(lambda: supervisor.degraded)
        assert "last exit 3" in (supervisor.reason or "")
        seen = supervisor.restarts
        await until(lambda: supervisor.restarts > seen)
        await supervisor.stop()

    asyncio.run(scenario())


def test_a_child_that_came_back_and_stays_is_no_longer_degraded(tmp_path: Path) -> None:
    async def scenario() -> None:
        supervisor = child(tmp_path, CRASHES_TWICE)
        supervisor.backoff = Backoff(first_s=0.05, longest_s=0.2, healthy_s=600.0, degraded_after=2)
        await supervisor.start()
        await until(lambda: supervisor.crashes == 2 and supervisor.running)
        assert supervisor.degraded and "2 times in a row" in (supervisor.reason or "")
        supervisor.backoff = replace(supervisor.backoff, healthy_s=0.0)  # as if that long had gone by
        assert not supervisor.degraded
        assert supervisor.running and supervisor.reason is None and supervisor.restarts == 2
        await supervisor.stop(grace_s=5)

    asyncio.run(scenario())


def test_a_child_deaf_to_sigterm_is_killed_after_the_grace_period(tmp_path: Path) -> None:
    deaf = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('deaf', flush=True)\ntime.sleep(60)"

    async def scenario() -> None:
        supervisor = child(tmp_path, deaf)
        await supervisor.start()
        await until(lambda: (tmp_path / "learner.log").exists() and b"deaf" in (tmp_path / "learner.log").read_bytes())
        pid = supervisor.pid
        assert pid is not None
        began = asyncio.get_running_loop().time()
        await supervisor.stop(grace_s=0.3)
        assert 0.25 < asyncio.get_running_loop().time() - began < 5
        assert gone(pid)

    asyncio.run(scenario())


def test_a_program_that_is_not_there_counts_as_a_crash(tmp_path: Path) -> None:
    async def scenario() -> None:
        supervisor = Supervisor([str(tmp_path / "absent")], tmp_path / "learner.log", backoff=QUICK)
        await supervisor.start()
        await until(lambda: supervisor.degraded)
        assert supervisor.crashes >= QUICK.degraded_after and supervisor.reason is not None and not supervisor.running
        await supervisor.stop()

    asyncio.run(scenario())


def test_a_start_that_fails_as_nobody_foresaw_counts_as_a_crash_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under uvloop, which does not know `process_group`: the supervisor ended with it, and nobody was told."""

    async def refuse(*_: object, **__: object) -> None:
        raise TypeError("unexpected keyword argument")

    async def scenario() -> None:
        supervisor = child(tmp_path, "")
        monkeypatch.setattr(asyncio, "create_subprocess_exec", refuse)
        await supervisor.start()
        await until(lambda: supervisor.degraded)
        assert supervisor.reason is not None and not supervisor.running
        await supervisor.stop()

    asyncio.run(scenario())
