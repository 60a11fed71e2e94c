"""Our own forward pass for the common decoder families: Llama, Mistral, Qwen2, Qwen3.

RMSNorm (Zhang & Sennrich 2019), rotary positions (Su et al. 2021), grouped-query attention (Ainslie et al. 2023) and
SwiGLU (Shazeer 2020). Owns the arithmetic; `engine/model.py` decides who comes here, anything unusual goes to
`engine/general.py`. Small models are bound by the number of tensor operations, so q, k, v (and gate, up) are one product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine import gpu, packed
from engine.cache import Slots
from engine.lora import LoraBank, LoraLinear, Part
from engine.source import ModelError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def fits(config: Any) -> bool:
    """Whether Decoder computes this config exactly."""
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        config.model_type in FAMILIES
        and getattr(config, "hidden_act", None) == "silu"
        and rope.get("rope_type") in ("default", "llama3")
        and rope.get("partial_rotary_factor", 1.0) == 1.0
        and set(getattr(config, "layer_types", None) or ["full_attention"])
        <= {"full_attention", "sliding_attention"}
    )


class Decoder(nn.Module):
    """Token ids to final-normed hidden states. Parameters are frozen; only adapters learn."""

    replayable = True  # a decode step hangs on no number that Python knows (`engine/replay.py`)

    def __init__(self, config: Any, weights: dict[str, Tensor], bank: LoraBank) -> None:
        super().__init__()
        take = Taker(weights)
        self.eps: float = config.rms_norm_eps
        self.kv_shape = (config.num_hidden_layers, config.num_key_value_heads, head_dim(config))
        self.embed = take("model.embed_tokens.weight")  # (V, D)
        self.blocks = nn.ModuleList(Block(config, i, take, bank) for i in range(config.num_hidden_layers))
        self.norm = take("model.norm.weight")  # (D,)
        head = take.optional("lm_head.weight")
        if head is None and not config.tie_word_embeddings:
            raise ModelError(
                "the weights lack lm_head.weight: this is not a causal language model's checkpoint"
            )
        self.head = self.embed if head is None or config.tie_word_embeddings else head  # (V, D)
        self.packed_head: Tensor | None = None
        self.width: int = config.hidden_size
        take.finish()
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", rope_frequencies(config).to(self.embed.device), persistent=False)

    def forward(self, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: Any = None) -> Tensor:
        """ids, positions (B, T); mask (B, 1, T, S) added to the scores, None for causal -> (B, T, D)."""
        x = F.embedding(ids, self.embed)
        angles = positions[:, None, :, None] * self.inv_freq  # (B, 1, T, head_dim)
        rope = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer, block in enumerate(self.blocks):
            x = block(x, rope, mask, layer, cache)
        return F.rms_norm(x, self.norm.shape, self.norm, self.eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        if gpu.takes(hidden):
            return gpu.linear(hidden, self.head)
        return packed.linear(hidden, self.head, None, self.packed_head)

    def pack(self) -> None:
        """Lay out the output layer for fast inference."""
        self.packed_head = packed.pack(self.head)


class Block(nn.Module):
    """One layer: attention, then the gated MLP, each added to the stream."""

    def __init__(self, config: Any, layer: int, take: Taker, bank: LoraBank) -> None:
        super().__init__()
        at = f"model.layers.{layer}"
        self.eps = config.rms_norm_eps
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = head_dim(config)
        self.norm_1 = take(f"{at}.input_layernorm.weight")
        self.qkv = take.linear(bank, [f"{at}.self_attn.{name}_proj" for name in "qkv"])
        self.q_norm = take.optional(f"{at}.self_attn.q_norm.weight")  # Qwen3
        self.k_norm = take.optional(f"{at}.self_attn.k_norm.weight")
        self.o = take.linear(bank, [f"{at}.self_attn.o_proj"])
        self.norm_2 = take(f"{at}.post_attention_layernorm.weight")
        self.gate_up = take.linear(bank, [f"{at}.mlp.{name}_proj" for name in ("gate", "up")])
        self.down = take.linear(bank, [f"{at}.mlp.down_proj"])

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, layer: int, cache: Any
    ) -> Tensor:
        qkv = self.qkv(x, norm=self.norm_1, eps=self.eps)
        x = self.o(self.attention(qkv, rope, mask, layer, cache), add=x)
        return self.down(self.gate_up(x, norm=self.norm_2, eps=self.eps, gated=True), add=x)

    def attention(
        self, qkv: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, layer: int, cache: Any
    ) -> Tensor:
        """(B, T, (H + 2 KV) d) -> (B, T, H d), what the heads saw, side by side."""
        batch, count, _ = qkv.shape
        h, kv, d = self.heads, self.kv_heads, self.head_dim
        if isinstance(cache, Slots) and cache.by_kernel:
            norms = None if self.q_norm is None or self.k_norm is None else (self.q_norm, self.k_norm)
            return gpu.attend(qkv, rope, *cache.stretch(layer), cache.at, h, norms, self.eps)
        qkv = qkv.view(batch, count, h + 2 * kv, d).transpose(1, 2)  # (B, H + 2 KV, T, d)
        if self.q_norm is None:
            qk, v = rotate(qkv[:, : h + kv], rope), qkv[:, h + kv :]
            q, k = qk[:, :h], qk[:, h:]
        else:
            q, k, v = qkv.split([h, kv, kv], dim=1)
            q = rotate(F.rms_norm(q, (d,), self.q_norm, self.eps), rope)
            k = rotate(F.rms_norm(k, (d,), self.k_norm, self.eps), rope)
        if cache is not None:
            k, v = cache.put(layer, k, v)
        if count == 1:  # one query: the heads of a group share k and v, so they go where the queries go
            out = F.scaled_dot_product_attention(q.view(batch, kv, h // kv, d), k, v, attn_mask=mask)
            return out.reshape(batch, 1, h * d)
        if mask is not None and q.is_cuda:  # the kernels there that take a mask know no groups: the whole of the scores would be laid out
            k, v = (t.repeat_interleave(h // kv, 1) for t in (k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.transpose(1, 2).reshape(batch, count, h * d)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of x (B, heads, T, d). The sine's first half comes negated, so half-swapping is a roll."""
    cos, sin = rope  # (B, 1, T, d)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def rope_frequencies(config: Any) -> Tensor:
    """(head_dim,) radians per position, the first half negated for `rotate`."""
    rope, d = config.rope_parameters, head_dim(config)
    if rope["rope_type"] == "default":
        inverse = 1.0 / rope["rope_theta"] ** (torch.arange(0, d, 2, dtype=torch.float32) / d)
    else:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        inverse, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    return torch.cat([-inverse, inverse])


