"""Reference numbers for the learner's losses, from the lines that TRL and torchtune themselves run.

`PYTHON benchmarks/reference_losses.py --torchtune WHEEL` with a Python that has `trl` (made with 1.12.0) and the wheel of
torchtune (0.6.1; `pip download torchtune --no-deps`; it is read where it lies). Neither is a dependency of Plaudit. Writes `tests/data/reference_losses.json`, which `tests/test_conformance_formulas.py` reads.

TRL keeps most of its arithmetic inside trainer methods. Nothing of it is written out again here: `run_lines` takes the
lines out of the installed method and runs them on seeded numbers, and fails when a new version no longer has them.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import math
import sys
import textwrap
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

OUT = Path(__file__).parents[1] / "tests" / "data" / "reference_losses.json"
END, PAD, VOCAB = 1, 0, 7
LENGTHS = [8, 8, 5, 1, 6, 3]  # tokens of each reply, the end token included; the first one was cut and has none


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torchtune", type=Path, required=True, help="torchtune-VERSION-py3-none-any.whl")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    import trl

    tune = torchtune_rlhf(args.torchtune)
    made_with = {"trl": trl.__version__, "torchtune": args.torchtune.name.split("-")[1], "torch": torch.__version__}
    report = {
        "made_with": made_with, "end": END, "pad": PAD,
        "trl_ppo": {
            "ragged": trl_ppo(0, LENGTHS), "ragged, discounted, k3": trl_ppo(1, LENGTHS, gamma=0.97, lam=0.8, kl_estimator="k3"),
            "ragged, rewards not whitened": trl_ppo(2, LENGTHS, whiten_rewards=False),
            "full": trl_ppo(3, [8] * 6, gamma=0.97, lam=0.9, whiten_rewards=False),
            "full, whitened": trl_ppo(4, [8] * 6),
            "undiscounted": trl_ppo(5, LENGTHS, gamma=1.0, lam=1.0, whiten_rewards=False),
            "pad is end": trl_ppo(6, LENGTHS, pad=END),
        },
        "trl_rloo": trl_rloo(7), "trl_reward": trl_reward(8), "trl_dpo": trl_dpo(9),
        "torchtune": tune_ppo(10, tune), "torchtune_stop": tune_stop(tune), "torchtune_dpo": tune_dpo(9),
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(plain(report), separators=(",", ":")) + "\n", "utf-8")
    print(f"{args.out}: {args.out.stat().st_size} bytes, {made_with}")


def run_lines(method: Callable[..., Any], first: str, last: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run the lines of `method` from the first that begins with `first` to the next that begins with `last`, both included.

    names: what the lines use; module globals of the method are there too. Returns the names afterwards. A statement that
    goes on over more lines is taken whole where `last` begins its last line. Raises ValueError when the lines are not there.
    """
    lines = inspect.getsource(method).split("\n")
    starts = [i for i, line in enumerate(lines) if line.strip().startswith(first)]
    ends = [i for i, line in enumerate(lines) if starts and i >= starts[0] and line.strip().startswith(last)]
    if not starts or not ends:
        raise ValueError(f"{method.__qualname__} no longer has the lines {first!r} to {last!r}: read it again")
    space = dict(method.__globals__) | names
    exec(textwrap.dedent("\n".join(lines[starts[0] : ends[0] + 1])), space)
    return space


