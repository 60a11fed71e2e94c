"""The benchmark of growth: its exponents, and that its bulk-filled store is what the store itself would have written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.filling import fill
from benchmarks.growth import Curve, exponent
from store import Store
from store.records import NewComparison


def test_exponents_are_those_of_power_laws() -> None:
    sizes = [1, 2, 4, 8, 16, 32]
    for power in (0.0, 0.5, 1.0, 2.0):
        assert exponent(sizes, [0.003 * n**power for n in sizes]) == pytest.approx(power)


def test_a_floor_at_small_sizes_does_not_hide_what_comes_after_it() -> None:
    sizes = [1, 10, 100, 1_000, 10_000, 100_000]
    quadratic = Curve("late", sizes, [max(1.0, (n / 1_000) ** 2) for n in sizes])
    assert quadratic.exponent > 1.5 and not quadratic.met
    assert Curve("flat", sizes, [1.0, 1.1, 0.9, 1.0, 1.05, 1.0], "flat").met
    assert not Curve("grows", sizes, [1.0, 1.0, 1.0, 2.0, 5.0, 20.0], "flat").met
    assert Curve("linear", sizes, [float(n) for n in sizes]).met


def test_a_filled_store_holds_what_votes_one_by_one_would_have_left(tmp_path: Path) -> None:
    with Store.open(tmp_path / "filled") as filled, Store.open(tmp_path / "voted") as voted:
        fill(filled, 0, 3, ["ann", "bob"], voted=True)
        fill(filled, 3, 2, ["ann", "bob"], voted=True)
        for item in filled.voted_comparisons():
            c = item.comparison
            voted.record_comparison(NewComparison(c.id, c.conversation_id, c.voter, c.messages, c.settings, c.completions))
            voted.record_vote(c.id, item.vote.voter, groups=item.vote.groups, kind=item.vote.kind)
        bare = [
            [(replace(v.comparison, created=0.0, votes=()), replace(v.vote, id="", created=0.0)) for v in store.voted_comparisons()]
            for store in (filled, voted)
        ]
        assert bare[0] == bare[1] and len(bare[0]) == 5
        assert filled.counts() == voted.counts()
        assert [c.id for c in filled.conversations()] == [f"conv_{i}" for i in (4, 3, 2, 1, 0)]
