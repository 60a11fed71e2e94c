"""The GPU benchmark, as far as it goes without one: what it says there, its model's shape, its targets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from engine.model import CausalModel
from learner.config import PPOConfig


def test_without_a_gpu_it_says_so_and_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="there is no GPU here"):
        gpu.main([])


def test_its_model_is_a_qwen2_whose_weights_are_read_once_a_step(tmp_path: Path) -> None:
    directory = gpu.qwen2(tmp_path / "model", gpu.TINY)
    model = CausalModel.load(directory, dtype=torch.bfloat16)
    assert (model.hidden_size, model.vocab_size, model.dtype) == (gpu.TINY["hidden_size"], gpu.TINY["vocab_size"], torch.bfloat16)
    h, i, kv, v = (gpu.TINY[name] for name in ("hidden_size", "intermediate_size", "num_key_value_heads", "vocab_size"))
    kv *= h // gpu.TINY["num_attention_heads"]
    a_layer = 2 * h * h + 2 * h * kv + h + 2 * kv + 3 * h * i + 2 * h  # q and o, k and v, the biases of q, k, v, the MLP, two norms
    numbers = v * h + gpu.TINY["num_hidden_layers"] * a_layer + h
    assert 2 * numbers < gpu.weight_bytes(directory) < 2 * numbers + 8192  # and the file's header


def test_targets_are_against_generate_and_the_floor() -> None:
    k4, people = {"engine": 400.0, "generate": 100.0}, {"engine": 900.0, "generate, one at a time": 100.0, "generate, padded batch": 2000.0}
    assert gpu.against_targets(k4, people, 0.5) == {"k4": True, "people": True, "floor": True}
    assert gpu.against_targets({"engine": 399.0, "generate": 100.0}, people, 0.49) == {"k4": False, "people": True, "floor": False}


def test_a_peer_that_cannot_be_run_is_a_row_without_figures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []

    def ours(device: str, directory: Path, prompts: list[list[int]], config: PPOConfig) -> dict[str, float]:
        asked.append((config.estimator, config.updates))
        return {"seconds": 2.0, "tokens_per_s": 30.0}

    def absent(*_: object) -> dict[str, float]:
        raise ImportError("no trl here\nand more")

    monkeypatch.setattr(gpu, "our_update", ours)
    monkeypatch.setattr(gpu, "trl_update", absent)
    got = gpu.ppo_updates("cpu", Path("model"), [[1]], 3, True)
    row = {"seconds": 2.0, "tokens_per_s": 30.0, "peak_bytes": None}
    assert got == {"ours": row, "ours, gae": row, "trl": None}
    assert asked == [("gae-ls", 4), ("gae", 4)]  # one update more, of warm-up
    assert "TRL's update could not be run: ImportError: no trl here\n" in capsys.readouterr().out
