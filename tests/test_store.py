"""The database: chat trees, votes, erasure, durability, one writer."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlite_utils import Database
from sqlite_utils.utils import sqlite3

from store import (
    DatabaseTooNew,
    DataDirInUse,
    DataDirUnwritable,
    DiskFull,
    NoDatabase,
    NotFound,
    Store,
    StoreError,
    new_id,
)
from store.database import FILE, durability, has_wal_reset_bug, plain_errors
from store.migrations import migrations
from store.records import Comparison, Completion, NewComparison, Shown

ROOT = Path(__file__).parents[1]


def ask(store: Store, *said: str, conversation: str = "conv_1", voter: str = "ann", replies: tuple[str, ...] = ("one", "two", "three")) -> Comparison:
    """Record a comparison whose prompt alternates user and assistant."""
    messages = tuple({"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said))
    completions = tuple(Completion(i, text, (5, 6, 1), (-0.5, -1.25, -0.125), "base", "stop", 7 + i) for i, text in enumerate(replies))
    return store.record_comparison(NewComparison(new_id("cmp"), conversation, voter, messages, {"temperature": 1.0}, completions))


def show(store: Store, *versions: str) -> Comparison:
    """Record a comparison whose replies were written by these versions."""
    completions = tuple(Completion(i, f"reply {i}", (5,), (-0.5,), version, "stop", i) for i, version in enumerate(versions))
    return store.record_comparison(NewComparison(new_id("cmp"), new_id("conv"), "ann", ({"role": "user", "content": "hi"},), {}, completions))


@pytest.fixture
def store(tmp_path: Path):
    with Store.open(tmp_path / "data") as opened:
        yield opened


def test_a_comparison_comes_back_as_it_was_recorded(store: Store) -> None:
    made = ask(store, "hello")
    read = store.comparison(made.id)
    assert read == made
    assert read.messages == ({"role": "user", "content": "hello"},)
    assert read.completions[0].logprobs == (-0.5, -1.25, -0.125)
    assert store.comparison("cmp_none") is None


def test_a_pick_that_goes_on_grows_a_branch_and_another_pick_grows_another(store: Store) -> None:
    first = ask(store, "hello")
    ask(store, "hello", "two", "why?")
    ask(store, "hello", "one", "why?")
    ask(store, "hello", "two", "why?")  # sampled again: no new messages
    tree = store.conversation("conv_1")
    by_id = {node.id: node for node in tree.messages}
    assert [(node.role, node.content) for node in tree.messages] == [
        ("user", "hello"), ("assistant", "two"), ("user", "why?"), ("assistant", "one"), ("user", "why?")]
    assert tree.messages[1].completion == (first.id, 1) and tree.messages[3].completion == (first.id, 0)
    assert by_id[tree.messages[4].parent_id].content == "one"
    assert len(tree.comparisons) == 4 and tree.comparisons[1].messages[1]["content"] == "two"


def test_what_was_shown_names_its_versions_in_the_order_of_their_slots(store: Store) -> None:
    made = ask(store, "hello")
    mixed = show(store, "v000002", "base", "v000002")
    found = store.shown([mixed.id, "cmp_none", made.id])
    assert found == {
        made.id: Shown(made.id, "ann", made.created, ("base",) * 3),
        mixed.id: Shown(mixed.id, "ann", mixed.created, ("v000002", "base", "v000002")),
    }
    assert store.shown([]) == {}


def test_mixed_votes_are_the_standing_ones_on_several_versions(store: Store) -> None:
    alone, first, second, gone = ask(store, "hello"), show(store, "base", "v000001"), show(store, "v000001", "base"), show(store, "base", "v000001")
    store.record_vote(alone.id, "ann", groups=[[0], [1, 2]], kind="favourite")
    store.record_vote(first.id, "ann", groups=[[1], [0]], kind="favourite")
    store.record_vote(second.id, "ann", groups=[[0, 1]], kind="tie")
    store.record_vote(gone.id, "ann", groups=[[0], [1]], kind="favourite")
    store.record_vote(first.id, "ann", groups=[[0], [1]], kind="favourite")  # on reflection: now it is the latest
    store.withdraw_vote(gone.id, "ann")
    assert [(shown.id, shown.versions, voter, groups) for shown, voter, groups in store.mixed_votes()] == [
        (second.id, ("v000001", "base"), "ann", [[0, 1]]),
        (first.id, ("base", "v000001"), "ann", [[0], [1]]),
    ]


def test_someone_elses_conversation_cannot_be_continued(store: Store) -> None:
    ask(store, "hello", voter="ann")
    with pytest.raises(NotFound):
        ask(store, "hello", "one", "me too", voter="bob")
    assert len(store.conversation("conv_1").comparisons) == 1
    assert [row.id for row in store.conversations("bob")] == []
    assert [(row.id, row.title) for row in store.conversations("ann")] == [("conv_1", "hello")]


def test_the_latest_vote_counts_and_the_history_keeps_all(store: Store) -> None:
    made = ask(store, "hello")
    first, was_first = store.record_vote(made.id, "ann", groups=[[0], [1, 2]], kind="favourite")
    second, again = store.record_vote(made.id, "ann", groups=[[2], [0, 1]], kind="favourite", comment="on reflection")
    assert was_first and not again and second.seq > first.seq
    assert [item.vote for item in store.voted_comparisons()] == [second]
    assert store.comparison(made.id).vote == second
    assert store.withdraw_vote(made.id, "ann") and not store.withdraw_vote(made.id, "ann")
    assert store.voted_comparisons() == []
    assert [vote.kind for vote in store.vote_history(made.id)] == ["favourite", "favourite", "withdrawn"]
    with pytest.raises(NotFound):
        store.record_vote("cmp_none", "ann", groups=[], kind="none")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.tuples(st.integers(0, 2), st.sampled_from("ab"), st.sampled_from(["favourite", "tie", "none", "withdraw"])), max_size=30))
def test_votes_stand_as_a_plain_dictionary_says(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, str, str]]) -> None:
    with Store.open(tmp_path_factory.mktemp("votes")) as store:
        comparisons = [ask(store, str(i)) for i in range(3)]
        naive: dict[tuple[str, str], str] = {}
        for which, voter, what in steps:
            key = (comparisons[which].id, voter)
            if what == "withdraw":
                assert (store.withdraw_vote(*key) is not None) == (naive.pop(key, None) is not None)
            else:
                _, first = store.record_vote(*key, groups=[[0]], kind=what)
                assert first == (key not in naive)
                naive[key] = what
        assert {(v.vote.comparison_id, v.vote.voter): v.vote.kind for v in store.voted_comparisons()} == naive
        assert store.vote_counts().standing == len(naive)


def test_a_finished_round_uses_up_the_votes_it_says_and_an_abandoned_one_none(store: Store) -> None:
    votes = [store.record_vote(ask(store, str(i)).id, "ann", groups=[[0], [1, 2]], kind="favourite")[0] for i in range(5)]
    assert store.vote_counts().pending == 5
    store.take_in_round(1, {"round": 1, "state": "abandoned", "last_seq": votes[4].seq, "vote_ids": [v.id for v in votes]})
    assert store.vote_counts().pending == 5
    store.take_in_round(2, {"round": 2, "state": "published", "last_seq": votes[2].seq, "vote_ids": [v.id for v in votes[:3]], "version": "v000001"})
    assert store.vote_counts().pending == 2 and store.standing_votes(since_seq=votes[2].seq) == 2
    assert [item.vote.id for item in store.voted_comparisons(since_seq=votes[2].seq)] == [v.id for v in votes[3:]]


def on_disk(store: Store) -> bytes:
    """All that the data directory holds."""
    return b"".join(file.read_bytes() for file in sorted(store.data_dir.iterdir()) if file.is_file())


def test_what_is_committed_stands_where_the_log_cannot_be_emptied(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    real = store.db.execute

    def full(sql: str, *args: object) -> object:
        if "wal_checkpoint" in sql:
            raise sqlite3.OperationalError("database or disk is full")
        return real(sql, *args)

    monkeypatch.setattr(store.db, "execute", full)
    shown = ask(store, "my secret is xyzzy")
    store.record_vote(shown.id, "ann", groups=[[0], [1, 2]], kind="favourite")
    assert store.counts()["votes"] == 1
    assert store.erase_conversation("conv_1")["votes"] == 1
    assert real("pragma busy_timeout").fetchone()[0] > 1000
    monkeypatch.undo()
    store.steer("pause")
    assert b"xyzzy" not in on_disk(store)


@pytest.mark.skipif(durability().journal != "WAL", reason="the linked SQLite writes no write-ahead log")
def test_what_a_reader_keeps_from_being_erased_goes_with_the_next_write(store: Store) -> None:
    ask(store, "my secret is xyzzy")
    with Store.open(store.data_dir, read_only=True) as reader:
        reader.db.execute("begin")
        assert reader.db.execute("select count(*) from conversations").fetchone()[0] == 1
        store.erase_conversation("conv_1")
        assert b"xyzzy" in on_disk(store)
        reader.db.execute("rollback")
    store.steer("pause")
    assert b"xyzzy" not in on_disk(store)


def test_erasing_leaves_no_word_in_the_file_and_names_the_versions_that_learned(store: Store) -> None:
    made = ask(store, "my secret is xyzzy-prompt", replies=("xyzzy-reply", "b"))
    vote, _ = store.record_vote(made.id, "ann", groups=[[0], [1]], kind="favourite", edit="xyzzy-edit", comment="xyzzy-comment")
    ask(store, "another", conversation="conv_2")
    store.take_in_round(1, {"round": 1, "state": "published", "vote_ids": [vote.id], "last_seq": vote.seq, "version": "v000007"})
    assert all(word in on_disk(store) for word in (b"xyzzy-prompt", b"xyzzy-reply", b"xyzzy-edit", b"xyzzy-comment"))
    assert store.erase_conversation("conv_1", "key-3") == {"id": "conv_1", "votes": 1, "rounds": [1], "versions": ["v000007"]}
    assert [(entry["actor"], entry["action"]) for entry in store.audit_log()] == [("key-3", "erase")]
    assert b"xyzzy" not in on_disk(store)
    assert store.conversation("conv_1") is None and store.comparison(made.id) is None and store.voted_comparisons() == []
    assert store.conversation("conv_2") is not None
    with pytest.raises(NotFound):
        store.erase_conversation("conv_1")


def test_a_version_is_taken_in_with_its_deployment_or_not_at_all(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise DiskFull("no space")

    with monkeypatch.context() as patch, pytest.raises(DiskFull):
        patch.setattr(store, "_insert_deployment", full)
        store.take_in_adapter({"version": "v000001"}, "candidate", ("v000001", "base", None), actor="auto", action="publish")
    assert store.adapter("v000001") is None
    store.take_in_adapter({"version": "v000001"}, "candidate", ("v000001", "base", None), actor="auto", action="publish")
    assert store.adapter("v000001").status == "live" and store.deployment().live == "v000001"
    assert [entry["action"] for entry in store.audit_log()] == ["publish"]


def test_withdrawing_names_the_versions_that_learned_from_the_vote_even_where_it_was_replaced_since(store: Store) -> None:
    made, other = ask(store, "hello"), ask(store, "bye")
    vote, _ = store.record_vote(made.id, "ann", groups=[[0], [1]], kind="favourite")
    store.record_vote(other.id, "ann", groups=[[0], [1]], kind="favourite")
    store.take_in_round(1, {"round": 1, "state": "published", "vote_ids": [vote.id], "last_seq": vote.seq, "version": "v000007"})
    store.record_vote(made.id, "ann", groups=[[1], [0]], kind="favourite")
    assert store.withdraw_vote(other.id, "ann") == {"rounds": [], "versions": []}
    assert store.withdraw_vote(made.id, "ann") == {"rounds": [1], "versions": ["v000007"]}
    assert store.withdraw_vote(made.id, "ann") is None


def test_votes_that_went_while_their_round_ran_are_listed_with_its_version(store: Store) -> None:
    made = [ask(store, text, conversation=f"conv_{text}") for text in ("kept", "replaced", "withdrawn", "erased")]
    votes = [store.record_vote(one.id, "ann", groups=[[0], [1]], kind="favourite")[0] for one in made]
    record = {"state": "published", "vote_ids": [v.id for v in votes], "last_seq": votes[-1].seq, "version": "v000007"}
    store.take_in_round(1, {"round": 1, **record})
    assert store.audit_log() == []
    store.record_vote(made[1].id, "ann", groups=[[1], [0]], kind="favourite")
    store.withdraw_vote(made[2].id, "ann")
    store.erase_conversation("conv_erased")
    store.take_in_round(2, {"round": 2, **record})
    last = store.audit_log()[-1]
    assert (last["action"], json.loads(last["detail"])) == ("learned from withdrawn votes", {"round": 2, "version": "v000007", "votes": 2})


def test_export_gives_strict_pairs_edits_and_rankings(store: Store) -> None:
    a, b, c = (ask(store, text) for text in ("first", "second", "third"))
    store.record_vote(a.id, "ann", groups=[[2], [0, 1]], kind="ranking")
    store.record_vote(b.id, "ann", groups=[[0], [1, 2]], kind="favourite", edit="mine")
    store.record_vote(c.id, "ann", groups=[[0, 1, 2]], kind="tie")
    pairs = [(row["prompt"][0]["content"], row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in store.export("preference")]
    assert pairs == [("first", "three", "one"), ("first", "three", "two"), ("second", "one", "two"), ("second", "one", "three"), ("second", "mine", "one")]
    assert [row["ranking"] for row in store.export("ranking")] == [[[2], [0, 1]], [[0], [1, 2]], [[0, 1, 2]]]
    assert [row["messages"][-1] for row in store.export("demonstration")] == [{"role": "assistant", "content": "mine"}]


def test_what_no_reader_takes_is_left_out_of_exported_preferences(store: Store) -> None:
    shown = ask(store, "Hi", "Hello!")  # a client may let the assistant go on with its own turn
    store.record_vote(shown.id, "ann", groups=[[0], [1, 2]], kind="favourite")
    assert list(store.export("preference")) == list(store.export("preference-implicit")) == []
    assert len(list(store.export("ranking"))) == 1


def test_export_goes_on_over_many_batches(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("store.store.EXPORT_ROWS", 3)
    for i in range(10):
        store.record_vote(ask(store, str(i)).id, "ann", groups=[[0], [1]], kind="favourite")
    assert [row["prompt"][0]["content"] for row in store.export("ranking")] == [str(i) for i in range(10)]


def test_a_vote_replaced_while_votes_are_exported_is_not_there_twice(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("store.store.EXPORT_ROWS", 2)
    asked = [ask(store, str(i)).id for i in range(6)]
    for name in asked:
        store.record_vote(name, "ann", groups=[[0], [1]], kind="favourite")
    rows = store.export("ranking")
    got = [next(rows)]
    store.record_vote(asked[0], "ann", groups=[[1], [0]], kind="favourite")
    assert [row["prompt"][0]["content"] for row in [*got, *rows]] == [str(i) for i in range(6)]


def test_votes_are_read_whole_and_in_order_over_many_transactions(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("store.store.READ_ROWS", 3)
    shared = ask(store, "both judge this")
    cast = [store.record_vote(shared.id, "ann", groups=[[0]], kind="favourite")[0]]
    cast += [store.record_vote(ask(store, str(i)).id, "ann", groups=[[1], [0]], kind="favourite")[0] for i in range(9)]
    cast.append(store.record_vote(shared.id, "bob", groups=[[1]], kind="favourite")[0])
    store.withdraw_vote(cast.pop(4).comparison_id, "ann")
    assert [item.vote for item in store.voted_comparisons()] == cast
    assert [item.vote for item in store.voted_comparisons(limit=4)] == cast[:4]
    assert [item.vote for item in store.voted_comparisons(since_seq=cast[1].seq, limit=5)] == cast[2:7]
    assert store.voted_comparisons(since_seq=cast[-1].seq) == []


def test_a_vote_replaced_while_votes_are_read_is_not_there_twice(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("store.store.READ_ROWS", 2)
    asked = [ask(store, str(i)).id for i in range(6)]
    for name in asked:
        store.record_vote(name, "ann", groups=[[0]], kind="favourite")
    with Store.open(store.data_dir, read_only=True) as reader:
        read, batches = reader._comparisons, []

        def read_and_be_overtaken(*args):
            found = read(*args)
            batches.append(len(found))
            return found

        def begin_late():
            if len(batches) == 1:  # between the first transaction and the second
                store.record_vote(asked[0], "ann", groups=[[1]], kind="favourite")
                store.record_vote(asked[5], "ann", groups=[[1]], kind="favourite")
            return open_read()

        open_read = reader._read
        monkeypatch.setattr(reader, "_comparisons", read_and_be_overtaken)
        monkeypatch.setattr(reader, "_read", begin_late)
        got = [item.vote.comparison_id for item in reader.voted_comparisons()]
    assert got == asked[:5] and len(batches) == 3


def test_deployments_move_statuses_with_them(store: Store) -> None:
    for n in (1, 2, 3):
        store.take_in_adapter({"version": f"v00000{n}"}, "candidate")
    store.deploy("v000001", "base", actor="auto", action="publish")
    store.deploy("v000002", "v000001", "v000003", actor="auto", action="publish")
    assert {row.version: row.status for row in store.adapters()} == {"v000001": "retired", "v000002": "live", "v000003": "candidate"}
    since = store.deployment().since
    store.deploy("v000002", "v000001", None, actor="auto", action="drop candidate")
    now = store.deployment()
    assert (now.live, now.previous, now.candidate, now.since) == ("v000002", "v000001", None, since)
    assert store.adapter("v000003").status == "retired"
    with pytest.raises(NotFound):
        store.set_status("v000009", "retired")


def test_what_the_learner_is_told_is_written_down_with_it_or_neither_is(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for action in ("run", "pause", "run", "resume", "pause"):
        store.steer(action, "ann")
    assert (store.control().run_requested, store.control().paused) == (2, True)
    assert [(row["actor"], row["action"]) for row in store.audit_log()] == [("ann", f"learner {a}") for a in ("run", "pause", "run", "resume", "pause")]

    def full(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(store, "_audit", full)
    with pytest.raises(DiskFull):
        store.steer("resume", "ann")
    assert store.control().paused and len(store.audit_log()) == 5


def test_the_audit_log_is_append_only_and_shows_tampering(store: Store) -> None:
    store.audit("ann", "promote", {"version": "v000001"})
    store.audit("ann", "rollback", {})
    assert store.verify_audit() and [row["action"] for row in store.audit_log()] == ["promote", "rollback"]
    for sql in ("update audit set actor = 'bob'", "delete from audit"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            store.db.execute(sql)
    store.db.execute("drop trigger audit_is_append_only_u")
    store.db.execute("update audit set actor = 'bob' where id = 1")
    assert not store.verify_audit()


def test_a_second_server_is_told_who_has_the_directory(store: Store) -> None:
    with pytest.raises(DataDirInUse, match=f"process {os.getpid()}.*another --data-dir"):
        Store.open(store.data_dir)


def test_the_lock_is_free_again_after_close(tmp_path: Path) -> None:
    for _ in range(2):
        with Store.open(tmp_path) as opened, pytest.raises(DataDirInUse):
            Store.open(tmp_path)
        assert opened.data_dir == tmp_path


def test_a_file_where_the_directory_should_be_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataDirUnwritable, match="--data-dir"):
        Store.open(tmp_path / "file" / "data")


def test_a_full_disk_and_a_damaged_file_have_plain_errors(tmp_path: Path) -> None:
    with pytest.raises(DiskFull, match="nothing was written"), plain_errors(tmp_path):
        raise sqlite3.OperationalError("database or disk is full")
    (tmp_path / FILE).write_bytes(b"this is not a database" * 100)
    with pytest.raises(StoreError, match="damaged"):
        Store.open(tmp_path)
    (tmp_path / FILE).unlink()
    Store.open(tmp_path).close()  # the failed open gave the lock back


def test_nobody_else_on_the_machine_reads_what_people_wrote(store: Store) -> None:
    ask(store, "hello")
    files = list(store.data_dir.glob("plaudit.db*"))
    assert files and {file.stat().st_mode & 0o777 for file in files} == {0o600}


def test_a_disk_that_fails_under_sqlite_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is full or fails"), plain_errors(tmp_path):
        raise sqlite3.OperationalError("disk I/O error")


def test_a_full_disk_refuses_a_write_whole(store: Store) -> None:
    """SQLite's own page limit stands in for the disk: the same error, from the same place."""
    made = ask(store, "hello")
    pages = store.db.execute("pragma page_count").fetchone()[0]
    store.db.execute(f"pragma max_page_count = {pages}")
    with pytest.raises(DiskFull):
        ask(store, "x" * 100_000, conversation="conv_2")
    assert store.conversation("conv_2") is None and store.comparison(made.id) == made


