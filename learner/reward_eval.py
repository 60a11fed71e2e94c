"""A round's saved reward model on a file of preferences: is it right about people it has not heard?

Owns finding and loading the saved model, telling rows it learned from apart, and the report; the figures themselves are
`learner/metrics.py`'s. Reads only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine.model import CausalModel
from engine.tokenizer import ChatTokenizer
from learner.config import RewardConfig
from learner.data import RankedExample, examples_from_votes, prompt_groups, prompt_key, split_folds
from learner.metrics import length_baseline, reward_report
from learner.reward import RewardModel
from store.errors import NoDatabase, NotFound
from store.preferences import Preference
from store.records import Comparison, Completion, Vote, VotedComparison
from store.rounds import RoundFiles
from store.store import Store

SAVED = "reward"  # in a round's directory
MIN_COMPARISONS = 8  # fewer than this are not judged
CHUNK = 64  # comparisons between two looks of the progress bar


def saved_round(files: RoundFiles, wanted: int | None = None) -> int:
    """Round `wanted`, or the newest, that saved a reward model and says which votes it learned from. Raises NotFound, naming those that did."""
    there = [r["round"] for r in files.records() if r.get("vote_ids") and (files.directory(r["round"]) / SAVED / "reward.json").is_file()]
    if not there:
        raise NotFound(f"no round in {files.root} has saved a reward model: one is saved once its votes are enough")
    if wanted is None:
        return there[-1]
    if wanted not in there:
        raise NotFound(f"round {wanted} has saved no reward model; these have: {', '.join(map(str, there[-20:]))}")
    return wanted


def load_reward(model: CausalModel, files: RoundFiles, n: int) -> tuple[RewardModel, dict[str, Any]]:
    """The reward model of round `n` on `model`, and the round's record.

    Raises NotFound when it was trained on another base, engine.lora.AdapterError.
    """
    record = files.read(n)
    if record["base_digest"] != model.digest:
        raise NotFound(f"the reward model of round {n} reads another base model ({record.get('base_model')}) than {model.source}")
    known = {f.name for f in dataclasses.fields(RewardConfig)}
    written = record["config"]["reward"]
    config = RewardConfig(**{name: value for name, value in written.items() if name in known})
    return RewardModel.load(model, config, files.directory(n) / SAVED), record


def learned_prompts(data_dir: Path, record: dict[str, Any]) -> set[str] | None:
    """Keys of the prompts whose votes the round learned from, replaced or withdrawn since or not; None where there is no database to tell."""
    try:
        with Store.open(data_dir, read_only=True) as store:
            return {prompt_key(comparison.messages) for comparison in store.voted_on(record["vote_ids"])}
    except NoDatabase:
        return None


def as_examples(preferences: Sequence[Preference], tokenizer: ChatTokenizer) -> list[RankedExample]:
    """Preferences as the votes they would be, in order; what the chat template refuses is left out."""
    voted = []
    for n, row in enumerate(preferences):
        pair = tuple(Completion(i, text, (), (), "imported", "stop", 0) for i, text in enumerate((row.chosen, row.rejected)))
        comparison = Comparison(f"row-{n}", f"row-{n}", row.voter, row.prompt, {}, 0.0, pair)
        voted.append(VotedComparison(comparison, Vote(f"row-{n}", n, comparison.id, row.voter, "favourite", ((0,), (1,)), None, None, 0.0)))
    return examples_from_votes(voted, tokenizer)


def evaluate_reward(
    reward: RewardModel, tokenizer: ChatTokenizer, preferences: Sequence[Preference], *, learned: set[str] | None = None,
    seed: int = 0, progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Accuracy with interval, ECE, Brier, the length-only baseline (cross-validated on the file) and the verdict in words.

    The score is the members' mean. Rows on prompts of `learned` are left out, as they would flatter it. Raises NotFound
    when nothing is left, or everything is on one prompt.
    """
    usable = as_examples(preferences, tokenizer)
    examples = [e for e in usable if e.prompt_key not in (learned or ())]
    rows = {"rows": len(preferences), "refused": len(preferences) - len(usable), "learned_from": len(usable) - len(examples)}
    if not examples:
        why = "the reward model learned from every prompt in it" if usable else "the chat template refuses every row"
        raise NotFound(f"nothing to test on: {why}")
    try:
        split = split_folds(examples, 4, seed)
    except ValueError:
        raise NotFound("all rows are on one prompt: give a file with several") from None
    scores: dict[int, list[float]] = {}
    for begin in range(0, len(examples), CHUNK):
        for s in reward.score_examples(examples[begin : begin + CHUNK]):
            scores[len(scores)] = s.mean(1).tolist()
        if progress is not None:
            progress(len(scores), len(examples))
    groups = [e.groups for e in examples]
    lengths = [[len(c) for c in e.completions_ids] for e in examples]
    baseline = length_baseline(lengths, groups, [(fold.train, fold.test) for fold in split.folds])
    tested = {i: s for i, s in scores.items() if i in baseline}
    report, verdict = reward_report(tested, baseline, groups, prompt_groups(examples)[0], MIN_COMPARISONS)
    return rows | report | {"may_train": verdict.may_train, "members": len(reward.members)}
