"""The learner's process: when it runs, how it stops, and what a kill leaves behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from engine.tokenizer import ChatTokenizer
from learner.config import ConfigError, LearnerConfig
from learner.worker import Worker, alone, awaited, due, main, progress_so_far
from store.adapters import AdapterRegistry
from store.rounds import RoundFiles
from store.store import Store
from tests.test_demonstrations import edit_on
from tests.test_round import vote_on

FAST = {
    "poll_s": 0.1, "heartbeat_s": 0.2, "take_in_s": 0.5, "practice_prompts": 4, "reward.members": 2, "reward.folds": 2, "reward.epochs": 0,
    "reward.lora_r": 4, "reward.ridge": 0.01, "ppo.updates": 2, "ppo.prompts_per_update": 2, "ppo.replies_per_prompt": 2,
    "ppo.max_new_tokens": 8, "ppo.lora_r": 4, "ppo.kl_ceiling": 1e6, "gate.prompts": 4, "gate.replies_per_prompt": 1,
    "gate.max_new_tokens": 8,
}  # fmt: skip
SLOW = {**FAST, "ppo.updates": 100000, "ppo.max_seconds": 600}


@contextmanager
def worker(data_dir: Path, model: Path, settings: dict, *more: str) -> Iterator[subprocess.Popen]:
    """A real learner process; it is gone at the end of the block."""
    command = [sys.executable, "-m", "learner.worker", "--data-dir", str(data_dir), "--model", str(model), "--round-votes", "12"]
    pairs = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    with (data_dir / "learner.log").open("ab") as log:
        child = subprocess.Popen([*command, *pairs, *more], stdout=log, stderr=log, env=environment, cwd=Path(__file__).parents[1])
    try:
        yield child
    finally:
        if child.poll() is None:
            child.kill()
        child.wait(timeout=30)


def until(condition: Callable[[], object], child: subprocess.Popen, log: Path, limit_s: float = 120.0) -> None:
    """Wait for `condition`; fails with the log's end when the child dies or the time is up."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline or child.poll() is not None:
            if condition():
                return
            pytest.fail(f"exit {child.poll()} after waiting; log ends:\n{log.read_text()[-3000:]}")
        time.sleep(0.1)


def state_of(files: RoundFiles) -> str | None:
    return (files.read_heartbeat() or {}).get("state")


@pytest.mark.parametrize(
    ("new", "paused", "requested", "done", "expected"),
    [
        (12, False, 0, 0, True), (11, False, 0, 0, False), (40, True, 0, 0, False),
        (0, False, 1, 0, True), (0, True, 2, 1, True), (11, False, 2, 2, False),
    ],
)  # fmt: skip
def test_a_round_is_due_when_enough_votes_came_or_an_operator_asked(new: int, paused: bool, requested: int, done: int, expected: bool) -> None:
    assert due(new, paused, requested, done, LearnerConfig(round_votes=12)) is expected


def test_abandoned_rounds_have_used_no_votes_and_failed_ones_have(tmp_path: Path) -> None:
    files = RoundFiles(tmp_path)
    for record in ({"state": "published", "last_seq": 9, "run_requested": 1}, {"state": "failed", "last_seq": 20}, {"state": "abandoned", "last_seq": 99}):
        files.finish(files.begin(), record)
    assert progress_so_far(files) == (20, 0, 1)