def test_a_newer_database_is_refused_and_an_older_one_is_brought_up_to_date(tmp_path: Path) -> None:
    db = Database(tmp_path / FILE)
    migrations.apply(db, stop_before="m002_votes")
    db.close()
    with pytest.raises(NoDatabase):
        Store.open(tmp_path, read_only=True)
    with Store.open(tmp_path) as store:
        store.record_vote(ask(store, "hello").id, "ann", groups=[[0]], kind="favourite")
        store.db["_sqlite_migrations"].insert({"id": 99, "migration_set": "plaudit", "name": "m999_future", "applied_at": "x"})
    with pytest.raises(DatabaseTooNew, match="m999_future"):
        Store.open(tmp_path)


def test_a_reader_sees_commits_while_the_writer_goes_on_and_cannot_write(store: Store) -> None:
    with Store.open(store.data_dir, read_only=True) as reader:
        seen = []
        done = threading.Event()

        def write() -> None:
            for i in range(20):
                store.record_vote(ask(store, str(i)).id, "ann", groups=[[0]], kind="favourite")
            done.set()

        thread = threading.Thread(target=write)
        thread.start()
        while not done.is_set():
            seen.append(len(reader.voted_comparisons()))
        thread.join()
        assert seen == sorted(seen) and len(reader.voted_comparisons()) == 20
        with pytest.raises(StoreError, match="cannot open"):
            reader.steer("pause")


