"""TRL's `PPOTrainer` as a contestant of `benchmarks/ppo_update.py`: an update a turn. Run by the peers' interpreter."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.contest import Finished, Turns


def main() -> None:
    """Take turns until the parent has had enough."""
    turns, directory = Turns(), Path(sys.argv[1])
    task = json.loads((directory / "task.json").read_text("utf-8"))

    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    class Update(TrainerCallback):
        """One update of the trainer is one turn."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turns.wait()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.say(tokens=task["rollouts"] * task["new"])
            turns.wait()

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    source = str(directory / "model")
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    scorers = [AutoModelForSequenceClassification.from_pretrained(source, num_labels=1, dtype=torch.float32) for _ in range(2)]
    config = PPOConfig(
        output_dir=str(directory / "trl"), use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=task["checkpointing"], num_sample_generations=0,
        per_device_train_batch_size=task["rollouts"], gradient_accumulation_steps=1, num_mini_batches=1,
        num_ppo_epochs=task["epochs"], total_episodes=task["rollouts"] * task["updates"], response_length=task["new"], temperature=1.0,
    )  # fmt: skip
    trainer = PPOTrainer(
        args=config, processing_class=tokenizer, model=policy, ref_model=None, reward_model=scorers[0], value_model=scorers[1],
        train_dataset=Dataset.from_dict({"input_ids": task["prompts"]}), callbacks=[Update()],
        peft_config=LoraConfig(r=task["lora_r"], lora_alpha=2 * task["lora_r"], target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    with contextlib.suppress(Finished):
        trainer.train()


if __name__ == "__main__":
    main()
