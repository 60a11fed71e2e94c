"""What a GPU wants otherwise: numbers sent without waiting, and kernels of our own for decoding (`engine/kernels.py`).

For a handful of rows and no gradient, a linear layer takes the norm before it, the adapters and the addition after it along,
and one token's attention its rotation and its place in the cache. Owns when these kernels are used, and their launches. They need Triton,
which comes with torch for CUDA on Linux, and a C compiler; without either the same is computed by torch's operations, more slowly.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 4  # rows that a product of ours takes at most; for more, torch's is the faster one
log = logging.getLogger("plaudit.engine")
_recorded: ContextVar[bool] = ContextVar("recorded", default=False)


def onto(device: torch.device, values: Sequence[object], dtype: torch.dtype) -> Tensor:
    """`values` as a tensor on `device`. A GPU goes on with what it has to do meanwhile, and the caller with the next line."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Low(NamedTuple):
    """What adapters add to a linear layer: x A^T B^T, of all adapters in the columns' owner's rows alone."""

    a: Tensor  # (R, in), every adapter's A
    b: Tensor  # (R, out), every adapter's B
    owner: Tensor  # (R,) int32: which adapter a column is of
    choice: Tensor  # (rows,) int32: which adapter a row has, -1 for none


@cache
def kernels(device: torch.device) -> ModuleType | None:
    """The kernels, once they were built here and gave the right numbers; else None."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):  # no bfloat16 before
        return None
    try:
        from engine import kernels as built

        x, w = torch.randn(2, 64, device=device), torch.randn(8, 64, device=device)
        if torch.allclose(_launch(built, x, w), x @ w.T, rtol=1e-3, atol=1e-3):
            return built
        log.warning("the kernels for decoding on a GPU give wrong numbers here: replies come more slowly without them")
    except Exception as error:  # no Triton, no C compiler, a GPU that is too old: all mean the same to us
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        log.warning("no kernels for decoding on a GPU, replies come more slowly: they need Triton and a C compiler (%s)", why)
    return None


@contextmanager
def recorded() -> Iterator[None]:
    """Within, launches are recorded and not paid for again: Triton's cost more of Python's time than torch's (13 and 7 ms a step, measured)."""
    token = _recorded.set(True)
    try:
        yield
    finally:
        _recorded.reset(token)


def takes(x: Tensor) -> bool:
    """Whether `linear` is the way to go for x (..., in): in what is `recorded` on a GPU with kernels, few rows, no gradient."""
    few = x.is_cuda and x.numel() <= ROWS * x.shape[-1]
    return few and _recorded.get() and not torch.is_grad_enabled() and kernels(x.device) is not None


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, norm: Tensor | None = None, eps: float = 0.0, gated: bool = False,
    add: Tensor | None = None, low: Low | None = None,
) -> Tensor:  # fmt: skip
    """[add +] [silu(gate) * up of] [rms_norm of] x W^T [+ bias] [+ adapters]: (..., in) -> (..., out); see `takes`.

    gated: the weight's outputs are as many gates, then as many values.
    """
    built = kernels(x.device)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    h = None if low is None else _launch(built, flat, low.a, norm=norm, eps=eps, dtype=torch.float32)
    y = _launch(built, flat, weight, bias, norm=norm, eps=eps, gated=gated, add=add, low=low, h=h)
    return y.view(*x.shape[:-1], -1)


def _launch(
    built: ModuleType | None, x: Tensor, w: Tensor, bias: Tensor | None = None, *, norm: Tensor | None = None, eps: float = 0.0, gated: bool = False,
    add: Tensor | None = None, low: Low | None = None, h: Tensor | None = None, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """One product. x (rows, K)."""
    assert built is not None
    (rows, k), n = x.shape, len(w) // (2 if gated else 1)
    out = x.new_empty(rows, n, dtype=dtype or x.dtype)
    columns, block, warps = tiles(rows, k)
    none = out  # a pointer that is not read
    with torch.cuda.device(x.get_device()):
        built.linear_kernel[(-(-n // columns),)](
            x, none if norm is None else norm, w, none if bias is None else bias, none if add is None else add,
            none if h is None else h, *((none,) * 3 if low is None else (low.b, low.choice, low.owner)), out,
            rows, n, 0 if low is None else len(low.a), eps,
            K=k, M=1 << (rows - 1).bit_length(), BN=columns, BK=block, NORM=norm is not None, BIAS=bias is not None, ADD=add is not None,
            LOW=low is not None, GATED=gated, OVERLAP=overlaps(x.device), num_warps=warps, launch_pdl=overlaps(x.device),
        )  # fmt: skip
    return out


def tiles(rows: int, k: int) -> tuple[int, int, int]:
    """Outputs and inputs that a program of the product takes at a time, and its warps; measured best, or near it, on an H100.

    Alone, a row is read by many threads with some 32 weights each; where each weight meets several rows, adding up across threads costs more.
    """
    block = 1 << (k - 1).bit_length()
    if rows == 1:
        return max(1, min(16, 4096 // block)), min(4096, block), 4
    return 2, min(8192, block), max(1, min(4, block // 2048))


@cache
def overlaps(device: torch.device) -> bool:
    """Whether a kernel may start while the one before it ends (compute capability 9: H100 and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def attend(
    qkv: Tensor, rope: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, lengths: Tensor, heads: int, norms: tuple[Tensor, Tensor] | None, eps: float
) -> Tensor:
    """What one new token a row sees, (n, 1, heads * d), and its key and value into the cache behind the row's `lengths` (n,).

    qkv: (n, 1, (heads + 2 kv_heads) d), not rotated; keys, values: (n, kv_heads, length, d) of the rows. norms: q's and k's (Qwen3).
    """
    n, kv_heads, _, d = keys.shape
    built, wide = kernels(qkv.device), max(16, 1 << (d - 1).bit_length())
    assert built is not None
    block = max(16, min(128, 16384 // (wide * keys.element_size())))  # cached tokens at a time: 16 KB each of keys and values
    out = qkv.new_empty(n, 1, heads * d)
    q_norm, k_norm = norms or (out, out)
    with torch.cuda.device(qkv.get_device()):
        built.attend_kernel[(n, kv_heads)](
            qkv, *rope, q_norm, k_norm, keys, values, lengths, out, keys.stride(0), keys.stride(1), eps, d**-0.5,
            GROUP=heads // kv_heads, D=d, BG=max(16, 1 << (heads // kv_heads - 1).bit_length()), BD=wide, BS=block,
            NORM=norms is not None, OVERLAP=overlaps(qkv.device), num_warps=4, num_stages=2, launch_pdl=overlaps(qkv.device),
        )  # fmt: skip
    return out
