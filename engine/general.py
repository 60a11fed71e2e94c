"""Every other architecture, through transformers' own module (GPT-2, Gemma, Phi, ...).

Owns fitting that module to our cache, masks and adapters, and proving at load time that the fit is right. The common
families have a faster path of their own in `engine/decoder.py`.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicCache
from transformers.pytorch_utils import Conv1D

from engine import packed
from engine.cache import KVCache, Prompt, Rows, additive
from engine.lora import LoraBank, LoraLinear, Part
from engine.source import ModelError, first_line, weight_files


class Spans(Cache):
    """Hands transformers' attention layers our own cache."""

    def __init__(self, span: Prompt | Rows) -> None:
        self.span = span
        self.layers: list[Any] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self.span.put(layer_idx, key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.span.end - self.span.positions.shape[1]

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        return self.span.end, 0


class General(nn.Module):
    """Token ids to final-normed hidden states, computed by transformers; same interface as Decoder."""

    replayable = False  # who knows what a model's own code looks at

    def __init__(
        self, config: Any, directory: Path, dtype: torch.dtype, device: str | torch.device, bank: LoraBank
    ) -> None:
        super().__init__()
        weight_files(directory)  # a clear line when there are no safetensors
        name = (getattr(config, "architectures", None) or [config.model_type])[0]
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                directory, dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True
            )
        except Exception as error:
            raise ModelError(f"{name} cannot be loaded as a causal language model: {first_line(error)}") from error
        model = model.to(device).eval().requires_grad_(False)
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear) or model.base_model is model:
            raise ModelError(f"{name} has no language-model head: choose a causal language model")
        self.core, self.head, self.width = model.base_model, head, head.in_features  # OPT may embed in fewer numbers than its config's hidden_size
        self.packed_head: Tensor | None = None
        text = config.get_text_config()
        self.softcap: float | None = getattr(text, "final_logit_softcapping", None)  # Gemma 2
        self.logit_scale: float = getattr(text, "logit_scale", None) or 1.0  # Cohere
        self.logit_divisor: float = getattr(text, "logits_scaling", None) or 1.0  # Granite
        self.takes_positions = "position_ids" in inspect.signature(self.core.forward).parameters
        try:
            self.kv_shape = self._prove(model)
            self._adopt_linears(model, bank)
        except ModelError as error:
            raise ModelError(f"{name} is not supported: {error}") from error
        except Exception as error:  # whatever an architecture trips over, it is one we cannot serve
            raise ModelError(f"{name} is not supported by the engine: {first_line(error)}") from error

    def forward(
        self, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: Prompt | Rows | None = None
    ) -> Tensor:
        """ids, positions (B, T); mask (B, 1, T, S) added to the scores, None for causal -> (B, T, D)."""
        batch, count = ids.shape
        if mask is None:
            end = count if cache is None else cache.end
            allowed = torch.ones(count, end, dtype=torch.bool, device=ids.device).tril(end - count)
            mask = additive(allowed, next(self.core.parameters()).dtype)[None, None]
        kwargs = {"position_ids": positions} if self.takes_positions else {}
        output = self.core(
            input_ids=ids, attention_mask=mask.expand(batch, 1, count, -1), use_cache=cache is not None,
            past_key_values=None if cache is None else Spans(cache), return_dict=True, **kwargs,
        )  # fmt: skip
        return output.last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V), with what some families do to them after the output layer."""
        logits = packed.linear(hidden, self.head.weight, self.head.bias, self.packed_head)
        logits = logits * (self.logit_scale / self.logit_divisor)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def pack(self) -> None:
        """Lay out the output layer for fast inference."""
        self.packed_head = packed.pack(self.head.weight)

    @torch.no_grad()
    def _prove(self, model: Any) -> tuple[int, int, int]:
        """Compare our way of calling the module with its own on a few tokens; returns the shape of its cache."""
        vocab = model.config.get_text_config().vocab_size
        ids = (torch.arange(1, 9, device=model.device) * 97 % vocab)[None]
        output = model(input_ids=ids, use_cache=True, return_dict=True)
        if not isinstance(output.past_key_values, DynamicCache):
            raise ModelError("it keeps no ordinary key-value cache (a recurrent or encoder-decoder model)")
        layers: list[Any] = output.past_key_values.layers
        shapes = {(t.shape[1], t.shape[3]) for layer in layers for t in (layer.keys, layer.values)}
        if len(shapes) != 1:
            raise ModelError("its layers do not all keep keys and values of one shape")
        ((kv_heads, head_dim),) = shapes
        kv_shape = (len(layers), kv_heads, head_dim)
        cache = KVCache(*kv_shape, max_rows=2, max_length=8, dtype=model.dtype, device=model.device)
        spans: list[Prompt | Rows] = [Prompt(cache, 0, 0, 6), Rows(cache, [6]), Rows(cache, [7])]
        hidden = [self(ids[:, p.positions[0]], p.positions, p.mask, p) for p in spans]
        short, apart = Prompt(cache, 1, 0, 3), Rows(cache, [6, 3])  # rows of different lengths: each has its own positions, or they are the longest row's
        self(ids[:, :3], short.positions, short.mask, short)
        beside = self(ids[0, apart.at][:, None], apart.positions, apart.mask, apart)
        positions, wanted = torch.arange(8, device=model.device)[None], output.logits.float()
        head = "its logits are not its output layer applied to its hidden states"
        for ours, want, wrong in (
            (torch.cat(hidden, 1), wanted, head), (self(ids, positions, None), wanted, head),
            (beside[:, 0], wanted[0, apart.at], "replies of different lengths do not keep positions of their own in it"),
        ):  # fmt: skip
            got = self.logits(ours).float()
            # In half precision single logits round by as much as they are, the more of them the deeper the model: by their spread
            close = torch.allclose(got, want, rtol=1e-4, atol=1e-4) if model.dtype == torch.float32 else bool((got - want).std() < 0.1 * want.std())
            if not close:
                raise ModelError(wrong)
        return kv_shape

    def _adopt_linears(self, model: Any, bank: LoraBank) -> None:
        """Replace the linear layers by ones that take adapters, under their own names. What computes something else on top (a router) stays."""
        plain = (nn.Linear.forward, Conv1D.forward)
        found = [
            (path, m)
            for path, m in model.named_modules()
            if isinstance(m, nn.Linear | Conv1D) and type(m).forward in plain and m is not self.head
        ]
        for path, module in found:
            is_conv = isinstance(module, Conv1D)
            bank.fan_in_fan_out |= is_conv
            weight = module.weight.data.T.contiguous() if is_conv else module.weight.data
            bias = None if module.bias is None else module.bias.data
            model.set_submodule(path, LoraLinear(bank, [Part(path, len(weight))], weight, bias))
