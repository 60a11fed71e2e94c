"""Rows of a data file: JSON lines, a JSON array or one JSON object, plain or gzipped; and the messages in them.

Owns bytes to objects, each with where it stands, so that an error can name it. Does not know what a row means
(`store/preferences.py`, `learner/formats.py`).
"""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from store.errors import BadImport
from store.records import Message

ROLES = ("system", "user", "assistant")
Row = tuple[str, dict[str, Any]]  # where ("votes.jsonl:3"), and what


def read_text(file: str | Path) -> str:
    """A UTF-8 file, gunzipped when it is gzipped whatever its name. Raises BadImport when it is missing or neither."""
    path = Path(file)
    try:
        data = path.read_bytes()
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
        return data.decode("utf-8-sig")
    except FileNotFoundError:
        raise BadImport(f"there is no file {path}") from None
    except IsADirectoryError:
        raise BadImport(f"{path} is a directory: give a file") from None
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BadImport(f"{path.name} is not UTF-8 text, plain or gzipped ({type(error).__name__})") from None


def read_rows(file: str | Path) -> list[Row]:
    """The rows of `.jsonl`, or of `.json` holding an array, one object, or (as is common) lines after all; `.gz` of any.

    Raises BadImport naming file and line (of an array: the item); its message quotes nothing of the file.
    """
    path, text = Path(file), read_text(file)
    lines = "jsonl" in path.name or "ndjson" in path.name
    if not lines:
        try:
            whole = json.loads(text)
        except ValueError as error:
            first = next((line for line in text.split("\n") if line.strip()), "")
            lines = isinstance(parsed(first), dict)
            if not lines:
                at = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
                raise BadImport(f"{path.name}{at} is not JSON") from None
        except RecursionError:
            raise BadImport(f"{path.name} is JSON nested too deep") from None
    if lines:
        found = [(f"{path.name}:{n}", parsed(line)) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    elif isinstance(whole, list):
        found = [(f"{path.name}, item {n}", item) for n, item in enumerate(whole, 1)]
    else:
        found = [(path.name, whole)]
    for where, row in found:
        if row is BROKEN:
            raise BadImport(f"{where} is not JSON")
        if not isinstance(row, dict):
            raise BadImport(f"{where} is not a JSON object")
    return found


BROKEN = object()


def parsed(line: str) -> Any:
    """The line's JSON value, or BROKEN."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return BROKEN


def messages(value: Any, role: str, where: str, name: str) -> tuple[Message, ...]:
    """A conversation from a list of messages or, said by `role`, a plain string. Raises BadImport."""
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    good = isinstance(value, list) and all(
        isinstance(m, dict) and m.get("role") in ROLES and isinstance(m.get("content"), str) for m in value
    )
    if not good:
        raise BadImport(f"{where}: {name} must be a string or a list of {{role, content}} with role {', '.join(ROLES)}")
    try:
        "".join(m["content"] for m in value).encode()
    except UnicodeEncodeError:
        raise BadImport(f"{where}: {name} holds half a character (a lone surrogate)") from None
    return tuple({"role": m["role"], "content": m["content"]} for m in value)
