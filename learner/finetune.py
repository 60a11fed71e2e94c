"""Instruction finetuning of one LoRA adapter on the shared base (Ouyang et al. 2022, step 1): loss on assistant tokens only.

Owns chats to examples, the held-out loss, which pass is kept, and `plaudit sft`: a file of chats to a published version.
The loop itself is `learner/sft.py`'s; a round on people's own replies is `learner/demonstrations.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.engine import BASE, probe
from engine.model import CausalModel
from engine.tokenizer import ChatTokenizer
from learner.config import SFTRoundConfig
from learner.data import prompt_key
from learner.sft import IGNORE, Example, SFTConfig, SFTError, batches, collate, encode_chat, train
from learner.versions import load_version
from store.adapters import AdapterRegistry, Manifest

START, NEW = "sft-start", "sft-new"  # adapters of `publish_finetuned`
PROBE = "Hello! Who are you, and what can you do for me?"
Progress = Callable[[float, str], None]
CHUNK_TOKENS = 1024  # padded tokens of a held-out batch: each comes with logits over a whole vocabulary


class AdapterModule(nn.Module):
    """One adapter of a shared model as a module of its own: its parameters are the adapter's and nothing else."""

    def __init__(self, model: CausalModel, adapter: str | None) -> None:
        super().__init__()
        self.weights = nn.ParameterList(model.lora.parameters(adapter).values() if adapter else ())
        self.adapter = adapter
        self._shared = (model,)  # in a tuple, so that the base is no part of this module

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, D) hidden states; padding on the right."""
        return self._shared[0](ids, adapter=self.adapter)

    def loss(self, ids: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """Cross-entropy (nats) over the tokens that carry loss."""
        model = self._shared[0]
        ids, targets = ids.to(model.device), targets.to(model.device)
        counts = targets != IGNORE  # (B, T)
        return F.cross_entropy(model.logits(self(ids)[counts]), targets[counts], reduction=reduction)


@dataclass(frozen=True)
class Finetuned:
    """One run. Losses in nats a token on chats that were not trained on; None where there were too few to hold out."""

    steps: int
    passes: int  # begun; `kept` of them are in the adapter, 0: none lowered the held-out loss
    kept: int
    tokens: int  # trained on, without padding
    seconds: float
    train_loss: float
    loss_before: float | None
    loss_after: float | None
    curve: list[float]  # held-out loss after 0, 1, ... passes, and where the run ended within one
    chats: int
    held_out: int
    stopped: str | None  # why it ended before the last pass


class NothingLearned(SFTError):
    """The held-out loss never fell; nothing is published."""


class Enough(Exception):
    """Ends the loop; says why."""


def encode(tokenizer: ChatTokenizer, chat: Sequence[dict[str, str]], limit: int) -> Example | None:
    """A chat as tokens, loss on all its replies; its last `limit` tokens. None when the template refuses it.

    With a template that rewrites earlier turns only the last reply carries loss.
    """
    messages = list(chat)
    try:
        try:
            example = encode_chat(tokenizer, messages)
        except SFTError:
            return last_reply(tokenizer, tokenizer.render(messages[:-1]), messages[-1]["content"], limit)
    except ValueError:
        return None
    return Example(example.ids[-limit:], example.loss[-limit:])


def last_reply(tokenizer: ChatTokenizer, prompt_ids: Sequence[int], reply: str, limit: int) -> Example:
    """A rendered prompt and the reply to it with its end token, as the engine would have sampled it; loss on the reply."""
    ids = [*prompt_ids, *tokenizer.encode(reply), tokenizer.end_id]
    loss = [i >= len(prompt_ids) for i in range(len(ids))]
    return Example(tuple(ids[-limit:]), tuple(loss[-limit:]))


def hold_out(chats: Sequence[Sequence[dict[str, str]]], share: float, seed: int) -> tuple[list[int], list[int]]:
    """(training, held out) indices: `share` of the prompts, and no prompt on both sides. None are held out of under five."""
    keys = [prompt_key(chat[:-1]) for chat in chats]
    prompts = sorted(set(keys))
    random.Random(f"sft/{seed}").shuffle(prompts)
    held = set(prompts[: max(1, round(share * len(prompts)))] if len(prompts) >= 5 else ())
    return [i for i, key in enumerate(keys) if key not in held], [i for i, key in enumerate(keys) if key in held]


@torch.no_grad()
def mean_loss(module: AdapterModule, examples: Sequence[Example], pad_id: int) -> float:
    """Nats a token that carries loss."""
    total, count = 0.0, 0
    for rows in batches(examples, CHUNK_TOKENS, 0, 0):
        ids, targets = collate([examples[i] for i in rows], pad_id)
        total += float(module.loss(ids, targets, "sum"))
        count += int((targets != IGNORE).sum())
    return total / max(1, count)


def finetune(
    model: CausalModel,
    training: Sequence[Example],
    held_out: Sequence[Example],
    config: SFTRoundConfig,
    *,
    adapter: str,
    start: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Finetuned:
    """Train adapter `adapter`, from a copy of `start` or from the bare base, and leave the best pass in it.

    The best pass has the lowest held-out loss, the start and what there was when the time was up included; without held-out
    chats it is the last. Raises SFTError when there is nothing to train on or a loss is not finite.
    """
    usable = [e for e in training if any(e.loss[1:])]
    if not usable:
        raise SFTError("no chat is left to train on: the model's chat template refuses all of them")
    if start is None:
        model.lora.create(adapter, r=config.lora_r, alpha=config.lora_alpha, seed=seed)
    else:
        model.lora.copy(start, adapter, trainable=True)
    module, began = AdapterModule(model, adapter), time.monotonic()
    per_pass = len(batches(usable, config.tokens_per_batch, seed, 0))
    curve = [mean_loss(module, held_out, model.pad_id)] if held_out else []
    best = Kept(0, [p.detach().clone() for p in module.weights])
    last: dict[str, Any] = {"step": 0}
    losses: list[float] = []

    def look(passes: int) -> bool:
        """Measure the adapter after so many passes, the last perhaps not whole; whether it is the best so far."""
        nonlocal best
        if held_out:
            curve.append(mean_loss(module, held_out, model.pad_id))
            if not math.isfinite(curve[-1]):
                raise SFTError("the held-out loss is not a finite number: lower sft.lr")
        if better := not held_out or curve[-1] < min(curve[:-1]):
            best = Kept(passes, [p.detach().clone() for p in module.weights])
        return better

    def after_step(row: dict[str, Any]) -> None:
        last.update(row)
        losses.append(row["loss"])
        if not math.isfinite(row["loss"]):
            raise SFTError("the finetuning loss is not a finite number: lower sft.lr")
        done, rest = divmod(row["step"], per_pass)
        if progress is not None:
            progress(row["progress"], f"pass {min(done + 1, config.passes)} of {config.passes}")
        if not rest and not look(done) and done - best.passes >= config.patience:
            raise Enough(f"no lower held-out loss in {config.patience} passes")
        if time.monotonic() - began > config.max_seconds:
            raise Enough("the time is up")
        if row["step"] == config.max_steps:
            raise Enough("as many steps as wanted")

    settings = SFTConfig(
        steps=per_pass * config.passes, tokens_per_batch=config.tokens_per_batch, lr=config.lr, weight_decay=config.weight_decay,
        warmup=0.05, betas=(0.9, 0.999), clip=1.0, seed=seed,
    )  # fmt: skip
    stopped = None
    try:
        train(module, usable, settings, pad_id=model.pad_id, on_step=after_step, loss_of=AdapterModule.loss)
    except Enough as reason:
        stopped = str(reason)
    steps = int(last["step"])
    passes = math.ceil(steps / per_pass)
    if steps % per_pass:  # ended within a pass, which counts
        look(passes)
    with torch.no_grad():
        for weight, kept in zip(module.weights, best.weights, strict=True):
            weight.copy_(kept)
    return Finetuned(
        steps=steps, passes=passes, kept=best.passes, tokens=round(steps / per_pass * sum(len(e.ids) for e in usable)),
        seconds=round(time.monotonic() - began, 2), train_loss=sum(losses[-per_pass:]) / len(losses[-per_pass:]),
        loss_before=curve[0] if curve else None, loss_after=min(curve) if curve else None, curve=[round(x, 4) for x in curve],
        chats=len(usable), held_out=len(held_out), stopped=stopped,
    )  # fmt: skip


@dataclass(frozen=True)
class Kept:
    """The adapter as it was after `passes` passes."""

    passes: int
    weights: list[Tensor]


def publish_finetuned(
    model: CausalModel,
    tokenizer: ChatTokenizer,
    chats: Sequence[Sequence[dict[str, str]]],
    config: SFTRoundConfig,
    registry: AdapterRegistry,
    *,
    parent: str = BASE,
    name: str | None = None,
    held_out: float = 0.1,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Manifest, Finetuned]:
    """Finetune on `chats` from version `parent` and publish the result: kind "sft", ungated, so it becomes a candidate.

    held_out: share of the prompts kept for the loss before and after. Raises SFTError (NothingLearned), NotFound,
    CorruptAdapter, AdapterError.
    """
    limit = min(config.max_tokens, model.max_context)
    examples = [encode(tokenizer, chat, limit) for chat in chats]
    kept = [(chat, example) for chat, example in zip(chats, examples, strict=True) if example is not None and any(example.loss[1:])]
    if not kept:
        raise SFTError(f"the chat template of {model.source} refuses all {len(chats)} chats: are its roles others?")
    train_on, held = hold_out([chat for chat, _ in kept], held_out, seed)
    try:
        start = load_version(model, registry, parent, START)
        result = finetune(
            model, [kept[i][1] for i in train_on], [kept[i][1] for i in held], config, adapter=NEW, start=start, seed=seed,
            progress=progress,
        )  # fmt: skip
        if not result.kept:
            raise NothingLearned(
                f"nothing learned: on {len(held)} chats held out the loss is lowest before training "
                f"({result.loss_before:.3f} nats a token). Nothing is published; try a lower --lr or more data"
            )
        rows = sorted(json.dumps([example.ids, example.loss]) for _, example in kept)
        fields = {
            "parent": parent, "round": None, "kind": "sft", "base_digest": model.digest, "base_model": Path(model.source).name,
            "data_digest": hashlib.sha256("\n".join(rows).encode()).hexdigest(), "seed": seed, "gate": None,
            "probe": probe(model, NEW, tokenizer.render([{"role": "user", "content": PROBE}])), "name": name, "sft": asdict(result),
        }  # fmt: skip
        return registry.publish(lambda path: model.lora.save(NEW, path), fields), result
    finally:
        for adapter in {START, NEW} & set(model.lora.names()):
            model.lora.delete(adapter)
