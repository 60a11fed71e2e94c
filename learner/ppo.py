"""Proximal policy optimisation of one LoRA adapter against the reward model, read top to bottom.

R(x, y) = score(x, y) - beta * sum_t [log pi(y_t) - log pi_ref(y_t)], the KL part token by token, the score on the last
valid token (Stiennon et al. 2020; Ouyang et al. 2022). The score is how sure the ensemble is that people prefer the reply to a
good one of the version it begins at (`Scorer`), by its lower confidence bound, less what a cut reply costs. What is mechanically broken costs at the
token where it broke (`learner/text_checks.py`): the tokens before it answer for it, and so does each that led to where such things happen. Ending
too soon costs by its probability as well, at every token (`faults.Endings`), and so does what the reference would not say (`faults.Outside`).

One base model is in memory; the policy, the reward members, a trained value function and (where there is one) the reference
are adapters on it. Rollouts come from the engine that serves people. Owns the update; does not own the formulas
(`learner/losses.py`, `learner/advantages.py`), the price of a nat (`learner/kl_control.py`), sampling (`learner/rollout.py`), when
held-out members have seen enough (`learner/stopping.py`), whether the result is good enough (`learner/gate.py`) or files.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from engine.engine import BASE, Engine
from engine.model import CausalModel
from engine.tokenizer import ChatTokenizer
from learner import rollout
from learner.advantages import gae, leave_one_out, token_rewards, whiten
from learner.config import PPOConfig, served
from learner.faults import (
    Endings,
    FaultPrice,
    Outside,
    broken_share,
    fault_advantages,
    fault_rewards,
    fault_tokens,
)
from learner.kl_control import KLController, kl_price
from learner.losses import kl_k1, masked_mean, masked_var, policy_loss, value_loss
from learner.reading import Compared, Reading
from learner.reward import RewardModel
from learner.rollout import Trajectories
from learner.scorer import Scorer
from learner.stopping import Finalists, Judged, Kept
from learner.text_checks import broken_rate, distinct_n, faults
from learner.value import VALUE, FittedValue, TrainedValue

UNIT = 48  # prompts that the reference answers, for what scores are measured in and faults held to: replies to one prompt are alike
RATIO_LIMIT = 10.0  # mean probability ratio of a minibatch over which the run is dropped, as in TRL (`ratio_threshold`)
LEAST_UNIT = 0.1  # deviation of a batch's rewards or advantages by which the cost of ending too soon is divided, at least: one that says nothing must not make it dear
FINAL = 2  # replies to each of them, by which the best of a run's last few states is told


class PPOError(Exception):
    """The run cannot go on, and the message says why. The policy adapter is left as it was last known good."""


@dataclass(frozen=True)
class PPOResult:
    """What a run did. `adapter` now holds the kept policy."""

    adapter: str
    history: list[dict[str, Any]]  # one row of figures an update; the last one is a measurement without an update
    stopped: str  # why it ended, in words
    kept_update: int  # updates behind the kept policy; 0 means that it is where it started
    kl: float  # nats a reply against the reference, measured on the kept policy's rollouts
    seconds: float
    sample: str = field(repr=False, default="")  # one reply of the kept policy
    note: str | None = None  # where it began, if that is not `start`


class Mixed:
    """PPO-ptx (Ouyang et al. 2022, Eq. 2): the instruction-finetuning loss that is mixed into every step.

    On the replies that people wrote; until there are `ptx_replies` of them, the reference's own sound replies make up
    the number, so that what it did well stays likely.
    """

    def __init__(
        self, model: CausalModel, tokenizer: ChatTokenizer, demonstrations: Sequence[tuple[Sequence[int], Sequence[int]]],
        reference: Trajectories, config: PPOConfig,
    ) -> None:  # fmt: skip
        pairs = [(list(p), list(r)) for p, r in demonstrations if len(p) + len(r) <= model.max_context]
        if len(pairs) < config.ptx_replies:
            sound = [not faults(t, r) for t, r in zip(reference.texts, reference.finish_reasons, strict=True)]
            pairs += [pair for pair, ok in zip(zip(reference.prompts, reference.completions, strict=True), sound, strict=True) if ok]
        if not pairs:
            raise PPOError("ppo.ptx_coef needs replies people wrote, or a reference whose replies are sound: set it to 0")
        self.model, self.chosen = model, min(config.ptx_replies, len(pairs))
        blank = [[0.0] * len(r) for _, r in pairs]
        self.batch = rollout.collect(
            [p for p, _ in pairs], [r for _, r in pairs], texts=[""] * len(pairs), finish_reasons=["stop"] * len(pairs),
            logprobs=blank, group=1, pad_id=model.pad_id, device=model.device,
        )  # fmt: skip

    def loss(self, policy: str, rng: random.Random) -> Tensor:
        """-E[log pi(y|x)] in nats a token, over some of the replies."""
        rows = torch.tensor(rng.sample(range(len(self.batch)), self.chosen), device=self.model.device)
        logprobs = rollout.reply_logprobs(self.model, self.batch, rows, policy, 1.0)
        return -masked_mean(logprobs, self.batch.mask[rows, : logprobs.shape[1]])


def train_ppo(
    model: CausalModel,
    tokenizer: ChatTokenizer,
    reward: RewardModel,
    *,
    prompts: Sequence[Sequence[int]],
    policy: str,
    config: PPOConfig,
    start: str | None = None,
    reference: str | None = None,
    judges: RewardModel | None = None,
    demonstrations: Sequence[tuple[Sequence[int], Sequence[int]]] = (),
    seed: int = 0,
    schedule: Sequence[float] = (),
    progress: Callable[[float, str], None] | None = None,
    on_update: Callable[[dict[str, Any]], None] | None = None,
) -> PPOResult:
    """Improve adapter `policy` on `prompts` (token ids, generation prompt included) and leave the kept state in it.

    start: the adapter it begins as a copy of; None for a new one that changes nothing. reference: the adapter that the
    KL is measured against; None for the bare base. judges: held-out reward members, which are looked at and never
    optimised: where they and `reward` part, the run stops and goes back to where the judges liked it best.
    demonstrations: (prompt, reply) token ids that the policy shall go on finding likely, where `ptx_coef` asks for it.
    A start over the KL ceiling is left for the reference, and the result's `note` says so. schedule: `done` of every row of another
    run's history, which is then run again as it was, however fast; empty: as updates, tokens and seconds are used up.
    Raises PPOError or RewardDiverged when a number is not finite, PPOError when no prompt fits.
    """
    began, config = time.monotonic(), served(config, model.sampling)
    fitting = [list(p) for p in prompts if len(p) + config.max_new_tokens <= model.max_context]
    if not fitting:
        raise PPOError(
            "no prompt leaves room for a reply in the model's context: lower ppo.max_new_tokens or use shorter prompts"
        )

    # 1. An engine to sample with, the reference's own replies as the unit of the score, the policy and its optimiser.
    ceiling = config.kl_ceiling * config.kl_target
    room = max(map(len, fitting)) + config.max_new_tokens
    size = config.prompts_per_update * config.replies_per_prompt
    engine = Engine(model, tokenizer, max_sequences=size, max_context=room)
    draw, end_ids = prompt_batches(fitting, config.prompts_per_update, seed), tuple(sorted(i for i in {*tokenizer.eos_ids, *model.eos_ids} if 0 <= i < model.vocab_size))  # as with the pad token, some configs name rows that are not there

    def sample(version: str, asked: Sequence[Sequence[int]], number: int, group: int = config.replies_per_prompt) -> Trajectories:
        try:
            return rollout.sample(
                engine, asked, version=version, group=group, max_tokens=config.max_new_tokens,
                temperature=config.temperature, seed=seed * 1_000_003 + number * max(size, UNIT * config.replies_per_prompt),
            )  # fmt: skip
        except FloatingPointError as error:
            raise PPOError(str(error)) from error

    def against_reference(batch: Trajectories) -> Compared:
        found = reading.against(batch, policy)
        if not bool(found.kl.isfinite().all()):
            raise PPOError("the KL divergence from the reference is not a finite number")
        return found

    asked = random.Random(f"unit/{seed}").sample(fitting, min(UNIT, len(fitting)))
    fitted = FittedValue(reward) if config.estimator == "gae-ls" else None
    reading = Reading(model, reference, config, fitted, reward, *([judges] if judges else []))
    unit, seen = reading.of(sample(reference or BASE, asked, 0))
    fault_price = FaultPrice(config.broken_penalty, max(broken_share(fault_tokens(unit, tokenizer), len(unit)), 0.5 / len(unit)))
    note = None
    begin(model, policy, start, config, seed)
    if start != reference:
        far = float(against_reference(sample(policy, next(draw), 1)).kl.sum(1).mean())
        if far > ceiling:
            note = f"began at the reference: the live version is {far:.1f} nats from it, over the ceiling of {ceiling:.1f}"
            model.lora.delete(policy)
            begin(model, policy, reference, config, seed)
            start = reference
    begun = None if start == reference else reading.of(sample(policy, asked, 0), value=False)[0]
    scorer = Scorer(reward, unit, begun)
    judge = None if judges is None else Scorer(judges, unit, begun)
    mixed = Mixed(model, tokenizer, demonstrations, unit, config) if config.ptx_coef else None
    value = TrainedValue(model, reward, scorer) if config.estimator == "gae" else None
    if fitted is not None:
        assert seen is not None
        came = lower_bound(scorer.unit, config).to(seen.device)
        fitted.fit(fitted.beside(seen, came, unit.group), came[:, None].expand(unit.mask.shape), unit.mask)
    trained = list(model.lora.parameters(policy).values())
    groups = [{"params": trained, "lr": config.lr}]
    if value is not None:
        groups.append({"params": value.trained(), "lr": config.value_lr})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0)
    peak = [group["lr"] for group in optimizer.param_groups]
    controller = KLController(config.kl_coef * kl_price(config.kl_target), config.kl_target, config.kl_horizon)

    history: list[dict[str, Any]] = []
    kept = Kept(model, policy)
    judged, finalists = Judged(config.patience, config.part), Finalists()

    def scored(batch: Trajectories) -> tuple[Tensor, Tensor]:
        """(B, members) by the reward model, (B,) what it comes to: a lower confidence bound, less what a cut reply costs."""
        members = scorer(batch)
        return members, lower_bound(members, config).to(batch.mask.device) - config.missing_eos_penalty * batch.cut

    def worth(batch: Trajectories, scores: Tensor, spans: Sequence[tuple[int, int, int]], kl: float) -> float:
        """What a batch comes to at the least prices of a fault and a nat, the same for the whole run."""
        return float(scores.mean()) - config.broken_penalty * broken_share(spans, len(batch)) - controller.least * kl

    def worth_of(state: Kept) -> float:
        """The same on the unit's prompts, with seeds that are the same for all, while `state` is the policy."""
        if progress is not None:
            progress(1.0, f"how good update {state.update} was, on prompts that the best few all answer")
        batch = sample(policy, asked, 1, FINAL)
        return worth(batch, scored(batch)[1], fault_tokens(batch, tokenizer), state.kl)

    last = config.updates
    stopped, backed_off, moved, practised, first_lap = "", 0, False, 0, time.monotonic()
    try:
        for update in range(last + 1):  # the last turn only measures what the last update made
            # What share of the run is over, by whichever of its limits is nearest: steps and KL target follow it.
            lap = time.monotonic()
            used = {
                f"all {last} updates done": update / last, f"{config.tokens} tokens were practised": practised / config.tokens,
                f"{config.max_seconds:g} s were up": (lap - first_lap) / config.max_seconds,
            }  # fmt: skip
            limit = max(used, key=lambda name: used[name])
            done = (*schedule, 1.0)[min(update, len(schedule))] if schedule else used[limit]
            final = done >= 1

            # 2. Rollouts: the policy's own replies, by the engine.
            batch = sample(policy, next(draw), update + 2)

            # 3. Log-probabilities of what was sampled, under the policy and the reference, by the training pass.
            found = against_reference(batch)
            batch, old = found.batch, found.logprobs
            kl, kl_reply = kl_k1(old, found.ref_logprobs), float(found.kl.sum(1).mean())
            beta = controller.price(kl_reply)

            # 4. Score: lower confidence bound over the members, less what a cut reply costs; a fault costs where it shows.
            members, scores = scored(batch)
            spans = fault_tokens(batch, tokenizer)
            broken = fault_rewards(spans, batch.mask, fault_price.price)  # (B, R)
            row: dict[str, Any] = {
                "update": update, "done": done, "score": float(members.mean()), "disagreement": float(deviation(members).mean()), "reward": float((scores + broken.sum(1)).mean()),
                "kl": kl_reply, "kl_coef": controller.beta, "kl_price": beta, "fault_price": fault_price.price, "entropy": float(masked_mean(found.entropy, batch.mask)),
                "length": float(batch.lengths.float().mean()), "cut": float(batch.cut.float().mean()),
                "broken": broken_rate(zip(batch.texts, batch.finish_reasons, strict=True)), "distinct2": distinct_n(batch.texts, 2),
                "engine_gap": float((batch.engine_logprobs - old).abs().max()),
            }  # fmt: skip
            if judge is not None and (update % config.judge_every == 0 or final):
                row["judges"] = float(judge(batch).mean())

            # 5. Is this policy worth keeping? Led over the ceiling by the last update: go back, and on from there at a higher
            # price. (What was gone back to may measure over it too, on other prompts: then the price brings it down.)
            # Parted from the held-out members: stop. Else it may be the best so far, which is what the run leaves.
            if kl_reply > ceiling and moved:
                history.append(row | {"seconds": time.monotonic() - lap})
                kept.restore()
                if backed_off == config.back_offs or final:
                    kept = finalists.best(worth_of) or kept
                    stopped = f"KL {kl_reply:.1f} nats is over the ceiling of {ceiling:.1f}: went back to update {kept.update}"
                    break
                backed_off += 1
                controller.update(kl_reply, len(batch), done)
                optimizer.state.clear()  # its momentum points over the ceiling
                moved = False
                continue
            parted = "judges" in row and judged.parted(row["judges"], row["score"])
            if parted:
                history.append(row)
                if judged.best is not None:
                    kept = judged.best
                stopped = f"held-out reward members no longer agree that it improves: went back to update {kept.update}"
                break
            made = update if moved else kept.update  # what was gone back to is as many updates old as it was
            kept = Kept(model, policy, made, row["kl"], batch.texts[0])
            finalists.look(worth(batch, scores, spans, kl_reply), kept)
            if "judges" in row and judged.newest_is_best:
                judged.best = kept
            if final:
                history.append(row | {"seconds": time.monotonic() - lap})
                kept = finalists.best(worth_of) or kept
                stopped = limit if update == last else f"{limit} after {update} updates"
                stopped += "" if kept.update == made else f": went back to update {kept.update}, the best of them"
                break

            # 6. Rewards a token, then advantages.
            returns = old_values = None
            unit_of = 1.0  # what a score's unit is divided by on its way to an advantage: so is the cost of ending too soon
            if value is not None:
                rewards = token_rewards(scores, kl, batch.mask, beta) + broken
                if config.whiten_rewards:
                    unit_of = float(masked_var(rewards, batch.mask).sqrt().clamp(min=LEAST_UNIT))
                    rewards = whiten(rewards, batch.mask, shift_mean=False)
                with torch.no_grad():
                    (old_values,) = rollout.over(model, batch, config.chunk_tokens, lambda r: (value(batch, r),))  # noqa: B023
                advantages, returns = gae(rewards, old_values, batch.mask, config.gamma, config.lam)
                row["explained_variance"] = explained(returns, old_values, batch.mask)
            else:  # each token answers for its own KL alone: far less noise than charging every token with all that follows
                if fitted is not None:
                    rewards = token_rewards(scores, kl, batch.mask, 0.0) + broken
                    _, total = gae(rewards, torch.zeros_like(rewards), batch.mask, config.gamma, 1.0)  # what came, nothing foreseen
                    assert found.seen is not None
                    seen = fitted.beside(found.seen, total[:, 0], batch.group)
                    guess = fitted(seen)  # (B, R)
                    better, _ = gae(rewards, guess, batch.mask, config.gamma, config.lam)
                    row["explained_variance"] = explained(total, guess, batch.mask)
                    fitted.fit(seen, total, batch.mask)
                else:
                    each = leave_one_out(scores, batch.group) if config.estimator == "rloo" else scores - scores.mean()
                    better = each[:, None] + fault_advantages(spans, batch.mask, fault_price.price, config.fault_decay)
                advantages = torch.where(batch.mask, better - beta * kl, 0.0)
            if config.whiten_advantages:
                unit_of *= float(masked_var(advantages, batch.mask).sqrt().clamp(min=LEAST_UNIT))
                advantages = whiten(advantages, batch.mask)
            ends, outside = Endings.of(batch, tokenizer, end_ids, fault_price.price / unit_of), Outside(found.nucleus, config.outside_penalty * fault_price.price / unit_of)

            # 7. A few passes of clipped updates over minibatches.
            for group, top in zip(optimizer.param_groups, peak, strict=True):
                group["lr"] = top * max(0.1, 1 - done) * min(1.0, (update + 1) / config.warmup)
            row |= learn(
                model, policy, value, mixed, batch, old, advantages, ends, outside, old_values, returns, optimizer, trained, config,
                random.Random(f"{seed}/{update}"),
            )  # fmt: skip
            moved = True

            # 8. What a nat and a fault cost from here on, and the log.
            controller.update(kl_reply, len(batch), done)
            fault_price.update(broken_share(spans, len(batch)))
            practised += int(batch.lengths.sum())
            row |= {"seconds": time.monotonic() - lap, "tokens_per_second": float(batch.lengths.sum()) / (time.monotonic() - lap)}
            history.append(row)
            if on_update is not None:
                on_update(row)
            if progress is not None:
                progress(max(done, (update + 1) / (last + 1)), f"update {update + 1} of at most {last}, KL {kl_reply:.1f} nats")
    finally:
        kept.restore()
        if value is not None:
            model.lora.delete(VALUE)
    return PPOResult(policy, history, stopped, kept.update, kept.kl, time.monotonic() - began, kept.sample, note)