def test_a_running_round_says_when_it_began(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    class Learner:
        def run_round(self, n: int, *_: Any, report: Callable[..., None], **__: Any) -> dict[str, Any]:
            for stage in ("training_reward", "ppo"):
                report(stage, 0.5, "")
                seen.append(RoundFiles(tmp_path / "rounds").read_heartbeat() or {})
            return {"kind": "ppo", "state": "not_ready", "version": None}

    before = time.time()
    Worker(tmp_path, "", LearnerConfig())._round(Learner(), [], "base", 0, False)
    assert [(beat["round"], beat["state"]) for beat in seen] == [(1, "training_reward"), (1, "ppo")]
    assert before <= seen[0]["started"] == seen[1]["started"] <= time.time()


def test_the_next_round_waits_until_the_server_has_taken_in_the_last_version(tmp_path: Path) -> None:
    files = RoundFiles(tmp_path / "rounds")
    with contextlib.closing(Store.open(tmp_path)) as store:
        assert not awaited(files, store, 30)  # no round yet
        n, record = files.begin(), {"state": "published", "version": "v000001", "ended": time.time()}
        files.finish(n, record)
        assert awaited(files, store, 30)
        assert not awaited(files, store, 0)  # without a server it does not wait for ever
        store.take_in_round(n, record)
        assert not awaited(files, store, 30)
        files.finish(files.begin(), {"state": "not_ready", "version": None, "ended": time.time()})
        assert not awaited(files, store, 30)  # nothing came of it that could go live


def test_settings_are_checked_by_name() -> None:
    assert LearnerConfig().override({"ppo.updates": "3"}).ppo.updates == 3
    for wrong in ({"ppo.nothing": "1"}, {"ppo": "1"}, {"ppo.updates": "many"}, {"round_votes": "0"}, {"nothing.updates": "1"},
                  {"ppo.lr": "-1"}, {"ppo.lr": "nan"}, {"ppo.clip": "nan"}, {"gate.max_kl": "nan"}, {"gate.max_kl": "inf"}, {"ppo.max_seconds": "inf"}, {"reward.max_tokens": "0"}, {"ppo.max_new_tokens": "0"},
                  {"reward.max_examples": "0"}, {"min_votes": "0"}, {"practice_prompts": "-5"}, {"ppo.lora_r": "0"}, {"take_in_s": "nan"},
                  {"ppo.minibatches": "0"}, {"ppo.patience": "0"}, {"ppo.judge_every": "0"}, {"ppo.kl_horizon": "0"}):  # fmt: skip
        with pytest.raises(ConfigError):
            LearnerConfig().override(wrong)


def test_a_wrong_setting_is_one_clear_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--data-dir", str(tmp_path), "--set", "ppo.nothing=1"]) == 2
    assert capsys.readouterr().err == "plaudit learn: unknown setting ppo.nothing\n"
    assert main(["--data-dir", str(tmp_path), "--set", "ppo"]) == 2


@pytest.mark.slow
def test_it_waits_for_votes_runs_a_round_and_does_not_run_hot(tmp_path: Path, tiny_llama: Path) -> None:
    files, log = RoundFiles(tmp_path / "rounds"), tmp_path / "learner.log"
    tokenizer = ChatTokenizer.load(tiny_llama)
    with worker(tmp_path, tiny_llama, FAST, "--parent-pid", str(os.getpid())) as child:
        until(lambda: state_of(files) == "idle", child, log)
        assert "no database" in files.read_heartbeat()["reason"]
        with Store.open(tmp_path) as store:
            vote_on(store, tokenizer, 11)
            time.sleep(1.0)
            assert files.all() == []  # one vote too few
            vote_on(store, tokenizer, 1, first=11)
            until(lambda: files.finished() == [1], child, log)
            first = files.read(1)
            assert first["state"] in ("published", "rejected"), first["reason"]
            assert first["votes"] == 12 and first["last_seq"] == 12
            vote_on(store, tokenizer, 4, first=12)
            time.sleep(1.0)
            assert files.all() == [1]
            store.steer("pause")
            until(lambda: state_of(files) == "paused", child, log)
            store.steer("run")  # an operator's wish counts also while paused
            until(lambda: files.finished() == [1, 2], child, log)
            assert files.read(2)["votes"] == 16 and files.read(2)["run_requested"] == 1
            time.sleep(1.0)
            assert files.all() == [1, 2]
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=10) == 0
    assert files.read_heartbeat()["state"] == "stopped"
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    assert [line["event"] for line in lines].count("round_ended") == 2
    assert "Question number" not in log.read_text()


@pytest.mark.slow
def test_edits_start_a_finetuning_round_before_the_next_ppo_round_which_takes_it_as_its_reference(tmp_path: Path, tiny_llama: Path) -> None:
    files, log = RoundFiles(tmp_path / "rounds"), tmp_path / "learner.log"
    loose = {"gate.max_broken_rise": 2, "gate.min_distinct2_ratio": -1, "gate.max_length_ratio": 1e9, "gate.max_probe_loss_rise": 1e9,
             "gate.max_probe_accuracy_fall": 2, "gate.max_repetition_rise": 2}  # fmt: skip
    settings = {**FAST, **loose, "take_in_s": 60, "sft.min_demonstrations": 6, "sft.passes": 2, "sft.lora_r": 4, "sft.max_kl": 1e6}
    with Store.open(tmp_path) as store:
        vote_on(store, ChatTokenizer.load(tiny_llama), 12)
        edit_on(store, 6)
        with worker(tmp_path, tiny_llama, settings) as child:
            until(lambda: files.finished() == [1], child, log)
            first = files.read(1)
            assert (first["kind"], first["state"]) == ("sft", "published"), first
            manifest = AdapterRegistry(tmp_path / "adapters").manifest(first["version"]).to_dict()
            store.take_in_adapter(manifest, "candidate")  # what a server does with it
            store.deploy(first["version"], "base", actor="auto", action="publish")
            store.take_in_round(1, first)
            assert store.vote_counts().pending == 18  # no vote was used up
            until(lambda: files.finished() == [1, 2], child, log)
        second = files.read(2)
    assert (second["kind"], second["parent"], second["reference"]) == ("ppo", first["version"], first["version"])


