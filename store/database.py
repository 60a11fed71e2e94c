"""Opening the SQLite file safely: the one writer's lock, durability settings, migrations, plain errors.

Knows no tables; `store.py` does.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from sqlite_utils import Database
from sqlite_utils.utils import sqlite3

from store.errors import DatabaseTooNew, DataDirInUse, DataDirUnwritable, DiskFull, NoDatabase, StoreError
from store.migrations import migrations

BUSY_TIMEOUT_S = 10.0
FILE = "plaudit.db"


@dataclass(frozen=True)
class Durability:
    """The journal in force and why."""

    journal: str
    synchronous: str
    reason: str

    def __str__(self) -> str:
        return f"SQLite {sqlite3.sqlite_version}, journal {self.journal}, synchronous {self.synchronous}: {self.reason}"


def has_wal_reset_bug(version: tuple[int, ...]) -> bool:
    """Whether this SQLite may corrupt a WAL database: 3.7.0 to 3.51.2, but for the fixed 3.44.6 and 3.50.7."""
    return (3, 7, 0) <= version <= (3, 51, 2) and version not in ((3, 44, 6), (3, 50, 7))


def durability(version: tuple[int, ...] = sqlite3.sqlite_version_info) -> Durability:
    """Journal settings for the linked SQLite: either way, a commit that returned survives a power cut."""
    if has_wal_reset_bug(version):
        return Durability("DELETE", "EXTRA", "this SQLite has the WAL-reset bug, so the write-ahead log is not used")
    return Durability("WAL", "FULL", "this SQLite is free of the WAL-reset bug")


def fsync_dir(path: Path) -> None:
    """Make the names in a directory durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lock_data_dir(data_dir: Path) -> FileLock:
    """Become the one writer of `data_dir`, made if need be. Raises DataDirInUse, DataDirUnwritable."""
    note = data_dir / "plaudit.pid"
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(data_dir / "plaudit.lock", timeout=0, thread_local=False)
        lock.acquire()
        note.write_text(f"{os.getpid()}\n")
        return lock
    except Timeout:
        pid = note.read_text().strip() if note.exists() else "unknown"
        raise DataDirInUse(
            f"{data_dir} is in use by another Plaudit (process {pid}). Stop it, or choose another --data-dir"
        ) from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DiskFull(f"no room on the disk that holds {data_dir}") from error
        raise DataDirUnwritable(
            f"cannot write to {data_dir} ({error.strerror}). Give this user permission, or choose another --data-dir"
        ) from error


def connect_writer(data_dir: Path) -> Database:
    """The writer's connection, migrated. The caller holds the lock. Raises DatabaseTooNew, StoreError."""
    path = data_dir / FILE
    fresh = not path.exists()
    with plain_errors(data_dir):
        if fresh:  # before SQLite makes it: its log takes the file's mode, and both hold people's words
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        db = Database(connection)
        settings = durability()
        db.execute(f"pragma journal_mode = {settings.journal}").fetchone()
        db.execute(f"pragma synchronous = {settings.synchronous}")
        db.execute("pragma foreign_keys = on")
        db.execute("pragma secure_delete = on")  # erased words are overwritten, not just unlinked
        known = {migration.name for migration in migrations._migrations}
        newer = sorted({migration.name for migration in migrations.applied(db)} - known)
        if newer:
            db.close()
            raise DatabaseTooNew(f"{path} was made by a newer Plaudit (it has {newer[-1]}). Update Plaudit, or choose another --data-dir")
        migrations.apply(db)
    if fresh:
        fsync_dir(data_dir)
    return db


def connect_reader(data_dir: Path) -> Database:
    """A read-only connection. Raises NoDatabase while there is none, or none with its tables yet."""
    path = data_dir / FILE
    if not path.exists():
        raise NoDatabase(f"there is no database in {data_dir} yet; `plaudit serve` makes it")
    with plain_errors(data_dir):
        uri = f"{path.resolve().as_uri()}?mode=ro"
        connection = sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        db = Database(connection)
        if migrations.pending(db):
            db.close()
            raise NoDatabase(f"the database in {data_dir} is not ready yet; `plaudit serve` brings it up to date")
    return db


@contextlib.contextmanager
def plain_errors(data_dir: Path) -> Iterator[None]:
    """SQLite's and the disk's own errors as ours. No SQL and no words of anybody's in the message."""
    try:
        yield
    except sqlite3.OperationalError as error:
        said = str(error)
        if "full" in said:
            raise DiskFull(f"no room on the disk that holds {data_dir}; nothing was written") from error
        if "readonly" in said or "unable to open" in said:
            raise DataDirUnwritable(f"cannot open the database in {data_dir} ({said})") from error
        if "disk I/O error" in said:
            raise StoreError(f"the disk that holds {data_dir} is full or fails ({said})") from error
        if "locked" in said or "busy" in said:
            raise StoreError(f"the database in {data_dir} was busy for {BUSY_TIMEOUT_S:.0f} s; try again") from error
        raise
    except sqlite3.DatabaseError as error:
        if "not a database" in str(error) or "malformed" in str(error):
            raise StoreError(f"{data_dir / FILE} is damaged ({error}). Restore it from a backup, or move it away") from error
        raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DiskFull(f"no room on the disk that holds {data_dir}; nothing was written") from error
        raise
