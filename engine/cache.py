"""Keys and values of running sequences: one row each, consecutive rows in use, written in place.

Owns the memory and the ways a forward pass meets it: `Prompt` (part of one row), `Pack` (whole prompts), `Rows` (one new token in each
running row) and `Slots` (the same, with nothing of it known to Python, so that a step can be replayed). Which sequence has which row is the scheduler's affair. Rows are kept together, so a step reads slices
and never gathers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from engine import gpu
from engine.gpu import onto

FIRST_LENGTH = 128  # capacity starts small and doubles, so memory follows use


class KVCache:
    """Keys and values, each (layers, rows, kv_heads, length, head_dim)."""

    def __init__(
        self, layers: int, kv_heads: int, head_dim: int, max_rows: int, max_length: int,
        dtype: torch.dtype, device: torch.device | str,
    ) -> None:  # fmt: skip
        self.max_rows, self.max_length = max_rows, max_length
        self._first = shape = (layers, min(max_rows, 4), kv_heads, min(max_length, FIRST_LENGTH), head_dim)
        # Zeros, not empty: a masked NaN from uninitialised memory would still be a NaN (0 * NaN).
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))

    @property
    def bytes(self) -> int:
        """Memory held now."""
        return 2 * self.keys.numel() * self.keys.element_size()

    @property
    def length(self) -> int:
        """Tokens that every row has room for now."""
        return self.keys.shape[3]

    def reserve(self, rows: int, length: int) -> None:
        """Make room for `rows` rows of `length` tokens, by doubling, up to the limits given at the start."""
        layers, had_rows, heads, had_length, dim = self.keys.shape
        if rows > self.max_rows or length > self.max_length:
            raise ValueError(
                f"{rows} rows of {length} tokens are over the cache's {self.max_rows} x {self.max_length}"
            )
        if rows <= had_rows and length <= had_length:
            return
        rows = had_rows if rows <= had_rows else min(max(rows, 2 * had_rows), self.max_rows)
        length = had_length if length <= had_length else min(max(length, 2 * had_length), self.max_length)
        grown = [old.new_zeros(layers, rows, heads, length, dim) for old in (self.keys, self.values)]  # both, or neither where memory is out
        for old, new in zip((self.keys, self.values), grown, strict=True):
            new[:, :had_rows, :, :had_length] = old
        self.keys, self.values = grown

    def shrink(self, most_bytes: int) -> None:
        """While no row is in use: be small again where more than `most_bytes` are held, which many replies beside one long prompt once took."""
        if self.bytes > most_bytes:
            self.keys, self.values = (old.new_zeros(self._first) for old in (self.keys, self.values))

    def copy(self, src: int, dst: int, length: int) -> None:
        """The first `length` tokens of row `src`, into row `dst`: a fork, or a move into a hole."""
        for kv in (self.keys, self.values):
            kv[:, dst, :, :length] = kv[:, src, :, :length]

    def clear(self, row: int) -> None:
        """Zero a row, so that a NaN in it cannot reach the next one to use it through a masked sum."""
        self.keys[:, row] = self.values[:, row] = 0


class Prompt:
    """Tokens start .. start+T of one row: written to the row, attending causally to all of it so far."""

    def __init__(self, cache: KVCache, row: int, start: int, count: int) -> None:
        cache.reserve(row + 1, start + count)
        self.cache, self.row, self.start, self.end = cache, row, start, start + count
        self.positions = torch.arange(start, self.end, device=cache.keys.device)[None]  # (1, T)

    @cached_property
    def rows(self) -> Tensor:
        """(T,): the row of each token."""
        return torch.full_like(self.positions[0], self.row)

    @cached_property
    def mask(self) -> Tensor | None:
        """(1, 1, T, S); None where plain causal attention is the same."""
        if not self.start:
            return None
        ok = torch.arange(self.end, device=self.positions.device) <= self.positions[0, :, None]  # (T, S)
        return additive(ok, self.cache.keys.dtype)[None, None]

    def put(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (1, kv_heads, T, head_dim); return those to attend to (1, kv_heads, S, head_dim)."""
        keys, values = self.cache.keys[layer, self.row], self.cache.values[layer, self.row]
        keys[:, self.start : self.end] = k[0]
        values[:, self.start : self.end] = v[0]
        return (keys[None, :, : self.end], values[None, :, : self.end]) if self.start else (k, v)