@pytest.mark.slow
def test_killed_in_the_middle_of_a_round_it_abandons_it_and_uses_the_votes_in_the_next(tmp_path: Path, tiny_llama: Path) -> None:
    files, log = RoundFiles(tmp_path / "rounds"), tmp_path / "learner.log"
    with Store.open(tmp_path) as store:
        vote_on(store, ChatTokenizer.load(tiny_llama), 12)
        with worker(tmp_path, tiny_llama, SLOW) as child:
            until(lambda: state_of(files) == "ppo", child, log)
            child.kill()
        assert files.unfinished() == [1] and AdapterRegistry(tmp_path / "adapters").versions() == []
        with worker(tmp_path, tiny_llama, FAST) as child:
            until(lambda: files.finished() == [1, 2], child, log)
        cut_short = files.read(1)
        assert cut_short["state"] == "abandoned" and cut_short["version"] is None
        assert len(cut_short["vote_ids"]) == 12 and cut_short["base_digest"] == files.read(2)["base_digest"]  # of the reward model that it left
        assert files.read(2)["votes"] == 12 and files.read(2)["state"] in ("published", "rejected"), files.read(2)["reason"]


@pytest.mark.slow
def test_told_to_stop_in_the_middle_of_a_round_it_stops_at_once_and_publishes_nothing(tmp_path: Path, tiny_llama: Path) -> None:
    files, log = RoundFiles(tmp_path / "rounds"), tmp_path / "learner.log"
    with Store.open(tmp_path) as store:
        vote_on(store, ChatTokenizer.load(tiny_llama), 12)
        with worker(tmp_path, tiny_llama, SLOW) as child:
            until(lambda: state_of(files) == "ppo", child, log)
            began = time.monotonic()
            child.send_signal(signal.SIGTERM)
            assert child.wait(timeout=20) == 0
            assert time.monotonic() - began < 10
    assert files.finished() == [] and AdapterRegistry(tmp_path / "adapters").versions() == []
    assert not list((tmp_path / "adapters").glob(".publishing-*"))


@pytest.mark.slow
def test_it_ends_when_its_parent_is_gone(tmp_path: Path, tiny_llama: Path) -> None:
    with worker(tmp_path, tiny_llama, FAST, "--parent-pid", "1") as child:
        assert child.wait(timeout=60) == 0


@pytest.mark.slow
def test_a_model_that_is_not_there_is_one_line_and_exit_2(tmp_path: Path) -> None:
    with worker(tmp_path, tmp_path / "nothing", FAST) as child:
        assert child.wait(timeout=60) == 2
    log = (tmp_path / "learner.log").read_text()
    assert log.splitlines()[-1].startswith("plaudit learn: no model directory") and "Traceback" not in log


@pytest.mark.slow
def test_a_directory_that_cannot_be_written_is_one_line_and_exit_2(tmp_path: Path) -> None:
    (tmp_path / "rounds").write_text("a file, where a directory should be")
    with worker(tmp_path, tmp_path / "nothing", FAST) as child:
        assert child.wait(timeout=60) == 2
    told = (tmp_path / "learner.log").read_text()
    assert told.startswith("plaudit learn: cannot make") and told.count("\n") == 1


@pytest.mark.slow
def test_a_second_learner_on_a_data_directory_is_one_line_and_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rounds").mkdir()
    first = alone(tmp_path / "rounds")
    assert main(["--data-dir", str(tmp_path), "--once"]) == 2
    said = capsys.readouterr().err
    assert "another learner runs on this data directory" in said and "Traceback" not in said
    first.release()
    alone(tmp_path / "rounds").release()


def test_a_round_that_was_cut_short_cannot_be_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = RoundFiles(tmp_path / "rounds")
    files.finish(files.begin(), {"state": "abandoned", "votes": 0})
    assert main(["--data-dir", str(tmp_path), "--replay", "1"]) != 0
    assert "cannot be replayed: it was cut short" in capsys.readouterr().err


def test_a_round_whose_votes_are_gone_is_one_line_and_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Store.open(tmp_path):
        pass
    files = RoundFiles(tmp_path / "rounds")
    files.finish(files.begin(), {"state": "rejected", "config": LearnerConfig().to_dict(), "vote_ids": ["vote_gone"]})
    assert main(["--data-dir", str(tmp_path), "--replay", "1"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "1 of its votes were withdrawn or replaced since" in said


def test_a_damaged_record_of_a_round_does_not_keep_a_learner_from_learning(tmp_path: Path) -> None:
    files = RoundFiles(tmp_path / "rounds")
    files.finish(files.begin(), {"state": "rejected", "last_seq": 16, "run_requested": 1})
    files.finish(files.begin(), {"state": "published", "last_seq": 40, "version": "v000001", "ended": time.time()})
    (tmp_path / "rounds" / "000002" / "round.json").write_text("")
    assert progress_so_far(files) == (16, 0, 1)
    with Store.open(tmp_path) as store:
        assert not awaited(files, store, 30)


def test_a_round_that_is_not_there_cannot_be_replayed(tmp_path: Path) -> None:
    with worker(tmp_path, tmp_path / "nothing", FAST, "--replay", "9") as child:
        assert child.wait(timeout=60) == 2
    assert "no finished round 9" in (tmp_path / "learner.log").read_text()