def test_read_only_before_any_server_says_so(tmp_path: Path) -> None:
    with pytest.raises(NoDatabase, match="plaudit serve"):
        Store.open(tmp_path, read_only=True)
    with pytest.raises(FileNotFoundError):
        Store.open(tmp_path, read_only=True)


def test_threads_of_one_server_may_vote_at_once(store: Store) -> None:
    made = [ask(store, str(i)) for i in range(8)]
    threads = [threading.Thread(target=store.record_vote, args=(c.id, "ann"), kwargs={"groups": [[0]], "kind": "favourite"}) for c in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.vote_counts().standing == 8


WRITER = """
import sys
sys.path.insert(0, sys.argv[2])
from tests.test_store import ask
from store import Store
store = Store.open(sys.argv[1])
for i in range(10_000):
    vote, _ = store.record_vote(ask(store, str(i)).id, "ann", groups=[[0]], kind="favourite")
    print(vote.id, flush=True)
"""


@pytest.mark.parametrize("seed", [1, 2])
def test_kill_9_loses_no_acknowledged_vote(tmp_path: Path, seed: int) -> None:
    child = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(ROOT)], stdout=subprocess.PIPE, text=True)
    acknowledged = [child.stdout.readline().strip() for _ in range(random.Random(seed).randint(5, 25))]
    child.send_signal(signal.SIGKILL)
    acknowledged += [line.strip() for line in child.stdout if line.endswith("\n")]
    child.wait()
    child.stdout.close()
    with Store.open(tmp_path) as store:
        stored = {item.vote.id for item in store.voted_comparisons()}
        assert set(acknowledged) <= stored
        assert store.db.execute("pragma integrity_check").fetchone()[0] == "ok"


