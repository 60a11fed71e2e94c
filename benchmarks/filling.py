"""Many comparisons and votes in a store at once, for benchmarks: bulk inserts into its own schema, so that a million take a minute.

What the rows hold is what `Store.record_comparison` and `record_vote` would have written (a test holds them equal); only
the commits are fewer. Owns nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from store.store import Store

BATCH = 10_000  # comparisons a transaction
TOKENS = 12  # of a reply
BEGAN = 1_700_000_000.0  # when the first was shown, Unix seconds; one a second from then on


def fill(store: Store, first: int, count: int, voters: Sequence[str], *, voted: bool, version: str = "base") -> None:
    """Comparisons number `first` to `first + count`, each a conversation of its own with one message and two replies.

    Number i was shown to (and, if `voted`, voted on by) `voters[i % len(voters)]`, and is called `cmp_` and i.
    """
    for start in range(first, first + count, BATCH):
        numbers = range(start, min(start + BATCH, first + count))
        mine = {i: voters[i % len(voters)] for i in numbers}
        logprobs = json.dumps([-1.25] * TOKENS)
        db = store.db.conn
        db.execute("begin immediate")
        db.executemany("insert into conversations values (?, ?, ?, ?)", [(f"conv_{i}", mine[i], BEGAN + i, BEGAN + i) for i in numbers])
        db.executemany(
            "insert into messages values (?, ?, null, 'user', ?, null, null, ?)",
            [(f"msg_{i}", f"conv_{i}", f"Tell me something about number {i}.", BEGAN + i) for i in numbers],
        )
        db.executemany(
            "insert into comparisons values (?, ?, ?, ?, ?, ?)",
            [(f"cmp_{i}", f"conv_{i}", mine[i], f"msg_{i}", '{"temperature": 1.0}', BEGAN + i) for i in numbers],
        )
        db.executemany(
            "insert into completions values (?, ?, ?, ?, ?, ?, 'stop', ?)",
            [
                (f"cmp_{i}", slot, f"It is a number, and reply {slot} says so.", json.dumps([(i + k + slot) % 2000 for k in range(TOKENS)]), logprobs, version, i)
                for i in numbers for slot in (0, 1)
            ],
        )  # fmt: skip
        if voted:
            last = db.execute("select coalesce(max(seq), 0) from votes").fetchone()[0]
            db.executemany(
                "insert into votes values (?, ?, ?, ?, 'favourite', ?, null, null, ?)",
                [(last + 1 + k, f"vote_{i}", f"cmp_{i}", mine[i], f"[[{i % 2}], [{1 - i % 2}]]", BEGAN + i) for k, i in enumerate(numbers)],
            )
            db.executemany("insert into standing_votes values (?, ?, ?)", [(f"cmp_{i}", mine[i], last + 1 + k) for k, i in enumerate(numbers)])
        db.execute("commit")
