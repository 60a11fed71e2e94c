"""What may be said of an error that nobody foresaw. Light, so that it can be said whatever failed to load."""

from __future__ import annotations

import traceback
from pathlib import Path


def unforeseen(error: Exception) -> str:
    """Its type and place. Its message may be people's words, so the log on stderr gets the frames alone."""
    traceback.print_tb(error.__traceback__)
    where = traceback.extract_tb(error.__traceback__)[-1:]
    return type(error).__name__ + "".join(f" at {Path(frame.filename).name}:{frame.lineno}" for frame in where) + "; the learner's log has more"