def test_the_journal_avoids_the_wal_reset_bug() -> None:
    assert [has_wal_reset_bug(v) for v in [(3, 6, 23), (3, 7, 0), (3, 40, 1), (3, 44, 6), (3, 50, 7), (3, 51, 2), (3, 51, 3)]] == [
        False, True, True, False, False, True, False]
    assert durability((3, 40, 1)).journal == "DELETE" and durability((3, 51, 3)).journal == "WAL"


def test_the_settings_in_force_are_those_that_doctor_tells(store: Store) -> None:
    wanted = durability()
    assert store.db.execute("pragma journal_mode").fetchone()[0].upper() == wanted.journal
    assert store.db.execute("pragma synchronous").fetchone()[0] == {"FULL": 2, "EXTRA": 3}[wanted.synchronous]


def test_counts_are_those_of_a_full_count_whatever_comes_and_goes(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    older = Database(tmp_path / "data" / FILE)
    migrations.apply(older, stop_before="m004_flat_reads")
    older.execute("insert into conversations values ('conv_old', 'ann', 1.0, 1.0)")
    older.conn.commit()
    older.close()
    with Store.open(tmp_path / "data") as store:
        made = [ask(store, "hello", conversation=f"conv_{i % 2}") for i in range(4)]
        for comparison in made:
            for kind in ("favourite", "tie"):  # the second replaces the first
                store.record_vote(comparison.id, "ann", groups=[[0], [1, 2]], kind=kind, edit="better" if kind == "tie" else None)
        store.withdraw_vote(made[0].id, "ann")
        store.erase_conversation("conv_1")
        tables = ("conversations", "comparisons", "completions", "demonstrations", "adapters", "rounds")
        counted = {table: store.db.table(table).count for table in tables} | {"votes": store.db.table("standing_votes").count}
        assert store.counts() == counted == {
            "conversations": 2, "comparisons": 2, "completions": 6, "demonstrations": 1, "adapters": 0, "rounds": 0, "votes": 1,
        }  # fmt: skip
        assert store.standing_votes() == store.vote_counts().standing == 1


def test_what_every_page_asks_for_reads_no_table_whole(store: Store) -> None:
    ask(store, "hello")
    asked: list[str] = []
    store.db.conn.set_trace_callback(asked.append)
    store.conversations(), store.conversations("ann"), store.vote_counts(), store.standing_votes(since_seq=3), store.comparison("cmp_none")
    store.db.conn.set_trace_callback(None)
    plans = {sql: " | ".join(row[3] for row in store.db.execute(f"explain query plan {sql}")) for sql in asked if sql.startswith("select")}
    newest = [plan for sql, plan in plans.items() if "from conversations c" in sql]
    assert len(newest) == 2 and all("INDEX conversations_by" in plan for plan in newest)  # in the index's order: no sorting of all
    assert not [plan for plan in newest if plan.count("TEMP B-TREE") > plan.count("SUBQUERY")]
    held = [plan for plan in plans.values() if "SCAN" in plan and "USING INDEX conversations_by_update" not in plan]
    assert not [plan for plan in held if "SCAN rounds" not in plan], held
