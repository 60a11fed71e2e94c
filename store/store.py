"""The database's one front: every write is a method here, in one transaction, durable when it returns.

The server process opens it for writing (and holds the data directory's lock); the learner and `plaudit export` open it
read-only. Safe to call from several threads of one process. Owns rows; files of versions and rounds are
`adapters.py` and `rounds.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from filelock import FileLock
from sqlite_utils import Database
from sqlite_utils.utils import sqlite3

from store.database import BUSY_TIMEOUT_S, connect_reader, connect_writer, lock_data_dir, plain_errors
from store.errors import NotFound
from store.exports import EXPORTS
from store.records import (
    AdapterRow,
    Ballot,
    Comparison,
    Completion,
    Control,
    Conversation,
    ConversationRow,
    Deployment,
    Message,
    MessageNode,
    NewComparison,
    Shown,
    Vote,
    VoteCounts,
    VotedComparison,
)

KINDS = ("favourite", "ranking", "tie", "none")
EXPORT_ROWS = 200  # votes read at a time by `export`
SWEEP_WAIT_MS = 200  # for a reader, while others wait for the database
READ_ROWS = 200  # votes read in one transaction: without a write-ahead log the writer's commit waits for a reader


def new_id(kind: str) -> str:
    """A fresh id such as `cmp_5f0c...`: 96 random bits."""
    return f"{kind}_{secrets.token_hex(12)}"


class Store:
    """One data directory's database. Make it with `Store.open`; a context manager."""

    def __init__(self, db: Database, data_dir: Path, lock: FileLock | None) -> None:
        self.db, self.data_dir, self._file_lock = db, data_dir, lock
        self._mutex = threading.RLock()
        self._unswept = lock is not None  # the log may hold erased words: here those of a process that was killed

    @classmethod
    def open(cls, data_dir: str | Path, *, read_only: bool = False) -> Self:
        """Open `data_dir`, making it if need be. Raises DataDirInUse, DataDirUnwritable, DatabaseTooNew, DiskFull; read-only: NoDatabase."""
        data_dir = Path(data_dir)
        if read_only:
            return cls(connect_reader(data_dir), data_dir, None)
        lock = lock_data_dir(data_dir)
        try:
            return cls(connect_writer(data_dir), data_dir, lock)
        except BaseException:
            lock.release()
            raise

    def close(self) -> None:
        """Close the connection and give the lock back. Twice is fine."""
        with self._mutex:
            self.db.close()
            if self._file_lock is not None:
                self._file_lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _write(self) -> Iterator[Database]:
        """One transaction, begun as a writer; all of it or nothing."""
        with self._mutex, plain_errors(self.data_dir):
            self.db.execute("begin immediate")
            try:
                yield self.db
                self.db.execute("commit")
            except BaseException:
                if self.db.conn.in_transaction:
                    self.db.execute("rollback")
                raise
            if self._unswept:
                self._sweep()

    def _sweep(self) -> None:
        """Empty the write-ahead log, which still holds what was erased. A reader in the middle of its work keeps that from
        happening, or a disk without room; then it is tried again after the next write. What was written stands either way.
        """
        self.db.execute(f"pragma busy_timeout = {SWEEP_WAIT_MS}")
        try:
            busy, _, _ = self.db.execute("pragma wal_checkpoint(truncate)").fetchone()  # does nothing without such a log
            self._unswept = bool(busy)
        except sqlite3.OperationalError:
            self._unswept = True
        finally:
            self.db.execute(f"pragma busy_timeout = {round(1000 * BUSY_TIMEOUT_S)}")

    @contextlib.contextmanager
    def _read(self) -> Iterator[Database]:
        """One consistent snapshot. Inside a write it sees the write."""
        with self._mutex, plain_errors(self.data_dir):
            if self.db.conn.in_transaction:
                yield self.db
                return
            self.db.execute("begin")
            try:
                yield self.db
            finally:
                self.db.execute("rollback")

    # --- chat

    def record_comparison(self, new: NewComparison) -> Comparison:
        """Keep a comparison with its conversation and message path. Raises NotFound for somebody else's conversation, or one that was erased."""
        now = time.time()
        with self._write() as db:
            self._insert_comparison(db, new, now)
        return Comparison(
            new.id, new.conversation_id, new.voter, new.messages, new.settings, now, new.completions
        )

    def _insert_comparison(self, db: Database, new: NewComparison, now: float) -> None:
        owner = db.execute("select voter from conversations where id = ?", [new.conversation_id]).fetchone()
        if owner is None and new.continues:
            raise NotFound("this conversation was erased while the reply was written; nothing of it is kept")
        if owner is None:
            db.table("conversations").insert({"id": new.conversation_id, "voter": new.voter, "created": now, "updated": now})
        elif owner[0] != new.voter:
            raise NotFound("there is no such conversation of yours")
        else:
            db.execute("update conversations set updated = ? where id = ?", [now, new.conversation_id])
        leaf = self._path(db, new.conversation_id, new.messages, now)
        db.table("comparisons").insert({
            "id": new.id, "conversation_id": new.conversation_id, "voter": new.voter, "message_id": leaf,
            "settings": json.dumps(new.settings), "created": now,
        })
        db.conn.executemany(
            "insert into completions values (?, ?, ?, ?, ?, ?, ?, ?)",
            [(new.id, c.index, c.text, json.dumps(list(c.token_ids)), json.dumps([round(p, 6) for p in c.logprobs]),
              c.version, c.finish_reason, c.seed) for c in new.completions],
        )

    def _path(self, db: Database, conversation_id: str, messages: Sequence[Message], now: float) -> str:
        """Find or make the nodes of `messages` from the root on; the last one's id. An assistant's message that is one
        of the replies sampled at its parent is linked to it: that is how a pick grows a branch."""
        parent: str | None = None
        for message in messages:
            found = db.execute(
                "select id from messages where conversation_id = ? and parent_id is ? and role = ? and content = ?",
                [conversation_id, parent, message["role"], message["content"]],
            ).fetchone()
            if found is None:
                sampled = db.execute(
                    "select c.comparison_id, c.slot from completions c join comparisons p on p.id = c.comparison_id "
                    "where p.conversation_id = ? and p.message_id is ? and c.text = ? order by p.created, c.slot",
                    [conversation_id, parent, message["content"]],
                ).fetchone() if message["role"] == "assistant" else None
                made = new_id("msg")
                db.table("messages").insert({
                    "id": made, "conversation_id": conversation_id, "parent_id": parent, "role": message["role"],
                    "content": message["content"], "comparison_id": sampled and sampled[0],
                    "completion_index": sampled and sampled[1], "created": now,
                })
                found = (made,)
            parent = found[0]
        if parent is None:
            raise ValueError("a comparison needs at least one message")
        return parent

    def comparison(self, comparison_id: str) -> Comparison | None:
        """One comparison with its standing votes."""
        with self._read() as db:
            return next(iter(self._comparisons(db, "id = ?", [comparison_id])), None)

    def voted_on(self, vote_ids: Sequence[str]) -> list[Comparison]:
        """The comparisons that these votes were cast on, whether they still stand or not."""
        with self._read() as db:
            where = "id in (select comparison_id from votes where id in (select value from json_each(?)))"
            return self._comparisons(db, where, [json.dumps(list(vote_ids))])

    def shown(self, comparison_ids: Sequence[str]) -> dict[str, Shown]:
        """Those of the named comparisons that there are, by id."""
        with self._read() as db:
            rows = db.execute(
                f"select {SHOWN} from comparisons c where c.id in (select value from json_each(?))", [json.dumps(list(comparison_ids))])
            return {row[0]: shown_from_row(row) for row in rows}

    def mixed_votes(self) -> list[tuple[Shown, str, list[list[int]]]]:
        """Standing votes on comparisons of several versions, in voting order: what was shown, the voter, the groups."""
        with self._read() as db:
            rows = db.execute(
                f"select {SHOWN}, s.voter, v.groups from standing_votes s join votes v on v.seq = s.seq join comparisons c on c.id = s.comparison_id "
                "where (select count(distinct version) from completions where comparison_id = c.id) > 1 order by s.seq")
            return [(shown_from_row(row), row[4], json.loads(row[5])) for row in rows]

    def _comparisons(self, db: Database, where: str, args: Sequence[Any]) -> list[Comparison]:
        """Comparisons that match, oldest first, in four queries however many there are."""
        chosen = f"select id from comparisons where {where}"
        completions: dict[str, list[Completion]] = {}
        for row in db.execute(f"select * from completions where comparison_id in ({chosen}) order by comparison_id, slot", args):
            completion = Completion(row[1], row[2], tuple(json.loads(row[3])), tuple(json.loads(row[4])), *row[5:])
            completions.setdefault(row[0], []).append(completion)
        votes: dict[str, list[Vote]] = {}
        standing = f"select {VOTE} from votes v join standing_votes s on s.seq = v.seq where s.comparison_id in ({chosen}) order by v.seq"
        for vote in map(vote_from_row, db.execute(standing, args)):
            votes.setdefault(vote.comparison_id, []).append(vote)
        conversations = f"select conversation_id from comparisons where {where}"
        nodes = {row[0]: row[1:] for row in db.execute(
            f"select id, parent_id, role, content from messages where conversation_id in ({conversations})", args)}
        found = []
        for row in db.execute(f"select id, conversation_id, voter, message_id, settings, created from comparisons where {where} order by created, id", args):
            messages: list[Message] = []
            node: str | None = row[3]
            while node is not None:
                node, role, content = nodes[node]
                messages.append({"role": role, "content": content})
            found.append(Comparison(
                row[0], row[1], row[2], tuple(reversed(messages)), json.loads(row[4]), row[5],
                tuple(completions.get(row[0], ())), tuple(votes.get(row[0], ())),
            ))
        return found

    def conversations(self, voter: str | None = None, limit: int = 50) -> list[ConversationRow]:
        """Newest first; everybody's when no voter is named."""
        whose, args = ("", []) if voter is None else ("where c.voter = ?", [voter])
        with self._read() as db:
            rows = db.execute(
                "select c.id, c.voter, c.created, c.updated, coalesce((select substr(m.content, 1, 80) from messages m "
                "where m.conversation_id = c.id and m.role = 'user' order by m.rowid limit 1), '') from conversations c "
                f"{whose} order by c.updated desc, c.rowid desc limit ?", [*args, limit])
            return [ConversationRow(*row) for row in rows]

    def owner(self, conversation_id: str) -> str | None:
        """The voter whose conversation it is; None when there is none."""
        with self._read() as db:
            row = db.execute("select voter from conversations where id = ?", [conversation_id]).fetchone()
            return row[0] if row else None

    def conversation(self, conversation_id: str) -> Conversation | None:
        """One conversation with its tree and comparisons."""
        with self._read() as db:
            row = db.execute("select id, voter, created from conversations where id = ?", [conversation_id]).fetchone()
            if row is None:
                return None
            nodes = tuple(
                MessageNode(m[0], m[1], m[2], m[3], None if m[4] is None else (m[4], m[5]), m[6])
                for m in db.execute(
                    "select id, parent_id, role, content, comparison_id, completion_index, created from messages "
                    "where conversation_id = ? order by rowid", [conversation_id])
            )
            comparisons = tuple(self._comparisons(db, "conversation_id = ?", [conversation_id]))
            return Conversation(row[0], row[1], row[2], nodes, comparisons)

    def erase_conversation(self, conversation_id: str, actor: str = "store") -> dict[str, Any]:
        """Remove a conversation's words, replies and votes for good, overwriting them on disk.

        Returns `{"id", "votes", "rounds", "versions"}`: how many votes left, and which rounds and versions had learned
        from them. Raises NotFound.
        """
        with self._write() as db:
            if db.execute("select 1 from conversations where id = ?", [conversation_id]).fetchone() is None:
                raise NotFound("there is no such conversation")
            mine = "select id from comparisons where conversation_id = :c"
            c = {"c": conversation_id}
            rounds, versions = self._learned_from(db, f"comparison_id in ({mine})", c)
            votes = db.execute(f"select count(*) from standing_votes where comparison_id in ({mine})", c).fetchone()[0]
            for table in ("demonstrations", "standing_votes", "votes", "completions"):
                db.execute(f"delete from {table} where comparison_id in ({mine})", c)
            db.execute("delete from comparisons where conversation_id = :c", c)
            db.execute("update messages set parent_id = null where conversation_id = :c", c)
            db.execute("delete from messages where conversation_id = :c", c)
            db.execute("delete from conversations where id = :c", c)
            self._audit(db, actor, "erase", {"conversation": conversation_id, "votes": votes, "versions": versions})
            self._unswept = True
        return {"id": conversation_id, "votes": votes, "rounds": rounds, "versions": versions}

    def _learned_from(self, db: Database, where: str, args: Any) -> tuple[list[int], list[str]]:
        """Rounds that used votes which match, and the versions that came of them."""
        rounds = [row[0] for row in db.execute(
            f"select distinct round from round_votes where vote_id in (select id from votes where {where}) order by round", args)]
        records = [self.round(n) or {} for n in rounds]
        return rounds, sorted({str(r["version"]) for r in records if r.get("version")})

    # --- votes

    def record_vote(
        self, comparison_id: str, voter: str, *, groups: Sequence[Sequence[int]], kind: str,
        edit: str | None = None, comment: str | None = None,
    ) -> tuple[Vote, bool]:
        """Append a vote, which from then on stands for its voter; (the vote, whether it is the first standing one).

        `groups`: completion indices, best first, ties grouped. Raises NotFound.
        """
        (made,) = self.record_votes([Ballot(comparison_id, voter, groups, kind, edit, comment)])
        if isinstance(made, NotFound):
            raise made
        return made

    def record_votes(self, ballots: Sequence[Ballot]) -> list[tuple[Vote, bool] | NotFound]:
        """Votes in order and in one transaction: one wait for the disk, however many. For each what `record_vote` returns
        or raises; one that is not found keeps none of the others out."""
        if wrong := [ballot.kind for ballot in ballots if ballot.kind not in KINDS]:
            raise ValueError(f"{wrong[0]!r} is not a kind of vote")
        made: list[tuple[Vote, bool] | NotFound] = []
        with self._write() as db:
            for ballot in ballots:
                try:
                    made.append(self._insert_vote(db, ballot, time.time()))
                except NotFound as absent:  # before anything of it was written
                    made.append(absent)
        return made

    def _insert_vote(self, db: Database, ballot: Ballot, now: float) -> tuple[Vote, bool]:
        comparison_id, voter, edit = ballot.comparison_id, ballot.voter, ballot.edit
        vote_id, groups = new_id("vote"), json.dumps([list(group) for group in ballot.groups])
        try:
            seq = db.execute(
                "insert into votes (id, comparison_id, voter, kind, groups, edit, comment, created) values (?, ?, ?, ?, ?, ?, ?, ?)",
                [vote_id, comparison_id, voter, ballot.kind, groups, edit, ballot.comment, now],
            ).lastrowid
        except sqlite3.IntegrityError as error:  # this statement is undone, the transaction goes on
            if "FOREIGN KEY" not in str(error):
                raise
            raise NotFound("there is no such comparison") from error
        assert seq is not None
        first = db.execute("insert into standing_votes values (?, ?, ?) on conflict do nothing", [comparison_id, voter, seq]).rowcount == 1
        if not first:  # not "or replace", which deletes without telling the tallies
            db.execute("update standing_votes set seq = ? where comparison_id = ? and voter = ?", [seq, comparison_id, voter])
            db.execute("delete from demonstrations where comparison_id = ? and voter = ?", [comparison_id, voter])
        if edit:
            db.table("demonstrations").insert({"seq": seq, "comparison_id": comparison_id, "voter": voter, "reply": edit, "created": now})
        frozen = tuple(tuple(group) for group in ballot.groups)
        return Vote(vote_id, seq, comparison_id, voter, ballot.kind, frozen, edit, ballot.comment, now), first

    def withdraw_vote(self, comparison_id: str, voter: str) -> dict[str, Any] | None:
        """Append a withdrawal; `{"rounds", "versions"}` that had learned from it, None when no vote stands."""
        with self._write() as db:
            found = db.execute("delete from standing_votes where comparison_id = ? and voter = ? returning seq", [comparison_id, voter]).fetchall()
            if not found:
                return None
            rounds, versions = self._learned_from(db, "comparison_id = ? and voter = ?", [comparison_id, voter])
            db.execute("delete from demonstrations where comparison_id = ? and voter = ?", [comparison_id, voter])
            db.table("votes").insert({
                "id": new_id("vote"), "comparison_id": comparison_id, "voter": voter, "kind": "withdrawn", "groups": "[]",
                "edit": None, "comment": None, "created": time.time(),
            })
            return {"rounds": rounds, "versions": versions}

    def vote_history(self, comparison_id: str) -> list[Vote]:
        """Every vote and withdrawal on a comparison, oldest first."""
        with self._read() as db:
            return [vote_from_row(row) for row in db.execute(f"select {VOTE} from votes v where v.comparison_id = ? order by v.seq", [comparison_id])]

    def newest_vote(self) -> int:
        """The seq of the newest standing vote; 0 without any."""
        with self._read() as db:
            return db.execute("select coalesce(max(seq), 0) from standing_votes").fetchone()[0]

    def voted_comparisons(self, *, since_seq: int = 0, until_seq: int | None = None, limit: int | None = None) -> list[VotedComparison]:
        """Standing votes after `since_seq`, oldest first, with what they judge; the first `limit` of them.

        Read in transactions of READ_ROWS, so that however many there are, nobody's vote waits long for a reader. Votes
        cast meanwhile are left out (those after `until_seq`, for who asks in several calls), which also keeps a vote that is replaced
        meanwhile from being there twice.
        """
        newest = self.newest_vote() if until_seq is None else until_seq
        voted: list[VotedComparison] = []
        while limit is None or len(voted) < limit:
            rows = READ_ROWS if limit is None else min(READ_ROWS, limit - len(voted))
            with self._read() as db:
                seqs = [row[0] for row in db.execute(
                    "select seq from standing_votes where seq > ? and seq <= ? order by seq limit ?", [since_seq, newest, rows])]
                if not seqs:
                    break
                where = "id in (select comparison_id from standing_votes where seq between ? and ?)"
                found = self._comparisons(db, where, [seqs[0], seqs[-1]])
            batch = [VotedComparison(comparison, vote) for comparison in found for vote in comparison.votes if seqs[0] <= vote.seq <= seqs[-1]]
            voted += sorted(batch, key=lambda item: item.vote.seq)
            since_seq = seqs[-1]
        return voted

    def standing_votes(self, *, since_seq: int = 0) -> int:
        """How many votes stand whose seq is after `since_seq`."""
        with self._read() as db:
            if not since_seq:
                return db.execute("select rows from tallies where name = 'standing_votes'").fetchone()[0]
            return db.execute("select count(*) from standing_votes where seq > ?", [since_seq]).fetchone()[0]

    def standing_demonstrations(self, *, since_seq: int = 0) -> int:
        """How many standing votes after `since_seq` carry a reply that a person wrote."""
        with self._read() as db:
            return db.execute("select count(*) from demonstrations where seq > ?", [since_seq]).fetchone()[0]

    def vote_counts(self) -> VoteCounts:
        """Standing votes, and those that no finished round has used yet."""
        with self._read() as db:
            used = db.execute("select coalesce(max(last_seq), 0) from rounds").fetchone()[0]
            last = db.execute("select coalesce(max(seq), 0) from votes").fetchone()[0]
            return VoteCounts(self.standing_votes(), self.standing_votes(since_seq=used), last)

    def export(self, format: str) -> Iterator[dict[str, Any]]:
        """Standing votes as rows: `preference` (TRL's conversational prompt/chosen/rejected, one row a strict pair),
        `preference-implicit` (the same without prompt: both replies with the conversation before them), `ranking` (one
        row a vote) or `demonstration` (a conversation that ends with a person's own reply)."""
        make = EXPORTS[format]
        seq, newest = 0, self.newest_vote()
        while batch := self.voted_comparisons(since_seq=seq, until_seq=newest, limit=EXPORT_ROWS):
            for item in batch:
                yield from make(item)
            seq = batch[-1].vote.seq

    def counts(self) -> dict[str, int]:
        """How many of everything there are."""
        with self._read() as db:
            tallies = dict(db.execute("select name, rows from tallies").fetchall())
            return {"votes": tallies.pop("standing_votes")} | tallies | {name: db.table(name).count for name in ("adapters", "rounds")}

    # --- adapters, rounds, deployment, control

    def take_in_adapter(self, manifest: Mapping[str, Any], status: str, deployed: tuple[str, str | None, str | None] | None = None, *, actor: str = "", action: str = "") -> None:
        """Remember a published version; its manifest stays as first taken in. deployed: the (live, previous, candidate) that come with
        it, by `actor` and `action`, as `deploy` would record them: both or neither, should we be killed."""
        with self._write() as db:
            db.execute(
                "insert into adapters values (?, ?, ?, ?) on conflict (version) do update set status = excluded.status",
                [manifest["version"], status, json.dumps(dict(manifest)), time.time()])
            if deployed is not None:
                self._insert_deployment(db, *deployed, actor=actor, action=action)

    def adapters(self) -> list[AdapterRow]:
        """All versions, oldest first."""
        with self._read() as db:
            return [AdapterRow(v, s, json.loads(m), t) for v, s, m, t in db.execute("select version, status, manifest, taken_in from adapters order by version")]

    def adapter(self, version: str) -> AdapterRow | None:
        """One version."""
        return next((row for row in self.adapters() if row.version == version), None)

    def set_status(self, version: str, status: str) -> None:
        """Change a version's status. Raises NotFound."""
        with self._write() as db:
            if not db.execute("update adapters set status = ? where version = ? returning 1", [status, version]).fetchall():
                raise NotFound(f"there is no version {version}")

    def deployment(self) -> Deployment:
        """What is served."""
        with self._read() as db:
            row = db.execute(
                "select live, previous, candidate, since, (select o.actor from deployments o where o.since is d.since order by o.id limit 1) "
                "from deployments d order by id desc limit 1").fetchone()
            return Deployment(*row) if row else Deployment()

    def deploy(self, live: str, previous: str | None, candidate: str | None = None, *, actor: str, action: str) -> None:
        """Record a new deployment, its versions' statuses and the audit entry, in one transaction. `since` moves only with `live`."""
        with self._write() as db:
            self._insert_deployment(db, live, previous, candidate, actor=actor, action=action)

    def _insert_deployment(self, db: Database, live: str, previous: str | None, candidate: str | None, *, actor: str, action: str) -> None:
        was = self.deployment()
        since = was.since if was.live == live and was.since else time.time()
        db.table("deployments").insert({"live": live, "previous": previous, "candidate": candidate, "since": since, "actor": actor, "action": action})
        gone = [v for v in (was.live, was.candidate) if v not in (None, live, candidate)]
        for version, status in [*((v, "retired") for v in gone), (candidate, "candidate"), (live, "live")]:
            db.execute("update adapters set status = ? where version = ? and status != 'rejected'", [status, version])
        self._audit(db, actor, action, {"live": live, "previous": previous, "candidate": candidate})

    def take_in_round(self, n: int, record: Mapping[str, Any]) -> None:
        """Remember a finished round and which votes it used. An abandoned round has used none.

        Where votes were withdrawn or erased while it ran, the audit log says which version learned from how many of them.
        """
        abandoned = record.get("state") == "abandoned"
        last_seq = 0 if abandoned else int(record.get("last_seq") or 0)
        used = [] if abandoned else list(record.get("vote_ids") or ())
        with self._write() as db:
            db.execute("insert or replace into rounds values (?, ?, ?, ?)", [n, json.dumps(dict(record)), last_seq, time.time()])
            db.conn.executemany("insert or ignore into round_votes values (?, ?)", [(n, v) for v in used])
            standing = "select v.id from votes v join standing_votes s on s.comparison_id = v.comparison_id and s.voter = v.voter"
            gone = len(set(used) - {row[0] for row in db.execute(f"{standing} where v.id in (select value from json_each(?))", [json.dumps(used)])})
            if gone and record.get("version"):
                self._audit(db, "auto", "learned from withdrawn votes", {"round": n, "version": record["version"], "votes": gone})

    def rounds(self) -> list[dict[str, Any]]:
        """Every finished round as the learner wrote it, oldest first."""
        with self._read() as db:
            return [json.loads(row[0]) for row in db.execute("select record from rounds order by round")]

    def round(self, n: int) -> dict[str, Any] | None:
        """One finished round."""
        with self._read() as db:
            row = db.execute("select record from rounds where round = ?", [n]).fetchone()
            return json.loads(row[0]) if row else None

    def control(self) -> Control:
        """What the learner has been told."""
        with self._read() as db:
            paused, run_requested = db.execute("select paused, run_requested from control").fetchone()
            return Control(bool(paused), run_requested)

    def steer(self, action: str, actor: str = "store") -> None:
        """Tell the learner to run once more, pause or resume, and write it into the audit log: both or neither."""
        change = {"run": "run_requested = run_requested + 1", "pause": "paused = 1", "resume": "paused = 0"}[action]
        with self._write() as db:
            db.execute(f"update control set {change}")
            self._audit(db, actor, f"learner {action}", {})

    # --- audit

    def audit(self, actor: str, action: str, detail: Mapping[str, Any]) -> None:
        """Append an entry to the hash-chained log. No words of anybody's belong in it."""
        with self._write() as db:
            self._audit(db, actor, action, detail)

    def _audit(self, db: Database, actor: str, action: str, detail: Mapping[str, Any]) -> None:
        row = db.execute("select id, digest from audit order by id desc limit 1").fetchone()
        number, previous = (row[0] + 1, row[1]) if row else (1, "")
        entry = [number, time.time(), actor, action, json.dumps(dict(detail), sort_keys=True)]
        db.execute("insert into audit values (?, ?, ?, ?, ?, ?, ?)", [*entry, previous, chain(previous, entry)])

    def audit_log(self) -> list[dict[str, Any]]:
        """Every entry, oldest first."""
        with self._read() as db:
            names = ("id", "at", "actor", "action", "detail", "previous", "digest")
            return [dict(zip(names, row, strict=True)) for row in db.execute("select * from audit order by id")]

    def verify_audit(self) -> bool:
        """Whether every entry still hangs on the one before it. (A cut-off end needs a copy of the last digest elsewhere to be seen.)"""
        previous = ""
        for number, row in enumerate(self.audit_log(), 1):
            entry = [row["id"], row["at"], row["actor"], row["action"], row["detail"]]
            if row["id"] != number or row["previous"] != previous or row["digest"] != chain(previous, entry):
                return False
            previous = row["digest"]
        return True


SHOWN = (
    "c.id, c.voter, c.created, (select json_group_array(version) from "
    "(select version from completions where comparison_id = c.id order by slot))"
)
VOTE = "v.id, v.seq, v.comparison_id, v.voter, v.kind, v.groups, v.edit, v.comment, v.created"


def vote_from_row(row: Sequence[Any]) -> Vote:
    """A `Vote` from the columns of `VOTE`."""
    vote_id, seq, comparison_id, voter, kind, groups, edit, comment, created = row
    frozen = tuple(tuple(group) for group in json.loads(groups))
    return Vote(vote_id, seq, comparison_id, voter, kind, frozen, edit, comment, created)


def chain(previous: str, entry: Sequence[Any]) -> str:
    """sha256 over the digest before and this entry."""
    return hashlib.sha256((previous + json.dumps(list(entry))).encode()).hexdigest()


def shown_from_row(row: Sequence[Any]) -> Shown:
    """A `Shown` from the columns of `SHOWN`."""
    return Shown(row[0], row[1], row[2], tuple(json.loads(row[3])))
