"""Simulated people against a real FastAPI application that answers from fixed texts."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from scipy.stats import binomtest

from learner.prompts import PromptsError, conversations_from, prompts_from
from learner.simulate import Client, SimulateError, simulate, standing

TEXTS = {"plaudit@base": ["one two three four five six", "one two three four", "one two three", "one two three four five"],
         "plaudit": ["one", "one two three four five", "one two", "one"]}


def fixed_server() -> FastAPI:
    """Answers with TEXTS from the seed-th on; the first chat is refused as too many. Keeps the votes it gets."""
    app = FastAPI()
    app.state.votes = []
    app.state.voters = []
    app.state.shown = {}
    app.state.refusals = 1

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Any:
        body = await request.json()
        if app.state.refusals:
            app.state.refusals -= 1
            return JSONResponse({"error": {"message": "slow down"}}, 429, {"Retry-After": "0"})
        texts = TEXTS[body["model"].replace("@v000001", "")]
        replies = [texts[(body["seed"] + i) % len(texts)] for i in range(body["n"])]
        name = f"cmp_{len(app.state.shown)}"
        app.state.shown[name] = replies
        return {"choices": [{"index": i, "message": {"content": t}} for i, t in enumerate(replies)], "plaudit": {"comparison_id": name}}

    @app.put("/v1/comparisons/{name}/vote")
    async def vote(name: str, request: Request) -> Any:
        app.state.votes.append((app.state.shown[name], await request.json()))
        app.state.voters.append(request.headers["plaudit-voter"])
        return {"choices": [{"index": i, "version": "base"} for i in range(len(app.state.shown[name]))]}

    return app


@contextlib.contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """The address of `app` under uvicorn in a thread."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def test_people_vote_by_their_taste_and_wait_when_the_server_is_busy() -> None:
    app = fixed_server()
    with listening(app) as url:
        report = simulate(url, ["a", "b"], "shorter", votes=20, noise=0.0, voters=3, n=4)
    assert report.votes == 20 and report.versions == {"base": 80} and len(set(app.state.voters)) == 3
    assert report.mean_taste["base"] == -(1 + 5 + 2 + 1) / 4
    for replies, vote in app.state.votes:
        assert len(replies[vote["favourite"]].split()) == 1


def test_the_random_voters_pick_anything_and_the_others_their_favourite() -> None:
    """One of five votes blindly: 15 picks of 4 hit a shortest reply (2 of 4) by chance, all of them once in 30,000 runs."""
    app = fixed_server()
    with listening(app) as url:
        report = simulate(url, ["a", "b"], "shorter", votes=75, noise=0.0, voters=5, random_voters=0.2)
    right: dict[str, list[bool]] = {}
    for voter, (replies, vote) in zip(app.state.voters, app.state.votes, strict=True):
        right.setdefault(voter, []).append(len(replies[vote["favourite"]].split()) == 1)
    blind = [voter for voter, hits in right.items() if not all(hits)]
    assert len(right) == 5 and len(blind) == report.random_voters == 1
    assert binomtest(sum(right[blind[0]]), 15, 0.5).pvalue > 1e-4


def test_a_share_of_random_voters_that_is_nobody_is_said() -> None:
    with pytest.raises(SimulateError, match="give more voters"):
        simulate("http://127.0.0.1:9", ["a"], "shorter", voters=2, random_voters=0.2)


def test_a_standing_is_what_counting_by_hand_gives() -> None:
    app = fixed_server()
    app.state.refusals = 0
    with listening(app) as url, Client(url) as client:
        # prompt 0: seeds 0, 1, 2: ours "one", "one..five"; base "one..four", "one two three"; the best of 8 has 3 words
        found = standing(client, "shorter", ["a"], "plaudit@v000001", samples=2)
        with pytest.raises(SimulateError, match="name the version"):  # of several replies by plaudit some are another version's
            standing(client, "shorter", ["a"], "plaudit")
    assert found.win_rate == 0.5  # 1 < 4 wins, 5 < 3 loses
    assert found.best_of == 0.75  # 3 < 4 wins, 3 = 3 ties
    assert found.share == 0.5 / 0.75


def test_a_server_that_is_not_there_is_said_at_once() -> None:
    began = time.monotonic()
    with pytest.raises(SimulateError, match="Is `plaudit serve` running"):
        simulate("http://127.0.0.1:9", ["a"], "shorter")
    assert time.monotonic() - began < 10  # a dozen tries with waits take over 20 s


def test_what_goes_wrong_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(SimulateError, match="there are shorter"):
        simulate("http://127.0.0.1:9", ["a"], "nicer")
    with pytest.raises(PromptsError, match="no file"):
        prompts_from(tmp_path / "none.txt")
    (tmp_path / "bad.jsonl").write_text("{}\n")
    with pytest.raises(PromptsError, match=r"bad\.jsonl"):
        prompts_from(tmp_path / "bad.jsonl")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"one\ntwo\n" * 900)[:-12])
    with pytest.raises(PromptsError, match=r"cut\.txt\.gz is not UTF-8 text, plain or gzipped"):
        prompts_from(tmp_path / "cut.txt.gz")
    with pytest.raises(PromptsError, match="is a directory"):
        prompts_from(tmp_path)


def test_prompts_come_from_lines_or_conversations(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffone\n\n two \n")
    assert prompts_from(tmp_path / "a.txt") == ["one", "two"]
    talk = [{"role": "user", "content": "four"}, {"role": "assistant", "content": "4"}, {"role": "user", "content": "and one?"}]
    rows = [{"prompt": "three"}, {"prompt": talk}]
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    assert prompts_from(tmp_path / "b.jsonl.gz") == ["three", "and one?"]
    assert conversations_from(tmp_path / "b.jsonl.gz") == [({"role": "user", "content": "three"},), tuple(talk)]
    (tmp_path / "c.jsonl").write_text(json.dumps({"prompt": "one"}) + "\n\n" + json.dumps({"prompt": talk[:2]}))
    with pytest.raises(PromptsError, match=r"c\.jsonl, line 3: a prompt ends with a turn of the user's"):
        conversations_from(tmp_path / "c.jsonl")
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": [{"role": "robot", "content": "Hum."}]}))
    with pytest.raises(PromptsError, match=r"d\.jsonl, line 1: prompt must be a string or a list"):
        conversations_from(tmp_path / "d.jsonl")
