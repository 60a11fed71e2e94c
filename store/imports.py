"""Taking in preferences that were collected elsewhere, as comparisons of two replies with a vote each."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

from store.preferences import read_preferences
from store.records import Ballot, Completion, NewComparison
from store.store import Store, new_id

VERSION = "imported"  # the version of replies that no model of ours wrote


def import_preferences(store: Store, file: str | Path, *, hash_voter: Callable[[str], str], progress: Callable[[int, int], None] | None = None) -> int:
    """Read a file of preferences in any layout of `store/preferences.py`; the number of votes taken in.

    The chosen reply takes slot 0 or 1 by a digest of the row, so that position says nothing. All or nothing. Raises
    BadImport naming the line; `hash_voter` makes of a rater's name in the file what is stored (names may be e-mail addresses), `progress(done, total)`.
    """
    path = Path(file)
    rows = read_preferences(path)
    now = time.time()
    with store._write() as db:
        for done, row in enumerate(rows, 1):
            comparison_id = new_id("cmp")
            voter = f"import:{hash_voter(row.voter)}"
            first = hashlib.sha256(json.dumps([row.prompt, row.chosen, row.rejected]).encode()).digest()[0] % 2
            texts = (row.chosen, row.rejected) if first == 0 else (row.rejected, row.chosen)
            completions = tuple(Completion(i, text, (), (), VERSION, "stop", 0) for i, text in enumerate(texts))
            new = NewComparison(comparison_id, new_id("conv"), voter, row.prompt, {"imported": path.name}, completions)
            store._insert_comparison(db, new, now)
            store._insert_vote(db, Ballot(comparison_id, voter, [[first], [1 - first]], "favourite"), now)
            if progress is not None and (done % 50 == 0 or done == len(rows)):
                progress(done, len(rows))
        store._audit(db, "import", "import", {"votes": len(rows)})
    return len(rows)
