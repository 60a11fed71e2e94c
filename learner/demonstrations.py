"""A round of instruction finetuning on the replies people wrote, and what it makes: a new reference.

What `Learner.run_round` does with `learn` instead of reward model and PPO. The version it publishes is of kind "sft", so
from the first PPO round that starts from it (or from a descendant) on, KL is measured against it
(`Learner.reference_of`). Owns what a demonstration is and the order of the round; `learner/finetune.py` owns training,
`learner/worker.py` when it runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from engine.tokenizer import ChatTokenizer
from learner.config import LearnerConfig
from learner.data import prompt_key
from learner.finetune import AdapterModule, finetune, last_reply, mean_loss
from learner.practice import choose_prompts
from learner.round import POLICY, REFERENCE, START, Lap, Learner, Report, RoundStopped
from learner.sft import Example


@dataclass(frozen=True)
class Demonstration:
    """One reply a person wrote, with its prompt as training sees both. prompt_key: of the conversation so far (`data.prompt_key`)."""

    prompt_key: str
    example: Example
    vote_id: str


def demonstrated(voted: Sequence[Any]) -> list[Any]:
    """The standing votes (`store.records.VotedComparison`) that carry a person's own reply: an edit."""
    return [item for item in voted if item.vote.edit]


def demonstrations(voted: Sequence[Any], tokenizer: ChatTokenizer, limit: int) -> list[Demonstration]:
    """The demonstrations among standing votes, oldest first, at most `limit` tokens each.

    Only the person's reply carries loss: earlier turns are the model's own words. A conversation that the chat template
    refuses is left out.
    """
    found = []
    for item in sorted(demonstrated(voted), key=lambda item: item.vote.seq):
        messages = [{"role": m["role"], "content": m["content"]} for m in item.comparison.messages]
        try:
            prompt = tokenizer.render(messages)
        except ValueError:
            continue
        found.append(Demonstration(prompt_key(messages), last_reply(tokenizer, prompt, item.vote.edit, limit), str(item.vote.id)))
    return found


def digest(found: Sequence[Demonstration]) -> str:
    """sha256 over everything that training sees, whatever the order it came in."""
    rows = sorted(json.dumps([d.vote_id, d.example.ids, d.example.loss]) for d in found)
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def learn(learner: Learner, record: dict[str, Any], voted: Sequence[Any], directory: Path, report: Report) -> None:
    """Everything of the round but publishing; fills `record` and leaves the new version in adapter POLICY.

    The demonstrations among `voted`, the standing votes, become `demonstration_seq`; votes stay unused (`last_seq` 0), and so does an
    operator's wish for a round, so that the PPO round after it has them. Of the votes beside them only whose prompt is on which side counts. Raises RoundStopped, SFTError, GateError, AdapterError, CorruptAdapter.
    """
    own = demonstrated(voted)
    record |= {"kind": "sft", "demonstration_seq": record["last_seq"], "last_seq": 0, "run_requested": 0, "sft": None}
    record |= {"votes": len(own), "vote_ids": [str(item.vote.id) for item in own], "beside": [str(item.vote.id) for item in voted if not item.vote.edit]}
    config, seed, model = LearnerConfig.from_dict(record["config"]), record["seed"], learner.model
    lap = Lap(record["timings"])

    # 1. Demonstrations; those on held-out prompts are for measuring only.
    found = demonstrations(own, learner.tokenizer, min(config.sft.max_tokens, model.max_context))
    record["data_digest"] = digest(found)
    prompts = choose_prompts(voted, learner.tokenizer, config, seed)
    training = [d.example for d in found if d.prompt_key not in prompts.judging]
    held_out = [d.example for d in found if d.prompt_key in prompts.judging]
    if found and not training:
        raise RoundStopped("not_ready", "all replies that people wrote so far are in conversations kept for judging: the next ones will tell")

    # 2. Where it starts, and the reference it replaces.
    start = learner.load_version(record["parent"], START)
    record["reference"] = learner.reference_of(record["parent"], config.reference)
    reference = start if record["reference"] == record["parent"] else learner.load_version(record["reference"], REFERENCE)

    # 3. Finetuning.
    result = finetune(
        model, training, held_out, config.sft, adapter=POLICY, start=start, seed=seed,
        progress=lambda f, m: report("finetuning", f, m),
    )  # fmt: skip
    record["sft"] = asdict(result)
    lap.mark("sft_s")
    learner.check_finite()
    if not result.kept:
        raise RoundStopped("failed", "finetuning brought nothing to keep: the loss on held-out demonstrations did not fall")

    # 4. The gate: everything but the win rate, as no reward model was asked to make it win.
    gate = replace(config.gate, max_kl=config.sft.max_kl, attempts=config.sft.attempts, shrink=config.sft.shrink)
    learner.gate(record, None, prompts, start, reference, start, gate, seed, lambda f, m: report("gating", f, m))
    loss = mean_loss(AdapterModule(model, POLICY), held_out, model.pad_id) if held_out else None
    record["sft"] |= {"loss_after": loss}
    lap.mark("gate_s")
