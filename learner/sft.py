"""Pretraining and instruction finetuning: one loop, two kinds of example. Owns the loss mask, batching and the schedule.

Text examples carry loss on every token; chat examples only on what the assistant says, its end token included.
It knows nothing of where text comes from (`learner/starter/corpus.py`) nor of adapters (`learner/finetune.py`) and votes.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from engine.tokenizer import ChatTokenizer
from learner.muon import Muon

IGNORE = -100  # target value without loss, as in torch's cross_entropy


class SFTError(ValueError):
    """The data or a checkpoint does not fit this run; the message says what to change."""


@dataclass(frozen=True)
class Example:
    """One training sequence. `loss[t]` is True where token t is to be predicted from those before it."""

    ids: tuple[int, ...]
    loss: tuple[bool, ...]


@dataclass(frozen=True)
class SFTConfig:
    """Settings of one training run. Give `steps` for a repeatable run, or `seconds` for one that fits a time budget."""

    steps: int | None = 1000  # optimiser steps; the schedule ends here
    seconds: float | None = None  # wall-clock budget instead of steps; the schedule follows the clock
    tokens_per_batch: int = 2048  # padded tokens, (rows x longest row) at most
    lr: float = 2e-3  # peak
    final_lr: float = 0.05  # last learning rate as a fraction of the peak
    warmup: float = 0.03  # fraction of the run
    weight_decay: float = 0.1  # matrices only, not norms
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0  # gradient norm
    muon: bool = False  # orthogonalised updates for the layers' matrices: fewer tokens to the same loss
    bf16: bool = False  # autocast the forward pass; weights and optimiser stay float32 (`fast_bf16` says where it pays)
    seed: int = 0
    save_every_s: float = 120.0  # seconds between checkpoints, when a checkpoint path is given

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.seconds is None):
            raise SFTError("give exactly one of steps and seconds")


@dataclass(frozen=True)
class TrainResult:
    steps: int
    tokens: int  # without padding
    seconds: float
    loss: float  # nats a token, mean of the last 50 steps


def fast_bf16() -> bool:
    """Whether this machine's GPU, or else its processor, multiplies in bfloat16. A processor that does not emulates it,
    which is fifty times slower than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    can = torch.cpu.get_capabilities()
    return bool(can.get("avx512_bf16") or can.get("amx_bf16") or can.get("bf16"))


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> Example:
    """Plain text and an end token; loss on every token but the first, which nothing predicts."""
    ids = (*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id)
    return Example(ids, (False,) + (True,) * (len(ids) - 1))


def encode_chat(tokenizer: ChatTokenizer, messages: Sequence[dict]) -> Example:
    """A chat as the server would feed and sample it: before each reply what the engine renders, then the reply and its end token.

    Loss only on replies, the end token included; what anybody wrote is text, also where it spells a special token. Text after the last
    reply is dropped, spaces around replies too. Raises SFTError when the template changes earlier turns, so that its replies are not in one row, ValueError when it refuses the chat.
    """
    messages = [m | {"content": m["content"].strip()} if m["role"] == "assistant" else m for m in messages]
    ids: list[int] = []
    loss: list[bool] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.render(messages[:i])
        if prompt[: len(ids)] != ids:
            raise SFTError("the chat template changes earlier turns; train on single-turn chats with this model")
        reply = [*tokenizer.encode(message["content"]), tokenizer.end_id]
        loss += [False] * (len(prompt) - len(ids)) + [True] * len(reply)
        ids = [*prompt, *reply]
    if not ids:
        raise SFTError("a chat without an assistant turn has nothing to learn from")
    return Example(tuple(ids), tuple(loss))


def batches(examples: Sequence[Example], tokens_per_batch: int, seed: int, epoch: int) -> list[list[int]]:
    """Indices of one epoch, cut into batches of like length: shuffled, sorted within pools, batches shuffled again."""
    rng = random.Random(f"{seed}/{epoch}")
    order = list(range(len(examples)))
    rng.shuffle(order)
    cut: list[list[int]] = []
    for start in range(0, len(order), 1024):
        rows: list[int] = []
        longest = 0
        for i in sorted(order[start : start + 1024], key=lambda i: len(examples[i].ids)):
            longest = max(longest, len(examples[i].ids))
            if rows and longest * (len(rows) + 1) > tokens_per_batch:
                cut.append(rows)
                rows, longest = [], len(examples[i].ids)
            rows.append(i)
        cut.append(rows)
    rng.shuffle(cut)
    return cut


def stream(examples: Sequence[Example], tokens_per_batch: int, seed: int, skip: int = 0) -> Iterator[list[int]]:
    """Batches of epoch 0, 1, 2, ... without end, from batch number `skip` on: a pure function of its arguments."""
    epoch = 0
    while True:
        cut = batches(examples, tokens_per_batch, seed, epoch)
        yield from cut[skip:]
        skip = max(0, skip - len(cut))
        epoch += 1


def collate(examples: Sequence[Example], pad_id: int) -> tuple[Tensor, Tensor]:
    """Right-pad to ids (B, T) and targets (B, T): targets[b, t] is ids[b, t+1] where it carries loss, else IGNORE.

    Padding sits on the right of a causal model, so no attention mask is needed.
    """
    width = max(len(e.ids) for e in examples)
    ids = torch.full((len(examples), width), pad_id)
    targets = torch.full((len(examples), width), IGNORE)
    for row, e in enumerate(examples):
        ids[row, : len(e.ids)] = torch.tensor(e.ids)
        shifted = [token if on else IGNORE for token, on in zip(e.ids[1:], e.loss[1:], strict=True)]
        targets[row, : len(shifted)] = torch.tensor(shifted)
    return ids, targets


