"""Contestants of the benchmarks: finding the peers' interpreter, taking turns, what is reported."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.contest import ROOT, Contestant, ContestError, peer_python, round_robin
from benchmarks.generate import Peer
from benchmarks.ppo_update import summary

CHILD = """
import sys
from benchmarks.contest import Finished, Turns
turns = Turns()
held = bytearray(b"x") * int(sys.argv[1])
print("a library that prints")
try:
    while True:
        asked = turns.wait()
        if asked.get("die"):
            raise SystemExit("no more")
        turns.say(got=asked, size=len(held))
except Finished:
    pass
"""


def contestant(tmp_path: Path, name: str = "child", held: int = 0) -> Contestant:
    return Contestant(name, [sys.executable, "-c", CHILD, str(held)], tmp_path / f"{name}.log", threads=1)


def test_the_interpreter_named_by_the_environment_comes_before_the_built_one(tmp_path: Path) -> None:
    for name in ("named", "built"):
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "bin" / "python").symlink_to(sys.executable)
    named, built = (tmp_path / name / "bin" / "python" for name in ("named", "built"))
    env = {"PLAUDIT_PEERS": str(named)}
    assert peer_python(None, {}, built) == built
    assert peer_python(None, env, built) == named
    assert peer_python(None, {"PLAUDIT_PEERS": str(tmp_path / "named")}, built) == named
    assert peer_python(built, env, tmp_path / "nowhere") == built


def test_an_absent_interpreter_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ContestError, match="make peers"):
        peer_python(None, {}, tmp_path / "nowhere")
    with pytest.raises(ContestError, match=r"PLAUDIT_PEERS.*peers\.txt"):
        peer_python(None, {"PLAUDIT_PEERS": str(tmp_path)}, tmp_path / "nowhere")


def test_our_threads_sleep_while_they_wait_and_a_peers_do_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    tell = CHILD.replace("turns.say(got=asked", "import os; turns.say(got=os.environ.get('OMP_WAIT_POLICY')")
    for sleeping, policy in ((True, "passive"), (False, None)):
        with Contestant("child", [sys.executable, "-c", tell, "0"], tmp_path / "child.log", threads=1, sleeping=sleeping) as child:
            assert child.turn()["got"] == policy


def test_generate_answers_in_a_process_of_its_own_and_says_how_long_it_took(tiny_llama: Path, tmp_path: Path) -> None:
    with Peer(tiny_llama, tmp_path / "log", 1) as peer:
        assert peer([[5, 6, 7], [8, 9]], 6, replies=2) > 0 and peer.one_at_a_time([[5, 6, 7], [8]], 2) > 0
        with pytest.raises(ContestError):
            peer([], 2)


def test_a_turn_carries_the_request_there_and_the_answer_back(tmp_path: Path) -> None:
    with contestant(tmp_path) as child:
        answer = child.turn(fold=3)
        assert answer["got"] == {"fold": 3}
        assert 0 <= answer["seconds"] < 5
    assert child.child.returncode == 0
    assert "a library that prints" in (tmp_path / "child.log").read_text()


def test_contestants_take_turns_and_the_first_turn_is_not_counted(tmp_path: Path) -> None:
    order: list[tuple[int, str]] = []
    with contestant(tmp_path, "a") as a, contestant(tmp_path, "b") as b:
        round_robin([a, b], 3, lambda number, who, _: order.append((number, who.name)))
    assert order == [(0, "a"), (0, "b"), (1, "a"), (1, "b"), (2, "a"), (2, "b")]
    for answer, seconds in zip(a.answers, (100.0, 1.0, 3.0), strict=True):
        answer["seconds"] = seconds
    assert a.median_s() == 2.0


def test_each_contestant_answers_for_its_own_memory_only(tmp_path: Path) -> None:
    mine = bytearray(b"x") * 300_000_000  # what the parent holds is not the child's
    with contestant(tmp_path, "small") as small, contestant(tmp_path, "large", 100_000_000) as large:
        small.turn(), large.turn()
    assert 90_000_000 < large.peak_bytes - small.peak_bytes < 130_000_000
    assert small.peak_bytes < 100_000_000 < len(mine)


def test_a_contestant_that_dies_is_an_error_with_the_end_of_its_log(tmp_path: Path) -> None:
    with pytest.raises(ContestError, match=r"child ended before its turn was over:\s[\s\S]*no more"), contestant(tmp_path) as child:
        child.turn(die=True)


def test_a_contestant_ends_with_its_parent_even_amid_a_turn(tmp_path: Path) -> None:
    child = "import os, time\nfrom benchmarks.contest import Turns\nturns = Turns()\nturns.wait()\nprint(os.getpid(), flush=True)\ntime.sleep(60)"
    parent = (
        "import sys\nfrom pathlib import Path\nfrom benchmarks.contest import Contestant\n"
        f"with Contestant('c', [sys.executable, '-c', {child!r}], Path({str(tmp_path / 'log')!r}), threads=1) as c:\n    c.turn()"
    )
    with subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT) as process:
        pid = int(awaited(lambda: (tmp_path / "log").exists() and (tmp_path / "log").read_text().strip()))
        process.kill()
    assert awaited(lambda: not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes())


def awaited(what: Callable[[], Any], seconds: float = 10.0) -> Any:
    """What `what` says as soon as it is true."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)
    return found


def test_an_update_is_compared_with_the_peer_in_speed_and_memory() -> None:
    row = summary("S", {"trl": (3.0, 1000), "ours, gae-ls": (1.0, 400), "ours, gae": (0.5, 600)})
    assert row["met"]
    assert row["contestants"]["ours, gae-ls"] == {"seconds": 1.0, "peak_bytes": 400, "speed": 3.0, "memory": 0.4}
    assert row["contestants"]["ours, gae"]["speed"] == 6.0
    assert not summary("S", {"trl": (2.0, 1000), "ours, gae-ls": (1.0, 400), "ours, gae": (0.5, 600)})["met"]
    assert not summary("S", {"trl": (3.0, 1000), "ours, gae-ls": (1.0, 600), "ours, gae": (0.5, 400)})["met"]
