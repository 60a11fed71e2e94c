"""transformers' own `generate` as a contestant, in a process of its own: its threads wait as its libraries have them, where ours sleep.

Spinning, they are faster where nothing else runs, and in one process both sides would have to wait alike. Seconds are the child's own.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.contest import Contestant, Finished, Turns


class Peer:
    """The model in `directory`, answering with exactly so many tokens. A context manager; what the child says of itself goes to `log`."""

    def __init__(self, directory: Path, log: Path, threads: int) -> None:
        self.child = Contestant("generate", [sys.executable, "-m", "benchmarks.generate", directory], log, threads=threads, sleeping=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.child.__exit__(kind, error, trace)

    def __call__(self, prompts: list[list[int]], new: int, replies: int = 1) -> float:
        """Seconds for `new` tokens of each of `replies` to each prompt, in one batch. Raises ContestError."""
        return self.child.turn(prompts=prompts, new=new, replies=replies)["seconds"]

    def one_at_a_time(self, prompts: list[list[int]], new: int) -> float:
        """The same, one prompt after another."""
        return sum(self([prompt], new) for prompt in prompts)


def contend(directory: Path) -> None:
    """Be the contestant."""
    turns = Turns()

    import torch
    from transformers import AutoModelForCausalLM

    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # no reply ends before it is so long
    pad = model.config.pad_token_id or 0
    try:
        while True:
            asked = turns.wait()
            prompts, new, replies = asked["prompts"], asked["new"], asked["replies"]
            longest = max(map(len, prompts))
            ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
            with torch.inference_mode():
                out = model.generate(
                    input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                    max_new_tokens=new, min_new_tokens=new, num_return_sequences=replies, pad_token_id=pad,
                )  # fmt: skip
            assert out.shape == (len(prompts) * replies, longest + new)
            turns.say()
    except Finished:
        pass


if __name__ == "__main__":
    contend(Path(sys.argv[1]))
