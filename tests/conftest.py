"""Fixtures shared by the whole suite."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_model_dir

torch.set_num_threads(int(os.environ.get("PLAUDIT_TEST_THREADS", "1")))
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny random Llama with tokenizer and chat template."""
    return tiny_model_dir(tmp_path_factory.mktemp("tiny-llama"), "llama")


@pytest.fixture(scope="session", params=["llama", "qwen2", "gpt2"])
def tiny_any(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny random model of each tested family."""
    return tiny_model_dir(tmp_path_factory.mktemp(f"tiny-{request.param}"), request.param)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real prompts and preferences; skips where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real data not here: {SHARED_DATA} is absent")
    return SHARED_DATA


@pytest.fixture
def without_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there was no C compiler when Plaudit was installed: models decode by torch's operations."""
    monkeypatch.setattr("engine.native.library", lambda: None)


@pytest.fixture(params=["in C", "by torch"])
def either_way(request: pytest.FixtureRequest) -> None:
    """With what was built of engine/decode.c, and without it."""
    if request.param == "by torch":
        request.getfixturevalue("without_c")
