"""On a machine with a GPU: decoding against `transformers.generate` and against the memory's speed, and a PPO update.

`python -m benchmarks.gpu`. The shape of Qwen2-0.5B with random weights, made here, bfloat16. K=4 replies to a prompt of 256
tokens, 64 people at once (`generate` both one at a time, on eight of them, and as one padded batch), the time of a decode
step of one reply against its floor (the weights' bytes over the bandwidth of a large copy, both measured here), and the
seconds of a PPO update as the learner ships it. Contestants take turns; medians. JSON last; exit status 1 when a target
is missed. `--quick --device cpu` runs the same code on a tiny shape, to see that it works; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.engine import contest, random_model
from engine.engine import Engine, SamplingParams
from engine.model import CausalModel
from engine.tokenizer import ChatTokenizer
from learner.config import PPOConfig, RewardConfig
from learner.ppo import train_ppo
from learner.reward import RewardModel

TARGETS = {"k4": 4.0, "people": 4.0, "floor": 0.5}  # times as fast as generate, as generate one at a time; share of the floor's speed: at least
QWEN2 = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151_936}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}
DTYPE = torch.bfloat16
PROMPT, REPLIES, ALONE = 256, 4, 8


def qwen2(path: Path, shape: dict[str, int]) -> Path:
    """A Qwen2 of this shape with random weights, beside a tokenizer in which every id has some text."""
    random_model(path, {**TINY, "vocab_size": shape["vocab_size"]})  # for its tokenizer; the weights are replaced
    config = AutoConfig.for_model(
        "qwen2", max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, pad_token_id=0, **shape
    )
    torch.manual_seed(0)
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
    """Median seconds of a decode step of one reply."""
    engine.add(list(prompt), [SamplingParams(max_tokens=new, ignore_eos=True)], ["base"])
    steps = []
    while engine.has_work():
        wait(device)
        began = time.perf_counter()
        engine.step()
        wait(device)
        steps.append(time.perf_counter() - began)
    return statistics.median(steps[len(steps) // 4 :])


def ppo_update(model: CausalModel, tokenizer: ChatTokenizer, prompts: Sequence[Sequence[int]], counted: int, quick: bool) -> dict[str, float]:
    """Median seconds of an update as shipped (`--quick`: a small one), and reply tokens a second, after one of warm-up."""
    reward = RewardModel.create(model, RewardConfig(), RewardConfig().members)
    generator = torch.Generator().manual_seed(0)
    for member in reward.members:
        with torch.no_grad():
            member.head.weight.copy_(torch.randn(member.head.weight.shape, generator=generator))
    small: dict[str, Any] = {"prompts_per_update": 2, "replies_per_prompt": 2, "max_new_tokens": 8} if quick else {}
    config = PPOConfig(updates=counted + 1, tokens=10**9, kl_ceiling=1e9, max_seconds=1e9, **small)
    rows: list[dict[str, Any]] = []
    try:
        train_ppo(model, tokenizer, reward, prompts=prompts, policy="policy", config=config, on_update=rows.append)
    finally:
        model.lora.delete("policy")
    return {"seconds": statistics.median(row["seconds"] for row in rows[1:]), "tokens_per_s": statistics.median(row["tokens_per_second"] for row in rows[1:])}


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
    shape, prompt, people, new, repeats = (TINY, 32, 8, 8, 1) if args.quick else (QWEN2, PROMPT, args.people, args.new, args.repeats)
    name = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else platform.processor() or "CPU"
    draw = random.Random(0)

    def ids(length: int) -> list[int]:
        return [draw.randrange(2, shape["vocab_size"]) for _ in range(length)]

    with tempfile.TemporaryDirectory(prefix="plaudit-bench-") as scratch:
        directory = qwen2(Path(scratch) / "model", shape)
        tokenizer = ChatTokenizer.load(directory)
        model, peer = CausalModel.load(directory, dtype=DTYPE, device=args.device), Peer(directory, args.device)
        engine = Engine(model, tokenizer, max_sequences=max(people, REPLIES), max_context=prompt + new)
        one, many = [ids(prompt)], [ids(prompt - (prompt // 3) * i // max(1, people - 1)) for i in range(people)]
        alone = many[:: max(1, people // ALONE)]
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
            seconds = contest({who: synchronised(run, args.device) for who, (_, run) in contestants.items()}, repeats)
            speeds[load] = {who: tokens / seconds[who] for who, (tokens, _) in contestants.items()}
            for who, speed in speeds[load].items():
                print(f"{load:<7} {who:<24} {speed:10.1f} tokens/s   the engine is {speeds[load]['engine'] / speed:5.2f}x", flush=True)
        step, bandwidth, size = decode_step(engine, one[0], new, args.device), copy_bandwidth(args.device, 64 if args.quick else 1024), weight_bytes(directory)
        floor = size / bandwidth
        print(f"decode step {1000 * step:.3f} ms; floor {1000 * floor:.3f} ms ({size / 1e9:.2f} GB at {bandwidth / 1e9:.0f} GB/s): {floor / step:.0%} of its speed", flush=True)
        update = ppo_update(model, tokenizer, [ids(prompt // 4) for _ in range(48)], 1 if args.quick else 3, args.quick)
        print(f"PPO update {update['seconds']:.2f} s, {update['tokens_per_s']:.0f} reply tokens/s", flush=True)
    met = against_targets(speeds["k4"], speeds["people"], floor / step)
    print(json.dumps({
        "benchmark": "gpu", "device": name, "torch": torch.__version__, "quick": args.quick, "targets": TARGETS, "met": met, "tokens_per_s": speeds,
        "decode": {"step_ms": round(1000 * step, 4), "floor_ms": round(1000 * floor, 4), "weight_bytes": size, "copy_bytes_per_s": bandwidth, "share": round(floor / step, 4)},
        "ppo_update": update, "peak_bytes": torch.cuda.max_memory_allocated(args.device) if args.device.startswith("cuda") else None,
    }))  # fmt: skip
    return 0 if all(met.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
