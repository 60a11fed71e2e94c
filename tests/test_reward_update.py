"""The benchmark of reward training: its comparisons and its sums."""

from __future__ import annotations

from benchmarks.reward_update import PROMPT, REPLY, comparisons, summary


def test_a_comparison_of_k_ranked_replies_states_every_pair_of_them() -> None:
    for k, pairs in ((2, 1), (4, 6)):
        made = comparisons(5, k, 100)
        assert all(len(example.strict) == pairs for example in made)
        assert all(len(e.prompt_ids) == PROMPT and {len(c) for c in e.completions_ids} == {REPLY} for e in made)
        assert len({e.groups for e in comparisons(50, k, 100)}) > 1 and made == comparisons(5, k, 100)


def test_pairs_a_second_are_compared_and_the_target_is_that_of_k() -> None:
    row = summary("S", 2, 24, {"trl": (4.0, 1000), "ours": (2.0, 500)})
    assert (row["speed"], row["memory"], row["met"]) == (2.0, 0.5, True)
    assert row["pairs_per_s"] == {"trl": 6.0, "ours": 12.0}
    assert not summary("S", 4, 144, {"trl": (4.0, 1000), "ours": (2.0, 500)})["met"]
