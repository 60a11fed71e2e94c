"""Every setting of the learner, frozen, with its default and its meaning. Owns no behaviour beyond validation.

One `LearnerConfig` is made where the process starts and recorded whole in every round, so that a round can be
replayed. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # for its name alone: it would load torch
    from engine.source import Sampling


FOREVER = 1e9  # seconds: no limit


class ConfigError(ValueError):
    """A setting is out of range or unknown; the message names it and what it accepts."""


def _need(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def _numbers(section: Any, prefix: str) -> None:
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        _need(not isinstance(value, float) or math.isfinite(value), f"{prefix}{f.name} must be a number, and a finite one: a round's record keeps it")


@dataclass(frozen=True)
class RewardConfig:
    """The reward model: an ensemble of LoRA + scalar head members on the shared base."""

    members: int = 3  # ensemble size (Coste et al. 2023)
    lora_r: int = 16  # rank of each member's adapter
    lora_alpha: int = 32  # scale of each member's adapter: alpha / r
    ridge: float = 0.1  # penalty of the head's first fit on the frozen base's features
    lr: float = 5e-4  # AdamW, adapters
    head_lr: float = 1e-4  # AdamW, scalar head, after its first fit
    weight_decay: float = 0.05
    epochs: int = 1  # passes of LoRA training at most; the held-out loss says how many of them are used, 0 included
    worth: float = 0.03  # nats a comparison of held-out loss that a pass must save: it and all the scoring by adapters after it cost half of a round
    pass_examples: int = 64  # comparisons of one pass at most, drawn anew each time: a round must stay short
    batch: int = 8  # comparisons a step
    folds: int = 4  # of the cross-validation
    max_examples: int = 400  # comparisons used, each voter's newest first in turn: a round must stay short
    max_tokens: int = 512  # prompt + completion; what is longer loses its oldest tokens, the prompt's first

    def __post_init__(self) -> None:
        _numbers(self, "reward.")
        _need(self.members >= 1 and self.lora_r >= 1 and self.lora_alpha >= 1, "reward.members, reward.lora_r and reward.lora_alpha must be at least 1")
        _need(self.max_examples >= 1 and self.pass_examples >= 1, "reward.max_examples and reward.pass_examples must be at least 1")
        _need(self.max_tokens >= 2, "reward.max_tokens must be at least 2")
        _need(self.weight_decay >= 0, "reward.weight_decay must not be negative")
        _need(self.folds >= 2, "reward.folds must be at least 2")
        _need(self.epochs >= 0 and self.batch >= 1, "reward.epochs must be at least 0, reward.batch at least 1")
        _need(self.ridge > 0, "reward.ridge must be positive")
        _need(self.worth >= 0, "reward.worth must not be negative")
        _need(self.lr > 0 and self.head_lr > 0, "reward.lr and reward.head_lr must be positive")


@dataclass(frozen=True)
class PPOConfig:
    """The policy update. `learner/ppo.py` reads it."""

    estimator: str = "gae-ls"  # advantages: "gae-ls" (GAE, value function by least squares), "gae" (value function trained), "rloo", "reinforce"
    updates: int = 32  # rollout batches at most
    tokens: int = 40_000  # of replies practised, after which no further update starts: short replies get more updates, for the same work
    prompts_per_update: int = 12
    replies_per_prompt: int = 4  # 12 x 4 = 48 rollouts an update
    max_new_tokens: int = 160  # a rollout's reply: a list of six facts takes up to 139, and what is cut was not judged whole
    temperature: float = 0.0  # of the rollouts, and of the log-probabilities that are optimised; 0: what the model asks for, as people get its replies
    epochs: int = 2  # passes over one rollout batch
    minibatches: int = 2
    lora_r: int = 16
    lora_alpha: int = 32
    lr: float = 1.5e-3
    value_lr: float = 1e-3
    warmup: int = 3  # updates over which the step size grows: Adam's first steps are as large as its largest, whatever the gradient
    max_grad_norm: float = 1.0
    clip: float = 0.2  # policy ratio (Schulman et al. 2017, Eq. 7)
    value_clip: float = 0.2
    gamma: float = 1.0
    lam: float = 0.9
    kl_coef: float = 0.6  # beta at the start, in units of the price at which a tilt lies kl_target away (`kl_control.kl_price`)
    kl_target: float = 4.5  # nats a reply, adaptive controller (Ziegler et al. 2019)
    kl_votes: int = 64  # votes that warrant so many nats; n < kl_votes warrant kl_target sqrt(n / kl_votes)
    kl_horizon: float = 50.0  # rollouts over which the controller moves: an update has 48
    kl_ceiling: float = 1.5  # times kl_target: over it, the run goes back to the last state under it
    back_offs: int = 3  # how often it goes on from there, at a higher price, before it ends
    uncertainty: float = 0.5  # reward = mean - uncertainty * std over the members (lower confidence bound)
    missing_eos_penalty: float = 1.0  # taken off the score (reference deviations) when max_new_tokens cut the reply
    broken_penalty: float = 6.0  # taken off, at the token where it shows, for a fault that `learner/text_checks.py` finds: at first, and more while more replies break than `faults.SPARE` of the reference's share
    outside_penalty: float = 1.0  # prices of a fault that what the reference would not say costs, times how likely it is, at every token; 0: nothing
    nucleus: float = 0.98  # what the reference would say: the fewest likeliest tokens that together reach this share (top-p); 1: anything
    fault_decay: float = 0.8  # how far back before a fault its tokens answer for it, a token (rloo, reinforce; gae has lam)
    ptx_coef: float = 0.0  # PPO-ptx: weight of the instruction-finetuning loss (Ouyang et al. 2022, Eq. 2's gamma)
    ptx_replies: int = 8  # replies of it a step
    judge_every: int = 4  # updates between looks at the held-out reward members
    patience: int = 2  # looks in a row that lie `part` under the best, and the score does not, before the run goes back to the best
    part: float = 0.5  # deviations of the reference's replies
    chunk_tokens: int = 0  # padded tokens of one forward pass at most, four times as many where replies share a prompt; 0: as suits the device (`learner/batching.py`)
    whiten_rewards: bool = True  # estimator "gae" alone: what a least-squares value is fitted to must stay in the units of the score
    whiten_advantages: bool = True
    max_seconds: float = 180.0  # wall clock after which no further update starts; an idle machine needs half of it

    def __post_init__(self) -> None:
        _numbers(self, "ppo.")
        _need(self.lr >= 0 and self.value_lr >= 0 and self.max_grad_norm > 0, "ppo.lr and ppo.value_lr must not be negative, ppo.max_grad_norm positive")
        _need(self.clip > 0 and self.value_clip > 0, "ppo.clip and ppo.value_clip must be positive")
        _need(self.lora_r >= 1 and self.lora_alpha >= 1, "ppo.lora_r and ppo.lora_alpha must be at least 1")
        _need(self.max_new_tokens >= 1, "ppo.max_new_tokens must be at least 1")
        _need(all(0 <= share <= 1 for share in (self.gamma, self.lam, self.fault_decay)), "ppo.gamma, ppo.lam and ppo.fault_decay must be between 0 and 1")
        _need(min(self.kl_coef, self.uncertainty, self.missing_eos_penalty, self.broken_penalty) >= 0, "ppo.kl_coef, ppo.uncertainty and penalties must not be negative")
        _need(self.back_offs >= 0 and self.chunk_tokens >= 0, "ppo.back_offs and ppo.chunk_tokens must not be negative")
        _need(self.estimator in ("gae-ls", "gae", "rloo", "reinforce"), "ppo.estimator must be gae-ls, gae, rloo or reinforce")
        _need(self.updates >= 1 and self.tokens >= 1 and self.epochs >= 1, "ppo.updates, ppo.tokens and ppo.epochs must be at least 1")
        _need(self.prompts_per_update >= 1 and self.replies_per_prompt >= 1, "ppo rollout counts must be at least 1")
        _need(self.estimator != "rloo" or self.replies_per_prompt >= 2, "ppo.replies_per_prompt must be at least 2 for rloo")
        _need(self.minibatches >= 1 and self.judge_every >= 1 and self.patience >= 1, "ppo.minibatches, ppo.judge_every and ppo.patience must be at least 1")
        _need(self.kl_horizon > 0, "ppo.kl_horizon must be positive")
        _need(self.temperature >= 0, "ppo.temperature must not be negative")
        _need(self.ptx_coef >= 0 and self.ptx_replies >= 1, "ppo.ptx_coef must not be negative, ppo.ptx_replies at least 1")
        _need(self.outside_penalty >= 0 and 0 < self.nucleus <= 1, "ppo.outside_penalty must not be negative, ppo.nucleus over 0 and at most 1")
        _need(self.kl_votes >= 1, "ppo.kl_votes must be at least 1")
        _need(self.max_seconds > 0, "ppo.max_seconds must be positive")
        _need(self.warmup >= 1, "ppo.warmup must be at least 1")
        _need(self.kl_target > 0 and self.kl_ceiling >= 1, "ppo.kl_target must be positive, ppo.kl_ceiling at least 1")


@dataclass(frozen=True)
class SFTRoundConfig:
    """Instruction finetuning of an adapter. `learner/finetune.py` and `learner/demonstrations.py` read it."""

    min_demonstrations: int = 32  # new replies that people wrote, to start a round of it before the next PPO round
    passes: int = 8  # over the demonstrations at most; the one with the lowest held-out loss is kept
    patience: int = 2  # passes in a row without a lower held-out loss that end the run
    lora_r: int = 16  # of a new adapter; a live version's own rank stays
    lora_alpha: int = 32
    lr: float = 1e-3  # AdamW, peak
    weight_decay: float = 0.01
    tokens_per_batch: int = 512  # padded tokens a step: some dozen demonstrations must make more than a step a pass
    max_tokens: int = 512  # of a chat; longer ones lose their oldest tokens
    max_seconds: float = 120.0  # wall clock after which the run ends with the best pass so far
    max_steps: int = 0  # end after this many, with the learning rates of `passes` (replays); 0 = no such limit
    max_kl: float = 24.0  # nats a reply against the old reference: finetuning moves further than PPO may
    attempts: int = 5  # at the gate; each but the first with the change shrunk by `shrink`
    shrink: float = 0.6

    def __post_init__(self) -> None:
        _numbers(self, "sft.")
        _need(self.lora_r >= 1 and self.lora_alpha >= 1, "sft.lora_r and sft.lora_alpha must be at least 1")
        _need(self.max_seconds > 0 and self.max_steps >= 0 and self.weight_decay >= 0, "sft.max_seconds must be positive, sft.max_steps and sft.weight_decay not negative")
        _need(self.min_demonstrations >= 2, "sft.min_demonstrations must be at least 2")
        _need(self.passes >= 1 and self.patience >= 1, "sft.passes and sft.patience must be at least 1")
        _need(self.lr > 0, "sft.lr must be positive")
        _need(self.attempts >= 1 and 0 < self.shrink < 1, "sft.attempts must be at least 1, sft.shrink between 0 and 1")
        _need(self.max_tokens >= 2 and self.tokens_per_batch >= 1, "sft.max_tokens must be at least 2, sft.tokens_per_batch at least 1")


@dataclass(frozen=True)
class GateConfig:
    """What a candidate must pass. `learner/gate.py` reads it."""

    prompts: int = 144  # held-out prompts; a third or two of them where those leave no doubt who wins
    replies_per_prompt: int = 4  # sampled from each of live, candidate and reference
    max_new_tokens: int = 160
    temperature: float = 0.0  # of the replies; 0: what the model asks for, as people get them
    top_p: float = 0.0  # the same
    min_win_rate: float = 0.5  # the lower bound of the win rate against live must be above it
    max_kl: float = 8.0  # nats a reply against the reference
    max_length_ratio: float = 6.0  # mean tokens, candidate over live, either way
    max_broken_rise: float = 0.02  # share of broken replies above the reference's; in 192 replies, of which the reference breaks 0.6%, an even version is 2 points off about one time in a hundred
    max_repetition_rise: float = 0.1  # share of 4-word runs that repeat within a reply, above the reference's
    min_distinct2_ratio: float = 0.5  # distinct bigrams, candidate over the reference
    max_refusal_rise: float = 0.1
    max_probe_loss_rise: float = 1.0  # nats a token on the fixed probe set; a change of style costs some of it
    max_probe_accuracy_fall: float = 0.1  # share of known answers no longer told from wrong ones: the alignment tax
    attempts: int = 3  # of a version that is turned away, but not for losing: each but the first with the change shrunk by `shrink`
    shrink: float = 0.7

    def __post_init__(self) -> None:
        _numbers(self, "gate.")
        _need(self.max_new_tokens >= 1, "gate.max_new_tokens must be at least 1")
        _need(self.prompts >= 1 and self.replies_per_prompt >= 1, "gate.prompts must be at least 1")
        _need(self.temperature >= 0 and 0 <= self.top_p <= 1, "gate.temperature must not be negative, gate.top_p between 0 and 1")
        _need(self.attempts >= 1 and 0 < self.shrink < 1, "gate.attempts must be at least 1, gate.shrink between 0 and 1")


@dataclass(frozen=True)
class LearnerConfig:
    """Everything a round depends on besides the votes, the base model and the live version."""

    round_votes: int = 16  # new standing votes that start a round
    min_votes: int = 8  # fewer strict votes than this and the reward model is not even tried
    seed: int = 0  # round n uses seed + n
    reference: str = "auto"  # frozen policy of the KL: "auto" (the finetuned version that the live one comes from, else base), "base" or a version
    held_out_prompts: float = 0.2  # share of people's prompts (by conversation) kept from PPO for the gate, in every round the same ones
    practice_prompts: int = 144  # prompts of the pool make up this many to practise on where people's own are fewer; of a pool that an operator gave, as many as people's own at least
    prompt_tokens: int = 1024  # a longer prompt is neither practised on nor asked at the gate: one such takes the time and memory of a whole round
    pool: str = ""  # a file of prompts (a line each, or JSONL) to practise on and be judged on; "" = the bundled ones
    threads: int = 1  # torch threads: the other core keeps serving
    poll_s: float = 1.0  # between looks at the database
    heartbeat_s: float = 2.0
    take_in_s: float = 30.0  # how long the next round waits for the server to take in the version of the last
    device: str = "auto"  # CUDA where there is one
    dtype: str = "auto"  # bfloat16 on CUDA, float32 on a CPU
    reward: RewardConfig = field(default_factory=RewardConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    sft: SFTRoundConfig = field(default_factory=SFTRoundConfig)

    def __post_init__(self) -> None:
        _numbers(self, "")
        _need(self.round_votes >= 1 and self.min_votes >= 1, "round_votes and min_votes must be at least 1")
        _need(self.practice_prompts >= 1, "practice_prompts must be at least 1")
        _need(self.poll_s > 0 and self.heartbeat_s > 0 and self.take_in_s >= 0, "poll_s and heartbeat_s must be positive, take_in_s not negative")
        _need(0 < self.held_out_prompts < 1, "held_out_prompts must be between 0 and 1")
        _need(self.prompt_tokens >= 1, "prompt_tokens must be at least 1")
        _need(self.threads >= 1, "threads must be at least 1")
        _need(self.dtype in ("auto", "float32", "bfloat16", "float16"), "dtype must be auto, float32, bfloat16 or float16")

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, ready for JSON; `from_dict` undoes it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> LearnerConfig:
        """Build from nested dicts; missing fields take their default. Raises ConfigError for an unknown one."""
        return _build(cls, fields, "")

    def served(self, sampling: Sampling) -> LearnerConfig:
        """A copy that says how replies are sampled, by the model's own `sampling` where it leaves that open."""
        return replace(self, ppo=served(self.ppo, sampling), gate=served(self.gate, sampling))

    def override(self, settings: Mapping[str, str]) -> LearnerConfig:
        """A copy with dotted settings replaced, as from `--set ppo.updates=10`. Raises ConfigError."""
        nested = self.to_dict()
        for dotted, text in settings.items():
            *sections, name = dotted.split(".")
            target: Any = nested
            for section in sections:
                target = target.get(section) if isinstance(target, dict) else None
            _need(isinstance(target, dict) and name in target, f"unknown setting {dotted}")
            _need(not isinstance(target[name], dict), f"{dotted} is a section, not a setting")
            target[name] = _parse(dotted, text, type(target[name]))
        return LearnerConfig.from_dict(nested)


Section = TypeVar("Section", PPOConfig, GateConfig)


def served(section: Section, sampling: Sampling) -> Section:
    """A copy of a section with temperature and top-p by `sampling` where they are 0."""
    return replace(section, **{name: value for name, value in sampling._asdict().items() if getattr(section, name, None) == 0})


SECTIONS = {"reward": RewardConfig, "ppo": PPOConfig, "gate": GateConfig, "sft": SFTRoundConfig}


def _build(cls: type, fields: Mapping[str, Any], prefix: str) -> Any:
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(fields) - known)
    _need(not unknown, f"unknown setting {prefix}{unknown[0]}" if unknown else "")
    values = {
        name: _build(SECTIONS[name], value, f"{name}.") if name in SECTIONS and cls is LearnerConfig else value
        for name, value in fields.items()
    }
    return cls(**values)


def _parse(name: str, text: str, kind: type) -> Any:
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError):
        raise ConfigError(f"{name} takes a {kind.__name__}, not {text!r}") from None
