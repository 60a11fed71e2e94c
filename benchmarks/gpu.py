"""On a machine with a GPU: decoding against `transformers.generate` and against the memory's speed, and a PPO update against TRL's.

`python -m benchmarks.gpu`. The shape of Qwen2-0.5B with random weights, made here, bfloat16. K=4 replies to a prompt of 256
tokens, 64 people at once (`generate` both one at a time, on four of them, and as one padded batch), the time of a decode
step of one reply against its floor (the weights' bytes over the bandwidth of a large copy, both measured here), and seconds
and peak memory of a PPO update: ours as the learner ships it, ours as TRL does it (one reward member with an adapter, a value function that
is trained), and TRL's `PPOTrainer` where `trl` can be imported. Contestants take turns; medians. JSON last; exit status 1 when a target
is missed. `--quick --device cpu` runs the same code on a tiny shape, to see that it works; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import logging
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.engine import contest, random_model
from engine.engine import Engine, SamplingParams
from engine.model import CausalModel
from engine.source import first_line
from engine.tokenizer import ChatTokenizer
from learner.config import PPOConfig, RewardConfig
from learner.ppo import train_ppo
from learner.reward import RewardModel

Figures = dict[str, float | None]
TARGETS = {"k4": 4.0, "people": 4.0, "floor": 0.5}  # times as fast as generate, as generate one at a time; share of the floor's speed: at least
QWEN2 = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151_936}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}
DTYPE = torch.bfloat16
PROMPT, REPLIES, ALONE = 256, 4, 4


def qwen2(path: Path, shape: dict[str, int], device: str = "cpu") -> Path:
    """A Qwen2 of this shape with random weights (drawn on `device`), beside a tokenizer in which every id has some text."""
    random_model(path, {**TINY, "vocab_size": shape["vocab_size"]})  # for its tokenizer; the weights are replaced
    config = AutoConfig.for_model(
        "qwen2", max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, pad_token_id=0, **shape
    )
    torch.manual_seed(0)
    with torch.device(device):
        AutoModelForCausalLM.from_config(config).to(DTYPE).save_pretrained(path)
    return path


class Peer:
    """`transformers.generate` on this device."""

    def __init__(self, directory: Path, device: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=DTYPE).to(device).eval()
        self.model.generation_config.eos_token_id = None  # all replies have all their tokens
        self.device = device

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[Sequence[int]], new: int, replies: int = 1) -> None:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        out = self.model.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new,
            min_new_tokens=new, num_return_sequences=replies, pad_token_id=0,
        )  # fmt: skip
        assert out.shape == (len(prompts) * replies, longest + new)


def one_by_one(peer: Peer, prompts: Sequence[Sequence[int]], new: int) -> None:
    """As a server without batching would."""
    for prompt in prompts:
        peer([prompt], new)


def ours(engine: Engine, prompts: Sequence[Sequence[int]], new: int, replies: int = 1) -> None:
    """The engine as the server drives it: add, then step until done."""
    params = [SamplingParams(max_tokens=new, seed=i, ignore_eos=True) for i in range(replies)]
    sequences = [s for p in prompts for s in engine.add(list(p), params, ["base"] * replies)]
    while engine.has_work():
        engine.step()
    assert all(len(s.token_ids) == new for s in sequences)


def synchronised(call: Callable[[], None], device: str) -> Callable[[], None]:
    """The call, and then waiting for the device."""

    def run() -> None:
        call()
        wait(device)

    return run


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def copy_bandwidth(device: str, megabytes: int, times: int = 20) -> float:
    """Bytes a second read and written together, by copying a large tensor on the device."""
    source = torch.ones(megabytes * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    took = []
    for _ in range(times):
        wait(device)
        began = time.perf_counter()
        target.copy_(source)
        wait(device)
        took.append(time.perf_counter() - began)
    return 2 * source.numel() / statistics.median(took)


def weight_bytes(directory: Path) -> int:
    """What a decode step must read of the weights: all of them, the embedding (which is the output layer too) once."""
    return (directory / "model.safetensors").stat().st_size


def decode_step(engine: Engine, prompt: Sequence[int], new: int, device: str) -> float:
    """Median seconds from token to token of one reply: the engine's steps, each of which ends with the token on this side."""
    engine.add(list(prompt), [SamplingParams(max_tokens=new, ignore_eos=True)], ["base"])
    wait(device)
    ends = []
    while engine.has_work():
        engine.step()
        ends.append(time.perf_counter())
    return statistics.median(after - before for before, after in itertools.pairwise(ends[len(ends) // 4 :]))


def measured(update: Callable[..., Figures], device: str, *args: Any) -> Figures:
    """What `update` says, and the most device memory that was in use during it, with nothing of before still there."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    figures = update(device, *args)
    return figures | {"peak_bytes": torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else None}


def our_update(device: str, directory: Path, prompts: Sequence[Sequence[int]], config: PPOConfig) -> Figures:
    """Median seconds of an update and reply tokens a second, after one of warm-up."""
    model, tokenizer = CausalModel.load(directory, dtype=DTYPE, device=device), ChatTokenizer.load(directory)
    as_trl = config.estimator == "gae"
    reward_config = RewardConfig(members=1) if as_trl else RewardConfig()
    reward = RewardModel.create(model, reward_config, reward_config.members)
    generator = torch.Generator().manual_seed(0)
    for member in reward.members:
        if as_trl:  # as after LoRA training: it reads the base through an adapter of its own
            model.lora.create(member.name, r=reward_config.lora_r, alpha=reward_config.lora_alpha)
            member.adapter = member.name
        with torch.no_grad():
            member.head.weight.copy_(torch.randn(member.head.weight.shape, generator=generator))
    rows: list[dict[str, Any]] = []
    train_ppo(model, tokenizer, reward, prompts=prompts, policy="policy", config=config, on_update=rows.append)
    return {"seconds": statistics.median(row["seconds"] for row in rows[1:]), "tokens_per_s": statistics.median(row["tokens_per_second"] for row in rows[1:])}


def trl_update(device: str, directory: Path, prompts: Sequence[Sequence[int]], config: PPOConfig) -> Figures:
    """The same of TRL's trainer on as many rollouts as long, epochs, minibatches and rank. Raises ImportError without TRL.

    A LoRA policy, its base being the reference too; value and reward models are whole models, as it wants them.
    """
    from peft import LoraConfig
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl.experimental.ppo import PPOConfig as TheirConfig
    from trl.experimental.ppo import PPOTrainer

    laps: list[float] = []

    class Clock(TrainerCallback):
        """When training began and when each update was over."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.lap()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.lap()

        def lap(self) -> None:
            wait(device)
            laps.append(time.perf_counter())

    rollouts = config.prompts_per_update * config.replies_per_prompt
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(directory, dtype=DTYPE)
    scorers = [AutoModelForSequenceClassification.from_pretrained(directory, num_labels=1, dtype=DTYPE) for _ in range(2)]
    theirs = TheirConfig(
        output_dir=str(directory.parent / "trl"), use_cpu=not device.startswith("cuda"), bf16=False, report_to="none", save_strategy="no",
        disable_tqdm=True, gradient_checkpointing=False, num_sample_generations=0, per_device_train_batch_size=rollouts,
        gradient_accumulation_steps=1, num_mini_batches=config.minibatches, num_ppo_epochs=config.epochs,
        total_episodes=rollouts * config.updates, response_length=config.max_new_tokens, temperature=1.0,
    )  # fmt: skip
    trainer = PPOTrainer(
        args=theirs, processing_class=tokenizer, model=policy, ref_model=None, reward_model=scorers[0], value_model=scorers[1],
        train_dataset=[{"input_ids": list(p)} for p in prompts] * config.replies_per_prompt, callbacks=[Clock()],
        peft_config=LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    seconds = statistics.median(after - before for before, after in itertools.pairwise(laps[1:]))
    return {"seconds": seconds, "tokens_per_s": rollouts * config.max_new_tokens / seconds}


def ppo_updates(device: str, directory: Path, prompts: Sequence[Sequence[int]], counted: int, quick: bool) -> dict[str, Figures | None]:
    """Seconds, reply tokens a second and peak memory of ours, ours as TRL does it, and TRL's: None where it could not be run."""
    small: dict[str, Any] = {"prompts_per_update": 4, "replies_per_prompt": 4, "max_new_tokens": 8} if quick else {}
    config = PPOConfig(updates=counted + 1, tokens=10**9, kl_ceiling=1e9, max_seconds=1e9, **small)
    contestants: dict[str, tuple[Callable[..., Figures], PPOConfig]] = {
        "ours": (our_update, config), "ours, gae": (our_update, replace(config, estimator="gae")), "trl": (trl_update, config),
    }  # fmt: skip
    found: dict[str, Figures | None] = {}
    for who, (update, own) in contestants.items():
        try:
            figures = found[who] = measured(update, device, directory, prompts, own)
        except Exception as error:
            if update is not trl_update:
                raise
            found[who] = None  # a peer that is not there, or fails, is a row without figures
            print(f"TRL's update could not be run: {type(error).__name__}: {first_line(error)}", flush=True)
            continue
        peak = "" if figures["peak_bytes"] is None else f", {figures['peak_bytes'] / 1e9:.2f} GB at most"
        print(f"PPO update {who:<9} {figures['seconds']:6.2f} s, {figures['tokens_per_s']:7.0f} reply tokens/s{peak}", flush=True)
    return found


def decoding(
    device: str, directory: Path, many: Sequence[Sequence[int]], args: argparse.Namespace
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Tokens a second of each contestant under each load, and how a decode step compares with its floor."""
    prompt, people, new = len(many[0]), len(many), args.new
    tokenizer = ChatTokenizer.load(directory)
    model, peer = CausalModel.load(directory, dtype=DTYPE, device=device), Peer(directory, device)
    engine = Engine(model, tokenizer, max_sequences=max(people, REPLIES), max_context=prompt + new)
    one, many = [many[0]], [p[: prompt - (prompt // 3) * i // max(1, people - 1)] for i, p in enumerate(many)]
    alone = many[:: max(1, people // ALONE)]
    began = time.perf_counter()
    ours(engine, one, 2, REPLIES)
    first = time.perf_counter() - began
    print(f"the first replies took {first:.2f} s: kernels are built (and kept on disk), steps recorded", flush=True)
    loads: list[tuple[str, dict[str, tuple[int, Callable[[], None]]]]] = [
        ("k4", {
            "engine": (REPLIES * new, lambda: ours(engine, one, new, REPLIES)),
            "generate": (REPLIES * new, lambda: peer(one, new, REPLIES)),
        }),
        ("people", {
            "engine": (people * new, lambda: ours(engine, many, new)),
            "generate, one at a time": (len(alone) * new, lambda: one_by_one(peer, alone, new)),
            "generate, padded batch": (people * new, lambda: peer(many, new)),
        }),
    ]  # fmt: skip
    speeds: dict[str, dict[str, float]] = {}
    for load, contestants in loads:
        seconds = contest({who: synchronised(run, device) for who, (_, run) in contestants.items()}, args.repeats)
        speeds[load] = {who: tokens / seconds[who] for who, (tokens, _) in contestants.items()}
        for who, speed in speeds[load].items():
            print(f"{load:<7} {who:<24} {speed:10.1f} tokens/s   the engine is {speeds[load]['engine'] / speed:5.2f}x", flush=True)
    step, bandwidth, size = decode_step(engine, one[0], new, device), copy_bandwidth(device, 64 if args.quick else 1024), weight_bytes(directory)
    floor = size / bandwidth
    print(f"decode step {1000 * step:.3f} ms; floor {1000 * floor:.3f} ms ({size / 1e9:.2f} GB at {bandwidth / 1e9:.0f} GB/s): {floor / step:.0%} of its speed", flush=True)
    return speeds, {
        "step_ms": round(1000 * step, 4), "floor_ms": round(1000 * floor, 4), "weight_bytes": size, "copy_bytes_per_s": bandwidth,
        "share": round(floor / step, 4), "first_replies_s": round(first, 3),
    }  # fmt: skip


def against_targets(k4: dict[str, float], people: dict[str, float], floor_share: float) -> dict[str, bool]:
    """Which targets are met; the seconds of "engine" and of the peers, each over as many tokens as it says."""
    return {
        "k4": k4["engine"] >= TARGETS["k4"] * k4["generate"], "people": people["engine"] >= TARGETS["people"] * people["generate, one at a time"],
        "floor": floor_share >= TARGETS["floor"],
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny shape, few tokens")
    parser.add_argument("--people", type=int, default=64)
    parser.add_argument("--new", type=int, default=128, help="tokens of a reply")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here (torch sees no CUDA device), so nothing was measured; `--quick --device cpu` only shows that the script works")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if args.quick:
        args.people, args.new, args.repeats = 8, 8, 1
    shape, prompt = (TINY, 32) if args.quick else (QWEN2, PROMPT)
    name = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else platform.processor() or "CPU"
    with tempfile.TemporaryDirectory(prefix="plaudit-bench-") as scratch:
        directory = qwen2(Path(scratch) / "model", shape, args.device)
        draw = random.Random(0)
        prompts = [[draw.randrange(2, shape["vocab_size"]) for _ in range(prompt)] for _ in range(max(args.people, 48))]
        speeds, decode = decoding(args.device, directory, prompts[: args.people], args)
        updates = ppo_updates(args.device, directory, [p[: prompt // 4] for p in prompts[:48]], 1 if args.quick else 3, args.quick)
    met = against_targets(speeds["k4"], speeds["people"], decode["share"])
    print(json.dumps({
        "benchmark": "gpu", "device": name, "torch": torch.__version__, "quick": args.quick, "targets": TARGETS, "met": met,
        "tokens_per_s": speeds, "decode": decode, "ppo_update": updates,
    }))  # fmt: skip
    return 0 if all(met.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
