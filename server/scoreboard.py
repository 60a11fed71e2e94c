"""Who won against whom: outcomes of comparisons that showed more than one version, kept in memory.

Filled from the standing votes at start and kept up to date by votes, withdrawals and erasures. Owns no decision
(`abtest.py` judges) and no durability (`store/` has the votes).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from server.abtest import AbTest, judge, pair_outcome


@dataclass(frozen=True)
class Judged:
    """One standing vote on a comparison of several versions."""

    created: float  # when the comparison was made, Unix seconds
    versions: tuple[str, ...]  # of each completion
    groups: tuple[tuple[int, ...], ...]


class Scoreboard:
    """Standing votes by comparison and voter. Used from the event loop only."""

    def __init__(self) -> None:
        self._votes: dict[tuple[str, str], Judged] = {}

    def put(self, comparison_id: str, voter: str, created: float, versions: Iterable[str],
            groups: Iterable[Sequence[int]]) -> None:
        """Count this vote instead of the same voter's earlier one."""
        judged = Judged(created, tuple(versions), tuple(tuple(group) for group in groups))
        self.drop(comparison_id, voter)
        if len(set(judged.versions)) > 1:
            self._votes[comparison_id, voter] = judged

    def drop(self, comparison_id: str, voter: str | None = None) -> None:
        """Forget one voter's vote, or everybody's on that comparison."""
        if voter is not None:
            self._votes.pop((comparison_id, voter), None)
            return
        for key in [key for key in self._votes if key[0] == comparison_id]:
            del self._votes[key]

    def outcomes(self, first: str, second: str, *, since: float = 0.0) -> list[float]:
        """Outcomes in [0, 1] of `first` against `second` in comparisons made after `since`, in voting order."""
        found = (pair_outcome(v.versions, v.groups, first, second) for v in self._votes.values() if v.created >= since)
        return [outcome for outcome in found if outcome is not None]

    def opponents(self, version: str) -> list[str]:
        """The versions it was mixed with, the most often judged first."""
        counts: dict[str, int] = {}
        for vote in self._votes.values():
            if version in vote.versions:
                for other in set(vote.versions) - {version}:
                    counts[other] = counts.get(other, 0) + 1
        return sorted(counts, key=lambda v: (-counts[v], v))

    def test(self, first: str, second: str, *, since: float = 0.0, odds: float = 20.0) -> AbTest:
        """What the votes say about `first` against `second`."""
        return judge(self.outcomes(first, second, since=since), odds=odds)
