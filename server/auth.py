"""Who is asking: API keys with roles, and the opaque voter id of a keyless loopback server.

`data_dir/keys.json` holds argon2 hashes, never keys. `data_dir/salt` turns voter ids into what is stored.
Without keys the server answers loopback only, everyone is an operator, and requests that a foreign web page
could have caused (a foreign Host or Origin) are refused. Does not count requests: `quota.py` does.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import urlsplit

from argon2 import PasswordHasher
from argon2.exceptions import Argon2Error, InvalidHashError
from filelock import FileLock

from server.errors import StartupError
from server.settings import Settings, is_loopback
from store.files import write_bytes, write_json

Role = Literal["user", "operator"]
ROLES: tuple[Role, ...] = get_args(Role)
PREFIX = "plaudit"
UNREAD = (-1, -1)  # the stamp of no file: the next look reads it


@dataclass(frozen=True)
class Identity:
    """Who a request speaks for."""

    voter: str  # salted and hashed: what the database sees
    role: Role
    actor: str  # what the audit log sees: a key's id, or "local"

    @property
    def operator(self) -> bool:
        return self.role == "operator"


@dataclass(frozen=True)
class Key:
    """One line of keys.json."""

    id: str
    hash: str  # argon2id of the secret part
    role: Role
    voter: str  # as given by the operator; hashed with the salt before it is stored with a vote
    created: float  # Unix seconds


class Keyring:
    """The keys of one data directory. Re-reads the file when it changes. Safe to use from several threads."""

    def __init__(self, data_dir: Path) -> None:
        self.path = Path(data_dir) / "keys.json"
        self._hasher = PasswordHasher()
        self._lock = threading.Lock()
        self._stamp: tuple[int, int] | None = None
        self._keys: dict[str, Key] = {}
        self._verified: dict[bytes, str] = {}  # sha256 of a presented key -> key id
        self._read()

    def __len__(self) -> int:
        self._read()
        return len(self._keys)

    def list(self) -> list[Key]:
        """The keys, oldest first."""
        self._read()
        return sorted(self._keys.values(), key=lambda key: key.created)

    def create(self, role: str, voter: str) -> str:
        """Make a key and return it; it cannot be read again. Raises `ValueError` for a bad role or voter."""
        known: Role | None = next((known for known in ROLES if known == role), None)
        if known is None:
            raise ValueError(f"{role!r} is not a role: {' or '.join(ROLES)}")
        if not voter.strip():
            raise ValueError("a key needs a voter id, such as the person's login")
        key_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
        key = Key(key_id, self._hasher.hash(secret), known, voter, time.time())
        with self._changing():
            self._write({**self._keys, key_id: key})
        return f"{PREFIX}-{key_id}-{secret}"

    def revoke(self, key_id: str) -> bool:
        """Forget the key; False when there is none of that id."""
        if not self.path.exists():
            return False
        with self._changing():
            if key_id not in self._keys:
                return False
            self._write({k: v for k, v in self._keys.items() if k != key_id})
            return True

    def find(self, presented: str) -> Key | None:
        """The key that `presented` is, or None. The first time costs an argon2 verification (tens of ms)."""
        self._read()
        digest = hashlib.sha256(presented.encode("utf-8", "surrogatepass")).digest()
        known = self._verified.get(digest)
        if known is not None:
            return self._keys.get(known)
        key = self._keys.get(self.named(presented) or "")
        if key is None:
            return None
        try:
            self._hasher.verify(key.hash, presented.split("-", 2)[2])
        except (Argon2Error, InvalidHashError):
            return None
        self._verified[digest] = key.id
        return key

    def named(self, presented: str) -> str | None:
        """The id that `presented` says it is of, if there is such a key."""
        prefix, _, rest = presented.partition("-")
        key_id, _, secret = rest.partition("-")
        return key_id if prefix == PREFIX and secret and key_id in self._keys else None

    def is_cached(self, presented: str) -> bool:
        """Whether `find` would answer without an argon2 verification."""
        return hashlib.sha256(presented.encode("utf-8", "surrogatepass")).digest() in self._verified

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """The keys as they are in the file, and nobody else's to write until the block ends: another process may be adding one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_suffix(".lock"), mode=0o600):
            with self._lock:
                self._stamp = UNREAD
            self._read()
            yield

    def _read(self) -> None:
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            stamp = None
        else:
            stamp = (stat.st_mtime_ns, stat.st_size)
        with self._lock:
            if stamp == self._stamp:
                return
            keys: dict[str, Key] = {}
            if stamp is not None:
                try:
                    rows = json.loads(self.path.read_text(encoding="utf-8"))["keys"]
                    keys = {row["id"]: Key(**row) for row in rows}
                except (ValueError, KeyError, TypeError) as error:
                    raise StartupError(f"{self.path} is damaged: {error}. Restore it, or move it away") from error
            self._keys, self._stamp, self._verified = keys, stamp, {}

    def _write(self, keys: dict[str, Key]) -> None:
        write_json(self.path, {"keys": [asdict(key) for key in keys.values()]})  # mode 0600
        with self._lock:
            self._stamp = UNREAD
        self._read()


class VoterHash:
    """Turns voter ids into what is stored: HMAC-SHA256 under the data directory's salt, 128 bits in hex."""

    def __init__(self, data_dir: Path) -> None:
        path = Path(data_dir) / "salt"
        try:
            self._salt = path.read_bytes()
        except FileNotFoundError:
            self._salt = secrets.token_bytes(32)
            write_bytes(path, self._salt)  # whole or not at all: half a salt would lock the directory
        if len(self._salt) < 16:
            raise StartupError(f"{path} is damaged; restore it, or delete it and lose who cast which vote")

    def __call__(self, voter: str) -> str:
        return hmac.new(self._salt, voter.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:32]


def check_bind(settings: Settings, keyring: Keyring) -> None:
    """Refuse to serve others without keys. Raises `StartupError`."""
    if not settings.loopback and not len(keyring):
        raise StartupError(
            f"refusing to listen on {settings.host} without keys: anyone could read and steer the assistant. "
            f"Make one with `plaudit keys add NAME --role operator --data-dir {settings.data_dir}`, "
            "or listen on 127.0.0.1"
        )


def foreign_page(host: str | None, origin: str | None) -> bool:
    """Whether a request to a keyless server may come from someone else's web page.

    A browser names the page's origin on cross-site writes, and a rebound DNS name shows in Host.
    """
    try:
        names = [urlsplit(f"//{host or ''}").hostname, *([] if origin is None else [urlsplit(origin).hostname])]
    except ValueError:  # half a bracket
        return True
    return not all(is_loopback(name or "") for name in names)
