"""The scoreboard against a plain list of the standing votes that is read whole for every question."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.abtest import pair_outcome
from server.scoreboard import Scoreboard

VERSIONS = {"c1": ("base", "v1"), "c2": ("v1", "v2", "v1"), "c3": ("v2", "base", "v1"), "c4": ("v1", "v1")}  # of each comparison's replies
CREATED = {"c1": 1.0, "c2": 2.0, "c3": 3.0, "c4": 4.0}
deeds = st.lists(st.tuples(
    st.sampled_from(["put", "put", "put", "drop", "drop all"]), st.sampled_from(sorted(VERSIONS)), st.sampled_from(["ann", "bob"]), st.integers(0, 2)
), max_size=25)  # fmt: skip


@given(deeds, st.sampled_from([0.0, 2.0, 3.5]))
def test_it_answers_as_a_list_of_all_standing_votes_would(done: list[tuple[str, str, str, int]], since: float) -> None:
    board, standing = Scoreboard(), dict[tuple[str, str], tuple[tuple[int, ...], ...]]()
    for deed, comparison, voter, best in done:
        every = range(len(VERSIONS[comparison]))
        groups = ((best % len(every),), tuple(i for i in every if i != best % len(every)))
        if deed == "put":
            board.put(comparison, voter, CREATED[comparison], VERSIONS[comparison], groups)
            standing.pop((comparison, voter), None)
            standing[comparison, voter] = groups
        elif deed == "drop":
            board.drop(comparison, voter)
            standing.pop((comparison, voter), None)
        else:
            board.drop(comparison)
            standing = {key: groups for key, groups in standing.items() if key[0] != comparison}
    for first, second in (("base", "v1"), ("v1", "base"), ("v1", "v2"), ("v2", "base"), ("v1", "v9")):
        found = [pair_outcome(VERSIONS[c], groups, first, second) for (c, _), groups in standing.items() if CREATED[c] >= since]
        assert board.outcomes(first, second, since=since) == [outcome for outcome in found if outcome is not None]
    for version in ("base", "v1", "v2"):
        met = {other: sum({version, other} <= set(VERSIONS[c]) for c, _ in standing) for other in {"base", "v1", "v2"} - {version}}
        assert board.opponents(version) == sorted((v for v in met if met[v]), key=lambda v: (-met[v], v))
