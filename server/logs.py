"""Structured logs: one JSON object a line on stderr. Never what people or the model wrote.

Owns the format, and what uvicorn's own lines may say. Callers pass ids, counts, names of versions and types of errors.
"""

from __future__ import annotations

import logging
import sys
import traceback

import structlog


def configure(level: str = "info") -> None:
    """Send structlog's lines of at least `level` to stderr as JSON."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=_stderr,
        cache_logger_on_first_use=False,
    )


def _stderr(*_: object) -> structlog.PrintLogger:
    return structlog.PrintLogger(sys.stderr)  # looked up at each line, so that redirection works


def places(error: BaseException, last: int = 6) -> list[str]:
    """Where it was raised, innermost last, as file:line."""
    return [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)][-last:]


class Wordless(logging.Filter):
    """Takes out of uvicorn's lines what an exception says, which may be people's words: its type and place stay.

    A start that failed is told in its last line, without the traceback: nobody has said anything yet.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            record.msg, record.args = f"{str(record.msg).strip()}: {type(error).__name__} at {' > '.join(places(error))}", None
            record.exc_info = record.exc_text = None
        elif str(record.msg).startswith("Traceback"):
            record.msg = str(record.msg).strip().splitlines()[-1].partition(": ")[2] or "the server could not start"
        return True
