"""Everything one running server holds, opened in order and closed in reverse.

Owns lifetimes. The parts own their work: `bridge.py` the engine thread, `deployment.py` the versions,
`supervisor.py` the learner, `store/` the data.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import structlog
import torch

from engine.engine import Engine
from engine.model import CausalModel
from engine.source import ModelError, Sampling
from engine.tokenizer import ChatTokenizer
from server.auth import Key, Keyring, VoterHash, check_bind
from server.ballots import Ballots
from server.bridge import EngineBridge
from server.candidates import Candidates
from server.cores import Cores
from server.deployment import BASE, Deployment
from server.erasures import Erasures
from server.errors import StartupError
from server.keylog import KeyLog
from server.metrics import Metrics
from server.quota import Quota
from server.settings import Settings
from server.supervisor import Backoff, Supervisor, learner_command
from store.adapters import AdapterRegistry
from store.errors import CorruptAdapter
from store.rounds import RoundFiles
from store.store import Store

log = structlog.get_logger("plaudit")
T = TypeVar("T")
UPLOAD = ".upload-"  # how a directory begins in which an uploaded adapter is tried out


class Runtime:
    """One server's parts. Build with `open`, then `start` and `stop` on the event loop."""

    def __init__(self, settings: Settings, store: Store, keyring: Keyring, voter_hash: VoterHash, model: CausalModel,
                 tokenizer: ChatTokenizer, command: list[str] | None, backoff: Backoff | None) -> None:
        self.settings, self.store, self.keyring, self.voter_hash = settings, store, keyring, voter_hash
        self.model, self.tokenizer = model, tokenizer
        self.max_context = min(settings.max_context or model.max_context, model.max_context)
        self.sampling = Sampling(settings.temperature or model.sampling.temperature, settings.top_p or model.sampling.top_p)  # where a request does not say
        self.metrics = Metrics()
        self.quota = Quota(settings.rate_requests, settings.rate_chat)
        self.registry = AdapterRegistry(settings.data_dir / "adapters")
        self.rounds = RoundFiles(settings.data_dir / "rounds")
        engine = Engine(model, tokenizer, max_sequences=settings.max_sequences, max_context=self.max_context,
                        max_queue=settings.max_queue, reuse_bytes=settings.reuse_mb << 20, int8=settings.int8)
        self.bridge = EngineBridge(engine)
        self.cores = Cores(self.bridge, self.rounds, settings.threads, settings.learner_threads)
        self._database = ThreadPoolExecutor(1, thread_name_prefix="database")
        self.ballots = Ballots(store, self.db)
        self.keylog = KeyLog(keyring, store, self.db)
        self.erasures = Erasures(self.bridge)
        self.deployment = Deployment(
            settings, store, self.registry, self.rounds, self.bridge, self.metrics, self.db,
            base_digest=model.digest, dtype=str(model.dtype).removeprefix("torch."),
        )
        self.candidates = Candidates(settings, model, self.rounds, self.bridge, self.deployment)
        self.supervisor: Supervisor | None = None
        if command is not None:
            self.supervisor = Supervisor(
                command, settings.data_dir / "learner.log", threads=settings.learner_threads,
                nice=settings.learner_nice, backoff=backoff, on_restart=self.metrics.learner_restarts.inc,
            )
        self.started: float | None = None  # Unix seconds
        self.draining = False
        self.running_chats = 0
        self.verifying: dict[str, asyncio.Task[Key | None]] = {}  # presented key -> its verification, while it runs
        self._random = random.Random(settings.seed if settings.seed is not None else secrets.randbits(128))

    @classmethod
    def open(cls, settings: Settings, *, command: list[str] | None = None, backoff: Backoff | None = None) -> Runtime:
        """Open the data directory and load the model.

        `command`: the learner child's, instead of the one `settings` say. Raises StartupError, or a StoreError such
        as DataDirInUse: each one line that says what to do.
        """
        store = Store.open(settings.data_dir)
        try:
            registry = AdapterRegistry(settings.data_dir / "adapters")
            registry.versions()  # what cannot be read is told now, in one line
            RoundFiles(settings.data_dir / "rounds").all()
            keyring = Keyring(settings.data_dir)
            check_bind(settings, keyring)
            tokenizer = ChatTokenizer.load(settings.model)
            device = settings.device
            if device == "auto":
                device = "cuda" if torch.cuda.is_available() else "cpu"
            dtype = settings.dtype
            if dtype == "auto":
                dtype = "bfloat16" if device.startswith("cuda") else "float32"
            model = CausalModel.load(settings.model, dtype=getattr(torch, dtype), device=device)
            check_base(store, registry, model, settings)
            sweep_uploads(settings.data_dir)
            if command is None and settings.learner:
                command = learner_command(settings)
            return cls(settings, store, keyring, VoterHash(settings.data_dir), model, tokenizer, command, backoff)
        except ModelError as unusable:
            store.close()
            raise StartupError(str(unusable)) from unusable
        except BaseException:
            store.close()
            raise

    async def start(self) -> None:
        """Start the engine, take in what is there, start the learner."""
        self.bridge.start()
        await self.cores.start()
        await self.deployment.start()
        await self.keylog.start()
        if self.supervisor is not None:
            await self.supervisor.start()
        self.started = time.time()
        log.info("ready", live=self.deployment.live, versions=len(self.deployment.servable()))

    async def drain(self, give_up: Callable[[], bool] = lambda: False) -> None:
        """Refuse new chats, and wait for the running ones up to the grace period, or until `give_up()`. Once."""
        if self.draining:
            return
        self.draining = True
        until = time.monotonic() + self.settings.grace_s
        while self.running_chats and time.monotonic() < until and not give_up():
            await asyncio.sleep(0.05)

    async def stop(self) -> None:
        """Drain, then stop every part and close the database."""
        await self.drain()
        if self.supervisor is not None:
            await self.supervisor.stop()
        await self.keylog.stop()
        await self.deployment.stop()
        await self.cores.stop()
        await self.bridge.stop()
        await self.db(self.store.close)
        self._database.shutdown()
        log.info("stopped")

    async def db(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run a database call off the event loop, one at a time: the store has one writer."""
        return await asyncio.get_running_loop().run_in_executor(self._database, lambda: function(*args, **kwargs))

    def draw_seed(self) -> int:
        """A fresh seed for one request, below 2^53 so that every JSON reader keeps it exactly."""
        return self._random.getrandbits(53)

    @property
    def not_ready(self) -> str | None:
        """Why new requests should go elsewhere, or None."""
        if self.started is None:
            return "starting"
        if self.draining:
            return "draining"
        return None if self.bridge.alive else "the engine thread has stopped"


def check_base(store: Store, registry: AdapterRegistry, model: CausalModel, settings: Settings) -> None:
    """Refuse to start with another model than the live version was made for: it would be given up for the bare model. Raises `StartupError`."""
    live = store.deployment().live
    if live == BASE:
        return
    try:
        manifest = registry.manifest(live)
    except CorruptAdapter:  # what is no longer fit is stepped back from, with its reason
        return
    if manifest.base_digest != model.digest:
        raise StartupError(
            f"{live}, which is live in {settings.data_dir}, was made for another model ({manifest.base_model}) than {settings.model}: "
            "start with that --model, or with another --data-dir; or make the bare model live there first (`plaudit adapters promote base`)"
        )


def sweep_uploads(data_dir: Path) -> None:
    """Remove what uploads left that a kill cut short."""
    for left in data_dir.glob(f"{UPLOAD}*"):
        shutil.rmtree(left, ignore_errors=True)
