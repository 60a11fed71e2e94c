"""Real servers for tests: uvicorn on loopback in a thread, on a tiny model, and random adapters to publish."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import torch
from fastapi import FastAPI

from engine.engine import probe
from engine.model import CausalModel
from engine.tokenizer import ChatTokenizer
from server.app import create_app
from server.runtime import Runtime
from server.serve import PlauditServer, make_server
from server.settings import Settings
from store.adapters import AdapterRegistry

HELLO = [{"role": "user", "content": "Hello! How are you today?"}]


def settings_for(data_dir: Path, model: Path, **changes: Any) -> Settings:
    """Settings of a small server without a learner."""
    values = {"data_dir": data_dir, "model": str(model), "learner": False, "seed": 1, "log_level": "error",
              "max_tokens": 64, "grace_s": 5.0, **changes}
    return Settings(**values)


class Served:
    """A running server."""

    def __init__(self, app: FastAPI, server: PlauditServer, url: str, thread: threading.Thread) -> None:
        self.app, self.server, self.url, self.thread = app, server, url, thread
        self.runtime: Runtime = app.state.runtime

    def client(self, voter: str = "ana", **headers: str) -> httpx.Client:
        """A client that speaks for `voter`."""
        return httpx.Client(base_url=self.url, headers={"Plaudit-Voter": voter, **headers}, timeout=60, trust_env=False)

    def slow(self, seconds: float = 0.005) -> None:
        """Every step of the engine takes so much longer from now on: what is to be cut off has a middle, on however fast a machine."""
        engine = self.runtime.bridge._engine
        step = engine.step

        def late() -> Any:
            time.sleep(seconds)
            return step()

        engine.step = late

    def until(self, condition: Any, timeout_s: float = 30.0) -> None:
        """Wait until `condition()` is true; fails after `timeout_s`."""
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.02)


@contextlib.contextmanager
def served(settings: Settings, **options: Any) -> Iterator[Served]:
    """A real uvicorn on a free loopback port, stopped at the end as a signal would stop it."""
    app = create_app(settings, **options)
    server = make_server(app, settings)
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    running = Served(app, server, f"http://127.0.0.1:{sock.getsockname()[1]}", thread)
    try:
        running.until(lambda: server.started or not thread.is_alive())
        assert server.started, "the server did not start"
        yield running
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        sock.close()
        assert not thread.is_alive(), "the server did not stop"


def ask(client: httpx.Client, n: int = 2, **fields: Any) -> dict[str, Any]:
    """One chat completion; fails when it is refused."""
    body = {"model": "plaudit", "messages": HELLO, "n": n, "max_tokens": 8, **fields}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def publish_random(
    registry: AdapterRegistry, model_dir: Path, *, seed: int = 0, scale: float = 0.3, verdict: str = "accepted",
    **fields: Any,
) -> str:
    """Publish a random adapter of `model_dir` as the learner would; returns its version."""
    model, tokenizer = CausalModel.load(model_dir), ChatTokenizer.load(model_dir)
    model.lora.create("new", r=4, alpha=8, seed=seed, trainable=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.lora.parameters("new").items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    manifest = {
        "parent": "base", "round": None, "kind": "ppo", "base_digest": model.digest, "base_model": str(model_dir),
        "data_digest": None, "seed": seed, "gate": {"verdict": verdict, "checks": []},
        "probe": probe(model, "new", tokenizer.render(HELLO)), **fields,
    }
    return registry.publish(lambda path: model.lora.save("new", path), manifest).version
