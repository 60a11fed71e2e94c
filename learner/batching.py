"""Rows in passes of like length, so that little of what is computed is padding, and as large as the device likes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

CPU_TOKENS, GPU_TOKENS = 256, 2048


def pass_tokens(device: torch.device) -> int:
    """Padded tokens of one forward pass.

    On a CPU few: a matrix product is as fast on 256 rows as on 2,048, its results stay in the cache, and less is padding. A GPU
    waits for Python between small passes.
    """
    return CPU_TOKENS if device.type == "cpu" else GPU_TOKENS


def chunks(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Indices in passes of like length, each at most `most` padded tokens (one row alone may exceed it)."""
    found: list[list[int]] = [[]]
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if found[-1] and (len(found[-1]) + 1) * lengths[i] > most:
            found.append([])
        found[-1].append(i)
    return [rows for rows in found if rows]
