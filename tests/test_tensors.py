"""engine/tensors.py: the same numbers as the safetensors library reads, and a plain error for everything that is not such a file."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from engine.tensors import TensorsError, read_tensors


def some() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 5), "b.weight": (7,), "scalar": (), "none": (0, 4), "c": (2, 1, 3)}
    types = [torch.float32, torch.bfloat16, torch.float16, torch.float32, torch.float64]
    return {name: torch.randn(shape, generator=draw).to(dtype) for (name, shape), dtype in zip(shapes.items(), types, strict=True)}


def written(path: Path, header: object, numbers: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + numbers)
    return path


def test_it_reads_what_the_library_reads(tmp_path: Path) -> None:
    save_file(some(), tmp_path / "x.safetensors", metadata={"format": "pt"})
    theirs, ours = load_file(tmp_path / "x.safetensors"), read_tensors(tmp_path / "x.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor)


def test_a_header_of_odd_length_is_read_as_well(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    odd = header + b" " * (1 - len(header) % 2)
    assert len(odd) % 2
    assert read_tensors(written(tmp_path / "x", odd, torch.tensor([1.5, -2.0]).numpy().tobytes()))["a"].tolist() == [1.5, -2.0]


@pytest.mark.parametrize(("about", "message"), [
    ({"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}, "not one of tensors"),
    ({"dtype": "F32", "shape": [2], "data_offsets": [0, 12]}, "the numbers of a are not where"),
    ({"dtype": "F32", "shape": [3], "data_offsets": [4, 16]}, "the numbers of a are not where"),
    ({"dtype": "F32", "shape": [2], "data_offsets": [-4, 4]}, "the numbers of a are not where"),
    ({"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}, "not one of tensors"),
    ({"dtype": "F32", "shape": "xy", "data_offsets": [0, 8]}, "not one of tensors"),
    ({"dtype": "F32", "shape": "", "data_offsets": [0, 4]}, "not one of tensors"),
    ({"dtype": "F32", "shape": "x", "data_offsets": [0, 8]}, "the numbers of a are not where"),
    ({"dtype": "F32"}, "not one of tensors"),
    (3, "not one of tensors"),
])  # fmt: skip
def test_a_header_that_says_something_else_is_refused(tmp_path: Path, about: object, message: str) -> None:
    with pytest.raises(TensorsError, match=message):
        read_tensors(written(tmp_path / "x", {"a": about}, bytes(12)))


@pytest.mark.parametrize("header", [[], 3, None, b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_header_that_is_none_is_refused(tmp_path: Path, header: object) -> None:
    with pytest.raises(TensorsError, match="header"):
        read_tensors(written(tmp_path / "x", header, bytes(8)))


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = save(some())
    for end in range(len(whole)):
        (tmp_path / "x").write_bytes(whole[:end])
        with pytest.raises(TensorsError):
            read_tensors(tmp_path / "x")


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 600), byte=st.integers(0, 255))
def test_a_flipped_byte_is_read_or_refused_and_nothing_else(tmp_path: Path, at: int, byte: int) -> None:
    data = bytearray(save(some()))
    data[at % len(data)] = byte
    (tmp_path / "x").write_bytes(data)
    with contextlib.suppress(TensorsError):
        assert all(isinstance(t, torch.Tensor) for t in read_tensors(tmp_path / "x").values())
