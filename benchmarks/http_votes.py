"""Votes over HTTP, durable, against a bare FastAPI echo; how soon the server is ready; what it uses when nobody is there.

`python -m benchmarks.http_votes [--quick]`. A real server on the starter model as shipped (learner running, told to pause;
the rate limit raised) and, in a process of its own, an application of one handler that echoes the same body under the same
uvicorn. The comparisons voted on are in the database beforehand. Keep-alive clients load both, taking turns; rates are
medians over the turns. At the end the database must hold every vote that was answered. JSON last; exit status 1 when a
target is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

from benchmarks.filling import fill
from benchmarks.serving import ROOT, Server, cpu_seconds, learner_pid, serving, until_learner_rests
from server.auth import VoterHash
from store.database import durability
from store.store import Store

TARGETS = {"against_echo": 0.6, "ready_s": 5.0, "idle_cpu_s": 0.25}  # at least; at most; at most, over 10 s (2.5% of a core)
BODY = json.dumps({"favourite": 1}).encode()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, or be the echo; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 turns of 320 votes")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--votes", type=int, default=1600, help="a turn")
    parser.add_argument("--turns", type=int, default=5, help="counted ones; one more comes first")
    parser.add_argument("--idle-s", type=float, default=10.0)
    parser.add_argument("--echo", type=int, metavar="PORT", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.echo:
        echo(args.echo)
        return 0
    votes, turns = (320, 2) if args.quick else (args.votes, args.turns)
    votes -= votes % args.clients  # so that a comparison is voted on by the client it was shown to
    voters = [f"client-{i}" for i in range(args.clients)]
    with tempfile.TemporaryDirectory(prefix="plaudit-bench-") as scratch:
        data_dir = Path(scratch)
        with Store.open(data_dir) as store:
            store.steer("pause")
            hashed = VoterHash(data_dir)
            fill(store, 0, votes * (turns + 1), [hashed(voter) for voter in voters], voted=False)
        fsync_ms = 1000 * fsync_seconds(data_dir)
        with serving("--rate-requests", "1000000/second", data_dir=data_dir) as server, echoing() as echo_url:
            page_s = server.ready_s + first_page(server.url)
            print(f"ready after {server.ready_s:.2f} s, the chat page after {page_s:.2f} s", flush=True)
            until_learner_rests(server)
            idle = idle_cpu(server, args.idle_s)
            print(f"idle for {args.idle_s:g} s: {idle['server']:.2f} s of CPU by the server, {idle['learner']:.2f} s by the learner", flush=True)
            rates: dict[str, list[float]] = {"votes": [], "echo": []}
            latencies: dict[str, list[float]] = {"votes": [], "echo": []}
            used = 0.0
            for turn in range(turns + 1):
                ids = range(turn * votes, (turn + 1) * votes)
                for name, url, path in (("votes", server.url, "/v1/comparisons/cmp_{}/vote"), ("echo", echo_url, "/echo/{}")):
                    before = cpu_seconds(server.pid)
                    seconds, each = load(url, [path.format(i) for i in ids], voters)
                    if turn:
                        used += cpu_seconds(server.pid) - before if name == "votes" else 0.0
                        rates[name].append(votes / seconds)
                        latencies[name] += each
                    print(f"{'turn ' + str(turn) if turn else 'warm-up':<8} {name:<6} {votes / seconds:8.0f} a second", flush=True)
        with Store.open(data_dir) as store:
            kept = store.standing_votes()
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratio = medians["votes"] / medians["echo"]
    idle_10 = 10 * (idle["server"] + idle["learner"]) / args.idle_s
    met = {
        "against_echo": ratio >= TARGETS["against_echo"], "ready_s": server.ready_s <= TARGETS["ready_s"],
        "idle_cpu_s": idle_10 <= TARGETS["idle_cpu_s"], "all_kept": kept == votes * (turns + 1),
    }  # fmt: skip
    print(f"{medians['votes']:.0f} votes and {medians['echo']:.0f} echoes a second: {ratio:.2f}x; {kept} of {votes * (turns + 1)} answered votes are kept", flush=True)
    print(json.dumps({
        "benchmark": "http_votes", "targets": TARGETS, "met": met, "cpus": os.cpu_count(), "clients": args.clients, "votes_a_turn": votes, "turns": turns,
        "per_s": {name: round(value, 1) for name, value in medians.items()}, "against_echo": round(ratio, 3),
        "latency_ms": {name: {"p50": round(1000 * statistics.median(v), 2), "p99": round(1000 * statistics.quantiles(v, n=100)[98], 2)} for name, v in latencies.items()},
        "server_cpu_ms_a_vote": round(1000 * used / (votes * turns), 3), "ready_s": round(server.ready_s, 2), "page_s": round(page_s, 2), "idle_cpu_s_over_10_s": round(idle_10, 3), "idle": {k: round(v, 3) for k, v in idle.items()},
        "durability": str(durability()), "fsync_ms": round(fsync_ms, 3), "kept": kept,
    }))  # fmt: skip
    return 0 if all(met.values()) else 1


def load(url: str, paths: Sequence[str], voters: Sequence[str]) -> tuple[float, list[float]]:
    """PUT the body to every path, path i by client i % len(voters), all clients at once: seconds, and those of each answer.

    Raises RuntimeError for an answer that is not a success.
    """
    where = urlsplit(url).netloc
    failed: list[str] = []
    latencies: list[list[float]] = [[] for _ in voters]
    start = threading.Barrier(len(voters) + 1)

    def client(number: int) -> None:
        headers = {"Content-Type": "application/json", "Plaudit-Voter": voters[number]}
        with contextlib.closing(http.client.HTTPConnection(where, timeout=60)) as connection:
            connection.connect()
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # head and body are two writes: no waiting between them
            start.wait()
            for path in paths[number :: len(voters)]:
                began = time.perf_counter()
                connection.request("PUT", path, BODY, headers)
                answer = connection.getresponse()
                said = answer.read()
                latencies[number].append(time.perf_counter() - began)
                if answer.status not in (200, 201):
                    failed.append(f"{answer.status} {said[:200].decode(errors='replace')}")
                    return

    threads = [threading.Thread(target=client, args=(i,)) for i in range(len(voters))]
    for thread in threads:
        thread.start()
    start.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    if failed or sum(map(len, latencies)) != len(paths):
        raise RuntimeError(f"not everything was answered: {failed[0] if failed else 'a client ended early'}")
    return seconds, [each for own in latencies for each in own]


def first_page(url: str) -> float:
    """Seconds until the chat page is served, which is made after the server is ready."""
    began = time.perf_counter()
    with urlopen(url, timeout=60) as answer:
        answer.read()
    return time.perf_counter() - began


def idle_cpu(server: Server, seconds: float) -> dict[str, float]:
    """CPU seconds of server and learner while nobody asks anything."""
    pids = {"server": server.pid, "learner": learner_pid(server)}
    before = {name: cpu_seconds(pid) for name, pid in pids.items()}
    time.sleep(seconds)
    return {name: cpu_seconds(pid) - before[name] for name, pid in pids.items()}


def fsync_seconds(folder: Path, times: int = 50) -> float:
    """Median seconds to make 4 KiB durable here: what no durable vote can beat by itself."""
    took = []
    with (folder / "fsync.tmp").open("wb") as file:
        for _ in range(times):
            began = time.perf_counter()
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
            took.append(time.perf_counter() - began)
    (folder / "fsync.tmp").unlink()
    return statistics.median(took)


@contextlib.contextmanager
def echoing() -> Iterator[str]:
    """The echo server as a child process; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    child = subprocess.Popen([sys.executable, "-m", "benchmarks.http_votes", "--echo", str(port)], cwd=ROOT)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            if child.poll() is not None:
                raise RuntimeError("the echo server did not start")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        child.terminate()
        child.wait()


def echo(port: int) -> None:
    """Serve one handler that gives back the body it was sent, under uvicorn set as for ours."""
    import uvicorn
    from fastapi import FastAPI

    app = FastAPI()

    @app.put("/echo/{name}")
    async def give_back(name: str, body: dict[str, Any]) -> dict[str, Any]:
        return body

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False, timeout_keep_alive=30, ws="none", server_header=False, loop="asyncio")


if __name__ == "__main__":
    raise SystemExit(main())
