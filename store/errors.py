"""Everything the store can refuse, each message one line that says what to do.

    StoreError
    ├── DataDirInUse          another server holds the data directory
    ├── DataDirUnwritable     no permission to write there
    ├── DatabaseTooNew        made by a newer Plaudit
    ├── NoDatabase            read-only, and there is none yet (also a FileNotFoundError)
    ├── DiskFull              nothing was written
    ├── NotFound              no such comparison, conversation, version, round
    ├── BadImport             a line of a data file is not usable
    └── CorruptAdapter        a published adapter's files are not what its manifest says
"""

from __future__ import annotations


class StoreError(Exception):
    """Base of everything the store refuses."""


class DataDirInUse(StoreError):
    """Another process is the writer of this data directory."""


class DataDirUnwritable(StoreError):
    """The data directory cannot be made or written."""


class DatabaseTooNew(StoreError):
    """The database has migrations that this version does not know."""


class NoDatabase(StoreError, FileNotFoundError):
    """Opened read-only before any server has made the database."""


class DiskFull(StoreError):
    """No room; nothing of the refused change was written."""


class NotFound(StoreError):
    """There is no such row, or it is not the asker's."""


class BadImport(StoreError):
    """A data file, or a line of it, is not usable; nothing of the file was taken in."""


class CorruptAdapter(StoreError):
    """A published adapter's files are not what its manifest says."""
