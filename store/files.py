"""Durable files: written whole or not at all. Knows nothing of what is in them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from store.database import fsync_dir, plain_errors


def fsync_file(path: Path) -> None:
    """Make a file's bytes durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_json(path: Path, fields: Mapping[str, Any], *, durable: bool = True) -> None:
    """Replace `path` in one step. Raises DiskFull, and ValueError for NaN and infinity, which are not JSON."""
    text = json.dumps(dict(fields), indent=1, allow_nan=False, ensure_ascii=False)
    write_bytes(path, (text + "\n").encode("utf-8"), durable=durable)


def write_bytes(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Replace `path` in one step, its owner's alone to read. Raises DiskFull."""
    with plain_errors(path.parent):
        replace(path, data, durable)


def replace(path: Path, data: bytes, durable: bool) -> None:
    """Write beside `path`, then rename."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    if durable:
        fsync_dir(path.parent)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises FileNotFoundError, ValueError."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(fields, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return fields
