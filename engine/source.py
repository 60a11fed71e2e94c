"""Where a model's files come from: a local directory or a hub id, resolved to a directory of safetensors.

Owns finding, checking and fingerprinting the files. Does not build modules (`engine/model.py`). Never unpickles and
never runs code that came with a model.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

WANTED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model"]


class ModelError(Exception):
    """The model cannot be used; the message says why and what to do."""


def resolve(source: str | Path) -> Path:
    """The local directory of `source`: itself, or the hub's snapshot (downloaded unless it is cached).

    Raises ModelError when there is no such directory or the hub cannot be asked.
    """
    if (path := Path(source).expanduser()).is_dir():
        return path
    text = str(source)
    if path.exists():
        raise ModelError(f"{text} is a file: give the directory that holds config.json and *.safetensors")
    if isinstance(source, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise ModelError(f"no model directory at {text}: check the path, or give a hub id such as org/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=WANTED))
    except (
        Exception
    ) as error:  # the hub client raises a dozen unrelated types; all mean the same to the caller
        raise ModelError(
            f"cannot get {text} from the Hugging Face hub ({type(error).__name__}): check the name and the network, "
            "or give a local directory"
        ) from error


def device_named(name: str | torch.device) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one. Raises ModelError when it is not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"{name!r} is not a device: use auto, cpu, cuda or cuda:N") from error
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        there = "no CUDA device" if not count else "only cuda:0" if count == 1 else f"only cuda:0 to cuda:{count - 1}"
        raise ModelError(f"{name} is not here: torch finds {there} on this machine. Use device auto or cpu")
    return device


def first_line(error: BaseException) -> str:
    """What an error says, in the one line that a person reads, shortened."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} where the file is absent. Raises ModelError when it is not a JSON object."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object")
    return value


class WrittenConfig(SimpleNamespace):
    """A config.json as it stands, where that says all that `engine/decoder.py` asks for."""

    SAYS = frozenset({
        "hidden_act", "hidden_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
        "pad_token_id", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "vocab_size",
    })  # fmt: skip

    def get_text_config(self) -> WrittenConfig:
        return self


def read_config(directory: Path) -> Any:
    """The config of `directory`. Raises ModelError when there is none that this release of transformers knows.

    A plain Llama that is written out in full needs no transformers, whose configs take a second to import (they bring
    torch's compiler along).
    """
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory} has no config.json: it is not a Hugging Face model directory")
    written = read_json(directory / "config.json")
    rope = written.get("rope_parameters")
    if (
        written.get("model_type") == "llama" and written.keys() >= WrittenConfig.SAYS
        and isinstance(rope, dict) and rope.keys() == {"rope_type", "rope_theta"} and rope["rope_type"] == "default"
    ):  # fmt: skip
        return WrittenConfig(**written)
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise ModelError(
            f"{directory}/config.json is not a config this release of transformers knows: {first_line(error)}"
        ) from error


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of the weights, in order. Raises ModelError when there are none or one is missing."""
    index = read_json(directory / "model.safetensors.index.json")
    names = sorted(set(index["weight_map"].values())) if "weight_map" in index else ["model.safetensors"]
    files = [directory / Path(name).name for name in names]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ModelError(
            f"{directory} lacks {', '.join(missing)}: weights are read from safetensors only (never pickle); "
            "convert the model with save_pretrained(..., safe_serialization=True)"
        )
    return files


def read_weights(directory: Path, dtype: torch.dtype, device: str | torch.device) -> dict[str, torch.Tensor]:
    """Every tensor of the model, by its name, as `dtype` on `device`. Raises ModelError when a file is damaged."""
    weights = {}
    for file in weight_files(directory):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (safe_open is not a mapping)
                    weights[name] = tensors.get_tensor(name).to(device=device, dtype=dtype)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is damaged ({error}): fetch the model again") from error
    return weights


def digest(directory: Path) -> str:
    """sha256 over the stored tensors (name, dtype, shape, bytes), whatever files they are split into."""
    where = {}
    for file in weight_files(directory):
        with safe_open(file, framework="pt") as tensors:
            where.update(dict.fromkeys(tensors.keys(), file))
    total = hashlib.sha256()
    for name in sorted(where):
        with safe_open(where[name], framework="pt") as tensors:
            tensor = tensors.get_tensor(name).contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


class Sampling(NamedTuple):
    """How a model asks to be sampled where nobody says otherwise."""

    temperature: float = 1.0  # above 0
    top_p: float = 1.0  # in (0, 1]


def sampling(directory: Path) -> Sampling:
    """What generation_config.json says of temperature and top-p, as other servers read it; 1 for what it does not say or says badly."""
    given = read_json(directory / "generation_config.json")
    found = {}
    for name, most in (("temperature", 2.0), ("top_p", 1.0)):
        value = given.get(name)
        if isinstance(value, int | float) and 0 < value <= most:
            found[name] = float(value)
    return Sampling(**found)


def eos_ids(directory: Path) -> tuple[int, ...]:
    """The ids that end a reply, as generation_config.json or else config.json gives them (a number or a list)."""
    for name in ("generation_config.json", "config.json"):
        value = read_json(directory / name).get("eos_token_id")
        if value is not None:
            return tuple(value) if isinstance(value, list) else (int(value),)
    return ()
