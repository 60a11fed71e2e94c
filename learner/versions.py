"""A base model in memory and the published versions that are loaded onto it, for training and for measuring.

Owns opening both, read-only, saying plainly what is not there, and going back from one towards another. Does not serve (`server/verification.py`) or publish.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from engine.engine import BASE
from engine.lora import AdapterError, LoraBank
from engine.model import CausalModel
from engine.tokenizer import ChatTokenizer
from store.adapters import AdapterRegistry
from store.errors import NoDatabase, NotFound
from store.store import Store

LIVE = "live"


def open_model(source: str | Path, device: str = "auto", dtype: str = "auto") -> tuple[CausalModel, ChatTokenizer]:
    """Model and tokenizer; "auto" is CUDA with bfloat16 where there is one, else the CPU with float32.

    Raises engine.model.ModelError.
    """
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    dtype = ("bfloat16" if device.startswith("cuda") else "float32") if dtype == "auto" else dtype
    return CausalModel.load(source, dtype=getattr(torch, dtype), device=device), ChatTokenizer.load(source)


def load_version(model: CausalModel, registry: AdapterRegistry, version: str, name: str) -> str | None:
    """Load a published version as adapter `name`; None for the base. Raises NotFound, CorruptAdapter, AdapterError."""
    if version == BASE:
        return None
    if version not in registry.versions():
        there = ", ".join([BASE, *registry.versions()[-20:]])
        raise NotFound(f"there is no version {version[:64]!r} in {registry.root}; there are {there}")
    manifest = registry.verify(version)
    if manifest.base_digest and manifest.base_digest != model.digest:
        raise AdapterError(f"{version} was made for another base model ({manifest.base_model}) than {model.source}")
    model.lora.load(name, registry.path(version))
    return name


@torch.no_grad()
def shrink(lora: LoraBank, name: str, start: str | None, trained: Mapping[str, Tensor], share: float) -> None:
    """Set adapter `name` to `share` of the way from where it began to `trained` (Wortsman et al. 2022, on adapters).

    From the bare base that is exact (B alone is scaled); from adapter `start` both factors are interpolated.
    """
    began = lora.parameters(start) if start else None
    for key, weight in lora.parameters(name).items():
        if began is not None:
            weight.copy_(began[key].lerp(trained[key], share))  # exact at both ends
        else:
            weight.copy_(trained[key] * (share if ".lora_B." in key else 1.0))


def named_version(data_dir: Path, version: str) -> str:
    """`version`, or where it is "live" the one that the data directory serves; base where it has no database yet."""
    if version != LIVE:
        return version
    try:
        with Store.open(data_dir, read_only=True) as store:
            return store.deployment().live
    except NoDatabase:
        return BASE
