"""LoRA adapters on a frozen base (Hu et al. 2021): y = x W^T + (alpha / r) (x A^T) B^T.

Owns the adapters: making, reading and writing them, and applying one to a whole batch (training, differentiable). Does not own several
side by side, chosen row by row (`engine/mixture.py`: serving), the base weights, or which adapter is used.

Files are PEFT's own (`adapter_config.json`, `adapter_model.safetensors`), so what is saved here loads anywhere.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from engine import gpu, packed
from engine.mixture import Mixture, Whole

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# What changes the sum above; an adapter that sets one of these differs from what we would compute.
REFUSED = {
    "use_dora": False, "lora_bias": False, "bias": "none", "modules_to_save": None, "rank_pattern": {},
    "alpha_pattern": {}, "layer_replication": None, "trainable_token_indices": None, "megatron_config": None,
    "target_parameters": None, "alora_invocation_tokens": None, "use_qalora": False,
}  # fmt: skip
STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # `init_lora_weights` that leave the base as it is; PiSSA, OLoRA and others change its weights


class AdapterError(Exception):
    """The adapter cannot be used; the message says what is wrong with it and what to do."""


@dataclass(frozen=True)
class Part:
    """One projection inside a LoraLinear: its name in the Hugging Face model and its number of outputs."""

    path: str
    size: int


@dataclass
class Adapter:
    """One adapter: `pairs[path]` is (A (r, in), B (out, r)), float32."""

    r: int
    alpha: float
    scaling: float  # alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA
    targets: list[str]
    pairs: dict[str, tuple[nn.Parameter, nn.Parameter]]
    stacked: dict[LoraLinear, tuple[Tensor, Tensor]] = field(default_factory=dict)  # of one that never changes: what `stack` gives

    @property
    def trainable(self) -> bool:
        """Whether its numbers may change."""
        return any(a.requires_grad for a, _ in self.pairs.values())

    def named(self) -> dict[str, nn.Parameter]:
        """The parameters by PEFT's own names (`base_model.model....lora_A.weight`)."""
        sides = ((path, zip("AB", pair, strict=True)) for path, pair in self.pairs.items())
        return {f"{PREFIX}{path}.lora_{side}.weight": p for path, pair in sides for side, p in pair}

    def fused(self, linear: LoraLinear) -> tuple[Tensor, Tensor] | None:
        """(A (R, in), B (out, R)) over all parts of `linear`, scaling in B; None when it touches none of them."""
        pairs = [self.pairs.get(part.path) for part in linear.parts]
        found = [pair for pair in pairs if pair is not None]
        if not found:
            return None
        weight = linear.weight
        a: Tensor
        b: Tensor
        if len(pairs) == 1:
            a, b = found[0]
        else:
            a = torch.cat([a for a, _ in found])
            b = torch.block_diag(
                *(
                    pair[1] if pair else weight.new_zeros(part.size, 0)
                    for pair, part in zip(pairs, linear.parts, strict=True)
                )
            )
        return a.to(weight), (b * self.scaling).to(weight)

    def stack(self, linear: LoraLinear) -> tuple[Tensor, Tensor] | None:
        """(A (R, in), B^T (R, out)), as `engine/mixture.py` lays adapters end to end; None when it does not touch `linear`."""
        if (kept := self.stacked.get(linear)) is not None:
            return kept
        downs = [self.pairs[part.path][0].detach() for part in linear.parts if part.path in self.pairs]
        if not downs:
            return None
        b, row, column = linear.weight.new_zeros(len(downs) * self.r, len(linear.weight)), 0, 0
        for part in linear.parts:
            if part.path in self.pairs:
                torch.mul(self.pairs[part.path][1].detach().T, self.scaling, out=b[row : row + self.r, column : column + part.size])
                row += self.r
            column += part.size
        return (downs[0] if len(downs) == 1 else torch.cat(downs)).to(b), b


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of a tensor with a NaN or infinite number, or None. A finite sum has finite terms: one quick look at all."""
    if torch.cat([t.detach().flatten() for t in tensors.values()]).sum().isfinite():
        return None
    return next((name for name, t in tensors.items() if not t.isfinite().all()), None)


class LoraLinear(nn.Module):
    """A frozen linear layer, or several over one input laid side by side, with the bank's active adapters added.

    Maps (..., in) to (..., sum of part sizes). The parts keep their own names, so an adapter may target any of them.
    """

    def __init__(self, bank: LoraBank, parts: Sequence[Part], weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.parts = tuple(parts)
        self.weight = nn.Parameter(weight, requires_grad=False)  # (out, in)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.packed: Tensor | None = None  # set by CausalModel.pack
        self.bank = bank
        bank.linears.append(self)

    def forward(
        self, x: Tensor, norm: Tensor | None = None, eps: float = 0.0, gated: bool = False, add: Tensor | None = None
    ) -> Tensor:
        """norm, eps: of an RMSNorm before it. gated: half of the outputs are gates, and SwiGLU comes after it. add: what comes on top."""
        active = self.bank.active
        if gpu.takes(x) and (active is None or (isinstance(active, Mixture) and x.shape[1] == 1)):
            low = None if active is None else active.low(self)  # which is by rows, not by tokens
            return gpu.linear(x, self.weight, self.bias, norm=norm, eps=eps, gated=gated, add=add, low=low)
        if norm is not None:
            x = F.rms_norm(x, norm.shape, norm, eps)
        y = self.bare(x) if active is None else active.through(self, x)
        if gated:
            gate, up = y.chunk(2, dim=-1)
            y = F.silu(gate) * up
        return y if add is None else add + y

    def bare(self, x: Tensor) -> Tensor:
        """Without any adapter."""
        return packed.linear(x, self.weight, self.bias, self.packed)


class Single:
    """One adapter for the whole batch, straight from its parameters: gradients flow."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    def through(self, linear: LoraLinear, x: Tensor) -> Tensor:
        """The layer's output with the adapter added."""
        fused = self.adapter.fused(linear)
        return linear.bare(x) if fused is None else linear.bare(x) + F.linear(F.linear(x, fused[0]), fused[1])


