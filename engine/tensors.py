"""The tensors of a safetensors file, read at once: views of one buffer, nothing copied. For small files of many tensors, which an adapter's is.

The library's own readers make a copy of each tensor; for what a swap waits for, that was most of the time. Format: 8 bytes with the header's
length, a JSON header of name -> dtype, shape and place, then the numbers (https://github.com/huggingface/safetensors). It writes nothing.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


class TensorsError(ValueError):
    """It is no whole safetensors file, or holds something else than floating-point numbers; the message says which."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor by its name. They share memory, which lives as long as one of them does. Raises TensorsError, OSError."""
    with path.open("rb") as file:
        data = bytearray(os.fstat(file.fileno()).st_size)
        if file.readinto(data) != len(data):
            raise TensorsError("it became shorter while it was read")
    start = 8 + int.from_bytes(data[:8], "little")
    if not 8 < start <= len(data):
        raise TensorsError("its header is cut off")
    tensors = {}
    try:
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        for name, about in header.items():
            dtype, shape, (begin, end) = DTYPES[about["dtype"]], about["shape"], about["data_offsets"]
            count = math.prod(shape)
            if not 0 <= begin <= end <= len(data) - start or end - begin != count * dtype.itemsize:
                raise TensorsError(f"the numbers of {name} are not where they should be, or not as many")
            tensors[name] = torch.frombuffer(data, dtype=dtype, count=count, offset=start + begin).view(shape) if count else torch.empty(shape, dtype=dtype)
    except TensorsError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, RuntimeError) as error:
        raise TensorsError(f"its header is not one of tensors ({type(error).__name__})") from error
    return tensors
