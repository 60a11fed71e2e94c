"""Durability: the SQLite database, the adapter registry and the round files of one data directory. No torch."""

from store.adapters import AdapterRegistry, Manifest
from store.database import durability
from store.errors import (
    BadImport,
    CorruptAdapter,
    DatabaseTooNew,
    DataDirInUse,
    DataDirUnwritable,
    DiskFull,
    NoDatabase,
    NotFound,
    StoreError,
)
from store.imports import import_preferences
from store.preferences import Preference, read_preferences
from store.rounds import RoundFiles
from store.store import Store, new_id

__all__ = [
    "AdapterRegistry", "BadImport", "CorruptAdapter", "DataDirInUse", "DataDirUnwritable", "DatabaseTooNew", "DiskFull",
    "Manifest", "NoDatabase", "NotFound", "Preference", "RoundFiles", "Store", "StoreError", "durability", "import_preferences",
    "new_id", "read_preferences",
]
