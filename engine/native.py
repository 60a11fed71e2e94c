"""A pass over new tokens in one call on a CPU, replies' or a prompt's: what `engine/decode.c` is told, and when it is there to be used.

torch's operations are told one by one, and a small model's pass is over a hundred of them. Owns the addresses that are handed over
and the check that what was built gives the right numbers; the arithmetic is the C file's, the same as `engine/decoder.py`'s to rounding.
It is built with the package where there is a C compiler; without it torch's operations are used, and a line in the log says so.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import platform
from ctypes import POINTER, Structure, byref, c_double, c_int64, c_void_p
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from engine.cache import Pack, Prompt, Rows
    from engine.decoder import Block, Decoder
    from engine.lora import LoraLinear
    from engine.mixture import Mixture

WIDTH = 8  # numbers at a time: what sizes must be multiples of
LINEARS = ("qkv", "o", "gate_up", "down")  # of a block
BLOCK = 32  # weights of 8 bits that share a scale
log = logging.getLogger("plaudit.engine")


class Product(Structure):
    """As in decode.c, like the three below."""

    _fields_ = [*((name, c_void_p) for name in ("w", "bias", "q", "scales", "a", "b", "ranks")), ("in_size", c_int64), ("out_size", c_int64)]


class Layer(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("norm_1", "q_norm", "k_norm", "norm_2")),
        *((name, Product) for name in LINEARS),
    ]


class Model(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("layers", "dim", "heads", "kv_heads", "head_dim")), ("eps", c_double),
        *((name, c_void_p) for name in ("embed", "norm", "inv_freq")),
    ]  # fmt: skip


class Step(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("n", "threads")),
        *((name, c_void_p) for name in ("ids", "rows", "at", "choice", "keys", "values")),
        *((name, c_int64) for name in ("by_layer", "by_row", "by_head")), ("hidden", c_void_p),
    ]  # fmt: skip


@cache
def library() -> ctypes.CDLL | None:
    """What was built of decode.c, once it gave the right numbers here; else None."""
    try:
        found = find_spec("engine._decode")
        if found is None or found.origin is None:
            raise OSError("it was not built: install a C compiler, then the package anew (`make -B venv`)")
        if platform.machine() in ("x86_64", "AMD64") and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
            raise OSError("this processor has no AVX2")
        built = ctypes.CDLL(found.origin)
        source = Path(__file__).with_name("decode.c")
        if source.is_file() and (ctypes.c_char * 64).in_dll(built, "decode_built_from").value != hashlib.sha256(source.read_bytes()).hexdigest().encode():
            raise OSError("it was built from another decode.c: build it anew (`make venv`)")
        built.decode_step.argtypes = [POINTER(Model), POINTER(Layer), POINTER(Step)]
        built.decode_product.argtypes = [POINTER(Product), c_void_p, c_void_p, c_int64, c_int64]
        draw = torch.Generator().manual_seed(0)  # its own: a round's draws are the same whether or not this was its first look
        x, w = torch.randn(5, 64, generator=draw), torch.randn(67, 64, generator=draw)
        small = Int8(w)
        for weight, meant in ((w, w), (small, small.meant())):
            if not torch.allclose(product(built, x, weight), x @ meant.T, rtol=1e-3, atol=1e-3):
                raise OSError("it gives wrong numbers here")
        return built
    except (OSError, ValueError) as error:  # ValueError: a name that is not in it
        log.warning("no decoding in C, replies come more slowly: %s", error)
        return None


class Int8:
    """A matrix in 8 bits: each BLOCK of a row is whole numbers of -127 to 127 times a scale of its own (llama.cpp's Q8_0, with scales in 32 bits)."""

    def __init__(self, weight: Tensor) -> None:
        """weight: (out, in), in being a multiple of BLOCK."""
        blocks = weight.detach().reshape(len(weight), -1, BLOCK)
        self.scales = blocks.abs().amax(-1) / 127  # (out, in / BLOCK)
        self.q = (blocks / self.scales.clamp(min=1e-38)[..., None]).round().to(torch.int8).view(weight.shape)

    def meant(self) -> Tensor:
        """(out, in) float32, what these numbers stand for."""
        return (self.q.view(*self.scales.shape, BLOCK) * self.scales[..., None]).view(self.q.shape)


def product(built: ctypes.CDLL, x: Tensor, weight: Tensor | Int8) -> Tensor:
    """x (n, in) W^T -> (n, out). With W in 8 bits, x is put into 16, each row by itself, and the products add up exactly."""
    w, small = (weight, None) if isinstance(weight, Tensor) else (weight.q, weight)
    y, told = x.new_empty(len(x), len(w)), Product(in_size=w.shape[1], out_size=len(w))
    if small is None:
        told.w = w.data_ptr()
    else:
        told.q, told.scales = w.data_ptr(), small.scales.data_ptr()
    if built.decode_product(byref(told), x.data_ptr(), y.data_ptr(), len(x), torch.get_num_threads()):
        raise MemoryError("no memory for a product")
    return y


class Decode:
    """The passes of one decoder. `of` says whether there can be any."""

    def __init__(self, net: Decoder, built: ctypes.CDLL, int8: bool) -> None:
        self.net, self.built = net, built
        self.small = {linear: Int8(linear.weight) for block in net.blocks for linear in (getattr(block, name) for name in LINEARS)} if int8 else {}
        self.head = Int8(net.head) if int8 else net.head
        block = net.blocks[0]
        self.model = Model(
            len(net.blocks), net.embed.shape[1], block.heads, block.kv_heads, block.head_dim, net.eps,
            net.embed.data_ptr(), net.norm.data_ptr(), net.inv_freq.data_ptr(),
        )  # fmt: skip
        self.bare = self.layers(None)

    @classmethod
    def of(cls, net: Decoder, int8: bool = False) -> Decode | None:
        """For float32 on a CPU, with sizes of whole vectors. int8: decode with the base's weights in 8 bits."""
        block = cast("Block", net.blocks[0])
        sizes = [block.head_dim, *block.qkv.weight.shape, *block.down.weight.shape]
        width = BLOCK if int8 else WIDTH
        right = net.embed.device.type == "cpu" and net.embed.dtype == torch.float32 and not any(n % width for n in sizes)
        built = library() if right else None
        return None if built is None else cls(net, built, int8)

    def layers(self, mixture: Mixture | None) -> ctypes.Array[Layer]:
        """Where every layer's numbers lie, those of the mixture's adapters with them."""
        table = (Layer * len(self.net.blocks))()
        for row, block in zip(table, self.net.blocks, strict=True):
            for name in ("norm_1", "q_norm", "k_norm", "norm_2"):
                tensor = getattr(block, name)
                setattr(row, name, None if tensor is None else tensor.data_ptr())
            for name in LINEARS:
                setattr(row, name, self.product(getattr(block, name), mixture))
        return table

    def product(self, linear: LoraLinear, mixture: Mixture | None) -> Product:
        """One layer's numbers: an adapter that is alone and `Whole` is in the weights already."""
        whole = None if mixture is None else mixture.whole.get(linear)
        weight, bias = linear.weight if whole is None else whole, linear.bias
        a = b = ranks = None
        if mixture is not None and whole is None and (stack := mixture.stacks.get(linear)) is not None:
            a, b, ranks = stack[0].data_ptr(), stack[1].data_ptr(), mixture.counts[stack[2]].data_ptr()
        out_size, in_size = linear.weight.shape
        small = self.small.get(linear)
        q, scales = (None, None) if small is None else (small.q.data_ptr(), small.scales.data_ptr())
        return Product(weight.data_ptr(), None if bias is None else bias.data_ptr(), q, scales, a, b, ranks, in_size, out_size)

    def step(self, ids: Tensor, stretch: Rows | Prompt | Pack, mixture: Mixture | None) -> Tensor:
        """ids (B, T), what a stretch of the cache is extended by -> final-normed hidden states (B, T, D)."""
        keys, values, count = stretch.cache.keys, stretch.cache.values, ids.numel()
        hidden = self.net.embed.new_empty(*ids.shape, self.model.dim)
        by_layer, by_row, by_head, _, _ = keys.stride()
        choice = None if mixture is None or mixture.choice is None else mixture.choice
        if choice is not None and len(choice) < count:
            choice = choice.repeat_interleave(count // len(choice))
        told = Step(
            count, torch.get_num_threads(), ids.data_ptr(), stretch.rows.data_ptr(), stretch.positions.data_ptr(),
            None if choice is None else choice.data_ptr(), keys.data_ptr(), values.data_ptr(), by_layer, by_row, by_head, hidden.data_ptr(),
        )  # fmt: skip
        table = self.bare if mixture is None else mixture.table(self)
        if self.built.decode_step(byref(self.model), table, byref(told)):
            raise MemoryError(f"no memory for a step of {count} tokens: lower max_sequences")
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, D) -> (n, V)."""
        return product(self.built, hidden.contiguous(), self.head)
