"""A base model in memory and the LoRA adapters on it: the one forward pass that serving and learning share.

Owns loading, padding and masks, and which of two implementations computes. Does not own text (`engine/tokenizer.py`),
sampling, or who runs when (`engine/engine.py`).
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine import decoder, native, packed, source
from engine.cache import KVCache, Pack, Prompt, Rows, Slots, additive
from engine.lora import LoraBank
from engine.mixture import Mixture
from engine.source import ModelError

__all__ = ["CausalModel", "ModelError"]
DEFAULT_CONTEXT = 2048  # for the few architectures that name no limit
SENTENCE_END = r"[.!?\n\u3002\uff01\uff1f]"


class CausalModel(nn.Module):
    """A causal language model whose base is frozen and whose adapters (`lora`) are not."""

    def __init__(
        self, directory: Path, name: str, config: Any, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        text = config.get_text_config()
        if getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None):
            raise ModelError(f"{name} is stored quantised, which would be computed as if it were not: use its unquantised weights (`--int8` serves those in 8 bits)")
        self.source, self.directory = name, directory
        self.dtype, self.device = dtype, device
        self.lora = LoraBank(name)
        self.packed = False
        self.int8 = False  # whether passes over a cache are by weights of 8 bits
        self.decode: native.Decode | None = None
        if decoder.fits(config):
            weights = source.read_weights(directory, dtype, device)
            self.net: Any = decoder.Decoder(config, weights, self.lora)
        else:
            from engine.general import General  # transformers' modelling code loads only where it is needed

            self.net = General(config, directory, dtype, device, self.lora)
        by_column = "local" in (getattr(text, "attention_layers", None) or ())  # GPT-Neo's window is counted in columns, whatever their positions
        self.packs: bool = getattr(self.net, "takes_positions", True) and not by_column  # whether it goes by the positions it is given: so replies can share a prompt's row
        self.hidden_size: int = self.net.width  # of a hidden state
        self.vocab_size: int = text.vocab_size
        self.max_context = context_limit(text)
        self.eos_ids = source.eos_ids(directory)
        self.sampling = source.sampling(directory)
        pad = text.pad_token_id
        named = pad is not None and 0 <= pad < self.vocab_size  # some configs say -1, or a token that the embedding has no row for
        self.pad_id: int = pad if named else next(iter(self.eos_ids), 0)

    @classmethod
    def load(
        cls,
        source_name: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> CausalModel:
        """From a local directory or a hub id; device "auto" is CUDA where there is one.

        Raises ModelError, saying what to do, when it cannot be found, read, or computed exactly.
        """
        where = source.device_named(device)
        directory = source.resolve(source_name)
        try:
            return cls(directory, str(source_name), source.read_config(directory), dtype, where).eval()
        except torch.OutOfMemoryError as error:
            free, total = (n / 1e9 for n in torch.cuda.mem_get_info(where))
            raise ModelError(
                f"{source_name} does not fit into the memory of {torch.cuda.get_device_name(where)}, of whose {total:.1f} GB {free:.1f} are free: "
                "stop what else runs there, choose a smaller model, or use device cpu"
            ) from error

    def train(self, mode: bool = True) -> CausalModel:
        """Always evaluation mode: dropout would make the policy that is trained another than the one that was sampled."""
        return super().train(False)

    @cached_property
    def digest(self) -> str:
        """sha256 over the stored base weights; reads them once."""
        return source.digest(self.directory)

    @cached_property
    def sentence_ends(self) -> Tensor:
        """(V,) bool: the tokens whose text ends a sentence or a line. Raises ModelError where the model has no tokenizer."""
        from engine.tokenizer import ChatTokenizer

        found = ChatTokenizer.load(self.directory).tokens_with(SENTENCE_END, self.vocab_size)
        return torch.tensor(found, device=self.device)

    def pack(self, int8: bool = False) -> None:
        """Make inference faster on a CPU: `engine/native.py`, or where it cannot be, `engine/packed.py`. Results agree to rounding.

        int8: with weights of 8 bits: faster where reading them takes the time, and no longer quite the same model. Adapters stay as they are. Raises ModelError where that cannot be had. The first call decides.
        """
        if self.packed:
            return
        self.packed = True
        if isinstance(self.net, decoder.Decoder):
            self.decode = native.Decode.of(self.net, int8)
            self.int8 = int8
            self.lora.native, self.lora.mergeable = self.decode is not None, not int8
        if self.decode is None:
            for linear in self.lora.linears:
                linear.packed = packed.pack(linear.weight)
            self.net.pack()
        if int8 and self.decode is None:
            raise ModelError(
                "8-bit weights need a Llama, Mistral or Qwen model in float32 on a CPU, with layer sizes that are multiples of 32, and a C compiler when "
                "Plaudit was installed (`plaudit doctor` tells): serve without int8"
            )

    def new_cache(self, max_rows: int, max_length: int) -> KVCache:
        """An empty key-value cache of this model's shape."""
        layers, kv_heads, head_dim = self.net.kv_shape
        return KVCache(layers, kv_heads, head_dim, max_rows, max_length, self.dtype, self.device)

    def forward(
        self, ids: Tensor, *, positions: Tensor | None = None, valid: Tensor | None = None, attend: Tensor | None = None,
        adapter: str | Mixture | None = None, cache: Prompt | Pack | Rows | Slots | None = None,
    ) -> Tensor:  # fmt: skip
        """Final-normed hidden states (B, T, D) of ids (B, T), differentiable in the adapter's parameters.

        valid: (B, T) bool, True = a real token; padding may be left or right, and its own states mean nothing.
        positions: (B, T); by default the count of real tokens before each.
        attend: (B, T, T) bool, [b, i, j] = token i sees token j; replaces the causal mask. A token always sees itself.
        adapter: the adapter of the whole batch, or a mixture chosen by row; None for the bare base.
        cache: a stretch of a KVCache to extend; it brings positions and mask of its own.
        """
        if cache is not None:
            if valid is not None or attend is not None or positions is not None:
                raise ValueError("a cache brings its own positions and mask")
            if self.decode is not None and not isinstance(cache, Slots) and not torch.is_grad_enabled() and not isinstance(adapter, str):
                return self.decode.step(ids, cache, adapter)
            positions, mask = cache.positions, cache.mask
        else:
            positions = self._positions(ids, valid) if positions is None else positions
            mask = self._mask(ids, valid, attend)
        with self.lora.using(adapter):
            return self.net(ids, positions, mask, cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V) float32."""
        return self.net.logits(hidden).float()

    def next_logits(self, hidden: Tensor) -> Tensor:
        """As `logits` of (n, D), for sampling: without a gradient, and agreeing with it to rounding."""
        return self.logits(hidden) if self.decode is None else self.decode.logits(hidden)

    def logprobs(
        self,
        ids: Tensor,
        *,
        valid: Tensor | None = None,
        adapter: str | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """(B, T) -> (B, T-1): log p(ids[:, t+1] | ids[:, :t+1]) in nats, softmax of logits / temperature.

        0 where either token is padding.
        """
        hidden = self(ids, valid=valid, adapter=adapter)[:, :-1]
        logits = self.logits(hidden) / temperature  # (B, T-1, V)
        logprobs = -F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(
            ids[:, 1:].shape
        )
        return logprobs if valid is None else logprobs.masked_fill(~(valid[:, 1:] & valid[:, :-1]), 0.0)

    @staticmethod
    def _positions(ids: Tensor, valid: Tensor | None) -> Tensor:
        if valid is None:
            return torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        return (valid.long().cumsum(1) - 1).clamp(min=0)

    def _mask(self, ids: Tensor, valid: Tensor | None, attend: Tensor | None) -> Tensor | None:
        """(B or 1, 1, T, T) to add to the scores; None when plain causal attention is the same."""
        count = ids.shape[1]
        if attend is None:
            # Padding on the right is after every real token, so the causal mask already hides it.
            if valid is None or bool((valid[:, 1:] <= valid[:, :-1]).all()):
                return None
            allowed = valid[:, None, :] & torch.ones(count, count, dtype=torch.bool, device=ids.device).tril()
        else:
            allowed = attend if valid is None else attend & valid[:, None, :]
        itself = torch.eye(count, dtype=torch.bool, device=ids.device)  # a row that sees nothing would be NaN
        return additive(allowed | itself, self.dtype)[:, None]


def context_limit(config: Any) -> int:
    """Most tokens that prompt and reply may have together: the model's positions, or its sliding window if shorter.

    Beyond the window old tokens would have to be forgotten; a clear refusal is kinder than a silent one.
    """
    limit = next(
        (
            v
            for n in ("max_position_embeddings", "n_positions", "seq_length")
            if (v := getattr(config, n, None))
        ),
        DEFAULT_CONTEXT,
    )
    rope = getattr(config, "rope_parameters", None) or {}
    for scaled in (rope, *(v for v in rope.values() if isinstance(v, dict))):
        if scaled.get("rope_type") == "longrope":  # its factors go by the longest row of a pass: past here a row would not be alone with its own
            limit = min(limit, scaled.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None) or limit)
    if "local" in (getattr(config, "attention_layers", None) or ()):  # GPT-Neo, whose window is counted in columns, not in positions
        limit = min(limit, config.window_size)
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    return min(limit, window) if window and slides and getattr(config, "use_sliding_window", True) else limit
