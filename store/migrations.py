"""The schema, as migrations applied in order. Never edit one that has shipped: add the next."""

from __future__ import annotations

from sqlite_utils import Database, Migrations

migrations = Migrations("plaudit")


@migrations()
def m001_chat(db: Database) -> None:
    """Conversations as message trees, comparisons and their completions."""
    db.executescript("""
    create table conversations (
        id text primary key, voter text not null, created real not null, updated real not null
    ) strict;
    create index conversations_by_voter on conversations (voter, updated);
    create table messages (
        id text primary key, conversation_id text not null references conversations (id),
        parent_id text references messages (id), role text not null, content text not null,
        comparison_id text, completion_index integer, created real not null
    ) strict;
    create index messages_by_parent on messages (conversation_id, parent_id);
    create table comparisons (
        id text primary key, conversation_id text not null references conversations (id), voter text not null,
        message_id text not null references messages (id), settings text not null, created real not null
    ) strict;
    create index comparisons_by_conversation on comparisons (conversation_id, created);
    create table completions (
        comparison_id text not null references comparisons (id), slot integer not null, text text not null,
        token_ids text not null, logprobs text not null, version text not null, finish_reason text not null,
        seed integer not null, primary key (comparison_id, slot)
    ) strict, without rowid;
    """)


@migrations()
def m002_votes(db: Database) -> None:
    """Votes: an append-only history (`seq` orders it), and which row of it stands for each comparison and voter."""
    db.executescript("""
    create table votes (
        seq integer primary key autoincrement, id text not null unique, comparison_id text not null references comparisons (id),
        voter text not null, kind text not null check (kind in ('favourite', 'ranking', 'tie', 'none', 'withdrawn')),
        groups text not null, edit text, comment text, created real not null
    ) strict;
    create index votes_by_comparison on votes (comparison_id, voter, seq);
    create table standing_votes (
        comparison_id text not null, voter text not null, seq integer not null unique references votes (seq),
        primary key (comparison_id, voter)
    ) strict, without rowid;
    create table demonstrations (
        seq integer primary key references votes (seq), comparison_id text not null references comparisons (id),
        voter text not null, reply text not null, created real not null
    ) strict;
    """)


@migrations()
def m003_operations(db: Database) -> None:
    """Adapters, rounds, the deployment history, control, and the hash-chained audit log."""
    db.executescript("""
    create table adapters (
        version text primary key, status text not null check (status in ('candidate', 'live', 'retired', 'rejected')),
        manifest text not null, taken_in real not null
    ) strict;
    create table rounds (round integer primary key, record text not null, last_seq integer not null, taken_in real not null) strict;
    create table round_votes (round integer not null, vote_id text not null, primary key (vote_id, round)) strict, without rowid;
    create table deployments (
        id integer primary key autoincrement, live text not null, previous text, candidate text, since real not null,
        actor text not null, action text not null
    ) strict;
    create table control (id integer primary key check (id = 1), paused integer not null, run_requested integer not null) strict;
    insert into control values (1, 0, 0);
    create table audit (
        id integer primary key, at real not null, actor text not null, action text not null, detail text not null,
        previous text not null, digest text not null
    ) strict;
    create trigger audit_is_append_only_u before update on audit begin select raise(abort, 'the audit log is append-only'); end;
    create trigger audit_is_append_only_d before delete on audit begin select raise(abort, 'the audit log is append-only'); end;
    """)


@migrations()
def m004_flat_reads(db: Database) -> None:
    """What pages ask for costs the same however much there is: the newest conversations by an index, counts by tallies."""
    db.executescript("create index conversations_by_update on conversations (updated);")
    db.executescript("create table tallies (name text primary key, rows integer not null) strict, without rowid;")
    for table in ("conversations", "comparisons", "completions", "standing_votes", "demonstrations"):
        db.executescript(f"""
        insert into tallies select '{table}', count(*) from {table};
        create trigger {table}_more after insert on {table} begin update tallies set rows = rows + 1 where name = '{table}'; end;
        create trigger {table}_less after delete on {table} begin update tallies set rows = rows - 1 where name = '{table}'; end;
        """)