def head_dim(config: Any) -> int:
    """Numbers per attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class Taker:
    """Takes tensors out of a checkpoint by name, and knows at the end whether one was left."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def __call__(self, name: str) -> nn.Parameter:
        tensor = self.optional(name)
        if tensor is None:
            raise ModelError(
                f"the weights lack {name}: the checkpoint is incomplete or of another architecture"
            )
        return tensor

    def optional(self, name: str) -> nn.Parameter | None:
        tensor = self.weights.pop(name, None)
        return None if tensor is None else nn.Parameter(tensor, requires_grad=False)

    def linear(self, bank: LoraBank, paths: list[str]) -> LoraLinear:
        """The named projections of one input, side by side (biases too, where there are any)."""
        each = [self(f"{path}.weight").data for path in paths]
        biases = [self.optional(f"{path}.bias") for path in paths]
        if any(b is not None for b in biases):
            filled = [w.new_zeros(len(w)) if b is None else b for w, b in zip(each, biases, strict=True)]
            bias = torch.cat(filled)
        else:
            bias = None
        parts = [Part(path, len(w)) for path, w in zip(paths, each, strict=True)]
        return LoraLinear(bank, parts, torch.cat(each) if len(each) > 1 else each[0], bias)

    def finish(self) -> None:
        left = [name for name in self.weights if not name.endswith("inv_freq")]
        if left:
            raise ModelError(
                f"the weights hold {len(left)} tensors that this architecture does not use, first {left[0]}"
            )