def token_loss(model: Any, ids: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy (nats) over the tokens that carry loss. `model` is a transformers causal LM."""
    hidden = model.model(input_ids=ids).last_hidden_state  # (B, T, D)
    counts = targets != IGNORE  # (B, T)
    logits = model.lm_head(hidden[counts])  # (N, V): logits only where there is something to learn
    return F.cross_entropy(logits.float(), targets[counts])


def learning_rate(config: SFTConfig, progress: float) -> float:
    """Linear warm-up, then a cosine to `final_lr` of the peak. `progress` in [0, 1]."""
    if progress < config.warmup:
        return config.lr * (progress + 1e-3) / (config.warmup + 1e-3)
    x = min(1.0, (progress - config.warmup) / max(1e-9, 1 - config.warmup))
    return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * x)))


def make_optimizers(model: Any, config: SFTConfig) -> list[torch.optim.Optimizer]:
    """Muon (Jordan 2024) for the matrices inside the layers, AdamW (Loshchilov & Hutter 2019) for everything else.

    Without `config.muon` AdamW takes all. Norms are not decayed. Muon's step is scaled to AdamW's size, so both share
    one learning rate.
    """
    tables_of = [getattr(model, name)() for name in ("get_input_embeddings", "get_output_embeddings") if hasattr(model, name)]
    embedding = {id(table.weight) for table in tables_of if table is not None}
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if p.dim() == 2 and id(p) not in embedding]
    tables = [p for p in trainable if p.dim() > 1 and (p.dim() > 2 or id(p) in embedding)]
    vectors = [p for p in trainable if p.dim() <= 1]
    adam = [{"params": tables, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if not config.muon:
        adam.append({"params": matrices, "weight_decay": config.weight_decay})
    adamw = torch.optim.AdamW([g for g in adam if g["params"]], lr=config.lr, betas=config.betas, fused=True)
    if not config.muon or not matrices:
        return [adamw]
    return [adamw, Muon(matrices, lr=config.lr, weight_decay=config.weight_decay)]


def save_checkpoint(path: Path, state: dict) -> None:
    """Write beside the target and rename, so that a kill leaves the old checkpoint or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def train(
    model: nn.Module,
    examples: Sequence[Example],
    config: SFTConfig,
    *,
    pad_id: int,
    checkpoint: Path | None = None,
    on_step: Callable[[dict], None] | None = None,
    stop_after: int | None = None,
    loss_of: Callable[[Any, Tensor, Tensor], Tensor] = token_loss,
) -> TrainResult:
    """Train `model` in place. Resumes from `checkpoint` when that file exists, and saves there as it goes.

    `loss_of(model, ids, targets)`: as `token_loss`, for a module that is not a transformers model.
    `on_step` gets {"step", "progress", "loss", "lr", "grad_norm", "tokens_per_s"} after each step.
    `stop_after` ends the run early at that step, checkpointed, as a kill would: the rest is for a resumed run.
    """
    if not examples:
        raise SFTError("there are no examples to train on")
    device = next(model.parameters()).device
    optimizers = make_optimizers(model, config)
    step, tokens, before = 0, 0, 0.0
    recent: list[float] = []
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        if state["seed"] != config.seed or state["examples"] != len(examples):
            raise SFTError(f"{checkpoint} belongs to a run with another seed or corpus; delete it to start afresh")
        model.load_state_dict(state["model"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        step, tokens, before, recent = state["step"], state["tokens"], state["seconds"], state.get("recent", [])

    def keep() -> None:
        if checkpoint is not None:
            save_checkpoint(checkpoint, {
                "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step, "tokens": tokens,
                "seconds": elapsed(), "seed": config.seed, "examples": len(examples), "recent": recent,
            })

    started = last_saved = time.monotonic()
    first_tokens = tokens

    def elapsed() -> float:
        return before + time.monotonic() - started

    def progress() -> float:
        return step / config.steps if config.steps is not None else elapsed() / config.seconds  # type: ignore[operator]

    model.train()
    source = stream(examples, config.tokens_per_batch, config.seed, skip=step)
    while progress() < 1.0 and step != stop_after:
        # 1. A batch of like lengths.
        rows = [examples[i] for i in next(source)]
        ids, targets = collate(rows, pad_id)
        # 2. Loss and gradient.
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.bf16):
            loss = loss_of(model, ids.to(device), targets.to(device))
        model.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        # 3. Update, unless the gradient broke.
        rate = learning_rate(config, progress())
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            if torch.isfinite(norm):
                optimizer.step()
        # 4. Count and log.
        step += 1
        tokens += sum(len(e.ids) for e in rows)
        recent = [*recent[-49:], loss.item()]
        if on_step is not None:
            rate_tokens = (tokens - first_tokens) / max(1e-9, time.monotonic() - started)
            on_step({"step": step, "progress": min(1.0, progress()), "loss": recent[-1], "lr": rate,
                     "grad_norm": norm.item(), "tokens_per_s": rate_tokens})
        if checkpoint is not None and time.monotonic() - last_saved > config.save_every_s:
            keep()
            last_saved = time.monotonic()
    keep()
    model.eval()
    return TrainResult(step, tokens, elapsed(), sum(recent) / max(1, len(recent)))