class LoraBank:
    """Every adapter on one base model, by name."""

    def __init__(self, source: str = "", *, fan_in_fan_out: bool = False) -> None:
        self.source = source
        self.fan_in_fan_out = fan_in_fan_out  # the base has GPT-2's Conv1D; PEFT wants it said in the config
        self.linears: list[LoraLinear] = []
        self.adapters: dict[str, Adapter] = {}
        self.active: Single | Mixture | None = None
        self.revision = 0  # grows whenever the set of adapters changes
        self.native = False  # whether decode steps are `engine/native.py`'s
        self.mergeable = True  # whether an adapter may be added into the weights: not into 8 bits, which would round it away
        self.whole: Whole | None = None  # of the adapter that last had the model to itself: one more copy of the weights

    @property
    def device(self) -> torch.device:
        """Where the base and every adapter are."""
        return self.linears[0].weight.device

    def names(self) -> list[str]:
        """The names of the adapters, in the order they came."""
        return list(self.adapters)

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of one adapter by PEFT's own names (`base_model.model....lora_A.weight`)."""
        return self._get(name).named()

    def create(
        self, name: str, *, r: int = 16, alpha: float = 32, targets: Sequence[str] | None = None, seed: int = 0,
        trainable: bool = True,
    ) -> None:  # fmt: skip
        """A new adapter that changes nothing yet: A uniform as in PEFT (Kaiming, a = sqrt 5), B zero.

        targets: module names such as "q_proj"; None means every linear layer of the blocks.
        """
        parts = [(part, linear) for linear in self.linears for part in linear.parts]
        if targets is None:
            targets = sorted({part.path.rsplit(".", 1)[-1] for part, _ in parts})
        generator = torch.Generator().manual_seed(seed)
        pairs = {}
        for part, linear in parts:
            if any(part.path == t or part.path.endswith("." + t) for t in targets):
                inputs = linear.weight.shape[1]
                a = (torch.rand(r, inputs, generator=generator) * 2 - 1) / math.sqrt(inputs)
                pairs[part.path] = self._pair(a, torch.zeros(part.size, r), trainable)
        if not pairs:
            raise AdapterError(
                f"no layer of the model is named {', '.join(targets)}: choose among {self._layer_names()}"
            )
        self.put(name, Adapter(r, alpha, alpha / r, list(targets), pairs))

    def load(self, name: str, path: str | Path, *, trainable: bool = False) -> None:
        """`read` and `put`. Raises AdapterError."""
        self.put(name, self.read(path, trainable=trainable))

    def read(self, path: str | Path, *, trainable: bool = False) -> Adapter:
        """Read a PEFT directory, for `put`; touches nothing that is in use, so it may run beside decoding, in another thread.

        Raises AdapterError, naming the file or tensor, when anything about it is off.
        """
        path = Path(path)
        config = self._read_config(path)
        try:
            r, alpha = int(config["r"]), float(config["lora_alpha"])
            scaling = alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r
            if not math.isfinite(scaling):
                raise ValueError(f"lora_alpha / r is {scaling}")
            targets = config["target_modules"]
            targets = [targets] if isinstance(targets, str) else [str(target) for target in targets]
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise AdapterError(
                f"{path / CONFIG} lacks a usable r, lora_alpha or target_modules ({error!r})"
            ) from error
        try:
            tensors = load((path / WEIGHTS).read_bytes())  # a small file of many tensors is slow to read one by one
        except FileNotFoundError as error:
            raise AdapterError(f"{path} has no {WEIGHTS}: save the adapter as safetensors") from error
        except (SafetensorError, OSError) as error:
            raise AdapterError(f"{path / WEIGHTS} is damaged ({error}): fetch or publish it again") from error
        pairs = {}
        for linear in self.linears:
            for part in linear.parts:
                keys = [f"{PREFIX}{part.path}.lora_{side}.weight" for side in "AB"]
                if not any(key in tensors for key in keys):
                    continue
                shapes = [(r, linear.weight.shape[1]), (part.size, r)]
                for key, shape in zip(keys, shapes, strict=True):
                    self._check(path, key, tensors.get(key), shape)
                pairs[part.path] = self._pair(tensors.pop(keys[0]), tensors.pop(keys[1]), trainable)
        if tensors:
            raise AdapterError(
                f"{path / WEIGHTS} has {len(tensors)} tensors that fit no layer of this model, the first is "
                f"{next(iter(tensors))}: the adapter was made for another model"
            )
        if not pairs:
            raise AdapterError(f"{path / WEIGHTS} holds no LoRA weights")
        adapter = Adapter(r, alpha, scaling, targets, pairs)
        if bad := not_finite(adapter.named()):
            raise AdapterError(f"{path / WEIGHTS}: {bad} has NaN or infinite numbers; the adapter is refused")
        if not trainable:
            adapter.stacked = {linear: stack for linear in self.linears if (stack := adapter.stack(linear)) is not None}
        return adapter

    def save(self, name: str, path: str | Path) -> None:
        """Write a PEFT directory that `load` here and `peft.PeftModel.from_pretrained` both read."""
        adapter, path = self._get(name), Path(path)
        tensors = {key: p.detach().cpu().contiguous() for key, p in self.parameters(name).items()}
        if bad := not_finite(tensors):
            raise AdapterError(f"adapter {name!r} has NaN or infinite numbers in {bad}: it is not saved")
        path.mkdir(parents=True, exist_ok=True)
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": self.source, "r": adapter.r,
            "lora_alpha": adapter.alpha, "use_rslora": not math.isclose(adapter.scaling, adapter.alpha / adapter.r),
            "target_modules": adapter.targets[0] if self._is_pattern(adapter.targets) else adapter.targets,
            "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": self.fan_in_fan_out, "inference_mode": True,
        }  # fmt: skip
        (path / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})

    def copy(self, src: str, dst: str, *, trainable: bool | None = None) -> None:
        """Make `dst` an independent copy of `src` (trainable like `src` unless said)."""
        old = self._get(src)
        pairs = {}
        for path, (a, b) in old.pairs.items():
            pairs[path] = self._pair(
                a.detach().clone(), b.detach().clone(), a.requires_grad if trainable is None else trainable
            )
        self.put(dst, Adapter(old.r, old.alpha, old.scaling, list(old.targets), pairs))

    def delete(self, name: str) -> None:
        """Forget an adapter."""
        if self.whole is not None and self.whole.adapter is self._get(name):
            self.whole = None
        del self.adapters[name]
        self.revision += 1

    @contextmanager
    def using(self, active: str | Mixture | None) -> Iterator[None]:
        """Within the block, the model has this adapter (by name), this mixture, or none."""
        before = self.active
        self.active = Single(self._get(active)) if isinstance(active, str) else active
        try:
            yield
        finally:
            self.active = before

    def mixture(self, names: Sequence[str]) -> Mixture:
        """The named adapters stacked for a mixed batch: a snapshot, to be made anew when one of them changes."""
        return Mixture(self, [self._get(name) for name in names])

    def whole_of(self, adapter: Adapter) -> Whole:
        """The adapter added into the weights, as far as that has come; another's is given up for it."""
        if self.whole is None or self.whole.adapter is not adapter:
            self.whole = Whole(adapter, self)
        return self.whole

    def _get(self, name: str) -> Adapter:
        try:
            return self.adapters[name]
        except KeyError:
            raise AdapterError(
                f"no adapter named {name!r}: loaded are {', '.join(self.adapters) or 'none'}"
            ) from None

    def put(self, name: str, adapter: Adapter) -> None:
        """Have an adapter under this name."""
        self.adapters[name] = adapter
        self.revision += 1

    def _pair(self, a: Tensor, b: Tensor, trainable: bool) -> tuple[nn.Parameter, nn.Parameter]:
        a, b = a.to(self.device, torch.float32), b.to(self.device, torch.float32)
        return nn.Parameter(a, requires_grad=trainable), nn.Parameter(b, requires_grad=trainable)

    def _layer_names(self) -> str:
        return ", ".join(
            sorted({part.path.rsplit(".", 1)[-1] for linear in self.linears for part in linear.parts})
        )

    def _is_pattern(self, targets: list[str]) -> bool:
        """PEFT reads a lone string as a regular expression; keep one that names no layer as it was."""
        ends = {part.path.rsplit(".", 1)[-1] for linear in self.linears for part in linear.parts}
        return len(targets) == 1 and targets[0].rsplit(".", 1)[-1] not in ends

    @staticmethod
    def _read_config(path: Path) -> dict:
        try:
            config = json.loads((path / CONFIG).read_text("utf-8"))
        except FileNotFoundError as error:
            raise AdapterError(f"{path} is not an adapter directory: it has no {CONFIG}") from error
        except (OSError, ValueError) as error:
            raise AdapterError(f"{path / CONFIG} cannot be read as JSON: {error}") from error
        if not isinstance(config, dict) or config.get("peft_type") != "LORA":
            raise AdapterError(f"{path / CONFIG} is not a LoRA config (peft_type must be LORA)")
        for key, neutral in REFUSED.items():
            if config.get(key) not in (neutral, None, False, [], {}):
                raise AdapterError(f"{path / CONFIG} sets {key}, which is not supported: train it without")
        if (start := config.get("init_lora_weights")) not in STARTS:
            raise AdapterError(
                f"{path / CONFIG} has init_lora_weights {str(start)[:40]!r}, which changes the base model's own weights: convert it to plain LoRA "
                "(PEFT's save_pretrained with path_initial_model_for_weight_conversion)"
            )
        return config

    @staticmethod
    def _check(path: Path, key: str, tensor: Tensor | None, shape: tuple[int, int]) -> None:
        if tensor is None:
            raise AdapterError(f"{path / WEIGHTS} lacks {key}")
        if tuple(tensor.shape) != shape:
            raise AdapterError(
                f"{path / WEIGHTS}: {key} has shape {tuple(tensor.shape)}, this model needs {shape}: "
                "the adapter was made for another model"
            )
