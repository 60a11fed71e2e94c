"""The server and its learner child: what `GET /v1/learner` says while the child runs, crashes, and is stopped."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from server.cores import Cores
from server.supervisor import Backoff, learner_command
from store.rounds import RoundFiles
from tests.serving import ask, served, settings_for

BEATS = """
import sys, time
from pathlib import Path
from store.rounds import RoundFiles
files = RoundFiles(Path(sys.argv[1]))
while True:
    files.heartbeat(state="ppo", round=4, progress=0.5)
    time.sleep(0.1)
"""


def test_the_engine_leaves_the_learner_its_threads_while_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bridge:
        async def call(self, function: Callable[[None], None]) -> None:
            function(None)

    told: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", told.append)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("server.cores.POLL_S", 0.01)
    files = RoundFiles(tmp_path)

    async def settled(threads: int) -> None:
        for _ in range(1000):
            if told[-1] == threads:
                break
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)  # and does not change its mind

    async def course(most: int) -> list[int]:
        told.clear()
        cores = Cores(Bridge(), files, most, learner=1)  # type: ignore[arg-type]
        files.heartbeat(state="idle")
        await cores.start()
        beside = max(1, min(most, 4 - 1))
        for state, threads in (("ppo", beside), ("gating", beside), ("idle", most), ("ppo", beside), ("stopped", most), ("ppo", beside)):
            files.heartbeat(state=state)
            await settled(threads)
        monkeypatch.setattr("server.cores.STALE_S", -1.0)  # that learner was killed a while ago
        await settled(most)
        await cores.stop()
        monkeypatch.setattr("server.cores.STALE_S", 60.0)
        return list(told)

    assert asyncio.run(course(4)) == [4, 3, 4, 3, 4, 3, 4]
    assert asyncio.run(course(2)) == [2]  # there is room for both


def test_a_crashing_learner_degrades_learning_but_not_serving(tiny_llama: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; print('no memory', file=sys.stderr); sys.exit(9)"]
    backoff = Backoff(first_s=0.05, longest_s=0.1)
    with served(settings_for(tmp_path, tiny_llama), learner_command=command, backoff=backoff) as running, running.client() as c:
        running.until(lambda: c.get("/v1/learner").json()["state"] == "degraded")
        running.until(lambda: "3 times" in (c.get("/v1/learner").json()["reason"] or "") or c.get("/v1/learner").json()["restarts"] > 3)
        assert "exit 9" in c.get("/v1/learner").json()["reason"]
        assert c.get("/v1/status").json()["learner_state"] == "degraded"
        assert ask(c, 2)["choices"] and c.get("/readyz").status_code == 200
        restarts = next(line for line in c.get("/metrics").text.splitlines() if line.startswith("plaudit_learner_restarts_total"))
        assert float(restarts.split()[1]) >= 3
    assert b"no memory" in (tmp_path / "learner.log").read_bytes()


def test_the_learners_own_words_are_passed_on_and_it_is_stopped_with_the_server(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    command = [sys.executable, "-c", BEATS, str(tmp_path / "rounds")]
    with served(settings_for(tmp_path, tiny_llama), learner_command=command) as running, running.client() as c:
        running.until(lambda: c.get("/v1/learner").json()["state"] == "ppo")
        learner = c.get("/v1/learner").json()
        assert (learner["round"], learner["progress"], learner["reason"]) == (4, 0.5, None)
        supervisor = running.runtime.supervisor
        assert supervisor is not None and supervisor.pid is not None
        pid = supervisor.pid
        assert "plaudit_learner_up 1.0" in c.get("/metrics").text
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_learner_is_told_what_the_server_serves(tiny_llama: Path, tmp_path: Path) -> None:
    command = learner_command(settings_for(tmp_path, tiny_llama, round_votes=5, learner_args=("--set", "ppo.updates=2")))
    assert command[1:3] == ["-m", "learner.worker"]
    told = dict(zip(command[3::2], command[4::2], strict=True))
    assert told["--data-dir"] == str(tmp_path) and told["--model"] == str(tiny_llama)
    assert told["--round-votes"] == "5" and told["--set"] == "ppo.updates=2"
    command = learner_command(settings_for(tmp_path, tiny_llama, temperature=0.7, top_p=0.9, learner_args=("--set", "ppo.temperature=0.5")))
    said = [command[i + 1] for i, word in enumerate(command) if word == "--set"]
    assert said == ["gate.temperature=0.7", "gate.top_p=0.9", "ppo.temperature=0.7", "ppo.temperature=0.5"]  # the last of two counts
