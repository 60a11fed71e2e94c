"""`make bench`: one benchmark that fails stops none of the others, and is not passed over."""

from __future__ import annotations

import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import suite


def child(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_how_a_benchmark_ended_is_read_from_its_status_and_its_last_line(tmp_path: Path) -> None:
    log = tmp_path / "one.log"
    well = suite.run("one", child("print('working'); print('{\"met\": true}')"), log, 60)
    assert (well.state, well.words) == ("met", "") and log.read_text() == 'working\n{"met": true}\n'
    assert suite.judged(0, ['{"accuracy": 0.6}']) == ("measured", "")  # figures that were held to nothing
    missed = suite.run("one", child("print('{\"met\": {\"speed\": false, \"memory\": true}}'); raise SystemExit(1)"), log, 60)
    assert (missed.state, missed.words) == ("missed", "speed")
    absent = suite.run("one", child("raise SystemExit('the peers are not installed: run `make peers`')"), log, 60)
    assert (absent.state, absent.words) == ("failed", "the peers are not installed: run `make peers`")
    assert suite.judged(0, ["all is well"])[0] == "failed"  # it never came to its figures
    assert suite.judged(1, []) == ("failed", "it said nothing")


def test_a_benchmark_that_hangs_is_ended(tmp_path: Path) -> None:
    began = time.monotonic()
    outcome = suite.run("one", child("import time; time.sleep(60)"), tmp_path / "one.log", 0.5)
    assert (outcome.state, outcome.words) == ("failed", "ended after 0.00833333 minutes") and time.monotonic() - began < 20


def test_all_run_whatever_becomes_of_one_and_the_status_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(suite, "PLAN", (("not_there",), ("serving",)))  # the second prints nothing: no figures either
    assert suite.main(["--logs", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    report = json.loads(said.splitlines()[-1])
    assert [row["name"] for row in report["outcomes"]] == ["not_there", "serving"]
    assert "=== 1 of 2" in said and "=== 2 of 2" in said and (tmp_path / "serving.log").exists()


def test_the_plan_names_each_benchmark_once_and_the_gpus_not() -> None:
    names = [name for name, *_ in suite.PLAN]
    assert len(set(names)) == len(names) and "gpu" not in names
    assert [name for name in names if find_spec(f"benchmarks.{name}") is None] == []
