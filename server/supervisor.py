"""Keeps the learner child alive: start, restart with back-off, stop with the server.

The child is another program: its crash, out-of-memory or NaN never touches serving. After repeated crashes the
state is degraded, and the restarts go on at the longest pause. Does not read what the child learned.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from server.logs import places
from server.settings import Settings

log = structlog.get_logger("plaudit")

# Runs before the child's own program, in the child: die with the server (Linux), and step back for it.
# Cheaper and safer than a preexec_fn, which may deadlock in a process that has threads.
LAUNCH = """
import os, signal, sys
try:
    import ctypes
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
except (OSError, AttributeError):
    pass
if os.getppid() != int(sys.argv[1]):
    sys.exit(0)
os.nice(int(sys.argv[2]))
os.execv(sys.argv[3], sys.argv[3:])
"""


def learner_command(settings: Settings) -> list[str]:
    """The learner's command line for `settings`, as a child of this process."""
    return [sys.executable, "-m", "learner.worker", *learner_options(settings), "--parent-pid", str(os.getpid())]


def learner_options(settings: Settings) -> list[str]:
    """What `settings` mean to a learner."""
    options = ["--data-dir", str(settings.data_dir), "--model", settings.model, "--round-votes", str(settings.round_votes)]
    options += ["--threads", str(settings.learner_threads), "--device", settings.device, "--dtype", settings.dtype]  # as served, so that probes agree
    for name in ("temperature", "top_p"):
        if (value := getattr(settings, name)) is not None:
            options += ["--set", f"gate.{name}={value}"]
    if settings.temperature is not None:
        options += ["--set", f"ppo.temperature={settings.temperature}"]
    return [*options, *settings.learner_args]


@dataclass(frozen=True)
class Backoff:
    """Pauses between restarts, in seconds."""

    first_s: float = 1.0
    longest_s: float = 60.0
    healthy_s: float = 60.0  # a run this long forgets earlier crashes
    degraded_after: int = 3  # crashes in a row


class Supervisor:
    """One child process. Lives on the event loop; `start` and `stop` are called once each."""

    def __init__(
        self,
        command: list[str],
        log_path: Path,
        *,
        threads: int = 1,
        nice: int = 10,
        backoff: Backoff | None = None,
        on_restart: Callable[[], None] | None = None,
    ) -> None:
        self.command, self.log_path = command, log_path
        self.nice, self.backoff = nice, backoff or Backoff()
        self.env = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "passive",
            "PYTHONUNBUFFERED": "1",
        }
        self.crashes = 0  # in a row
        self.restarts = 0
        self.last_exit: int | None = None
        self.pid: int | None = None
        self._began = 0.0  # the child's start, on the monotonic clock
        self._on_restart = on_restart
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def running(self) -> bool:
        """Whether the child is alive right now."""
        return self.pid is not None

    @property
    def degraded(self) -> bool:
        """Whether the child has crashed too often in a row, and not yet run long enough since to forget it."""
        recovered = self.running and time.monotonic() - self._began >= self.backoff.healthy_s
        return self.crashes >= self.backoff.degraded_after and not recovered

    @property
    def reason(self) -> str | None:
        """Why the learner is degraded, in one line."""
        if not self.degraded:
            return None
        return f"the learner stopped {self.crashes} times in a row (last exit {self.last_exit}); see {self.log_path.name}"

    async def start(self) -> None:
        """Start the child and keep it running until `stop`."""
        self._task = asyncio.create_task(self._run(), name="learner-supervisor")

    async def stop(self, grace_s: float = 10.0) -> None:
        """SIGTERM, then SIGKILL after `grace_s`. Returns when the child is gone."""
        self._grace_s = grace_s
        self._stopping.set()
        if self._task is not None:
            await self._task

    async def _run(self) -> None:
        while not self._stopping.is_set():
            self._began = time.monotonic()
            code = await self._once()
            if self._stopping.is_set():
                return
            lived_s = time.monotonic() - self._began
            self.crashes = 1 if lived_s >= self.backoff.healthy_s else self.crashes + 1
            self.last_exit, self.restarts = code, self.restarts + 1
            pause_s = min(self.backoff.longest_s, self.backoff.first_s * 2 ** min(self.crashes - 1, 30))
            log.warning("learner_stopped", exit=code, lived_s=round(lived_s, 1), restart_in_s=pause_s, crashes=self.crashes)
            if self._on_restart is not None:
                self._on_restart()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause_s)

    async def _once(self) -> int:
        """Run the child to its end, or to `stop`; its exit code (-1 when it could not be started)."""
        launch = [sys.executable, "-c", LAUNCH, str(os.getpid()), str(self.nice), *self.command]
        try:
            with self.log_path.open("ab") as out:
                child = await asyncio.create_subprocess_exec(
                    *launch, stdin=asyncio.subprocess.DEVNULL, stdout=out, stderr=out, env=self.env,
                    # A process group of its own: Ctrl-C in the terminal is for the server, which then stops the child.
                    # Not a session of its own: where Linux groups tasks by session, its niceness would count for nothing.
                    process_group=0,
                )
        except Exception as error:  # whatever it is, a learner that cannot be started is told, and tried again
            log.error("learner_not_started", kind=type(error).__name__, errno=getattr(error, "errno", None), where=places(error))
            return -1
        self.pid = child.pid
        log.info("learner_started", pid=child.pid)
        ended, told = asyncio.create_task(child.wait()), asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({ended, told}, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                for _ in range(2):  # the first may be lost in a library's import; the second finds the default handler
                    if not ended.done():
                        child.send_signal(signal.SIGTERM)
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(asyncio.shield(ended), self._grace_s / 2)
                if not ended.done():
                    log.warning("learner_killed", pid=child.pid)
                    child.kill()
            return await ended
        finally:
            told.cancel()
            self.pid = None
            if child.returncode is None:
                child.kill()
