"""The load and the swaps that the benchmarks put on an engine are what they say."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from safetensors.torch import load_file

from benchmarks.adapters import VERSIONS, adapters, disturbance, swap_seconds
from benchmarks.load import EACH, Request, requests, serve
from engine.engine import Engine
from engine.model import CausalModel
from engine.tokenizer import ChatTokenizer


@pytest.fixture
def engine(tiny_llama: Path) -> Engine:
    return Engine(CausalModel.load(tiny_llama), ChatTokenizer.load(tiny_llama), max_sequences=4)


def test_people_come_at_the_rate_that_was_asked_for_and_the_same_seed_brings_the_same() -> None:
    load = requests(100, 0.5, 300)
    gaps = [b.at - a.at for a, b in pairwise(load)]
    assert len(load) == 100 * EACH and load[0].at == 0 and min(gaps) > 0
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.5, rel=0.2)
    assert sum((g - mean) ** 2 for g in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.4)  # exponential: deviation = mean
    assert {len(r.prompt) for r in load} <= set(range(64, 321)) and {r.new for r in load} <= set(range(16, 97))
    assert load == requests(100, 0.5, 300) != requests(100, 0.5, 300, seed=1)


def test_every_token_is_served_and_every_gap_counted(engine: Engine) -> None:
    load = [Request(0.0, [5] * 9, 12), Request(0.0, [6] * 30, 20), Request(0.05, [7] * 5, 8)]
    served = serve(engine, load)
    assert engine.stats.tokens == 40 and engine.stats.finished == 3
    assert len(served.gaps) == 40 - 3 and min(served.gaps) > 0 and sum(served.gaps) < 3 * served.seconds
    assert served.most >= 2 and served.seconds > 0.05


def test_versions_come_and_go_without_a_trace(engine: Engine, tmp_path: Path) -> None:
    paths = adapters(engine.model, tmp_path)
    weights = [load_file(path / "adapter_model.safetensors") for path in paths]
    assert [path.name for path in paths] == list(VERSIONS) and all(w.keys() == weights[0].keys() for w in weights)
    assert not any((weights[0][key] == weights[1][key]).all() for key in weights[0])
    assert swap_seconds(engine, paths[0], "new") > 0 and engine.stats.tokens == 1
    disturbance(engine, paths, 3)
    assert engine.versions() == ["base"] and not engine.has_work()