class Pack:
    """Whole prompts side by side, prompt i to be row rows[i]: its tokens are written there and attend to those before them in it."""

    def __init__(self, cache: KVCache, rows: Sequence[int], lengths: Sequence[int]) -> None:
        cache.reserve(max(rows) + 1, max(lengths))
        self.cache, self.end = cache, sum(lengths)
        places = [(row, at) for row, length in zip(rows, lengths, strict=True) for at in range(length)]
        self.rows, self.at = onto(cache.keys.device, places, torch.long).T.contiguous()  # (T,)
        self.positions = self.at[None]  # (1, T)
        self.several = len(rows) > 1

    @cached_property
    def mask(self) -> Tensor | None:
        """(1, 1, T, T); None where plain causal attention is the same."""
        if not self.several:
            return None
        ok = (self.rows == self.rows[:, None]) & (self.at <= self.at[:, None])  # (T, T)
        return additive(ok, self.cache.keys.dtype)[None, None]

    def put(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (1, kv_heads, T, head_dim), which are also what is attended to."""
        self.cache.keys[layer][self.rows, :, self.at] = k[0].transpose(0, 1)
        self.cache.values[layer][self.rows, :, self.at] = v[0].transpose(0, 1)
        return k, v


class Rows:
    """One token in each of n consecutive rows from `first`; the i-th has lengths[i] tokens already."""

    def __init__(self, cache: KVCache, lengths: Sequence[int], first: int = 0) -> None:
        self.cache, self.end = cache, max(lengths) + 1
        self.first, self.last = first, first + len(lengths)
        cache.reserve(self.last, self.end)
        device = cache.keys.device
        self.at = onto(device, lengths, torch.long)  # (n,)
        self.positions = self.at[:, None]  # (n, 1)
        self.even = min(lengths) + 1 == self.end

    @cached_property
    def rows(self) -> Tensor:
        """(n,)"""
        return torch.arange(self.first, self.last, device=self.at.device)

    @cached_property
    def mask(self) -> Tensor | None:
        """(n, 1, 1, S); None where every row is as long as the longest."""
        if self.even:
            return None
        ok = torch.arange(self.end, device=self.at.device) <= self.positions  # (n, S)
        return additive(ok, self.cache.keys.dtype)[:, None, None]

    def put(self: Rows | Slots, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (n, kv_heads, 1, head_dim); return those to attend to (n, kv_heads, S, head_dim)."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.rows, :, self.at] = k[:, :, 0]
        values[self.rows, :, self.at] = v[:, :, 0]
        return keys[self.first : self.last, :, : self.end], values[self.first : self.last, :, : self.end]


class Slots:
    """One token in each of n consecutive rows from `first`; the i-th has lengths[i] tokens already, lengths (n,) being a tensor.

    Either a kernel attends and needs no mask, or every row is attended to up to the cache's present length and the mask hides what
    is not there. Only shapes and addresses are fixed, until the cache grows.
    """

    def __init__(self, cache: KVCache, lengths: Tensor, first: int = 0) -> None:
        self.cache, self.at, self.end = cache, lengths, cache.length
        self.first, self.last = first, first + len(lengths)
        self.rows = torch.arange(first, self.last, device=lengths.device)
        self.positions = lengths[:, None]  # (n, 1)
        self.by_kernel = gpu.kernels(lengths.device) is not None
        self.mask = None
        if not self.by_kernel:
            ok = torch.arange(self.end, device=lengths.device) <= self.positions  # (n, S)
            self.mask = additive(ok, cache.keys.dtype)[:, None, None]  # (n, 1, 1, S)

    put = Rows.put

    def stretch(self, layer: int) -> tuple[Tensor, Tensor]:
        """One layer's keys and values of these rows, (n, kv_heads, length, head_dim) each."""
        return self.cache.keys[layer, self.first : self.last], self.cache.values[layer, self.first : self.last]


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask (True = may attend) as what is added to the attention scores."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(
        ~allowed, float("-inf")
    )