def deviation(members: Tensor) -> Tensor:
    """(B, members) -> (B,): their standard deviation, 0 where there is one."""
    return members.std(1) if members.shape[1] > 1 else torch.zeros(len(members))


def lower_bound(members: Tensor, config: PPOConfig) -> Tensor:
    """(B, members) -> (B,): the score that is optimised, their mean less `uncertainty` deviations (Coste et al. 2023)."""
    return members.mean(1) - config.uncertainty * deviation(members)


def explained(returns: Tensor, values: Tensor, mask: Tensor) -> float:
    """Share of the returns' variance that the values foresee; below 0 where they mislead."""
    return float(1 - masked_var(torch.where(mask, returns - values, 0.0), mask) / masked_var(returns, mask).clamp(min=1e-8))


def begin(model: CausalModel, policy: str, start: str | None, config: PPOConfig, seed: int) -> None:
    """Make adapter `policy`: a copy of `start`, or for None a new one that changes nothing."""
    if start is None:
        model.lora.create(policy, r=config.lora_r, alpha=config.lora_alpha, seed=seed)
    else:
        model.lora.copy(start, policy, trainable=True)


def learn(
    model: CausalModel, policy: str, value: TrainedValue | None, mixed: Mixed | None, batch: Trajectories, old: Tensor, advantages: Tensor,
    ends: Endings, outside: Outside, old_values: Tensor | None, returns: Tensor | None, optimizer: torch.optim.Optimizer, trained: list[nn.Parameter],
    config: PPOConfig, rng: random.Random,
) -> dict[str, float]:  # fmt: skip
    """Epochs of minibatches over one rollout batch; each is gone through in chunks of like length, one step a minibatch.

    old, advantages, old_values, returns: (B, R). The policy's loss is the clipped one, and what it is expected to pay for ending too soon and for what
    the reference would not say. Returns the mean figures. Raises PPOError when one is not finite, or the ratio explodes.
    """
    totals: dict[str, float] = {}
    steps = 0
    count = min(config.minibatches, len(batch))
    for _ in range(config.epochs):
        rows = list(range(len(batch)))
        rng.shuffle(rows)
        for part in (rows[i::count] for i in range(count)):
            tokens = batch.mask[part].sum()
            figures: dict[str, float] = {}
            optimizer.zero_grad()
            for chunk in rollout.passes(model, batch, part, config.chunk_tokens):
                new, ending, strange = rollout.reply_chances(model, batch, chunk, policy, config.temperature, ends.ids, outside.nucleus)
                mask = batch.mask[chunk, : new.shape[1]]
                share = mask.sum() / tokens  # chunk means add up to the minibatch's mean over tokens
                cols = slice(0, new.shape[1])
                clipped = policy_loss(new, old[chunk, cols], advantages[chunk, cols], mask, config.clip)
                ended, left = masked_mean(ending * ends.costs[chunk, cols], mask), masked_mean(strange, mask)
                loss = (clipped.loss + ended + outside.price * left) * share
                parts = {"policy_loss": clipped.loss, "end_cost": ended, "outside": left, "clipfrac": clipped.clipfrac, "ratio": clipped.mean, "step_kl": clipped.kl}
                if value is not None and old_values is not None and returns is not None:
                    v = value_loss(value(batch, chunk), old_values[chunk, cols], returns[chunk, cols], mask, config.value_clip)
                    loss, parts = loss + v.loss * share, parts | {"value_loss": v.loss, "value_clipfrac": v.clipfrac}
                loss.backward()
                for name, figure in parts.items():
                    figures[name] = figures.get(name, 0.0) + float(figure.detach() * mask.sum())
            figures = {name: total / float(tokens) for name, total in figures.items()}
            if mixed is not None:
                likely = mixed.loss(policy, rng)
                (config.ptx_coef * likely).backward()
                figures["ptx_loss"] = float(likely.detach())
            norm = nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
            if value is not None:
                nn.utils.clip_grad_norm_(value.trained(), config.max_grad_norm)
            figures["grad_norm"] = float(norm)
            if bad := [name for name, figure in figures.items() if not math.isfinite(figure)]:
                raise PPOError(f"{bad[0]} is not a finite number: the run is dropped before it can change the policy")
            if figures["ratio"] > RATIO_LIMIT:
                raise PPOError(f"what was sampled has become {figures['ratio']:.0f} times as likely within one batch: the run is dropped; lower ppo.lr")
            optimizer.step()
            steps += 1
            for name, total in figures.items():
                totals[name] = totals.get(name, 0.0) + total
    return {name: total / steps for name, total in totals.items()}


def prompt_batches(prompts: list[list[int]], count: int, seed: int) -> Iterator[list[list[int]]]:
    """Batches of `count` prompts without end: every prompt comes once before any comes again."""
    rng = random.Random(f"prompts/{seed}")
    left: list[list[int]] = []
    while True:
        chosen: list[list[int]] = []
        while len(chosen) < count:
            if not left:
                left = rng.sample(prompts, len(prompts))
            chosen.append(left.pop())
        yield chosen
