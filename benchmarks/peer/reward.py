"""TRL's RewardTrainer as a contestant of `benchmarks/reward_peers.py`: a whole cross-validation a turn. Run by the peers' interpreter.

LoRA of our rank on every linear layer, f32, no gradient checkpointing (faster); TRL's defaults but for the learning rate and
the number of passes, which the caller gives. Rows are token ids, cut as ours are, so that both sides read the same tokens.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

from benchmarks.contest import Finished, Turns


def main() -> None:
    """Take turns until the parent has had enough. argv: the task's file."""
    turns = Turns()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    task = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    try:
        while True:
            asked = turns.wait()
            scores: dict[int, list[float]] = {}
            for fold in asked["folds"]:
                model = fitted(task, fold["train"], asked["lr"])
                scores |= {i: score(model, [cut(task, i, k) for k in range(len(task["examples"][i]["completions_ids"]))]) for i in fold["test"]}
            turns.say(scores=scores)
    except Finished:
        pass


def cut(task: dict[str, Any], example: int, completion: int) -> list[int]:
    """Prompt and reply as one row of at most `max_tokens`: the oldest tokens go first."""
    own = task["examples"][example]
    return [*own["prompt_ids"], *own["completions_ids"][completion]][-task["max_tokens"] :]


def fitted(task: dict[str, Any], train: list[int], lr: float) -> Any:
    """A reward model of the training votes' pairs."""
    trainer = reward_trainer(task, train, lr)
    trainer.train()
    return trainer.model.eval()


def reward_trainer(task: dict[str, Any], train: list[int], lr: float) -> Any:
    """TRL's trainer on the training votes' pairs, ready to train."""
    pairs = [
        {"chosen_ids": cut(task, i, winner), "rejected_ids": cut(task, i, loser)}
        for i in train
        for place, better in enumerate(task["examples"][i]["groups"])
        for worse in task["examples"][i]["groups"][place + 1 :]
        for winner in better
        for loser in worse
    ]
    torch.manual_seed(task["seed"])
    tokenizer = AutoTokenizer.from_pretrained(task["model"])
    base = AutoModelForSequenceClassification.from_pretrained(task["model"], num_labels=1, dtype=torch.float32)
    base.config.pad_token_id = tokenizer.pad_token_id
    config = RewardConfig(
        output_dir=str(Path(task["out"]) / "trl"), use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False, learning_rate=lr, num_train_epochs=task["passes"], seed=task["seed"], max_length=None,
    )  # fmt: skip
    adapter = LoraConfig(
        r=task["lora_r"], lora_alpha=task["lora_alpha"], target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"]
    )
    return RewardTrainer(model=base, args=config, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer, peft_config=adapter)


@torch.no_grad()
def score(model: Any, rows: list[list[int]]) -> list[float]:
    """One score a row."""
    longest, pad = max(map(len, rows)), model.config.pad_token_id
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    valid = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return model(input_ids=ids, attention_mask=valid).logits[:, 0].tolist()


if __name__ == "__main__":
    main()
