"""The learner's process: watch for votes, run rounds, say it is alive, stop at once when told.

`python -m learner.worker --data-dir D --model M`. Reads the database and never writes it; what it makes are files
under `rounds/` and `adapters/`. May be killed at any moment: an unfinished round is marked abandoned at the next start
and its votes are used by the next round. Owns when a round runs; `learner/round.py` owns what a round is.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import structlog
from filelock import FileLock, Timeout

from learner.config import ConfigError, LearnerConfig
from learner.errors import unforeseen
from store.adapters import AdapterRegistry
from store.errors import DataDirInUse, DataDirUnwritable, NoDatabase, NotFound, StoreError
from store.rounds import RoundFiles
from store.store import Store

log = structlog.get_logger("plaudit.learner")
GRACE_S = 5.0  # between being told to stop and being gone
STARTER = Path(__file__).parent / "starter" / "assistant"  # the bundled model


class Stopped(BaseException):
    """SIGTERM or SIGINT: unwinds whatever runs. Not an Exception, so that nobody takes it for a failed round."""


class Heartbeat:
    """Writes `rounds/learner.json` from a thread of its own, so that it beats through long computations too."""

    def __init__(self, files: RoundFiles, every_s: float, parent_pid: int | None) -> None:
        self.files, self.every_s, self.parent_pid = files, every_s, parent_pid
        self.fields: dict[str, Any] = {"state": "starting", "pid": os.getpid()}
        self._lock, self._done = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._beat()
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._thread.join(timeout=5)

    def show(self, **fields: Any) -> None:
        """Change what the next beat says, and beat now."""
        with self._lock:
            self.fields = {**self.fields, **fields}
        self._beat()

    def _beat(self) -> None:
        with self._lock:
            try:
                self.files.heartbeat(**self.fields)
            except (OSError, StoreError) as error:  # a full disk: the next one may find room
                log.warning("heartbeat_failed", kind=type(error).__name__)

    def _run(self) -> None:
        while not self._done.wait(self.every_s):
            self._beat()
            if self.parent_pid is not None and os.getppid() != self.parent_pid:
                log.info("parent_gone")
                os.kill(os.getpid(), signal.SIGTERM)
                return


def due(new_votes: int, paused: bool, run_requested: int, run_done: int, config: LearnerConfig) -> bool:
    """Whether a round starts now: an operator asked for one, or enough new votes have come and nobody said pause."""
    return run_requested > run_done or (not paused and new_votes >= config.round_votes)


def finetuning_due(new_demonstrations: int, paused: bool, config: LearnerConfig) -> bool:
    """Whether a round of instruction finetuning starts now, before any other."""
    return not paused and new_demonstrations >= config.sft.min_demonstrations


class Worker:
    """One learner on one data directory."""

    def __init__(self, data_dir: Path, model: str, config: LearnerConfig, parent_pid: int | None = None) -> None:
        self.data_dir, self.model_name, self.config = data_dir, model, config
        self.files = RoundFiles(data_dir / "rounds")
        self.registry = AdapterRegistry(data_dir / "adapters")
        self.heartbeat = Heartbeat(self.files, config.heartbeat_s, parent_pid)

    def run(self, *, once: bool = False) -> int:
        """Until stopped (or, with `once`, until one round has run); the exit code."""
        import torch

        from learner.round import Learner, close_unfinished

        torch.set_num_threads(self.config.threads)
        check_writable(self.files.root)
        lock = alone(self.files.root)
        self.heartbeat.start()
        try:
            for n, state in close_unfinished(self.files, self.registry):
                log.info("unfinished_round_closed", round=n, state=state)
            learner = Learner.load(self.model_name, self.config, self.files, self.registry)
            log.info("learner_ready", threads=self.config.threads, device=str(learner.model.device))
            self._watch(learner, once)
        except Stopped:
            log.info("learner_stopped")
        finally:
            self.heartbeat.show(state="stopped")
            self.heartbeat.stop()
            lock.release()
        return 0

    def _watch(self, learner: Any, once: bool) -> None:
        """Look every `poll_s`; run a round when one is due. A failed round uses up its votes as any other does, so it
        is not tried again until new ones have come."""
        used_seq, shown_seq, run_done = progress_so_far(self.files)
        shown: tuple[str, str | None] | None = None
        while True:
            state, reason = "idle", None
            try:
                with Store.open(self.data_dir, read_only=True) as store:
                    control = store.control()
                    new_votes = store.standing_votes(since_seq=used_seq)
                    demonstrations = store.standing_demonstrations(since_seq=shown_seq)
                    voted = None
                    finetuning = finetuning_due(demonstrations, control.paused, self.config)
                    wanted = finetuning or due(new_votes, control.paused, control.run_requested, run_done, self.config)
                    if wanted and not awaited(self.files, store, self.config.take_in_s):
                        voted, live = store.voted_comparisons(), store.deployment().live
                    state = "paused" if control.paused else "idle"
            except NoDatabase as missing:
                voted, reason = None, str(missing)
            except (StoreError, OSError) as error:  # a writer holds it for a moment, the disk hiccups: look again
                voted, state, reason = None, "degraded", f"cannot read the database ({type(error).__name__})"
            if voted is not None:
                self._round(learner, voted, live, control.run_requested, finetuning)
                used_seq, shown_seq, run_done = progress_so_far(self.files)
                shown = None
                if once:
                    return
                continue
            if shown != (state, reason):
                self.heartbeat.show(state=state, reason=reason, round=None, progress=None, started=None)
                shown = (state, reason)
            time.sleep(self.config.poll_s)

    def _round(self, learner: Any, voted: Sequence[Any], live: str, run_requested: int, finetuning: bool) -> None:
        from learner import demonstrations

        began, started = time.monotonic(), time.time()
        learn = demonstrations.learn if finetuning else None
        n = self.files.begin()
        log.info("round_started", round=n, votes=len(voted), live=live)

        def report(stage: str, fraction: float, message: str) -> None:
            self.heartbeat.show(state=stage, round=n, progress=round(fraction, 3), message=message, reason=None, started=started)

        result = learner.run_round(n, voted, live, run_requested=run_requested, report=report, learn=learn)
        log.info("round_ended", round=n, kind=result["kind"], state=result["state"], version=result["version"], seconds=round(time.monotonic() - began, 1))


def check_writable(root: Path) -> None:
    """Make the rounds' directory if need be. Raises DataDirUnwritable when nothing could be written there."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        allowed = os.access(root, os.W_OK | os.X_OK)
    except OSError as error:
        raise DataDirUnwritable(f"cannot make {root} ({error.strerror}). Choose another --data-dir") from error
    if not allowed:
        raise DataDirUnwritable(f"cannot write to {root}. Give this user permission, or choose another --data-dir")


