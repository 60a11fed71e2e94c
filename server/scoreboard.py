"""Who won against whom: outcomes of comparisons that showed more than one version, kept in memory.

Filled from the standing votes at start and kept up to date by votes, withdrawals and erasures. Owns no decision
(`abtest.py` judges) and no durability (`store/` has the votes).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from server.abtest import AbTest, judge, pair_outcome


@dataclass(frozen=True)
class Judged:
    """One standing vote on a comparison of several versions."""

    created: float  # when the comparison was made, Unix seconds
    versions: tuple[str, ...]  # of each completion
    groups: tuple[tuple[int, ...], ...]


class Scoreboard:
    """Standing votes by the two versions they compare, so that a question about two reads no other's. Event loop only."""

    def __init__(self) -> None:
        self._votes: dict[str, dict[str, Judged]] = {}  # comparison -> voter -> vote
        self._pairs: dict[tuple[str, str], dict[tuple[str, str], Judged]] = {}  # two versions -> (comparison, voter) -> vote

    def put(self, comparison_id: str, voter: str, created: float, versions: Iterable[str],
            groups: Iterable[Sequence[int]]) -> None:
        """Count this vote instead of the same voter's earlier one."""
        judged = Judged(created, tuple(versions), tuple(tuple(group) for group in groups))
        self.drop(comparison_id, voter)
        for pair in pairs(judged):
            self._votes.setdefault(comparison_id, {})[voter] = judged
            self._pairs.setdefault(pair, {})[comparison_id, voter] = judged

    def drop(self, comparison_id: str, voter: str | None = None) -> None:
        """Forget one voter's vote, or everybody's on that comparison."""
        votes = self._votes.get(comparison_id, {})
        for gone in [voter] if voter is not None else list(votes):
            if (judged := votes.pop(gone, None)) is not None:
                for pair in pairs(judged):
                    del self._pairs[pair][comparison_id, gone]
        if not votes:
            self._votes.pop(comparison_id, None)

    def outcomes(self, first: str, second: str, *, since: float = 0.0) -> list[float]:
        """Outcomes in [0, 1] of `first` against `second` in comparisons made after `since`, in voting order."""
        votes = self._pairs.get((min(first, second), max(first, second)), {}).values()
        found = (pair_outcome(v.versions, v.groups, first, second) for v in votes if v.created >= since)
        return [outcome for outcome in found if outcome is not None]

    def opponents(self, version: str) -> list[str]:
        """The versions it was mixed with, the most often judged first."""
        counts = {other: len(votes) for pair, votes in self._pairs.items() if version in pair and votes for other in pair if other != version}
        return sorted(counts, key=lambda v: (-counts[v], v))

    def test(self, first: str, second: str, *, since: float = 0.0, odds: float = 20.0) -> AbTest:
        """What the votes say about `first` against `second`."""
        return judge(self.outcomes(first, second, since=since), odds=odds)


def pairs(judged: Judged) -> Iterator[tuple[str, str]]:
    """Every two versions that the vote compares, in alphabetical order."""
    return combinations(sorted(set(judged.versions)), 2)
