"""What a trainer is asked for and what comes back: the same votes for both sides, one process a run, policies at its stops.

Owns the file of votes, the job (`benchmarks/peer/policies.py` reads it for TRL, `benchmarks/peers.py` for ours) and the
learning rates at which a peer is tried. Does not train and does not judge.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.contest import Contestant
from learner.config import PPOConfig
from learner.metrics import strict_pairs
from store.records import Comparison, Completion, Vote, VotedComparison

RATES = {"low": 1e-4, "middle": 3e-4, "high": 1e-3}  # TRL's defaults are 1e-6 to 3e-6 for full models; LoRA takes 10 to 100 times as much
DPO_PASSES = 3.0  # Trainer's default number of epochs, which TRL leaves as it is


def preference_rows(voted: Sequence[VotedComparison]) -> list[dict[str, Any]]:
    """The votes in TRL's conversational form: a row for every pair that a vote orders; ties have none."""
    return [
        {
            "prompt": list(item.comparison.messages),
            "chosen": [{"role": "assistant", "content": item.comparison.completions[winner].text}],
            "rejected": [{"role": "assistant", "content": item.comparison.completions[loser].text}],
        }
        for item in voted
        for winner, loser in strict_pairs(item.vote.groups)
    ]


def write_votes(path: Path, voted: Sequence[VotedComparison], practice: Sequence[Mapping[str, Any]]) -> Path:
    """Keep the votes as both sides read them. practice: {"prompt": text, "ids": rendered} of every prompt to practise on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    votes = {"voted": [asdict(item) for item in voted], "pairs": preference_rows(voted), "practice": list(practice)}
    path.write_text(json.dumps(votes), "utf-8")
    return path


def read_voted(path: Path) -> list[VotedComparison]:
    """The votes that `write_votes` kept."""
    return [voted_of(row) for row in json.loads(path.read_text("utf-8"))["voted"]]


def voted_of(row: dict[str, Any]) -> VotedComparison:
    def vote(fields: dict[str, Any]) -> Vote:
        return Vote(**fields | {"groups": tuple(map(tuple, fields["groups"]))})

    fields = row["comparison"]
    completions = tuple(
        Completion(**c | {"token_ids": tuple(c["token_ids"]), "logprobs": tuple(c["logprobs"])}) for c in fields["completions"]
    )
    votes = tuple(map(vote, fields["votes"]))
    return VotedComparison(
        Comparison(**fields | {"messages": tuple(fields["messages"]), "completions": completions, "votes": votes}), vote(row["vote"])
    )


def job(model: str, votes: Path, ppo: PPOConfig, *, seed: int, stops: Mapping[str, float]) -> dict[str, Any]:
    """What every run of one contest shares. stops: a policy is kept at each of so many seconds, rollouts or passes (over
    the pairs), under its name, and the run ends with the last of them; PPOConfig lends rank, batch and reply length."""
    return {
        "model": model, "votes": str(votes.absolute()), "seed": seed, "stops": dict(stops), "update_rollouts": ppo.prompts_per_update * ppo.replies_per_prompt,
        "replies_per_prompt": ppo.replies_per_prompt, "max_new_tokens": ppo.max_new_tokens, "epochs": ppo.epochs,
        "minibatches": ppo.minibatches, "lora_r": ppo.lora_r, "lora_alpha": ppo.lora_alpha,
    }  # fmt: skip


def run(name: str, command: Sequence[str | Path], task: Mapping[str, Any], out: Path, threads: int, *, sleeping: bool = True) -> dict[str, Any]:
    """One contestant's whole run in a process of its own; policies and log lie in `out`. Raises ContestError."""
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    with Contestant(name, command, out / "log.txt", threads=threads, sleeping=sleeping) as contestant:
        return contestant.turn(**task, out=str(out))


def run_peer(peer: Path, method: str, rate: str, task: Mapping[str, Any], out: Path, threads: int) -> dict[str, Any]:
    """TRL's `method` at a learning rate of RATES. Raises ContestError."""
    return run(f"{method}-{rate}", [peer, "-m", "benchmarks.peer.policies"], {**task, "method": method, "lr": RATES[rate]}, out, threads, sleeping=False)
