"""Votes to examples, folds and digests."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.data import RankedExample, data_digest, deal, distinct, examples_from_votes, newest, split_folds


class Letters:
    """A tokenizer whose ids are character codes; it refuses a conversation that does not start with the user."""

    end_id = 0

    def render(self, messages: list[dict], *, generation_prompt: bool = True) -> list[int]:
        if messages[0]["role"] == "assistant":
            raise ValueError("must start with the user")
        return [ord(ch) for m in messages for ch in m["role"][0] + m["content"]]

    def encode(self, text: str) -> list[int]:
        return [ord(ch) for ch in text]

    def decode(self, ids: list[int]) -> str:
        return {(7, 8, 0): "a", (9, 0): "c"}.get(tuple(ids)) or "".join(map(chr, ids))


def vote(
    seq: int, groups: list, kind: str = "favourite", role: str = "user", voter: str = "ann", text: str = "hi",
    edit: str | None = None, settings: dict | None = None,
) -> SimpleNamespace:  # fmt: skip
    replies = [
        SimpleNamespace(index=1, text="b", token_ids=[]),
        SimpleNamespace(index=0, text="a", token_ids=[7, 8, 0]),
        SimpleNamespace(index=2, text="c", token_ids=[9, 0]),
    ][: 1 + max([1, *(i for group in groups for i in group)])]
    comparison = SimpleNamespace(
        id=f"c{seq}", conversation_id=f"k{seq}", messages=[{"role": role, "content": text, "id": 3}], completions=replies,
        settings=settings or {},
    )  # fmt: skip
    return SimpleNamespace(comparison=comparison, vote=SimpleNamespace(id=seq, seq=seq, voter=voter, kind=kind, groups=groups, edit=edit))


def example(prompt: str, voter: str, n: int, conversation: str | None = None) -> RankedExample:
    return RankedExample((1, 2), ((3,), (4,)), ((0,), (1,)), voter, prompt, conversation or f"c{n}", str(n), str(n), n)


def test_examples_keep_sampled_ids_and_encode_imported_text_with_an_end() -> None:
    (got,) = examples_from_votes([vote(1, [[0], [1]])], Letters())
    assert got.prompt_ids == (ord("u"), ord("h"), ord("i"))
    assert got.completions_ids == ((7, 8, 0), (ord("b"), 0))  # in the order of the index, not of the list
    assert got.strict == [(0, 1)] and got.tied == []


def test_a_reply_of_another_model_or_cut_at_a_stop_string_is_read_by_its_words() -> None:
    """A data directory keeps its votes when its base model changes: the same ids are other words then."""
    cast = vote(1, [[0], [1, 2]])
    before = examples_from_votes([cast], Letters())[0]

    class Other(Letters):
        def decode(self, ids: list[int]) -> str:
            return "?" * len(ids)

    (got,) = examples_from_votes([cast], Other())
    assert before.completions_ids == ((7, 8, 0), (98, 0), (9, 0)) and got.completions_ids == ((97, 0), (98, 0), (99, 0))
    cast.comparison.completions[1].text = "A"  # what was shown ends before what was sampled
    assert examples_from_votes([cast], Letters())[0].completions_ids[0] == (65, 0)



def test_replies_shown_for_what_they_teach_are_marked() -> None:
    notes = [None, {"drawn": "random", "because": "share"}, {"drawn": "active", "policy": "information"}]
    votes = [vote(n, [[0], [1]], settings={"choice": note} if note else {}) for n, note in enumerate(notes)]
    assert [e.chosen for e in examples_from_votes(votes, Letters())] == [False, False, True]


def test_votes_come_oldest_first_and_those_that_state_nothing_are_left_out() -> None:
    votes = [vote(3, [[1], [0]]), vote(2, [], "none"), vote(1, [[0, 1]], "tie"), vote(4, [[0]], "ranking"), vote(5, [[0], [1]], role="assistant")]
    got = examples_from_votes(votes, Letters())
    assert [e.seq for e in got] == [1, 2, 3]
    assert got[0].tied == [(0, 1)] and got[0].strict == []


def test_the_replies_that_were_not_the_favourite_are_not_called_equal() -> None:
    (favourite,) = examples_from_votes([vote(1, [[0], [1, 2]])], Letters())
    (ranking,) = examples_from_votes([vote(1, [[0], [1, 2]], "ranking")], Letters())
    assert favourite.tied == [] and ranking.tied == [(1, 2)]


def test_replies_that_read_the_same_are_one() -> None:
    votes = [
        vote(1, [[2], [0, 1]]), vote(2, [[0], [1, 2]]), vote(3, [[0, 1, 2]], "tie"), vote(4, [[0, 2]], "tie"), vote(5, [[0], [2]]),
        vote(6, [], "none"), vote(7, [[0], [2], [1]], "ranking"), vote(8, [[0], [2]], edit="new"),
    ]  # fmt: skip
    for item in votes:
        for reply in item.comparison.completions:
            reply.text = "a " if reply.index == 2 else reply.text
    got = {e.seq: e for e in examples_from_votes(votes, Letters())}
    assert 4 not in got and 5 not in got  # nothing was said
    assert [got[n].stated for n in (1, 2, 7, 8)] == [[(0, 1)], [(0, 1)], [(0, 1)], [(2, 0)]]
    assert got[3].tied == [(0, 1)] and got[6].refused == (0, 1)
    assert {e.shown for e in got.values()} == {2}  # a refusal is of two replies, and weighs one vote as any other


@given(
    st.permutations(range(5)).flatmap(lambda order: st.lists(st.sampled_from(range(1, 6)), max_size=4).map(
        lambda cuts: [part for a, b in zip([0, *sorted(set(cuts))], [*sorted(set(cuts)), 5], strict=True) if (part := order[a:b])]
    )),
    st.lists(st.sampled_from(range(3)), min_size=5, max_size=5),
)
def test_each_text_keeps_its_best_place(groups: list[list[int]], texts: list[int]) -> None:
    found = distinct(groups, texts)
    kept = [text for group in found for text in group]
    assert sorted(kept) == sorted(set(texts))
    rank = {i: n for n, group in enumerate(groups) for i in group}
    best = {text: min(rank[j] for j in range(5) if texts[j] == text) for text in kept}
    assert [{best[text] for text in group} for group in found] == [{n} for n in sorted(set(best.values()))]
    assert distinct(found, range(3)) == found


def test_the_digest_ignores_order_and_sees_every_change() -> None:
    a, b = examples_from_votes([vote(1, [[0], [1]]), vote(2, [[1], [0]])], Letters())
    assert data_digest([a, b]) == data_digest([b, a])
    flipped = examples_from_votes([vote(1, [[1], [0]]), vote(2, [[1], [0]])], Letters())
    assert data_digest(flipped) != data_digest([a, b])
    assert data_digest([a]) != data_digest([a, b])


def test_an_edit_beats_what_it_edited_and_is_one_more_completion() -> None:
    own = (ord("z"), 0)
    votes = [
        vote(1, [[1], [0, 2]], edit="z"),
        vote(2, [[0], [1], [2]], "ranking", edit="z"),
        vote(3, [[0, 1, 2]], "tie", edit="z"),
        vote(4, [], "none", edit="z"),
        vote(5, [[0]], edit="z"),
    ]
    favourite, ranking, tie, none, alone = examples_from_votes(votes, Letters())
    assert all(e.completions_ids[-1] == own for e in (favourite, ranking, tie, none, alone))
    assert favourite.stated == [(1, 0), (1, 2), (3, 1)] and favourite.strict == [(1, 0), (1, 2)] and favourite.shown == 3
    assert ranking.stated == [(0, 1), (0, 2), (1, 2), (3, 0)]
    assert tie.stated == [(3, 0), (3, 1), (3, 2)] and tie.tied == [(0, 1), (0, 2), (1, 2)] and tie.strict == []
    assert none.stated == [(2, 0), (2, 1)] and none.strict == [] and none.shown == 2 and none.refused == (0, 1)
    assert alone.stated == [(2, 0)] and alone.strict == []


def test_an_edit_that_repeats_a_reply_says_nothing() -> None:
    (same,) = examples_from_votes([vote(1, [[0], [1]], edit=" b\n")], Letters())
    assert same.stated == [(0, 1)] and len(same.completions_ids) == 2


def test_none_good_refuses_all_and_a_pick_accepts_itself_where_it_could_have_refused() -> None:
    votes = [vote(1, [], "none"), vote(2, [[1], [0, 2]]), vote(3, [[0, 2], [1]], "ranking"), vote(4, [[0, 1]], "tie"),
             vote(5, [[0], [1]], settings={"imported": "x.jsonl"})]  # fmt: skip
    said = [(e.accepted, e.refused) for e in examples_from_votes(votes, Letters())]
    assert said == [((), (0, 1)), ((1,), ()), ((0, 2), ()), ((), ()), ((), ())]


def test_the_digest_sees_edits_and_refusals() -> None:
    plain, edited, refused = (
        data_digest(examples_from_votes([vote(1, groups, kind, edit=edit)], Letters()))
        for groups, kind, edit in (([[0], [1]], "favourite", None), ([[0], [1]], "favourite", "z"), ([], "none", None))
    )
    assert len({plain, edited, refused}) == 3


def test_flooding_pushes_nobody_out() -> None:
    few = [example(f"p{n}", ["ann", "bob"][n % 2], n) for n in range(6)]
    flood = [example(f"p{n}", "eve", n) for n in range(6, 40)]
    kept = newest(few + flood, 12)
    assert [e.seq for e in kept if e.voter != "eve"] == list(range(6))
    assert [e.seq for e in kept if e.voter == "eve"] == list(range(34, 40))
    assert [e.seq for e in newest(flood, 5)] == [35, 36, 37, 38, 39] and newest(few, 9) == few


def test_one_edit_written_under_two_prompts_is_on_one_side_of_a_split() -> None:
    examples = [replace(example(f"p{n}", "ann", n), completions_ids=((3,), (4,), (50 + n // 2,)), edit_beats=(0,)) for n in range(24)]
    for fold in split_folds(examples, 4, 0).folds:
        assert not {examples[i].completions_ids[-1] for i in fold.train} & {examples[i].completions_ids[-1] for i in fold.test}


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3), st.integers(0, 8)), min_size=2, max_size=40),
    st.integers(2, 5), st.integers(0, 3),
)  # fmt: skip
def test_no_prompt_conversation_or_voter_is_on_both_sides(rows: list[tuple[int, int, int]], k: int, seed: int) -> None:
    examples = [example(f"p{p}", f"v{v}", n, f"c{c}") for n, (p, v, c) in enumerate(rows)]
    try:
        split = split_folds(examples, k, seed)
    except ValueError:
        return
    tested = [i for fold in split.folds for i in fold.test]
    assert len(tested) == len(set(tested))
    for fold in split.folds:
        assert fold.train and fold.test
        train, test = ([examples[i] for i in side] for side in (fold.train, fold.test))
        assert not {e.prompt_key for e in train} & {e.prompt_key for e in test}
        if "turns count" not in split.note:
            assert not {e.conversation for e in train} & {e.conversation for e in test}
        if split.by == "prompt and voter":
            assert not {e.voter for e in train} & {e.voter for e in test}


def test_one_voter_is_split_by_prompt_and_it_is_said() -> None:
    split = split_folds([example(f"p{n}", "ann", n) for n in range(12)], 4, 0)
    assert split.by == "prompt" and "one voter" in split.note
    assert sorted(i for fold in split.folds for i in fold.test) == list(range(12))
    assert [len(fold.test) for fold in split.folds] == [3, 3, 3, 3]


def test_voters_with_prompts_of_their_own_are_held_out_whole() -> None:
    split = split_folds([example(f"p{n}", f"v{n % 4}", n) for n in range(24)], 4, 0)
    assert split.by == "prompt and voter" and len(split.folds) == 4
    assert sorted(i for fold in split.folds for i in fold.test) == list(range(24))


def test_voters_who_share_prompts_get_a_grid_and_all_votes_are_tested() -> None:
    split = split_folds([example(f"p{n // 3}", f"v{n % 3}", n) for n in range(36)], 3, 0)
    assert split.by == "prompt and voter" and len(split.folds) == 6
    assert sorted(i for fold in split.folds for i in fold.test) == list(range(36))


def test_a_voter_with_most_of_the_votes_is_not_held_out() -> None:
    examples = [example(f"p{n}", "ann" if n < 9 else "bob", n) for n in range(12)]
    assert split_folds(examples, 3, 0).note == "one voter gave 9 of 12 votes: split by prompt alone"


def test_conversations_stay_whole_where_there_are_enough_of_them() -> None:
    many = [example(f"p{n}", "ann", n, f"c{n // 2}") for n in range(16)]
    for fold in split_folds(many, 4, 0).folds:
        assert not {many[i].conversation for i in fold.train} & {many[i].conversation for i in fold.test}
    one_chat = [example(f"p{n}", "ann", n, "c") for n in range(16)]
    split = split_folds(one_chat, 4, 0)
    assert len(split.folds) == 4 and "their turns count as prompts" in split.note


def test_one_prompt_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="one prompt"):
        split_folds([example("p", "ann", n) for n in range(5)], 3, 0)


def test_dealing_fills_bins_evenly_and_depends_only_on_the_seed() -> None:
    labels = ["a"] * 5 + ["b"] * 3 + ["c"] * 2 + ["d", "e"]
    bins = deal(labels, 3, 1)
    assert sorted(bins.count(b) for b in range(3)) == [3, 4, 5]
    assert bins == deal(labels, 3, 1)
