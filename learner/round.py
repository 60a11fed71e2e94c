"""One round, top to bottom: votes, data digest, reward model, PPO, gate, publish, record.

Owns the order of things, what is recorded so that a round can be run again, and that nothing half-made is published:
whatever goes wrong ends in a record with a reason. Does not own the parts (`reward_fit.py`, `ppo.py`, `gate.py`) or when a
round runs (`worker.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog
import torch

from engine.engine import BASE, probe
from engine.lora import AdapterError
from engine.model import CausalModel
from engine.source import first_line
from engine.tokenizer import ChatTokenizer
from learner.config import FOREVER, GateConfig, LearnerConfig
from learner.data import (
    RankedExample,
    data_digest,
    examples_from_votes,
    newest,
    prompt_groups,
    split_folds,
)
from learner.errors import unforeseen
from learner.gate import Answers, GateError, Probe, run_gate
from learner.heads import learning_curve
from learner.kl_control import kl_warranted
from learner.metrics import agreement, length_baseline, reward_report
from learner.ppo import PPOError, train_ppo
from learner.practice import Prompts, choose_prompts
from learner.prompts import PromptsError
from learner.reliability import voters_report
from learner.reward import RewardDiverged, RewardModel
from learner.reward_fit import Known, cross_validate, fit_members
from learner.sft import SFTError
from learner.versions import load_version, open_model, shrink
from store.adapters import AdapterRegistry
from store.errors import CorruptAdapter, NotFound, StoreError
from store.files import read_json, write_json
from store.rounds import RoundFiles

log = structlog.get_logger("plaudit.learner")
POLICY, START, REFERENCE = "policy", "start", "reference"  # adapters of a round
DRAFT = "draft.json"  # the record as it stands just before publishing
PROBE = "Hello! Who are you, and what can you do for me?"
SHARES = {"training_reward": (0.0, 0.3), "ppo": (0.3, 0.9), "finetuning": (0.0, 0.9), "gating": (0.9, 1.0)}  # of a round's progress
LOST = {"win_rate", "finite"}  # checks that a smaller step in the same direction would not pass either
FAILURES = (RewardDiverged, SFTError, PPOError, GateError, PromptsError, AdapterError, CorruptAdapter, NotFound)  # of a round, their message being the reason
Report = Callable[[str, float, str], None]
Learn = Callable[["Learner", dict[str, Any], Sequence[Any], Path, Report], None]


class RoundStopped(Exception):
    """The round ends without a new version, for a reason that people may read. `state`: not_ready or failed."""

    def __init__(self, state: str, reason: str) -> None:
        super().__init__(reason)
        self.state = state


class Learner:
    """The model in memory, and where rounds and versions are kept."""

    def __init__(
        self, model: CausalModel, tokenizer: ChatTokenizer, config: LearnerConfig, files: RoundFiles, registry: AdapterRegistry
    ) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config.served(model.sampling)
        model.pack()  # before anything is read: a replay reads votes first that a later round read after sampling, and finds the same bits
        self.files, self.registry = files, registry
        self.features: Known = {}  # of the votes, on the base: they are read once, not every round
        self.facts: dict[str, Probe] = {}  # what each reference knows, by its name

    @classmethod
    def load(cls, source: str | Path, config: LearnerConfig, files: RoundFiles, registry: AdapterRegistry) -> Learner:
        """Load model and tokenizer as `config` says. Raises engine.model.ModelError."""
        model, tokenizer = open_model(source, config.device, config.dtype)
        return cls(model, tokenizer, config, files, registry)

    def run_round(
        self, n: int, voted: Sequence[Any], live: str, *, run_requested: int, report: Report, learn: Learn | None = None
    ) -> dict[str, Any]:
        """Run round `n` on the standing votes `voted`, starting from version `live`; write and return its record.

        learn: what the round is made of; `Learner.learn` unless given (instruction finetuning: `demonstrations.learn`).
        States: published (a version that passed its gate), rejected (a version that did not), not_ready (the reward
        model is not good enough yet), failed. Only what is not an Exception gets out, such as the worker's Stopped, and a StoreError or
        OSError where the record cannot be written: then the round is an abandoned one, and its votes are the next one's.
        """
        record: dict[str, Any] = {
            "round": n, "kind": "ppo", "state": "failed", "reason": None, "started": time.time(), "ended": None, "votes": len(voted),
            "vote_ids": [str(item.vote.id) for item in voted], "last_seq": max((item.vote.seq for item in voted), default=0),
            "run_requested": run_requested, "seed": self.config.seed + n, "config": self.config.to_dict(),
            "base_model": Path(self.model.source).name, "base_digest": self.model.digest, "parent": live, "reference": None,
            "data_digest": None, "reward": None, "ppo": None, "gate": None, "version": None, "timings": {},
        }  # fmt: skip
        directory = self.files.directory(n)

        def shown(stage: str, fraction: float, message: str) -> None:
            low, high = SHARES[stage]
            overall = low + (high - low) * min(max(fraction, 0.0), 1.0)
            with contextlib.suppress(OSError, StoreError):  # a full disk: the next one may find room
                self.files.progress(n, stage=stage, fraction=round(overall, 3), message=message)
            report(stage, overall, message)

        try:
            (learn or Learner.learn)(self, record, voted, directory, shown)
            write_json(directory / DRAFT, finite(record))  # should we be killed between publishing and recording
            record["version"] = self.publish(record)
            record["state"] = "rejected" if record["gate"]["verdict"] == "rejected" else "published"
        except RoundStopped as stop:
            record["state"], record["reason"] = stop.state, str(stop)
        except FAILURES as error:
            record["reason"] = first_line(error)
        except Exception as error:  # a learner failure is a record, and never an endless restart
            record["reason"] = unforeseen(error)
        finally:
            self.clear()
        record["ended"] = time.time()
        self.files.finish(n, finite(record))
        return record

    def learn(self, record: dict[str, Any], voted: Sequence[Any], directory: Path, report: Report) -> None:
        """Everything of a round but publishing; fills `record` and leaves the new policy in adapter POLICY.

        Raises RoundStopped, RewardDiverged, PPOError, GateError, AdapterError, CorruptAdapter.
        """
        from torch.utils.tensorboard import SummaryWriter

        config, seed, timings = LearnerConfig.from_dict(record["config"]), record["seed"], record["timings"]
        torch.manual_seed(seed)
        curves = SummaryWriter(str(directory / "tb"))
        try:
            # 1. Votes to data.
            lap = Lap(timings)
            examples = newest(examples_from_votes(voted, self.tokenizer), config.reward.max_examples)
            record["data_digest"] = data_digest(examples)
            prompts = choose_prompts(voted, self.tokenizer, config, seed)
            record["prompts_digest"] = hashlib.sha256(json.dumps([prompts.practice, prompts.held_out]).encode()).hexdigest()

            # 2. Where the policy starts, and what it may not drift from.
            start = self.load_version(record["parent"], START)
            record["reference"] = self.reference_of(record["parent"], config.reference)
            reference = start if record["reference"] == record["parent"] else self.load_version(record["reference"], REFERENCE)

            # 3. The reward model: does it work?
            reward, judges, record["reward"], may_train = train_reward(
                self.model, examples, config, seed, lambda f, m: report("training_reward", f, m), self.features
            )
            lap.mark("reward_s")
            for step, loss in enumerate(record["reward"].get("held_out_loss", ())):
                curves.add_scalar("reward/held_out_loss", loss, step)
            if reward is None or judges is None or not may_train:
                raise RoundStopped("not_ready", record["reward"]["words"])
            write_json(directory / DRAFT, finite(record))  # should we be killed during PPO: what the reward model learned from
            reward.save(directory / "reward")
            lap.mark("save_s")

            # 4. PPO; run again, it goes by the shares of the run that its updates had then.
            def curve(row: dict[str, Any]) -> None:
                for name, value in row.items():
                    if name != "update" and isinstance(value, int | float):
                        curves.add_scalar(f"ppo/{name}", value, int(row["update"]))

            ppo = replace(config.ppo, kl_target=kl_warranted(config.ppo, len(examples)))
            result = train_ppo(
                self.model, self.tokenizer, reward, prompts=prompts.practice, policy=POLICY, config=ppo, start=start,
                reference=reference, judges=judges, seed=seed, progress=lambda f, m: report("ppo", f, m), on_update=curve,
                schedule=record.get("schedule", ()),
                demonstrations=[(e.prompt_ids, e.completions_ids[-1]) for e in examples if e.edit_beats and e.prompt_key not in prompts.judging],
            )  # fmt: skip
            lap.mark("ppo_s")
            record["ppo"] = {
                "updates": int(result.history[-1]["update"]), "kept_update": result.kept_update, "stopped": result.stopped,
                "kl": result.kl, "kl_target": ppo.kl_target, "note": result.note, "history": result.history,
            }  # fmt: skip
            self.check_finite()
            if result.kept_update == 0:
                raise RoundStopped("failed", f"PPO brought nothing to keep: {result.stopped}")

            # 5. The gate.
            began = reference if result.note else start
            self.gate(record, judges, prompts, start, reference, began, config.gate, seed, lambda f, m: report("gating", f, m))
            lap.mark("gate_s")
        finally:
            curves.close()

    def gate(
        self, record: dict[str, Any], judges: RewardModel | None, prompts: Prompts, start: str | None, reference: str | None,
        began: str | None, config: GateConfig, seed: int, progress: Callable[[float, str], None],
    ) -> None:  # fmt: skip
        """`run_gate` on adapter POLICY, into `record`; what the reference knows is asked once, not every round.

        A version that is turned away for anything but losing is shrunk towards adapter `began` (None: the base), where it
        began, and asked again: less of what it learned, and less of what went wrong with it.
        """
        name, tried, answers = record["reference"], list[dict[str, Any]](), Answers()
        trained = {key: p.detach().clone() for key, p in self.model.lora.parameters(POLICY).items()}
        for attempt in range(config.attempts):
            def shown(fraction: float, words: str, before: int = attempt) -> None:
                progress((before + fraction) / config.attempts, words)

            share = config.shrink**attempt
            shrink(self.model.lora, POLICY, began, trained, share)
            record["gate"] = run_gate(
                self.model, self.tokenizer, judges, prompts=prompts.held_out, candidate=POLICY, live=start, reference=reference, config=config,
                seed=seed, facts=self.facts.get(name), answers=answers, progress=shown,
            )  # fmt: skip
            if held := record["gate"].get("reference_probe"):
                self.facts[name] = Probe(**held)
            tried.append({"share": round(share, 3), "failed": record["gate"]["failed"]})
            if not record["gate"]["failed"] or LOST & set(record["gate"]["failed"]):
                break
        record["gate"] |= {"share": tried[-1]["share"], "attempts": tried}

    def publish(self, record: dict[str, Any]) -> str:
        """Make adapter POLICY the next version; its name."""
        ids = self.tokenizer.render([{"role": "user", "content": PROBE}])
        restarted = bool((record["ppo"] or {}).get("note"))  # then it was made from the reference, not from the live version
        fields = {
            "parent": record["reference"] if restarted else record["parent"], "round": record["round"], "kind": record["kind"], "base_digest": self.model.digest,
            "base_model": record["base_model"], "data_digest": record["data_digest"], "seed": record["seed"],
            "gate": finite(record["gate"]), "probe": probe(self.model, POLICY, ids), "reference": record["reference"], "live": record["parent"],
        }  # fmt: skip
        return self.registry.publish(lambda path: self.model.lora.save(POLICY, path), fields).version

    def load_version(self, version: str, name: str) -> str | None:
        """Load a published version as adapter `name`; None for the base. Raises NotFound, CorruptAdapter, AdapterError."""
        return load_version(self.model, self.registry, version, name)

    def reference_of(self, version: str, wanted: str) -> str:
        """The version that KL is measured against: as configured, or the instruction-finetuned ancestor of `version`,
        or the base where it has none. Where an ancestor is gone, what its successor was measured against. Raises CorruptAdapter."""
        if wanted != "auto":
            return wanted
        seen: set[str] = set()
        recorded = None
        while version != BASE and version not in seen:
            try:
                manifest = self.registry.manifest(version)
            except CorruptAdapter:
                if recorded is None:
                    raise
                return recorded
            if manifest.kind == "sft":
                return version
            seen.add(version)
            version, recorded = manifest.parent, manifest.extra.get("reference")
        return BASE

    def check_finite(self) -> None:
        """Raises RoundStopped when the policy has a number that is not finite."""
        for name, value in self.model.lora.parameters(POLICY).items():
            if not bool(value.isfinite().all()):
                raise RoundStopped("failed", f"the policy has a number that is not finite in {name}")

    def clear(self) -> None:
        """Take every adapter of the round out of the model."""
        for name in self.model.lora.names():
            self.model.lora.delete(name)


class Lap:
    """Seconds of the stages of a round, into a dict."""

    def __init__(self, timings: dict[str, float]) -> None:
        self.timings, self.began = timings, time.monotonic()

    def mark(self, name: str) -> None:
        """The stage `name` ends here and the next one begins."""
        now = time.monotonic()
        self.timings[name], self.began = round(now - self.began, 2), now


def train_reward(
    model: CausalModel, examples: Sequence[RankedExample], config: LearnerConfig, seed: int, progress: Callable[[float, str], None],
    known: Known | None = None,
) -> tuple[RewardModel | None, RewardModel | None, dict[str, Any], bool]:  # fmt: skip
    """Cross-validate, judge, and (where it works) fit the members: (members, fold members, report, may PPO start).

    known: what an earlier round read (`reward_fit.base_features`).
    """
    strict = [e for e in examples if e.strict]
    report: dict[str, Any] = {"votes_used": len(examples), "strict": len(strict), "ties": sum(bool(e.tied) for e in examples)}
    report |= {"chosen": sum(e.chosen for e in examples)}  # votes on replies shown for what they teach: not in the figures below
    report |= {"edits": sum(bool(e.edit_beats) for e in examples), "none_good": sum(bool(e.refused) for e in examples)}
    if len(strict) < config.min_votes:
        more = config.min_votes - len(strict)
        words = f"not yet: about {more} more votes ({len(strict)} that prefer one reply, too few to test)"
        return None, None, report | {"verdict": "not_yet", "words": words}, False
    try:
        split = split_folds(examples, config.reward.folds, seed)
    except ValueError as error:
        return None, None, report | {"verdict": "not_yet", "words": f"not yet: {error}"}, False
    split = split.where_learned(examples)
    checked = cross_validate(model, examples, split, config.reward, seed, lambda f, m: progress(0.55 * f, m), known)
    clusters, _ = prompt_groups(examples)
    groups = [e.groups for e in examples]
    lengths = [[len(c) for c in e.completions_ids] for e in examples]
    length_only = length_baseline(lengths, groups, [(fold.train, fold.test) for fold in split.folds])
    by_chance = {i: scores for i, scores in checked.scores.items() if not examples[i].chosen}
    figures, verdict = reward_report(by_chance, length_only, groups, clusters, config.min_votes)
    ceiling = agreement([(e.prompt_key, e.voter, e.completions_ids, e.groups) for e in examples if not e.chosen])
    report |= figures | {
        "split_by": split.by, "split": split.note, "folds": len(split.folds), "agreement": ceiling,
        "held_out_loss": [round(x, 4) for x in checked.curve], "passes": checked.epochs, "ridge": checked.ridge, "members": config.reward.members,
        "voters": voters_report(checked.voters),
        "learning_curve": learning_curve(examples, checked.features, split, checked.learned, checked.ridge, seed),
    }  # fmt: skip
    if not verdict.may_train:
        return None, checked.judges, report, False
    reward = fit_members(
        model, checked.examples, config.reward, checked.epochs, checked.ridge, seed, lambda f, m: progress(0.55 + 0.45 * f, m), checked.features
    )
    return reward, checked.judges, report, True


def close_unfinished(files: RoundFiles, registry: AdapterRegistry) -> list[tuple[int, str]]:
    """Give every round that was cut short its record: what it published if it did, else abandoned. (round, state) each."""
    published = {}
    for version in registry.versions():
        try:
            manifest = registry.manifest(version)
        except CorruptAdapter:
            continue
        published[manifest.round] = manifest
    closed = []
    for n in files.unfinished():
        made = published.get(n)
        try:
            record = read_json(files.directory(n) / DRAFT)
        except (FileNotFoundError, ValueError):
            record = {}
        if made is not None and record:
            rejected = (made.gate or {}).get("verdict") == "rejected"
            record |= {"state": "rejected" if rejected else "published", "version": made.version, "ended": made.created}
        else:
            nothing = dict.fromkeys(("started", "reward", "ppo", "gate")) | {"votes": 0}
            record = nothing | record | {
                "state": "abandoned", "reason": "the learner was stopped during this round; its votes go to the next", "version": None, "ended": time.time(),
            }  # fmt: skip
        files.finish(n, record)
        closed.append((n, record["state"]))
    return closed


def replay_round(data_dir: Path, source: str | Path, n: int) -> dict[str, Any]:
    """Run round `n` again from its recorded votes, seed, settings and start; publish nothing; compare.

    Same means: the same data digest, and the same adapter bit for bit where the round published one. That is so on a CPU; on a GPU sums are
    added up in whatever order its threads come. Wall-clock limits are replaced by what they came to then. Raises FileNotFoundError, RoundStopped when votes are gone.
    """
    from learner import demonstrations  # which needs this module first
    from store.store import Store

    files, registry = RoundFiles(data_dir / "rounds"), AdapterRegistry(data_dir / "adapters")
    try:
        old = files.read(n)
    except ValueError as damaged:
        raise RoundStopped("failed", f"round {n} cannot be replayed: its record is damaged") from damaged
    if old["state"] == "abandoned" or "config" not in old:
        raise RoundStopped("failed", f"round {n} cannot be replayed: it was cut short")
    config = LearnerConfig.from_dict(old["config"])
    schedule = [row["done"] for row in (old.get("ppo") or {}).get("history", ())]
    if finetuning := old.get("kind") == "sft":
        config = replace(config, sft=replace(config.sft, max_seconds=FOREVER, max_steps=(old.get("sft") or {}).get("steps", 0)))
    with Store.open(data_dir, read_only=True) as store:
        by_id = {str(item.vote.id): item for item in store.voted_comparisons()}
    votes = [*old["vote_ids"], *old.get("beside", ())]
    gone = [vote for vote in votes if vote not in by_id]
    if gone:
        raise RoundStopped("failed", f"round {n} cannot be replayed: {len(gone)} of its votes were withdrawn or replaced since")
    torch.set_num_threads(config.threads)
    learner = Learner.load(source, config, files, registry)
    record = {
        key: old[key] for key in ("round", "seed", "parent", "base_model", "last_seq")
    } | {"config": config.to_dict(), "timings": {}, "schedule": schedule, "reward": None, "ppo": None, "gate": None}  # fmt: skip
    digest, state = None, None
    with tempfile.TemporaryDirectory() as scratch:
        try:
            learn = demonstrations.learn if finetuning else Learner.learn
            learn(learner, record, [by_id[vote] for vote in votes], Path(scratch), lambda *_: None)
            learner.model.lora.save(POLICY, Path(scratch) / "adapter")
            digest = hashlib.sha256((Path(scratch) / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
        except RoundStopped as stop:
            state = stop.state
        except FAILURES:
            state = "failed"
    published = registry.manifest(old["version"]).files["adapter_model.safetensors"] if old["version"] else None
    prompts = old.get("prompts_digest") in (None, record.get("prompts_digest"))
    same = record["data_digest"] == old["data_digest"] and prompts and digest == published and state in (None, old["state"])
    return {"round": n, "same": same, "same_prompts": prompts, "data_digest": record["data_digest"], "adapter_sha256": digest, "published_sha256": published}


def finite(value: Any) -> Any:
    """`value` ready for JSON: NaN and infinity become None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
