"""TRL's ways from votes to a policy, as contestants of `benchmarks/peers.py`. Run by the peers' interpreter.

One run: RewardTrainer (but for DPO, which needs none), then PPO (experimental), RLOO, OnlineDPO (experimental) or DPO, all
LoRA of the rank we use on every linear layer. It goes on until it has had every stop of the job (seconds, rollouts, passes
over the pairs) and leaves the adapter as it was at each. The clock runs from the loaded base on: training of the reward
model counts, imports do not.

Defaults are TRL's own but for: learning rate (the caller tries several; TRL's, made for full models of billions of
parameters, hardly move a small one), constant rather than linear (the end is set by the clock), f32, no gradient
checkpointing (faster), temperature 1, and rollouts an update, minibatches, epochs and reply length as for ours.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from trl.experimental.ppo import PPOConfig, PPOTrainer

from benchmarks.contest import Finished, Turns


class Clock(TrainerCallback):
    """Saves the adapter at every stop of the job and ends the run at the last. rollouts, passes: of one step."""

    def __init__(self, began: float, job: dict[str, Any], *, rollouts: float = 0.0, passes: float = 0.0) -> None:
        self.began, self.job, self.each = began, job, {"rollouts": rollouts, "passes": passes}
        self.first: float | None = None
        self.number = 0
        self.saved: dict[str, dict[str, float]] = {}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.first = time.monotonic()

    def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
        self.number += 1
        spent = {"seconds": time.monotonic() - self.began} | {unit: self.number * each for unit, each in self.each.items()}
        for unit, limit in self.job["stops"].items():
            if unit not in self.saved and spent[unit] >= limit - 1e-6:
                getattr(model, "policy", model).save_pretrained(Path(self.job["out"]) / unit)
                self.saved[unit] = spent
        if len(self.saved) == len(self.job["stops"]):
            raise Finished

    def figures(self) -> dict[str, Any]:
        """What the run did, and the seconds it took for as many rollouts as one of our updates has."""
        assert self.first is not None
        policy_s = time.monotonic() - self.first
        updates = self.number * self.each["rollouts"] / self.job["update_rollouts"]
        return {"saved": self.saved, "reward_s": self.first - self.began, "update_s": policy_s / updates if updates else None}


def main() -> None:
    """One request, one run."""
    turns = Turns()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        while True:
            turns.say(**run(turns.wait()))
    except Finished:
        pass


def run(job: dict[str, Any]) -> dict[str, Any]:
    """job: as `benchmarks/rival.py` makes it, with method, lr and out (a directory)."""
    votes, out = json.loads(Path(job["votes"]).read_text("utf-8")), Path(job["out"])
    torch.manual_seed(job["seed"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    policy = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    began = time.monotonic()
    common = {
        "output_dir": str(out / "trl"), "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "seed": job["seed"],
        "disable_tqdm": True, "gradient_checkpointing": False, "learning_rate": job["lr"],
    }  # fmt: skip
    method = {"dpo": dpo, "ppo": ppo, "rloo": rloo, "online_dpo": online_dpo}[job["method"]]
    scored = None if job["method"] == "dpo" else reward_model(job, votes, tokenizer, common)
    trainer, clock = method(job, votes, tokenizer, policy, scored, common | {"lr_scheduler_type": "constant"}, began)
    try:
        trainer.train()
    except Finished:
        return clock.figures()
    raise RuntimeError(f"{job['method']} ended by itself before its budget was used")


def lora(job: dict[str, Any], task: str) -> LoraConfig:
    """The adapter: our rank and scale, every linear layer, as ours."""
    saved = ["score"] if task == "SEQ_CLS" else None
    return LoraConfig(r=job["lora_r"], lora_alpha=job["lora_alpha"], target_modules="all-linear", task_type=task, modules_to_save=saved)


def reward_model(job: dict[str, Any], votes: dict[str, Any], tokenizer: Any, common: dict[str, Any]) -> str:
    """RewardTrainer with LoRA on the pairs, merged and saved; its directory."""
    base = AutoModelForSequenceClassification.from_pretrained(job["model"], num_labels=1, dtype=torch.float32)
    base.config.pad_token_id = tokenizer.pad_token_id
    trainer = RewardTrainer(
        model=base, args=RewardConfig(**common), train_dataset=Dataset.from_list(votes["pairs"]), processing_class=tokenizer,
        peft_config=lora(job, "SEQ_CLS"),
    )  # fmt: skip
    trainer.train()
    directory = str(Path(job["out"]) / "reward")
    trainer.model.merge_and_unload().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def scorer(directory: str) -> Any:
    """The reward model that was saved."""
    return AutoModelForSequenceClassification.from_pretrained(directory, num_labels=1, dtype=torch.float32)


def conversations(votes: dict[str, Any], batch: int) -> Dataset:
    """The prompts to practise on, repeated so that a batch is always full."""
    rows = [{"prompt": [{"role": "user", "content": prompt["prompt"]}]} for prompt in votes["practice"]]
    return Dataset.from_list(rows * (-(-batch // len(rows)) + 1))


def ppo(job: dict[str, Any], votes: dict[str, Any], tokenizer: Any, policy: Any, scored: str, common: dict[str, Any], began: float) -> Any:
    """PPOTrainer: value model started from the reward model, epochs and minibatches as ours, KL 0.05, a penalty of 1 without an end token."""
    size = job["update_rollouts"]
    config = PPOConfig(
        **common, per_device_train_batch_size=size, gradient_accumulation_steps=1, num_mini_batches=job["minibatches"],
        num_ppo_epochs=job["epochs"], num_sample_generations=0,
        total_episodes=10_000_000, response_length=job["max_new_tokens"], temperature=1.0, stop_token="eos", missing_eos_penalty=1.0,
    )  # fmt: skip
    ids = [prompt["ids"] for prompt in votes["practice"]]
    ids *= -(-size // len(ids)) + 1
    clock = Clock(began, job, rollouts=size)
    trainer = PPOTrainer(
        args=config, processing_class=tokenizer, model=policy, ref_model=None, reward_model=scorer(scored), value_model=scorer(scored),
        train_dataset=Dataset.from_dict({"input_ids": ids}), callbacks=[clock], peft_config=lora(job, "CAUSAL_LM"),
    )  # fmt: skip
    return trainer, clock


def rloo(job: dict[str, Any], votes: dict[str, Any], tokenizer: Any, policy: Any, scored: str, common: dict[str, Any], began: float) -> Any:
    """RLOOTrainer: groups, minibatches and epochs as ours; KL 0.05 in the reward."""
    size = job["update_rollouts"] // job["minibatches"]
    config = RLOOConfig(
        **common, per_device_train_batch_size=size, gradient_accumulation_steps=1, steps_per_generation=job["minibatches"],
        num_iterations=job["epochs"], beta=0.05,
        num_generations=job["replies_per_prompt"], max_completion_length=job["max_new_tokens"], temperature=1.0, max_steps=1_000_000,
    )  # fmt: skip
    clock = Clock(began, job, rollouts=job["update_rollouts"] / (job["minibatches"] * job["epochs"]))  # a step is one minibatch
    trainer = RLOOTrainer(
        model=policy, reward_funcs=scorer(scored), reward_processing_classes=reward_tokenizer(tokenizer, scored), args=config,
        train_dataset=conversations(votes, job["update_rollouts"]), processing_class=tokenizer, callbacks=[clock], peft_config=lora(job, "CAUSAL_LM"),
    )  # fmt: skip
    return trainer, clock


def online_dpo(job: dict[str, Any], votes: dict[str, Any], tokenizer: Any, policy: Any, scored: str, common: dict[str, Any], began: float) -> Any:
    """OnlineDPOTrainer: two replies a prompt, beta 0.1, a penalty of 1 without an end token."""
    size = job["update_rollouts"] // 2
    config = OnlineDPOConfig(
        **common, per_device_train_batch_size=size, gradient_accumulation_steps=1, max_new_tokens=job["max_new_tokens"], temperature=1.0,
        missing_eos_penalty=1.0, max_steps=1_000_000,
    )  # fmt: skip
    clock = Clock(began, job, rollouts=job["update_rollouts"])
    trainer = OnlineDPOTrainer(
        model=policy, reward_funcs=scorer(scored), reward_processing_classes=reward_tokenizer(tokenizer, scored), args=config,
        train_dataset=conversations(votes, size), processing_class=tokenizer, callbacks=[clock], peft_config=lora(job, "CAUSAL_LM"),
    )  # fmt: skip
    return trainer, clock


def reward_tokenizer(tokenizer: Any, scored: str) -> Any:
    """The same tokenizer, padding on the right as the reward model was trained."""
    return AutoTokenizer.from_pretrained(scored, padding_side="right", pad_token=tokenizer.pad_token)


def dpo(job: dict[str, Any], votes: dict[str, Any], tokenizer: Any, policy: Any, _: None, common: dict[str, Any], began: float) -> Any:
    """DPOTrainer: beta 0.1, batches of 8. It samples nothing."""
    rows = votes["pairs"]
    config = DPOConfig(**common, num_train_epochs=100_000)
    clock = Clock(began, job, passes=1 / -(-len(rows) // config.per_device_train_batch_size))
    trainer = DPOTrainer(
        model=policy, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[clock], peft_config=lora(job, "CAUSAL_LM")
    )
    return trainer, clock


if __name__ == "__main__":
    main()