def numbers(seed: int) -> Callable[..., Tensor]:
    """A source of float64 normal numbers with 4 decimals, so that the file stays small."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).mul(1e4).round().div(1e4)


def trl_ppo(seed: int, lengths: list[int], pad: int = PAD, **changes: Any) -> dict[str, Any]:
    """`PPOTrainer.train` of trl.experimental.ppo from sampled replies to its two losses and their gradients.

    logits: (B, T + 1, V), those that chose the reply tokens and one more, which the trainer drops; replies: (B, T), what
    was sampled after the end token included. values: (B, T); new_values: (B, T + 1).
    """
    from trl.experimental.ppo.ppo_trainer import PPOTrainer, first_true_indices, truncate_response

    settings: dict[str, Any] = {
        "gamma": 1.0, "lam": 0.95, "kl_coef": 0.3, "kl_estimator": "k1", "whiten_rewards": True, "missing_eos_penalty": 0.7,
        "cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1, "temperature": 0.7,
    } | changes  # fmt: skip
    args, draw = SimpleNamespace(**settings), numbers(seed)
    size, wide = len(lengths), max(lengths)
    replies = torch.randint(2, VOCAB, (size, wide), generator=torch.Generator().manual_seed(seed))
    for row, length in enumerate(lengths[1:], start=1):
        replies[row, length - 1] = END  # what follows was sampled and does not count
    logprobs, ref_logprobs = -draw(size, wide).abs(), -draw(size, wide).abs()
    values, scores = draw(size, wide), draw(size)
    shown: dict[str, Any] = {
        "settings": settings, "replies": replies, "logprobs": logprobs, "ref_logprobs": ref_logprobs, "values": values, "scores": scores,
    }  # fmt: skip

    kept = truncate_response(END, pad, replies)
    names = run_lines(
        PPOTrainer.train, "# Response Processing 3.", "advantages = torch.masked_fill(", {
            "self": SimpleNamespace(processing_class=SimpleNamespace(eos_token_id=END), args=args), "args": args, "responses": replies,
            "postprocessed_responses": kept, "sequence_lengths": first_true_indices(kept == pad) - 1,
            "scores": scores.clone(), "logprobs": logprobs.clone(), "ref_logprobs": ref_logprobs.clone(), "values": values.clone(),
        },
    )  # fmt: skip
    outputs = {
        "has_end": names["contain_eos_token"], "scores": names["scores"], "mask": ~names["padding_mask"], "mask_p1": ~names["padding_mask_p1"],
        "kl": names["kl"], "rewards": names["rewards"], "returns": names["returns"], "advantages": names["advantages"],
    }  # fmt: skip

    logits, new_values = draw(size, wide + 1, VOCAB), values.new_zeros(size, wide + 1)
    new_values[:, :wide] = values + 0.3 * draw(size, wide)
    with torch.no_grad():  # an old policy near enough to the new one that some ratios are clipped and some are not
        near = (logits[:, :-1] / settings["temperature"]).log_softmax(-1).gather(2, replies[..., None])[..., 0]
    old = torch.where(names["padding_mask"], 1.0, near + (0.3 * draw(size, wide)).mul(1e4).round() / 1e4)
    shown |= {"logits": logits.clone(), "old_logprobs": old, "new_values": new_values}
    logits, new_values = logits.requires_grad_(), new_values.requires_grad_()
    update = names | {
        "output": SimpleNamespace(logits=logits * 1), "context_length": 1, "mb_responses": replies, "micro_batch_inds": torch.arange(size),
        "vpred_temp": new_values[..., None], "mb_values": names["values"], "mb_return": names["returns"],
        "mb_logprobs": old, "mb_advantage": names["advantages"],
    }  # fmt: skip
    done = run_lines(PPOTrainer.train, "logits = output.logits[", "loss = pg_loss + args.vf_coef * vf_loss", update)
    done = run_lines(PPOTrainer.train, "pg_clipfrac = masked_mean(", ")", done)
    outputs |= {
        "new_logprobs": done["new_logprobs"], "policy_loss": done["pg_loss"], "value_loss": done["vf_loss"], "value_clipfrac": done["vf_clipfrac"],
        "policy_clipfrac": done["pg_clipfrac"],
        "logits_grad": torch.autograd.grad(done["pg_loss"], logits, retain_graph=True)[0],
        "values_grad": torch.autograd.grad(done["vf_loss"], new_values)[0],
    }  # fmt: skip
    return shown | {"out": outputs}


def trl_rloo(seed: int) -> dict[str, Any]:
    """`RLOOTrainer` from scores to its loss: KL of the whole reply in the reward, leave-one-out, one ratio a reply."""
    from trl import RLOOTrainer

    draw, group, size, wide = numbers(seed), 3, 6, 5
    logprobs, ref_logprobs, new = -draw(size, wide).abs(), -draw(size, wide).abs(), -draw(size, wide).abs()
    new, scores = logprobs + 0.1 * new, draw(size)
    mask = torch.arange(wide) < torch.tensor([[5], [3], [4], [1], [5], [2]])
    lines = "rewards = (rewards_per_func", "advantages = torch.nan_to_num("
    for normalize in (True, False):
        names = run_lines(RLOOTrainer._generate_and_score_completions, *lines, {
            "self": SimpleNamespace(
                reward_weights=torch.ones(1, dtype=torch.float64), reward_clip_range=None, beta=0.3, normalize_advantages=normalize
            ),
            "device": "cpu", "rewards_per_func": scores[:, None], "unscorable_mask": torch.zeros(size, dtype=torch.bool), "gather": lambda x: x,
            "num_generations": group, "completion_mask": mask, "old_per_token_logps": logprobs, "ref_per_token_logps": ref_logprobs,
        })  # fmt: skip
        if normalize:
            normalized = names["advantages"]
    done = run_lines(RLOOTrainer._compute_loss, "logps = (per_token_logps", "loss = per_sequence_loss.mean()", {
        "self": SimpleNamespace(epsilon_low=0.2, epsilon_high=0.2), "per_token_logps": new, "completion_mask": mask,
        "inputs": {"old_logps": (logprobs * mask).sum(1), "advantages": names["advantages"]},
    })  # fmt: skip
    return {
        "group": group, "beta": 0.3, "clip": 0.2, "scores": scores, "logprobs": logprobs, "ref_logprobs": ref_logprobs, "new_logprobs": new, "mask": mask,
        "out": {"advantages": names["advantages"], "normalized": normalized, "loss": done["loss"]},
    }  # fmt: skip


def trl_reward(seed: int) -> dict[str, Any]:
    """`RewardTrainer.compute_loss` on chosen and rejected scores."""
    from trl import RewardTrainer

    draw = numbers(seed)
    chosen, rejected = 3 * draw(6), 3 * draw(6)
    line = "loss = -nn.functional.logsigmoid(rewards_chosen - rewards_rejected).mean()"
    done = run_lines(RewardTrainer.compute_loss, line, line, {"rewards_chosen": chosen, "rewards_rejected": rejected})
    return {"chosen": chosen, "rejected": rejected, "out": {"loss": done["loss"]}}


def dpo_inputs(seed: int) -> dict[str, Tensor]:
    """Log-probabilities (B,) of whole replies."""
    draw = numbers(seed)
    return {name: -20 - 5 * draw(5) for name in ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")}


def trl_dpo(seed: int) -> dict[str, Any]:
    """`DPOTrainer._compute_loss`, sigmoid, one loss a pair."""
    from trl import DPOTrainer

    names = dpo_inputs(seed)
    this = SimpleNamespace(beta=0.2, f_divergence_type="reverse_kl")
    ratios = run_lines(DPOTrainer._compute_loss, "chosen_logratios = ", "rejected_logratios = ", dict(names))
    ratios["delta_score"] = ratios["chosen_logratios"] - ratios["rejected_logratios"]  # what "reverse_kl" makes of them
    line = "per_sequence_loss = -F.logsigmoid(self.beta * delta_score)"
    done = run_lines(DPOTrainer._compute_loss, line, line, ratios | {"self": this})
    return {"beta": 0.2, **names, "out": {"losses": done["per_sequence_loss"]}}


def torchtune_rlhf(wheel: Path) -> Any:
    """`torchtune.rlhf` out of a wheel, without the rest of torchtune, which wants packages that this does not need."""
    for name, where in (("torchtune", wheel / "torchtune"), ("torchtune.data", wheel / "nowhere")):
        module = types.ModuleType(name)
        module.__path__ = [str(where)]
        sys.modules[name] = module
    sys.modules["torchtune.data"].CROSS_ENTROPY_IGNORE_IDX = -100  # type: ignore[attr-defined]
    rlhf = importlib.import_module("torchtune.rlhf")
    sys.modules["torchtune"].rlhf = rlhf  # type: ignore[attr-defined]
    return rlhf


def tune_ppo(seed: int, tune: Any) -> dict[str, Any]:
    """`get_rewards_ppo`, `estimate_advantages`, `whiten` and `PPOLoss` of torchtune on ragged replies.

    torchtune's own recipe (ppo_full_finetune_single_device) puts the score on the last valid token and sets values,
    log-probabilities and the reward outside it to 0 or 1 first; so here.
    """
    ppo_loss = importlib.import_module("torchtune.rlhf.loss.ppo").PPOLoss(epsilon=0.2, value_clip_range=0.2, value_coeff=0.1)
    draw, lengths = numbers(seed), torch.tensor(LENGTHS)
    size, wide = len(lengths), int(lengths.max())
    mask = torch.arange(wide) < lengths[:, None]
    logprobs, ref_logprobs = (torch.where(mask, -draw(size, wide).abs(), 1.0) for _ in range(2))
    values, scores = torch.where(mask, draw(size, wide), 0.0), draw(size)
    new = torch.where(mask, logprobs + 0.3 * draw(size, wide), 1.0)
    new_values = torch.where(mask, values + 0.3 * draw(size, wide), 0.0)
    rewards, kl, _ = tune.get_rewards_ppo(scores, logprobs, ref_logprobs, 0.3, lengths - 1)
    advantages, returns = tune.estimate_advantages(values, rewards, 0.97, 0.9, masks=mask)
    new.requires_grad_(), new_values.requires_grad_()
    _, policy, value, _, clipfrac = ppo_loss(logprobs, new, advantages, values, new_values, returns, mask, mask)
    loss = ppo_loss(logprobs, new, advantages, values, new_values, returns, mask, mask)[0]
    grads = torch.autograd.grad(loss, (new, new_values))
    return {
        "kl_coef": 0.3, "gamma": 0.97, "lam": 0.9, "clip": 0.2, "value_clip": 0.2, "value_coeff": 0.1, "mask": mask, "scores": scores,
        "logprobs": logprobs, "ref_logprobs": ref_logprobs, "values": values, "new_logprobs": new, "new_values": new_values,
        "out": {
            "rewards": rewards, "kl": kl, "advantages": advantages, "returns": returns, "policy_loss": policy, "value_loss": value,
            "clipfrac": clipfrac, "new_logprobs_grad": grads[0], "new_values_grad": grads[1], "masked_mean": tune.masked_mean(values, mask),
            "masked_var": tune.masked_var(values - tune.masked_mean(values, mask), mask),
            "whiten": tune.whiten(rewards, mask), "whiten_without_shift": tune.whiten(rewards, mask, shift_mean=False),
        },
    }  # fmt: skip


def tune_stop(tune: Any) -> dict[str, Any]:
    """`truncate_sequence_at_first_stop_token`, two stop tokens, one of which is also what the rest is filled with."""
    stops = torch.tensor([END, 5])
    replies = torch.randint(0, VOCAB, (12, 8), generator=torch.Generator().manual_seed(11))
    replies[0] = torch.tensor([2, 3, 4, 2, 3, 4, 2, 3])  # never stops
    replies[1] = torch.tensor([2, 3, 4, 2, 3, 4, 2, 5])  # stops with its last token
    sampled = replies.clone()
    padding, kept = tune.truncate_sequence_at_first_stop_token(replies, stops, END)
    lengths = (~padding).sum(1)
    return {
        "stop_tokens": stops, "fill": END, "replies": sampled,
        "out": {"mask": ~padding, "kept": kept, "no_end": tune.get_reward_penalty_mask(padding, lengths)},
    }  # fmt: skip


def tune_dpo(seed: int) -> dict[str, Any]:
    """`DPOLoss` of torchtune on the numbers of `trl_dpo`."""
    names = dpo_inputs(seed)
    losses, _, _ = importlib.import_module("torchtune.rlhf.loss.dpo").DPOLoss(beta=0.2)(*names.values())
    return {"beta": 0.2, **names, "out": {"losses": losses}}


def plain(value: Any) -> Any:
    """Tensors as lists; floats with 10 significant digits. Raises ValueError for a number that is not finite."""
    if isinstance(value, Tensor):
        return plain(value.detach().tolist())
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("a reference number is not finite")
        return float(f"{value:.10g}")
    return value


if __name__ == "__main__":
    main()
