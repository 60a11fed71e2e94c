"""Over-optimisation: where a curve's gold peaks, and where the stop rule would have ended the run."""

from __future__ import annotations

from pathlib import Path

from benchmarks.overoptimisation import Gold, stops
from engine.model import CausalModel
from engine.tokenizer import ChatTokenizer
from learner.config import LearnerConfig
from learner.tastes import taste_named
from tests.test_ppo import spoken


def point(update: int, kl: float, gold: float, judges: float) -> dict[str, float]:
    return {"update": update, "kl": kl, "gold": gold, "judges": judges, "proxy": float(update)}


def test_the_judges_end_a_run_at_their_best_look() -> None:
    curve = [point(0, 0, 0, 0), point(3, 1, 1, 1), point(6, 2, 1.5, 2), point(9, 3, 1.2, 1.4), point(12, 4, 0.5, 1.2), point(15, 5, 0, 1)]
    found = stops(curve, LearnerConfig(), 64)
    assert found["peak"]["update"] == 6 and found["judges"]["update"] == 6 and found["stopped_at"]["update"] == 6
    assert found["before_the_turn"] and found["gold_lost_at_stop"] == 0 and found["gold_lost_by_the_end"] == 1.5


def test_the_kl_ceiling_ends_a_run_that_the_judges_like() -> None:
    curve = [point(0, 0, 0, 0), point(3, 3, 1, 1), point(6, 5, 0.8, 2), point(9, 30, -1, 3)]
    found = stops(curve, LearnerConfig(), 64)
    assert found["judges"] is None and found["stopped_at"]["update"] == 6
    assert not found["before_the_turn"] and abs(found["gold_lost_at_stop"] - 0.2) < 1e-9


def test_gold_is_the_taste_less_what_broken_text_costs(tiny_llama: Path) -> None:
    model, tokenizer = CausalModel.load(tiny_llama), ChatTokenizer.load(tiny_llama)
    base = spoken(model, tokenizer, ["One two three.", "One two three four five."], ["stop", "stop"])
    gold = Gold(taste_named("longer"), base)  # words: mean 4, deviation sqrt 2
    assert abs(gold("One two three four.") - 0.0) < 1e-9
    assert abs(gold("One two three the the.") - (1 / 2**0.5 - 3.0)) < 1e-9
    assert abs(gold.above_base(base)) < 1e-9