def alone(root: Path) -> FileLock:
    """The lock of the one learner of this data directory; the system lets go of a dead one's. Raises DataDirInUse."""
    lock = FileLock(root / "learner.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise DataDirInUse("another learner runs on this data directory: stop it (`plaudit serve --no-learner` starts none), or wait for it") from None
    return lock


def awaited(files: RoundFiles, store: Store, within_s: float) -> bool:
    """Whether the newest round published a version that the server has not yet taken in, less than `within_s` ago.

    The next round must start from that version and be compared with it, not with the one it replaces.
    """
    records = files.records()
    if not records:
        return False
    newest = records[-1]
    fresh = newest.get("version") is not None and time.time() - float(newest.get("ended") or 0.0) < within_s
    return fresh and store.round(newest["round"]) is None


def progress_so_far(files: RoundFiles) -> tuple[int, int, int]:
    """(highest vote seq, highest demonstration's seq, highest run request) that finished rounds have used.

    An abandoned round has used none."""
    used, demonstrated, done = 0, 0, 0
    for result in files.records():
        if result.get("state") != "abandoned":
            used = max(used, int(result.get("last_seq") or 0))
            demonstrated = max(demonstrated, int(result.get("demonstration_seq") or 0))
            done = max(done, int(result.get("run_requested") or 0))
    return used, demonstrated, done


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code (0 stopped as asked, 1 failed, 2 what a person must put right)."""
    args = parser().parse_args(argv)
    log_to_stderr()
    try:
        given = {name: value for name in ("round_votes", "threads", "device", "dtype", "seed", "reference")
                 if (value := getattr(args, name)) is not None}  # fmt: skip
        settings = dict(pair.split("=", 1) for pair in args.set)
        config = LearnerConfig.from_dict(given).override(settings)
    except ConfigError as error:
        print(f"plaudit learn: {error}", file=sys.stderr)
        return 2
    except ValueError:
        print("plaudit learn: --set takes name=value, such as --set ppo.updates=10", file=sys.stderr)
        return 2
    from engine.source import ModelError, first_line

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        if args.replay is not None:
            return replay(args.data_dir, args.model, args.replay)
        return Worker(args.data_dir, args.model, config, args.parent_pid).run(once=args.once)
    except Stopped:
        return 0
    except (ModelError, StoreError) as error:  # a person can mend these
        print(f"plaudit learn: {first_line(error)}", file=sys.stderr)
        return 2
    except Exception as error:
        print(f"plaudit learn: {unforeseen(error)}", file=sys.stderr)
        return 1


def replay(data_dir: Path, model: str, n: int) -> int:
    """Run round `n` again from its record, publish nothing, and print whether the same came out."""
    from learner.round import RoundStopped, replay_round

    if n not in RoundFiles(data_dir / "rounds").finished():
        raise NotFound(f"there is no finished round {n} in {data_dir / 'rounds'}")
    try:
        outcome = replay_round(data_dir, model, n)
    except RoundStopped as stop:
        raise NotFound(str(stop)) from stop
    print(json.dumps(outcome, indent=2))
    return 0 if outcome["same"] else 1


def stop(signum: int, frame: object) -> None:
    """Signal handler: unwind at once. A second signal finds the default handler, and `GRACE_S` later the process ends
    whatever holds it up (an import may swallow what a handler raises); every file is whole or absent at any moment."""
    signal.signal(signum, signal.SIG_DFL)
    last = threading.Timer(GRACE_S, os._exit, (0,))
    last.daemon = True
    last.start()
    raise Stopped


def log_to_stderr() -> None:
    """One JSON object a line on stderr, as the server's log."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def parser() -> argparse.ArgumentParser:
    """Arguments of `plaudit learn`."""
    p = argparse.ArgumentParser(prog="plaudit learn", description="Run the learner on a data directory.")
    p.add_argument("--data-dir", type=Path, default=Path("plaudit-data"), help="what `plaudit serve --data-dir` has")
    p.add_argument("--model", default=str(STARTER), help="the server's base model: a directory or a hub id")
    p.add_argument("--round-votes", type=int, help="new votes that start a round (default 16)")
    p.add_argument("--threads", type=int, help="CPU threads of torch (default 1)")
    p.add_argument("--device", help="auto, cpu, cuda or cuda:N (default auto)")
    p.add_argument("--dtype", help="auto, float32, bfloat16 or float16 (default auto)")
    p.add_argument("--seed", type=int, help="round n uses seed + n (default 0)")
    p.add_argument("--reference", help='policy of the KL penalty: "auto", "base" or a version (default auto)')
    p.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="any other setting, e.g. ppo.updates=10")
    p.add_argument("--once", action="store_true", help="end after one round")
    p.add_argument("--replay", type=int, metavar="N", help="run round N again from its record and compare; publishes nothing")
    p.add_argument("--parent-pid", type=int, help="end when this process is no longer the parent")
    return p


if __name__ == "__main__":
    raise SystemExit(main())
