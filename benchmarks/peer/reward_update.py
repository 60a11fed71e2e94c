"""TRL's RewardTrainer as a contestant of `benchmarks/reward_update.py`: one LoRA pass a turn. Run by the peers' interpreter."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path

import torch

from benchmarks.contest import Finished, Turns
from benchmarks.peer.reward import reward_trainer


def main() -> None:
    """Take turns until the parent has had enough; the seconds are those of `train()` alone. argv: the task's file."""
    turns = Turns()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    task = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    with contextlib.suppress(Finished):
        while True:
            turns.wait()
            trainer = reward_trainer(task, list(range(len(task["examples"]))), task["lr"])
            began = time.perf_counter()
            trainer.train()
            turns.say(seconds=time.perf_counter() - began)


if __name__ == "__main__":
    main()
